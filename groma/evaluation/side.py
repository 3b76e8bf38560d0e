"""One side of a benchmark: a model in a process of its own, which answers when told to and says how long it took."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from groma.evaluation import naive
from groma.evaluation.flops import counter, gemm_peak, now
from groma.evaluation.quantise import BITS, load_quantised
from groma.evaluation.random_weights import random_groma
from groma.evaluation.stopwatch import Lap, Stopwatch
from groma.loading import EMBEDDED, pick_device
from groma.predictor import Groma

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Job:
    """What a side loads and asks. ``model``: a directory, a hub id, None for the embedded one; ``config`` instead: a
    size of groma.evaluation.random_weights. ``quantise``: "none", "8bit" or "4bit". ``naive``: answer the original's
    way, in float32 unless ``dtype`` says otherwise."""

    image: str
    texts: tuple[str, ...]
    model: str | None = None
    config: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    quantise: str = "none"
    naive: bool = False


@dataclass(frozen=True)
class Loaded:
    """A side that is ready: seconds to load it, bytes of its weights, and where it runs."""

    seconds: float
    weights: int
    dtype: str
    device: str
    threads: int


@dataclass(frozen=True)
class Pass:
    """One answering: seconds in all, seconds of each expression (naive only: ours are answered together), the laps of
    the parts, the boxes of every expression (xyxy pixels), and how many regions the picture has (ours only)."""

    seconds: float
    each: tuple[float, ...]
    laps: tuple[Lap, ...]
    boxes: tuple[tuple[Box, ...], ...]
    regions: int


class Side:
    """A loaded model and its orders; every public method is one."""

    def __init__(self, job: Job) -> None:
        start = time.perf_counter()
        self.job, self.groma = job, _load(job)
        self.groma.model.requires_grad_(False)  # as the operation counter wants it
        now(self.groma.device)
        self._seconds = time.perf_counter() - start

    def loaded(self) -> Loaded:
        """What was loaded."""
        model = self.groma.model
        weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        dtype = str(model.dtype).removeprefix("torch.")
        return Loaded(self._seconds, weights, dtype, str(self.groma.device), torch.get_num_threads())

    def answer(self, count: int, counted: bool = False) -> Pass:
        """The first ``count`` expressions answered; ``counted``: the laps have their operations, and mean no time."""
        counting = counter() if counted else None
        with counting or nullcontext(), Stopwatch(self.groma.model, counting) as watch:
            start = time.perf_counter()
            each, boxes, regions = (self._naive if self.job.naive else self._ours)(self.job.texts[:count])
            seconds = time.perf_counter() - start
        return Pass(seconds, tuple(each), tuple(watch.laps), tuple(tuple(b) for b in boxes), regions)

    def peak(self) -> int:
        """Bytes: the most that this process has held so far, on a GPU the most allocated there."""
        device = self.groma.device
        return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else high_water()

    def gemm_peak(self) -> float:
        """Operations a second of square matrix products in this side's number format."""
        return gemm_peak(self.groma.model.dtype, self.groma.device)

    def _ours(self, texts: tuple[str, ...]) -> tuple[list[float], list[list[Box]], int]:
        view = self.groma.look(self.job.image)
        return [], [answer.boxes for answer in self.groma.refer_many(view, texts)], len(view.proposals)

    def _naive(self, texts: tuple[str, ...]) -> tuple[list[float], list[list[Box]], int]:
        each, boxes = [], []
        for text in texts:
            start = time.perf_counter()
            boxes.append(naive.answer(self.groma, self.job.image, text))
            each.append(time.perf_counter() - start)
        return each, boxes, 0


def _load(job: Job) -> Groma:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dtype = "float32" if job.naive and job.dtype == "auto" else job.dtype
    if job.config is None and job.quantise == "none":
        return Groma.from_pretrained(job.model, device=job.device, dtype=dtype)
    device = pick_device(job.device)
    if job.config is not None:
        return random_groma(job.config, device, dtype)
    return load_quantised(job.model or EMBEDDED, BITS[job.quantise], device, dtype)


def high_water() -> int:
    """Bytes of resident memory this process has held at most."""
    status = Path("/proc/self/status")
    if status.exists():  # unlike ru_maxrss, it starts anew in a process that was forked off a large one
        lines = status.read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def serve(job: Job, pipe: Connection) -> None:
    """What a side's process runs: orders (a method of Side and its arguments) from ``pipe``, until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that gives the orders ends this one
    try:
        side = Side(job)
        while True:
            name, *arguments = pipe.recv()
            pipe.send(getattr(side, name)(*arguments))
    except (ValueError, OSError) as error:
        if not isinstance(error, BrokenPipeError):
            pipe.send(ValueError(str(error)))
    except EOFError:  # nobody is left to give orders
        pass


class Worker:
    """A side in a process of its own: ``ask("answer", 3)`` is ``Side.answer(3)`` there."""

    def __init__(self, job: Job) -> None:
        context = multiprocessing.get_context("spawn")
        self._name = "the naive side" if job.naive else "the measured side"
        self._pipe, end = context.Pipe()
        self._process = context.Process(target=serve, args=(job, end), daemon=True)
        self._process.start()
        end.close()

    def ask(self, order: str, *arguments: Any) -> Any:
        """The result of an order. Raises ValueError as the side did; ChildProcessError if its process has died."""
        try:
            self._pipe.send((order, *arguments))
            result = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            why = "was killed, perhaps for want of memory" if code == -signal.SIGKILL else f"ended with status {code}"
            raise ChildProcessError(f"{self._name} {why}") from None
        if isinstance(result, ValueError):
            raise result
        return result

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.join()
