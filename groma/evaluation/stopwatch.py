"""Where the time of an answer goes: the parts of a model timed, and their operations counted, while it answers.

encoder, proposer, regions and tokens (the 2x2 merge) are modules and timed as such; selection is what lies between
proposer and regions. Of the language model, prefill is a call without a cache, token a call for one more position, and
question any other call after a cache, logits included.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from groma.evaluation.flops import now
from groma.model.groma import GromaForConditionalGeneration

PARTS = ("encoder", "proposer", "selection", "regions", "tokens", "prefill", "question", "token")
"""In the order of the work."""


@dataclass(frozen=True)
class Lap:
    """One run of one part: how long, how many operations (0 without a counter), and on how many positions (T)."""

    part: str
    seconds: float
    flops: int
    positions: int = 0


class Stopwatch:
    """``with Stopwatch(model) as watch: …`` collects ``watch.laps`` in the order of the work.

    counter: an entered groma.evaluation.flops.counter(), to count along. Not to be nested on one model.
    """

    def __init__(self, model: GromaForConditionalGeneration, counter: FlopCounterMode | None = None) -> None:
        self.laps: list[Lap] = []
        self._model, self._counter = model, counter
        self._open: dict[str, tuple[float, int]] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Stopwatch:
        model = self._model
        self._follow(model.encoder, "encoder")
        self._follow(model.proposer, "proposer", then="selection")
        self._follow(model.regions, "regions", before="selection")
        self._follow(model.bridge, "tokens")
        model.__dict__["speak"] = self._timed(model.speak)  # not a module: the instance's own name hides the method
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        del self._model.__dict__["speak"]

    def _follow(self, module: nn.Module, part: str, before: str = "", then: str = "") -> None:
        def starts(*_: Any) -> None:
            if before:
                self._stop(before)
            self._start(part)

        def ends(*_: Any) -> None:
            self._stop(part)
            if then:
                self._start(then)

        self._handles += [module.register_forward_pre_hook(starts), module.register_forward_hook(ends)]

    def _timed(self, speak: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(speak)

        def timed(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            length, cache = given["embeds"].shape[1], given.get("past_key_values")
            after = cache.get_seq_length() if cache is not None else 0
            part = "prefill" if not after else "token" if length == 1 else "question"
            self._start(part)
            result = speak(*args, **kwargs)
            self._stop(part, length)
            return result

        return timed

    def _start(self, part: str) -> None:
        self._open[part] = self._read()

    def _stop(self, part: str, positions: int = 0) -> None:
        if part in self._open:  # a region encoder may run without a proposer before it
            started, counted = self._open.pop(part)
            seconds, flops = self._read()
            self.laps.append(Lap(part, seconds - started, flops - counted, positions))

    def _read(self) -> tuple[float, int]:
        return now(self._model.device), self._counter.get_total_flops() if self._counter else 0
