"""The training benchmark: what it makes up, what it counts, and that both ways train on the same tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from groma.evaluation import training_speed
from groma.model.groma import GromaForConditionalGeneration
from groma.processor import GromaProcessor

Make = Callable[..., GromaForConditionalGeneration]


@pytest.fixture(scope="module")
def report(make: Make, tiny_processor: GromaProcessor) -> dict[str, Any]:
    model = make(noise=0.02)
    model.requires_grad_(False)
    model.bridge.requires_grad_(True)
    rows = training_speed.batches(tiny_processor, 2, 3)
    return training_speed.measure(model, tiny_processor, rows, 512, repeat=2, count=True)


def test_both_ways_train_on_the_same_tokens(report: dict[str, Any]) -> None:
    padded, packed = report["ways"]["padded"], report["ways"]["packed"]
    assert padded["tokens"] == packed["tokens"] == packed["positions"]
    assert padded["positions"] > padded["tokens"]
    assert packed["padding_share"] == 0 < padded["padding_share"]
    for way in (padded, packed):
        assert way["low"] <= way["tokens_per_second"] <= way["high"]
        assert way["utilisation"] == pytest.approx(way["model_tflops"] / report["gemm_peak_tflops"], rel=0.2, abs=2e-3)
    assert json.loads(json.dumps(report)) == report


def test_the_table_has_a_line_a_way(report: dict[str, Any]) -> None:
    lines = training_speed.table(report).splitlines()
    assert [line.split()[0] for line in lines[4:6]] == ["padded", "packed"]
    assert lines[3].split() == ["tokens/s", "range", "padding", "TFLOP/s", "of", "peak"]
    assert lines[6].startswith("packed over padded: ")
    bare = {k: v for k, v in report.items() if k != "gemm_peak_tflops"}
    assert training_speed.table(bare).splitlines()[3].split() == ["tokens/s", "range", "padding"]


def test_dialogues_are_of_one_set_and_of_its_lengths(tiny_processor: GromaProcessor) -> None:
    fixed = training_speed.Lengths("fixed", 1.0, 7, 5, 0.0)
    opening = len(training_speed.opening_prompt(tiny_processor).ids)
    [[one, other]] = training_speed.batches(tiny_processor, 1, 2, sets=[fixed])
    assert len(one.ids) == len(other.ids) == opening + 7 + 5
    assert int((one.labels != -100).sum()) == 5
    assert torch.equal(one.labels[-5:], one.ids[-5:])
    assert not torch.equal(one.ids, other.ids)
    many = training_speed.batches(tiny_processor, 60, 4, seed=3)
    assert [row[0].ids.tolist() for row in many] == [
        row[0].ids.tolist() for row in training_speed.batches(tiny_processor, 60, 4, seed=3)
    ]
    answers = Tensor([int((p.labels != -100).sum()) for row in many for p in row])
    assert answers.max() > 150  # a long caption
    assert answers.min() < 8  # a box
    assert sum(s.share for s in training_speed.STAGE2) == pytest.approx(1)


def test_operations_of_a_dialogue_alone_by_hand(make: Make, tiny_processor: GromaProcessor) -> None:
    """Twice as many dialogues are twice the work; a language model that learns adds its weights' gradients."""
    model = make()
    rows = training_speed.batches(tiny_processor, 1, 1)
    model.requires_grad_(False)
    model.bridge.requires_grad_(True)
    once = training_speed._operations(model, tiny_processor, rows, False)
    assert training_speed._operations(model, tiny_processor, rows * 2, False) == 2 * once
    model.llm.requires_grad_(True)
    more = training_speed._operations(model, tiny_processor, rows, False) - once
    length = len(model.splice(model.look(torch.randn(1, 3, 64, 64)), rows[0]).ids[0])
    layers = sum(m.weight.numel() for m in model.llm.model.modules() if isinstance(m, torch.nn.Linear))
    labelled = int((rows[0][0].labels[1:] != -100).sum())
    assert more == pytest.approx(2 * length * layers + 2 * labelled * model.llm.lm_head.weight.numel(), rel=0.02)


def test_the_small_model_has_the_real_number_of_positions() -> None:
    model, processor = training_speed.small_model()
    config = model.config
    assert (config.image_size // config.patch_size // 2) ** 2 == 256
    assert config.max_regions == 100
    assert config.proposer.queries >= 100
    assert processor.image_processor.size["height"] == config.image_size


def test_the_tools_mistake_is_a_line(root: Path) -> None:
    import subprocess
    import sys

    result = subprocess.run([sys.executable, str(root / "tools" / "benchmark_training.py"), "--lora", "8"],
                            capture_output=True, text=True, timeout=120, check=False)  # fmt: skip
    assert result.returncode == 2
    assert "--lora puts adapters on a language model that learns: give --stage 3" in result.stderr
