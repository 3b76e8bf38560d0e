"""The mixture: shares, caps, steps of one source for all processes, order by epoch, blocks of neighbours, memory."""

from __future__ import annotations

import itertools
import tracemalloc
from collections import Counter
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader, Dataset

from groma.data.mixture import WINDOW, Key, Mixture, Source
from groma.training.feed import RankShare


class Numbers:
    """Stands for the records of a set; the mixture asks how many there are, and must not read one."""

    def __init__(self, size: int, locality: int = 0) -> None:
        self.size, self.locality = size, locality

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        raise AssertionError(f"record {index} is read")


def source(size: int, name: str = "a", locality: int = 0, **share: Any) -> Source:
    return Source(name, Numbers(size, locality), **share)  # type: ignore[arg-type]


def records(mixture: Mixture, epoch: int = 0, of: int = 0) -> list[int]:
    return [key.record for batch in mixture.batches(epoch) for key in batch if key.source == of]


def test_an_epoch() -> None:
    mixture = Mixture([source(3, "a", ratio=3.0), source(3, "b")], batch_size=2, seed=4)
    first = list(mixture)
    assert len(mixture) == len(first) == 5 + 2  # 9 of three records, 3
    assert all(len({key.source for key in batch}) == 1 for batch in first)
    assert Counter(key for batch in first for key in batch) == {
        **{Key(0, i, 0): 3 for i in range(3)},
        **{Key(1, i, 0): 1 for i in range(3)},
    }
    assert first == list(mixture) == list(mixture.batches(0))
    mixture.set_epoch(1)
    assert list(mixture) != first
    assert {key.epoch for batch in mixture for key in batch} == {1}
    assert list(mixture) == list(Mixture(mixture.sources, 2, seed=4).batches(1))
    assert list(mixture) != list(Mixture(mixture.sources, 2, seed=5).batches(1))


def test_each_repetition_of_a_source_has_an_order_of_its_own() -> None:
    order = records(Mixture([source(50, ratio=2.5)], batch_size=7))
    assert len(order) == 125
    assert sorted(order[:50]) == sorted(order[50:100]) == list(range(50))
    assert order[:50] != order[50:100]
    assert len(set(order[100:])) == 25


def test_incomplete_batches_are_left_out() -> None:
    mixture = Mixture([source(11)], batch_size=4, drop_last=True)
    assert [len(batch) for batch in mixture] == [4, 4]
    assert len(mixture) == 2
    assert set(records(mixture, 0)) != set(records(mixture, 1))  # others each time
    assert [len(batch) for batch in Mixture([source(11)], batch_size=4)] == [4, 4, 3]


@pytest.mark.parametrize("share", [{"ratio": 0.2}, {"cap": 20}, {"ratio": 3.0, "cap": 20}, {"ratio": 0.2, "cap": 90}])
def test_a_share_is_drawn_anew_each_epoch(share: dict[str, Any]) -> None:
    mixture = Mixture([source(100, **share)], batch_size=8)
    drawn = [set(records(mixture, epoch)) for epoch in (0, 1)]
    assert [len(found) for found in drawn] == [20, 20]
    assert drawn[0] != drawn[1]


def test_the_processes_share_every_step_of_a_source() -> None:
    sources = [source(64, "a"), source(32, "b", ratio=2.0), source(40, "c")]
    mixture = Mixture(sources, batch_size=4, seed=1, drop_last=True, world=2)
    shares = [list(RankShare(mixture, rank, 2)) for rank in (0, 1)]
    assert len(shares[0]) == len(shares[1]) == len(mixture) // 2 == 8 + 8 + 5
    of = [[batch[0].source for batch in share] for share in shares]
    assert of[0] == of[1]  # the same source at every step,
    assert of[0] != sorted(of[0])  # the sources in turn
    seen = [Counter((key.source, key.record) for batch in share for key in batch) for share in shares]
    everything = {(0, i): 1 for i in range(64)} | {(1, i): 2 for i in range(32)} | {(2, i): 1 for i in range(40)}
    assert seen[0] + seen[1] == everything
    assert not {k for k in seen[0] if k[0] != 1} & {k for k in seen[1] if k[0] != 1}


