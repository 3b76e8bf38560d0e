"""What a run survives: ten kills, also while it writes a checkpoint; a full disk; another configuration on resume."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from groma.config import load_config
from groma.model.groma import GromaForConditionalGeneration
from groma.training import checkpoints
from groma.training.callbacks import read_metrics
from groma.training.meter import CLOCKED
from groma.training.run import train
from tests.training.processes import launcher

STEPS = 12


def write(folder: Path, tiny: Path, pictures: Path, **changes: Any) -> Path:
    """The configuration of a short run with dropout and random region order, whose output is ``folder``/out."""
    rec, captions = ({"name": name, "format": name, "ann": f"{pictures}/{name}.json", "images": f"{pictures}/images"}
                     for name in ("rec", "grounded_captions"))  # fmt: skip
    content = {
        "stage": "alignment", "output": str(folder / "out"), "seed": 3,
        "model": {"config": str(tiny), "train": ["proposer", "bridge", "regions", "vocabulary", "llm"]},
        "data": {"sources": [rec, captions], "workers": 0, "max_length": 512, "augment": False},
        "optim": {"lr": 3e-3, "batch_size": 2, "max_steps": STEPS, "warmup_steps": 2},
        "log": {"every": 1, "tensorboard": False}, "save": {"every": 2, "keep": 2},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(content | changes))
    return path


def events(output: Path) -> list[dict[str, Any]]:
    """The training events without what a clock wrote."""
    rows = [row for row in read_metrics(output / "metrics.jsonl") if row["event"] == "train"]
    return [{k: v for k, v in row.items() if k not in CLOCKED} for row in rows]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return GromaForConditionalGeneration.from_pretrained(folder).state_dict()


@pytest.fixture(scope="module")
def undisturbed(tiny: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    done = launcher().run(write(folder, tiny, pictures))
    assert done.status == [0], done.said
    return folder / "out"


def same(output: Path, expected: Path) -> None:
    assert events(output) == events(expected)
    got, wanted = weights(output / "final"), weights(expected / "final")
    assert [name for name in wanted if not torch.equal(wanted[name], got[name])] == []


def test_ten_kills_change_nothing(undisturbed: Path, tiny: Path, pictures: Path, tmp_path: Path) -> None:
    """Two steps and the writes of their checkpoint are some 30 points to die at; most deaths are in a checkpoint."""
    config, output = write(tmp_path, tiny, pictures), tmp_path / "out"
    draw = random.Random(5)
    at, half_written = 0, 0
    for _ in range(10):
        before = newest(output)
        done = launcher().run(config, "--resume", kill=draw.randint(1, 36))
        assert done.status == [-9], done.said
        at = newest(output)
        assert at >= before  # nothing that was complete is lost
        half_written += bool(list(output.glob(".checkpoint-*")))
    assert 0 < at < STEPS
    assert half_written >= 2
    done = launcher().run(config, "--resume")
    assert done.status == [0], done.said
    assert not list(output.glob(".*"))
    same(output, undisturbed)


def newest(output: Path) -> int:
    found = checkpoints.checkpoints(output)
    return checkpoints.step_of(found[-1]) if found else 0


@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_is_one_line_and_loses_nothing(
    processes: int, undisturbed: Path, tiny: Path, pictures: Path, tmp_path: Path
) -> None:
    config, output = write(tmp_path, tiny, pictures), tmp_path / "out"
    assert launcher().run(config, "optim.max_steps=4", processes=processes).status == [0] * processes
    for path in (output / "final").iterdir():
        path.unlink()
    (output / "final").rmdir()
    # the schedule of the first call was of 4 steps; what is compared is that nothing breaks, not the losses
    full = launcher().run(config, "--resume", processes=processes, fault="disk")
    assert full.status == [2] * processes, full.said
    assert len(set(full.lines())) == 1, full.said
    assert f"{output}: checkpoint-6 could not be written (" in full.lines()[0] and "GB free)" in full.lines()[0]
    assert "Traceback" not in full.said
    assert [p.name for p in checkpoints.checkpoints(output)] == ["checkpoint-2", "checkpoint-4"]
    assert not list(output.glob(".*"))  # what was written of it makes room
    again = launcher().run(config, "--resume", processes=processes)
    assert again.status == [0] * processes, again.said
    assert [row["step"] for row in events(output)] == list(range(1, STEPS + 1))


def test_a_final_model_that_cannot_be_written_is_written_later(
    undisturbed: Path, tiny: Path, pictures: Path, tmp_path: Path
) -> None:
    config, output = write(tmp_path, tiny, pictures), tmp_path / "out"
    run = load_config(config)
    train(run, device="cpu")
    same(output, undisturbed)
    before = weights(output / "final")
    full = launcher().run(config, "--resume", fault="disk")
    assert full.status == [2] and "out: final could not be written (" in full.lines()[0], full.said
    assert all(torch.equal(value, before[name]) for name, value in weights(output / "final").items())
    (output / "final" / "config.json").unlink()
    train(run, resume=True, device="cpu")
    same(output, undisturbed)
