#!/usr/bin/env python
"""Turn a trained tabletop model into the embedded default: calibrate its scores, store it small.

examples:
  python projects/tabletop/export.py --model outputs/stage3/final --data data/tabletop/val --out groma/assets/tabletop

Weights are rounded to bfloat16 and stored so. With the rounded weights, the temperatures of the scores and the
threshold below which it says "nothing there" are fitted on --data (the validation split, never the test split), as
tools/calibrate.py does; calibration.json, beside the model, has the figures before and after.
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


def main(arguments: list[str] | None = None) -> int:
    """Fit, store, tell; returns the exit status."""
    args = parse(arguments)
    with cli.user_errors():
        import torch

        from groma.evaluation.calibration import calibrate, write_json
        from groma.evaluation.evidence import Settings, join, read
        from groma.evaluation.grounding import read_rec

        groma = cli.load(args.model, "auto", "float32", quiet=True)
        for parameter in groma.model.parameters():
            parameter.data = parameter.data.bfloat16().float()
        evidence = join(list(read(groma, read_rec(args.data / "rec.json"), args.data / "images", args.limit)))
        result = calibrate(evidence, Settings.of(groma.model.config))
        result.after.apply(groma.model.config)
        # Stage 1's auxiliary: it read region tokens that have moved since.
        groma.model.words_head, groma.model.config.words = None, 0
        groma.model.to(torch.bfloat16).save_pretrained(args.out)
        groma.processor.save_pretrained(args.out)
        write_json(args.out / "calibration.json", {"data": str(args.data), **result.to_dict()})
        size = sum(f.stat().st_size for f in args.out.glob("*.safetensors")) / 1e6
        after, counts = result.after, result.counts
        temperatures = f"temperatures {after.score_temperature:.4f} and {after.presence_temperature:.4f}"
        print(f"{args.out}: {size:.1f} MB; {temperatures}; found_threshold {after.found_threshold:.4f}")
        # one picture leaves nothing to hold out
        what, figures = "held out", result.figures_held_out
        if figures is None:
            what, figures = "same data", result.figures_fitted
        ece = f"ECE of the score {result.figures_before.top.ece:.4f} before, {figures.top.ece:.4f} after"
        refused = f"refused {share(figures.absent_refused)} of {counts['absent']} absent expressions"
        print(f"{what}: {ece}; {refused} and {share(figures.present_refused)} of {counts['present']} present")
        for note in result.notes:
            print(f"note: {note}")
    return cli.FOUND


def share(value: float | None) -> str:
    """A share as text, or a dash where there was nothing to count."""
    return "-" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    sys.exit(main())
