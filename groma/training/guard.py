"""What is settled between the gradients of a step and its update: are they finite, and was the run asked to end?"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from groma.training.parts import TrainingError

SHOWN = 8
"""How many records of a step are named, of each process."""


@dataclass
class Guard:
    """Counts the steps that are left out for a NaN or an infinite number, and hears SIGTERM.

    Every process must call ``settle`` once a step: what one of them met, all leave out.
    """

    limit: int
    device: torch.device
    left_out: int = 0
    asked_to_stop: bool = False
    stopping: bool = False
    _found: list[str] = field(default_factory=list)
    _records: list[str] = field(default_factory=list)

    def saw(self, records: Sequence[str], trouble: str = "") -> None:
        """Note the records of a batch of this step, and what is wrong with its loss."""
        named = list(records) or ["unnamed records"]
        self._records += named
        if trouble:
            self._found.append(f"{trouble} on {', '.join(named[:SHOWN])}")

    def settle(self, step: int, gradient_is_finite: bool) -> str:
        """ "" where ``step`` can be taken; else one line that says why it cannot, the same on every process.

        Raises TrainingError when more steps than ``limit`` were left out.
        """
        found, records = self._found, self._records
        self._found, self._records = [], []
        flags = torch.tensor([bool(found) or not gradient_is_finite, self.asked_to_stop], device=self.device).float()
        many = dist.is_initialized() and dist.get_world_size() > 1
        if many:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        bad, self.stopping = (bool(flag) for flag in flags.tolist())
        if not bad:
            return ""
        gathered: list[Any] = [(found, records)]
        if many:
            gathered = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, (found, records))
        lines = [line for some, _ in gathered for line in some]
        everything = ", ".join(record for _, some in gathered for record in some[:SHOWN])
        trouble = "; ".join(lines) or f"the gradient is not finite on {everything}"
        self.left_out += 1
        if self.left_out > self.limit:
            rest = f" ({self.left_out} such steps, optim.max_nonfinite is {self.limit})" if self.limit else ""
            raise TrainingError(f"step {step}: {trouble}{rest}")
        return trouble


@contextmanager
def hears_sigterm(guard: Guard) -> Iterator[None]:
    """Inside, SIGTERM asks ``guard`` to stop after the step under way; Python hands signals to the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(*_: Any) -> None:
        guard.asked_to_stop = True

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
