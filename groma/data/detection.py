"""Detection targets from COCO-style JSON: every object of an image, whatever its class.

Used with COCO, Objects365, V3Det, and with Visual-Genome-style region files, whose captions become ``Sample.phrases``.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from groma.data.coco import CocoRecords, stack
from groma.data.records import MAX_PROBLEMS, AnnotationError, field
from groma.structures import Sample


class Detection(CocoRecords):
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
        max_problems: float = MAX_PROBLEMS,
    ) -> None:
        if source not in ("coco", "sa1b"):
            raise AnnotationError(f"{annotations}: got source {source!r}, expected 'coco' or 'sa1b'")
        self.source, self.min_side = source, min_side
        super().__init__(annotations, images, seed, max_problems)

    def _options(self) -> str:
        return f"{self.min_side}"

    def _read(self) -> Iterator[Any]:
        for image, marks in self._images():
            name = self._usable(field, image, "file_name", str, self.file)
            if name is None:
                continue
            objects: dict[tuple[float, ...], list[str]] = {}
            for annotation in marks:
                box = self._box(annotation, image, self.min_side)
                if box is not None:
                    objects.setdefault(box, []).append(annotation.get("caption", ""))
            phrases = list(objects.values()) if any(map(any, objects.values())) else []
            yield name, image["id"], list(objects), phrases

    def _sample(self, entry: Any, draw: random.Random) -> Sample:
        name, number, boxes, phrases = entry
        return Sample(
            image=self.path(name),
            record=self.name_of(number),
            boxes=stack(boxes),
            phrases=tuple(draw.choice(captions) for captions in phrases),
            source=self.source,
        )
