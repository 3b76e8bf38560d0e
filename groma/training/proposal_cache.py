"""Proposals of a frozen encoder and proposer, kept on disk from one epoch, and one run, to the next.

A cache is a folder named by a fingerprint of what decides the proposals: the weights of both parts, their settings, the
side of the image, the number format. Other weights make another folder, so nothing has to be thrown away. Every process
appends to a pair of files of its own: NAME.boxes has a record of fixed size per image, NAME.keys 16 bytes that say of
which. Nobody else writes them, so any number of processes may share a folder; what a killed one left unfinished at the
end of a file is not read. An image is known by its path: a changed picture needs another name, or an emptied folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch

from groma.settings import RunConfig
from groma.structures import Proposals
from groma.training.frozen import fingerprint
from groma.training.parts import TrainingError

if TYPE_CHECKING:
    from groma.model.groma import GromaForConditionalGeneration

KEY = 16
ROWS = 40
"""Bits of a place that say which row of a file."""
LOOK_AGAIN = 1000
"""After so many images that were not there, see what other processes have written since."""


class ProposalCache:
    """``find`` before a forward pass, ``add`` after it; ``queries`` proposals an image in ``folder``."""

    def __init__(self, folder: Path, queries: int) -> None:
        self.folder, self.queries = folder, queries
        self._record = np.dtype([("boxes", "<f4", (queries, 4)), ("scores", "<f4", (queries,)), ("check", "<u4")])
        self._mine = uuid.uuid4().hex
        self._names = [self._mine]  # of files; a place is the number of a file and a row in it
        self._read = {self._mine: 0}  # of every file, how many records are in the index
        self._open: dict[str, BinaryIO] = {}
        self._written: tuple[BinaryIO, BinaryIO] | None = None
        # 16 bytes an image, sorted by the first half of its key, and what this process has added since
        self._keys, self._places = np.zeros(0, "<u8"), np.zeros(0, "<i8")
        self._recent: dict[int, int] = {}
        self._full = False
        self._missed = 0
        self._look()

    def __len__(self) -> int:
        return len(self._keys) + len(self._recent)

    def find(self, images: Sequence[str]) -> list[Proposals | None]:
        """The proposals of every image by its path, exactly as they were added; None for one that is not there."""
        found = [self._get(_key(image)) for image in images]
        self._missed += sum(proposals is None for proposals in found)
        if self._missed >= LOOK_AGAIN:
            self._missed = 0
            self._look()
        return found

    def add(self, images: Sequence[str], proposals: Sequence[Proposals]) -> None:
        """Keep what was found in images that are not there yet; nothing more once the disk is full."""
        for image, found in zip(images, proposals, strict=True):
            key = _key(image)
            if self._full or len(found) != self.queries or self._place(key) is not None:
                continue
            record = np.zeros((), self._record)
            record["boxes"], record["scores"] = found.boxes.detach().float().cpu(), found.scores.detach().float().cpu()
            record["check"] = _check(key, record)
            try:
                self._append(record.tobytes(), key)
            except OSError:
                self._full = True

    def _append(self, record: bytes, key: bytes) -> None:
        """Record first, key second: a key without its record would be read as one."""
        if self._written is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / self._mine
            self._written = path.with_suffix(".boxes").open("ab", 0), path.with_suffix(".keys").open("ab", 0)
        for file, content in zip(self._written, (record, key), strict=True):
            if file.write(content) != len(content):
                raise OSError("disk full")
        self._recent[_half(key)] = self._read[self._mine]  # of file 0
        self._read[self._mine] += 1

    def _look(self) -> None:
        """Index the records that were added to any file of the folder since the last time."""
        keys, places = [self._keys], [self._places]
        for path in sorted(self.folder.glob("*.keys")):
            boxes = path.with_suffix(".boxes")
            if path.stem == self._mine or not boxes.is_file():
                continue
            if path.stem not in self._read:
                self._names.append(path.stem)
                self._read[path.stem] = 0
            start, number = self._read[path.stem], self._names.index(path.stem)
            with path.open("rb") as file:
                file.seek(start * KEY)
                new = file.read()
            rows = max(0, min(len(new) // KEY, boxes.stat().st_size // self._record.itemsize - start))
            keys.append(np.frombuffer(new[: rows * KEY], "<u8")[::2])
            places.append((number << ROWS) + np.arange(start, start + rows, dtype="<i8"))
            self._read[path.stem] = start + rows
        self._keys, first = np.unique(np.concatenate(keys), return_index=True)
        self._places = np.concatenate(places)[first]

    def _place(self, key: bytes) -> int | None:
        half = _half(key)
        if half in self._recent:
            return self._recent[half]
        at = int(np.searchsorted(self._keys, np.uint64(half)))
        return int(self._places[at]) if at < len(self._keys) and int(self._keys[at]) == half else None

    def _get(self, key: bytes) -> Proposals | None:
        """None also for a record that a power failure left undone, or one of another key with the same first half."""
        place = self._place(key)
        if place is None:
            return None
        name, row = self._names[place >> ROWS], place & ((1 << ROWS) - 1)
        if name not in self._open:
            self._open[name] = (self.folder / name).with_suffix(".boxes").open("rb")
        file = self._open[name]
        file.seek(row * self._record.itemsize)
        content = file.read(self._record.itemsize)
        record = np.frombuffer(content, self._record)[0] if len(content) == self._record.itemsize else None
        if record is None or record["check"] != _check(key, record):
            return None
        return Proposals(torch.from_numpy(record["boxes"].copy()), torch.from_numpy(record["scores"].copy()))


def open_cache(model: GromaForConditionalGeneration, run: RunConfig) -> ProposalCache | None:
    """The cache that data.proposal_cache names, for the weights ``model`` has now; None where it names none.

    Raises TrainingError where proposals would change during the run.
    """
    if not run.data.proposal_cache:
        return None
    learning = [part for part in ("encoder", "proposer") if part in run.model.train]
    if learning or not run.model.eval_mode_frozen:
        why = f"the {learning[0]} learns" if learning else "model.eval_mode_frozen is off"
        raise TrainingError(f"data.proposal_cache keeps proposals that do not change, but {why}")
    parts = [
        (f"{part}.{n}", v) for part in ("encoder", "proposer") for n, v in getattr(model, part).state_dict().items()
    ]
    config = model.config
    settings = {
        "encoder": config.encoder.to_dict(), "proposer": config.proposer.to_dict(), "image_size": config.image_size,
        "position_scale_offset": config.position_scale_offset, "dtype": run.optim.dtype,
    }  # fmt: skip
    prepared = Path(run.model.init or run.model.config or "") / "processor_config.json"  # mean, deviation, resampling
    settings["processor"] = prepared.read_text(encoding="utf-8") if prepared.is_file() else ""
    for part in ("encoder", "proposer"):
        settings[part].pop("_name_or_path", None)  # where it once came from decides nothing
    text = json.dumps(settings, sort_keys=True, default=str)
    name = hashlib.blake2b(f"{text} {fingerprint(parts)}".encode(), digest_size=16).hexdigest()
    grid = (config.image_size // config.patch_size) ** 2
    levels = {1: (1.0,), 2: (1.0, 0.25), 3: (4.0, 1.0, 0.25)}[config.proposer.levels]
    return ProposalCache(
        Path(run.data.proposal_cache) / name, min(config.proposer.queries, int(sum(grid * level for level in levels)))
    )


def _key(image: str) -> bytes:
    return hashlib.blake2b(os.path.abspath(image).encode("utf-8", "surrogateescape"), digest_size=KEY).digest()


def _half(key: bytes) -> int:
    return int.from_bytes(key[: KEY // 2], "little")


def _check(key: bytes, record: np.ndarray | np.void) -> int:
    return zlib.crc32(record["scores"].tobytes(), zlib.crc32(record["boxes"].tobytes(), zlib.crc32(key)))
