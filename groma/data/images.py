"""Read an image file as the rest of groma wants it: RGB, upright, whole, or one clear line of what is wrong."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from groma.data.shards import ShardError, read_member

MAX_PIXELS = 178_956_970
"""Pillow's own limit for an error; checked here too, as a program may have lifted Pillow's."""

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow's decoders raise on bad bytes, beside OSError.
_BAD_BYTES = (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, OverflowError,
              NotImplementedError, struct.error, zlib.error)  # fmt: skip


class ImageError(ValueError):
    """An image file that cannot be used; the message is one line naming the file, what was got and what is expected."""

    def __init__(self, path: str | os.PathLike[str], got: str, expected: str = "an image file") -> None:
        super().__init__(" ".join(f"{os.fspath(path)}: got {got}, expected {expected}".split()))
        self._arguments = (path, got, expected)

    def __reduce__(self) -> tuple[type[ImageError], tuple[str | os.PathLike[str], str, str]]:
        """Let the error cross from a loader's worker process, which pickles it."""
        return type(self), self._arguments


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """The first frame of the image file ``path`` as 8-bit RGB, turned upright by its EXIF orientation.

    The path may go through an uncompressed tar: "train2017.tar/000000000009.jpg" (groma.data.shards). Transparency is
    laid on white; 16-bit values are scaled to 8. Raises ImageError for a file that is missing, no image, cut short,
    empty, or larger than MAX_PIXELS; CacheError where the index of a tar cannot be kept.
    """
    data = _read_bytes(path)
    try:
        image = Image.open(io.BytesIO(data))
        _check_size(path, image.size)
        # One load of one decoder, never retried: Pillow's second load() of a cut file returns quietly with grey rows.
        image.load()
        orientation = _orientation(image)
        rgb = _to_rgb(image)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(path, f"an image too large to open ({error})", f"at most {MAX_PIXELS} pixels") from error
    except Image.UnidentifiedImageError as error:
        raise ImageError(path, _describe(data)) from error
    except _BAD_BYTES as error:
        raise ImageError(path, f"damaged image data ({error})", "a whole image file") from error
    turn = _UPRIGHT.get(orientation)
    return rgb if turn is None else rgb.transpose(turn)


def _read_bytes(path: str | os.PathLike[str]) -> bytes:
    try:
        if Path(path).is_dir():
            raise ImageError(path, "a directory")
        data = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise ImageError(path, "no such file") from error
    except NotADirectoryError:  # the path goes through a file
        data = _read_from_tar(path)
    except ImageError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        raise ImageError(path, f"an unreadable file ({error})") from error
    if not data:
        raise ImageError(path, "an empty file")
    return data


def _read_from_tar(path: str | os.PathLike[str]) -> bytes:
    try:
        return read_member(path)
    except ShardError as error:
        where = "" if error.path == os.fspath(path) else f" ({error.path})"
        raise ImageError(path, f"{error.got}{where}", error.expected) from error


def _check_size(path: str | os.PathLike[str], size: tuple[int, int]) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(path, f"an image of {width} x {height} pixels", "at least 1 x 1")
    if width * height > MAX_PIXELS:
        raise ImageError(path, f"an image of {width} x {height} pixels", f"at most {MAX_PIXELS} pixels")


def _describe(data: bytes) -> str:
    """What bytes that are no image look like."""
    head = data[:512].lstrip().lower()
    size = f"({len(data)} bytes)"
    if head.startswith(b"version https://git-lfs"):
        return f"a Git LFS pointer {size}: fetch the real file with 'git lfs pull'"
    if head.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml", b"<svg")):
        return f"an HTML or XML page {size}"
    return f"no image known to Pillow {size}"


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation 1-8; 1 where the EXIF block is absent or damaged, as every viewer does."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except _BAD_BYTES:
        return 1
    return value if isinstance(value, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_to_eight_bits(image)).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _to_eight_bits(image: Image.Image) -> np.ndarray:
    """Grey values wider than 8 bits → uint8 (H, W): 16-bit range by 1/257, others stretched."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    low, high = float(values.min()), float(values.max())
    if image.mode != "F" and low >= 0 and high <= 65535:
        # A 32-bit image that stays under 256 was written by a program that meant 8 bits.
        grey = values if image.mode == "I" and high <= 255 else values / 257
    elif image.mode == "F" and low >= 0 and high <= 1:
        grey = values * 255
    else:
        grey = (values - low) * (255 / max(high - low, 1e-12))
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey = np.where(values == key, 255, grey)
    return np.asarray(grey.round().clip(0, 255), dtype=np.uint8)
