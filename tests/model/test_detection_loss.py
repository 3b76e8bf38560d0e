"""Matching and detection loss: hand cases, brute force, and the implementation in transformers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss

from groma import boxes as box_ops
from groma.model.configuration import ProposerConfig
from groma.model.detection_loss import detection_losses, match, stage_loss
from groma.model.proposer import Detections

T = torch.tensor
CONFIG = ProposerConfig()


def rand_boxes(*shape: int, seed: int = 0) -> Tensor:
    """Boxes (…, 4) as (cx, cy, w, h) inside the unit square."""
    raw = torch.rand(*shape, 4, generator=torch.Generator().manual_seed(seed))
    sides = raw[..., 2:] * 0.4 + 0.05
    return torch.cat((raw[..., :2] * (1 - sides) + sides / 2, sides), -1)


def row(cx: float) -> list[float]:
    return [cx, 0.5, 0.1, 0.1]


def test_the_whole_assignment_is_cheapest_not_each_pair() -> None:
    config = ProposerConfig(costs=(0, 1, 0))  # L1 alone
    # costs to the targets: 0.15 and 0.05; 0.4 and 0.2; far. The nearest pair first would cost 0.05 + 0.4.
    queries = T([[0.35, 0.5, 0.1, 0.1], [0.4, 0.7, 0.1, 0.1], [0.95, 0.5, 0.1, 0.1]])
    targets = T([row(0.2), row(0.4)])
    rows, columns = match(torch.zeros(3), queries, targets, config)
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == [(0, 0), (1, 1)]


def test_each_term_decides_when_the_others_are_equal() -> None:
    same = T([row(0.5)] * 3)
    assert match(T([0.0, 2.0, -1.0]), same, T([row(0.5)]), CONFIG)[0].tolist() == [1]  # the surest
    # equally far in L1 (0.2), but only the second overlaps: GIoU decides
    target = T([[0.5, 0.5, 0.3, 0.1]])
    pair = T([[0.5, 0.7, 0.3, 0.1], [0.7, 0.5, 0.3, 0.1]])
    assert match(torch.zeros(2), pair, target, CONFIG)[0].tolist() == [1]
    assert match(torch.zeros(2), pair, target, ProposerConfig(costs=(2, 5, 0)))[0].tolist() == [0]
    near = T([row(0.55), row(0.51)])
    assert match(torch.zeros(2), near, T([row(0.5)]), ProposerConfig(costs=(2, 5, 0)))[0].tolist() == [1]


def cost(logit: float, box: Tensor, target: Tensor) -> float:
    """The cost of one pair, written out."""
    p = 1 / (1 + math.exp(-logit))
    surprise = 0.25 * (1 - p) ** 2 * -math.log(p) - 0.75 * p**2 * -math.log(1 - p)
    distance = sum(abs(a - b) for a, b in zip(box.tolist(), target.tolist(), strict=True))
    corners = [box_ops.cxcywh_to_xyxy(b)[None] for b in (box, target)]
    return 2 * surprise + 5 * distance - 2 * box_ops.generalised_iou(*corners).item()


@pytest.mark.parametrize("seed", range(5))
def test_match_equals_brute_force(seed: int) -> None:
    logits = torch.randn(5, generator=torch.Generator().manual_seed(seed))
    boxes, targets = rand_boxes(5, seed=seed), rand_boxes(3, seed=seed + 50)
    best = min(
        itertools.permutations(range(5), 3),
        key=lambda chosen: sum(cost(logits[q].item(), boxes[q], targets[t]) for t, q in enumerate(chosen)),
    )
    rows, columns = match(logits, boxes, targets, CONFIG)
    assert {t: q for q, t in zip(rows.tolist(), columns.tolist(), strict=True)} == dict(enumerate(best))


@pytest.mark.parametrize("counts", [(3, 1), (4, 0), (9, 2)])
def test_stage_loss_equals_transformers(counts: tuple[int, ...]) -> None:
    logits = torch.randn(2, 6, generator=torch.Generator().manual_seed(1)) * 2
    boxes = rand_boxes(2, 6, seed=2)
    targets = [rand_boxes(n, seed=3 + n) for n in counts]
    matcher = DeformableDetrHungarianMatcher(class_cost=2, bbox_cost=5, giou_cost=2)
    theirs = DeformableDetrImageLoss(matcher, num_classes=1, focal_alpha=0.25, losses=["labels", "boxes"])
    wanted_boxes = [{"class_labels": torch.zeros(len(t), dtype=torch.long), "boxes": t} for t in targets]
    expected = theirs({"logits": logits[..., None], "pred_boxes": boxes}, wanted_boxes)
    wanted = [2 * expected["loss_ce"].item(), 5 * expected["loss_bbox"].item(), 2 * expected["loss_giou"].item()]
    assert stage_loss(logits, boxes, targets, CONFIG).tolist() == pytest.approx(wanted, rel=1e-5)


def test_stage_loss_by_hand() -> None:
    logits = T([[0.0, 0.0]])
    boxes = T([[[0.25, 0.25, 0.5, 0.5], [0.8, 0.8, 0.1, 0.1]]])
    target = [T([[0.5, 0.25, 0.5, 0.5]])]  # half a side to the right of the first: IoU 1/3, the hull is the union
    positive, negative = 0.25 * 0.25 * math.log(2), 0.75 * 0.25 * math.log(2)
    expected = [2 * (positive + negative), 5 * 0.25, 2 * (1 - 1 / 3)]
    assert stage_loss(logits, boxes, target, CONFIG).tolist() == pytest.approx(expected)
    heavy = ProposerConfig(loss_weights=(1, 10, 0))
    assert stage_loss(logits, boxes, target, heavy).tolist() == pytest.approx([expected[0] / 2, 2.5, 0])
    # twice the same image: the sums double and so does the number of boxes
    twice = stage_loss(logits.repeat(2, 1), boxes.repeat(2, 1, 1), target * 2, CONFIG)
    assert twice.tolist() == pytest.approx(expected)


def detections(closeness: float, targets: tuple[Tensor, ...], layers: int = 2) -> Detections:
    """Predictions that walk from random (0) to the truth (1): the first of 6 queries are the targets."""
    boxes, logits = rand_boxes(2, 6, seed=9), torch.randn(2, 6, generator=torch.Generator().manual_seed(9))
    for i, target in enumerate(targets):
        centred = box_ops.xyxy_to_cxcywh(target)
        boxes[i, : len(target)] += closeness * (centred - boxes[i, : len(target)])
        truth = torch.full((6,), -8.0)
        truth[: len(target)] = 8.0
        logits[i] += closeness * (truth - logits[i])
    stacked = logits.expand(layers, -1, -1)
    return Detections(logits, boxes, {"coco": stacked, "sa1b": -stacked}, boxes.expand(layers, -1, -1, -1), boxes)


def test_losses_fall_to_nothing_as_predictions_reach_the_truth() -> None:
    targets = (box_ops.cxcywh_to_xyxy(rand_boxes(3, seed=5)), box_ops.cxcywh_to_xyxy(rand_boxes(1, seed=6)))
    totals = []
    for closeness in (0.0, 0.25, 0.5, 0.75, 1.0):
        losses = detection_losses(detections(closeness, targets), targets, "coco", CONFIG)
        totals.append(sum(loss.item() for loss in losses.values()))
    assert totals == sorted(totals, reverse=True)
    assert totals[0] > 5
    assert totals[-1] < 1e-3
    wrong_head = detection_losses(detections(1.0, targets), targets, "sa1b", CONFIG)
    assert wrong_head["class"] > 10


def test_named_losses_sum_over_layers_and_leave_other_heads_alone() -> None:
    targets = (box_ops.cxcywh_to_xyxy(rand_boxes(3, seed=5)), box_ops.cxcywh_to_xyxy(rand_boxes(1, seed=6)))
    found = detections(0.3, targets, layers=3)
    losses = detection_losses(found, targets, "coco", CONFIG)
    assert list(losses) == ["class", "l1", "giou", "encoder_class", "encoder_l1", "encoder_giou"]
    for name in ("class", "l1", "giou"):  # here all three layers and the first stage say the same
        torch.testing.assert_close(losses[name], 3 * losses[f"encoder_{name}"])
    with pytest.raises(ValueError, match=r"source: got 'gold', expected one .* \['coco', 'sa1b'\]"):
        detection_losses(found, targets, "gold", CONFIG)


def test_a_batch_without_targets_asks_for_no_objects() -> None:
    none = (torch.zeros(0, 4), torch.zeros(0, 4))
    found = detections(0.0, ())
    losses = detection_losses(found, none, "coco", CONFIG)
    assert [losses[n].item() for n in ("l1", "giou", "encoder_l1", "encoder_giou")] == [0, 0, 0, 0]
    p = found.encoder_logits.double().sigmoid()  # all negative, normalised by 1
    expected = 2 * (0.75 * p**2 * -(1 - p).log()).sum().item()
    assert losses["encoder_class"].item() == pytest.approx(expected, rel=1e-5)
    assert losses["class"].item() == pytest.approx(2 * expected, rel=1e-5)


def test_gradient_of_a_far_box_is_finite_and_points_home() -> None:
    box = T([[[0.9, 0.9, 1e-6, 1e-6]]], requires_grad=True)
    loss = stage_loss(torch.zeros(1, 1), box, [T([[0.2, 0.2, 0.1, 0.1]])], CONFIG).sum()
    loss.backward()
    assert bool(box.grad.isfinite().all())
    assert bool((box.grad[0, 0, :2] > 0).all())
    assert bool((box.grad[0, 0, 2:] < 0).all())
