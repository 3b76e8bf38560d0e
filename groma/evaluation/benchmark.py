"""How fast, in how much memory, and where the time goes; and the gain over answering the way the original does.

Two sides answer the same expressions about one picture: ours (one look, then all expressions together) and, if asked
for, the naive one (groma.evaluation.naive, float32). Each is a process of its own, so that each has a peak memory of
its own, and they take turns, so that a noisy machine disturbs both alike: a gain is taken within one turn, and the
report has its median and its range over the turns.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from groma import boxes as box_ops
from groma.evaluation.side import Box, Job, Loaded, Pass, Worker
from groma.evaluation.stopwatch import PARTS, Lap

IOU = 0.5
"""Two answers are the same if they have as many boxes, and each box of one overlaps one of the other by more."""
REST = "rest"
"""What no part covers: reading the picture, the splice, tokenisation, choosing words, Python."""


@dataclass
class Figures:
    """What one side has shown so far: seconds of one expression and of all, one number a turn, and its passes."""

    loaded: Loaded
    one: list[float] = field(default_factory=list)
    many: list[float] = field(default_factory=list)
    passes: list[Pass] = field(default_factory=list)
    counted: tuple[Lap, ...] = ()
    peak: int = 0
    gemm: float = 0.0


def expressions(count: int) -> tuple[str, ...]:
    """``count`` referring expressions of 3 to 8 words, always the same."""
    kinds, colours = ("cup", "bowl", "book"), ("red", "blue", "green", "yellow")
    places, sizes = ("", " on the left", " behind the others"), ("", "large ", "second largest ")
    made = (f"the {s}{c} {k}{p}" for k, c, p, s in itertools.product(kinds, colours, places, sizes))
    return tuple(itertools.islice(itertools.cycle(made), count))


def steps(repeat: int, against_naive: bool, parts: bool) -> int:
    """How many times ``measure`` calls ``advance``."""
    return (2 if against_naive else 1) * (2 + repeat + parts)


def measure(job: Job, repeat: int = 3, against_naive: bool = False, parts: bool = True,
            advance: Callable[[], None] = lambda: None) -> dict[str, Any]:  # fmt: skip
    """Answer ``job.texts`` in ``repeat`` turns → the report, plain JSON values; docs/performance.md explains them.

    parts: also count operations and measure the machine's matrix products. ``advance`` is called after every step.
    Raises ValueError for a model, device or quantiser that is not there, ChildProcessError for a side that died.
    """
    jobs = {"ours": job}
    if against_naive:
        jobs["naive"] = replace(job, naive=True, dtype="float32", quantise="none")
    workers: dict[str, Worker] = {}
    try:
        figures = {}
        for name, side in jobs.items():  # one after the other, since loading is timed too
            workers[name] = Worker(side)
            figures[name] = Figures(workers[name].ask("loaded"))
            advance()
        for name, worker in workers.items():  # the warm-up; one naive question does the work of any other
            figures[name].counted = worker.ask("answer", 1 if jobs[name].naive else len(job.texts), parts).laps
            advance()
        for _ in range(repeat):
            for name, worker in workers.items():
                _turn(figures[name], worker, jobs[name])
                advance()
        for name, worker in workers.items():
            figures[name].peak = worker.ask("peak")
            if parts:  # last, because it takes memory of its own
                figures[name].gemm = worker.ask("gemm_peak")
                advance()
    finally:
        for worker in workers.values():
            worker.close()
    return _report(job, repeat, figures)


def _turn(figures: Figures, worker: Worker, job: Job) -> None:
    """One expression, then all of them; naive questions are independent, so that each of many is one expression."""
    alone = None if job.naive or len(job.texts) == 1 else worker.ask("answer", 1)
    done = worker.ask("answer", len(job.texts))
    figures.one.append(alone.seconds if alone else statistics.median(done.each or [done.seconds]))
    figures.many.append(done.seconds)
    figures.passes.append(done)


# -- the report -------------------------------------------------------------------------------------------------------


def _report(job: Job, repeat: int, figures: dict[str, Figures]) -> dict[str, Any]:
    ours, other = figures["ours"], figures.get("naive")
    prefill = [lap.positions for lap in ours.passes[-1].laps if lap.part == "prefill"]
    report: dict[str, Any] = {
        "model": job.config or job.model or "embedded", "random_weights": job.config is not None, "image": job.image,
        "device": ours.loaded.device, "threads": ours.loaded.threads, "torch": torch.__version__,
        "expressions": len(job.texts), "repeat": repeat, "regions": ours.passes[-1].regions,
        "prefix_tokens": max(prefill, default=0), "quantise": job.quantise,
        "sides": {name: _side(side, 1 if name == "ours" else len(job.texts)) for name, side in figures.items()},
        "gain": None,
    }  # fmt: skip
    if other is not None:
        report["gain"] = {
            "one": _spread([b / a for a, b in zip(ours.one, other.one, strict=True)]),
            "many": _spread([b / a for a, b in zip(ours.many, other.many, strict=True)]),
            "peak_share": round(ours.peak / other.peak, 3),
            "same_answers": sum(map(same, ours.passes[-1].boxes, other.passes[-1].boxes)),
        }
    return report


def _side(figures: Figures, answers: int) -> dict[str, Any]:
    """One side's part of the report; a pass answers ``answers`` times from the start."""
    side = {
        "dtype": figures.loaded.dtype, "load_ms": round(1e3 * figures.loaded.seconds, 1),
        "weights_mib": round(figures.loaded.weights / 2**20, 1), "peak_mib": round(figures.peak / 2**20, 1),
        "one_ms": _spread([1e3 * s for s in figures.one]), "many_ms": _spread([1e3 * s for s in figures.many]),
        "gemm_peak_gflops": round(figures.gemm / 1e9, 1),
    }  # fmt: skip
    return side | {"parts": _parts(figures, answers)}


