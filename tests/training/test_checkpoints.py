"""Checkpoints on the disk: hidden until whole; and which other configurations a run may go on with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from groma.settings import RunConfig, SourceConfig
from groma.training import checkpoints, resume
from groma.training.parts import TrainingError


def saved(output: Path, *steps: int) -> None:
    for step in steps:
        folder = checkpoints.begin(output, step)
        (folder / "weights.pt").write_bytes(b"w" * 10)
        (folder / f"global_step{step}").mkdir()  # as DeepSpeed's processes write theirs
        (folder / f"global_step{step}" / "part.pt").write_bytes(b"p")
        checkpoints.commit(folder, keep=2)


def test_the_last_few_stay(tmp_path: Path) -> None:
    saved(tmp_path, 5, 10, 100)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-100"]
    assert [checkpoints.step_of(p) for p in checkpoints.checkpoints(tmp_path)] == [10, 100]
    assert (tmp_path / "checkpoint-100" / "global_step100" / "part.pt").read_bytes() == b"p"
    with pytest.raises(TrainingError, match="expected a folder named checkpoint-N"):
        checkpoints.step_of(tmp_path / "latest")


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc to name what is synced")
def test_the_marker_comes_after_everything_has_reached_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 1, 2)
    folder = checkpoints.begin(tmp_path, 3)
    (folder / "global_step3").mkdir()
    (folder / "global_step3" / "part.pt").write_bytes(b"p")
    synced: list[str] = []
    sync = os.fsync

    def fsync(handle: int) -> None:
        sync(handle)
        done = [checkpoints.step_of(p) for p in checkpoints.checkpoints(tmp_path)]
        synced.append(f"{Path(os.readlink(f'/proc/self/fd/{handle}')).relative_to(tmp_path)} {done}")

    monkeypatch.setattr(os, "fsync", fsync)
    checkpoints.commit(folder, keep=2)
    inside = ("", "/global_step3", "/global_step3/part.pt")
    assert sorted(synced[:-3]) == [f".checkpoint-3{name} [1, 2]" for name in inside]
    # the rename, then the marker and the folder that holds it; only then does the oldest go
    assert synced[-3:] == [". [1, 2]", "checkpoint-3/COMPLETE [1, 2, 3]", "checkpoint-3 [1, 2, 3]"]
    assert [checkpoints.step_of(p) for p in checkpoints.checkpoints(tmp_path)] == [2, 3]


def test_a_folder_is_whole_or_as_it_was(tmp_path: Path) -> None:
    with checkpoints.whole(tmp_path / "final") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "final").exists()

    def fill() -> None:
        with checkpoints.whole(tmp_path / "final") as folder:
            (folder / "a").write_text("2")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fill()
    assert [p.name for p in tmp_path.iterdir()] == ["final"] and (tmp_path / "final" / "a").read_text() == "1"
    (tmp_path / ".final").mkdir()  # left by a kill
    (tmp_path / ".final" / "half").write_text("")
    with checkpoints.whole(tmp_path / "final") as folder:
        (folder / "b").write_text("3")
    assert [p.name for p in (tmp_path / "final").iterdir()] == ["b"]


def run_of(**changes: Any) -> RunConfig:
    """A configuration with some keys set: ``optim__lr=1``."""
    sources = [SourceConfig("rec", "rec", "/data/rec.json", "/data/images"), SourceConfig("vg", "vg", "a", "b")]
    run = RunConfig("alignment", "out")
    run.data.sources = sources
    run.model.train = ["bridge"]
    for key, value in changes.items():
        home: Any = run
        *path, last = key.split("__")
        for name in path:
            home = home[int(name)] if name.isdigit() else getattr(home, name)
        setattr(home, last, value)
    return run


@pytest.mark.parametrize(
    "changes, told",
    [
        ({}, []),
        ({"log__every": 1, "save__keep": 9, "save__every": 7, "data__workers": 4, "data__prefetch": 1,
          "output": "there", "optim__max_nonfinite": 5, "evaluate__every": 3}, []),
        ({"optim__lr": 0.5}, ["optim.lr: 0.0001 → 0.5"]),
        ({"data_root": "/disk", "data__sources__0__ann": "/disk/rec.json"},
         ["data.sources.0.ann: /data/rec.json → /disk/rec.json", "data_root:  → /disk"]),
    ],
)  # fmt: skip
def test_a_change_that_keeps_the_order_of_the_data_is_told(
    changes: dict[str, Any], told: list[str], tmp_path: Path
) -> None:
    resume.record(run_of(), batches=10, world=2, folder=tmp_path)
    assert resume.compare(run_of(**changes), 10, 2, tmp_path) == told


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"seed": 1}, "was reached with another order of the data (seed: 0 → 1)"),
        ({"optim__batch_size": 8, "optim__lr": 1.0}, "order of the data (optim.batch_size: 16 → 8)"),
        ({"data__sources__1__ratio": 0.5}, "order of the data (data.sources.1.ratio: 1.0 → 0.5)"),
        ({"data__sources": []}, "data.sources"),
        ({"data__pack": True}, "data.pack: False → True"),
        ({"model__train": ["bridge", "llm"]}, "holds another optimiser (model.train.1: none → llm)"),
        ({"optim__deepspeed": "zero2.json"}, "holds another optimiser (optim.deepspeed: none → zero2.json)"),
        ({"model__lora__rank": 8}, "model.lora.rank: 0 → 8"),
    ],
)
def test_a_change_of_the_order_of_the_data_is_refused(changes: dict[str, Any], line: str, tmp_path: Path) -> None:
    resume.record(run_of(), batches=10, world=2, folder=tmp_path)
    with pytest.raises(TrainingError) as caught:
        resume.compare(run_of(**changes), 10, 2, tmp_path)
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_other_processes_or_other_records_are_refused(tmp_path: Path) -> None:
    resume.record(run_of(), batches=10, world=2, folder=tmp_path)
    with pytest.raises(TrainingError, match="processes: 2 → 1"):
        resume.compare(run_of(), 10, 1, tmp_path)
    with pytest.raises(TrainingError, match="batches an epoch: 10 → 12, so a data set has changed"):
        resume.compare(run_of(), 12, 2, tmp_path)
    assert resume.compare(run_of(), 10, 2, tmp_path.parent) == []  # a checkpoint that does not say
