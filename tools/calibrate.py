#!/usr/bin/env python
"""Fit a model's scores to what it gets right: two temperatures, the weight of objectness, and the threshold
below which it says "nothing there".

examples:
  python tools/calibrate.py --model outputs/stage3/final --data val/rec.json --images val/images
  python tools/calibrate.py --model outputs/stage3/final --data val/rec.json --images val/images --dry-run --limit 100
  python tools/calibrate.py --data val/rec.json --images val/images --out outputs/calibrated --max-refused 0.05

--data is a referring-expression file of validation pictures, some of its expressions without a referent; never the
test set. Writes the fitted numbers into the config.json of --model, or into a copy of it in --out (the embedded model
needs one), and beside it calibration.json; weights stay as they are. Prints the scores' errors before, after on the
same data, and after on pictures held out, which are the figures to quote. docs/scores.md explains them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from groma import cli

if TYPE_CHECKING:
    from groma.evaluation.calibration import Calibration, Figures
    from groma.evaluation.reliability import Reliability

RECORD = "calibration.json"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; leaves with status 2 and one line if it is wrong."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--data", metavar="REC.json", required=True, type=Path, help="expressions with their referents")
    parser.add_argument("--images", metavar="DIR", required=True, type=Path, help="the pictures it names")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--out", metavar="DIR", type=Path, help="a new directory for the model with its fitted numbers")
    where.add_argument("--dry-run", action="store_true", help="fit and print, write nothing")
    parser.add_argument("--limit", metavar="N", type=cli.at_least_one, help="only the first N pictures")
    parser.add_argument("--max-refused", metavar="R", type=cli.share, default=0.1,
                        help="refuse at most this share of present expressions (default: %(default)s)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print what calibration.json gets instead of tables")
    cli.add_model_arguments(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Read, fit, store, tell; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    args = parse(given)
    with cli.user_errors():
        source = None if args.dry_run else writable(args.model, args.out)
        digest = hashlib.sha256(args.data.read_bytes()).hexdigest()
        from groma.evaluation.calibration import calibrate, store, write_json
        from groma.evaluation.evidence import Settings, join, read
        from groma.evaluation.grounding import by_picture, read_rec

        expressions = read_rec(args.data)
        groma = cli.load(args.model, args.device, args.dtype, args.quiet)
        total = min(args.limit or len(expressions), len(by_picture(expressions)))
        from tqdm import tqdm

        parts = read(groma, expressions, args.images, args.limit)
        evidence = join(list(tqdm(parts, total=total, unit="picture", smoothing=0.05, disable=args.quiet)))
        result = calibrate(evidence, Settings.of(groma.model.config), args.max_refused)
        record = {
            "model": groma.name,
            "data": {"file": str(args.data), "sha256": digest, "limit": args.limit},
            "command": shlex.join(["python", "tools/calibrate.py", *given]),
            **result.to_dict(),
        }
        if source is not None:
            store(source, result.after, args.out)
            write_json((args.out or source) / RECORD, record)
        if args.json:
            print(json.dumps(record))
        else:
            title = f"{args.model or 'the embedded model'} on {args.data}"
            print("\n".join(report(result, title)))
            if source is not None:
                print(f"\nwritten to {args.out or source}")
    return cli.FOUND


def writable(model: str | None, out: Path | None) -> Path:
    """The model's directory, once it is sure that the result can be stored. Asked before the work, not after it."""
    if model is not None and not Path(model).is_dir():
        raise ValueError(f"--model {model}: no such directory; its files are needed here (or --dry-run)")
    from groma.evaluation.calibration import check_place
    from groma.predictor import EMBEDDED

    source = EMBEDDED if model is None else Path(model)
    if out is None and source.resolve() == EMBEDDED.resolve():
        raise ValueError("--model: the embedded model is not overwritten; name a new directory with --out")
    check_place(source, out)
    target = out or source
    while not target.exists():
        target = target.parent
    if not os.access(target, os.W_OK):
        raise ValueError(f"no permission to write to {out or source}")
    return source


def report(result: Calibration, title: str) -> Iterator[str]:
    """The tables for people."""
    counts = result.counts
    yield title
    yield (f"{counts['pictures']} pictures, {counts['expressions']} expressions: {counts['present']} with a referent "
           f"({counts['with_a_right_region']} of them with a right region), {counts['absent']} without")  # fmt: skip
    yield ""
    yield f"{'setting':<24}{'before':>10}{'after':>10}   by fold"
    for name in ("score_temperature", "presence_temperature", "found_threshold", "objectness_power"):
        folds = [getattr(settings, name) for settings in result.folds]
        spread = f"{min(folds):.4f} to {max(folds):.4f}" if folds else "-"
        yield f"{name:<24}{getattr(result.before, name):>10.4f}{getattr(result.after, name):>10.4f}   {spread}"
    yield ""
    held = result.figures_held_out
    runs = [result.figures_before, result.figures_fitted, held]
    yield f"{'measure':<34}{'before':>10}{'same data':>12}{'held out':>12}"
    for label, pick in rows():
        cells = ["-" if run is None or (value := pick(run)) is None else f"{value:.4f}" for run in runs]
        yield f"{label:<34}{cells[0]:>10}{cells[1]:>12}{cells[2]:>12}"
    after = held or result.figures_fitted
    what = "held out" if held else "same data"
    yield from table(f"score of the region pointed at, after: {what}", result.figures_before.top, after.top)
    if result.figures_before.presence and after.presence:
        yield from table(f"presence, after: {what}", result.figures_before.presence, after.presence)
    if result.notes:
        yield ""
        yield from (f"note: {note}" for note in result.notes)


def rows() -> Iterator[tuple[str, Any]]:
    """Each figure's name, and how it is found in Figures."""
    for part, label in (("top", "score"), ("pointing", "score without objectness"), ("presence", "presence")):
        for name, shown in (("ece", "ECE"), ("nll", "NLL"), ("brier", "Brier")):

            def pick(figures: Figures, part: str = part, name: str = name) -> float | None:
                measured = getattr(figures, part)
                return None if measured is None else float(getattr(measured, name))

            yield f"{label}, {shown}", pick
    yield "absent refused", lambda figures: figures.absent_refused
    yield "present refused", lambda figures: figures.present_refused


def table(title: str, before: Reliability, after: Reliability) -> Iterator[str]:
    """How many answers score in each bin, their mean score, and the share of them that is right."""
    yield ""
    yield title
    yield f"{'in the bin':<14}{'before':>8}{'score':>8}{'right':>8}{'after':>12}{'score':>8}{'right':>8}"
    left, right = ({(b.low, b.high): b for b in side.bins} for side in (before, after))
    for low, high in sorted(left.keys() | right.keys()):
        line = f"{f'{low:.2f} - {high:.2f}':<14}"
        for side, width in ((left, 8), (right, 12)):
            b = side.get((low, high))
            line += f"{b.count:>{width}}{b.score:>8.3f}{b.right:>8.3f}" if b else f"{0:>{width}}{'-':>8}{'-':>8}"
        yield line


if __name__ == "__main__":
    sys.exit(main())
