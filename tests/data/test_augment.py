"""The two crops of detection pre-training: hand-computed windows from scripted draws, and what holds for every draw."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from groma.data.augment import augment_detection, augment_published, crop_boxes


class Script(random.Random):
    """Gives out prepared numbers instead of drawn ones, and keeps the ranges asked for."""

    def __init__(self, short: int, integers: list[int], flip: float) -> None:
        self.short, self.integers, self.flip = short, integers, flip
        self.asked: list[tuple[int, int]] = []

    def __new__(cls, *arguments: object) -> Script:
        return super().__new__(cls)

    def choice(self, options: Any) -> Any:
        assert tuple(options) == (400, 500, 600)
        return self.short

    def randint(self, a: int, b: int) -> int:
        number = self.integers.pop(0)
        self.asked.append((a, b))
        return number

    def random(self) -> float:
        return self.flip


def picture(width: int = 1000, height: int = 500) -> Image.Image:
    """Left half black, right half white."""
    image = Image.new("RGB", (width, height))
    image.paste((255, 255, 255), (width // 2, 0, width, height))
    return image


def test_published_by_hand() -> None:
    # 1000 x 500 with a short side of 500 stays; a window of 800 x 450 at (100, 50) is 0.1-0.9 and 0.1-1.0.
    boxes = torch.tensor([[0.1, 0.1, 0.5, 1.0], [0.3, 0.4, 0.6, 0.7], [0.0, 0.0, 0.1, 0.5], [0.0, 0.0, 0.5, 0.2]])
    image, found, phrases = augment_published(
        picture(), boxes, ("left", "all", "gone", "part"), Script(500, [800, 450, 100, 50], 0.9), 448
    )
    assert (image.size, phrases) == ((448, 448), ("left", "all", "part"))
    assert found.tolist() == pytest.approx(
        torch.tensor([[0.0, 0.0, 0.5, 1.0], [0.25, 1 / 3, 0.625, 2 / 3], [0.0, 0.0, 0.5, 1 / 9]]), abs=1e-6
    )
    assert image.getpixel((222, 200)) == (0, 0, 0)
    assert image.getpixel((225, 200)) == (255, 255, 255)  # the edge at pixel 500 is 0.5 of the window too


def test_published_flip() -> None:
    boxes = torch.tensor([[0.3, 0.4, 0.6, 0.7]])
    image, found, phrases = augment_published(
        picture(), boxes, ("the leftmost cup",), Script(500, [800, 450, 100, 50], 0.4), 64
    )
    assert (image.size, phrases) == ((64, 64), ("the rightmost cup",))
    assert found[0].tolist() == pytest.approx([0.375, 1 / 3, 0.75, 2 / 3], abs=1e-6)
    assert image.getpixel((10, 10)) == (255, 255, 255)


def test_published_sides_are_at_most_the_picture() -> None:
    # 1000 x 500 scaled to 800 x 400: a width from 448 to 800, a height of 400; scaled to 1200 x 600, from 448 to 896.
    boxes, draw = torch.tensor([[0.5, 0.0, 1.0, 1.0]]), Script(400, [448, 400, 352, 0], 0.9)
    _, found, _ = augment_published(picture(), boxes, (), draw, 448)
    assert draw.asked == [(448, 800), (400, 400), (0, 352), (0, 0)]
    wide = Script(600, [896, 448, 304, 152], 0.9)
    augment_published(picture(), boxes, (), wide, 448)
    assert wide.asked == [(448, 896), (448, 600), (0, 304), (0, 152)]
    low = 352 / 800
    assert found[0].tolist() == pytest.approx([(0.5 - low) / 0.56, 0.0, 1.0, 1.0], abs=1e-6)


def test_published_draws_again_until_a_box_is_in() -> None:
    boxes = torch.tensor([[0.0, 0.0, 0.02, 0.02]])  # the first window begins at 0.4, the second holds the box
    draw = Script(500, [500, 450, 400, 50, 600, 450, 0, 0], 0.9)
    _, found, _ = augment_published(picture(), boxes, (), draw, 448)
    assert found[0].tolist() == pytest.approx([0.0, 0.0, 0.02 / 0.6, 0.02 / 0.9], abs=1e-6)
    assert draw.integers == []
    away = Script(500, [500, 450, 400, 50] * 10, 0.9)
    image, found, _ = augment_published(picture(), boxes, (), away, 448)
    assert (found[0].tolist(), away.integers) == (pytest.approx([0.0, 0.0, 0.02, 0.02]), [])  # the whole picture
    assert image.getpixel((10, 10)) == (0, 0, 0)


def test_published_drops_boxes_under_two_pixels() -> None:
    # In a window of 0.8 x 0.9 at a size of 448, 2 pixels are 0.00357 of the width and 0.00402 of the height.
    boxes = torch.tensor([[0.5, 0.5, 0.5036, 0.6], [0.5, 0.5, 0.5035, 0.6], [0.5, 0.5, 0.6, 0.5041],
                          [0.5, 0.5, 0.6, 0.5040]])  # fmt: skip
    phrases = ("wide enough", "narrow", "high enough", "low")
    _, _, kept = augment_published(picture(), boxes, phrases, Script(500, [800, 450, 100, 50], 0.9), 448)
    assert kept == ("wide enough", "high enough")
    dust = torch.full((1, 4), 0.5)
    _, found, kept = augment_published(picture(), dust, ("dust",), random.Random(0), 448)
    assert (found.shape, kept) == ((0, 4), ())


def simple(image: Image.Image, boxes: Tensor, phrases: tuple[str, ...], draw: random.Random, size: int) -> Any:
    return augment_detection(image, boxes, phrases, draw)


def test_published_drops_boxes_of_sa1b_by_their_area_in_the_crop() -> None:
    # the whole picture of 448 x 448 pixels is the window: 14 x 14, a little less, 400 x 400, a little more
    sides = torch.tensor([14.0, 13.9, 400.0, 401.0])
    boxes = torch.stack((torch.zeros(4), torch.zeros(4), sides, sides), -1) / 448
    square, draw = Image.new("RGB", (448, 448)), Script(400, [400, 400, 0, 0], 0.9)
    _, found, _ = augment_published(square, boxes, (), draw, 448, "sa1b")
    assert (found[:, 2] * 448).round().tolist() == [14, 400]


@pytest.mark.parametrize("augment", [augment_published, simple])
@pytest.mark.parametrize("size", [(1000, 500), (37, 301), (640, 640), (1, 9), (3000, 40)])
def test_whatever_is_drawn(augment: Callable[..., Any], size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    image, cropped = picture(*size), 0
    for seed in range(30):
        corners = torch.rand(seed % 4, 2, 2, generator=generator)
        boxes = torch.cat((corners.amin(1), corners.amax(1) + 0.02), -1).clamp(max=1)
        phrases = tuple(str(i) for i in range(len(boxes)))
        before = boxes.clone()
        made, found, kept = augment(image, boxes, phrases, random.Random(seed), 64)
        again, twin, _ = augment(image, boxes, phrases, random.Random(seed), 64)
        assert torch.equal(found, twin)
        assert made.tobytes() == again.tobytes()
        assert torch.equal(boxes, before)
        assert len(found) == len(kept) <= len(boxes)
        assert len(found) >= min(len(boxes), 1) or (boxes[:, 2:] - boxes[:, :2]).amin() * 64 < 2
        assert ((found >= 0) & (found <= 1)).all()
        assert (found[:, 2:] > found[:, :2]).all()
        cropped += not (len(found) == len(boxes) and torch.equal(found, boxes))
    assert cropped > 10


def test_a_kept_box_shows_what_it_showed() -> None:
    """A white square on black, followed through crops and flips."""
    image = Image.new("RGB", (600, 400))
    image.paste((255, 255, 255), (240, 100, 360, 220))
    boxes = torch.tensor([[0.4, 0.25, 0.6, 0.55]])
    for seed in range(30):
        made, found, _ = augment_published(image, boxes, (), random.Random(seed), 448)
        [[x1, y1, x2, y2]] = (found * 448).tolist()
        inside = made.crop((round(x1) + 2, round(y1) + 2, round(x2) - 2, round(y2) - 2))
        assert inside.getextrema() == ((255, 255),) * 3
        white = made.convert("L").point(lambda v: 255 * (v > 127)).getbbox()
        assert white is not None
        assert list(white) == pytest.approx([x1, y1, x2, y2], abs=1.5)


def test_crop_boxes_by_hand() -> None:
    window = torch.tensor([0.2, 0.2, 0.7, 0.7])
    cut, kept = crop_boxes(torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.0, 0.2, 0.29, 0.4], [0.8, 0.8, 0.9, 0.9]]), window)
    assert kept.tolist() == [True, False, False]  # a half, a third, nothing
    assert cut[0].tolist() == pytest.approx([0.0, 0.0, 0.2, 0.4], abs=1e-6)
