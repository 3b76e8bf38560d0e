"""From regions to generated words, against the recorded original. Tolerances are absolute: see README.md."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from groma import boxes as box_ops
from groma import markup
from groma.model.regions import match_regions, select
from groma.structures import Spliced
from tests.golden.recording import Golden, choose, original_selection, watch

ENCODER, BOX, REGION, IMAGE_TOKEN, LOGIT = 1e-4, 3e-5, 2e-3, 1e-4, 1e-2
STEPS = 20
NONE = torch.zeros(0, 4)


def test_region_encoder(golden: Golden, run: SimpleNamespace) -> None:
    """Fused maps, what ROIAlign reads, the two summands of a region's token, and the token."""
    seen = run.seen
    coarsest = torch.relu(seen["first_norm"][2][1])  # called level by level, fine to coarse
    golden.check("infer/fuse_conv0_coarsest", coarsest[:, ::4, ::2, ::2], ENCODER)
    for level in range(3):
        step = 8 >> level
        golden.check(f"infer/fused_map_{level}", seen["fuse"][0][1][level][:, ::4, ::step, ::step], ENCODER)
        golden.check(f"infer/roi_feats_{level}", seen[f"pooled{level}"][0][0][:, ::16, ::3, ::3], REGION)
    golden.check("infer/roi_flatten_linear", seen["flatten"][0][1], REGION)
    golden.check("infer/roi_pos_embed", seen["box_embedding"][0][1][:, ::4], REGION)
    golden.check("infer/region_features", run.view.region_tokens, REGION)


@torch.no_grad()
def test_region_encoder_on_strange_boxes(golden: Golden) -> None:
    """Both pictures at once; boxes that, read as the released weights read them, are empty, reversed or outside."""
    regions = golden.model.regions
    boxes = [golden.corners(f"inputs/region_boxes_{i}") for i in range(2)]
    inner = {"fuse": regions.fuse, "flatten": regions.flatten}
    inner |= {f"pooled{i}": conv for i, conv in enumerate(regions.convs)}
    with watch(inner) as seen:
        tokens = regions(golden.model.encoder(golden.pixels), boxes)
    for level in range(3):
        step = 8 >> level
        golden.check(f"region/fused_map_{level}", seen["fuse"][0][1][level][:, ::8, ::step, ::step], ENCODER)
        golden.check(f"region/roi_feats_{level}", seen[f"pooled{level}"][0][0][:, ::16, ::2, ::2], REGION)
    golden.check("region/flatten_linear", seen["flatten"][0][1], REGION)
    for i in range(2):
        golden.check(f"region/region_features_{i}", tokens[i], REGION)


def test_image_tokens(golden: Golden, run: SimpleNamespace) -> None:
    golden.check("infer/bridge_input_first16", run.seen["merged"][0][0][:, :16], ENCODER)
    golden.check("infer/image_tokens", run.view.image_tokens[None, ::2], IMAGE_TOKEN)


@torch.no_grad()
def test_language_model(golden: Golden, run: SimpleNamespace) -> None:
    """Ids after expansion exactly, what the slots hold, and what the language model makes of it."""
    spliced, model = run.spliced, golden.model
    assert torch.equal(spliced.ids, golden.slots(golden.recorded["infer/expanded_input_ids"]))
    golden.check("infer/inputs_embeds_slice", spliced.embeds[:, ::4, ::16], IMAGE_TOKEN)
    with watch({"decoder": model.llm.get_decoder()}) as seen:
        logits = model.speak(spliced.embeds, spliced.mask).logits
    golden.check("infer/llm_last_hidden_slice", seen["decoder"][0][1].last_hidden_state[:, ::4, ::16], LOGIT)
    golden.check("infer/logits", logits, LOGIT)


