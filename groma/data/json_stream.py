"""JSON read a record at a time, however large the file: lists, lists inside an object, and JSON Lines.

    json_items("llava.json")                                 the records of  [{…}, {…}]
    json_items("coco.json", "images")                        of              {"images": [{…}, {…}], …}
    json_lists("coco.json", ("images", "annotations"))       of both, in the order of the file, in one pass
    json_lines("own.jsonl", note)                            of              {…}\\n{…}\\n

The values are the standard decoder's, one by one from a window of text that moves through the file: its speed, its
numbers (NaN too), and a few MB of memory. Raises AnnotationError, in one line, for a file that is missing, malformed or
cut; what was read before is yielded first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from groma.data.records import AnnotationError

WINDOW = 1 << 20
"""Characters read at a time."""
LONGEST = 1 << 27
"""Characters of the longest record read: a missing bracket must not fill the memory."""
_MARGIN = 16
"""Of the last characters of a window nothing is believed: "1" may go on as "1.5e3"."""
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")
_KINDS = {"[": "list", "{": "object", '"': "string", "t": "boolean", "f": "boolean", "n": "null", "": "nothing"}


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises AnnotationError, in one line, for a missing or malformed one."""
    try:
        return json.loads(path.read_text("utf-8-sig"))
    except FileNotFoundError as error:
        raise AnnotationError(f"{path}: no such annotation file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise AnnotationError(f"{path}: cannot be read ({error})") from error
    except json.JSONDecodeError as error:
        raise AnnotationError(f"{path}: not JSON ({error})") from error
    except RecursionError as error:
        raise AnnotationError(f"{path}: not JSON that can be read (nested too deeply)") from error


def json_items(path: Path, key: str | None = None, optional: bool = False) -> Iterator[Any]:
    """The records of a JSON list, or of the list under ``key`` of a JSON object; of one that is ``optional``, if any.

    The file is read up to the end of the list. Raises AnnotationError.
    """
    if key is not None:
        yield from (record for _, record in json_lists(path, (key,), optional))
        return
    with _open(path) as file:
        text = _Text(path, file)
        if text.peek() != "[":
            raise AnnotationError(f"{path}: got a JSON {text.kind()}, expected a list")
        yield from text.items()
        if text.peek():
            raise text.error("more text after the list")


def json_lists(path: Path, keys: Sequence[str], optional: bool = False) -> Iterator[tuple[str, Any]]:
    """(key, record) of the lists under ``keys`` of a JSON object, in the order of the file, up to the end of the last.

    Raises AnnotationError, also for a key that is not there unless they are ``optional``.
    """
    with _open(path) as file:
        text = _Text(path, file)
        if text.peek() != "{":
            raise AnnotationError(f"{path}: got a JSON {text.kind()}, expected an object with lists {', '.join(keys)}")
        seen: list[str] = []
        for name in text.members():
            seen.append(name)
            if name not in keys:
                text.skip()
                continue
            if text.peek() != "[":
                raise AnnotationError(f"{path}: {name!r} is a JSON {text.kind()}, expected a list")
            for record in text.items():
                yield name, record
            if all(key in seen for key in keys):
                return
        missing = [key for key in keys if key not in seen]
        if missing and not optional:
            raise AnnotationError(f"{path}: no list {missing[0]!r}; it has {sorted(seen)}")


def json_lines(path: Path, note: Callable[[str], None] | None = None) -> Iterator[tuple[int, Any]]:
    """(number of the line from 1, value) of every line of a JSON Lines file; blank lines are passed over.

    ``note`` is told of each malformed line, which is left out; without it one raises AnnotationError.
    """
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(LONGEST):
                number += 1
                try:
                    if line.strip():
                        value = json.loads(line.decode("utf-8-sig"))
                    else:
                        continue
                except (ValueError, RecursionError) as error:  # ValueError: not JSON, or not UTF-8
                    problem = f"{path}: line {number}: not JSON ({' '.join(str(error).split())})"
                    if len(line) == LONGEST and not line.endswith(b"\n"):
                        raise AnnotationError(
                            f"{path}: line {number}: over {LONGEST} bytes, expected JSON Lines"
                        ) from error
                    if note is None:
                        raise AnnotationError(problem) from error
                    note(problem)
                    continue
                yield number, value
    except FileNotFoundError as error:
        raise AnnotationError(f"{path}: no such annotation file") from error
    except OSError as error:
        raise AnnotationError(f"{path}: cannot be read ({error})") from error


def _open(path: Path) -> TextIO:
    try:
        return path.open(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise AnnotationError(f"{path}: no such annotation file") from error
    except OSError as error:
        raise AnnotationError(f"{path}: cannot be read ({error})") from error


class _Text:
    """A place in the text of a JSON file: ``window[at]``, with ``before`` characters read and let go."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self.path, self.file = path, file
        self.window, self.at, self.before, self.ended = "", 0, 0, False

    def peek(self) -> str:
        """The next character that is no space, where the place moves to; "" at the end."""
        while True:
            match = _SPACE.match(self.window, self.at)
            assert match is not None
            self.at = match.end()
            if self.at < len(self.window) or self.ended:
                return self.window[self.at : self.at + 1]
            self._more()

    def kind(self) -> str:
        """What stands at the place."""
        return _KINDS.get(self.peek(), "number")

    def value(self) -> Any:
        """The value at the place, which moves behind it."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.window, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.window) - _MARGIN
                if self.ended or not cut:
                    raise self.error(error.msg, error.pos) from None
            except RecursionError:
                raise self.error("nested too deeply") from None
            else:
                if self.ended or end <= len(self.window) - _MARGIN:
                    self.at = end
                    return value
            self._more()

    def items(self) -> Iterator[Any]:
        """The values of the list at the place."""
        self.at += 1
        if self.peek() == "]":
            self.at += 1
            return
        while True:
            yield self.value()
            if self._after("]"):
                return

    def members(self) -> Iterator[str]:
        """The names in the object at the place; its user moves over each value before asking for the next name."""
        self.at += 1
        if self.peek() == "}":
            self.at += 1
            return
        while True:
            if self.peek() != '"':
                raise self.error("expected a name in double quotes")
            name = self.value()
            if self.peek() != ":":
                raise self.error("expected ':'")
            self.at += 1
            yield name
            if self._after("}"):
                return

    def skip(self) -> None:
        """Move over the value at the place, without holding the whole of a list or an object."""
        mark = self.peek()
        if mark == "[":
            for _ in self.items():
                pass
        elif mark == "{":
            for _ in self.members():
                self.value()
        else:
            self.value()

    def error(self, what: str, at: int | None = None) -> AnnotationError:
        """``what`` is wrong at the place, or at another of the window."""
        place = self.before + (self.at if at is None else at)
        end = ", where it ends" if self.ended and not self.window[self.at if at is None else at :].strip() else ""
        return AnnotationError(f"{self.path}: not JSON ({what} at character {place}{end})")

    def _after(self, close: str) -> bool:
        """Move over a comma, or over ``close``: whether it was that."""
        mark = self.peek()
        if mark not in (",", close) or not mark:
            raise self.error(f"expected ',' or {close!r}")
        self.at += 1
        return mark == close

    def _more(self) -> None:
        """Let go what lies before the place, and read on: as much again as is kept, so that a long value costs once."""
        kept = self.window[self.at :]
        if len(kept) > LONGEST:
            raise self.error(f"a value of more than {LONGEST} characters")
        try:
            read = self.file.read(max(WINDOW, len(kept)))
        except (OSError, UnicodeDecodeError) as error:
            raise AnnotationError(f"{self.path}: cannot be read ({error})") from error
        self.before += self.at
        self.window, self.at, self.ended = kept + read, 0, not read
