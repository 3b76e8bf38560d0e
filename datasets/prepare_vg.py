#!/usr/bin/env python
"""Make Groma's JSON of Visual Genome's region descriptions, without the pictures that a score is taken on.

examples:
  python datasets/prepare_vg.py vg/region_descriptions.json vg/vg_train.json --exclude vg/test_ids.txt \\
      --exclude-coco coco/annotations/instances_val2017.json refcoco/refcocog_val.json
  python datasets/prepare_vg.py vg/region_descriptions.json vg/vg_test.json --only vg/test_ids.txt

image_data.json is looked for beside region_descriptions.json. The result is COCO-like, with a "caption" in each
annotation (format "region_captions", or "regions" for stage 1); file names are VG_100K/2.jpg and so on.

--exclude and --only take lists of Visual Genome's picture ids: text, one id a line, or a JSON list. --exclude-coco
takes COCO-style files (also expressions of RefCOCO): half of Visual Genome's pictures are COCO's, and those whose COCO
number is that of a picture in the files are left out. It looks at the number in the file name, which all releases of
COCO share.

Prints what was written. Exit status: 0 written, 2 a mistake in the call.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from tqdm import tqdm

from groma import cli
from groma.data.coco_writer import CocoWriter
from groma.data.json_stream import json_items
from groma.data.records import AnnotationError, field
from groma.data.vg import VisualGenome


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; leaves with status 2 and one line if it is wrong."""
    parser = cli.Parser(__doc__)
    parser.add_argument("source", metavar="REGIONS.json", type=Path, help="Visual Genome's region descriptions")
    parser.add_argument("out", metavar="OUT.json", type=Path, help="the file to write")
    parser.add_argument("--exclude", metavar="LIST", type=Path, nargs="+", default=[], help="ids to leave out")
    parser.add_argument("--only", metavar="LIST", type=Path, nargs="+", default=[], help="ids to keep, and no others")
    parser.add_argument("--exclude-coco", metavar="JSON", type=Path, nargs="+", default=[],
                        help="COCO-style files whose pictures are left out")  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Write the file, say what is in it; returns the exit status."""
    args = parse(arguments)
    with cli.user_errors():
        if not args.source.is_file():
            raise ValueError(f"{args.source}: no such file")
        excluded = {number for path in args.exclude for number in ids(path)}
        only = {number for path in args.only for number in ids(path)}
        of_coco = {number for path in args.exclude_coco for number in coco_numbers(path)}
        records = VisualGenome(args.source, args.source.parent)
        sizes = {}
        for image in filter(lambda image: isinstance(image, dict), json_items(records.sizes)):
            number = image.get("image_id", image.get("id"))
            sizes[number] = {side: image.get(side) for side in ("width", "height")}
            if image.get("coco_id") in of_coco:
                excluded.add(number)
        left_out = 0
        info = {"description": "Visual Genome region descriptions"}
        with CocoWriter(args.out, [{"id": 1, "name": "object"}], info, [args.source, records.sizes]) as out:
            for name, number, regions in tqdm(records.entries, unit=" pictures", disable=args.quiet):
                if number in excluded or (args.only and number not in only):
                    left_out += 1
                    continue
                record = {"id": number, "file_name": name, **sizes[number]}
                out.image(record)
                for caption, box in regions:
                    out.box(record, box, caption=caption)
        print(f"{args.out}: {out.images} pictures, {out.annotations} regions; {left_out} pictures excluded")
        if records.problems:
            print(f"left out {records.problems.total} unusable records; the first: {records.problems[0]}")
    return 0


def ids(path: Path) -> list[int]:
    """Picture ids: a JSON list, or text with one a line. Raises AnnotationError."""
    try:
        lines = list(json_items(path)) if path.suffix == ".json" else path.read_text("utf-8").split()
        return [int(line) for line in lines]
    except (OSError, TypeError, ValueError) as error:
        raise AnnotationError(f"{path}: cannot be read as a list of picture ids ({error})") from error


def coco_numbers(path: Path) -> set[int]:
    """The numbers in the file names of a COCO-style file: COCO_val2014_000000000042.jpg and 000000000042.jpg are 42."""
    numbers = set()
    for image in json_items(path, "images"):
        name = field(image, "file_name", str, path)
        if not (match := re.search(r"(\d+)\.\w+$", name)):
            raise AnnotationError(f"{path}: file_name {name!r:.60}, expected COCO's, with a number")
        numbers.add(int(match[1]))
    return numbers


if __name__ == "__main__":
    sys.exit(main())
