"""Released checkpoints there and back, bit by bit, with all that transformers' from_pretrained offers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from groma import markup
from groma.model.checkpoint_files import read
from groma.model.checkpoint_keys import owner
from groma.model.configuration import GromaConfig
from groma.model.groma import GromaForConditionalGeneration
from groma.predictor import Groma

Make = Callable[..., GromaForConditionalGeneration]
Write = Callable[..., Path]
Same = Callable[[GromaForConditionalGeneration, GromaForConditionalGeneration], None]
TEXT = Path(__file__).resolve().parents[2] / "golden" / "text"
MAPS = Path("/proc/self/maps")
DETR = "perceiver.ddetr_transformer."
EXOTIC = {
    "encoder": {"use_swiglu_ffn": True, "layer_norm_eps": 1e-5},
    "proposer": {"levels": 3, "activation": "gelu", "encoder_points": 3, "decoder_heads": 2, "costs": [1.0, 4.0, 3.0]},
    "llm": {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4}},
    "score_threshold": 0.25, "nms_threshold": 0.4, "found_threshold": 0.75, "region_width": 16,
}  # fmt: skip


def load(folder: Path | str, **options: Any) -> GromaForConditionalGeneration:
    return GromaForConditionalGeneration.from_pretrained(folder, **options)


def change(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    """Edit the tensors of a directory with one safetensors file."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


# -- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("shard", ["5GB", "200KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("settings", [{}, EXOTIC], ids=["published", "exotic"])
def test_there_and_back(
    quirky: Make, write: Write, same: Same, pickled: bool, shard: str, settings: dict[str, Any]
) -> None:
    model = quirky(1, **settings)
    folder = write(model, pickled, shard)
    names = {p.name for p in folder.iterdir()}
    assert any(name.endswith(".index.json") for name in names) == (shard == "200KB")
    assert any(name.startswith("pytorch_model") for name in names) == pickled
    again = load(folder)
    same(model, again)
    before, after = (json.loads(c.to_json_string(use_diff=False)) for c in (model.config, again.config))
    for settings in (before, after, *(c[part] for c in (before, after) for part in ("encoder", "proposer", "llm"))):
        for name in ("dtype", "_name_or_path", "rope_parameters"):
            settings.pop(name, None)
    assert before == after
    assert again.config.llm.rope_parameters["rope_theta"] == model.config.llm.rope_parameters["rope_theta"]


def test_saved_again_it_is_ours(model: GromaForConditionalGeneration, write: Write, same: Same, tmp_path: Path) -> None:
    load(write(model)).save_pretrained(tmp_path)
    assert "llm_cfg" not in json.loads((tmp_path / "config.json").read_text())
    assert "proposer.enc_box.0.weight" in load_file(tmp_path / "model.safetensors")
    same(model, load(tmp_path))


@pytest.mark.parametrize("kept", ["owners", "aliases"])
def test_a_tensor_with_two_names_may_have_either(
    kept: str, model: GromaForConditionalGeneration, write: Write, same: Same
) -> None:
    folder = write(model)

    def drop(tensors: dict[str, Tensor]) -> None:
        aliases = [name for name in tensors if owner(name) != name]
        assert len(aliases) == 28
        for name in aliases if kept == "owners" else [owner(name) for name in aliases]:
            del tensors[name]

    change(folder, drop)
    same(model, load(folder))


def test_two_names_with_two_values_are_refused(model: GromaForConditionalGeneration, write: Write) -> None:
    folder = write(model)
    change(folder, lambda tensors: tensors[f"{DETR}decoder.class_embed_enc.bias"].add_(1))
    with pytest.raises(ValueError, match=r"model.safetensors: .*class_embed_enc.bias differs from .*, expected one"):
        load(folder)


# -- what transformers offers -----------------------------------------------------------------------------------------


