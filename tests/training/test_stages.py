"""The three stages on the real model, tiny and random: they learn, chain, are scored, and survive a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from groma.config import load_config
from groma.model.groma import GromaForConditionalGeneration
from groma.processor import GromaProcessor
from groma.training import checkpoints
from groma.training.callbacks import read_metrics
from groma.training.meter import CLOCKED
from groma.training.parts import TrainingError
from groma.training.run import train

WORDS = ["red", "green", "blue", "yellow", "ball", "box"]
STAGES: dict[str, dict[str, Any]] = {
    "detection": {
        "lr": 1e-3, "batch": 8,
        "train": ["encoder", "proposer", "regions", "words_head"],
        "sources": [("regions", "regions", "coco"), ("detection", "instances", "sa1b")],
    },
    "alignment": {
        "lr": 3e-3, "batch": 4,
        "train": ["bridge", "regions", "vocabulary", "llm"],
        "sources": [("rec", "rec", "coco"), ("region_captions", "regions", "coco"),
                    ("grounded_captions", "grounded_captions", "coco")],
    },
    "instruct": {
        "lr": 3e-3, "batch": 4,
        "train": ["bridge", "regions", "vocabulary", "llm"],
        "sources": [("rec", "rec", "coco"), ("grounded_captions", "grounded_captions", "coco"),
                    ("region_captions", "regions", "coco"), ("llava", "conversations", "coco"),
                    ("detection_words", "instances", "coco")],
    },
}  # fmt: skip


def write(folder: Path, stage: str, pictures: Path, start: dict[str, str]) -> Path:
    """A configuration file of one stage, with output beside it."""
    settings = STAGES[stage]
    sources = [
        {"name": kind, "format": kind, "source": source,
         "ann": f"{pictures}/{file}.json", "images": f"{pictures}/images"}
        for kind, file, source in settings["sources"]
    ]  # fmt: skip
    content = {
        "stage": stage, "output": str(folder / stage), "seed": 7, "model": {**start, "train": settings["train"]},
        "data": {"sources": sources, "words": WORDS, "workers": 0, "max_length": 512, "augment": False},
        "optim": {"lr": settings["lr"], "batch_size": settings["batch"], "max_steps": 20, "warmup_steps": 2},
        "log": {"every": 1, "tensorboard": False}, "save": {"every": 0},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stage}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def losses(output: Path) -> list[dict[str, Any]]:
    """The training events, without what a clock wrote."""
    rows = [row for row in read_metrics(output / "metrics.jsonl") if row["event"] == "train"]
    return [{k: v for k, v in row.items() if k not in CLOCKED} for row in rows]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return GromaForConditionalGeneration.from_pretrained(folder).state_dict()


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, tiny: Path, pictures: Path) -> Path:
    """The output folder of 20 steps of stage 1."""
    folder = tmp_path_factory.mktemp("first")
    train(load_config(write(folder, "detection", pictures, {"config": str(tiny)})), device="cpu")
    return folder / "detection"


def means(output: Path, name: str = "loss") -> tuple[float, float]:
    """Mean loss of the first and the last five steps that had it."""
    values = [row[name] for row in losses(output) if name in row]
    return sum(values[:5]) / 5, sum(values[-5:]) / 5


def test_twenty_steps_of_detection_lower_the_loss(first: Path) -> None:
    before, after = means(first)
    assert after < 0.9 * before
    rows = losses(first)
    assert {"class", "l1", "giou", "words"} <= set().union(*rows)
    assert any("words" not in row for row in rows)  # instances.json describes nothing
    GromaProcessor.from_pretrained(str(first / "final"))


@pytest.mark.parametrize("stage", ["alignment", "instruct"])
def test_twenty_steps_of_language_lower_the_loss(stage: str, first: Path, pictures: Path, tmp_path: Path) -> None:
    start = first / "final"
    scored = [f"evaluate.proposals={{ann: {pictures}/instances.json, images: {pictures}/images}}",
              f"evaluate.rec={{ann: {pictures}/rec.json, images: {pictures}/images}}",
              "evaluate.every=15", "evaluate.limit=3", "evaluate.batch_size=2"]  # fmt: skip
    train(load_config(write(tmp_path, stage, pictures, {"init": str(start)}), scored), device="cpu")
    scores = [row for row in read_metrics(tmp_path / stage / "metrics.jsonl") if row["event"] == "evaluate"]
    assert [row["step"] for row in scores] == [15, 20]
    names = {"ar50@100", "rec/accuracy", "rec/absent_refused", "rec/present_refused"}
    assert all(0 <= row[name] <= 1 for row in scores for name in names)
    before, after = means(tmp_path / stage, "text")
    assert after < 0.85 * before
    old, new = weights(start), weights(tmp_path / stage / "final")
    changed = {name.split(".")[0] for name in old if not torch.equal(old[name], new[name])}
    assert changed == {"bridge", "regions", "vocabulary", "llm"}


def test_stage_three_resumed_after_a_kill_equals_the_uninterrupted_run(
    first: Path, pictures: Path, tmp_path: Path, root: Path
) -> None:
    start = {"init": str(first / "final")}
    whole = load_config(write(tmp_path / "whole", "instruct", pictures, start), ["save.every=5", "data.workers=1"])
    train(whole, device="cpu")
    cut = write(tmp_path / "cut", "instruct", pictures, start)
    output = tmp_path / "cut" / "instruct"
    overrides = ["save.every=5", "data.workers=1"]
    tool = str(root / "tools" / "train_net.py")
    command = [sys.executable, tool, "--config", str(cut), "--device", "cpu", *overrides]
    process = subprocess.Popen(command, start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip
    try:
        wait_for(lambda: len(losses(output)) >= 12, process)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    saved = checkpoints.checkpoints(output)
    assert saved and not (output / "final").exists(), "the run ended before it was killed"
    with pytest.raises(TrainingError, match=r"holds checkpoint-\d+ of an earlier run"):
        train(load_config(cut, overrides), device="cpu")
    final = train(load_config(cut, overrides), resume=True, device="cpu")
    expected, got = weights(Path(whole.output) / "final"), weights(final)
    assert expected.keys() == got.keys()
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []
    assert losses(output) == losses(Path(whole.output))


def wait_for(happened: Any, process: subprocess.Popen[bytes], seconds: float = 60) -> None:
    for _ in range(int(seconds / 0.02)):
        if happened():
            return
        if process.poll() is not None:
            pytest.fail(process.stderr.read().decode() if process.stderr else "the run ended early")
        time.sleep(0.02)
    pytest.fail("the run did not get far enough")
