"""COCO-style JSON: an object with lists ``images`` and ``annotations``, read image by image, however large."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from groma.data.json_stream import json_items, json_lists, read_json
from groma.data.records import AnnotationError, Record, Records, field, name_record
from groma.data.store import Spill

Box = tuple[float, ...]


class CocoRecords(Records):
    """Records of a COCO-style file; ``_images`` gives what a reader turns into entries."""

    def _images(self) -> Iterator[tuple[Record, list[Record]]]:
        """Every image with its annotations, in file order; the two lists may come in any order.

        The file is read once, a record at a time, and its records put aside, on disk where they are many. Memory: some
        30 bytes a record. Problems: an image with the id of another or without one, an annotation of an image that is
        not there.
        """
        images, marks = Spill(), Spill()
        for key, record in json_lists(self.file, ("images", "annotations")):
            name = "id" if key == "images" else "image_id"
            usable = self._usable if key == "images" else self._usable_part
            self._noted.parts_seen += key == "annotations"
            number = usable(field, record, name, (int, str), self.file)
            if number is not None:
                (images if key == "images" else marks).add(number, record)
        for image in images.repeats():
            self._noted.append(f"{self.file}: two images with id {image['id']}")
        for mark in marks.others(images):
            where = f"{self.file}: {name_record(mark)}"
            self._noted.part(f"{where} is of image {mark['image_id']}, which is not among the images")
        for image, *_ in images:
            yield image, marks[image["id"]]

    def _categories(self) -> dict[Any, str]:
        """Category id → name."""
        kinds = json_items(self.file, "categories", optional=True)
        return {field(c, "id", (int, str), self.file): field(c, "name", str, self.file) for c in kinds}

    def _box(self, annotation: Record, image: Record, min_side: float = 1.0) -> Box | None:
        """``unit_box``, or None also for a malformed one, which becomes a problem."""
        return self._usable_part(unit_box, annotation, image, self.file, min_side)


def read_coco(path: Path) -> dict[str, list[Record]]:
    """A COCO-style object with lists ``images`` and ``annotations``. Raises AnnotationError."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise AnnotationError(f"{path}: got a JSON {type(content).__name__}, expected an object in COCO's layout")
    for key in ("images", "annotations"):
        if not isinstance(content.get(key), list):
            raise AnnotationError(f"{path}: no list {key!r}; it has {sorted(content)}")
    return content


def image_name(image: Any, file: Path) -> str:
    """An image's ``file_name``; without one (LVIS v1), what its ``coco_url`` ends with: "val2017/000000397133.jpg".

    Raises AnnotationError.
    """
    if isinstance(image, dict) and "file_name" not in image and "coco_url" in image:
        return "/".join(field(image, "coco_url", str, file).split("/")[-2:])
    return str(field(image, "file_name", str, file))


def unit_box(annotation: Record, image: Record, file: Path, min_side: float = 1.0) -> Box | None:
    """The annotation's ``bbox`` (xywh pixels) as xyxy in [0, 1], cut to the image; None for one to leave out.

    Left out: crowds, area ≤ 0, a side under ``min_side`` pixels. Raises AnnotationError for a malformed box, as is one
    with a negative side.
    """
    width, height = (field(image, key, (int, float), file) for key in ("width", "height"))
    if not (0 < width < float("inf") and 0 < height < float("inf")):
        raise AnnotationError(f"{file}: {name_record(image)}: size {width} x {height}, expected positive numbers")
    bbox = field(annotation, "bbox", list, file)
    if len(bbox) != 4 or not all(isinstance(v, (int, float)) and abs(v) < float("inf") for v in bbox):
        raise AnnotationError(
            f"{file}: {name_record(annotation)}: bbox {bbox!r:.60}, expected four numbers [x, y, w, h]"
        )
    x, y, w, h = bbox
    if w < 0 or h < 0:
        raise AnnotationError(f"{file}: {name_record(annotation)}: bbox {bbox!r:.60}, expected sides w, h of 0 or more")
    area = field(annotation, "area", (int, float), file) if "area" in annotation else 1
    x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    if annotation.get("iscrowd") or area <= 0 or min(x2 - x1, y2 - y1) < min_side:
        return None
    return x1 / width, y1 / height, x2 / width, y2 / height


def stack(boxes: list[Any]) -> Tensor:
    """Boxes as a tensor (K, 4), also for none."""
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)


def left_to_right(found: list[Any]) -> list[Any]:
    """Boxes by their centre's x, ties by y: an order the model can see, where a file's order is arbitrary."""
    return sorted(found, key=lambda box: (box[0] + box[2], box[1] + box[3]))
