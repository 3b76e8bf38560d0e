"""One process, DDP, ZeRO-2 and ZeRO-3 on two processes: the same losses, through a kill; the same final weights."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from groma.model.groma import GromaForConditionalGeneration
from groma.training import checkpoints
from groma.training.callbacks import read_metrics
from tests.training.processes import launcher

STEPS, SAVE_EVERY = 6, 2
SPEECH = ("rec", "rec", ["bridge", "regions", "vocabulary", "llm"])
BOXES = ("regions", "regions", ["encoder", "proposer", "regions", "words_head"])
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed: pip install deepspeed")
ddp, zero2, zero3 = "ddp", *(pytest.param(f"zero{n}.json", marks=needs_deepspeed) for n in (2, 3))
slow2, slow3 = (pytest.param(f"zero{n}.json", marks=[needs_deepspeed, pytest.mark.slow]) for n in (2, 3))
ways = pytest.mark.parametrize("way", [ddp, zero2, zero3])
ways_in_time = pytest.mark.parametrize("way", [ddp, slow2, slow3])


@pytest.fixture(scope="module")
def start(make: Any, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny model without dropout, whose draws would differ from process to process."""
    from groma.processor import GromaProcessor

    folder = tmp_path_factory.mktemp("start")
    make(proposer={"dropout": 0.0}).save_pretrained(folder)
    GromaProcessor.from_pretrained(str(tiny)).save_pretrained(folder)
    return folder


