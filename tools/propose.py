#!/usr/bin/env python
"""Show the regions the model sees in a picture before any question is asked, best first.

examples:
  python tools/propose.py table.jpg
  python tools/propose.py table.jpg --max 10 --output regions.png
  python tools/propose.py table.jpg --json

Prints a line per region: objectness in [0, 1] and corners in pixels of the upright picture.
Exit status: 0 found, 1 no region at all, 2 a mistake in the call.
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
    parser.add_argument(
        "--max", metavar="N", type=cli.at_least_one, default=100, help="at most N regions (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser.add_argument("--output", metavar="OUT.png", help="also draw the regions into this file")
    cli.add_model_arguments(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """List the regions once; returns the exit status."""
    args = parse(arguments)
    with cli.user_errors():
        cli.check_output(args.output, args.image)
        from groma.data.images import read_image

        read_image(args.image)  # a wrong picture is told before the model loads
        groma = cli.load(args.model, args.device, args.dtype, args.quiet)
        answer = groma.propose(groma.look(args.image), max=args.max)
        if args.output:
            cli.save_drawing(answer, args.image, args.output)
        if args.json:
            print(json.dumps(answer.to_dict()))
        elif answer.boxes:
            print("\n".join(cli.describe_boxes(answer, "region")))
        else:
            print("no region")
    return cli.FOUND if answer.boxes else cli.NOTHING_FOUND


if __name__ == "__main__":
    sys.exit(main())
