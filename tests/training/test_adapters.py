"""Adapters on the language model: what learns, resuming, folding in, leaving them beside; quantised weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("peft", reason="needs peft: pip install peft")

from groma.evaluation import quantise
from groma.model.groma import GromaForConditionalGeneration
from groma.settings import LoraConfig, ModelConfig, OptimConfig, RunConfig
from groma.training import adapters
from groma.training.checkpoints import load_weights, save_weights
from groma.training.frozen import learnt, restore_learnt
from groma.training.parts import TrainingError, freeze_all_but
from groma.training.preparing import finish, prepare

Make = Callable[..., GromaForConditionalGeneration]
LEARNING = ["bridge", "regions", "vocabulary", "llm"]


def config(**model: Any) -> RunConfig:
    lora = LoraConfig(**({"rank": 4, "dropout": 0.0} | model.pop("lora", {})))
    return RunConfig(stage="instruct", output="out", model=ModelConfig(**({"train": LEARNING, "lora": lora} | model)))


def prepared(make: Make, run: RunConfig, seed: int = 0) -> GromaForConditionalGeneration:
    model = make(seed=seed, proposer={"dropout": 0.0})
    prepare(model, run)
    freeze_all_but(model, run.model.train)
    return model


def trained(model: GromaForConditionalGeneration, step: dict[str, Any], steps: int = 2) -> list[float]:
    """Some steps of plain gradient descent; the losses before each."""
    losses = []
    for _ in range(steps):
        model.zero_grad()
        loss = model(**step).loss
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.05 * parameter.grad.to(parameter.dtype)
    return losses


@torch.no_grad()
def logits(model: GromaForConditionalGeneration, step: dict[str, Any]) -> Tensor:
    given = {k: v for k, v in step.items() if k not in ("labels", "ground_boxes")}
    return model.eval()(**given, ground_boxes=step["ground_boxes"]).logits


def test_only_adapters_of_the_language_model_learn(make: Make, step: dict[str, Any]) -> None:
    run = config()
    model = prepared(make, run)
    before = copy.deepcopy(model.state_dict())
    trained(model, step)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.partition(".")[0] for name in moved} == set(LEARNING)
    assert all(".lora_" in name for name in moved if name.startswith("llm."))
    layers = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in learnt(model) if name.startswith("llm.")}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_targets(make: Make) -> None:
    model = prepared(make, config(lora={"targets": ["q_proj", "v_proj"]}))
    names = [name for name in learnt(model) if name.startswith("llm.")]
    assert len(names) == 2 * 2 * 2  # layers, projections, matrices
    assert all("q_proj" in name or "v_proj" in name for name in names)


def test_a_resumed_run_goes_on_exactly(make: Make, step: dict[str, Any], tmp_path: Path) -> None:
    run = config()
    whole = prepared(make, run)
    losses = trained(whole, step, 2)
    save_weights(whole, tmp_path)
    losses += trained(whole, step, 2)
    assert losses[-1] < losses[0]
    resumed = prepared(make, run)
    load_weights(resumed, tmp_path)
    assert trained(resumed, step, 2) == losses[2:]


def test_what_learns_is_enough_to_resume(make: Make, step: dict[str, Any]) -> None:
    run = config()
    whole = prepared(make, run)
    trained(whole, step)
    state = {name: value.clone() for name, value in learnt(whole).items()}
    assert sum(v.numel() for n, v in state.items() if n.startswith("llm.")) < 0.4 * sum(
        p.numel() for p in whole.llm.parameters())  # fmt: skip
    resumed = prepared(make, run)
    restore_learnt(resumed, state, "checkpoint-2")
    assert trained(resumed, step) == trained(whole, step)
    state.popitem()
    with pytest.raises(
        TrainingError, match=r"checkpoint-2 is of another model: it differs in vocabulary\.head\.weight"
    ):
        restore_learnt(resumed, state, "checkpoint-2")


def test_folded_in_it_is_a_plain_model_of_the_same_logits(make: Make, step: dict[str, Any], tmp_path: Path) -> None:
    run = config()
    model = prepared(make, run)
    plain = logits(model, step)
    trained(model, step)
    expected = logits(model, step)
    assert (expected - plain).abs().max() > 1e-2  # it has learnt something
    model.save_pretrained(tmp_path, state_dict=finish(model, run, tmp_path))
    loaded, info = GromaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(logits(loaded, step), expected, atol=1e-5, rtol=1e-5)
    assert not (tmp_path / adapters.FOLDER).exists()


def test_left_beside_it_loads_in_one_line(make: Make, step: dict[str, Any], tmp_path: Path) -> None:
    from peft import PeftModel

    run = config(lora={"merge": False})
    model = prepared(make, run)
    trained(model, step)
    expected = logits(model, step)
    model.save_pretrained(tmp_path, state_dict=finish(model, run, tmp_path))
    loaded = GromaForConditionalGeneration.from_pretrained(tmp_path)
    assert (logits(loaded, step) - expected).abs().max() > 1e-3
    loaded.llm.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(loaded, step), expected, atol=1e-5, rtol=1e-5)
    again = GromaForConditionalGeneration.from_pretrained(tmp_path)
    PeftModel.from_pretrained(again.llm, str(tmp_path / "adapter"))  # peft itself reads the folder too
    torch.testing.assert_close(logits(again, step), expected, atol=1e-5, rtol=1e-5)


def test_over_bfloat16_weights(make: Make, step: dict[str, Any], tmp_path: Path) -> None:
    run = config(frozen_dtype="bfloat16")
    model = prepared(make, run)
    kinds = {(".lora_" in name, p.dtype) for name, p in model.llm.named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    losses = trained(model, step, 3)
    assert losses[-1] < losses[0]
    expected = model.eval()(**step).loss.item()
    model.save_pretrained(tmp_path, state_dict=finish(model, run, tmp_path))
    loaded = GromaForConditionalGeneration.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    # the adapted model rounds activations to bfloat16, the saved one does not: measured 0.01 of 5
    assert loaded(**step).loss.item() == pytest.approx(expected, rel=0.03)


def test_without_adapters_nothing_is_touched(make: Make, tmp_path: Path) -> None:
    run = config(lora={"rank": 0})
    model = prepared(make, run)
    assert finish(model, run, tmp_path) is None
    assert not any("lora" in name for name in model.state_dict())


@pytest.mark.parametrize(("changes", "told"), [
    ({"train": ["bridge"]}, "model.lora.rank is 4, but model.train does not name the part llm"),
    ({"lora": {"rank": 0}, "quantise": "4bit"}, "4bit weights cannot learn, so they need adapters: set model"),
    ({"quantise": "8bit"}, "model.lora.merge: 8bit weights would round the adapters away: set it to false"),
    ({"quantise": "8bit", "lora": {"merge": False}}, "model.quantise reads the weights of a saved model"),
    ({"lora": {"targets": ["q_proj", "w1"]}}, "model.lora.targets names w1; linear layers are down_proj, gate_proj,"),
])  # fmt: skip
def test_what_does_not_go_together(make: Make, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(TrainingError, match=told) as caught:
        prepare(make(), config(**changes))
    assert "\n" not in str(caught.value)


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    run = config(quantise="4bit", init="somewhere", lora={"merge": False})
    monkeypatch.setattr(adapters, "find_spec", lambda name: None if name == "bitsandbytes" else object())
    with pytest.raises(TrainingError, match=r"4bit needs bitsandbytes: pip install 'groma\[quantise\]'"):
        adapters.load_options(run, "cpu")
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    with pytest.raises(TrainingError, match=r"model.lora needs peft: pip install"):
        adapters.load_options(run, "cpu")


@pytest.mark.parametrize(("bits", "loads"), [("8bit", (True, False)), ("4bit", (False, True))])
def test_the_quantisers_settings(bits: str, loads: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    run = config(quantise=bits, init="somewhere", lora={"merge": False})
    run.optim = OptimConfig(dtype="bfloat16")
    for module in (adapters, quantise):
        monkeypatch.setattr(module, "find_spec", lambda name: object())
    options = adapters.load_options(run, "cpu")
    settings = options["quantization_config"]
    assert (settings.load_in_8bit, settings.load_in_4bit) == loads
    assert {"encoder", "proposer", "regions", "bridge", "vocabulary"} <= set(settings.llm_int8_skip_modules)
    assert options["device_map"] == {"": torch.device("cpu")}
    if bits == "4bit":
        assert settings.bnb_4bit_compute_dtype == torch.bfloat16
    assert adapters.load_options(config(), "cpu") == {}
