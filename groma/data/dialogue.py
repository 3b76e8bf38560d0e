"""Plain dialogues about an image, in LLaVA's layout: a list of {id, image, conversations: [{from, value} …]}."""

from __future__ import annotations

from pathlib import Path

from groma import markup
from groma.data.detection import AnnotationError, Records, field, read_json
from groma.structures import Role, Sample, Turn

_ROLES: dict[str, Role] = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


class Dialogue(Records):
    """Conversations as turns; "<image>" and newlines are removed, records without an image are left out.

    A closing question without an answer is dropped. Raises AnnotationError for turns out of order.
    """

    def __init__(self, annotations: str | Path, images: str | Path, seed: int = 0) -> None:
        super().__init__(annotations, images, seed)
        content = read_json(self.file)
        if not isinstance(content, list):
            raise AnnotationError(f"{self.file}: got a JSON {type(content).__name__}, expected a list of conversations")
        self._entries: list[tuple[str, str, tuple[str, ...]]] = []
        for number, record in enumerate(content):
            if isinstance(record, dict) and "image" not in record:
                continue
            name = field(record, "image", str, self.file)
            texts = self._texts(field(record, "conversations", list, self.file), number)
            if texts:
                self._entries.append((name, f"{self.file.name}#{record.get('id', number)}", texts))

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Sample:
        name, record, texts = self._entries[index]
        turns = tuple(Turn("assistant" if i % 2 else "user", markup.escape(t)) for i, t in enumerate(texts))
        return Sample(str(self.images / name), record, turns)

    def _texts(self, conversation: list[dict[str, str]], number: int) -> tuple[str, ...]:
        texts: list[str] = []
        for turn in conversation:
            speaker, value = (field(turn, key, str, self.file) for key in ("from", "value"))
            expected: Role = "assistant" if len(texts) % 2 else "user"
            if _ROLES.get(speaker) != expected:
                where = f"{self.file}: conversation {number}, turn {len(texts)}"
                raise AnnotationError(f"{where}: from {speaker!r}, expected the {expected}")
            texts.append(" ".join(value.replace(markup.IMAGE, " ").split()))
        return tuple(texts[: len(texts) // 2 * 2])
