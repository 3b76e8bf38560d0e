"""Detection targets from COCO-style JSON: every object of an image, whatever its class.

Used with COCO, Objects365, V3Det, and with Visual-Genome-style region files, whose captions become ``Sample.phrases``.
OpenImages has a reader in groma.data.openimages, SA-1B one in groma.data.sa1b.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from groma.data.coco import CocoRecords, image_name, stack
from groma.data.records import MAX_PROBLEMS, AnnotationError, Record, field
from groma.data.shards import exists
from groma.structures import Sample

DIGITS = 6
"""Decimals kept of a box in [0, 1], a five-hundredth of a pixel in 2,000: an index of 25 M boxes is a third smaller."""
_LOOKED_FOR = 100


class Detection(CocoRecords):
    """COCO JSON, class-agnostic → Samples with ``boxes`` (M, 4) and, where annotations have captions, ``phrases``.

    Crowds, areas ≤ 0 and boxes with a side under ``min_side`` pixels (after cutting to the image) are dropped; images
    without boxes stay, as background. Annotations with the same box are one object, its phrase drawn per epoch.
    ``source`` names the objectness head to train.

    A ``file_name`` may begin with folders that ``images`` does not have: Objects365 writes "images/v1/patch8/x.jpg" for
    "patch8/x.jpg", V3Det "images/a/x.jpg" for what is often "a/x.jpg". ``leading`` is how many such folders are left
    out of every name; None finds it out from the first of the pictures that is there. Raises AnnotationError.
    """

    version = 2

    def __init__(
        self,
        annotations: str | Path,
        images: str | Path,
        source: Literal["coco", "sa1b"] = "coco",
        min_side: float = 1.0,
        leading: int | None = None,
        seed: int = 0,
        max_problems: float = MAX_PROBLEMS,
    ) -> None:
        if source not in ("coco", "sa1b"):
            raise AnnotationError(f"{annotations}: got source {source!r}, expected 'coco' or 'sa1b'")
        self.source, self.min_side, self.leading = source, min_side, leading
        super().__init__(annotations, images, seed, max_problems)

    def path(self, name: str) -> str:
        """Where the image called ``name`` is, without the ``leading`` folders of the name."""
        if self.leading is None:
            self.leading = self._leading()
        return super().path(_without(name, self.leading))

    def _leading(self) -> int:
        for number in range(min(len(self), _LOOKED_FOR)):
            name = self.entries[number][0]
            for leading in range(name.count("/") + 1):
                if exists(self.images / _without(name, leading)):
                    return leading
        return 0

    def _options(self) -> str:
        return f"{self.min_side}"

    def _read(self) -> Iterator[Any]:
        for image, marks in self._images():
            name = self._usable(image_name, image, self.file)
            if name is None:
                continue
            objects: dict[tuple[float, ...], list[str]] = {}
            for annotation in marks:
                box = self._box(annotation, image, self.min_side)
                caption = self._usable_part(self._caption, annotation) if box is not None else None
                if box is not None and caption is not None:
                    objects.setdefault(box, []).append(caption)
            phrases = list(objects.values()) if any(map(any, objects.values())) else []
            yield name, image["id"], rounded(objects), phrases

    def _caption(self, annotation: Record) -> str:
        return field(annotation, "caption", str, self.file) if "caption" in annotation else ""

    def _sample(self, entry: Any, draw: random.Random) -> Sample:
        name, number, boxes, phrases = entry
        return Sample(
            image=self.path(name),
            record=self.name_of(number),
            boxes=stack(boxes),
            phrases=tuple(draw.choice(captions) for captions in phrases),
            source=self.source,
        )


def rounded(boxes: Any) -> list[list[float]]:
    """Boxes in [0, 1] to DIGITS decimals, as an entry holds them."""
    return [[round(v, DIGITS) for v in box] for box in boxes]


def _without(name: str, leading: int) -> str:
    return name.split("/", leading)[-1]
