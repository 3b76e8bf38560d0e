"""What a check gathers while it goes through a file: findings, the images named, and how the boxes lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from groma import markup

KINDS = {
    "image-missing": "no such file",
    "image-empty": "a file of 0 bytes",
    "image-corrupt": "no image, or one that does not decode",
    "image-size": "the file has another size than its record says",
    "path-outside": "a name that leads out of the image folder",
    "id-duplicate": "two records with one id",
    "box-malformed": "not four finite numbers",
    "box-reversed": "negative width or height",
    "box-empty": "no area",
    "box-outside": "reaches out of the image",
    "boxes-mixed-up": "xywh and xyxy, or fractions and pixels, seem to be confused",
    "caption-empty": "no words",
    "caption-special-words": "words of the model's markup; readers make them inert",
    "record-unusable": "left out by the reader, with its reason",
}
"""Every kind of finding and what it means, in the order of a summary."""

Layout = Literal["xywh", "xyxy"]
Size = tuple[float, float]

SLACK = 1.0
"""Pixels that a box may reach out of its image without a finding: public sets round outwards."""
SUSPECT = 0.1
"""Share of boxes that must fail one reading, while hardly any fails the other, for a mix-up to be suspected."""
FIT = 0.01
"""The share of boxes that may fail the other reading."""
FEWEST = 5
"""Boxes needed before the way they lie says anything."""
_HUGE = 1e18  # a number beyond is no coordinate; JSON's may be too large for a float


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: its kind (of KINDS), the record ("rec.json#17"), and what was got and expected."""

    kind: str
    record: str
    told: str


class Notes:
    """Gathers what is wrong with the records of ``file``, whose images are in ``folder``.

    ``images``: image name → {size its records state (None: none stated): the first record that does}.
    ``layout``: how the file's boxes are read; ``records``: how many records were seen.
    """

    def __init__(self, file: Path, folder: Path, layout: Layout = "xywh") -> None:
        self.file, self.folder, self.layout = file, folder, layout
        self.findings: list[Finding] = []
        self.images: dict[str, dict[Size | None, str]] = {}
        self.records = 0
        self._boxes = self._fail_as_read = self._fail_otherwise = self._fractions = 0
        self._first_failed = ""
        self._ids: dict[str, set[Any]] = {}

    def add(self, kind: str, record: str, told: str) -> None:
        """Note a finding; line breaks in ``told`` become spaces."""
        self.findings.append(Finding(kind, record, " ".join(told.split())))

    def name(self, record: Any, index: int, part: str = "") -> str:
        """What a record is called: "rec.json#17", "rec.json#annotation 17", or by its place where it has no id."""
        number = record.get("id") if isinstance(record, dict) else None
        which = f"[{index}]" if number is None else str(number)
        return f"{self.file.name}#{part + ' ' if part else ''}{which}"

    def identify(self, record: Any, name: str, group: str = "") -> None:
        """Note an id that another record of the ``group`` has."""
        number = record.get("id") if isinstance(record, dict) else None
        if not isinstance(number, (int, str)):
            return
        seen = self._ids.setdefault(group, set())
        if number in seen:
            self.add("id-duplicate", name, f"id {number!r} is another {group or 'record'}'s too")
        seen.add(number)

    def image(self, name: Any, record: str, size: Size | None = None) -> None:
        """Note that ``record`` names an image, whose files are looked at later."""
        if isinstance(name, str):
            self.images.setdefault(name, {}).setdefault(size, record)

    def text(self, text: Any, record: str, what: str = "caption", allowed: tuple[str, ...] = ()) -> None:
        """Look at an outside text for special words but the ``allowed``, and for no words at all."""
        if not isinstance(text, str):
            return
        words = [piece for piece, special in markup.split(text) if special and piece not in allowed]
        if words:
            found = ", ".join(dict.fromkeys(words))
            self.add("caption-special-words", record, f"{what} {text!r:.60} holds {found}")
        elif not text.strip():
            self.add("caption-empty", record, f"{what} is {text!r}")

    def box(self, box: Any, record: str, size: Size | None) -> None:
        """Look at a box in pixels of an image of ``size`` (width, height), read as the layout says."""
        numbers = isinstance(box, (list, tuple)) and all(
            isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < _HUGE for v in box
        )
        if not numbers or len(box) != 4:
            self.add("box-malformed", record, f"box {box!r:.60}, expected four numbers {self.layout}")
            return
        kinds = _faults(box, size, self.layout)
        for kind in kinds:
            self.add(kind, record, f"box {_short(box)} ({self.layout}){_of(size)}")
        other: Layout = "xyxy" if self.layout == "xywh" else "xywh"
        failed = any(kind in ("box-outside", "box-reversed") for kind in kinds)
        self._first_failed = self._first_failed or (record if failed else "")
        self._boxes += 1
        self._fail_as_read += failed
        self._fail_otherwise += bool(_faults(box, size, other))
        self._fractions += all(0 <= v <= 1 for v in box)

    def judge_boxes(self) -> None:
        """Note what all boxes together say about how they should be read. Call it after the last one."""
        n, other = self._boxes, "xyxy" if self.layout == "xywh" else "xywh"
        if n < FEWEST:
            return
        if self._fractions == n:
            told = f"every number of {n} boxes is from 0 to 1: fractions, where pixels are expected?"
            self.add("boxes-mixed-up", self.file.name, told)
        elif self._fail_as_read >= SUSPECT * n and self._fail_otherwise <= FIT * n:
            fails = f"read as {self.layout}, {self._fail_as_read} of {n} boxes leave their image or are reversed"
            told = f"{fails} (first: {self._first_failed}); read as {other}, {n - self._fail_otherwise} fit: {other}?"
            self.add("boxes-mixed-up", self.file.name, told)


def _faults(box: Any, size: Size | None, layout: Layout) -> list[str]:
    """The kinds of findings of four finite numbers, read as ``layout``."""
    x, y, a, b = box
    w, h = (a, b) if layout == "xywh" else (a - x, b - y)
    if w < 0 or h < 0:
        return ["box-reversed"]
    kinds = ["box-empty"] if w == 0 or h == 0 else []
    outside = size is not None and (x + w > size[0] + SLACK or y + h > size[1] + SLACK)
    return [*kinds, "box-outside"] if outside or x < -SLACK or y < -SLACK else kinds


def _short(box: Any) -> str:
    return "[" + ", ".join(f"{v:g}" for v in box) + "]"


def _of(size: Size | None) -> str:
    return f", image of {size[0]:g} x {size[1]:g}" if size else ""
