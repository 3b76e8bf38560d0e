#!/usr/bin/env python
"""Measure how fast expressions about one picture are answered, where the time goes, and in how much memory.

examples:
  python tools/benchmark.py
  python tools/benchmark.py --config mid --naive --expressions 8
  python tools/benchmark.py --config mid --dtype float32 --naive --no-parts --json
  python tools/benchmark.py --config mid --save path/to/mid
  python tools/benchmark.py --model path/to/mid --quantise 8bit

--config takes random weights of a real size, so that no checkpoint is needed; it keeps the same number of regions for
every picture, and its answers mean nothing. --naive also answers the way the original does (one question at a time,
float32, everything recomputed, a growing cache), taking turns with ours, and prints the gain. Times are medians with
their range over the turns. docs/performance.md explains every figure.
Exit status: 0 done, 2 a mistake in the call.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from groma import cli

CONFIGS = ("tiny", "mid", "7b")
TABLE = Path(__file__).resolve().parent.parent / "groma" / "assets" / "tabletop" / "table.jpg"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; leaves with status 2 and one line if it is wrong."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--config", choices=CONFIGS, help="random weights of this size instead of a model")
    parser.add_argument("--image", metavar="FILE", default=str(TABLE), help="a picture (default: the embedded one)")
    parser.add_argument("--expressions", metavar="N", type=cli.at_least_one, default=8, help="default: %(default)s")
    parser.add_argument("--repeat", metavar="R", type=cli.at_least_one, default=3, help="turns (default: %(default)s)")
    parser.add_argument("--naive", action="store_true", help="also answer the original's way, and print the gain")
    parser.add_argument("--parts", action=argparse.BooleanOptionalAction, default=True,
                        help="count operations and measure matrix products, for the share of peak")  # fmt: skip
    parser.add_argument("--quantise", choices=("none", "8bit", "4bit"), default="none",
                        help="weights of the language model (default: %(default)s)")  # fmt: skip
    parser.add_argument("--save", metavar="DIR", help="only write the model of --config there, for --model to load")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    cli.add_model_arguments(parser)
    args = parser.parse_args(arguments)
    if args.config and args.model:
        parser.error("--config makes a model of random weights, so --model is not taken with it")
    if args.config and args.quantise != "none":
        parser.error("--quantise reads a saved model: write it with --config … --save DIR, then give --model DIR")
    if args.save and not args.config:
        parser.error("--save writes a model of random weights: say of which --config")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Measure once; returns the exit status."""
    args = parse(arguments)
    with cli.user_errors():
        from groma.data.images import read_image

        read_image(args.image)  # a wrong picture is told before a model loads
        if args.save:
            save(args)
            return cli.FOUND
        from tqdm import tqdm

        from groma.evaluation import benchmark
        from groma.evaluation.side import Job

        job = Job(args.image, benchmark.expressions(args.expressions), args.model, args.config, args.device, args.dtype,
                  args.quantise)  # fmt: skip
        total = benchmark.steps(args.repeat, args.naive, args.parts)
        with tqdm(total=total, desc="benchmark", disable=args.quiet) as bar:
            report = benchmark.measure(job, args.repeat, args.naive, args.parts, bar.update)
    print(json.dumps(report) if args.json else benchmark.table(report))
    return cli.FOUND


def save(args: argparse.Namespace) -> None:
    """Write a model of random weights with its processor."""
    from groma.evaluation.random_weights import random_groma
    from groma.loading import pick_device

    groma = random_groma(args.config, pick_device(args.device), args.dtype)
    groma.model.save_pretrained(args.save)
    groma.processor.save_pretrained(args.save)


if __name__ == "__main__":
    sys.exit(main())