def test_options_of_from_pretrained(model: GromaForConditionalGeneration, write: Write) -> None:
    folder = write(model, pickled=True)
    rough, report = load(folder, dtype=torch.bfloat16, nms_threshold=0.3, attn_implementation="eager",
                         low_cpu_mem_usage=True, use_safetensors=False, output_loading_info=True)  # fmt: skip
    assert {p.dtype for p in rough.parameters()} == {torch.bfloat16}
    assert (rough.config.nms_threshold, rough.llm.config._attn_implementation) == (0.3, "eager")
    assert rough.name_or_path == str(folder)
    assert not rough.training
    assert not any(report.values())
    with pytest.raises(ValueError, match=r"holds no weights, expected model.safetensors\[.index.json\]$"):
        load(folder, use_safetensors=True)
    config = GromaConfig.from_pretrained(folder, score_threshold=0.5)
    assert load(folder, config=config).config.score_threshold == 0.5
    assert load(folder, config=config) is not config


def test_dtype_of_the_checkpoint_is_kept(quirky: Make, write: Write) -> None:
    folder = write(quirky(3).to(torch.float16))
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "float16"
    assert load(folder).dtype == torch.float16
    assert load(folder, dtype=torch.float32).dtype == torch.float32


def test_a_part_asked_for_by_an_override_starts_fresh(model: GromaForConditionalGeneration, write: Write) -> None:
    grown = load(write(model), words=7)
    assert grown.words_head.weight.shape == (7, 48)
    assert torch.equal(grown.vocabulary.head.weight, model.vocabulary.head.weight)


def test_device_map(model: GromaForConditionalGeneration, write: Write, same: Same) -> None:
    pytest.importorskip("accelerate", reason="device maps need accelerate: pip install 'groma[train]'")
    same(model, load(write(model), device_map={"": "cpu"}))


def test_auto_classes(model: GromaForConditionalGeneration, write: Write, same: Same) -> None:
    folder = write(model)
    assert type(AutoConfig.from_pretrained(folder)) is GromaConfig
    same(model, AutoModelForImageTextToText.from_pretrained(folder))


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
def test_from_the_cache_of_the_hub(model: GromaForConditionalGeneration, write: Write, same: Same, tmp_path: Path,
                                   pickled: bool) -> None:  # fmt: skip
    folder, commit = write(model, pickled, "200KB"), "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--groma"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    folder.rename(repository / "snapshots" / commit)
    same(model, load("someone/groma", cache_dir=tmp_path))
    with pytest.raises(OSError, match="connect"):
        load("someone/other", cache_dir=tmp_path)


@pytest.mark.skipif(not MAPS.exists(), reason="what a process has mapped is told by Linux only")
def test_tensors_are_views_of_their_file(model: GromaForConditionalGeneration, write: Write) -> None:
    path = write(model, pickled=True) / "pytorch_model.bin"
    tensors = read(path)
    assert str(path) in MAPS.read_text()
    del tensors
    assert str(path) not in MAPS.read_text()


def test_a_directory_as_released_is_a_predictor(quirky: Make, write: Write, pictures: Path) -> None:
    """Configuration, sharded .bin weights and a SentencePiece tokenizer: what is downloaded answers at once."""
    base = min(json.loads((TEXT / "added_tokens.json").read_text()).values())
    model = quirky(4, proxies=100, new_token_ids=None, base_vocab=base, llm={"vocab_size": base}, nms_threshold=0.2)
    folder = write(model, pickled=True, shard="200KB")
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        shutil.copyfile(TEXT / name, folder / name)
    groma = Groma.from_pretrained(folder)
    assert groma.model.config.region_boxes == "centre"
    assert {w: groma.processor.word_id(w) for w in markup.words()} == groma.model.config.new_token_ids
    view = groma.look(pictures / "images" / "0.png")
    assert len(view.proposals) > 1
    assert torch.equal(view.region_tokens, Groma(model, groma.processor).look(view.name).region_tokens)
    assert groma.refer(view, "the red ball").query == "the red ball"


def test_pictures_look_the_same_after_the_way_there_and_back(
    model: GromaForConditionalGeneration, write: Write, pictures: Path, tiny_processor: Any
) -> None:
    pixels = tiny_processor.pixels([Image.open(pictures / "images" / "1.png")])
    with torch.no_grad():
        [before], [after] = model.look(pixels), load(write(model)).look(pixels)
    assert torch.equal(before.region_tokens, after.region_tokens)
    assert torch.equal(before.image_tokens, after.image_tokens)
