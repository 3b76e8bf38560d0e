"""Read a pickle that holds plain values only: lists and dicts of strings, numbers, booleans and None.

A pickle is a program, and a hostile one runs what it likes. Here its opcodes are read before anything is built: those
that import, call or construct are refused, and so are tuples (no key of a dict can then be a nest too deep to hash) and
memo places that no file of this size needs. What is left builds plain values, no larger than the file allows.

Strings that Python 2 wrote as bytes come as UTF-8 where they are valid UTF-8, otherwise as Latin-1: see ``text``.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

from groma.data.records import AnnotationError

# Opcodes of the protocols 0 to 5, by what follows them: so many bytes, a length of so many bytes and that much, a line.
_FIXED = {ord(c): 0 for c in "(.N]}ldaesu"} | {0x88: 0, 0x89: 0, 0x94: 0}
_FIXED |= {ord("J"): 4, ord("K"): 1, ord("M"): 2, ord("G"): 8, ord("h"): 1, ord("q"): 1, ord("j"): 4}
_FIXED |= {0x80: 1, 0x95: 8}
_COUNTED = {ord("U"): 1, ord("T"): 4, ord("X"): 4, ord("C"): 1, ord("B"): 4, 0x8A: 1, 0x8B: 4, 0x8C: 1, 0x8D: 8}
_LINES = frozenset(b"ILFSVgp")
_STOP, _PUT, _LONG_PUT = ord("."), ord("p"), ord("r")
_BROKEN = (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError,
           MemoryError, RecursionError)  # fmt: skip


class _Plain(pickle.Unpickler):
    """The second lock: whatever passed the check of opcodes, nothing is imported."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def load_plain(path: Path) -> Any:
    """The value of the pickle file ``path``. Raises AnnotationError, in one line, for a file that is missing, broken,
    or more than plain values."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise AnnotationError(f"{path}: no such annotation file") from error
    except OSError as error:
        raise AnnotationError(f"{path}: cannot be read ({error})") from error
    try:
        _check(path, data)
        return _Plain(io.BytesIO(data), encoding="utf-8", errors="surrogateescape").load()
    except AnnotationError:
        raise
    except _BROKEN as error:
        raise AnnotationError(f"{path}: not a whole pickle ({error or type(error).__name__})") from error


def text(value: str) -> str:
    """A string of ``load_plain`` as it was meant: bytes that were no UTF-8 are read as Latin-1.

    Raises ValueError for half a surrogate pair, which is no text.

    >>> text("caf\\udce9")
    'café'
    """
    data = value.encode("utf-8", "surrogateescape")
    return value if value.isascii() or _is_utf8(data) else data.decode("latin-1")


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _check(path: Path, data: bytes) -> None:
    """Raise AnnotationError at the first opcode that does more than build plain values, ValueError for a cut file."""
    at, end = 0, len(data)
    while at < end:
        code = data[at]
        if (size := _FIXED.get(code)) is not None:
            if code == _STOP:
                return
            at += 1 + size
        elif (size := _COUNTED.get(code)) is not None:
            at += 1 + size + int.from_bytes(data[at + 1 : at + 1 + size], "little")
        elif code in _LINES or code == _LONG_PUT:
            stop = at + 5 if code == _LONG_PUT else data.index(b"\n", at) + 1
            if code in (_PUT, _LONG_PUT):
                digits = data[at + 1 : stop]
                place = int.from_bytes(digits, "little") if code == _LONG_PUT else int(digits)
                if not 0 <= place < end:
                    raise AnnotationError(f"{path}: byte {at}: memo place {place}, in a pickle of {end} bytes")
            at = stop
        else:
            raise AnnotationError(
                f"{path}: byte {at}: {_describe(data, at)}, expected only lists and dicts of strings and numbers"
            )
    raise ValueError(f"no end in {end} bytes")


def _describe(data: bytes, at: int) -> str:
    """The opcode at ``at`` in words, with the name that it imports."""
    words: list[str] = []
    for opcode, argument, place in pickletools.genops(data[: at + 300]):
        if place == at:
            if opcode.name in ("GLOBAL", "INST"):
                return f"the pickle names {str(argument).replace(' ', '.')}"
            if opcode.name == "STACK_GLOBAL":
                return f"the pickle names {'.'.join(words[-2:])}"
            return f"opcode {opcode.name}"
        if isinstance(argument, str) and opcode.name not in ("PUT", "GET"):
            words.append(argument[:60])
    return "an unknown opcode"
