"""Losses and gradients against the recorded original: 1e-3 of a loss, and of the norm of a gradient; see README.md."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from groma import boxes as box_ops
from groma import markup
from groma.model.detection_loss import stage_loss
from groma.model.regions import match_regions, select
from groma.model.splicer import IGNORE
from groma.structures import Spliced
from tests.golden.recording import GROUND_SCORE, Golden, choose, original_selection, watch

BOX, LOGIT = 3e-5, 1e-2
RELATIVE = 1e-3
NOISE = 2e-5  # of a gradient that cancels but for rounding: that of a key's bias, or of a bias before a norm
ROWS = (0, 1)
TEXT_SAMPLES, BOX_SAMPLES = 32, 16


@contextmanager
def gradients(model: nn.Module, samples: int) -> Iterator[dict[str, Tensor]]:
    """name → norm and ``samples`` evenly spaced numbers of every gradient made in the block; none is kept whole."""
    found: dict[str, Tensor] = {}

    def take(name: str, parameter: Tensor) -> None:
        gradient = parameter.grad.flatten()  # type: ignore[union-attr]
        step = max(1, len(gradient) // samples)
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float64).float()
        found[name] = torch.cat((norm[None], gradient[::step][:samples]))
        parameter.grad = None

    hooks = [parameter.register_post_accumulate_grad_hook(lambda p, name=name: take(name, p))
             for name, parameter in model.named_parameters() if parameter.requires_grad]  # fmt: skip
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def compare(golden: Golden, prefix: str, found: dict[str, Tensor], head: str = "") -> None:
    """Every recorded gradient, and no other; ``head`` begins the names of a part that was recorded alone."""
    recorded = {golden.ours(head + key.removeprefix(prefix)): value for key, value in golden.recorded.items()
                if key.startswith(prefix)}  # fmt: skip
    assert set(found) == set(recorded)
    assert len(recorded) > 50
    for name, wanted in recorded.items():
        off = (found[name][: len(wanted)] - wanted).abs().max().item()
        assert off <= RELATIVE * wanted[0].item() + NOISE, f"the gradient of {name} is off by {off:.1e}"


def annotated(golden: Golden, kind: str) -> tuple[Tensor, Tensor]:
    """The boxes of both rows of the training batch."""
    return golden.corners(f"inputs/train_{kind}_boxes_0"), golden.corners(f"inputs/train_{kind}_boxes_1")


def test_text_loss_on_the_regions_of_the_original(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two padded rows with user's and true boxes: ids, labels, mask, logits, loss and every trained gradient.

    The original lets true boxes compete for regions with score 0.2; its regions stand in for ours here.
    """
    model, refer, ground = golden.model, annotated(golden, "refer"), annotated(golden, "ground")
    for row in ROWS:
        kept = original_selection(golden.candidates(row), refer[row], ground[row], golden.config)
        assert kept.tolist() == golden.recorded[f"train/nms_kept_{row}"].tolist()
        everything = torch.cat((golden.candidates(row).boxes, refer[row], ground[row]))
        golden.check(f"train/selected_boxes_{row}", box_ops.xyxy_to_cxcywh(everything[kept]), BOX)
    choose(monkeypatch, [golden.corners(f"train/selected_boxes_{row}") for row in ROWS])
    made: list[Spliced] = []
    splice = type(model).splice
    monkeypatch.setattr(type(model), "splice", lambda *given: made.append(splice(*given)) or made[-1])
    for part in (model.encoder, model.proposer):
        part.requires_grad_(False)
    ids = golden.recorded["inputs/train_input_ids"]
    with gradients(model, TEXT_SAMPLES) as found, watch({"decoder": model.llm.get_decoder()}) as seen:
        out = model(
            pixel_values=golden.pixels, input_ids=ids, attention_mask=ids != golden.config.token_id(markup.PAD),
            labels=golden.recorded["inputs/train_labels"], refer_boxes=refer, ground_boxes=ground,
        )  # fmt: skip
        out.loss.backward()

    [spliced] = made
    assert torch.equal(spliced.ids, golden.slots(golden.recorded["train/expanded_input_ids"]))
    assert torch.equal(spliced.mask, golden.recorded["train/attention_mask"])
    assert spliced.labels is not None
    # recorded before expansion, with the words of the true boxes in place
    for ours, theirs in zip(spliced.labels, golden.recorded["train/mutated_labels"], strict=True):
        assert ours[ours != IGNORE].tolist() == theirs[theirs != IGNORE].tolist()
    with torch.no_grad():
        hidden = seen["decoder"][0][1].last_hidden_state[:, ::4]
        logits = model.vocabulary.logits(hidden, model.llm.get_output_embeddings())
    golden.check("train/logits_every4", logits, LOGIT)
    assert list(out.losses) == ["text"]
    assert out.loss.item() == pytest.approx(golden.facts["train_loss"], rel=RELATIVE)
    compare(golden, "train/grad/", found)


