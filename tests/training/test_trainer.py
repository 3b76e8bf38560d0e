"""The trainer around a small stand-in model: losses, freezing, metrics, atomic checkpoints, exact resume."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from groma.settings import DataConfig, EvaluateConfig, LogConfig, ModelConfig, OptimConfig, RunConfig, SaveConfig
from groma.structures import Batch
from groma.training import checkpoints
from groma.training.arguments import arguments
from groma.training.callbacks import read_metrics
from groma.training.feed import RankShare
from groma.training.meter import CLOCKED
from groma.training.parts import TrainingError, freeze_all_but, parameter_groups
from groma.training.trainer import GromaTrainer


@dataclass
class Output:
    losses: dict[str, Tensor]
    stats: dict[str, Tensor] | None = None


class Proposer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sampling_offsets = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.norm(self.sampling_offsets(x)))


class Tiny(nn.Module):
    """Parts named as the real model's; dropout and a call of the global generator make the random state matter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.encoder = nn.Sequential(nn.Linear(12, 6), nn.Dropout(0.5))
        self.proposer = Proposer()
        self.llm = nn.Linear(6, 1)

    def forward(self, pixels: Tensor, source: str, seed: int) -> Output:
        hidden = self.proposer(self.encoder(pixels.flatten(1)))
        hidden = hidden + torch.rand(6, generator=torch.Generator().manual_seed(seed))
        error = self.llm(hidden).squeeze(-1) - pixels.mean((1, 2, 3))
        return Output({"l1": error.abs().mean(), f"square_{source}": error.square().mean()})


class Pictures(torch.utils.data.Dataset[tuple[int, Tensor]]):
    """Picture ``key`` is drawn from a generator seeded with its key (epoch, index)."""

    def __init__(self, bad: int = -1, nan: int = -1) -> None:
        self.bad, self.nan = bad, nan

    def __len__(self) -> int:
        return 20

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, Tensor]:
        epoch, index = key
        if index == self.bad:
            raise ValueError(f"pictures/{index}.jpg: got an empty file, expected an image file")
        if index == self.nan:
            return index, torch.full((3, 2, 2), float("nan"))
        return index, torch.rand(3, 2, 2, generator=torch.Generator().manual_seed(100 * epoch + index))


class Batches:
    def __init__(self, size: int = 4) -> None:
        self.size, self.epoch = size, 0

    def __len__(self) -> int:
        return 20 // self.size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = torch.randperm(20, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        for start in range(0, 20, self.size):
            yield [(self.epoch, i) for i in order[start : start + self.size]]

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def collate(examples: list[tuple[int, Tensor]]) -> Batch:
    source = "coco" if examples[0][0] % 2 else "sa1b"
    return Batch(torch.stack([p for _, p in examples]), source=source, records=tuple(f"r#{i}" for i, _ in examples))


def config(output: Path, **optim: Any) -> RunConfig:
    settings = {"lr": 1e-2, "batch_size": 4, "max_steps": 12, "warmup_steps": 2, "weight_decay": 0.1} | optim
    return RunConfig(
        stage="detection", output=str(output), seed=3, model=ModelConfig(train=["encoder", "llm"]),
        data=DataConfig(workers=0), optim=OptimConfig(**settings), log=LogConfig(every=5, tensorboard=True),
        save=SaveConfig(every=4, keep=2), evaluate=EvaluateConfig(every=6),
    )  # fmt: skip


def trainer(run: RunConfig, dataset: Pictures | None = None) -> GromaTrainer:
    def inputs(batch: Batch) -> dict[str, Any]:
        return {"pixels": batch.pixels, "source": batch.source}

    def score(model: nn.Module) -> dict[str, float]:
        assert not model.training
        return {"ar50@100": float(torch.rand(1)) * 0 + 0.5}

    return GromaTrainer(
        Tiny(), run, arguments(run, "cpu"), dataset or Pictures(), Batches(), collate, inputs, evaluate_with=score
    )


def numbers(path: Path) -> list[dict[str, Any]]:
    """The events of a metrics.jsonl without what a clock wrote, and without the summary at the end."""
    rows = [{k: v for k, v in row.items() if k not in CLOCKED} for row in read_metrics(path)]
    return [row for row in rows if row["event"] != "end"]


