"""Uncompressed tars as they are: a tar is a folder to image paths, and a run of samples to readers of shards.

    read_member("coco/train2017.tar/000000000009.jpg")       the bytes of a file in a tar, at any depth of it

    for shard in Shards("grit/{00000..00127}.tar"):          or a folder, a pattern with * and ?, or one tar
        for key, files in shard.samples():                   as webdataset groups them: by name up to the first dot
            record = json.loads(files["json"].read())
            place = member_path(shard.path, files["jpg"].name)

Where the members of a tar lie is found out once, and kept under $GROMA_CACHE (groma.data.cache), from where all
processes map it: no Python object a member. Links, sparse files and names that leave the folder are passed over; of one
name the last counts, as when unpacked.
"""

from __future__ import annotations

import os
import re
import struct
import tarfile
import weakref
from array import array
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from groma.data.cache import build_once, meta_of, writing
from groma.data.records import AnnotationError
from groma.data.store import digest

OPEN = 32
"""Tars a process holds open: three file handles each."""
_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_META = re.compile(r"__[^/]*__($|/)")  # webdataset's own files
_KEY = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
_TAR = re.compile(r"\.(tar|tar\.\w+|tgz)$")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
# What tarfile raises on bad bytes, beside its own error.
_BAD_BYTES = (tarfile.TarError, OSError, EOFError, ValueError, KeyError, IndexError, OverflowError, struct.error)


class ShardError(AnnotationError):
    """A tar, or a file in one, that cannot be read; one line of the path, what was got and what is expected."""

    def __init__(self, path: str | os.PathLike[str], got: str, expected: str) -> None:
        self.path, self.got, self.expected = os.fspath(path), got, expected
        super().__init__(" ".join(f"{self.path}: got {got}, expected {expected}".split()))

    def __reduce__(self) -> tuple[type[ShardError], tuple[str, str, str]]:
        """Let the error cross from a loader's worker process, which pickles it."""
        return type(self), (self.path, self.got, self.expected)


class Member(NamedTuple):
    """A file in a tar: its ``name`` there, and where its bytes lie."""

    tar: _Tar
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        """The bytes. Raises ShardError where the tar has become shorter."""
        parts, at, end = [], self.offset, self.offset + self.size
        try:
            # pread: no place in the file to share with a forked process, or a thread.
            while at < end and (part := os.pread(self.tar.file.fileno(), end - at, at)):
                parts.append(part)
                at += len(part)
        except OSError as error:
            raise ShardError(self.tar.path, f"an unreadable file ({error})", "a tar") from error
        if at < end:
            raise ShardError(
                self.tar.path, f"{self.name!r} cut at {at - self.offset} of {self.size} bytes", "a whole tar"
            )
        return b"".join(parts)


