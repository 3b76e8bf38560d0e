"""Detection targets from COCO-style JSON: every object of an image, whatever its class; and the reading helpers.

Used with COCO, Objects365, OpenImages, V3Det and SA-1B in COCO's layout, and with Visual-Genome-style region files,
whose captions become ``Sample.phrases``.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from groma.structures import Sample

Record = dict[str, Any]


class AnnotationError(ValueError):
    """A record of an annotation file that cannot be used; the message names the file and the record."""


class Records:
    """A map-style data set of Samples, whose random draws depend on (seed, epoch, index) and on nothing else."""

    def __init__(self, annotations: str | Path, images: str | Path, seed: int = 0) -> None:
        self.file, self.images, self.seed, self.epoch = Path(annotations), Path(images), seed, 0

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Sample:
        raise NotImplementedError

    def set_epoch(self, epoch: int) -> None:
        """Make the draws those of ``epoch``."""
        self.epoch = epoch

    def _random(self, index: int) -> random.Random:
        return random.Random(f"{self.seed}/{self.epoch}/{index}")


class Detection(Records):
    """COCO JSON, class-agnostic → Samples with ``boxes`` (M, 4) and, where annotations have captions, ``phrases``.

    Crowds, areas ≤ 0 and boxes with a side under ``min_side`` pixels (after cutting to the image) are dropped; images
    without boxes stay, as background. Annotations with the same box are one object, its phrase drawn per epoch.
    ``source`` names the objectness head to train. Raises AnnotationError.
    """

    def __init__(
        self,
        annotations: str | Path,
        images: str | Path,
        source: Literal["coco", "sa1b"] = "coco",
        min_side: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(annotations, images, seed)
        if source not in ("coco", "sa1b"):
            raise AnnotationError(f"{self.file}: got source {source!r}, expected 'coco' or 'sa1b'")
        self.source = source
        content = read_coco(self.file)
        self._names = [field(image, "file_name", str, self.file) for image in content["images"]]
        self._ids = [image["id"] for image in content["images"]]
        by_image = annotations_by_image(content, self.file)
        self._boxes: list[np.ndarray] = []
        self._phrases: list[tuple[tuple[str, ...], ...]] = []
        for image in content["images"]:
            objects: dict[tuple[float, ...], list[str]] = {}
            for annotation in by_image[image["id"]]:
                box = unit_box(annotation, image, self.file, min_side)
                if box is not None:
                    objects.setdefault(box, []).append(annotation.get("caption", ""))
            self._boxes.append(np.array(list(objects), dtype=np.float32).reshape(-1, 4))
            self._phrases.append(tuple(tuple(p) for p in objects.values()) if any(map(any, objects.values())) else ())

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Sample:
        draw = self._random(index)
        return Sample(
            image=str(self.images / self._names[index]),
            record=f"{self.file.name}#{self._ids[index]}",
            boxes=torch.from_numpy(self._boxes[index].copy()),
            phrases=tuple(draw.choice(captions) for captions in self._phrases[index]),
            source=self.source,
        )


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
    """A COCO-style object with lists ``images`` and ``annotations``, image ids unique. Raises AnnotationError."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise AnnotationError(f"{path}: got a JSON {type(content).__name__}, expected an object in COCO's layout")
    for key in ("images", "annotations"):
        if not isinstance(content.get(key), list):
            raise AnnotationError(f"{path}: no list {key!r}; it has {sorted(content)}")
    seen: set[Any] = set()
    for image in content["images"]:
        number = field(image, "id", (int, str), path)
        if number in seen:
            raise AnnotationError(f"{path}: two images with id {number}")
        seen.add(number)
    return content


def annotations_by_image(content: dict[str, list[Record]], file: Path) -> dict[Any, list[Record]]:
    """Image id → its annotations in file order. Raises AnnotationError for an annotation of an unknown image."""
    by_image: dict[Any, list[Record]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        number = field(annotation, "image_id", (int, str), file)
        if number not in by_image:
            raise AnnotationError(f"{file}: {_name(annotation)} is of image {number}, which is not among the images")
        by_image[number].append(annotation)
    return by_image


def field(record: Record, key: str, kind: type | tuple[type, ...], file: Path) -> Any:
    """``record[key]`` of the given type. Raises AnnotationError naming file and record."""
    if not isinstance(record, dict):
        raise AnnotationError(f"{file}: got {record!r:.60}, expected an object with {key!r}")
    value = record.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        got = f"{key} = {value!r:.60}" if key in record else f"no {key!r}; it has {sorted(record)}"
        names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise AnnotationError(f"{file}: {_name(record)}: {got}, expected {names}")
    return value


def unit_box(annotation: Record, image: Record, file: Path, min_side: float = 1.0) -> tuple[float, ...] | None:
    """The annotation's ``bbox`` (xywh pixels) as xyxy in [0, 1], cut to the image; None for one to leave out.

    Left out: crowds, area ≤ 0, a side under ``min_side`` pixels. Raises AnnotationError for a malformed box.
    """
    width, height = (field(image, key, (int, float), file) for key in ("width", "height"))
    if width <= 0 or height <= 0:
        raise AnnotationError(f"{file}: {_name(image)}: size {width} x {height}, expected positive numbers")
    bbox = field(annotation, "bbox", list, file)
    if len(bbox) != 4 or not all(isinstance(v, (int, float)) and np.isfinite(v) for v in bbox):
        raise AnnotationError(f"{file}: {_name(annotation)}: bbox {bbox!r:.60}, expected four numbers [x, y, w, h]")
    x, y, w, h = bbox
    x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    if annotation.get("iscrowd") or annotation.get("area", 1) <= 0 or min(x2 - x1, y2 - y1) < min_side:
        return None
    return x1 / width, y1 / height, x2 / width, y2 / height


def stack(boxes: list[tuple[float, ...]]) -> Tensor:
    """Boxes as a tensor (K, 4), also for none."""
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)


def _name(record: Record) -> str:
    return f"record {record['id']}" if "id" in record else f"record {record!r:.60}"
