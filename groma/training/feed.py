"""From batch keys to the batches of one process: its share of them, by epoch, with bad records told in one line."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from groma.settings import RunConfig
from groma.structures import Batch


class BatchSampler(Protocol):
    """Lists of record keys, one list a batch; the same epoch always gives the same lists."""

    def __iter__(self) -> Iterator[list[Any]]: ...
    def __len__(self) -> int: ...
    def set_epoch(self, epoch: int) -> None: ...


class RankShare(Sampler[list[Any]]):
    """The batches of one process: every ``world``-th of ``batches``, the same number for each process."""

    def __init__(self, batches: BatchSampler, rank: int, world: int) -> None:
        self.batches, self.rank, self.world = batches, rank, world

    def __len__(self) -> int:
        return len(self.batches) // self.world

    def __iter__(self) -> Iterator[list[Any]]:
        for index, batch in enumerate(self.batches):
            if index // self.world < len(self) and index % self.world == self.rank:
                yield batch

    def set_epoch(self, epoch: int) -> None:
        self.batches.set_epoch(epoch)


class EpochLoader(DataLoader[Any]):
    """A data loader whose batch sampler hears about the epoch, as the Trainer announces it."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


def loader(
    run: RunConfig,
    dataset: Dataset[Any],
    samples: BatchSampler,
    collate: Callable[[list[Any]], Batch],
    rank: int,
    world: int,
) -> EpochLoader:
    """The batches of process ``rank`` of ``world``: mappings {"batch": Batch} or {"error": one line}."""
    workers = run.data.workers
    return EpochLoader(
        Fetch(dataset),
        batch_sampler=RankShare(samples, rank, world),
        collate_fn=Collate(collate),
        num_workers=workers,
        persistent_workers=workers > 0,
        prefetch_factor=run.data.prefetch if workers else None,
        worker_init_fn=outlive_one_sigterm,
        # Its own generator: drawing the workers' seeds must not move the global random state.
        generator=torch.Generator().manual_seed(run.seed),
    )


class Fetch(Dataset[Any]):
    """A dataset whose bad records come as values: an error raised in a worker process would arrive as a traceback."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.dataset[key]
        except ValueError as error:
            return error

    def __getitems__(self, keys: list[Any]) -> list[Any]:
        """A batch as the dataset makes it, if it has a way of its own: a stand-in where no record of it is usable."""
        whole = getattr(self.dataset, "__getitems__", None)
        if whole is None:
            return [self[key] for key in keys]
        try:
            return list(whole(keys))
        except ValueError as error:
            return [error]


class Collate:
    """Collates to a mapping, which the Trainer passes on as it is: {"batch": Batch}, or {"error": one line}."""

    def __init__(self, collate: Callable[[list[Any]], Batch]) -> None:
        self.collate = collate

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        for example in examples:
            if isinstance(example, ValueError):
                return {"error": str(example)}
        try:
            return {"batch": self.collate(examples)}
        except ValueError as error:
            return {"error": str(error)}


def outlive_one_sigterm(worker: int) -> None:
    """A scheduler that ends a job signals every process of it; without its workers the run could not save itself.

    The second signal, which is the parent's own at its exit, ends the worker.
    """
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
