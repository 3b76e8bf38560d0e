"""Random crop and flip of detection records, with their boxes and the words that say left and right."""

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
        phrases = tuple(p for p, keep in zip(phrases, kept.tolist(), strict=False) if keep)
    if draw.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        boxes = torch.stack((1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]), -1)
        phrases = tuple(mirror_words(phrase) for phrase in phrases)
    return image, boxes, phrases


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


def _window(boxes: Tensor, draw: random.Random) -> Tensor | None:
    for _ in range(_TRIES):
        width, height = draw.uniform(*CROP_SIDE), draw.uniform(*CROP_SIDE)
        x, y = draw.uniform(0, 1 - width), draw.uniform(0, 1 - height)
        window = torch.tensor([x, y, x + width, y + height])
        if len(boxes) == 0 or crop_boxes(boxes, window)[1].any():
            return window
    return None
