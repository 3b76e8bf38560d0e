"""Entries packed into one buffer: no Python object a record, shared by worker processes, and mapped from disk if large.

``pack`` reads annotation files once. What small files give stays in memory (a few hundred bytes a record); what large
ones give is written to an index folder under ``$GROMA_CACHE`` (default ~/.cache/groma), from where every later start,
every rank and every worker maps it. ``Spill`` brings together what lies apart in a file larger than memory.

    $GROMA_CACHE/entries/rec.json-…/entries.bin  ends.npy  meta.json
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from groma.data.cache import CacheError, build_once, cache, found, meta_of, state_of, writing

LARGE = 32 << 20
"""Bytes: annotation files of more than this together, and entries of more than this, are kept on disk."""
PROBLEMS_KEPT = 1000
"""How many problems are told in words; all are counted."""
_CHUNK = 1 << 20
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


class Problems(list[str]):
    """What was wrong, a line each: the first PROBLEMS_KEPT in words; ``total`` counts all that were appended.

    Of them, ``parts`` cost a part of a record only (an annotation of an image), of ``parts_seen`` that were looked at.
    """

    def __init__(self, lines: Iterable[str] = (), total: int = 0, parts: int = 0, parts_seen: int = 0) -> None:
        super().__init__(lines)
        self.total, self.parts, self.parts_seen = max(total, len(self)), parts, parts_seen

    def append(self, line: str) -> None:
        """Count one more, and keep its words while there is room."""
        self.total += 1
        if len(self) < PROBLEMS_KEPT:
            super().append(line)

    def extend(self, lines: Iterable[str]) -> None:
        """Append each."""
        for line in lines:
            self.append(line)

    def clear(self) -> None:
        """Forget all, the count too."""
        super().clear()
        self.total = self.parts = self.parts_seen = 0

    def part(self, line: str) -> None:
        """Count a part of a record that is left out; who looks at parts counts those seen."""
        self.parts += 1
        self.append(line)

    def __reduce__(self) -> tuple[type[Problems], tuple[Any, ...]]:
        """As it is: a list's own way would append each line once more."""
        return type(self), (list(self), self.total, self.parts, self.parts_seen)


class Packed(Sequence[Any]):
    """JSON values, packed: ``data`` (bytes, uint8) holds one after the other, ``ends`` (N, int64) where each ends.

    ``folder``: the index folder both are mapped from. Sent to another process, such a Packed goes by its name.
    """

    def __init__(self, data: np.ndarray, ends: np.ndarray, problems: list[str], folder: Path | None = None) -> None:
        self.data, self.ends, self.folder = data, ends, folder
        self.problems = problems if isinstance(problems, Problems) else Problems(problems)

    @classmethod
    def map(cls, folder: Path) -> Packed:
        """The Packed of an index folder. Raises CacheError where it is gone."""
        try:
            meta = meta_of(folder)
            ends = np.load(folder / "ends.npy", mmap_mode="r")
            data = np.memmap(folder / "entries.bin", np.uint8, "r") if len(ends) else np.zeros(0, np.uint8)
        except (OSError, ValueError) as error:
            raise CacheError(f"{folder}: the index is gone or damaged ({error}); delete what is left of it") from error
        # Plain views of the maps: a memmap's own slices cost more than the entry.
        problems = Problems(meta["problems"], *meta["problem_counts"])
        return cls(np.asarray(data), np.asarray(ends), problems, folder)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self.ends):
            raise IndexError(f"entry {index} of {len(self.ends)}")
        start = int(self.ends[index - 1]) if index else 0
        return json.loads(self.data[start : int(self.ends[index])].tobytes())

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        """By the folder's name where there is one."""
        if self.folder is not None:
            return Packed.map, (self.folder,)
        return Packed, (self.data, self.ends, self.problems)

    @property
    def nbytes(self) -> int:
        """Bytes of data and offsets, in memory or mapped."""
        return int(self.data.nbytes + self.ends.nbytes)


def pack(read: Callable[[], Iterable[Any]], problems: Problems, files: Sequence[Path], key: str) -> Packed:
    """The entries of ``read()``, with the ``problems`` it noted meanwhile.

    Large ones are read once for each state of ``files`` (size and time) and each ``key``, by one process while others
    that want them wait. Where small files give large entries, those are read twice. Raises CacheError.
    """

    def build(folder: Path) -> dict[str, Any]:
        problems.clear()
        with writing(folder):
            file = (folder / "entries.bin").open("wb", buffering=0)
        with file:
            entries = Entries(file)
            for entry in read():
                entries.add(entry)
            entries.flush()
        with writing(folder):
            np.save(folder / "ends.npy", np.frombuffer(entries.ends, np.int64))
        counts = [problems.total, problems.parts, problems.parts_seen]
        return {"problems": list(problems), "problem_counts": counts}

    if sum(max(size, 0) for _, size, _ in map(state_of, files)) <= LARGE and found("entries", key, files) is None:
        entries = Entries()
        for entry in read():
            entries.add(entry)
            if len(entries.buffer) > LARGE:
                break
        else:
            ends = np.frombuffer(entries.ends, np.int64)
            return Packed(np.frombuffer(entries.buffer, np.uint8), ends, problems)
    return Packed.map(build_once("entries", key, files, build))


