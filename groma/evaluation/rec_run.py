"""A REC evaluation from files to files: expressions of either layout in, metrics.json and predictions.jsonl out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from groma.data.check_images import header_size
from groma.data.jsonl import JsonLines
from groma.evaluation.grounding import Expression, Grounder, ask, read_rec, report


def read_expressions(ann: Path, images: Path) -> list[Expression]:
    """The expressions of a REC file or, where its name ends in .jsonl, of own data, in order.

    Lines of own data that hold something else are passed over. ValueError for a file that cannot be read, holds no
    expression, or has a line that cannot be used: what is left out would make a score look better.
    """
    if ann.suffix != ".jsonl":
        return read_rec(ann)
    records = JsonLines(ann, images, max_problems=0.0)
    found: list[Expression] = []
    for name, _, kind, items in records.entries:
        if kind != "expressions":
            continue
        width, height = header_size(images / name)
        for text, boxes in items:
            pixels = [(x1 * width, y1 * height, x2 * width, y2 * height) for x1, y1, x2, y2 in boxes]
            found.append(Expression(len(found), name, width, height, text, tuple(pixels)))
    if not found:
        raise ValueError(f"{ann}: no line with expressions")
    return found


def run(
    groma: Grounder,
    expressions: Sequence[Expression],
    images: Path,
    out: Path,
    limit: int | None = None,
    about: dict[str, Any] | None = None,
    progress: Callable[[int], None] = lambda pictures: None,
) -> dict[str, Any]:
    """Ask all ``expressions`` about their pictures, the first ``limit`` of these; write and return the metrics.

    ``out`` gets predictions.jsonl as answers come, then metrics.json: ``about`` (who was asked what), the figures of
    ``RecReport`` and the seconds it took. ``progress`` is told how many pictures are done.
    """
    out.mkdir(parents=True, exist_ok=True)
    started, verdicts = time.perf_counter(), []
    with (out / "predictions.jsonl").open("w", encoding="utf-8") as lines:
        for done, (_, judged) in enumerate(ask(groma, expressions, images, limit), start=1):
            verdicts.extend(judged)
            lines.writelines(json.dumps(verdict.to_dict()) + "\n" for verdict in judged)
            progress(done)
    metrics = {**(about or {}), **report(verdicts).to_dict(), "seconds": round(time.perf_counter() - started, 1)}
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    return metrics
