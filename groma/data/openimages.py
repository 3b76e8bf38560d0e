"""OpenImages boxes (V4 to V7): a CSV with a row a box, corners in [0, 1] of the picture, pictures named ImageID.jpg.

The columns used are found by name; the releases have more of them, and more in later versions::

    ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside
    000026e7ee790996,xclick,/m/07j7r,1,0.071875,0.1453125,0.20625,0.39166668,0,1,1,0,0
"""

from __future__ import annotations

import csv
import math
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

from groma.data.coco import Box, stack
from groma.data.detection import rounded
from groma.data.images import ImageError
from groma.data.records import AnnotationError, Records
from groma.structures import Sample

COLUMNS = ("ImageID", "XMin", "YMin", "XMax", "YMax")
MIN_SIDE = 1 / 1024
"""Thinner boxes are dropped: the released pictures are 1,024 pixels long, whose size the CSV does not say."""
SLACK = 0.01
"""How far a corner may lie outside of the picture, and is cut; what is farther out is in another unit."""

_BAD_HEADER = (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, OverflowError, struct.error)
Note = Callable[[str], None]


class OpenImages(Records):
    """The boxes of every picture, whatever their class → Samples with ``boxes`` (M, 4), for the "coco" head.

    Boxes around a group of objects (IsGroupOf) are crowds and dropped, as are those thinner than MIN_SIDE; a picture
    that has only such boxes stays, as background. Rows of one picture that do not stand together are brought together.
    Raises AnnotationError.
    """

    def _read(self) -> Iterator[Any]:
        def note(line: str) -> None:
            self._noted.part(line)
            self._noted.parts_seen += 1

        for name, boxes in read_openimages(self.file, note):
            self._noted.parts_seen += len(boxes)
            yield name, rounded(boxes)

    def _sample(self, entry: Any, draw: random.Random) -> Sample:
        name, boxes = entry
        return Sample(self.path(f"{name}.jpg"), self.name_of(name), boxes=stack(boxes))


def read_openimages(file: Path, note: Note) -> Iterator[tuple[str, list[Box]]]:
    """(ImageID, boxes) of every picture; ``note`` is told of each row that is malformed. Raises AnnotationError.

    The CSV is read twice: first for the pictures whose rows do not stand together, which come last. Memory: the ids of
    all pictures meanwhile, 0.2 GB for the 1.7 M of the training set.
    """
    scattered = _scattered(file)
    late: dict[str, list[Box]] = {}
    for name, rows in groupby(_rows(file, note), key=itemgetter(0)):
        boxes = [box for _, number, row in rows if (box := _box(row, number, file, note)) is not None]
        if name in scattered:
            late.setdefault(name, []).extend(boxes)
        else:
            yield name, boxes
    yield from late.items()


def _scattered(file: Path) -> set[str]:
    """The pictures that have rows in more than one place."""
    seen: set[str] = set()
    again: set[str] = set()
    for (name,), _ in groupby(_table(file, ("ImageID",), lambda line: None), key=itemgetter(1)):
        (again if name in seen else seen).add(name)
    return again


def _rows(file: Path, note: Note) -> Iterator[tuple[str, int, list[str]]]:
    """(ImageID, number of the line, its corners and IsGroupOf) of every row."""
    for number, (name, *row) in _table(file, (*COLUMNS, "IsGroupOf"), note):
        yield name, number, row


def _table(file: Path, columns: Sequence[str], note: Note) -> Iterator[tuple[int, list[str]]]:
    """(number of the line, its values in ``columns``) of every row; "0" for a column that is none of COLUMNS nor there.

    ``note`` is told of rows of another length, and without an id.
    """
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            rows = csv.reader(lines)
            header = [name.strip() for name in next(rows, [])]
            if missing := [name for name in COLUMNS if name not in header]:
                got = ", ".join(header)[:120]
                raise AnnotationError(f"{file}: no column {', '.join(missing)}; the first line has {got!r}")
            length, image = len(header), header.index("ImageID")
            places = [header.index(name) if name in header else length for name in columns]
            for row in rows:
                if len(row) != length or not row[image]:
                    if row:
                        note(f"{file}: line {rows.line_num}: got {row!r:.60}, expected {length} values")
                    continue
                row.append("0")
                yield rows.line_num, [row[i] for i in places]
    except FileNotFoundError as error:
        raise AnnotationError(f"{file}: no such annotation file") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise AnnotationError(f"{file}: cannot be read as CSV ({error})") from error


def _box(row: list[str], number: int, file: Path, note: Note) -> Box | None:
    """The box of a row, cut to the picture; None for one to leave out, or malformed and noted."""
    *corners, group = row
    try:
        x1, y1, x2, y2 = map(float, corners)
    except ValueError:
        x1 = y1 = x2 = y2 = math.nan
    if not (-SLACK <= x1 <= x2 <= 1 + SLACK and -SLACK <= y1 <= y2 <= 1 + SLACK):  # nan is in no range
        got = ", ".join(corners)[:60]
        note(f"{file}: line {number}: corners ({got}), expected XMin ≤ XMax and YMin ≤ YMax in [0, 1]")
        return None
    x1, y1, x2, y2 = max(x1, 0.0), max(y1, 0.0), min(x2, 1.0), min(y2, 1.0)
    return None if group == "1" or min(x2 - x1, y2 - y1) < MIN_SIDE else (x1, y1, x2, y2)


def picture_size(path: Path) -> tuple[int, int]:
    """(width, height) of a picture as ``read_image`` gives it, upright, from its header alone. Raises ImageError."""
    try:
        with Image.open(path) as image:
            sideways = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            return (image.height, image.width) if sideways else image.size
    except FileNotFoundError as error:
        raise ImageError(path, "no such file") from error
    except (*_BAD_HEADER, Image.DecompressionBombError) as error:
        raise ImageError(path, f"a file without a readable header ({error})") from error