class Entries:
    """JSON values written one after the other, to the unbuffered ``file`` or without one to ``buffer``.

    ``ends`` (N, int64): where each ends. ``flush`` before reading what is in the file.
    """

    def __init__(self, file: IO[bytes] | None = None) -> None:
        self.file, self.buffer, self.ends, self._written = file, bytearray(), array("q"), 0

    def add(self, value: Any) -> None:
        """Append one. Raises CacheError for a full disk."""
        # Lone surrogates are legal in JSON's escapes; json.loads reads them back.
        self.buffer += _ENCODER.encode(value).encode("utf-8", "surrogatepass")
        self.ends.append(self._written + len(self.buffer))
        if self.file is not None and len(self.buffer) > _CHUNK:
            self.flush()

    def flush(self) -> None:
        """Write what is in the buffer to the file. Raises CacheError for a full disk."""
        assert self.file is not None
        with writing(cache()), memoryview(self.buffer) as view:
            done = 0
            while done < len(view):
                done += self.file.write(view[done:])
        self._written += len(self.buffer)
        self.buffer.clear()

    def __getitem__(self, index: int) -> Any:
        start, end = self.ends[index - 1] if index else 0, self.ends[index]
        inside = self.buffer[start:end] if self.file is None else os.pread(self.file.fileno(), end - start, start)
        return json.loads(inside)


class Spill:
    """JSON values put aside under a key (an integer or a string), to be read back key by key.

    In memory up to LARGE, then in a nameless file of the cache folder; some 30 bytes of memory a value beside that.
    All are added before the first is read::

        spill = Spill()
        for mark in annotations:
            spill.add(mark["image_id"], mark)
        spill[17]        # those of image 17, in the order they were added
        list(spill)      # a list for each key, by first appearance
    """

    def __init__(self) -> None:
        self._entries, self._added = Entries(), array("q")
        self._sorted = False

    def add(self, key: int | str, value: Any) -> None:
        """Put one aside. Raises CacheError for a full disk."""
        assert not self._sorted, "all are added before the first is read"
        self._entries.add(value)
        self._added.append(digest(key))
        if self._entries.file is None and len(self._entries.buffer) > LARGE:
            with writing(cache()):
                cache().mkdir(parents=True, exist_ok=True)
                self._entries.file = tempfile.TemporaryFile(dir=cache(), buffering=0)  # noqa: SIM115
            self._entries.flush()

    def __getitem__(self, key: int | str) -> list[Any]:
        self._sort()
        number = digest(key)
        row = int(np.searchsorted(self._keys, number))
        return self._values(row) if row < len(self._keys) and self._keys[row] == number else []

    def __iter__(self) -> Iterator[list[Any]]:
        self._sort()
        firsts = self._order[self._starts[:-1]]
        return (self._values(int(row)) for row in np.argsort(firsts))

    def repeats(self) -> Iterator[Any]:
        """The values that are not the first of their key, in the order they were added."""
        self._sort()
        first = np.zeros(len(self._order), bool)
        first[self._starts[:-1]] = True
        return self._in_order(~first)

    def others(self, spill: Spill) -> Iterator[Any]:
        """The values under keys that ``spill`` does not have, in the order they were added."""
        self._sort()
        spill._sort()
        return self._in_order(np.repeat(~np.isin(self._keys, spill._keys, assume_unique=True), np.diff(self._starts)))

    def _in_order(self, chosen: np.ndarray) -> Iterator[Any]:
        return (self._entries[int(i)] for i in np.sort(self._order[chosen]))

    def _values(self, row: int) -> list[Any]:
        return [self._entries[int(i)] for i in self._order[self._starts[row] : self._starts[row + 1]]]

    def _sort(self) -> None:
        if self._sorted:
            return
        if self._entries.file is not None:
            self._entries.flush()
        added = np.frombuffer(self._added, np.int64)
        self._order = np.argsort(added, kind="stable")
        self._keys, starts = np.unique(added[self._order], return_index=True)
        self._starts = np.append(starts, len(added))
        self._added, self._sorted = array("q"), True


def digest(key: int | str) -> int:
    """A key as 63 bits: an integer under 2^62 itself, another key a hash (two of 20 M agree once in 20,000 files)."""
    if isinstance(key, int) and abs(key) < 1 << 62:
        return key
    code = hashlib.blake2b(repr(key).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(code, "little") >> 2 | 1 << 62
