#!/usr/bin/env python
"""Make one class-agnostic COCO JSON of a detection set: every box is an "object", for training without classes.

examples:
  python datasets/prepare_class_agnostic.py coco/annotations/instances_train2017.json coco/objects.json
  python datasets/prepare_class_agnostic.py openimages/oidv6-train-annotations-bbox.csv openimages/objects.json \\
      --images openimages/train
  python datasets/prepare_class_agnostic.py sa1b sa1b/objects_2m.json --subset-fraction 0.179

SOURCE is a COCO-style .json (COCO, Objects365, V3Det, LVIS), OpenImages' .csv, or a folder of SA-1B (sa_*.json or
sa_*.tar). The readers take all of these as they are; one small file is easier to move, to look into and to subset.
Crowds and groups, boxes without area and those under a pixel are left out, and of SA-1B's those outside --min-area and
--max-area. File names stay those of SOURCE, so --images of the result is the folder of the set's pictures.

The subset is drawn picture by picture from the seed and the name: the same pictures each time, and those of a smaller
fraction are among those of a larger one. Prints what was written. Exit status: 0 written, 2 a mistake in the call or
more records unusable than --max-problems.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from groma import cli
from groma.data.coco import Box, image_name, unit_box
from groma.data.coco_writer import CocoWriter
from groma.data.images import ImageError
from groma.data.json_stream import json_items
from groma.data.openimages import Note, picture_size, read_openimages
from groma.data.records import AnnotationError, field, name_record
from groma.data.sa1b import MAX_AREA, MIN_AREA, list_sa1b, read_picture
from groma.data.store import Problems

OBJECT = {"id": 1, "name": "object"}


class Picture(NamedTuple):
    """An image record and its boxes, xyxy in [0, 1]."""

    record: dict[str, Any]
    boxes: list[Box]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; leaves with status 2 and one line if it is wrong."""
    parser = cli.Parser(__doc__)
    parser.add_argument("source", metavar="SOURCE", type=Path, help="a .json, a .csv, or a folder of SA-1B")
    parser.add_argument("out", metavar="OUT.json", type=Path, help="the file to write")
    parser.add_argument("--images", metavar="DIR", type=Path, help="OpenImages: the pictures, for their sizes")
    parser.add_argument("--limit", metavar="N", type=cli.at_least_one, help="at most the first N pictures (of those)")
    parser.add_argument("--subset-fraction", metavar="F", type=cli.share, default=1.0, help="a share of the pictures")
    parser.add_argument("--seed", type=int, default=0, help="of the subset (default: %(default)s)")
    parser.add_argument("--min-area", metavar="PX", type=float, default=MIN_AREA,
                        help="SA-1B: smallest box in square pixels (default: %(default)g)")  # fmt: skip
    parser.add_argument("--max-area", metavar="PX", type=float, default=MAX_AREA,
                        help="SA-1B: largest box in square pixels (default: %(default)g)")  # fmt: skip
    parser.add_argument("--max-problems", metavar="F", type=cli.share, default=0.01,
                        help="share of records that may be unusable (default: %(default)s)")  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Write the file, say what is in it; returns the exit status."""
    args = parse(arguments)
    with cli.user_errors():
        write, problems = writer(args), Problems()
        with CocoWriter(args.out, [OBJECT], {"description": "objects of any class"}, [args.source]) as out:
            write(args, out, problems.append)
            total = out.images + out.annotations + problems.total
            if problems.total > args.max_problems * total:
                raise ValueError(f"{args.source}: {problems.total} of {total} records unusable, more than "
                                 f"{args.max_problems:.1%}; the first: {problems[0]}")  # fmt: skip
        print(f"{args.out}: {out.images} pictures, {out.annotations} boxes")
        if problems:
            print(f"left out {problems.total} unusable records; the first: {problems[0]}")
    return 0


def writer(args: argparse.Namespace) -> Callable[[argparse.Namespace, CocoWriter, Note], None]:
    """What reads the source and writes. Raises ValueError."""
    if args.source.is_dir():
        return partial(write_pictures, of_sa1b)
    if args.source.suffix == ".csv":
        if args.images is None or not args.images.is_dir():
            raise ValueError(f"--images {args.images or 'is missing'}: expected the folder of OpenImages' pictures, "
                             "whose sizes the CSV does not say")  # fmt: skip
        return partial(write_pictures, of_openimages)
    if args.source.suffix == ".json":
        return write_coco
    raise ValueError(f"{args.source}: expected an existing folder, a .json or a .csv")


def write_pictures(
    read: Callable[[argparse.Namespace, Note], Iterator[Picture]],
    args: argparse.Namespace,
    out: CocoWriter,
    note: Note,
) -> None:
    """Write what ``read`` finds, picture by picture."""
    for picture in tqdm(islice(read(args, note), args.limit), unit=" pictures", disable=args.quiet):
        out.image(picture.record)
        for box in picture.boxes:
            out.box(picture.record, box)


def write_coco(args: argparse.Namespace, out: CocoWriter, note: Note) -> None:
    """Write from a COCO-style file: it is read once for the images and once for the annotations, never as a whole."""
    sizes: dict[int | str, tuple[float, float] | None] = {}  # None: not chosen
    for image in tqdm(json_items(args.source, "images"), unit=" pictures", disable=args.quiet):
        try:
            record = image_record(image, args.source)
        except AnnotationError as error:
            note(str(error))
            continue
        if record["id"] in sizes:
            note(f"{args.source}: two images with id {record['id']}")
            continue
        full = args.limit is not None and out.images >= args.limit
        kept = not full and chosen(record["file_name"], args)
        sizes[record["id"]] = (record["width"], record["height"]) if kept else None
        if kept:
            out.image(record)
    for mark in tqdm(json_items(args.source, "annotations"), unit=" boxes", disable=args.quiet):
        try:
            number = field(mark, "image_id", (int, str), args.source)
            if number not in sizes:
                raise AnnotationError(
                    f"{args.source}: {name_record(mark)} is of image {number}, which is not among the images"
                )
            if (size := sizes[number]) is None:
                continue
            record = {"id": number, "width": size[0], "height": size[1]}
            box = unit_box(mark, record, args.source)
            if box is not None:
                own = {"area": mark["area"]} if isinstance(mark.get("area"), (int, float)) else {}
                out.box(record, box, **own)
        except AnnotationError as error:
            note(str(error))


def image_record(image: Any, file: Path) -> dict[str, Any]:
    """The id, file name and size of an image. Raises AnnotationError."""
    size = {side: field(image, side, (int, float), file) for side in ("width", "height")}
    return {"id": field(image, "id", (int, str), file), "file_name": image_name(image, file), **size}


def of_openimages(args: argparse.Namespace, note: Note) -> Iterator[Picture]:
    """The pictures of OpenImages' CSV, with the sizes that their files have."""

    for number, (name, boxes) in enumerate(read_openimages(args.source, note), 1):
        if not chosen(f"{name}.jpg", args):
            continue
        try:
            width, height = picture_size(args.images / f"{name}.jpg")
        except ImageError as error:
            note(str(error))
            continue
        record = {"id": number, "file_name": f"{name}.jpg", "width": width, "height": height}
        yield Picture(record, boxes)


def of_sa1b(args: argparse.Namespace, note: Note) -> Iterator[Picture]:
    """The pictures of a folder of SA-1B; only JSONs of chosen ones are read."""

    for place in list_sa1b(args.source, note):
        if not chosen(place, args):
            continue
        try:
            found = read_picture(args.source, place, args.min_area, args.max_area)
        except AnnotationError as error:
            note(str(error))
            continue
        record = {"id": found.id, "file_name": found.name, "width": found.width, "height": found.height}
        yield Picture(record, found.boxes)


def chosen(name: str, args: argparse.Namespace) -> bool:
    """Is the picture called ``name`` in the subset?"""
    code = hashlib.blake2b(f"{args.seed}/{name}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(code, "big") < math.floor(args.subset_fraction * 2**64)


if __name__ == "__main__":
    sys.exit(main())
