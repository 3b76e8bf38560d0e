"""Visual Genome's region descriptions as its authors publish them (Krishna et al., arXiv 1602.07332)::

    region_descriptions.json    [{id, regions: [{region_id, image_id, x, y, width, height, phrase} …]} …]
    image_data.json             [{image_id, width, height, url} …]
    images/VG_100K/2.jpg  images/VG_100K_2/1.jpg

Version 1.0 says ``id`` and ``image`` for a region's ``region_id`` and ``image_id``, and ``id`` for that of an image.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from groma.data.coco import unit_box
from groma.data.grounding import describe_sample
from groma.data.json_stream import json_items
from groma.data.records import MAX_PROBLEMS, AnnotationError, Record, Records, field
from groma.data.shards import exists
from groma.structures import Sample


class VisualGenome(Records):
    """Region descriptions of an image: up to ``turns`` boxes in an order drawn per epoch, an IoU of 0.6 apart at most.

    ``turns`` 1 is the single-round form of stage 2, 10 the multi-round one of stage 3. ``annotations`` is the file of
    descriptions. An image lies in the folder that its ``url`` names (VG_100K or VG_100K_2); where ``images`` has
    neither, all lie in it directly. Stray spaces are taken out of phrases; empty phrases and boxes under a pixel are
    left out. Raises AnnotationError.
    """

    def __init__(self, annotations: str | Path, images: str | Path, turns: int = 10, seed: int = 0,
                 max_problems: float = MAX_PROBLEMS) -> None:  # fmt: skip
        self.turns, self.sizes = turns, Path(annotations).with_name("image_data.json")
        self.flat = not any(exists(Path(images) / folder, folder=True) for folder in ("VG_100K", "VG_100K_2"))
        super().__init__(annotations, images, seed, max_problems)

    def path(self, name: str) -> str:
        return super().path(PurePosixPath(name).name if self.flat else name)

    def _files(self) -> list[Path]:
        return [self.file, self.sizes]

    def _read(self) -> Iterator[Any]:
        known = (self._usable(self._size, image) for image in json_items(self.sizes))
        sizes = {image["id"]: image for image in known if image is not None}
        seen: set[int] = set()
        for record in json_items(self.file):
            entry = self._usable(self._regions, record, sizes, seen)
            if entry is not None:
                yield entry

    def _size(self, image: Record) -> Record:
        number = field(image, "image_id" if "image_id" in image else "id", int, self.sizes)
        url = PurePosixPath(field(image, "url", str, self.sizes))
        if url.parent.name not in ("VG_100K", "VG_100K_2") or url.name in ("", ".."):
            raise AnnotationError(f"{self.sizes}: image {number}: url {str(url)!r:.90}, expected …/VG_100K/NAME.jpg")
        size = {side: field(image, side, (int, float), self.sizes) for side in ("width", "height")}
        return {"id": number, "name": f"{url.parent.name}/{url.name}", **size}

    def _regions(self, record: Record, sizes: dict[int, Record], seen: set[int]) -> Any:
        """[image name, id, [(phrase, box)]], or None where nothing is left."""
        number = field(record, "id" if "id" in record else "image_id", int, self.file)
        if number not in sizes or number in seen:
            what = f"is not in {self.sizes.name}" if number not in sizes else "is there twice"
            raise AnnotationError(f"{self.file}: image {number} {what}")
        seen.add(number)
        regions = []
        for region in field(record, "regions", list, self.file):
            self._noted.parts_seen += 1
            told = self._usable_part(self._region, region, sizes[number])
            if told is not None:
                regions.append(told)
        return (sizes[number]["name"], number, regions) if regions else None

    def _region(self, region: Record, image: Record) -> Any:
        phrase = " ".join(field(region, "phrase", str, self.file).split())
        bbox = [field(region, key, (int, float), self.file) for key in ("x", "y", "width", "height")]
        number = region.get("region_id", region.get("id"))
        owner = region.get("image_id", region.get("image", image["id"]))
        if owner != image["id"]:
            raise AnnotationError(f"{self.file}: region {number} of image {owner!r:.60} among those of {image['id']}")
        box = unit_box({"id": number, "bbox": bbox}, image, self.file)
        return (phrase, box) if phrase and box is not None else None

    def _sample(self, entry: Any, draw: random.Random) -> Sample:
        name, number, regions = entry
        return describe_sample(self.path(name), self.name_of(number), regions, self.turns, draw)
