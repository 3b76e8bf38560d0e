"""The original's detection pre-training: encoder and proposer alone, put into a Groma."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from groma.model import checkpoint
from groma.model.configuration import GromaConfig
from groma.model.groma import GromaForConditionalGeneration

Make = Callable[..., GromaForConditionalGeneration]
Write = Callable[..., Path]


@pytest.fixture(params=["detection pre-training", "whole", "ours"])
def parts(request: pytest.FixtureRequest, model: GromaForConditionalGeneration, write: Write, tmp_path: Path) -> Path:
    """A checkpoint that holds the encoder and the proposer of ``model``."""
    if request.param == "ours":
        model.save_pretrained(tmp_path)
        return tmp_path
    folder = write(model)
    if request.param == "detection pre-training":
        perceiver = json.loads((folder / "config.json").read_text())["perceiver_cfg"]
        (folder / "config.json").write_text(json.dumps(perceiver | {"architectures": ["CustomDDETRModel"]}))
        tensors = load_file(folder / "model.safetensors")
        prefix = "perceiver."
        alone = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        save_file(alone, folder / "model.safetensors")
    return folder


def test_load_perceiver(parts: Path, model: GromaForConditionalGeneration, make: Make) -> None:
    """Encoder and proposer are the checkpoint's; the rest stays, also in a Groma without quirks and with more parts."""
    start = make(9, words=6, pointer_head=True, llm={"hidden_size": 64})
    before = {name: tensor.clone() for name, tensor in start.state_dict().items()}
    checkpoint.load_perceiver(start, parts)
    after, wanted = start.state_dict(), model.state_dict()
    for name, tensor in after.items():
        taken = name.startswith(("encoder.", "proposer."))
        assert torch.equal(tensor, wanted[name] if taken else before[name]), name
    assert any(not torch.equal(before[name], after[name]) for name in after)


def test_a_perceiver_of_another_model_is_refused(parts: Path, make: Make) -> None:
    with pytest.raises(ValueError, match="proposer.encoder_heads is 4, but the model's is 2"):
        checkpoint.load_perceiver(make(proposer={"encoder_heads": 2}), parts)
    other = make(proposer={"queries": 10})
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"1 of another shape: \S+ is \(12, 32\), expected \(10, 32\)"):
        checkpoint.load_perceiver(other, parts)
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())


@pytest.mark.parametrize("parts", ["detection pre-training"], indirect=True)
def test_a_perceiver_is_no_whole_model(parts: Path, model: GromaForConditionalGeneration) -> None:
    with pytest.raises(ValueError, match=r"alone: put them into a Groma with \S+load_perceiver"):
        GromaForConditionalGeneration.from_pretrained(parts)
    with pytest.raises(ValueError, match="alone: put them into a Groma"):
        GromaConfig.from_pretrained(parts)
    settings = checkpoint.perceiver_settings(json.loads((parts / "config.json").read_text()))
    config = GromaConfig(**settings, image_size=64)
    assert config.encoder.to_dict() == model.config.encoder.to_dict()
    assert config.position_scale_offset == 0.1


def test_load_perceiver_needs_a_groma(tmp_path: Path, model: GromaForConditionalGeneration) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="its config.json is of type 'llama', expected a Groma or a part"):
        checkpoint.load_perceiver(model, tmp_path)
