"""Which record when: batches of Keys over several sources, in an order that (seed, epoch) alone decides.

A step is one batch for each of ``world`` processes, all of one source, and the sources take turns at random::

    mixture = Mixture([Source("grit", grit, ratio=0.1), Source("rec", rec)], batch_size=16, world=2, drop_last=True)
    list(mixture)     [16 of rec] [16 of rec]   [16 of grit] [16 of grit]   [16 of rec] …
                       rank 0      rank 1        rank 0       rank 1         rank 0

An epoch holds four bytes for each record it draws; Keys are made batch by batch, so that passing over batches (on
resume) reads nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from groma.data.records import Records

WINDOW = 8
"""So many blocks of neighbouring records are shuffled together, where a source asks to be read nearly in order."""


class Key(NamedTuple):
    """One record of one epoch: ``Mixture.sources[source].records[record]``."""

    source: int
    record: int
    epoch: int


@dataclass(frozen=True)
class Source:
    """A named data set and how much of it an epoch uses.

    ``ratio``: the share of its records (above 1: some are seen more than once); ``cap``: at most so many (0: no limit).
    """

    name: str
    records: Records
    ratio: float = 1.0
    cap: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.ratio < math.inf or len(self.records) == 0:
            got = f"ratio {self.ratio} of {len(self.records)} records"
            raise ValueError(f"source {self.name}: {got}, expected both above 0")
        if self.cap < 0:
            raise ValueError(f"source {self.name}: cap {self.cap}, expected 0 (no limit) or more")

    @property
    def count(self) -> int:
        """The records of an epoch."""
        count = max(1, round(self.ratio * len(self.records)))
        return min(count, self.cap) if self.cap else count


class Mixture:
    """A torch ``batch_sampler`` over several sources: every batch of Keys is from one source, sources are shuffled.

    The order depends on (seed, epoch) alone. With a ratio below 1, or a cap, each epoch draws its own share of the
    source. Records that have a ``locality`` (the number of neighbours to keep together, such as those of one archive)
    are drawn block by block, shuffled within a window of a few blocks; all others are shuffled wholly.

    ``world``: the number of processes; batches come in groups of that many from one source, one for each process.
    ``drop_last``: leave out records that fill no group; a source gives at least one, its share rounded up to it. More
    than one process needs it. Raises ValueError for a source too small for that.
    """

    def __init__(
        self, sources: Sequence[Source], batch_size: int, seed: int = 0, drop_last: bool = False, world: int = 1
    ) -> None:
        names = [source.name for source in sources]
        if not sources or len(set(names)) != len(names) or batch_size < 1:
            raise ValueError(f"got sources {names} and batch size {batch_size}, expected distinct names and at least 1")
        if world < 1 or (world > 1 and not drop_last):
            raise ValueError(f"got {world} processes, drop_last {drop_last}: more than one need batches of one size")
        self.sources, self.batch_size, self.seed, self.drop_last = tuple(sources), batch_size, seed, drop_last
        self.world = world
        self.epoch = 0
        self._counts = [self._count(source) for source in self.sources]

    def set_epoch(self, epoch: int) -> None:
        """Make the next iteration that of ``epoch``."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(math.ceil(count / self.batch_size) for count in self._counts)

    def __iter__(self) -> Iterator[list[Key]]:
        return self.batches(self.epoch)

    def batches(self, epoch: int) -> Iterator[list[Key]]:
        """All batches of ``epoch`` in order."""
        step = self.batch_size * self.world
        orders = [self._order(number, epoch) for number in range(len(self.sources))]
        steps = [math.ceil(count / step) for count in self._counts]
        turns = np.repeat(np.arange(len(orders), dtype=np.uint16), steps)
        self._draw(epoch, len(orders)).shuffle(turns)
        done = [0] * len(orders)
        for number in map(int, turns):
            rows = orders[number][done[number] : done[number] + step]
            done[number] += step
            for start in range(0, len(rows), self.batch_size):
                yield [Key(number, row, epoch) for row in rows[start : start + self.batch_size].tolist()]

    def _count(self, source: Source) -> int:
        """The records that an epoch takes from a source."""
        step = self.batch_size * self.world
        if not self.drop_last:
            return source.count
        if source.count < step and (len(source.records) < step or 0 < source.cap < step):
            where = f" for each of {self.world} processes" if self.world > 1 else ""
            raise ValueError(
                f"source {source.name}: {source.count} records an epoch (of {len(source.records)}, ratio "
                f"{source.ratio:g}, cap {source.cap}) fill no batch of {self.batch_size}{where}: expected a smaller "
                f"batch, or a ratio or cap that gives {step}"
            )
        return max(source.count // step * step, step)

    def _order(self, number: int, epoch: int) -> np.ndarray:
        """The records of a source in the order that ``epoch`` takes them."""
        draw, records, count = self._draw(epoch, number), self.sources[number].records, self._counts[number]
        parts: list[np.ndarray] = []
        while count > 0:
            parts.append(_shuffled(len(records), getattr(records, "locality", 0), count, draw))
            count -= len(parts[-1])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _draw(self, epoch: int, what: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, epoch, what])


def _shuffled(size: int, locality: int, wanted: int, draw: np.random.Generator) -> np.ndarray:
    """Up to ``wanted`` of the numbers below ``size``, each once, whole or by blocks of ``locality``."""
    kind = np.uint32 if size < 2**32 else np.uint64
    if not 0 < locality < size:
        order = np.arange(size, dtype=kind)
        draw.shuffle(order)
        return order if wanted >= size else order[:wanted].copy()
    starts = draw.permutation(math.ceil(size / locality)) * locality
    parts: list[np.ndarray] = []
    for first in range(0, len(starts), WINDOW):
        rows = (starts[first : first + WINDOW, None] + np.arange(locality)).ravel()
        rows = rows[rows < size].astype(kind)
        draw.shuffle(rows)
        parts.append(rows[:wanted])
        wanted -= len(parts[-1])
        if wanted == 0:
            break
    return np.concatenate(parts)
