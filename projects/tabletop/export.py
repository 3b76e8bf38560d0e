#!/usr/bin/env python
"""Turn a trained tabletop model into the embedded default: fit when it says "nothing there", store it small.

examples:
  python projects/tabletop/export.py --model outputs/stage3/final --data data/tabletop/val --out groma/assets/tabletop

The threshold on the certainty of an answer (groma/predictor.py) is fitted on --data (the validation split, never the
test split): the one with the highest mean of "absent refused" and "present not refused" among those that refuse at most
9 % of what is present. Weights are stored as bfloat16.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from groma import cli


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; leaves with status 2 and one line if it is wrong."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--model", metavar="DIR", required=True, help="what stage 3 left in its final/")
    parser.add_argument("--data", metavar="DIR", required=True, type=Path, help="the validation split")
    parser.add_argument("--out", metavar="DIR", required=True, type=Path, help="where the model goes")
    parser.add_argument("--limit", metavar="N", type=cli.at_least_one, help="only the first N scenes")
    return parser.parse_args(arguments)


MOST_REFUSED = 0.09
"""Share of the present expressions that may be refused: two standard errors of 2,000 below what users are promised."""


def best_threshold(
    present: list[float], absent: list[float], most_refused: float = MOST_REFUSED
) -> tuple[float, float, float]:
    """(threshold, share of absent below it, share of present below it) with the highest balanced accuracy.

    At most the share ``most_refused`` of present ones lies below it.
    present, absent: certainties in [0, 1] of the answers where something matches and where nothing does.
    Candidates lie halfway between neighbouring values. Raises ValueError where either list is empty.

    >>> best_threshold([0.9, 0.8, 0.3], [0.1, 0.2, 0.4])
    (0.25, 0.6666666666666666, 0.0)
    """
    if not present or not absent:
        raise ValueError(f"got {len(present)} present and {len(absent)} absent expressions, expected some of both")
    values = sorted({*present, *absent})
    best = (0.0, 0.0, 0.0)
    for low, high in zip([0.0, *values], [*values, 1.0], strict=True):
        threshold = (low + high) / 2
        refused = sum(v < threshold for v in absent) / len(absent)
        wronged = sum(v < threshold for v in present) / len(present)
        if wronged <= most_refused and refused - wronged > best[1] - best[2]:
            best = (threshold, refused, wronged)
    return best


def main(arguments: list[str] | None = None) -> int:
    """Fit, store, tell; returns the exit status."""
    args = parse(arguments)
    with cli.user_errors():
        import torch

        from groma.evaluation.grounding import ask, read_rec

        groma = cli.load(args.model, "auto", "float32", quiet=True)
        present: list[float] = []
        absent: list[float] = []
        for _, verdicts in ask(groma, read_rec(args.data / "rec.json"), args.data / "images", args.limit):
            for verdict in verdicts:
                (present if verdict.expression.referents else absent).append(verdict.answer.certainty)
        threshold, refused, wronged = best_threshold(present, absent)
        groma.model.config.found_threshold = round(threshold, 4)
        # Stage 1's auxiliary: it read region tokens that have moved since.
        groma.model.words_head, groma.model.config.words = None, 0
        groma.model.to(torch.bfloat16).save_pretrained(args.out)
        groma.processor.save_pretrained(args.out)
        size = sum(f.stat().st_size for f in args.out.glob("*.safetensors")) / 1e6
        print(
            f"{args.out}: {size:.1f} MB; found_threshold {threshold:.4f} refuses {refused:.3f} of {len(absent)} absent "
            f"and {wronged:.3f} of {len(present)} present expressions of {args.data}"
        )
    return cli.FOUND


if __name__ == "__main__":
    sys.exit(main())
