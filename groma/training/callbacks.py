"""What a run leaves to look at: metrics.jsonl, TensorBoard files, a progress bar; and when it is scored.

metrics.jsonl holds one JSON object a line, in the order of events::

    {"event": "train", "step": 40, "loss": 3.1, "class": 0.9, "l1": 0.4, "grad_norm": 2.0, "learning_rate": 0.0005, …}
    {"event": "left_out", "step": 47, "left_out": 1, "reason": "the loss is not finite (class nan, l1 0.4) on a.json#7"}
    {"event": "evaluate", "step": 500, "ar50@100": 0.93}
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from groma.training.parts import TrainingError


class MetricsFile(TrainerCallback):
    """Appends every log event to ``path`` and flushes it; a resumed run first drops what lies after its checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        rows = [row for row in read_metrics(self.path) if row["step"] <= state.global_step and row["event"] != "end"]
        kept = [json.dumps(row) + "\n" for row in rows] if state.global_step else []
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(self.path)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        row = {"event": _event(logs), "step": state.global_step} | {k: _short(v) for k, v in logs.items()}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise TrainingError(f"{self.path} could not be written: {error.strerror}") from error


class TensorBoard(TrainerCallback):
    """Writes every number of every log event as ``event/name``; steps after a resumed checkpoint are purged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writer: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            from torch.utils.tensorboard import SummaryWriter

            purge = state.global_step + 1 if state.global_step else None
            self.writer = SummaryWriter(str(self.folder), purge_step=purge)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.writer is None or not logs:
            return
        for name, value in logs.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(f"{_event(logs)}/{name}", value, state.global_step)
        self.writer.flush()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.writer is not None:
            self.writer.close()


class ProgressBar(TrainerCallback):
    """A bar on stderr, with the last loss and scores beside it."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.notes: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_local_process_zero:
            from tqdm import tqdm

            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", mininterval=1.0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.bar is None or not logs or _event(logs) not in ("train", "evaluate"):
            return
        shown = {"loss"} if _event(logs) == "train" else set(logs) - {"epoch", "seconds"}
        self.notes |= {k: f"{v:.4g}" for k, v in logs.items() if k in shown}
        self.bar.set_postfix(self.notes)

    def close(self) -> None:
        """End the bar's line, so that what is told next starts a line of its own."""
        if self.bar is not None:
            self.bar.close()


class EvaluateEvery(TrainerCallback):
    """Asks the trainer for an evaluation every ``every`` steps and after the last."""

    def __init__(self, every: int) -> None:
        self.every = every

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step >= state.max_steps:
            control.should_evaluate = True


def tell(line: str) -> None:
    """One line on stderr, above the progress bar."""
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The events of a metrics.jsonl; a last line cut by a kill is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _event(logs: dict[str, Any]) -> str:
    if "train_runtime" in logs:
        return "end"
    if "left_out" in logs:
        return "left_out"
    return "train" if "loss" in logs else "evaluate"


def _short(value: Any) -> Any:
    """A number JSON can hold, without noise digits that float32 never had; NaN becomes null."""
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else None
    return value
