#!/usr/bin/env python
"""Make Groma's REC JSON of RefCOCO, RefCOCO+ or RefCOCOg, one file a split, from the pickles of their authors.

examples:
  python datasets/prepare_refcoco.py refcoco/refcoco unc refcoco        # refcoco_train.json, _val, _testA, _testB
  python datasets/prepare_refcoco.py refcoco/refcocog umd refcoco --splits train val

FOLDER holds refs(BY).p and instances.json. The partitions of one set (unc, umd, google) divide the same references
differently: never train on one and score on another.

Every "images" entry of a file is one expression ("caption") about a picture, with one annotation: its box. File names
are those of COCO's 2017 release (--names 2014: as in instances.json). The pickle is read without running what it holds.

Prints what was written. Exit status: 0 written, 2 a mistake in the call.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from groma import cli
from groma.data.coco_writer import CocoWriter
from groma.data.json_stream import json_items
from groma.data.plain_pickle import load_plain
from groma.data.records import AnnotationError
from groma.data.refer import Refer, name_2017


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; leaves with status 2 and one line if it is wrong."""
    parser = cli.Parser(__doc__)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="of refs(BY).p and instances.json")
    parser.add_argument("by", metavar="BY", help="the partition: unc, umd or google")
    parser.add_argument("out", metavar="OUT", type=Path, help="an existing folder for the files")
    parser.add_argument("--splits", nargs="+", metavar="S", help="only these (default: all there are)")
    parser.add_argument("--name", help="files are called NAME_<split>.json (default: as FOLDER)")
    parser.add_argument("--names", choices=("2014", "2017"), default="2017", help="COCO release (default: %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Write the files, say what is in them; returns the exit status."""
    args = parse(arguments)
    with cli.user_errors():
        pickle = args.folder / f"refs({args.by}).p"
        if not pickle.is_file():
            there = ", ".join(sorted(path.name for path in args.folder.glob("*.p"))) or "none"
            raise ValueError(f"{pickle}: no such file; pickles there: {there}")
        parts = splits(pickle)
        for split in args.splits or parts:
            if split not in parts:
                raise ValueError(f"--splits {split}: {pickle.name} has {', '.join(parts)}")
        sizes = {image.get("file_name"): image for image in json_items(args.folder / "instances.json", "images")
                 if isinstance(image, dict)}  # fmt: skip
        for split in args.splits or parts:
            write(pickle, split, sizes, args)
    return 0


def splits(pickle: Path) -> list[str]:
    """The parts that references of a pickle belong to; one named testAB belongs to testA and to testB."""
    content = load_plain(pickle)
    if not isinstance(content, list):
        raise AnnotationError(f"{pickle}: a pickled {type(content).__name__}, expected a list of references")
    named = {ref.get("split") for ref in content if isinstance(ref, dict)}
    parts: set[str] = set()
    for part in named:
        if isinstance(part, str):
            letters = part.removeprefix("test") if part.startswith("test") else ""
            parts |= {f"test{letter}" for letter in letters} or {part}
    order = ("train", "val", "test", "testA", "testB")
    return sorted(parts, key=lambda part: (order.index(part) if part in order else len(order), part))


def write(pickle: Path, split: str, sizes: dict[str, dict[str, float]], args: argparse.Namespace) -> None:
    """One split's file."""
    records = Refer(pickle, pickle.parent, split=split)
    path = args.out / f"{args.name or args.folder.resolve().name}_{split}.json"
    info = {"description": f"{args.folder.resolve().name}, partition {args.by}, {split}"}
    with CocoWriter(path, [{"id": 1, "name": "object"}], info, [pickle, records.instances]) as out:
        for name, expressions in tqdm(records.entries, desc=split, unit=" pictures", disable=args.quiet):
            size = {side: sizes[name][side] for side in ("width", "height")}
            for number, caption, boxes in expressions:
                file_name = name if args.names == "2014" else name_2017(name)
                record = {"id": out.images + 1, "file_name": file_name, "caption": caption, **size, "sent_id": number}
                out.image(record)
                for box in boxes:
                    out.box(record, box)
    print(f"{path}: {out.images} expressions about {len(records)} pictures")
    if records.problems:
        print(f"left out {records.problems.total} unusable references; the first: {records.problems[0]}")


if __name__ == "__main__":
    sys.exit(main())