class Shard:
    """One tar. What it holds is found out when first asked for; each method raises ShardError for one that is none."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @property
    def damage(self) -> str:
        """What is wrong behind the last member that can be read, "" for a whole tar."""
        return _open(self.path).damage

    def find(self, name: str) -> Member | None:
        """The file ``name`` of the tar, None where there is none."""
        return _open(self.path).find(name)

    def members(self) -> Iterator[Member]:
        """Every file, in the order of the tar."""
        return _open(self.path).members()

    def samples(self) -> Iterator[tuple[str, dict[str, Member]]]:
        """(key, {extension: file}) of files that follow each other and have one key, as webdataset groups them.

        The key is the name up to the first dot behind the last "/", the extension the rest, in lower case. Nothing is
        read but the index: ``files["jpg"].read()`` gives bytes. Of a damaged tar, what comes before the damage.
        """
        return _samples(self.members())


class Shards(Sequence[Shard]):
    """The tars of a folder and those below it, of a pattern with *, ?, [] or {00..27}, or one tar, by name.

    ``files``: their paths. Raises ShardError where there is none, or where one of a range is missing.
    """

    def __init__(self, place: str | os.PathLike[str]) -> None:
        self.place = os.fspath(place)
        self.files = [Path(file) for file in _files(self.place)]
        if not self.files:
            raise ShardError(
                self.place, "no tar there", "a folder with *.tar, a pattern such as x-{00..27}.tar, or a tar"
            )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> Any:
        return Shard(self.files[index])


def member_path(shard: str | os.PathLike[str], name: str) -> str:
    """What a file in a tar is called as a path: the tar taken for a folder.

    >>> member_path("grit/00000.tar", "000000012.jpg")
    'grit/00000.tar/000000012.jpg'
    """
    return f"{os.fspath(shard)}/{name}"


def split_path(path: str | os.PathLike[str]) -> tuple[Path, str] | None:
    """(tar, name in it) of a path that goes through a file, None of any other.

    The tar itself, and the folder of the files in it, are such paths: ("a.tar", ""), ("a.tar", "train2017").
    """
    parts = Path(path).parts
    for i in range(len(parts), 0, -1):
        file = Path(*parts[:i])
        try:
            if file.is_file():
                return file, "/".join(parts[i:])
            if file.exists():
                return None
        except (OSError, ValueError):  # too long, a NUL byte
            return None
    return None


def exists(path: str | os.PathLike[str], folder: bool = False) -> bool:
    """Is there such a file, in a tar too; or such a ``folder``, which in a tar takes a look at every name?"""
    try:
        if Path(path).exists():
            return True
        place = split_path(path)
        if place is None:
            return False
        tar = _open(place[0])
        if not folder:
            return tar.find(place[1]) is not None
        return any(member.name.startswith(f"{place[1]}/") for member in tar.members())
    except (AnnotationError, OSError, ValueError):
        return False


def read_member(path: str | os.PathLike[str]) -> bytes:
    """The bytes of the file at a path through a tar. Raises ShardError for one that is not there."""
    place = split_path(path)
    if place is None:
        raise ShardError(path, "no such file", "a path through a tar")
    file, name = place
    tar = _open(file)
    if (member := tar.find(name)) is None:
        damage = f", which is damaged: {tar.damage}" if tar.damage else ""
        raise ShardError(path, f"no such file among the {len(tar)} of {file.name}{damage}", "a file of the tar")
    return member.read()


class _Tar:
    """An open tar with its index: a row a file, sorted by the hash of its name, in five columns of int64 (5, N).

    The columns: hash, place of the bytes, their number, and where the name starts and ends in ``names``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            folder = build_once("tars", "", [path], partial(_index, path))
            self.file = path.open("rb", buffering=0)
            weakref.finalize(self, self.file.close)
            self.table = np.asarray(np.load(folder / "members.npy", mmap_mode="r"))
            self.names = np.asarray(np.load(folder / "names.npy", mmap_mode="r"))
            self.damage: str = meta_of(folder)["damage"]
        except OSError as error:
            raise ShardError(path, f"an unreadable file ({error})", "a tar") from error

    def __len__(self) -> int:
        return self.table.shape[1]

    def find(self, name: str) -> Member | None:
        wanted = _clean(name)
        if wanted is None:
            return None
        code = digest(wanted)
        row = int(np.searchsorted(self.table[0], code))
        if row == len(self) or self.table[0, row] != code:
            return None
        member = self._member(row)
        return member if member.name == wanted else None

    def members(self) -> Iterator[Member]:
        return (self._member(int(row)) for row in np.argsort(self.table[1], kind="stable"))

    def _member(self, row: int) -> Member:
        _, offset, size, start, end = self.table[:, row].tolist()
        return Member(self, self.names[start:end].tobytes().decode("utf-8", "surrogateescape"), offset, size)


def _open(path: Path) -> _Tar:
    try:
        stat = path.stat()
    except FileNotFoundError as error:
        raise ShardError(path, "no such file", "a tar") from error
    except OSError as error:
        raise ShardError(path, f"an unreadable file ({error})", "a tar") from error
    return _open_as(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=OPEN)
