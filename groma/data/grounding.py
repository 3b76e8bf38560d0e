"""Grounding dialogues from COCO-style JSON: referring, grounded captions, region captions, detection by words."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from groma import boxes as box_ops
from groma import markup
from groma.data import prompts
from groma.data.detection import AnnotationError, Records, annotations_by_image, field, read_coco, stack, unit_box
from groma.structures import Sample, Turn

Box = tuple[float, ...]


class Referring(Records):
    """Referring expressions: each ``images`` entry is one expression (``caption``) with 0, 1 or more annotations.

    Entries of one picture (``file_name``) make one Sample of up to ``turns`` expressions, drawn per epoch; an entry
    without annotations is an absent referent. Several referents are answered from left to right.
    """

    def __init__(self, annotations: str | Path, images: str | Path, turns: int = 8, seed: int = 0) -> None:
        super().__init__(annotations, images, seed)
        self.turns = turns
        content = read_coco(self.file)
        by_image = annotations_by_image(content, self.file)
        groups: dict[str, list[tuple[Any, str, tuple[Box, ...]]]] = {}
        for image in content["images"]:
            caption = field(image, "caption", str, self.file)
            found = [unit_box(a, image, self.file) for a in by_image[image["id"]]]
            kept = left_to_right([b for b in found if b is not None])
            if found and not kept:
                continue  # every box is unusable: neither a target nor an absent referent
            groups.setdefault(field(image, "file_name", str, self.file), []).append((image["id"], caption, tuple(kept)))
        self._groups = list(groups.items())

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int) -> Sample:
        name, entries = self._groups[index]
        draw = self._random(index)
        drawn = draw.sample(entries, min(self.turns, len(entries)))
        turns: list[Turn] = []
        for _, caption, found in drawn:
            turns += prompts.refer_turns(caption, stack(list(found)), draw.randrange(len(prompts.REFER)))
        numbers = ",".join(str(number) for number, _, _ in drawn)
        return Sample(str(self.images / name), f"{self.file.name}#{numbers}", tuple(turns))


class GroundedCaptions(Records):
    """Captions with grounded phrases: annotations carry ``tokens_positive``, [start, end) characters of the caption."""

    def __init__(self, annotations: str | Path, images: str | Path, seed: int = 0) -> None:
        super().__init__(annotations, images, seed)
        content = read_coco(self.file)
        by_image = annotations_by_image(content, self.file)
        self._entries: list[tuple[Any, str, str, tuple[Box, ...]]] = []
        for image in content["images"]:
            caption = field(image, "caption", str, self.file)
            phrases: dict[tuple[int, int], list[Box]] = {}
            for annotation in by_image[image["id"]]:
                box = unit_box(annotation, image, self.file)
                for span in field(annotation, "tokens_positive", list, self.file):
                    if box is not None:
                        phrases.setdefault(_span(span, caption, annotation, self.file), []).append(box)
            text, found = ground(caption, phrases)
            self._entries.append((image["id"], field(image, "file_name", str, self.file), text, tuple(found)))

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Sample:
        number, name, text, found = self._entries[index]
        question = prompts.caption_question(self._random(index).randrange(len(prompts.CAPTION)))
        turns = (Turn("user", question), Turn("assistant", text, stack(list(found))))
        return Sample(str(self.images / name), f"{self.file.name}#{number}", turns)


class RegionCaptions(Records):
    """Region descriptions: annotations carry ``caption``. Up to ``turns`` boxes an image, far enough apart (NMS at
    IoU 0.6, in an order drawn per epoch); images without a caption are left out."""

    def __init__(self, annotations: str | Path, images: str | Path, turns: int = 10, seed: int = 0) -> None:
        super().__init__(annotations, images, seed)
        self.turns = turns
        content = read_coco(self.file)
        by_image = annotations_by_image(content, self.file)
        self._entries: list[tuple[Any, str, tuple[tuple[str, Box], ...]]] = []
        for image in content["images"]:
            regions = []
            for annotation in by_image[image["id"]]:
                caption = field(annotation, "caption", str, self.file).strip()
                box = unit_box(annotation, image, self.file)
                if box is not None and caption:
                    regions.append((caption, box))
            if regions:
                self._entries.append((image["id"], field(image, "file_name", str, self.file), tuple(regions)))

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Sample:
        number, name, regions = self._entries[index]
        draw = self._random(index)
        order = draw.sample(regions, len(regions))
        found = stack([box for _, box in order])
        keep = box_ops.nms(found, torch.arange(len(order), 0, -1).float(), 0.6)[: self.turns].tolist()
        turns: list[Turn] = []
        for i in keep:
            question = prompts.describe_question(draw.randrange(len(prompts.DESCRIBE)))
            caption = order[i][0][0].upper() + order[i][0][1:]
            turns += Turn("user", question, found[i : i + 1]), Turn("assistant", markup.escape(caption))
        return Sample(str(self.images / name), f"{self.file.name}#{number}", tuple(turns))


class DetectionByWords(Records):
    """All instances of a class, asked by its name: up to ``classes`` classes of an image as turns, drawn per epoch.

    Images without boxes are left out; instances are answered from left to right.
    """

    def __init__(self, annotations: str | Path, images: str | Path, classes: int = 3, seed: int = 0) -> None:
        super().__init__(annotations, images, seed)
        self.classes = classes
        content = read_coco(self.file)
        names = {c["id"]: field(c, "name", str, self.file) for c in content.get("categories", [])}
        by_image = annotations_by_image(content, self.file)
        self._entries: list[tuple[Any, str, tuple[tuple[str, tuple[Box, ...]], ...]]] = []
        for image in content["images"]:
            instances: dict[str, list[Box]] = {}
            for annotation in by_image[image["id"]]:
                box = unit_box(annotation, image, self.file)
                category = field(annotation, "category_id", (int, str), self.file)
                if category not in names:
                    raise AnnotationError(f"{self.file}: annotation {annotation.get('id')}: no category {category}")
                if box is not None:
                    instances.setdefault(names[category], []).append(box)
            if instances:
                kinds = tuple((kind, tuple(left_to_right(found))) for kind, found in instances.items())
                self._entries.append((image["id"], field(image, "file_name", str, self.file), kinds))

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Sample:
        number, name, kinds = self._entries[index]
        draw: random.Random = self._random(index)
        turns: list[Turn] = []
        for kind, found in draw.sample(kinds, min(self.classes, len(kinds))):
            question = prompts.detect_question(kind, draw.randrange(len(prompts.DETECT)))
            turns += Turn("user", question), Turn("assistant", prompts.boxes_answer(len(found)), stack(list(found)))
        return Sample(str(self.images / name), f"{self.file.name}#{number}", tuple(turns))


def left_to_right(found: list[Box]) -> list[Box]:
    """Boxes by their centre's x, ties by y: an order the model can see, where a file's order is arbitrary."""
    return sorted(found, key=lambda box: (box[0] + box[2], box[1] + box[3]))


def ground(caption: str, phrases: dict[tuple[int, int], list[Box]]) -> tuple[str, list[Box]]:
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
