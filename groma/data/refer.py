"""RefCOCO, RefCOCO+ and RefCOCOg as their authors publish them: pickled references beside COCO's instances.

    refcoco/refs(unc).p       list of {ref_id, ann_id, image_id, split, sentences: [{sent_id, sent, tokens, raw}], …}
    refcoco/refs(google).p    another partition of the same references: use one of the two, never both
    refcoco/instances.json    the images and annotations they point to

(Kazemzadeh et al. 2014; Yu et al., arXiv 1608.00272; Mao et al., arXiv 1511.02283; Nagaraja et al., arXiv 1608.00525.)
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from groma.data.coco import unit_box
from groma.data.grounding import Referring, describe_sample
from groma.data.json_stream import json_lists
from groma.data.plain_pickle import load_plain, text
from groma.data.records import MAX_PROBLEMS, AnnotationError, Record, field
from groma.data.shards import exists
from groma.structures import Sample

KEYS = {"images": "image_id", "annotations": "ann_id"}
"""What a reference calls the records of instances.json by."""
MOST_SENTENCES = 1000
"""Of one reference; the sets have some ten at most."""


class Refer(Referring):
    """The references of one part (``split``), as referring expressions: one Sample an image, of up to ``turns``.

    ``annotations`` is the pickle. Parts are those of its partition: train, val, and test, or testA (people) and testB
    (other things); "test" is all of the latter. Images are looked for by their name in instances.json and, where the
    folder does not have the first one, by that of COCO's 2017 release (COCO_train2014_000000581857.jpg is
    000000581857.jpg there). Raises AnnotationError, also for a pickle that holds more than plain values.
    """

    def __init__(self, annotations: str | Path, images: str | Path, split: str = "train", turns: int = 8, seed: int = 0,
                 max_problems: float = MAX_PROBLEMS) -> None:  # fmt: skip
        self.split, self.instances = split, Path(annotations).with_name("instances.json")
        if Path(annotations).is_dir():
            there = sorted(path.name for path in Path(annotations).glob("*.p"))
            raise AnnotationError(f"{annotations}: a folder, expected one of the pickles in it: {there}")
        super().__init__(annotations, images, turns, seed, max_problems)
        first = self.entries[0][0] if len(self.entries) else ""
        self.renamed = not exists(self.images / first) and exists(self.images / name_2017(first))

    def path(self, name: str) -> str:
        return super().path(name_2017(name) if self.renamed else name)

    def _files(self) -> list[Path]:
        return [self.file, self.instances]

    def _options(self) -> str:
        return self.split

    def _read(self) -> Iterator[Any]:
        references = list(self._references())
        wanted = {key: {ref[name] for ref in references} for key, name in KEYS.items()}
        there: dict[str, dict[Any, Record]] = {"images": {}, "annotations": {}}
        for key, record in json_lists(self.instances, tuple(there)):
            number = self._usable(field, record, "id", int, self.instances)
            if number in wanted[key]:
                there[key][number] = record
        groups: dict[str, list[Any]] = {}
        for ref in references:
            name, entries = self._usable(self._expressions, ref, there["images"], there["annotations"]) or ("", [])
            if entries:
                groups.setdefault(name, []).extend(entries)
        yield from groups.items()

    def _references(self) -> Iterator[Record]:
        """The references of the part, each once and with numbers where numbers belong."""
        content = load_plain(self.file)
        if not isinstance(content, list):
            raise AnnotationError(f"{self.file}: a pickled {type(content).__name__}, expected a list of references")
        parts, seen, found = set(), set(), False
        for number, ref in enumerate(content):
            part = self._usable(self._get, ref, "split", str, number)
            parts.add(part)
            if part is None or not _belongs(part, self.split):
                continue
            found = True
            ids = [self._usable(self._get, ref, key, int, number) for key in ("ref_id", "ann_id", "image_id")]
            if ids[0] in seen and ids[0] is not None:
                self._noted.append(f"{self.file}: two references with ref_id {ids[0]}")
            elif None not in ids:
                seen.add(ids[0])
                yield ref
        if not found:
            there = ", ".join(sorted(part for part in parts if part is not None)) or "none"
            raise AnnotationError(f"{self.file}: no references of split {self.split!r}; it has {there}")

    def _expressions(self, ref: Record, images: dict[Any, Record], annotations: dict[Any, Record]) -> Any:
        """(file name, [(sentence id, expression, boxes)]); no expressions where the box is one to leave out."""
        image, mark = images.get(ref["image_id"]), annotations.get(ref["ann_id"])
        if image is None or mark is None:
            missing = f"image {ref['image_id']}" if image is None else f"annotation {ref['ann_id']}"
            raise AnnotationError(f"{self.file}: reference {ref['ref_id']}: no {missing} in {self.instances.name}")
        name, box = self._get(image, "file_name", str, ref["ref_id"]), unit_box(mark, image, self.instances)
        sentences = self._get(ref, "sentences", list, ref["ref_id"])
        if len(sentences) > MOST_SENTENCES:
            raise AnnotationError(f"{self.file}: reference {ref['ref_id']}: {len(sentences)} sentences")
        self._noted.parts_seen += len(sentences)
        told = (self._usable_part(self._sentence, sentence, ref["ref_id"]) for sentence in sentences)
        said = [sentence for sentence in told if sentence is not None]
        return name, [] if box is None else [(number, words, [box]) for number, words in said]

    def _sentence(self, sentence: Any, number: int) -> tuple[int, str]:
        words = self._get(sentence, "sent", str, number)
        try:
            words = text(words).strip()
        except ValueError as error:
            raise AnnotationError(f"{self.file}: reference {number}: sent is no text ({error})") from error
        if not words:
            raise AnnotationError(f"{self.file}: reference {number}: an empty sentence")
        return self._get(sentence, "sent_id", int, number), words

    def _get(self, record: Any, key: str, kind: type, number: int) -> Any:
        """``record[key]`` of reference ``number``."""
        if not isinstance(record, dict):
            raise AnnotationError(f"{self.file}: reference {number}: got {_told(record)}, expected a dict")
        value = record.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            got = f"{key} = {_told(value)}" if key in record else f"no {key!r}"
            raise AnnotationError(f"{self.file}: reference {number}: {got}, expected {kind.__name__}")
        return value


class ReferCaptions(Refer):
    """The same references the other way round: what is in a box, as region captions (RefCOCOg's are sentences).

    Up to ``turns`` boxes of an image, an IoU of 0.6 apart at most; of the sentences of one box, one drawn per epoch.
    """

    def _sample(self, entry: Any, draw: random.Random) -> Sample:
        name, entries = entry
        regions = [(caption, boxes[0]) for _, caption, boxes in entries]
        return describe_sample(self.path(name), self.name_of(entries[0][0]), regions, self.turns, draw)


def name_2017(name: str) -> str:
    """The name that an image of COCO's 2014 release has in that of 2017.

    >>> name_2017("COCO_train2014_000000581857.jpg")
    '000000581857.jpg'
    """
    return name.removeprefix("COCO_train2014_").removeprefix("COCO_val2014_")


def _belongs(part: str, asked: str) -> bool:
    """Is ``part``, as a reference has it, (in) the part asked for? One named testAB is in testA and in testB."""
    if asked.startswith("test"):
        return part.startswith("test") and set(asked[4:]) <= set(part[4:])
    return part == asked


def _told(value: Any) -> str:
    """A value in a message. Of lists and dicts the kind: they can share and hold each other without end."""
    return type(value).__name__ if isinstance(value, list | dict) else f"{value!r:.60}"