@pytest.mark.parametrize(("workers", "accumulate"), [(0, 1), (1, 1), (0, 2)])
def test_resumed_equals_uninterrupted(tmp_path: Path, workers: int, accumulate: int) -> None:
    whole = config(tmp_path / "whole", accumulate=accumulate)
    whole.data.workers = workers
    straight = trainer(whole)
    straight.train()
    for step in (4, 8):  # 5 batches an epoch, logs every 5: both checkpoints lie inside a log window
        run = config(tmp_path / f"cut{step}", accumulate=accumulate)
        run.data.workers, run.save.keep = workers, 9
        trainer(run).train()
        for checkpoint in checkpoints.checkpoints(Path(run.output)):
            if checkpoints.step_of(checkpoint) > step:
                shutil.rmtree(checkpoint)
        torch.manual_seed(999)
        again = trainer(run)
        with torch.no_grad():
            again.model.llm.weight.fill_(7.0)
        again.train(resume_from_checkpoint=str(checkpoints.checkpoints(Path(run.output))[-1]))
        for (name, a), b in zip(straight.model.state_dict().items(), again.model.state_dict().values(), strict=True):
            assert torch.equal(a, b), name
        expected = numbers(Path(whole.output) / "metrics.jsonl")
        assert numbers(Path(run.output) / "metrics.jsonl") == expected
        assert [row["step"] for row in expected] == [1, 5, 6, 10, 12]


def test_only_named_parts_learn_and_frozen_ones_stay_in_eval_mode(tmp_path: Path) -> None:
    seen = []

    class Watched(Tiny):
        def forward(self, pixels: Tensor, source: str, seed: int) -> Output:
            seen.append((self.encoder.training, self.proposer.training, self.proposer.dropout.training))
            return super().forward(pixels, source, seed)

    run = config(tmp_path)
    before = Watched().state_dict()
    made = GromaTrainer(Watched(), run, arguments(run, "cpu"), Pictures(), Batches(), collate,
                        lambda b: {"pixels": b.pixels, "source": b.source})  # fmt: skip
    made.train()
    after = made.model.state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"encoder", "llm"}
    assert set(seen) == {(True, False, False)}


def test_parameter_groups() -> None:
    model = Tiny()
    freeze_all_but(model, ["proposer", "llm"])
    groups = parameter_groups(model, lr=1.0, weight_decay=0.1, lr_scale={"llm": 0.5})
    names = {id(p): n for n, p in model.named_parameters()}
    table = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert table == {
        "proposer.sampling_offsets.weight": (0.1, 0.1), "proposer.sampling_offsets.bias": (0.1, 0.0),
        "proposer.norm.weight": (1.0, 0.0), "proposer.norm.bias": (1.0, 0.0),
        "llm.weight": (0.5, 0.1), "llm.bias": (0.5, 0.0),
    }  # fmt: skip
    with pytest.raises(TrainingError, match="has encoder, proposer, llm"):
        freeze_all_but(model, ["bridge"])


