#!/usr/bin/env python
"""Look through a data set before training on it: every image and every record, and what is wrong with each.

examples:
  python tools/check_data.py train/rec.json --images train/images
  python tools/check_data.py own.jsonl --images pictures --jobs 4 --json > findings.json
  python tools/check_data.py 'refcoco/refs(unc).p' --images coco/train2014 --format refer --split val

Tells images that are missing, empty or corrupt (each is decoded; --fast reads headers only) or of another size than
their record says, paths that leave the image folder, duplicate ids, boxes that are malformed, reversed, empty or out of
the image, boxes that look like xyxy where xywh is expected, empty captions, captions with words of the model's markup,
and records that training would leave out. Exit status: 0 nothing wrong, 1 findings, 2 a mistake in the call.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings

from groma import cli
from groma.settings import FORMATS


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; leaves with status 2 and one line if it is wrong."""
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "annotations", metavar="ANN", help="an annotation file, or the folder of a set in its own layout"
    )
    parser.add_argument("--images", metavar="DIR", required=True, help="the folder that image names are relative to")
    parser.add_argument("--format", metavar="F", choices=("auto", *FORMATS), default="auto",
                        help=f"auto (default, for .json and .jsonl) or one of {', '.join(FORMATS)}")  # fmt: skip
    parser.add_argument("--split", metavar="S", default="", help="the part of a set whose files hold several")
    parser.add_argument("--fast", action="store_true", help="read the headers of images only, do not decode them")
    parser.add_argument("--jobs", metavar="N", type=cli.at_least_one, default=1, help="images decoded at a time")
    parser.add_argument("--most", metavar="N", type=cli.at_least_one, default=20,
                        help="findings of each kind that are printed (default: %(default)s)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Check once; returns the exit status."""
    args = parse(arguments)
    warnings.filterwarnings("ignore")  # Pillow's about large pictures and odd EXIF: what matters is a finding
    with cli.user_errors():
        from tqdm import tqdm

        from groma.data.check import check

        with tqdm(desc="images", unit="image", mininterval=0.5, file=sys.stderr) as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            report = check(args.annotations, args.images, args.format, args.split, args.fast, args.jobs, progress)
        print(json.dumps(report.to_dict()) if args.json else cli.printable("\n".join(report.lines(args.most))))
    return cli.NOTHING_FOUND if report.findings else cli.FOUND


if __name__ == "__main__":
    sys.exit(main())
