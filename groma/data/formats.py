"""Which reader a format of the run configuration names, and how one is opened.

records = open_records("rec", "rec.json", "images", turns=8)
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from groma.data.records import AnnotationError, Records

READERS: Mapping[str, str] = {
    "detection": "detection:Detection",
    "regions": "detection:Detection",
    "openimages": "openimages:OpenImages",
    "sa1b": "sa1b:Sa1b",
    "rec": "grounding:Referring",
    "refer": "refer:Refer",
    "refer_captions": "refer:ReferCaptions",
    "grounded_captions": "grounding:GroundedCaptions",
    "flickr30k": "flickr:Flickr30k",
    "region_captions": "grounding:RegionCaptions",
    "vg": "vg:VisualGenome",
    "grit": "grit:Grit",
    "detection_words": "grounding:DetectionByWords",
    "llava": "dialogue:Dialogue",
    "groma_instruct": "dialogue:GromaInstruct",
    "jsonl": "jsonl:JsonLines",
}
"""Format → "module:class" in groma.data, imported when used; the names of groma.settings.FORMATS."""


def reader_of(form: str) -> type[Records]:
    """The class that reads a format. Raises AnnotationError for one that is not known."""
    if form not in READERS:
        raise AnnotationError(f"no format {form!r}; there are {', '.join(READERS)}")
    module, name = READERS[form].split(":")
    reader: type[Records] = getattr(import_module(f"groma.data.{module}"), name)
    return reader


def options_of(form: str) -> tuple[str, ...]:
    """What ``open_records`` can be told about a format, beside its files."""
    return tuple(
        name for name in inspect.signature(reader_of(form)).parameters if name not in ("annotations", "images")
    )


def open_records(form: str, annotations: str | Path, images: str | Path, section: str = "", **options: Any) -> Records:
    """The records of a set. ``options`` (turns, source, split, seed, max_problems …) that are empty are left out.

    ``section``: the heading of datasets/README.md that a missing set is looked up under. Raises AnnotationError for a
    missing set, an option that the format does not have, and what its reader refuses.
    """
    known = options_of(form)
    given = {name: value for name, value in options.items() if value not in (None, "", 0) or name == "max_problems"}
    for name in given:
        if name not in known:
            raise AnnotationError(f"format {form!r} has no option {name!r}; it has {', '.join(known)}")
    for path, what in ((annotations, "annotations"), (images, "images")):
        if not there(path):
            hint = f"; datasets/README.md, section {section!r}, tells how to get it" if section else ""
            raise AnnotationError(f"{path}: no such file or folder of {what}{hint}")
    return reader_of(form)(annotations, images, **given)


def there(path: str | Path) -> bool:
    """Is it a file, a folder, or a folder in a tar ("train2017.tar/train2017")?"""
    if Path(path).exists():
        return True
    from groma.data.shards import split_path

    return split_path(path) is not None
