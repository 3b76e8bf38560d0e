"""Plain dialogues about an image, in LLaVA's layout: a list of {id, image, conversations: [{from, value} …]}."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from groma import markup
from groma.data.coco import read_json
from groma.data.records import AnnotationError, Record, Records, field
from groma.structures import Role, Sample, Turn

_ROLES: dict[str, Role] = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


class Dialogue(Records):
    """Conversations as turns; "<image>" and newlines are removed, records without an image are left out.

    A closing question without an answer is dropped. Turns out of order make a record unusable.
    """

    def _read(self) -> Iterator[Any]:
        content = read_json(self.file)
        if not isinstance(content, list):
            raise AnnotationError(f"{self.file}: got a JSON {type(content).__name__}, expected a list of conversations")
        for number, record in enumerate(content):
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
            if _ROLES.get(speaker) != expected:
                where = f"{self.file}: conversation {number}, turn {len(texts)}"
                raise AnnotationError(f"{where}: from {speaker!r}, expected the {expected}")
            texts.append(" ".join(value.replace(markup.IMAGE, " ").split()))
        return (name, record.get("id", number), texts[: len(texts) // 2 * 2]) if len(texts) > 1 else None

    def _sample(self, entry: Any, draw: random.Random) -> Sample:
        name, number, texts = entry
        turns = tuple(Turn("assistant" if i % 2 else "user", markup.escape(t)) for i, t in enumerate(texts))
        return Sample(self.path(name), self.name_of(number), turns)
