"""Dialogues about an image from JSON lists: plain ones in LLaVA's layout, grounded ones in that of Groma Instruct.

{"id": 1, "image": "coco/train2017/1.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat …"}, …]}

{"file_name": "1.jpg", "width": 640, "height": 480, "boxes": [[x, y, w, h], …],
 "conversation": [{"value": "What …"}, {"value": "A <p>cup</p><roi><ground_box></roi> …", "box_inds": [2]}, …]}
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Any

from groma import markup
from groma.data.coco import Box, stack, unit_box
from groma.data.json_stream import json_items
from groma.data.prompts import boxes_answer, phrase
from groma.data.records import AnnotationError, Record, Records, field
from groma.structures import Role, Sample, Turn

_ROLES: dict[str, Role] = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_PLACES = (markup.PHRASE_OPEN, markup.PHRASE_CLOSE, markup.ROI_OPEN, markup.ROI_CLOSE, markup.GROUND_BOX)
_ANY = "|".join(_PLACES)
_PLACE = re.compile(_ANY)
_GROUP = re.compile(
    rf"(?:<p>(?P<phrase>(?:(?!{_ANY}).)*)</p>\s*)?<roi>(?P<boxes>(?:\s*<ground_box>)+)\s*</roi>", re.DOTALL
)


class Dialogue(Records):
    """LLaVA's layout (LLaVA-Instruct, ShareGPT4V): conversations as turns, "<image>" and newlines removed.

    Records without an image, which talk about nothing, are left out; so is a closing question without an answer. Turns
    out of order, or without a word, make a record unusable. Image names may carry folders ("sam/images/sa_1.jpg"): they
    lie under the images folder.
    """

    def _read(self) -> Iterator[Any]:
        for number, record in enumerate(json_items(self.file)):
            if isinstance(record, dict) and "image" not in record:
                continue
            entry = self._usable(self._conversation, record, number)
            if entry is not None:
                yield entry

    def _conversation(self, record: Record, number: int) -> Any:
        """[image name, id, texts], or None for a conversation without an answer."""
        name = field(record, "image", str, self.file)
        texts: list[str] = []
        for turn in field(record, "conversations", list, self.file):
            speaker, value = (field(turn, key, str, self.file) for key in ("from", "value"))
            expected: Role = "assistant" if len(texts) % 2 else "user"
            where = f"{self.file}: conversation {number}, turn {len(texts)}"
            if _ROLES.get(speaker) != expected:
                raise AnnotationError(f"{where}: from {speaker!r}, expected the {expected}")
            texts.append(" ".join(value.replace(markup.IMAGE, " ").split()))
            if not texts[-1]:
                raise AnnotationError(f"{where}: got {value!r:.40}, expected words")
        return (name, record.get("id", number), texts[: len(texts) // 2 * 2]) if len(texts) > 1 else None

    def _sample(self, entry: Any, draw: random.Random) -> Sample:
        name, number, texts = entry
        turns = tuple(Turn("assistant" if i % 2 else "user", markup.escape(t)) for i, t in enumerate(texts))
        return Sample(self.path(name), self.name_of(number), turns)


class GromaInstruct(Records):
    """Groma Instruct: questions that all ask for a grounded answer, and answers with phrases, groups and boxes.

    An answer's ``<p>phrase</p><roi><ground_box>…</roi>`` is markup; a lone piece of it, a count of ``<ground_box>``
    other than that of ``box_inds``, and an index or a box that cannot be used make a record unusable. Any other special
    word in it, and all of a question, is plain text.
    """

    def _read(self) -> Iterator[Any]:
        for number, record in enumerate(json_items(self.file)):
            entry = self._usable(self._conversation, record, number)
            if entry is not None:
                yield entry

    def _conversation(self, record: Record, number: int) -> Any:
        """[image name, id, [[question, answer, boxes] …]], both texts as markup."""
        name = field(record, "file_name", str, self.file)
        boxes = field(record, "boxes", list, self.file)
        said = field(record, "conversation", list, self.file)
        if not said or len(said) % 2:
            raise AnnotationError(
                f"{self.file}: conversation {number}: {len(said)} turns, expected pairs of question and answer"
            )
        pairs = []
        for i in range(0, len(said), 2):
            question = field(said[i], "value", str, self.file).strip()
            try:
                found = [self._place(index, boxes, record) for index in field(said[i + 1], "box_inds", list, self.file)]
                answer = grounded_answer(field(said[i + 1], "value", str, self.file).strip(), len(found))
            except ValueError as error:
                known = str(error).removeprefix(f"{self.file}: ")
                raise AnnotationError(f"{self.file}: conversation {number}, turn {i + 1}: {known}") from error
            pairs.append((f"{markup.GROUNDING} {markup.escape(question)}", answer, found))
        return name, record.get("id", number), pairs

    def _place(self, index: Any, boxes: list[Any], record: Record) -> Box:
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(boxes):
            raise AnnotationError(f"box_inds has {index!r:.20}, expected indices of {len(boxes)} boxes")
        box = unit_box({"id": index, "bbox": boxes[index]}, record, self.file, min_side=0.0)
        if box is None or box[0] >= box[2] or box[1] >= box[3]:
            raise AnnotationError(f"box {index} is {boxes[index]!r:.60}, expected one with an area inside the image")
        return box

    def _sample(self, entry: Any, draw: random.Random) -> Sample:
        name, number, pairs = entry
        turns: list[Turn] = []
        for question, answer, found in pairs:
            turns += Turn("user", question), Turn("assistant", answer, stack(found))
        return Sample(self.path(name), self.name_of(number), tuple(turns))


def grounded_answer(text: str, boxes: int) -> str:
    """An answer that carries ``<p>phrase</p><roi><ground_box>…</roi>`` for ``boxes`` boxes, as markup: what stands
    around those groups is escaped. Raises ValueError for a lone piece of a group, and another number of boxes.

    >>> grounded_answer("A <p>cup</p> <roi><ground_box></roi>.", 1)
    'A <p>cup</p><roi><ground_box></roi>.'
    """
    places = text.count(markup.GROUND_BOX)
    if places != boxes:
        raise ValueError(f"{places} {markup.GROUND_BOX} in {text!r:.80}, but {boxes} boxes")
    if not text:
        raise ValueError("an answer without a word")
    whole, end = "", 0
    for match in _GROUP.finditer(text):
        words = phrase(match["phrase"]) if match["phrase"] and match["phrase"].strip() else ""
        whole += _plain(text[end : match.start()]) + words + boxes_answer(match["boxes"].count(markup.GROUND_BOX))
        end = match.end()
    return whole + _plain(text[end:])


def _plain(text: str) -> str:
    """Text outside of groups, escaped."""
    if stray := _PLACE.search(text):
        raise ValueError(f"a lone {stray.group()} at {text[stray.start() :]!r:.40}, expected "
                         "<p>phrase</p><roi><ground_box></roi>")  # fmt: skip
    return markup.escape(text)