def write(folder: Path, start: Path, pictures: Path, kind: tuple[str, str, list[str]] = SPEECH, **optim: Any) -> Path:
    """The configuration of a short run, whose output is ``folder``/out."""
    name, file, train = kind
    content = {
        "stage": "detection" if kind is BOXES else "alignment", "output": str(folder / "out"), "seed": 7,
        "model": {"init": str(start), "train": train},
        "data": {"sources": [{"name": name, "format": name, "ann": f"{pictures}/{file}.json",
                              "images": f"{pictures}/images"}],
                 "words": ["red", "green", "blue", "yellow", "ball", "box"],
                 "workers": 0, "max_length": 512, "augment": False},
        "optim": {"lr": 3e-3, "batch_size": 2, "max_steps": STEPS, "warmup_steps": 2, "weight_decay": 0.01, **optim},
        "log": {"every": 1, "tensorboard": False}, "save": {"every": SAVE_EVERY, "keep": 2},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def figures(output: Path, *names: str) -> list[list[float]]:
    rows = [row for row in read_metrics(output / "metrics.jsonl") if row["event"] == "train"]
    return [[row["step"], *(row[name] for name in names or ("loss", "grad_norm", "learning_rate"))] for row in rows]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return GromaForConditionalGeneration.from_pretrained(folder).state_dict()


@pytest.fixture(scope="module")
def alone(start: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one process that accumulates two batches a step."""
    folder = tmp_path_factory.mktemp("alone")
    done = launcher().run(write(folder, start, pictures, accumulate=2))
    assert done.status == [0], done.said
    return folder / "out"


@ways
def test_two_processes_equal_one_through_a_kill(
    way: str, alone: Path, start: Path, pictures: Path, tmp_path: Path
) -> None:
    config = write(tmp_path, start, pictures, deepspeed=None if way == "ddp" else way)
    output = tmp_path / "out"
    # steps 1 and 2, two files of checkpoint-2, steps 3 and 4, and in the first file of checkpoint-4 it dies
    killed = launcher().run(config, f"optim.deepspeed={'' if way == 'ddp' else way}", processes=2, kill=7)
    assert -9 in killed.status, killed.said
    saved = checkpoints.checkpoints(output)
    assert saved and checkpoints.step_of(saved[-1]) < STEPS
    resumed = launcher().run(config, f"optim.deepspeed={'' if way == 'ddp' else way}", "--resume", processes=2)
    assert resumed.status == [0, 0], resumed.said
    assert resumed.said.count(str(output / "final")) == 1  # the first process alone tells
    assert [row[0] for row in figures(output)] == list(range(1, STEPS + 1))
    for expected, got in zip(figures(alone), figures(output), strict=True):
        assert got == pytest.approx(expected, abs=5e-5)
    expected, got = weights(alone / "final"), weights(output / "final")
    assert expected.keys() == got.keys()
    for name, value in expected.items():  # 4e-6 seen
        torch.testing.assert_close(got[name], value, atol=5e-5, rtol=0)


@ways_in_time
def test_a_step_that_is_not_finite_is_left_out_by_every_process(
    way: str, start: Path, pictures: Path, tmp_path: Path
) -> None:
    deepspeed = None if way == "ddp" else way
    one = write(tmp_path / "one", start, pictures, max_nonfinite=2, accumulate=2)
    two = write(tmp_path / "two", start, pictures, max_nonfinite=2, deepspeed=deepspeed)
    assert launcher().run(one, fault="nan").status == [0]
    done = launcher().run(two, processes=2, fault="nan")
    assert done.status == [0, 0], done.said
    outputs = [folder / "out" for folder in (tmp_path / "one", tmp_path / "two")]
    for output in outputs:
        events = [row for row in read_metrics(output / "metrics.jsonl") if row["event"] == "left_out"]
        assert [(row["step"], row["left_out"]) for row in events] == [(3, 1), (5, 2)]
        assert events[0]["reason"].startswith("the loss is not finite (text nan) on ")
        assert events[1]["reason"].startswith("the gradient is not finite on ") and "rec.json#" in events[1]["reason"]
    assert done.said.count("step 3 left out (1 so far): the loss is not finite (text nan) on ") == 1
    before, after = ({row[0]: row[1:] for row in figures(output, "loss", "learning_rate")} for output in outputs)
    for step in (1, 2, 4, 5, 6):
        assert after[step] == pytest.approx(before[step], abs=5e-5)
    assert all(torch.isfinite(value).all() for value in weights(outputs[1] / "final").values())


def test_more_such_steps_than_allowed_stop_every_process(start: Path, pictures: Path, tmp_path: Path) -> None:
    done = launcher().run(write(tmp_path, start, pictures, max_nonfinite=1), processes=2, fault="nan")
    assert done.status == [2, 2], done.said
    [line] = set(done.lines())
    assert "step 5: the gradient is not finite" in line and "(2 such steps, optim.max_nonfinite is 1)" in line


@ways_in_time
def test_sigterm_saves_and_the_run_goes_on(way: str, alone: Path, start: Path, pictures: Path, tmp_path: Path) -> None:
    config = write(tmp_path, start, pictures, deepspeed=None if way == "ddp" else way)
    output = tmp_path / "out"
    stopped = launcher().run(config, processes=2, signal_at=3)
    assert stopped.status == [75, 75], stopped.said
    [line] = stopped.lines()
    assert f"ended by SIGTERM after step 3, saved as {output}/checkpoint-3: resume it" in line
    assert [p.name for p in checkpoints.checkpoints(output)] == ["checkpoint-2", "checkpoint-3"]
    assert not (output / "final").exists()
    resumed = launcher().run(config, "--resume", processes=2)
    assert resumed.status == [0, 0], resumed.said
    for expected, got in zip(figures(alone), figures(output), strict=True):
        assert got == pytest.approx(expected, abs=5e-5)
    if way != "zero3.json":
        return
    final = weights(output / "final")  # and a run that has no step left writes its final model again
    for file in (output / "final").iterdir():
        file.unlink()
    assert launcher().run(config, "--resume", processes=2).status == [0, 0]
    assert all(torch.equal(value, final[name]) for name, value in weights(output / "final").items())


def test_stage_one_is_the_same_on_two_processes(start: Path, pictures: Path, tmp_path: Path) -> None:
    one = write(tmp_path / "one", start, pictures, BOXES, accumulate=2, lr=1e-3)
    assert launcher().run(one).status == [0]
    for way in ["", *(["zero2.json"] if find_spec("deepspeed") else [])]:
        two = write(tmp_path / f"two{way}", start, pictures, BOXES, lr=1e-3, deepspeed=way or None)
        done = launcher().run(two, processes=2)
        assert done.status == [0, 0], done.said
        names = ("loss", "class", "l1", "giou", "words")
        pairs = zip(figures(tmp_path / "one/out", *names), figures(tmp_path / f"two{way}/out", *names), strict=True)
        for expected, got in pairs:
            assert got == pytest.approx(expected, abs=5e-5)


def test_torchrun_runs_the_tool_as_it_is(alone: Path, start: Path, pictures: Path, tmp_path: Path, root: Path) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        "tools/train_net.py", "--config", str(write(tmp_path, start, pictures)), "--device", "cpu",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=root, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
                          capture_output=True, text=True, timeout=200, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1:] == [str(tmp_path / "out" / "final")]
    for expected, got in zip(figures(alone), figures(tmp_path / "out"), strict=True):
        assert got == pytest.approx(expected, abs=5e-5)


@ways_in_time
def test_scores_are_those_of_one_process(way: str, start: Path, pictures: Path, tmp_path: Path) -> None:
    scored = [f"evaluate.proposals={{ann: {pictures}/instances.json, images: {pictures}/images}}",
              f"evaluate.rec={{ann: {pictures}/rec.json, images: {pictures}/images}}",
              "evaluate.every=1", "evaluate.limit=2", "evaluate.batch_size=2", "optim.max_steps=2"]  # fmt: skip
    one = write(tmp_path / "one", start, pictures, accumulate=2)
    two = write(tmp_path / "two", start, pictures, deepspeed=None if way == "ddp" else way)
    assert launcher().run(one, *scored).status == [0]
    done = launcher().run(two, *scored, processes=2)
    assert done.status == [0, 0], done.said
    rows = [
        [{k: v for k, v in row.items() if k != "seconds"}
         for row in read_metrics(tmp_path / name / "out" / "metrics.jsonl") if row["event"] == "evaluate"]
        for name in ("one", "two")
    ]  # fmt: skip
    assert len(rows[0]) == 2 and {"ar50@100", "rec/accuracy"} <= set(rows[0][0])
    assert rows[0] == rows[1]


@needs_deepspeed
@pytest.mark.parametrize(
    ("changes", "processes", "line"),
    [
        (["optim.deepspeed=zero9.json"], 2, "optim.deepspeed: no file zero9.json; shipped ones: zero2.json, zero3"),
        (["optim.deepspeed=zero3.json", "data.sources.0.source=sa1b", "stage=detection"], 2, "take zero2.json"),
    ],
)
def test_what_deepspeed_cannot_do_is_one_line(
    changes: list[str], processes: int, line: str, start: Path, pictures: Path, tmp_path: Path
) -> None:
    config = write(tmp_path, start, pictures)
    content = yaml.safe_load(config.read_text())
    content["data"]["sources"].append({**content["data"]["sources"][0], "name": "more", "source": "coco"})
    config.write_text(yaml.safe_dump(content))
    done = launcher().run(config, *changes, processes=processes)
    assert done.status[0] == 2, done.said
    assert line in done.lines()[0]


@needs_deepspeed
def test_deepspeed_without_a_launcher_is_one_line(start: Path, pictures: Path, tmp_path: Path) -> None:
    done = launcher().run(write(tmp_path, start, pictures, deepspeed="zero2.json"))
    assert done.status == [2], done.said
    assert len(done.said.splitlines()) == 1 and "zero2.json, which needs a launcher, also for one process" in done.said
