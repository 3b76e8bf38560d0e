"""Which reader a format of the run configuration names, and how one is opened.

records = open_records("rec", "rec.json", "images", turns=8)
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from groma.data.detection import Detection
from groma.data.dialogue import Dialogue
from groma.data.grounding import DetectionByWords, GroundedCaptions, Referring, RegionCaptions
from groma.data.records import AnnotationError, Records

READERS: Mapping[str, type[Records]] = {
    "detection": Detection,
    "regions": Detection,
    "rec": Referring,
    "grounded_captions": GroundedCaptions,
    "region_captions": RegionCaptions,
    "detection_words": DetectionByWords,
    "llava": Dialogue,
}
"""Format → reader; the names of groma.settings.FORMATS."""


def open_records(form: str, annotations: str | Path, images: str | Path, section: str = "", **options: Any) -> Records:
    """The records of a set. ``options`` (turns, source, split, seed, max_problems …) that are empty are left out.

    ``section``: the heading of datasets/README.md that a missing set is looked up under. Raises AnnotationError for a
    missing set, an option that the format does not have, and what its reader refuses.
    """
    reader = READERS[form]
    known = inspect.signature(reader).parameters
    given = {name: value for name, value in options.items() if value not in (None, "", 0) or name == "max_problems"}
    for name in given:
        if name not in known:
            there = ", ".join(n for n in known if n not in ("annotations", "images"))
            raise AnnotationError(f"format {form!r} has no option {name!r}; it has {there}")
    for path, what in ((annotations, "annotations"), (images, "images")):
        if not Path(path).exists():
            hint = f"; datasets/README.md, section {section!r}, tells how to get it" if section else ""
            raise AnnotationError(f"{path}: no such file or folder of {what}{hint}")
    return reader(annotations, images, **given)
