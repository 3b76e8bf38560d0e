"""Boxes: conversions undo each other, overlaps agree with cases worked by hand, nms is stable and strict."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from groma import boxes

T = torch.tensor


def some(count: int, seed: int = 0) -> Tensor:
    """Proper random xyxy boxes (count, 4) in [0, 1]."""
    corners = torch.rand(count, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.cat((corners.amin(1), corners.amax(1)), 1)


def test_forms_of_one_box() -> None:
    corners = T([[0.1, 0.2, 0.5, 0.8]])
    torch.testing.assert_close(boxes.xyxy_to_cxcywh(corners), T([[0.3, 0.5, 0.4, 0.6]]))
    torch.testing.assert_close(boxes.cxcywh_to_xyxy(T([[0.3, 0.5, 0.4, 0.6]])), corners)
    torch.testing.assert_close(boxes.xyxy_to_xywh(corners), T([[0.1, 0.2, 0.4, 0.6]]))
    torch.testing.assert_close(boxes.xywh_to_xyxy(T([[0.1, 0.2, 0.4, 0.6]])), corners)
    torch.testing.assert_close(boxes.to_pixels(corners, 640, 480), T([[64.0, 96.0, 320.0, 384.0]]))
    torch.testing.assert_close(boxes.to_unit(T([[64.0, 96.0, 320.0, 384.0]]), 640, 480), corners)


@pytest.mark.parametrize("shape", [(4,), (0, 4), (7, 4), (2, 3, 4)])
def test_round_trips_keep_shape_and_input(shape: tuple[int, ...]) -> None:
    given = some(24).flatten()[: T(shape).prod()].reshape(shape)
    before = given.clone()
    for there, back in (
        (boxes.xyxy_to_cxcywh, boxes.cxcywh_to_xyxy),
        (boxes.xyxy_to_xywh, boxes.xywh_to_xyxy),
        (lambda b: boxes.to_pixels(b, 31, 77), lambda b: boxes.to_unit(b, 31, 77)),
    ):
        torch.testing.assert_close(back(there(given)), before)
    boxes.clip(given - 0.5)
    assert torch.equal(given, before)


def test_clip_and_area() -> None:
    assert boxes.clip(T([-0.5, 0.2, 1.5, 0.8])).tolist() == pytest.approx([0, 0.2, 1, 0.8])
    # a plain box, a line, and boxes reversed in x, in y, and both ways (whose sides multiply to a positive number)
    given = T([[0.0, 0, 0.5, 0.4], [0.2, 0.2, 0.2, 0.9], [0.5, 0, 0, 0.4], [0, 0.4, 0.5, 0], [0.5, 0.4, 0, 0]])
    assert boxes.area(given).tolist() == pytest.approx([0.2, 0, 0, 0, 0])


IOU_CASES = [
    # a, b, IoU, GIoU
    ([0, 0, 2, 2], [0, 0, 2, 2], 1, 1),
    ([0, 0, 2, 2], [1, 0, 3, 2], 1 / 3, 1 / 3),  # the hull is the union
    ([0, 0, 2, 2], [1, 1, 3, 3], 1 / 7, 1 / 7 - 2 / 9),  # hull 9, union 7
    ([0, 0, 4, 4], [1, 1, 3, 3], 1 / 4, 1 / 4),  # inside
    ([0, 0, 1, 1], [1, 0, 2, 1], 0, 0),  # touching
    ([0, 0, 1, 1], [3, 0, 4, 1], 0, -1 / 2),  # hull 4, union 2
    ([0, 0, 1, 1], [9, 9, 10, 10], 0, -98 / 100),
    ([0, 0, 0, 0], [0, 0, 2, 2], 0, 0),  # a point in a corner
    ([0, 0, 0, 0], [0, 0, 0, 0], 0, -1),  # two points: the worst, not 0 / 0
]


@pytest.mark.parametrize("a, b, iou, giou", IOU_CASES)
def test_overlap_by_hand(a: list[float], b: list[float], iou: float, giou: float) -> None:
    one, other = T([a], dtype=torch.float32), T([b], dtype=torch.float32)
    for x, y in ((one, other), (other, one)):
        assert boxes.iou(x, y).item() == pytest.approx(iou, abs=1e-6)
        assert boxes.generalised_iou(x, y).item() == pytest.approx(giou, abs=1e-6)


def test_overlap_of_many_is_pairwise() -> None:
    a, b = some(5, 1), some(3, 2)
    for measure in (boxes.iou, boxes.generalised_iou):
        table = measure(a, b)
        assert table.shape == (5, 3)
        for i in range(5):
            for j in range(3):
                assert table[i, j].item() == pytest.approx(measure(a[i : i + 1], b[j : j + 1]).item())
        assert measure(a[:0], b).shape == (0, 3)
    assert bool((boxes.generalised_iou(a, b) <= boxes.iou(a, b)).all())


def test_nms_orders_by_score_and_keeps_ties_in_place() -> None:
    apart = T([[i / 10, 0, i / 10 + 0.05, 0.1] for i in range(6)])
    assert boxes.nms(apart, T([0.1, 0.9, 0.5, 0.9, 0.5, 0.7]), 0.5).tolist() == [1, 3, 5, 2, 4, 0]
    same = T([[0.1, 0.1, 0.5, 0.5]]).repeat(200, 1)  # of equal boxes with equal scores the first survives
    assert boxes.nms(same, torch.full((200,), 0.3), 0.5).tolist() == [0]
    assert boxes.nms(torch.zeros(0, 4), torch.zeros(0), 0.5).tolist() == []


def test_nms_drops_only_strictly_above_the_threshold() -> None:
    pair = T([[0.0, 0, 2, 2], [0, 0, 2, 1]])  # IoU exactly 1/2
    assert boxes.nms(pair, T([0.9, 0.8]), 0.5).tolist() == [0, 1]
    assert boxes.nms(pair, T([0.9, 0.8]), 0.4999).tolist() == [0]
    # a dropped box drops nothing itself: 0 suppresses 1, and 2 overlaps only 1
    chain = T([[0.0, 0, 10, 1], [4, 0, 14, 1], [8, 0, 18, 1]])
    assert boxes.nms(chain, T([0.9, 0.8, 0.7]), 0.4).tolist() == [0, 2]


def test_nms_equals_the_plain_loop() -> None:
    given, scores = some(60, 3).float(), torch.rand(60, generator=torch.Generator().manual_seed(4))
    scores[10:20] = 0.5
    kept: list[int] = []
    for i in sorted(range(60), key=lambda k: -scores[k].item()):
        if all(boxes.iou(given[i : i + 1], given[k : k + 1]).item() <= 0.3 for k in kept):
            kept.append(i)
    assert boxes.nms(given, scores, 0.3).tolist() == kept
    assert 5 < len(kept) < 55
    assert boxes.nms(given.bfloat16(), scores.bfloat16(), 0.3).dtype == torch.long