def test_named_losses_are_means_over_the_batches_that_had_them(tmp_path: Path) -> None:
    run = config(tmp_path, max_steps=5)
    run.log.every = 5
    made = trainer(run)
    noted: list[dict[str, float]] = []
    original = made.meter.add

    def add(losses: dict[str, Tensor], **work: Any) -> None:
        noted.append({name: value.item() for name, value in losses.items()})
        original(losses, **work)

    made.meter.add = add  # type: ignore[method-assign]
    made.train()
    row = next(r for r in numbers(tmp_path / "metrics.jsonl") if r["event"] == "train" and r["step"] == 5)
    for name in ("loss", "l1", "square_coco", "square_sa1b"):  # the first step has a line of its own
        values = [batch[name] for batch in noted[1:] if name in batch]
        assert row[name] == pytest.approx(sum(values) / len(values), rel=1e-5) if values else name not in row
    assert {"grad_norm", "learning_rate", "epoch"} <= set(row)
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_loss_that_is_not_finite_stops_with_step_and_records(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"step \d+: the loss is not finite \(l1 nan, .*r#7") as caught:
        trainer(config(tmp_path), Pictures(nan=7)).train()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_is_not_finite_is_left_out_and_counted_through_a_resume(
    tmp_path: Path, accumulate: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Picture 7 comes once in an epoch of 5 batches: three times in 12 steps of one batch, six in 12 of two."""
    run = config(tmp_path / "a", max_nonfinite=9, accumulate=accumulate)
    run.save.keep = 9
    made = trainer(run, Pictures(nan=7))
    kept: dict[int, dict[str, Tensor]] = {}

    def remember(step: int) -> None:
        kept[step] = {name: value.clone() for name, value in made.model.state_dict().items()}

    settle = made.guard.settle
    made.guard.settle = lambda step, finite: (remember(step), settle(step, finite))[1]  # type: ignore[method-assign]
    made.train()
    remember(13)
    rows = read_metrics(tmp_path / "a" / "metrics.jsonl")
    left_out = [row for row in rows if row["event"] == "left_out"]
    steps = [row["step"] for row in left_out]
    assert len(steps) in ((2, 3) if accumulate == 1 else (4, 5, 6))
    assert [row["left_out"] for row in left_out] == list(range(1, len(steps) + 1))
    assert all(
        "the loss is not finite (l1 nan, square_" in row["reason"] and "r#7" in row["reason"] for row in left_out
    )
    assert capsys.readouterr().err.count(f"step {steps[0]} left out (1 so far): the loss is not finite (l1 nan, ") == 1
    for step in range(1, 13):
        same = all(torch.equal(value, kept[step + 1][name]) for name, value in kept[step].items())
        assert same == (step in steps or step == 1), step  # the first step's rate is 0: it warms up
    assert all(row["loss"] is not None for row in rows if row["event"] == "train" and row["step"] > 1)

    again = config(tmp_path / "b", max_nonfinite=9, accumulate=accumulate)
    shutil.copytree(tmp_path / "a" / "checkpoint-8", tmp_path / "b" / "checkpoint-8")
    shutil.copy(tmp_path / "a" / "metrics.jsonl", tmp_path / "b")
    trainer(again, Pictures(nan=7)).train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-8"))
    assert numbers(tmp_path / "b" / "metrics.jsonl") == numbers(tmp_path / "a" / "metrics.jsonl")
    few = config(tmp_path / "c", max_nonfinite=1, accumulate=accumulate)
    with pytest.raises(TrainingError, match=rf"step {steps[1]}: .*\(2 such steps, optim.max_nonfinite is 1\)"):
        trainer(few, Pictures(nan=7)).train()


def test_speed_and_padding_are_of_what_the_model_reports(tmp_path: Path) -> None:
    class Telling(Tiny):
        def forward(self, pixels: Tensor, source: str, seed: int) -> Output:
            output = super().forward(pixels, source, seed)
            output.stats = {"tokens": torch.tensor(30), "padding_share": torch.tensor(0.25)}
            return output

    run = config(tmp_path, max_steps=3)
    run.log.every = 1
    GromaTrainer(Telling(), run, arguments(run, "cpu"), Pictures(), Batches(), collate,
                 lambda b: {"pixels": b.pixels, "source": b.source}).train()  # fmt: skip
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if row["event"] == "train"]
    assert [row["padding_share"] for row in rows] == [0.25] * 3
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(30 / row["seconds"])
        assert row["images_per_second"] == pytest.approx(4 / row["seconds"])
        assert 0.05 < row["peak_memory_gb"] < 100


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_record_stops_with_one_line(tmp_path: Path, workers: int) -> None:
    run = config(tmp_path)
    run.data.workers = workers
    with pytest.raises(TrainingError, match=r"^step \d+: pictures/7.jpg: got an empty file, expected an image file$"):
        trainer(run, Pictures(bad=7)).train()


def test_checkpoints_are_complete_or_absent(tmp_path: Path) -> None:
    trainer(config(tmp_path)).train()
    assert [p.name for p in checkpoints.checkpoints(tmp_path)] == ["checkpoint-8", "checkpoint-12"]
    assert not list(tmp_path.glob(".checkpoint*"))
    (tmp_path / "checkpoint-12" / checkpoints.MARKER).unlink()  # killed between the rename and the marker
    (tmp_path / "checkpoint-x").mkdir()
    assert [p.name for p in checkpoints.checkpoints(tmp_path)] == ["checkpoint-8"]
    left = checkpoints.begin(tmp_path, 16)  # killed while writing
    (left / "weights.pt").write_bytes(b"half")
    assert [p.name for p in checkpoints.checkpoints(tmp_path)] == ["checkpoint-8"]
    folder = checkpoints.begin(tmp_path, 12)
    assert not list(folder.iterdir())
    assert checkpoints.commit(folder, keep=1).name == "checkpoint-12"
    assert [p.name for p in checkpoints.checkpoints(tmp_path)] == ["checkpoint-12"]


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    checkpoints.save_weights(nn.Linear(2, 2), tmp_path)
    with pytest.raises(TrainingError, match="of another model") as caught:
        checkpoints.load_weights(Tiny(), tmp_path)
    assert "\n" not in str(caught.value)


def test_metrics_survive_a_cut_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"event": "train", "step": 1, "loss": 2.0}) + '\n{"event": "tr')
    assert read_metrics(path) == [{"event": "train", "step": 1, "loss": 2.0}]


def test_processes_share_every_batch_once() -> None:
    shares = [list(RankShare(Batches(), rank, 2)) for rank in range(2)]
    assert [len(s) for s in shares] == [2, 2]  # 5 batches: the odd one is left out, so that no process waits
    assert [b for pair in zip(*shares, strict=True) for b in pair] == list(Batches())[:4]
