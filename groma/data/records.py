"""What all readers share: annotation records to packed entries once, entries to Samples whenever one is asked for.

A reader says how its files become entries (``_read``: JSON values, one a Sample, everything checked) and how an entry
becomes a Sample (``_sample``, with the random draws of the epoch)::

    class Captions(Records):
        def _read(self):
            for image in json_items(self.file, "images"):
                entry = self._usable(self._entry, image)
                if entry is not None:
                    yield entry

        def _sample(self, entry, draw):
            name, text = entry
            return Sample(self.path(name), self.name_of(name), (Turn("user", "…"), Turn("assistant", text)))

A record that cannot be used is left out and noted in ``problems``; more of them than a share stop the reading. Entries
of large files are kept on disk for later runs (groma.data.store).
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from groma.data.store import Packed, Problems, pack
from groma.structures import Sample

Record = dict[str, Any]
Entry = Any
"""A JSON value: what a reader keeps of one Sample."""
T = TypeVar("T")

MAX_PROBLEMS = 0.01
"""Share of records that may be unusable before a file is refused."""


class AnnotationError(ValueError):
    """A record of an annotation file that cannot be used; the message names the file and the record."""


class Records:
    """A map-style data set of Samples, whose random draws depend on (seed, epoch, index) and on nothing else.

    ``annotations``: the file (or folder) of annotations; ``images``: the folder that image names are relative to.
    ``problems``: one line for each record left out, of many the first; ``problems.total`` counts all. Raises
    AnnotationError where the file cannot be read, or where more than ``max_problems`` (a share) of its records, or of
    the annotations in them, cannot be used, and CacheError where the folder for large indexes cannot.
    """

    version = 1
    """Of what ``_read`` yields: a change of it makes indexes built earlier invalid."""

    def __init__(
        self, annotations: str | Path, images: str | Path, seed: int = 0, max_problems: float = MAX_PROBLEMS
    ) -> None:
        self.file, self.images, self.seed, self.epoch = Path(annotations), Path(images), seed, 0
        self._noted = Problems()
        key = f"{type(self).__qualname__} {self.version} {self._options()}"
        self.entries: Packed = pack(self._read, self._noted, self._files(), key)
        self.problems: Problems = self.entries.problems
        lost, parts = self.problems.total - self.problems.parts, self.problems.parts
        total, seen = len(self.entries) + lost, self.problems.parts_seen
        if lost > max_problems * total or parts > max_problems * seen:
            if self.entries.folder is not None:  # what was wrong may lie outside of the files: look again next time
                shutil.rmtree(self.entries.folder, ignore_errors=True)
            whole = lost > max_problems * total
            told = f"{lost} of {total} records" if whole else f"{parts} of {seen} parts of records"
            raise AnnotationError(
                f"{self.file}: {told} unusable, more than {max_problems:.1%}; the first: {self.problems[0]}"
            )

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:
        return self._sample(self.entries[index], self._random(index))

    def set_epoch(self, epoch: int) -> None:
        """Make the draws those of ``epoch``."""
        self.epoch = epoch

    def path(self, name: str) -> str:
        """Where the image called ``name`` is."""
        return str(self.images / name)

    def name_of(self, record: Any) -> str:
        """What a record is called in messages: "rec.json#17"."""
        return f"{self.file.name}#{record}"

    # -- for a reader to write

    def _read(self) -> Iterator[Entry]:
        """Every entry in order. What it yields is packed, and kept for later runs where it is large.

        Asked once; twice where small files give large entries (store.LARGE). It should hold no list of them all.
        """
        raise NotImplementedError

    def _sample(self, entry: Entry, draw: random.Random) -> Sample:
        """The Sample of an entry, with the draws of its epoch."""
        raise NotImplementedError

    def _files(self) -> list[Path]:
        """Every file that ``_read`` reads: an index is built again when one of them changes."""
        return [self.file]

    def _options(self) -> str:
        """The arguments that ``_read`` depends on, as text: another index for others. Set them before __init__."""
        return ""

    # -- for a reader to use

    def _usable(self, read: Callable[..., T], *arguments: Any) -> T | None:
        """``read(*arguments)``, or None where it raises AnnotationError, which becomes a problem."""
        try:
            return read(*arguments)
        except AnnotationError as error:
            self._noted.append(str(error))
            return None

    def _usable_part(self, read: Callable[..., T], *arguments: Any) -> T | None:
        """The same of a part of a record, an annotation of its image: the record can be used without it.

        Add the parts there are to ``_noted.parts_seen``.
        """
        try:
            return read(*arguments)
        except AnnotationError as error:
            self._noted.part(str(error))
            return None

    def _random(self, index: int) -> random.Random:
        return random.Random(f"{self.seed}/{self.epoch}/{index}")


def field(record: Any, key: str, kind: type | tuple[type, ...], file: Path) -> Any:
    """``record[key]`` of the given type. Raises AnnotationError naming file and record."""
    if not isinstance(record, dict):
        raise AnnotationError(f"{file}: got {record!r:.60}, expected an object with {key!r}")
    value = record.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        got = f"{key} = {value!r:.60}" if key in record else f"no {key!r}; it has {sorted(map(str, record))}"
        names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise AnnotationError(f"{file}: {name_record(record)}: {got}, expected {names}")
    return value


def name_record(record: Record) -> str:
    """What a record is called in a message about its file."""
    return f"record {record['id']}" if "id" in record else f"record {record!r:.60}"
