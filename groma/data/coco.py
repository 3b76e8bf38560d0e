"""COCO-style JSON: an object with lists ``images`` and ``annotations``, read image by image; and plain JSON lists."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from groma.data.records import AnnotationError, Record, Records, field, name_record

Box = tuple[float, ...]


class CocoRecords(Records):
    """Records of a COCO-style file; ``_images`` gives what a reader turns into entries."""

    def _images(self) -> Iterator[tuple[Record, list[Record]]]:
        """Every image with its annotations, in file order.

        Problems: an image with the id of another or without one, an annotation of an image that is not there.
        """
        content = read_coco(self.file)
        by_image: dict[Any, list[Record]] = {}
        images = []
        for image in content["images"]:
            number = self._usable(field, image, "id", (int, str), self.file)
            if number in by_image:
                self._noted.append(f"{self.file}: two images with id {number}")
            elif number is not None:
                by_image[number] = []
                images.append(image)
        for annotation in content["annotations"]:
            number = self._usable(field, annotation, "image_id", (int, str), self.file)
            if number in by_image:
                by_image[number].append(annotation)
            elif number is not None:
                where = f"{self.file}: {name_record(annotation)}"
                self._noted.append(f"{where} is of image {number}, which is not among the images")
        for image in images:
            yield image, by_image[image["id"]]

    def _categories(self) -> dict[Any, str]:
        """Category id → name."""
        content = read_coco(self.file)
        return {c["id"]: field(c, "name", str, self.file) for c in content.get("categories", [])}

    def _box(self, annotation: Record, image: Record, min_side: float = 1.0) -> Box | None:
        """``unit_box``, or None also for a malformed one, which becomes a problem."""
        return self._usable(unit_box, annotation, image, self.file, min_side)


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises AnnotationError, in one line, for a missing or malformed one."""
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise AnnotationError(f"{path}: no such annotation file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise AnnotationError(f"{path}: cannot be read ({error})") from error
    except json.JSONDecodeError as error:
        raise AnnotationError(f"{path}: not JSON ({error})") from error


def read_coco(path: Path) -> dict[str, list[Record]]:
    """A COCO-style object with lists ``images`` and ``annotations``. Raises AnnotationError."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise AnnotationError(f"{path}: got a JSON {type(content).__name__}, expected an object in COCO's layout")
    for key in ("images", "annotations"):
        if not isinstance(content.get(key), list):
            raise AnnotationError(f"{path}: no list {key!r}; it has {sorted(content)}")
    return content


def unit_box(annotation: Record, image: Record, file: Path, min_side: float = 1.0) -> Box | None:
    """The annotation's ``bbox`` (xywh pixels) as xyxy in [0, 1], cut to the image; None for one to leave out.

    Left out: crowds, area ≤ 0, a side under ``min_side`` pixels. Raises AnnotationError for a malformed box.
    """
    width, height = (field(image, key, (int, float), file) for key in ("width", "height"))
    if not (0 < width < float("inf") and 0 < height < float("inf")):
        raise AnnotationError(f"{file}: {name_record(image)}: size {width} x {height}, expected positive numbers")
    bbox = field(annotation, "bbox", list, file)
    if len(bbox) != 4 or not all(isinstance(v, (int, float)) and np.isfinite(v) for v in bbox):
        raise AnnotationError(
            f"{file}: {name_record(annotation)}: bbox {bbox!r:.60}, expected four numbers [x, y, w, h]"
        )
    x, y, w, h = bbox
    x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    if annotation.get("iscrowd") or annotation.get("area", 1) <= 0 or min(x2 - x1, y2 - y1) < min_side:
        return None
    return x1 / width, y1 / height, x2 / width, y2 / height


def stack(boxes: list[Any]) -> Tensor:
    """Boxes as a tensor (K, 4), also for none."""
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)


def left_to_right(found: list[Any]) -> list[Any]:
    """Boxes by their centre's x, ties by y: an order the model can see, where a file's order is arbitrary."""
    return sorted(found, key=lambda box: (box[0] + box[2], box[1] + box[3]))
