"""The records of an annotation file, as they stand in it or, where its layout is a reader's business, as it reads them.

Each function goes through one family of files, record by record, and tells ``Notes`` what it meets: ids, images, boxes
and texts. What is malformed beyond that, a reader tells in its problems.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from groma import markup
from groma.data.check_images import header_size
from groma.data.check_notes import Notes, Size
from groma.data.images import ImageError
from groma.data.json_stream import json_items, json_lines
from groma.data.records import AnnotationError, Record, Records
from groma.structures import Turn

ANSWER_WORDS = (markup.PHRASE_OPEN, markup.PHRASE_CLOSE, markup.ROI_OPEN, markup.ROI_CLOSE, markup.GROUND_BOX)
"""The markup that Groma Instruct's answers carry on purpose."""


def coco(notes: Notes) -> None:
    """COCO-style JSON: ``images`` and ``annotations``, either of which may have a ``caption``; ``categories``."""
    sizes: dict[Any, Size | None] = {}
    for image, name in _objects(notes, "images"):
        notes.identify(image, name, "image")
        size = size_of(image)
        url = str(image.get("coco_url", ""))  # all that LVIS v1 has
        notes.image(image.get("file_name", "/".join(url.split("/")[-2:]) or None), name, size)
        notes.text(image.get("caption"), name)
        if isinstance(image.get("id"), (int, str)):
            sizes[image["id"]] = size
    for annotation, name in _objects(notes, "annotations"):
        notes.identify(annotation, name, "annotation")
        notes.text(annotation.get("caption"), name)
        owner = annotation.get("image_id")
        if "bbox" in annotation:
            notes.box(annotation["bbox"], name, sizes.get(owner) if isinstance(owner, (int, str)) else None)
    for category, name in _objects(notes, "categories"):
        notes.text(category.get("name"), name, "name")


def conversations(notes: Notes) -> None:
    """A list of {id, image, conversations}; "<image>" has its place in the questions."""
    for record, name in _objects(notes, None):
        notes.identify(record, name)
        notes.image(record.get("image"), name)
        for turn in _list(record, "conversations"):
            notes.text(turn.get("value"), name, f"turn of {turn.get('from')!r:.20}", (markup.IMAGE,))


def instructions(notes: Notes) -> None:
    """A list of {file_name, width, height, boxes (xywh pixels), conversation}, whose answers carry markup."""
    for record, name in _objects(notes, None):
        notes.identify(record, name)
        size = size_of(record)
        notes.image(record.get("file_name"), name, size)
        for box in record["boxes"] if isinstance(record.get("boxes"), list) else ():
            notes.box(box, name, size)
        for turn in _list(record, "conversation"):
            notes.text(turn.get("value"), name, "turn", ANSWER_WORDS if "box_inds" in turn else ())


def own_lines(notes: Notes) -> None:
    """One JSON object a line (groma.data.jsonl), boxes xyxy; a size that is not stated is the image's own."""

    def malformed(problem: str) -> None:  # its reader says so; it is a record all the same
        notes.records += 1

    for number, record in json_lines(notes.file, malformed):
        notes.records += 1
        if isinstance(record, dict):
            _own_line(notes, record, f"{notes.file.name}#{number}")


def _own_line(notes: Notes, record: Record, name: str) -> None:
    size, image = size_of(record), record.get("image")
    notes.image(image, name, size)
    if size is None and isinstance(image, str):
        try:
            size = header_size(notes.folder / image)
        except ImageError:
            size = None  # the images' check says so
    for item in _list(record, "expressions"):
        notes.text(item.get("text"), name, "text")
        for box in item["boxes"] if isinstance(item.get("boxes"), list) else ():
            notes.box(box, name, size)
    for item in _list(record, "regions"):
        notes.text(item.get("caption"), name)
        notes.box(item.get("box"), name, size)
    for turn in _list(record, "conversation"):
        for role in ("user", "assistant"):
            notes.text(turn.get(role), name, f"{role} turn")
    named = record.get("boxes")
    for box in named.values() if isinstance(named, dict) else ():
        notes.box(box, name, size)


def as_read(notes: Notes, records: Records) -> None:
    """The Samples of a reader. Escaped texts are looked at as they were; boxes have been cut to the image already."""
    for index in range(len(records)):
        notes.records += 1
        try:
            sample = records[index]
        except AnnotationError as error:  # of a format whose records are read when they are due
            notes.add("record-unusable", f"{notes.file.name}[{index}]", str(error))
            continue
        notes.image(sample.image.removeprefix(f"{records.images}/"), sample.record)
        for phrase in filter(None, sample.phrases):
            notes.text(phrase, sample.record)
        for turn in sample.turns:
            for said in _outside(turn):
                notes.text(said, sample.record, f"{turn.role} turn")


def json_layout(file: Path) -> str:
    """The format of FORMATS that a JSON file looks like. Raises AnnotationError where it looks like none."""
    try:
        first = _first(file, None)
    except AnnotationError as not_a_list:
        if "expected a list" not in str(not_a_list):
            raise
        image, annotation = (_first(file, key) for key in ("images", "annotations"))
        if "tokens_positive" in annotation:
            return "grounded_captions"
        if "caption" in image:
            return "rec"
        return "regions" if "caption" in annotation else "detection"
    for key, form in (("conversations", "llava"), ("conversation", "groma_instruct"), ("ref_exps", "grit")):
        if key in first:
            return form
    raise AnnotationError(f"{file}: its format is not clear from a first record with {sorted(first)}; say --format")


def size_of(record: Record) -> Size | None:
    """(width, height) that a record states, None where it states none that makes sense."""
    width, height = record.get("width"), record.get("height")
    if not isinstance(width, (int, float)) or not isinstance(height, (int, float)):
        return None
    return (width, height) if 0 < width < 1e9 and 0 < height < 1e9 else None


def _objects(notes: Notes, key: str | None) -> Iterator[tuple[Record, str]]:
    """The objects of a list of the file, each with its name; those of the first list are counted as records."""
    part = {"annotations": "annotation", "categories": "category"}.get(key or "", "")
    for index, record in enumerate(json_items(notes.file, key, optional=key == "categories")):
        notes.records += not part
        if isinstance(record, dict):
            yield record, notes.name(record, index, part)


def _first(file: Path, key: str | None) -> Record:
    record: Any = next(json_items(file, key), None)
    return record if isinstance(record, dict) else {}


def _list(record: Record, key: str) -> list[Record]:
    """The objects of a list in a record."""
    items = record.get(key)
    return [item for item in items if isinstance(item, dict)] if isinstance(items, list) else []


def _outside(turn: Turn) -> Iterator[str]:
    """The stretches of a turn that came from outside and hold a special word, which escaping had broken open."""
    for piece, special in markup.split(turn.text):
        if not special and any(word for _, word in markup.split(piece)):
            yield piece


RAW: dict[str, Callable[[Notes], None]] = {
    **dict.fromkeys(("detection", "regions", "rec", "grounded_captions", "region_captions", "detection_words"), coco),
    "llava": conversations,
    "groma_instruct": instructions,
    "jsonl": own_lines,
}
"""The formats whose files are looked at as they stand."""
