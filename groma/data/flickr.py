"""Flickr30k Entities as its authors publish it (Plummer et al., arXiv 1505.04870)::

train.txt  val.txt  test.txt    one image id a line
Sentences/1000092795.txt        [/EN#1/people Two young guys] with [/EN#2/bodyparts shaggy hair] look at …
Annotations/1000092795.xml      objects: the chains they belong to (<name>, one or more) and a <bndbox>, or none
UNRELATED_CAPTIONS              sentences that do not speak of their image (left out)
"""

from __future__ import annotations

import random
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from groma.data.coco import Box, unit_box
from groma.data.grounding import caption_sample, ground
from groma.data.records import MAX_PROBLEMS, AnnotationError, Records
from groma.structures import Sample

_PHRASE = re.compile(r"\[/EN#(?P<chain>\d+)(?:/[^\s\]]*)?\s+(?P<words>[^\[\]]+)\]")
# Sentences are written in tokens: "Two young , White males", "a man 's hat ."
_SPACE = re.compile(r"\s+(?=[.,;:!?](?:\s|$)|'s\b)")


class Flickr30k(Records):
    """One Sample a sentence: a caption whose phrases are grounded in the boxes of their chain.

    ``annotations`` is the folder; ``split`` the list of it to read ("train" is train.txt). A chain may have several
    boxes, a box several chains; phrases of a chain without a box (a scene, something not visible) stay plain text.
    Image 1000092795 is 1000092795.jpg. Boxes have 1 taken from each coordinate, as the authors' reader does; spaces
    before punctuation are taken out. Raises AnnotationError.
    """

    def __init__(self, annotations: str | Path, images: str | Path, split: str = "train", seed: int = 0,
                 max_problems: float = MAX_PROBLEMS) -> None:  # fmt: skip
        self.split = split
        super().__init__(annotations, images, seed, max_problems)

    def name_of(self, record: Any) -> str:
        return f"Sentences/{record}"

    def _files(self) -> list[Path]:
        unrelated = self.file / "UNRELATED_CAPTIONS"
        listed = [self.file / f"{self.split}.txt", self.file / "Sentences", self.file / "Annotations"]
        return listed + [unrelated] * unrelated.is_file()

    def _options(self) -> str:
        return self.split

    def _read(self) -> Iterator[Any]:
        unrelated = {tuple(line.split()) for line in self._lines("UNRELATED_CAPTIONS", missing_ok=True)}
        numbers = [line.strip() for line in self._lines(f"{self.split}.txt") if line.strip()]
        for number in dict.fromkeys(numbers):
            for entry in self._usable(self._image, number, unrelated) or ():
                if isinstance(entry, AnnotationError):
                    self._noted.append(str(entry))
                else:
                    yield entry

    def _image(self, number: str, unrelated: set[tuple[str, ...]]) -> list[Any]:
        """For each sentence [image name, "ID.txt:line", markup, boxes], or what is wrong with it."""
        if not number.isdecimal():
            raise AnnotationError(f"{self.file}/{self.split}.txt: {number!r:.60}, expected an image id, all digits")
        chains = self._chains(self.file / "Annotations" / f"{number}.xml")
        entries: list[Any] = []
        for line, sentence in enumerate(self._lines(f"Sentences/{number}.txt"), 1):
            if (number, str(line)) in unrelated or not sentence.strip():
                continue
            try:
                text, found = ground(*read_sentence(sentence, chains))
                entries.append((f"{number}.jpg", f"{number}.txt:{line}", text, found))
            except ValueError as error:
                entries.append(AnnotationError(f"{self.file}/Sentences/{number}.txt: line {line}: {error}"))
        return entries

    def _lines(self, name: str, missing_ok: bool = False) -> list[str]:
        try:
            return (self.file / name).read_text("utf-8").split("\n")
        except FileNotFoundError as error:
            if missing_ok:
                return []
            there = ", ".join(sorted(path.name for path in self.file.glob("*.txt"))) or "none"
            hint = f"; lists there: {there}" if name == f"{self.split}.txt" else ""
            raise AnnotationError(f"{self.file / name}: no such annotation file{hint}") from error
        except (OSError, UnicodeDecodeError) as error:
            raise AnnotationError(f"{self.file / name}: cannot be read ({error})") from error

    def _chains(self, path: Path) -> dict[str, list[Box]]:
        """Chain → boxes, xyxy in [0, 1]; those under a pixel are left out."""
        root = read_xml(path)
        size = {"id": path.stem} | {side: _number(root.find("size"), side, path) for side in ("width", "height")}
        chains: dict[str, list[Box]] = {}
        for thing in root.findall("object"):
            bounds = thing.find("bndbox")
            if bounds is None:
                continue
            x1, y1, x2, y2 = (_number(bounds, key, path) - 1 for key in ("xmin", "ymin", "xmax", "ymax"))
            if x2 < x1 or y2 < y1:
                raise AnnotationError(f"{path}: box {x1 + 1, y1 + 1, x2 + 1, y2 + 1} is reversed")
            box = unit_box({"bbox": [x1, y1, x2 - x1, y2 - y1]}, size, path)
            if box is not None:
                for name in thing.findall("name"):
                    chains.setdefault((name.text or "").strip(), []).append(box)
        return chains

    def _sample(self, entry: Any, draw: random.Random) -> Sample:
        name, number, text, found = entry
        return caption_sample(self.path(name), self.name_of(number), text, found, draw)


def read_sentence(sentence: str, chains: dict[str, list[Box]]) -> tuple[str, dict[tuple[int, int], list[Box]]]:
    """A sentence of the authors' format as (caption, its [start, end) → boxes). Raises ValueError for broken brackets.

    >>> read_sentence("[/EN#6/people A man] in [/EN#0/notvisual front] .", {"6": [(0.0, 0.0, 0.5, 1.0)]})
    ('A man in front.', {(0, 5): [(0.0, 0.0, 0.5, 1.0)]})
    """
    caption, phrases, end = "", {}, 0
    sentence = _SPACE.sub("", sentence.strip())
    for match in _PHRASE.finditer(sentence):
        caption += _plain(sentence[end : match.start()])
        words = " ".join(match["words"].split())
        if match["chain"] in chains:
            phrases[len(caption), len(caption) + len(words)] = chains[match["chain"]]
        caption, end = caption + words, match.end()
    return caption + _plain(sentence[end:]), phrases


def _plain(text: str) -> str:
    if "[" in text or "]" in text:
        raise ValueError(f"brackets in {text.strip()!r:.60}, expected [/EN#chain/type words]")
    return re.sub(r"\s+", " ", text)


class _NoDoctype(ET.TreeBuilder):
    """Entities, which can grow without bound or name other files, are declared in a document type."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("it declares a document type, expected none")


def read_xml(path: Path) -> ET.Element:
    """The root of an XML file without a document type. Raises AnnotationError."""
    try:
        return ET.fromstring(path.read_bytes(), ET.XMLParser(target=_NoDoctype()))
    except FileNotFoundError as error:
        raise AnnotationError(f"{path}: no such annotation file") from error
    except (OSError, ET.ParseError, ValueError, LookupError) as error:
        raise AnnotationError(f"{path}: cannot be read ({error})") from error


def _number(parent: ET.Element | None, key: str, path: Path) -> float:
    value = parent.findtext(key) if parent is not None else None
    try:
        return float(value or "")
    except ValueError as error:
        raise AnnotationError(f"{path}: {key} = {value!r:.60}, expected a number") from error
