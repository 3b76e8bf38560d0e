"""The image files that annotations name: there, inside their folder, whole, and of the size that is stated."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from groma.data.check_notes import Notes
from groma.data.images import ImageError, read_image
from groma.data.shards import ShardError, read_member, split_path

Progress = Callable[[int, int], None]
"""Told how many images are done, of how many."""
AT_ONCE = 512
"""Files handed to the threads at a time, so that a set of millions is not a queue of millions."""


def check_images(notes: Notes, fast: bool, jobs: int, progress: Progress) -> int:
    """Look at every image of ``notes`` in ``jobs`` threads; returns how many could be read.

    ``fast`` reads headers only, which finds neither cut files nor damaged data.
    """
    names, found, done = list(notes.images), 0, 0
    inside = os.path.realpath(notes.folder)

    def look(name: str) -> tuple[str, str, tuple[int, int] | None]:
        return look_at(name, notes.folder, inside, fast)

    with ThreadPoolExecutor(jobs) as threads:
        for share in _shares(names):
            for name, (kind, told, size) in zip(share, threads.map(look, share), strict=True):
                first = next(iter(notes.images[name].values()))
                if kind:
                    notes.add(kind, first, told)
                found += size is not None
                if size is not None:
                    _compare(notes, name, size)
                done += 1
                progress(done, len(names))
    return found


def look_at(name: str, folder: Path, inside: str, fast: bool) -> tuple[str, str, tuple[int, int] | None]:
    """(kind of finding or "", what is wrong, upright size or None) of one file. Files outside are not opened."""
    path = folder / name
    if (told := _leaves(name, path, inside)) is not None:
        return "path-outside", told, None
    try:
        if not _in_tar(path) and os.path.getsize(path) == 0:
            return "image-empty", f"{path}: an empty file", None
        return "", "", header_size(path) if fast else read_image(path).size
    except (FileNotFoundError, NotADirectoryError):
        return "image-missing", f"{path}: no such file", None
    except (ImageError, OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        gone = _in_tar(path) and "no such file" in str(error)
        return "image-missing" if gone else "image-corrupt", str(error), None


def header_size(path: Path) -> tuple[int, int]:
    """(width, height) of the upright image from its header alone; the path may go through a tar. Raises ImageError."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(read_member(path)) if _in_tar(path) else path) as image:
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # orientations that swap the sides
            return (image.height, image.width) if turned else image.size
    except ShardError as error:
        raise ImageError(path, error.got, error.expected) from error
    except UnidentifiedImageError as error:
        raise ImageError(path, "no image known to Pillow") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(path, f"a damaged header ({error})") from error


def _in_tar(path: Path) -> bool:
    """Does the path go through a tar to a file in it?"""
    place = split_path(path)
    return place is not None and place[1] != "" and place[0].suffix == ".tar"


def _leaves(name: str, path: Path, inside: str) -> str | None:
    """How the name leads out of the folder, or None."""
    if name.startswith(("/", "\\")) or name[1:3] in (":\\", ":/"):
        return f"{name!r} is absolute, expected a name inside the image folder"
    if ".." in name.replace("\\", "/").split("/"):
        return f"{name!r} climbs with '..', expected a name inside the image folder"
    try:
        real = os.path.realpath(path)
    except ValueError:  # a NUL byte
        return None
    if os.path.commonpath((real, inside)) != inside:
        return f"{path} is a link to {real}, outside {inside}"
    return None


def _compare(notes: Notes, name: str, size: tuple[int, int]) -> None:
    for stated, record in notes.images[name].items():
        if stated is not None and stated != size:
            swapped = "; turned by its EXIF orientation?" if stated == size[::-1] else ""
            told = f"{name}: the record says {stated[0]:g} x {stated[1]:g}, the file has {size[0]} x {size[1]}{swapped}"
            notes.add("image-size", record, told)


def _shares(names: list[str]) -> Iterator[list[str]]:
    return (names[start : start + AT_ONCE] for start in range(0, len(names), AT_ONCE))