def test_processes_and_their_workers_see_every_record_once() -> None:
    class Keys(Dataset[Key]):
        def __getitem__(self, key: Key) -> Key:
            return key

    mixture = Mixture([source(48, "a"), source(16, "b", locality=4)], batch_size=2, drop_last=True, world=2)
    seen = [
        [key for batch in DataLoader(Keys(), batch_sampler=RankShare(mixture, rank, 2), collate_fn=list, num_workers=2)
         for key in batch]
        for rank in (0, 1)
    ]  # fmt: skip
    assert [len(keys) for keys in seen] == [32, 32]
    assert {key[:2] for key in seen[0] + seen[1]} == {(0, i) for i in range(48)} | {(1, i) for i in range(16)}


def test_two_processes_take_the_steps_of_one_with_a_batch_twice_as_large() -> None:
    sources = [source(37, "a"), source(90, "b", ratio=0.5)]
    alone = list(Mixture(sources, batch_size=6, seed=2, drop_last=True))
    two = list(Mixture(sources, batch_size=3, seed=2, drop_last=True, world=2))
    assert [two[i] + two[i + 1] for i in range(0, len(two), 2)] == alone


def test_a_source_gives_at_least_one_step() -> None:
    mixture = Mixture([source(100, "a"), source(20, "b", ratio=0.1)], batch_size=4, drop_last=True, world=2)
    assert len(set(records(mixture, of=1))) == 8  # two records are its share, eight a step
    for small, says in ((source(7), "7 records an epoch"), (source(100, cap=7), "ratio 1, cap 7")):
        with pytest.raises(ValueError, match=rf"source a: .*{says}.*no batch of 4 for each of 2 processes.*gives 8"):
            Mixture([small], batch_size=4, drop_last=True, world=2)
    assert len(records(Mixture([source(7, ratio=1.2)], batch_size=4, drop_last=True, world=2))) == 8


def test_bad_mixtures() -> None:
    for share, says in (
        ({"ratio": 0}, "ratio 0 of 3"),
        ({"ratio": float("nan")}, "ratio nan"),
        ({"cap": -1}, "cap -1"),
    ):
        with pytest.raises(ValueError, match=says):
            source(3, **share)
    with pytest.raises(ValueError, match="ratio 1.0 of 0 records"):
        source(0)
    with pytest.raises(ValueError, match="distinct names"):
        Mixture([source(3), source(3)], 2)
    with pytest.raises(ValueError, match="fill no batch of 8"):
        Mixture([source(3)], 8, drop_last=True)
    with pytest.raises(ValueError, match="2 processes, drop_last False"):
        Mixture([source(30)], 8, world=2)


def test_neighbours_stay_near_each_other() -> None:
    mixture = Mixture([source(10_000, "near", locality=100), source(5_000, "far")], batch_size=10, drop_last=True)
    order = np.array(records(mixture))
    assert sorted(order) == list(range(10_000))
    window = WINDOW * 100
    blocks = [set(order[i : i + window] // 100) for i in range(0, 10_000, window)]
    assert max(map(len, blocks)) == WINDOW  # so many archives are read at a time, each once
    assert sum(map(len, blocks)) == 100
    assert (np.diff(order) == 1).mean() < 0.05  # but not one after the other
    assert order[0] // 100 != 0 or blocks[0] != set(range(WINDOW))
    assert list(order) != records(mixture, epoch=1)
    part = Mixture([source(10_000, locality=100, ratio=0.1), source(10_050, "b", locality=100)], batch_size=10)
    assert len({r // 100 for r in records(part)}) <= 16  # a tenth of the records from a tenth of the archives, or so
    assert sorted(records(part, of=1)) == list(range(10_050))


def test_millions_of_records_take_a_few_bytes_each() -> None:
    size = 2_000_000
    sources = [source(size), source(size, "b", locality=1000, ratio=0.5)]
    mixture = Mixture(sources, batch_size=16, drop_last=True, world=8)
    tracemalloc.start()
    try:
        batches = iter(mixture)
        next(batches)
        peak = tracemalloc.get_traced_memory()[1]
        assert peak < 8 * 1.5 * size
        sum(1 for _ in itertools.islice(batches, 10_000))
        assert tracemalloc.get_traced_memory()[1] < peak + 1_000_000  # batches are made one by one
    finally:
        tracemalloc.stop()
