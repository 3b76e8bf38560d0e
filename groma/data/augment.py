"""Random crop and flip of detection records, with their boxes and the words that say left and right.

Two crops: ``augment_detection`` cuts little away and asks that half of a box stays; ``augment_published`` is that of
the original's detection pre-training, which may zoom in by two and keeps whatever part of a box is left.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping

import torch
from PIL import Image
from torch import Tensor

from groma import boxes as box_ops

_MIRRORED = {"left": "right", "right": "left", "leftmost": "rightmost", "rightmost": "leftmost"}
_SIDED = re.compile(rf"\b({'|'.join(_MIRRORED)})\b", re.IGNORECASE)
CROP_SIDE = (0.7, 1.0)
"""Range of a crop's width and height, as a share of the image's."""
KEPT_AREA = 0.5
"""A box stays in a crop that holds at least this share of its area."""
SHORT_SIDES = (400, 500, 600)
CROP_PIXELS = (448, 896)
LEAST_SIDE = 2.0
"""Of the published augmentation: what the short side is scaled to, the range of a crop's sides there, and the side in
pixels of the resized crop under which a box is dropped."""
SA1B_AREA = (14 / 448) ** 2, (400 / 448) ** 2
"""Of the published augmentation: SA-1B's boxes stay from 14² to 400² of the crop's 448² pixels, as shares of it."""
_TRIES = 10


def augment_detection(
    image: Image.Image, boxes: Tensor, phrases: tuple[str, ...], draw: random.Random
) -> tuple[Image.Image, Tensor, tuple[str, ...]]:
    """Crop to 70-100 % of each side, keeping at least one box, then flip half of the time.

    boxes (M, 4) xyxy in [0, 1] → (M', 4) of the new image, phrases along with them.
    """
    window = _window(boxes, draw)
    if window is not None:
        cut, kept = crop_boxes(boxes, window)
        pixels = box_ops.to_pixels(window, *image.size).round().int().tolist()
        image, boxes = image.crop(tuple(pixels)), cut[kept]
        phrases = _of(phrases, kept)
    return _flip(image, boxes, phrases) if draw.random() < 0.5 else (image, boxes, phrases)


def augment_published(
    image: Image.Image, boxes: Tensor, phrases: tuple[str, ...], draw: random.Random, size: int, source: str = "coco"
) -> tuple[Image.Image, Tensor, tuple[str, ...]]:
    """The original's augmentation of detection pre-training: a picture of ``size`` x ``size`` pixels and its boxes.

    The short side is scaled to 400, 500 or 600 pixels, a window of 448-896 pixels (at most the picture) is cut in each
    direction, and resized (bilinear, aspect not kept); half of the pictures are flipped. A box stays where a part of it
    is in the window, 2 pixels wide and high after resizing, and with ``source`` "sa1b" if its area is in SA1B_AREA. A
    window without a box is drawn again, up to ten times; then the whole picture is the window. The scaling and both
    resizings are one, from the pixels of the file.

    boxes (M, 4) xyxy in [0, 1] → (M', 4) of the new image, phrases along with them.
    """
    window = torch.tensor([0.0, 0.0, 1.0, 1.0])
    for _ in range(_TRIES):
        tried = _published_window(image.size, draw)
        if len(boxes) == 0 or _visible(crop_boxes(boxes, tried)[0], size, source).any():
            window = tried
            break
    cut, _ = crop_boxes(boxes, window)
    kept = _visible(cut, size, source)
    corners = tuple(box_ops.to_pixels(window, *image.size).tolist())
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=corners)
    result = image, cut[kept], _of(phrases, kept)
    return _flip(*result) if draw.random() < 0.5 else result


def crop_boxes(boxes: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
    """boxes (M, 4) in a crop ``window`` (4): cut boxes (M, 4) in the crop's [0, 1], and which of them (M) stay."""
    low, high = window[:2], window[2:]
    cut = torch.cat((torch.maximum(boxes[:, :2], low), torch.minimum(boxes[:, 2:], high)), -1)
    kept = (box_ops.area(cut) >= KEPT_AREA * box_ops.area(boxes)) & (box_ops.area(cut) > 0)
    size = (high - low).repeat(2)
    return ((cut - low.repeat(2)) / size).clamp(0, 1), kept


def mirror_words(phrase: str) -> str:
    """Swap left and right, as the flipped image shows it."""
    return _SIDED.sub(lambda match: _MIRRORED[match.group().lower()], phrase)


def word_ids(phrase: str, words: Mapping[str, int]) -> tuple[int, ...]:
    """Ids of the distinct words of ``phrase`` that the list knows, in order; case does not matter.

    >>> word_ids("The red, RED cup", {"cup": 0, "red": 1})
    (1, 0)
    """
    known = (words.get(word) for word in re.findall(r"\w+", phrase.lower()))
    return tuple(dict.fromkeys(i for i in known if i is not None))


def _visible(boxes: Tensor, size: int, source: str) -> Tensor:
    """Which of boxes (M, 4) are LEAST_SIDE pixels wide and high in a picture of ``size`` x ``size`` pixels, and for
    "sa1b" in SA1B_AREA."""
    wide = ((boxes[:, 2:] - boxes[:, :2]) * size >= LEAST_SIDE).all(-1)
    area = box_ops.area(boxes)
    return wide & (area >= SA1B_AREA[0]) & (area <= SA1B_AREA[1]) if source == "sa1b" else wide


def _of(phrases: tuple[str, ...], kept: Tensor) -> tuple[str, ...]:
    return tuple(p for p, keep in zip(phrases, kept.tolist(), strict=False) if keep)


def _flip(image: Image.Image, boxes: Tensor, phrases: tuple[str, ...]) -> tuple[Image.Image, Tensor, tuple[str, ...]]:
    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    boxes = torch.stack((1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]), -1)
    return image, boxes, tuple(mirror_words(phrase) for phrase in phrases)


def _published_window(size: tuple[int, int], draw: random.Random) -> Tensor:
    """A window (4) of a picture of ``size`` (width, height) pixels, in [0, 1]."""
    scale = draw.choice(SHORT_SIDES) / min(size)
    scaled = [round(side * scale) for side in size]
    sides = [draw.randint(min(CROP_PIXELS[0], side), min(CROP_PIXELS[1], side)) for side in scaled]
    corner = [draw.randint(0, full - side) for full, side in zip(scaled, sides, strict=True)]
    (x, y), (w, h), (full_w, full_h) = corner, sides, scaled
    return torch.tensor([x / full_w, y / full_h, (x + w) / full_w, (y + h) / full_h])


def _window(boxes: Tensor, draw: random.Random) -> Tensor | None:
    for _ in range(_TRIES):
        width, height = draw.uniform(*CROP_SIDE), draw.uniform(*CROP_SIDE)
        x, y = draw.uniform(0, 1 - width), draw.uniform(0, 1 - height)
        window = torch.tensor([x, y, x + width, y + height])
        if len(boxes) == 0 or crop_boxes(boxes, window)[1].any():
            return window
    return None
