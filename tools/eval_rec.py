#!/usr/bin/env python
"""Score a model on referring expressions: which box it gives for each, and whether that is the right one.

examples:
  python tools/eval_rec.py --data refcoco_val.json --images coco/train2017 --out outputs/refcoco --model path/to/groma
  python tools/eval_rec.py --data own.jsonl --images pictures --out outputs/own --limit 10

--data is a COCO-like file in which every ``images`` entry is one expression (``caption``) and its annotations are the
referents (none: nothing matches; several: a plural), or own data as JSON Lines with "expressions". A box is right where
its IoU is above 0.5. --out gets metrics.json and predictions.jsonl, a line per expression.
Exit status: 0 done, 2 a mistake in the call.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from groma import cli

FIGURES = ("accuracy", "absent_refused", "present_refused", "plural_f1")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; leaves with status 2 and one line if it is wrong."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--data", metavar="ANN", required=True, type=Path, help="the expressions")
    parser.add_argument("--images", metavar="DIR", required=True, type=Path, help="the folder of their pictures")
    parser.add_argument("--out", metavar="DIR", required=True, type=Path, help="metrics.json and predictions.jsonl")
    parser.add_argument("--limit", metavar="N", type=cli.at_least_one, help="only the first N pictures")
    cli.add_model_arguments(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Ask everything, print the figures; returns the exit status."""
    args = parse(arguments)
    with cli.user_errors():
        from tqdm import tqdm

        from groma.data.formats import there
        from groma.evaluation.grounding import by_picture
        from groma.evaluation.rec_run import read_expressions, run

        for path in (args.data, args.images):
            if not there(path):
                raise ValueError(f"{path}: no such file or folder")
        expressions = read_expressions(args.data, args.images)  # a wrong file is told before the model loads
        groma = cli.load(args.model, args.device, args.dtype, args.quiet)
        pictures = len(by_picture(expressions))
        about = {"model": args.model or groma.name, "data": str(args.data)}
        with tqdm(total=min(args.limit or pictures, pictures), unit="picture", file=sys.stderr) as bar:
            metrics = run(groma, expressions, args.images, args.out, args.limit, about, lambda n: bar.update(n - bar.n))
        for name, value in metrics.items():
            if name.startswith(FIGURES):
                print(f"{name:<32}{value:.3f}")
        print(f"{metrics['count/pictures']} pictures, {metrics['count/expressions']} expressions: {args.out}")
    return cli.FOUND


if __name__ == "__main__":
    sys.exit(main())