def write_on(golden: Golden, spliced: Spliced) -> tuple[list[int], Tensor]:
    """Twenty words greedily, of the whole vocabulary and past the end, as the original wrote them; their logits."""
    out = golden.model.generate(
        inputs_embeds=spliced.embeds, attention_mask=spliced.mask, max_new_tokens=STEPS, do_sample=False,
        eos_token_id=None, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return out.sequences[0].tolist(), torch.stack(out.logits, 1)


def generated(golden: Golden, part: str) -> list[int]:
    """The ids the original wrote, without its prompt."""
    return golden.recorded[f"{part}/generated"][0, golden.recorded[f"inputs/{part}_input_ids"].shape[1] :].tolist()


def test_generation(golden: Golden, run: SimpleNamespace) -> None:
    ids, logits = write_on(golden, run.spliced)
    assert ids == generated(golden, "infer")
    golden.check("infer/generated_scores", logits, LOGIT)


def test_generation_never_names_a_region_that_is_not_there(golden: Golden, run: SimpleNamespace) -> None:
    """The original may write any proxy, and in both sets it does; ours may not. Up to that word they agree."""
    absent = set(golden.config.proxy_ids[len(run.view.proposals) :])
    original = generated(golden, "infer")
    first = next(i for i, word in enumerate(original) if word in absent)
    ids = golden.model.generate(
        golden.recorded["inputs/infer_input_ids"], pixel_values=golden.pixels[:1], max_new_tokens=first + 3,
        do_sample=False, eos_token_id=None,
    )[0].tolist()  # fmt: skip
    assert ids[:first] == original[:first]
    assert not absent & set(ids)


@torch.no_grad()
def test_refer_on_the_regions_of_the_original(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three user boxes. The original loses the third, which overlaps the second, and a proposal the first covers.

    With its regions in place of ours, ids, tokens, logits and generated words are the same.
    """
    boxes = golden.corners("inputs/refer_boxes")
    kept = original_selection(golden.candidates(0), boxes, NONE, golden.config)
    assert kept.tolist() == golden.recorded["refer/nms_kept"].tolist()
    everything = torch.cat((golden.candidates(0).boxes, boxes))
    golden.check("refer/selected_boxes", box_ops.xyxy_to_cxcywh(everything[kept]), BOX)

    choose(monkeypatch, [golden.corners("refer/selected_boxes")])
    [view] = golden.model.look(golden.pixels[:1], (boxes,))
    golden.check("refer/region_features", view.region_tokens[:, ::4], REGION)
    spliced = golden.model.splice([view], [golden.prompt("refer", refer=boxes)])
    assert torch.equal(spliced.ids, golden.slots(golden.recorded["refer/expanded_input_ids"]))
    logits = golden.model.speak(spliced.embeds, spliced.mask).logits
    golden.check("refer/logits", logits[:, ::2], LOGIT)
    golden.check("refer/last_logits", logits[:, -1], LOGIT)
    assert write_on(golden, spliced)[0] == generated(golden, "refer")


def test_every_user_box_is_a_region_of_its_own(golden: Golden) -> None:
    """Where ours differs on purpose: the original's prompt names one region for two of the three boxes."""
    boxes, proxies = golden.corners("inputs/refer_boxes"), golden.config.proxy_ids
    opens, closes = golden.config.token_id(markup.ROI_OPEN), golden.config.token_id(markup.ROI_CLOSE)
    ids = golden.recorded["refer/expanded_input_ids"][0].tolist()
    named = [b for a, b, c in zip(ids, ids[1:], ids[2:], strict=False) if (a, c) == (opens, closes)]
    assert named == [proxies[0], proxies[1], proxies[1]]
    kept = select(golden.candidates(0), boxes, NONE, golden.config)
    assert match_regions(boxes, kept.boxes) == [0, 1, 2]
    alone = select(golden.candidates(0), NONE, NONE, golden.config)
    assert torch.equal(kept.boxes, torch.cat((boxes, alone.boxes)))  # and no proposal is lost to them
