#!/usr/bin/env python
"""Find what a text describes in a picture.

examples:
  python tools/refer.py table.jpg "the red cup"
  python tools/refer.py table.jpg "all the green bowls" --output found.png
  python tools/refer.py table.jpg "the largest book" --json
  python tools/refer.py street.jpg "the man with the umbrella" --model path/to/groma-7b --device cuda

Prints a line per box, best first: score in [0, 1] and corners in pixels of the upright picture.
Exit status: 0 found, 1 nothing there, 2 a mistake in the call.
"""

from __future__ import annotations

import argparse
import json
import sys

from groma import cli


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; leaves with status 2 and one line if it is wrong."""
    parser = cli.Parser(__doc__)
    parser.add_argument("image", metavar="IMAGE", help="a picture file")
    parser.add_argument("text", metavar="TEXT", type=cli.not_empty, help="what to find, in words")
    parser.add_argument("--top-k", metavar="N", type=cli.at_least_one, help="at most N boxes")
    parser.add_argument("--min-score", metavar="S", type=cli.share, help="only boxes that score at least S (0 to 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser.add_argument("--output", metavar="OUT.png", help="also draw the answer into this file")
    cli.add_model_arguments(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Answer once; returns the exit status."""
    args = parse(arguments)
    with cli.user_errors():
        cli.check_output(args.output, args.image)
        from groma.data.images import read_image

        read_image(args.image)  # a wrong picture is told before the model loads
        groma = cli.load(args.model, args.device, args.dtype, args.quiet)
        answer = groma.refer(groma.look(args.image), args.text, top_k=args.top_k, min_score=args.min_score)
        if args.output:
            cli.save_drawing(answer, args.image, args.output)
        if args.json:
            print(json.dumps(answer.to_dict()))
        elif answer.found:
            print("\n".join(cli.describe_boxes(answer, "found")))
        else:
            print(f'nothing there: "{args.text}"')
    return cli.FOUND if answer.found else cli.NOTHING_FOUND


if __name__ == "__main__":
    sys.exit(main())
