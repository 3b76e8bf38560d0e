"""What a log line says of the steps behind it: mean losses, speed, the share of padding, memory; over all processes."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CLOCKED = ("seconds", "images_per_second", "tokens_per_second", "peak_memory_gb")
"""The figures that a second run of the same steps need not repeat."""


class Meter:
    """Sums since the last log, kept without waiting for the device; ``state`` and ``restore`` carry them over a kill.

    tokens: positions of the language model that hold a word or a feature; positions: those and the padding.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.work: dict[str, Any] = {"images": 0, "tokens": 0, "positions": 0}
        self.clock = time.perf_counter()

    def add(self, losses: Mapping[str, Tensor], **work: Tensor | int) -> None:
        """Named losses of one batch, and what it held: images, tokens, positions."""
        for name, value in losses.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if self.counts.get(name) else value
            self.counts[name] = self.counts.get(name, 0) + 1
        for name, amount in work.items():
            self.work[name] = self.work[name] + amount

    def pause(self, seconds: float) -> None:
        """Leave ``seconds`` out of the time that the speed is of."""
        self.clock += seconds

    def drain(self, device: torch.device) -> dict[str, float]:
        """The figures since the last call, and start anew. Every process must call it together.

        A loss is the mean over the batches, of any process, that had it; "loss" comes first.
        """
        now = time.perf_counter()
        sums = {name: (self.sums[name].item(), count) for name, count in self.counts.items() if count}
        mine = (sums, {name: float(amount) for name, amount in self.work.items()}, peak_memory(device))
        gathered: list[Any] = [mine]
        if dist.is_initialized() and dist.get_world_size() > 1:
            gathered = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, mine)
        figures = {}
        names = {name for sums, _, _ in gathered for name in sums}
        for name in sorted(names, key=lambda name: (name != "loss", name)):
            parts = [sums[name] for sums, _, _ in gathered if name in sums]
            figures[name] = sum(total for total, _ in parts) / sum(count for _, count in parts)
        images, tokens, positions = (sum(work[k] for _, work, _ in gathered) for k in ("images", "tokens", "positions"))
        seconds = now - self.clock
        if positions:
            figures |= {"padding_share": 1 - tokens / positions, "tokens_per_second": tokens / seconds}
        figures |= {"images_per_second": images / seconds, "seconds": seconds}
        figures["peak_memory_gb"] = max(peak for _, _, peak in gathered)
        self.counts, self.work, self.clock = dict.fromkeys(self.counts, 0), dict.fromkeys(self.work, 0), now
        return figures

    def state(self) -> dict[str, Any]:
        """What ``restore`` reads."""
        return {"sums": self.sums, "counts": self.counts, "work": self.work}

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on counting where ``state`` was taken."""
        self.sums = {name: value.to(device) for name, value in state["sums"].items()}
        self.counts = dict(state["counts"])
        self.work = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in state["work"].items()}


def peak_memory(device: torch.device) -> float:
    """The most memory this process has held, in 10⁹ bytes: on a GPU that of its tensors, elsewhere of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "win32":
        return 0.0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
