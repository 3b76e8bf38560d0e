"""Grounding dialogues from COCO-style JSON: referring, grounded captions, region captions, detection by words."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from groma import boxes as box_ops
from groma import markup
from groma.data import prompts
from groma.data.coco import CocoRecords, image_name, left_to_right, stack
from groma.data.records import MAX_PROBLEMS, AnnotationError, Record, field
from groma.data.store import Spill
from groma.structures import Sample, Turn


class Referring(CocoRecords):
    """Referring expressions: each ``images`` entry is one expression (``caption``) with 0, 1 or more annotations.

    Entries of one picture (``file_name``) make one Sample of up to ``turns`` expressions, drawn per epoch; an entry
    without annotations is an absent referent. Several referents are answered from left to right.
    """

    def __init__(self, annotations: str | Path, images: str | Path, turns: int = 8, seed: int = 0,
                 max_problems: float = MAX_PROBLEMS) -> None:  # fmt: skip
        self.turns = turns
        super().__init__(annotations, images, seed, max_problems)

    def _read(self) -> Iterator[Any]:
        pictures = Spill()
        for image, marks in self._images():
            entry = self._usable(self._expression, image, marks)
            if entry is not None:
                pictures.add(image["file_name"], (image["file_name"], entry))
        for group in pictures:
            yield group[0][0], [entry for _, entry in group]

    def _expression(self, image: Record, marks: list[Record]) -> Any:
        """[id, expression, boxes], or None where there are boxes and every one is unusable: neither a target nor an
        absent referent."""
        for key in ("file_name", "caption"):
            field(image, key, str, self.file)
        kept = left_to_right([box for a in marks if (box := self._box(a, image)) is not None])
        return None if marks and not kept else (image["id"], image["caption"], kept)

    def _sample(self, entry: Any, draw: random.Random) -> Sample:
        name, entries = entry
        drawn = draw.sample(entries, min(self.turns, len(entries)))
        turns: list[Turn] = []
        for _, caption, found in drawn:
            turns += prompts.refer_turns(caption, stack(found), draw.randrange(len(prompts.REFER)))
        numbers = ",".join(str(number) for number, _, _ in drawn)
        return Sample(self.path(name), self.name_of(numbers), tuple(turns))


class GroundedCaptions(CocoRecords):
    """Captions with grounded phrases: annotations carry ``tokens_positive``, [start, end) characters of the caption."""

    apart = True
    """Captions of one picture may stand anywhere."""

    def _read(self) -> Iterator[Any]:
        for image, marks in self._images():
            entry = self._usable(self._caption, image, marks)
            if entry is not None:
                yield entry

    def _caption(self, image: Record, marks: list[Record]) -> Any:
        """[file name, id, markup, boxes]."""
        name, caption = (field(image, key, str, self.file) for key in ("file_name", "caption"))
        phrases: dict[tuple[int, int], list[Any]] = {}
        for annotation in marks:
            box = self._box(annotation, image)
            for span in self._usable_part(self._spans, annotation, caption) or () if box is not None else ():
                phrases.setdefault(span, []).append(box)
        text, found = ground(caption, phrases)
        return name, image["id"], text, found

    def _spans(self, annotation: Record, caption: str) -> list[tuple[int, int]]:
        spans = field(annotation, "tokens_positive", list, self.file)
        return [_span(span, caption, annotation, self.file) for span in spans]

    def _sample(self, entry: Any, draw: random.Random) -> Sample:
        name, number, text, found = entry
        return caption_sample(self.path(name), self.name_of(number), text, found, draw)


class RegionCaptions(CocoRecords):
    """Region descriptions: annotations carry ``caption``. Up to ``turns`` boxes an image, far enough apart (NMS at
    IoU 0.6, in an order drawn per epoch); images without a caption are left out.

    A file of referring expressions, whose captions are those of its ``images`` entries, is read the other way round:
    an expression describes the boxes it refers to. Entries of one picture (``file_name``) make one Sample then.
    """

    def __init__(self, annotations: str | Path, images: str | Path, turns: int = 10, seed: int = 0,
                 max_problems: float = MAX_PROBLEMS) -> None:  # fmt: skip
        self.turns = turns
        super().__init__(annotations, images, seed, max_problems)

    def _read(self) -> Iterator[Any]:
        pictures = Spill()  # those of a file of expressions
        for image, marks in self._images():
            name = self._usable(field, image, "file_name", str, self.file)
            regions = []
            for annotation in marks if name is not None else ():
                of = image if "caption" in image and "caption" not in annotation else annotation
                caption = (self._usable_part(field, of, "caption", str, self.file) or "").strip()
                box = self._box(annotation, image) if caption else None
                if box is not None:
                    regions.append((caption, box))
            if regions and name is not None and "caption" in image:
                pictures.add(name, (name, image["id"], regions))
            elif regions:
                yield name, image["id"], regions
        for group in pictures:
            name, number, _ = group[0]
            yield name, number, [region for _, _, regions in group for region in regions]

    def _sample(self, entry: Any, draw: random.Random) -> Sample:
        name, number, regions = entry
        return describe_sample(self.path(name), self.name_of(number), regions, self.turns, draw)


class DetectionByWords(CocoRecords):
    """All instances of a class, asked by its name: up to ``turns`` classes of an image as turns, drawn per epoch.

    Images without boxes are left out; instances are answered from left to right. LVIS v1 is read as released: its
    images are named by ``coco_url``, so ``images`` is the folder that holds train2017 and val2017.
    """

    version = 2

    def __init__(self, annotations: str | Path, images: str | Path, turns: int = 3, seed: int = 0,
                 max_problems: float = MAX_PROBLEMS) -> None:  # fmt: skip
        self.turns = turns
        super().__init__(annotations, images, seed, max_problems)

    def _read(self) -> Iterator[Any]:
        # LVIS writes "bow_(decorative_ribbons)"
        names = {number: " ".join(name.replace("_", " ").split()) for number, name in self._categories().items()}
        for image, marks in self._images():
            name = self._usable(image_name, image, self.file)
            instances: dict[str, list[Any]] = {}
            unasked: set[str] = set()  # crowds: in the image, though nothing is asked about them
            for annotation in marks if name is not None else ():
                kind = self._usable_part(self._kind, annotation, names)
                box = self._box(annotation, image) if kind is not None else None
                if kind is not None and box is not None:
                    instances.setdefault(kind, []).append(box)
                elif kind is not None:
                    unasked.add(kind)
            if instances:
                asked = [(kind, left_to_right(found)) for kind, found in instances.items()]
                yield name, image["id"], asked, sorted(unasked)

    def _kind(self, annotation: Record, names: dict[Any, str]) -> str:
        category = field(annotation, "category_id", (int, str), self.file)
        if category not in names:
            raise AnnotationError(f"{self.file}: annotation {annotation.get('id')}: no category {category}")
        return names[category]

    def _sample(self, entry: Any, draw: random.Random) -> Sample:
        name, number, kinds, _ = entry
        turns: list[Turn] = []
        for kind, found in draw.sample(kinds, min(self.turns, len(kinds))):
            question = prompts.detect_question(kind, draw.randrange(len(prompts.DETECT)))
            turns += Turn("user", question), Turn("assistant", prompts.boxes_answer(len(found)), stack(found))
        return Sample(self.path(name), self.name_of(number), tuple(turns))


def caption_sample(image: str, record: str, text: str, found: list[Any], draw: random.Random) -> Sample:
    """A grounded caption as a dialogue: a question drawn, then ``text`` (markup of ``ground``) with its boxes."""
    question = prompts.caption_question(draw.randrange(len(prompts.CAPTION)))
    return Sample(image, record, (Turn("user", question), Turn("assistant", text, stack(found))))


def describe_sample(image: str, record: str, regions: list[Any], turns: int, draw: random.Random) -> Sample:
    """Region descriptions as a dialogue: up to ``turns`` of ``regions`` [(caption, box)], an IoU of 0.6 apart at most,
    in an order drawn; captions get a capital."""
    order = draw.sample(regions, len(regions))
    found = stack([box for _, box in order])
    keep = box_ops.nms(found, torch.arange(len(order), 0, -1).float(), 0.6)[:turns].tolist()
    said: list[Turn] = []
    for i in keep:
        question = prompts.describe_question(draw.randrange(len(prompts.DESCRIBE)))
        caption = order[i][0][0].upper() + order[i][0][1:]
        said += Turn("user", question, found[i : i + 1]), Turn("assistant", markup.escape(caption))
    return Sample(image, record, tuple(said))


def ground(caption: str, phrases: dict[tuple[int, int], list[Any]]) -> tuple[str, list[Any]]:
    """Mark ``phrases`` ([start, end) → boxes) in an outside ``caption``: (markup, boxes in reading order).

    A phrase that overlaps an earlier one is left as plain text.

    >>> ground("A cup.", {(2, 5): [(0.0, 0.0, 1.0, 1.0)]})
    ('A <p>cup</p><roi><ground_box></roi>.', [(0.0, 0.0, 1.0, 1.0)])
    """
    text, found, end = "", [], 0
    for (start, stop), boxes in sorted(phrases.items(), key=lambda item: (item[0][0], -item[0][1])):
        if start < end:
            continue
        boxes = left_to_right(list(dict.fromkeys(boxes)))
        text += markup.escape(caption[end:start]) + prompts.phrase(caption[start:stop])
        text += prompts.boxes_answer(len(boxes))
        found += boxes
        end = stop
    return text + markup.escape(caption[end:]), found


def _span(span: Any, caption: str, annotation: dict[str, Any], file: Path) -> tuple[int, int]:
    if isinstance(span, list) and len(span) == 2 and all(isinstance(v, int) for v in span):
        start, end = span
        if 0 <= start < end <= len(caption):
            return start, end
    raise AnnotationError(
        f"{file}: annotation {annotation.get('id')}: tokens_positive {span!r:.60}, "
        f"expected [start, end) inside a caption of {len(caption)} characters"
    )
