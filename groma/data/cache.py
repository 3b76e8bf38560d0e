"""The cache folder: what is worked out of large files once, and mapped by every later start, rank and worker.

    $GROMA_CACHE/entries/rec.json-<key, paths>-<sizes and times>/   with meta.json: all that the name stands for

``build_once`` makes such a folder, whole or not at all; any may be deleted while no run uses it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_FORMAT = 1
"""Of the folders: a change of it makes those built earlier invalid."""

log = logging.getLogger(__name__)
Build = Callable[[Path], dict[str, Any]]


class CacheError(ValueError):
    """The cache folder cannot be used; the message names it and $GROMA_CACHE."""


def cache() -> Path:
    """$GROMA_CACHE, or ~/.cache/groma."""
    return Path(os.environ.get("GROMA_CACHE") or "~/.cache/groma").expanduser().absolute()


def found(kind: str, key: str, files: Sequence[Path]) -> Path | None:
    """The folder that ``build_once`` made of ``files`` as they are now, or None where there is no whole one."""
    states = [state_of(file) for file in files]
    folder = _place(kind, key, states)
    try:
        meta = meta_of(folder)
        same = meta["key"] == key and meta["files"] == states
        whole = same and all((folder / name).stat().st_size == size for name, size in meta["sizes"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return folder if whole else None


def build_once(kind: str, key: str, files: Sequence[Path], build: Build) -> Path:
    """The folder that ``build`` fills from ``files``, made once for each state of them: by one process, others wait.

    ``build`` is given an empty folder, and returns what meta.json shall hold beside key, files and sizes; it wraps its
    writing in ``writing``. The folder appears whole, under its name, or not at all. Raises CacheError.
    """
    if (folder := found(kind, key, files)) is not None:
        return folder
    states = [state_of(file) for file in files]
    folder = _place(kind, key, states)
    with _locked(folder):
        if found(kind, key, files) is not None:  # built by another process meanwhile
            return folder
        log.info("building %s", folder)
        with writing(folder):
            for left in [folder, *folder.parent.glob(f"{folder.name}.*.tmp")]:  # damaged, and of killed builds
                shutil.rmtree(left, ignore_errors=True)
            made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}.", suffix=".tmp"))
        try:
            meta = build(made)
            if states != [state_of(file) for file in files]:
                raise CacheError(f"{files[0]}: changed while its index was built, expected a file at rest")
            with writing(folder):
                sizes = {path.name: path.stat().st_size for path in made.iterdir()}
                text = json.dumps({"key": key, "files": states, "sizes": sizes, **meta})
                (made / "meta.json").write_text(text, "utf-8", "surrogatepass")
                for path in [*made.iterdir(), made]:
                    sync(path)
                made.chmod(0o755)  # mkdtemp's are the maker's alone
                made.rename(folder)
                sync(folder.parent)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return folder


def meta_of(folder: Path) -> dict[str, Any]:
    """What ``build`` told of a folder made by ``build_once``, and key, files and sizes."""
    meta: dict[str, Any] = json.loads((folder / "meta.json").read_bytes())
    return meta


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a failure to write in the cache into one clear line."""
    try:
        yield
    except OSError as error:
        raise CacheError(
            f"{folder}: cannot be written ({error.strerror or error}); set $GROMA_CACHE (now {cache()}) "
            "to a folder that can, with room for about the size of the annotation files"
        ) from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone among the processes, and threads, that would make ``folder``; the lock ends with its process."""
    import fcntl  # not on Windows, where small sets still open

    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = folder.with_name(f"{folder.name}.lock").open("a")
    with file:
        with writing(folder):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def state_of(file: Path) -> list[Any]:
    """[absolute path, size, time]; -1 for both where there is no such file, which its reader will say."""
    path = str(Path(file).absolute())
    try:
        stat = os.stat(path)
    except (OSError, ValueError):
        return [path, -1, -1]
    return [path, stat.st_size, stat.st_mtime_ns]


def _place(kind: str, key: str, states: list[list[Any]]) -> Path:
    paths = [path for path, _, _ in states]
    stem = re.sub(r"[^\w.-]+", "_", Path(paths[0]).name)[-60:] if paths else "none"
    what, when = (
        hashlib.blake2b(json.dumps(part).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
        for part in ([_FORMAT, key, paths], [state[1:] for state in states])
    )
    return cache() / kind / f"{stem}-{what}-{when}"
