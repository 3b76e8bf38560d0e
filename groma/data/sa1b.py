"""SA-1B: a JSON of masks beside every picture, in folders or in the tars they are released in.

    sa1b/sa_000000.tar       or sa1b/sa_000000/sa_1.jpg, sa_1.json …, or all of them in one folder
      sa_1.jpg  sa_1.json    {"image": {"image_id": 1, "width": 2250, "height": 1500, "file_name": "sa_1.jpg"},
                              "annotations": [{"bbox": [x, y, w, h], "area": 9, "segmentation": …}, …]}

Only the boxes are read, and only when their picture is due: opening eleven million pictures lists folders and
tars. A picture in a tar is called by its place there, "sa_000000.tar/sa_1.jpg".
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from groma.data.coco import Box, stack, unit_box
from groma.data.records import MAX_PROBLEMS, AnnotationError, Records, field
from groma.data.shards import Shard, ShardError, read_member
from groma.structures import Sample

MIN_AREA, MAX_AREA = 0.0, float("inf")
"""Square pixels of the picture as stored: all boxes. The published recipe drops boxes by their area in the crop that
the model sees, which groma.data.augment does."""
TAR = 11_000
"""Pictures of a tar as released, about."""


class Picture(NamedTuple):
    """One picture: ``name`` below the folder; its ``boxes`` are xyxy in [0, 1]."""

    name: str
    id: int | str
    width: float
    height: float
    boxes: list[Box]


class Sa1b(Records):
    """The boxes of every picture of a folder → Samples with ``boxes`` (M, 4), for the "sa1b" head.

    Kept are boxes whose own area (width x height, not that of the mask) is from ``min_area`` to ``max_area`` pixels,
    both included, after cutting to the picture; a picture without one stays, as background. Pictures in tars are read
    block by block (``locality``). A damaged tar, of which what can be read is used, is a problem. Raises
    AnnotationError: on opening for a folder without anything, on access for a malformed JSON.
    """

    def __init__(
        self,
        annotations: str | Path,
        images: str | Path,
        min_area: float = MIN_AREA,
        max_area: float = MAX_AREA,
        seed: int = 0,
        max_problems: float = MAX_PROBLEMS,
    ) -> None:
        self.min_area, self.max_area = min_area, max_area
        super().__init__(annotations, images, seed, max_problems)
        self.locality = TAR if len(self) and ".tar/" in self.entries[0] else 0

    def _files(self) -> list[Path]:
        """The folders, which change when a file comes or goes, and the tars: not eleven million files."""
        if not self.file.is_dir():
            raise AnnotationError(f"{self.file}: no such folder, expected one with SA-1B's sa_*.json or *.tar")
        return sorted(Path(folder) / name for folder, _, files in os.walk(self.file)
                      for name in ("", *(f for f in files if f.endswith(".tar"))))  # fmt: skip

    def _read(self) -> Iterator[Any]:
        yield from list_sa1b(self.file, self._noted.append)

    def _sample(self, entry: Any, draw: random.Random) -> Sample:
        picture = read_picture(self.file, entry, self.min_area, self.max_area)
        return Sample(self.path(picture.name), self.name_of(picture.id), boxes=stack(picture.boxes), source="sa1b")


def list_sa1b(folder: Path, note: Callable[[str], None]) -> Iterator[str]:
    """The JSON of every picture in ``folder``, those below it, and their tars, as its path from the folder, in order.

    ``note`` is told of tars that cannot be read to their end. Raises AnnotationError where there is nothing.
    """
    found = False
    for path, folders, files in os.walk(folder):
        folders.sort()
        below = PurePosixPath(Path(path).relative_to(folder).as_posix())
        for name in sorted(files):
            if _is_picture(name) or name.endswith(".tar"):
                found = True
                places = [name] if _is_picture(name) else _in_tar(Path(path, name), note)
                yield from (str(below / place) for place in places)
    if not found:
        raise AnnotationError(f"{folder}: no sa_*.json and no *.tar, expected a folder of SA-1B")


def read_picture(folder: Path, place: str, min_area: float, max_area: float) -> Picture:
    """The picture whose JSON is at ``place``. Raises AnnotationError for one that is gone or malformed."""
    file = folder / place
    try:
        try:
            content = file.read_bytes()
        except NotADirectoryError:  # the path goes through a tar
            content = read_member(file)
        record = json.loads(content)
    except OSError as error:
        raise AnnotationError(f"{file}: cannot be read ({error})") from error
    except AnnotationError:
        raise
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        raise AnnotationError(f"{file}: not JSON ({error})") from error
    image = field(record, "image", dict, file)
    name, number = field(image, "file_name", str, file), field(image, "image_id", (int, str), file)
    width, height = (field(image, key, (int, float), file) for key in ("width", "height"))
    boxes = [unit_box(mark, image, file) for mark in field(record, "annotations", list, file)]
    kept = [box for box in boxes if box and min_area <= round(_area(box) * width * height, 3) <= max_area]
    return Picture((PurePosixPath(place).parent / name).as_posix(), number, width, height, kept)


def _in_tar(file: Path, note: Callable[[str], None]) -> Iterator[str]:
    """The JSONs of a tar, in its order, without their content."""
    shard = Shard(file)
    try:
        yield from (f"{file.name}/{member.name}" for member in shard.members() if _is_picture(member.name))
        if shard.damage:
            note(f"{file}: damaged, only its first part is used: {shard.damage}")
    except ShardError as error:
        note(str(error))


def _is_picture(name: str) -> bool:
    """sa_1.json, and not a file that somebody made of the set and left beside it."""
    file = name.rpartition("/")[2]
    return file.startswith("sa_") and file.endswith(".json")


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