def _parts(figures: Figures, answers: int) -> dict[str, Any]:
    """Per part: runs in an answer from the start, ms of a run, GFLOP of a run, its rate, and that rate's share of the
    side's matrix-product peak (None without a count)."""
    parts = {}
    laps = [lap for done in figures.passes for lap in done.laps]
    for part in PARTS:
        seconds = [lap.seconds for lap in laps if lap.part == part]
        if not seconds:
            continue
        flops = statistics.median([lap.flops for lap in figures.counted if lap.part == part] or [0])
        rate = flops / statistics.median(seconds)
        parts[part] = {
            "runs": round(len(seconds) / len(figures.passes) / answers, 1), "ms": _spread([1e3 * s for s in seconds]),
            "gflop": round(flops / 1e9, 6), "gflops": round(rate / 1e9, 1),
            "of_peak": round(rate / figures.gemm, 3) if figures.gemm and flops else None,
        }  # fmt: skip
    left = [(done.seconds - sum(lap.seconds for lap in done.laps)) / answers for done in figures.passes]
    parts[REST] = {"runs": 1.0, "ms": _spread([1e3 * s for s in left]), "gflop": 0.0, "gflops": 0.0, "of_peak": None}
    return parts


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 2), "low": round(min(values), 2), "high": round(max(values), 2)}


def same(one: tuple[Box, ...], other: tuple[Box, ...]) -> bool:
    """Do two answers point at the same things? As many boxes, and each overlaps one of the other answer."""
    if len(one) != len(other):
        return False
    if not one:
        return True
    overlap = box_ops.iou(torch.tensor(one), torch.tensor(other)) > IOU
    return bool(overlap.any(0).all() and overlap.any(1).all())


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    sides, gain, many = report["sides"], report["gain"], report["expressions"]
    weights = ", random weights" if report["random_weights"] else ""
    lines = [
        f"{report['model']}{weights}; {report['device']}, {report['threads']} threads, torch {report['torch']}",
        f"{report['regions']} regions, {report['prefix_tokens']} tokens before a question, {report['repeat']} turns",
        "",
        _row("", *(f"{name}, {side['dtype']}" for name, side in sides.items()), "gain" if gain else ""),
    ]
    rows = [("one expression, ms", "one_ms", "one")]
    rows += [(f"{many} expressions, ms", "many_ms", "many")] if many > 1 else []
    lines += [_row(title, *(_range(side[key]) for side in sides.values()), _range(gain[name], "x") if gain else "")
              for title, key, name in rows]  # fmt: skip
    for title, key in (("loading, ms", "load_ms"), ("weights, MiB", "weights_mib"), ("peak memory, MiB", "peak_mib")):
        share = f"{gain['peak_share']:.2f} of it" if gain and key == "peak_mib" else ""
        lines.append(_row(title, *(f"{side[key]:,.0f}" for side in sides.values()), share))
    if gain:
        lines.append(f"the same answers: {gain['same_answers']} of {many}")
    for name, side in sides.items():
        lines += ["", *_parts_table(name, side, many)]
    return "\n".join(lines)


def _parts_table(name: str, side: dict[str, Any], many: int) -> list[str]:
    what = f"a look and {many} expressions" if name == "ours" else "one question"
    lines = [f"{name}: {what}, by part" + (
        f"; matrix products in {side['dtype']} reach {side['gemm_peak_gflops']:,.0f} GFLOP/s"
        if side["gemm_peak_gflops"] else ""
    )]  # fmt: skip
    lines.append(f"{'part':<10} {'runs':>5} {'ms a run':>24} {'GFLOP':>10} {'GFLOP/s':>9} {'of peak':>8}")
    for part, row in side["parts"].items():
        work = f"{row['gflop']:>10,.2f} {row['gflops']:>9,.0f}" if row["gflop"] else f"{'':>20}"
        share = f"{row['of_peak']:>8.2f}" if row["of_peak"] is not None else ""
        lines.append(f"{part:<10} {row['runs']:>5g} {_range(row['ms']):>24} {work} {share}".rstrip())
    return lines


def _row(title: str, *cells: str) -> str:
    return (f"{title:<22}" + "".join(f"{cell:>28}" for cell in cells)).rstrip()


def _range(spread: dict[str, float], unit: str = "") -> str:
    return f"{spread['median']:,.1f}{unit} ({spread['low']:,.1f}–{spread['high']:,.1f})"