def test_no_true_box_is_lost(golden: Golden) -> None:
    """Where ours differs on purpose: a true box always has a region that overlaps it as NMS asks.

    In the set whose score threshold is above 0.2 the original loses all of them, and what it trains to be written
    in their place is the nearest region, however far.
    """
    refer, ground, config = annotated(golden, "refer"), annotated(golden, "ground"), golden.config

    def worst(row: int, regions: Tensor) -> float:
        best = box_ops.iou(ground[row], regions)[range(len(ground[row])), match_regions(ground[row], regions)]
        return best.min().item()

    ours = [select(golden.candidates(row), refer[row], ground[row], config).boxes for row in ROWS]
    theirs = [golden.corners(f"train/selected_boxes_{row}") for row in ROWS]
    assert all(worst(row, ours[row]) >= config.nms_threshold for row in ROWS)
    if golden.name == "exotic":
        assert config.score_threshold > GROUND_SCORE
        for row in ROWS:  # true boxes are counted after the proposals and the user's
            assert golden.recorded[f"train/nms_kept_{row}"].max() < config.proposer.queries + len(refer[row])
            assert worst(row, theirs[row]) < config.nms_threshold


@pytest.mark.parametrize("source", ["coco", "sa1b"])
def test_detection_loss(golden: Golden, source: str) -> None:
    """Every term of every layer, their sum, and every gradient of the proposer. The encoder is frozen."""
    model, recorded = golden.model, golden.facts["detection"][source]
    model.proposer.requires_grad_(True)
    model.encoder.requires_grad_(False)
    targets = tuple(golden.corners(f"inputs/det_boxes_{i}") for i in range(2))
    with gradients(model.proposer, BOX_SAMPLES) as found, watch({"proposer": model.proposer}) as seen:
        out = model(pixel_values=golden.pixels, targets=targets, source=source)
        out.loss.backward()
    assert out.loss.item() == pytest.approx(recorded["loss"], rel=RELATIVE)

    detections, config = seen["proposer"][0][1], golden.config.proposer
    layers = list(zip(detections.logits[source], detections.boxes, strict=True))
    stages = {f"_{i}": layer for i, layer in enumerate(layers[:-1])} | {"": layers[-1]}
    stages["_enc"] = (detections.encoder_logits, detections.encoder_boxes)
    centred = [box_ops.xyxy_to_cxcywh(t) for t in targets]
    for ending, (logits, boxes) in stages.items():
        terms = stage_loss(logits, boxes, centred, config) / torch.tensor(config.loss_weights)
        wanted = [recorded[f"loss_{term}{ending}"] for term in ("ce", "bbox", "giou")]
        assert terms.tolist() == pytest.approx(wanted, rel=RELATIVE)
    prefix = {"coco": "det/grad/", "sa1b": "det/grad_sa1b/"}[source]
    found = {f"proposer.{name}": value for name, value in found.items()}
    compare(golden, prefix, found, "perceiver.")
