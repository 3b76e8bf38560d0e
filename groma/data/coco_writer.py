"""Write a COCO-style JSON of any length, record by record; the file is there whole or not at all.

with CocoWriter(Path("out.json"), categories=[{"id": 1, "name": "object"}]) as out:
    out.image({"id": 1, "file_name": "a.jpg", "width": 640, "height": 480})
    out.annotation({"image_id": 1, "bbox": [0, 0, 320, 480]})    # its "id" is given, from 1
    out.box({"id": 1, "width": 640, "height": 480}, (0, 0, 0.5, 1))   # the same, of a box in [0, 1]
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from groma.data.coco import Box
from groma.data.records import Record


class CocoWriter:
    """Images and annotations in any order; ``images`` and ``annotations`` count them. Memory: that of one record.

    ``reads``: files that must not be replaced. Raises ValueError where nothing can be written to ``path``, and on
    leaving the block without a single image: an empty file would be found out much later.
    """

    def __init__(
        self, path: Path, categories: Sequence[Record] = (), info: Record | None = None, reads: Sequence[Path] = ()
    ) -> None:
        if path.is_dir():
            raise ValueError(f"{path}: is a folder, expected the name of a file to write")
        if not path.parent.is_dir():
            raise ValueError(f"{path}: there is no folder {path.parent}")
        if path.exists() and any(other.exists() and path.samefile(other) for other in reads):
            raise ValueError(f"{path}: would replace the file it is made from")
        self.path, self.categories, self.info = path, list(categories), info or {}
        self.images = self.annotations = 0

    def image(self, record: Record) -> None:
        """Append an image."""
        self._add(self._file, self.images, record)
        self.images += 1

    def annotation(self, record: Record) -> None:
        """Append an annotation; its ``id`` is its place, from 1."""
        self._add(self._marks, self.annotations, {"id": self.annotations + 1, **record})
        self.annotations += 1

    def box(self, image: Record, box: Box, **fields: Any) -> None:
        """Append ``box`` (xyxy in [0, 1]) of the image record ``image``, to a thousandth of a pixel, with its area.

        ``fields`` join the annotation, or replace what it has: category_id 1, iscrowd 0, the area.
        """
        width, height = image["width"], image["height"]
        x1, y1, x2, y2 = box[0] * width, box[1] * height, box[2] * width, box[3] * height
        mark: Record = {"image_id": image["id"], "category_id": 1, "bbox": [x1, y1, x2 - x1, y2 - y1]}
        mark["bbox"] = [round(v, 3) for v in mark["bbox"]]
        self.annotation({**mark, "area": round((x2 - x1) * (y2 - y1), 2), "iscrowd": 0, **fields})

    def __enter__(self) -> CocoWriter:
        self._part = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        self._file: TextIO = self._part.open("w", encoding="utf-8")
        self._marks: TextIO = tempfile.TemporaryFile("w+", encoding="utf-8", dir=self.path.parent)
        self._file.write(f'{{"info": {_dump(self.info)},\n"images": [')
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._file, self._marks:
                if kind is None:
                    self._finish()
            if kind is None:
                os.replace(self._part, self.path)
        finally:
            self._part.unlink(missing_ok=True)

    def _finish(self) -> None:
        if self.images == 0:
            raise ValueError(f"{self.path}: not written, as no image is left")
        self._file.write('],\n"annotations": [')
        self._marks.seek(0)
        shutil.copyfileobj(self._marks, self._file)
        self._file.write(f'],\n"categories": {_dump(self.categories)}}}\n')
        self._file.flush()
        os.fsync(self._file.fileno())

    @staticmethod
    def _add(file: TextIO, number: int, record: Record) -> None:
        file.write((",\n" if number else "\n") + _dump(record))


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True, separators=(",", ":"))
