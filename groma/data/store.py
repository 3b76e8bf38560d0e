"""Entries packed into one buffer: no Python object a record, shared by worker processes, and mapped from disk if large.

``pack`` reads annotation files once. What small files give stays in memory (a few hundred bytes a record); what large
ones give is written to an index folder under ``$GROMA_CACHE`` (default ~/.cache/groma), from where every later start,
every rank and every worker maps it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np


class Packed(Sequence[Any]):
    """JSON values, packed: ``data`` (bytes, uint8) holds one after the other, ``ends`` (N, int64) where each ends."""

    def __init__(self, data: np.ndarray, ends: np.ndarray, problems: list[str]) -> None:
        self.data, self.ends, self.problems = data, ends, problems

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self.ends):
            raise IndexError(f"entry {index} of {len(self.ends)}")
        start = int(self.ends[index - 1]) if index else 0
        return json.loads(self.data[start : int(self.ends[index])].tobytes())

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    @property
    def nbytes(self) -> int:
        """Bytes of data and offsets, in memory or mapped."""
        return int(self.data.nbytes + self.ends.nbytes)


def pack(read: Callable[[], Iterable[Any]], problems: list[str], files: Sequence[Path], key: str) -> Packed:
    """The entries of ``read()``, with the ``problems`` it noted meanwhile."""
    data, ends = bytearray(), []
    for entry in read():
        data += json.dumps(entry, ensure_ascii=False, separators=(",", ":")).encode()
        ends.append(len(data))
    return Packed(np.frombuffer(bytes(data), np.uint8), np.array(ends, np.int64), list(problems))
