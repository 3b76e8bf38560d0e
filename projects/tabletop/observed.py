"""What can be seen of a scene: the facts that expressions, captions and annotation files are made from."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from projects.tabletop.masks import compressed_rle, polygons, tight_box
from projects.tabletop.render import Rendered
from projects.tabletop.world import Scene

MOST_HIDDEN = 0.70  # an object hidden by more than this is not annotated
LEAST_AREA = 80  # nor is one of which fewer pixels are seen


@dataclass(frozen=True)
class Thing:
    """One object as it appears in a picture of (width, height) pixels.

    box: xyxy in pixels around its visible pixels, None where none is visible. area: visible
    pixels; whole_area and whole_box: as if nothing stood before it. distance: along the table
    from the viewer, in units. scale: real size relative to its kind's mesh. segmentation: COCO
    polygons; rle: the same mask as COCO's compressed counts. annotated: False where too little of
    it is seen; it then still exists, so no expression may be ambiguous, and nothing may be called
    absent, because of it.
    """

    kind: str
    colour: str
    size: str
    finish: str
    box: tuple[int, int, int, int] | None
    area: int
    whole_area: int
    whole_box: tuple[float, float, float, float]
    distance: float
    scale: float
    annotated: bool = True
    segmentation: tuple[tuple[int, ...], ...] = ()
    rle: str = ""

    @property
    def pair(self) -> tuple[str, str]:
        """Its colour and kind."""
        return self.colour, self.kind

    @property
    def visibility(self) -> float:
        """Visible share of its area in the picture, 0..1."""
        return self.area / self.whole_area if self.whole_area else 0.0

    @property
    def centre_x(self) -> float:
        """Horizontal middle of what is seen of it, else of the whole."""
        left, _, right, _ = self.box if self.box else self.whole_box
        return (left + right) / 2


def observe(scene: Scene, rendered: Rendered) -> tuple[Thing, ...]:
    """Measure every object of a drawn scene, in the scene's order."""
    things = []
    for i, placed in enumerate(scene.objects):
        mask = rendered.ids == i + 1
        area, whole_area = int(np.count_nonzero(mask)), rendered.whole[i]
        pixels = scene.camera.project(placed.points())
        low, high = pixels.min(axis=0), pixels.max(axis=0)
        thing = Thing(
            kind=placed.kind,
            colour=placed.colour,
            size=placed.size,
            finish=placed.finish,
            box=tight_box(mask) if area else None,
            area=area,
            whole_area=whole_area,
            whole_box=tuple(round(float(v), 2) for v in (*low, *high)),
            distance=round(scene.camera.distance_along_table(placed.x, placed.y), 4),
            scale=round(float(np.prod(placed.scale) ** (1 / 3)), 4),
        )
        seen = area >= LEAST_AREA and thing.visibility >= 1 - MOST_HIDDEN
        if seen:
            outline = tuple(tuple(part) for part in polygons(mask))
            thing = replace(thing, segmentation=outline, rle=compressed_rle(mask))
        things.append(replace(thing, annotated=seen))
    return tuple(things)
