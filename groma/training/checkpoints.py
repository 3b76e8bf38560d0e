"""Resumable checkpoints: ``checkpoint-N`` folders that are either complete or not there.

A folder is written under a hidden name, synced, renamed, and gets its ``COMPLETE`` file last; so a process killed at
any moment leaves the previous checkpoint as the newest complete one.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from groma.data.cache import sync
from groma.training.frozen import learnt, restore_learnt
from groma.training.parts import TrainingError

MARKER = "COMPLETE"
WEIGHTS = "weights.pt"
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints(output: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    if not output.is_dir():
        return []
    found = [
        (int(m.group(1)), p) for p in output.iterdir() if (m := _NAME.fullmatch(p.name)) and (p / MARKER).is_file()
    ]
    return [path for _, path in sorted(found)]


def step_of(checkpoint: Path) -> int:
    """The number of optimiser steps behind a ``checkpoint-N``."""
    match = _NAME.fullmatch(checkpoint.name)
    if match is None:
        raise TrainingError(f"{checkpoint}: expected a folder named checkpoint-N")
    return int(match.group(1))


def begin(output: Path, step: int) -> Path:
    """An empty hidden folder to write the checkpoint of ``step`` into; left-overs of killed runs are removed."""
    output.mkdir(parents=True, exist_ok=True)
    for stale in output.glob(".checkpoint-*"):
        shutil.rmtree(stale)
    folder = output / f".checkpoint-{step}"
    folder.mkdir()
    return folder


def commit(folder: Path, keep: int) -> Path:
    """Make a folder from ``begin`` the newest complete checkpoint, then delete all but the last ``keep``."""
    _sync_all(folder)
    final = folder.with_name(folder.name.removeprefix("."))
    if final.exists():  # a resumed run rewrites a checkpoint it had, or one that never completed
        (final / MARKER).unlink(missing_ok=True)
        shutil.rmtree(final)
    folder.rename(final)
    sync(final.parent)
    (final / MARKER).write_text(f"step {step_of(final)}\n")
    sync(final / MARKER)
    sync(final)
    for old in checkpoints(final.parent)[:-keep]:
        shutil.rmtree(old.rename(old.with_name(f".{old.name}")))  # first hidden: a half-deleted one never counts
    return final


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A hidden folder to write into, which becomes ``folder`` when the block ends well and is removed when not."""
    hidden = folder.with_name(f".{folder.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir(parents=True)
    written = False
    try:
        yield hidden
        _sync_all(hidden)
        written = True
    finally:
        if not written:
            shutil.rmtree(hidden, ignore_errors=True)
    if folder.exists():
        shutil.rmtree(folder)
    hidden.rename(folder)
    sync(folder.parent)


def save_weights(model: nn.Module, folder: Path, learnt_only: bool = False) -> None:
    """Write every parameter and buffer under its own name, or the parameters that learn alone.

    Not save_pretrained: transformers renames weights on the way out, and the Trainer does not rename them back.
    """
    torch.save(learnt(model) if learnt_only else model.state_dict(), folder / WEIGHTS)


def load_weights(model: nn.Module, folder: Path) -> None:
    """Restore exactly what ``save_weights`` wrote; raises TrainingError when names or shapes differ."""
    state = torch.load(folder / WEIGHTS, map_location="cpu", weights_only=True)
    if state.keys() == learnt(model).keys():
        restore_learnt(model, state, str(folder))
        return
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise TrainingError(f"{folder} is of another model: {' '.join(str(error).split())[:300]}") from error


def _sync_all(folder: Path) -> None:
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)
