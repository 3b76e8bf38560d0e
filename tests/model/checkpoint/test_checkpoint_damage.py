"""A released checkpoint that is damaged, hostile or of another model is refused in one line, and nothing in it runs."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from groma.model.groma import GromaForConditionalGeneration

Write = Callable[..., Path]


def load(folder: Path | str, **options: Any) -> GromaForConditionalGeneration:
    return GromaForConditionalGeneration.from_pretrained(folder, **options)


def change(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    """Edit the tensors of a directory with one safetensors file."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


class Hostile:
    """Makes a directory when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_hostile_pickle_does_not_run(form: str, model: GromaForConditionalGeneration, write: Write,
                                       tmp_path: Path) -> None:  # fmt: skip
    folder, target = write(model, pickled=True), tmp_path / "broken-in"
    path = folder / "pytorch_model.bin"
    payload = {"llm.lm_head.weight": Hostile(target)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(payload, protocol=2))
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(
        ValueError, match=r"pytorch_model.bin: not read as weights \(UnpicklingError: .*posix"
    ) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value), "no advice to run it after all"
    assert not target.exists()
    torch.load(path, weights_only=False) if form != "pickle" else pickle.loads(path.read_bytes())
    assert target.is_dir(), "the pickle is really hostile"


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "not read as weights"),
        (b"\x80\x02garbage" * 20, "not read as weights"),
        (b"PK\x03\x04 no archive", "not read as weights"),
        ([torch.ones(2)], "holds a list, expected tensors by name"),
        ({"llm.lm_head.weight": [1.0]}, "'llm.lm_head.weight' is a list, expected tensors by name"),
        ({3: torch.ones(1)}, "3 is a Tensor, expected tensors by name"),
    ],
)
def test_a_damaged_pickle_is_one_line(content: Any, message: str, model: GromaForConditionalGeneration,
                                      write: Write) -> None:  # fmt: skip
    folder = write(model, pickled=True)
    path = folder / "pytorch_model.bin"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=f"pytorch_model.bin: {message}") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cut", [0, 7, 5000, -100])
@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
def test_a_file_cut_short_is_one_line(cut: int, pickled: bool, model: GromaForConditionalGeneration,
                                      write: Write) -> None:  # fmt: skip
    folder = write(model, pickled)
    [path] = [p for p in folder.iterdir() if p.suffix != ".json"]
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=f"{path.name}: not read as weights"):
        load(folder)


@pytest.mark.parametrize(
    "index, message",
    [
        ("{", "not an index of weights"),
        ("[]", "not an index of weights"),
        ('{"weight_map": {"a": "../../elsewhere.bin"}}', r"names '../../elsewhere.bin', expected a file beside it"),
        ('{"weight_map": {"a": 3}}', r"names 3, expected a file beside it"),
        ('{"weight_map": {"a": "shard.bin"}}', r"names shard.bin, which is not there"),
    ],
)
def test_a_damaged_index_is_one_line(index: str, message: str, model: GromaForConditionalGeneration,
                                     write: Write) -> None:  # fmt: skip
    folder = write(model, pickled=True, shard="200KB")
    (folder / "pytorch_model.bin.index.json").write_text(index)
    with pytest.raises(ValueError, match=f"pytorch_model.bin.index.json: {message}"):
        load(folder)


def test_tensors_that_do_not_fit_are_named(model: GromaForConditionalGeneration, write: Write) -> None:
    folder = write(model)

    def damage(tensors: dict[str, Tensor]) -> None:
        for name in ("llm.lm_head.weight", "img_txt_bridge.0.bias", "img_txt_bridge.2.bias", "extra_lm_head.weight"):
            del tensors[name]
        tensors |= {"llm.model.layers.9.mlp.up_proj.weight": torch.ones(1), "llm.vision.weight": torch.ones(1)}
        tensors["llm.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)  # computed: no mistake
        tensors["llm.model.norm.weight"] = torch.ones(7)

    change(folder, damage)
    with pytest.raises(ValueError, match="tensors do not fit") as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert "4 missing: " in message
    assert " and 1 more; 2 unknown: " in message
    assert message.endswith("1 of another shape: llm.model.norm.weight is (7,), expected (48,)")
    assert "inv_freq" not in message


def test_no_weights_and_no_configuration(model: GromaForConditionalGeneration, write: Write, tmp_path: Path) -> None:
    folder = write(model)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no weights, expected model.safetensors\[.index.json\] or pytorch_mod"):
        load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(OSError, match=r"config.json"):
        load(folder)
