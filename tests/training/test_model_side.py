"""Runs with packed rows, adapters, frozen parts in bfloat16 and cached proposals: the same losses, exact resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from groma.config import load_config
from groma.model.groma import GromaForConditionalGeneration
from groma.training import checkpoints
from groma.training.callbacks import read_metrics
from groma.training.parts import TrainingError
from groma.training.run import train

STAGE2 = ["bridge", "regions", "vocabulary"]


@pytest.fixture
def run(pictures: Path, tiny: Path, tmp_path: Path) -> Any:
    """run(name, "key=value", …): the configuration of a small instruct run."""
    sources = [{"name": kind, "format": kind, "ann": f"{pictures}/{file}.json", "images": f"{pictures}/images"}
               for kind, file in (("rec", "rec"), ("llava", "conversations"))]  # fmt: skip
    content = {
        "stage": "instruct", "output": "?", "seed": 7, "model": {"config": str(tiny), "train": [*STAGE2, "llm"]},
        "data": {"sources": sources, "workers": 0, "max_length": 512, "augment": False},
        "optim": {"lr": 1e-3, "batch_size": 4, "max_steps": 6, "warmup_steps": 1},
        "log": {"every": 1, "tensorboard": False}, "save": {"every": 0},
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return lambda name, *changes: load_config(str(path), [f"output={tmp_path / name}", *changes])


def losses(output: str) -> list[float]:
    rows = read_metrics(Path(output) / "metrics.jsonl")
    return [row["loss"] for row in rows if row["event"] == "train"]


def trained(settings: Any, **options: Any) -> list[float]:
    train(settings, device="cpu", **options)
    return losses(settings.output)


def test_packed_and_cached_runs_have_the_losses_of_a_plain_one(run: Any, tmp_path: Path) -> None:
    plain = trained(run("plain"))
    assert len(plain) == 6
    packed = run("packed", "data.pack=true")
    assert trained(packed) == pytest.approx(plain, abs=2e-4)
    shares = [row["padding_share"] for row in read_metrics(Path(packed.output) / "metrics.jsonl") if "loss" in row]
    assert shares == [0.0] * 6
    cached = run("cached", f"data.proposal_cache={tmp_path}/cache")
    assert trained(cached) == pytest.approx(plain, abs=2e-4)
    assert len(list((tmp_path / "cache").glob("*/*.boxes"))) == 1
    assert trained(run("again", f"data.proposal_cache={tmp_path}/cache")) == pytest.approx(plain, abs=2e-4)
    assert len(list((tmp_path / "cache").glob("*/*.boxes"))) == 1  # nothing was missing


def test_adapters_over_bfloat16_resume_exactly_and_are_folded_in(run: Any, tmp_path: Path) -> None:
    changes = ["model.lora.rank=4", "model.frozen_dtype=bfloat16", "data.pack=true", "save.every=3", "save.keep=5"]
    whole = run("whole", *changes)
    expected = trained(whole)
    state = torch.load(checkpoints.checkpoints(Path(whole.output))[0] / checkpoints.WEIGHTS, weights_only=True)
    assert all(".lora_" in name for name in state if name.startswith("llm."))
    assert {value.dtype for value in state.values()} == {torch.float32}
    cut = run("whole", *changes)
    for later in checkpoints.checkpoints(Path(cut.output))[1:]:
        (later / checkpoints.MARKER).unlink()
    assert trained(cut, resume=True) == expected
    loaded = GromaForConditionalGeneration.from_pretrained(Path(cut.output) / "final")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert not any("lora" in name for name in loaded.state_dict())


def test_adapters_left_beside_the_final_model(run: Any) -> None:
    settings = run("beside", "model.lora.rank=4", "model.lora.merge=false", "optim.max_steps=2")
    trained(settings)
    loaded = GromaForConditionalGeneration.from_pretrained(Path(settings.output) / "final")
    loaded.llm.load_adapter(str(Path(settings.output) / "final" / "adapter"))
    assert any("lora" in name for name in loaded.state_dict())


def test_checkpointing_recomputes_a_frozen_language_model_too(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.modeling_utils as library

    calls: list[int] = []
    genuine = library.checkpoint
    monkeypatch.setattr(library, "checkpoint", lambda *a, **k: calls.append(1) or genuine(*a, **k))
    frozen = [f"model.train=[{','.join(STAGE2)}]", "optim.max_steps=2"]
    plain = trained(run("plain", *frozen))
    assert not calls
    assert trained(run("less", *frozen, "optim.gradient_checkpointing=true")) == pytest.approx(plain, abs=1e-5)
    assert calls


def test_what_does_not_go_together_ends_before_the_first_step(run: Any) -> None:
    with pytest.raises(TrainingError, match="model.lora.targets names w1"):
        train(run("bad", "model.lora.rank=4", "model.lora.targets=[w1]"), device="cpu")


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_adapters_over_quantised_weights_learn_and_resume(
    bits: str, run: Any, make: Any, tiny_processor: Any, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'groma[quantise]'")
    start = tmp_path / "start"  # four bits come in blocks of 64
    make(noise=0.02, llm={"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}).save_pretrained(start)
    tiny_processor.save_pretrained(start)
    changes = ["model.config=null", f"model.init={start}", "model.lora.rank=4", "model.lora.merge=false",
               f"model.quantise={bits}", "save.every=3", "save.keep=5", "optim.lr=5e-3"]  # fmt: skip
    whole = run("whole", *changes)
    expected = trained(whole)
    assert expected[-1] < expected[0]
    (checkpoints.checkpoints(Path(whole.output))[-1] / checkpoints.MARKER).unlink()
    assert trained(run("whole", *changes), resume=True) == pytest.approx(expected, abs=1e-5)
    final = Path(whole.output) / "final"
    loaded = GromaForConditionalGeneration.from_pretrained(final)
    loaded.llm.load_adapter(str(final / "adapter"))
    assert any("lora" in name for name in loaded.state_dict())
    assert loaded.llm.model.layers[0].self_attn.q_proj.weight.dtype in (torch.int8, torch.uint8)