def _open_as(path: Path, size: int, time: int) -> _Tar:
    """The tar as it is now. One that the cache lets go is closed when its last Member is gone."""
    return _Tar(path)


def _samples(members: Iterator[Member]) -> Iterator[tuple[str, dict[str, Member]]]:
    key, files = "", dict[str, Member]()
    for member in members:
        match = _KEY.fullmatch(member.name)
        if match is None or _META.match(member.name):
            continue
        if match[1] != key and files:
            yield key, files
            files = {}
        key = match[1]
        files[match[2].lower()] = member
    if files:
        yield key, files


def _files(place: str) -> list[str]:
    if os.path.isfile(place):
        return [place]
    if os.path.isdir(place):
        below = sorted(path for path in Path(place).rglob("*") if _TAR.search(path.name) and path.is_file())
        # Compressed ones are told of when they are read, and passed over where they have been unpacked.
        return [str(path) for path in [p for p in below if p.suffix == ".tar"] or below]
    if (span := _RANGE.search(place)) is not None:
        width, found = len(span[1]), []
        for number in range(int(span[1]), int(span[2]) + 1):
            one = f"{place[: span.start()]}{number:0{width}d}{place[span.end() :]}"
            if not (files := _files(one)):
                raise ShardError(one, "no such file", f"one for each number of {span[0]}")
            found += files
        return found
    return sorted(path for path in glob(place) if os.path.isfile(path))


def _clean(name: str) -> str | None:
    """A name in a tar without "./" and "//"; None for one that leaves the folder, or that is the folder itself."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return None if name.startswith("/") or ".." in parts or not parts else "/".join(parts)


def _index(path: Path, folder: Path) -> dict[str, Any]:
    """Write the index of the tar ``path`` into ``folder``. Raises ShardError for what is no tar."""
    rows, names, damage = array("q"), bytearray(), ""
    try:
        with path.open("rb") as head:
            start = head.read(6)
        for magic, kind in _MAGIC.items():
            if start.startswith(magic):
                raise ShardError(
                    path, f"a file compressed with {kind}", "an uncompressed tar: unpack it, or tar it again"
                )
        size = path.stat().st_size
        for name, offset, length in _walk(path):
            if offset + length > size:
                damage = f"{name!r} ends behind the end of the file, {offset + length} of {size} bytes"
                break
            at = len(names)
            names += name.encode("utf-8", "surrogateescape")
            rows.extend((digest(name), offset, length, at, len(names)))
    except ShardError:
        raise
    except _BAD_BYTES as error:
        if not rows:
            raise ShardError(path, f"no tar, or a damaged one ({error})", "an uncompressed tar") from error
        damage = f"{error} behind byte {rows[-4] + rows[-3]}"
    table = np.frombuffer(rows, np.int64).reshape(-1, 5)
    table = table[::-1]  # so that of equal names the last is the first, which unique keeps
    table = table[np.unique(table[:, 0], return_index=True)[1]]
    with writing(folder):
        np.save(folder / "members.npy", np.ascontiguousarray(table.T))
        np.save(folder / "names.npy", np.frombuffer(names, np.uint8))
    return {"damage": damage}


def _walk(path: Path) -> Iterator[tuple[str, int, int]]:
    """(name, place, bytes) of every plain file in the tar, in order. Raises one of _BAD_BYTES at damage."""
    with tarfile.open(path, "r:", encoding="utf-8") as tar:
        before = -1
        while (info := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # or the tar keeps all of them
            if info.size < 0 or tar.offset <= before:
                raise tarfile.ReadError(f"a header that leads backwards, at byte {info.offset}")
            before = tar.offset
            name = _clean(info.name)
            if name is not None and info.isreg() and not info.issparse():
                yield name, info.offset_data, info.size
        # tarfile takes a header it cannot read, and the end of a file cut between two members, for the end of the tar.
        with path.open("rb") as file:
            file.seek(tar.offset)
            mark = file.read(tarfile.BLOCKSIZE)
        if mark != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("a damaged header" if any(mark) else "no end mark")
