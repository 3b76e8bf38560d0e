"""Released checkpoints by name and number: every tensor of the 7B has its place, and its configuration its meaning."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from groma.model import checkpoint
from groma.model.checkpoint_keys import owner
from groma.model.configuration import GromaConfig
from groma.model.groma import GromaForConditionalGeneration

Make = Callable[..., GromaForConditionalGeneration]
Write = Callable[..., Path]
GOLDEN = Path(__file__).resolve().parents[2] / "golden"
DETR = "perceiver.ddetr_transformer."


def released() -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """The released 7B's config.json, and name and shape of its 1,177 tensors; {0..23} and {0,2} stand for numbers."""
    content = json.loads((GOLDEN / "released_7b.json").read_text())

    def names(pattern: str) -> Iterator[str]:
        match = re.search(r"\{(.+)\}", pattern)
        if match is None:
            yield pattern
            return
        first, _, last = match[1].partition("..")
        for number in range(int(first), int(last) + 1) if last else match[1].split(","):
            yield pattern.replace(match[0], str(number))

    return content["config"], {n: tuple(s) for p, s in content["tensors"].items() for n in names(p)}


# -- names ------------------------------------------------------------------------------------------------------------


def test_every_tensor_of_the_released_7b_has_its_place() -> None:
    original, tensors = released()
    assert len(tensors) == 1177
    places = checkpoint.stored_shapes(GromaForConditionalGeneration, checkpoint.convert_config(original))
    ours = {name: checkpoint.to_ours(name) for name in tensors}
    assert sum(name is None for name in ours.values()) == 68
    assert {owner(name) for name, place in ours.items() if place is None} < {n for n, p in ours.items() if p}
    assert {place: tensors[name] for name, place in ours.items() if place} == {n: tuple(s) for n, s in places.items()}
    assert sorted(name for place in places for name in checkpoint.to_original(place)) == sorted(tensors)


def test_names_by_hand() -> None:
    assert checkpoint.to_ours(f"{DETR}bbox_embed.3.layers.1.weight", 3) == "proposer.enc_box.2.weight"
    assert checkpoint.to_ours(f"{DETR}bbox_embed.3.layers.1.weight", 6) == "proposer.box_heads.3.2.weight"
    assert checkpoint.to_ours(f"{DETR}level_embed") == "proposer.level_embed"
    assert checkpoint.to_ours("llm.model.layers.3.self_attn.rotary_emb.inv_freq") is None
    heads = [f"{DETR}class_embed_sa1b.0.bias", f"{DETR}decoder.class_embed_sa1b.0.bias"]
    assert checkpoint.to_original("proposer.class_heads.sa1b.0.bias") == heads
    with pytest.raises(ValueError, match="llmx.weight is not the name"):
        checkpoint.to_ours("llmx.weight")
    with pytest.raises(ValueError, match="words_head.bias: the original has no such tensor"):
        checkpoint.to_original("words_head.bias")


def test_values_land_where_they_belong(model: GromaForConditionalGeneration, write: Write) -> None:
    stored = load_file(write(model) / "model.safetensors")
    heads, layer = model.proposer.box_heads, model.proposer.decoder[1]
    for name, tensor in {
        f"{DETR}bbox_embed.1.layers.2.weight": heads[1].last.weight,
        f"{DETR}bbox_embed.2.layers.0.bias": model.proposer.enc_box[0].bias,
        f"{DETR}decoder.bbox_embed.2.layers.0.bias": model.proposer.enc_box[0].bias,
        f"{DETR}decoder.layers.1.encoder_attn.value_proj.weight": layer.cross.value_proj.weight,
        f"{DETR}decoder.layers.1.self_attn.q_proj.weight": layer.q_proj.weight,
        f"{DETR}decoder.layers.1.final_layer_norm.bias": layer.ffn.norm.bias,
        f"{DETR}query_position_embeddings.weight": model.proposer.content.weight,
        "perceiver.vis_encoder.encoder.layer.2.attention.attention.key.weight":
            model.encoder.vit.get_parameter("encoder.layer.2.attention.k_proj.weight"),
        "region_encoder.roi_align.pos_embedd.3.weight": model.regions.box_embedding[3].weight,
        "new_input_embs.weight": model.vocabulary.embed.weight,
        "extra_lm_head.weight": model.vocabulary.head.weight,
        "llm.lm_head.weight": model.llm.lm_head.weight,
    }.items():  # fmt: skip
        assert torch.equal(stored[name], tensor), name


# -- configuration ----------------------------------------------------------------------------------------------------


def test_released_configuration() -> None:
    original, _ = released()
    config = checkpoint.convert_config(original)
    assert (config.encoder.image_size, config.encoder.num_hidden_layers, config.encoder.patch_size) == (518, 24, 14)
    assert (config.proposer.width, config.proposer.queries, config.proposer.levels) == (256, 300, 1)
    assert (config.proposer.costs, config.proposer.loss_weights) == ([2.0, 5.0, 2.0], [2.0, 5.0, 2.0])
    assert (config.base_vocab, config.new_words, config.vocab_size, config.proxies) == (32000, 114, 32114, 100)
    assert (config.token_id("<s>"), config.token_id("[PAD]"), config.token_id("<r99>")) == (1, 32000, 32113)
    assert (config.image_size, config.max_regions, config.score_threshold) == (448, 100, 0.15)
    assert (config.region_boxes, config.region_stride_error, config.position_scale_offset) == ("centre", 2.0, 0.1)
    assert config.llm.rms_norm_eps == 1e-5


def test_a_stored_nms_threshold_of_zero_is_read_as_the_published_one() -> None:
    original = released()[0] | {"nms_thres": 0.0}
    assert checkpoint.convert_config(original).nms_threshold == 0.6
    assert checkpoint.convert_config(original, keep_nms=True).nms_threshold == 0.0
    assert checkpoint.convert_config(original | {"nms_thres": 0.4}).nms_threshold == 0.4
    assert GromaConfig.from_dict(original, nms_threshold=0.0).nms_threshold == 0.0


def test_smaller_pictures_have_a_larger_stride_error() -> None:
    """The original multiplies boxes by 448 whatever its input is: on 280 pixels strides are off by 2 · 448 / 280."""
    assert checkpoint.convert_config(released()[0], image_size=280).region_stride_error == pytest.approx(3.2)


@pytest.mark.parametrize(
    "path, value, message",
    [
        (("perceiver_cfg", "ddetr_cfg", "two_stage"), False, r"ddetr_cfg.two_stage: got False"),
        (("perceiver_cfg", "ddetr_cfg", "num_queries"), 200, r"two_stage_num_proposals 300 and num_queries 200"),
        (("perceiver_cfg", "vis_output_layer"), -2, r"vis_output_layer: got -2"),
        (("num_new_token",), 20, r"num_new_token 20 leaves 6 proxy words for max_region_num 100"),
        (("perceiver_cfg", "ddetr_cfg"), None, r"not an original perceiver"),
    ],
)
def test_another_design_is_refused(path: tuple[str, ...], value: Any, message: str) -> None:
    original = released()[0]
    place = original
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        checkpoint.convert_config(original)


def test_what_the_original_cannot_be_is_not_written(make: Make, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no model with region_boxes 'corners', region_stride_error 1.0, pos.*words 6"
    ):
        next(checkpoint.save_original(make(), tmp_path / "new"))
    assert not (tmp_path / "new").exists()
