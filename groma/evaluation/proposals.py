"""Recall of class-agnostic proposals, as COCO's evaluator counts it: no class, no precision, only what was covered.

One-to-one greedy matching: of an image's ``k`` best proposals, best first, each takes the free ground-truth box of
highest IoU, if that IoU is at least the threshold. Recall is the share of ground-truth boxes taken, over all images;
average recall (AR) is its mean over the thresholds .50, .55, …, .95. Ground-truth boxes outside a size range are
ignored in that range: a proposal that covers a small box costs the large ones nothing.

Legend: T thresholds, R size ranges, N proposals, M ground-truth boxes of one image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from torch import Tensor

from groma import boxes as box
from groma.structures import Proposals

THRESHOLDS: tuple[float, ...] = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))
"""COCO's IoU thresholds .50:.95."""
RANGES: dict[str, tuple[float, float]] = {
    "all": (0.0, 1e10),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e10),
}
"""COCO's size ranges: areas in square pixels, both ends belonging to the range."""


@dataclass(frozen=True)
class ProposalReport:
    """AR over .50:.95 (``ar``), at one threshold (``ar50``, ``ar75``), by size (None: no box of that size), counts."""

    k: int
    ar: float
    ar50: float
    ar75: float
    small: float | None
    medium: float | None
    large: float | None
    images: int
    boxes: int

    def to_dict(self) -> dict[str, float | int]:
        """Plain numbers by name; a figure of which there is nothing to count is left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def recall_at(candidates: Sequence[Proposals], truths: Sequence[Tensor], k: int = 100, iou: float = 0.5) -> float:
    """Share in [0, 1] of the ground-truth boxes that the ``k`` best proposals cover at ``iou``, one-to-one.

    candidates: one Proposals per image, in any order of score; truths: one (M, 4) per image, in the same unit.
    ValueError if the lists differ in length, or if there is no ground-truth box at all.
    """
    ranges = [np.ones((1, len(truth)), bool) for truth in truths]
    return float(_recall(candidates, truths, ranges, k, (iou,))[0, 0])


def average_recall(
    candidates: Sequence[Proposals], truths: Sequence[Tensor], areas: Sequence[Tensor], k: int = 100
) -> ProposalReport:
    """All of COCO's AR figures at ``k`` proposals an image.

    ``areas``: one (M) per image, the areas in square pixels that decide about small, medium and large; COCO takes
    those of the masks. The rest as ``recall_at``.
    """
    if [len(area) for area in areas] != [len(truth) for truth in truths]:
        raise ValueError("areas: expected one area for every ground-truth box")
    bounds = np.array(list(RANGES.values()))  # (R, 2)
    ranges = []
    for area in areas:
        values = area.detach().cpu().double().numpy()[None]  # (1, M)
        ranges.append((values >= bounds[:, :1]) & (values <= bounds[:, 1:]))
    table = _recall(candidates, truths, ranges, k, THRESHOLDS)  # (R, T)
    small, medium, large = (None if np.isnan(row[0]) else float(row.mean()) for row in table[1:])
    return ProposalReport(
        k=k,
        ar=float(table[0].mean()),
        ar50=float(table[0, THRESHOLDS.index(0.5)]),
        ar75=float(table[0, THRESHOLDS.index(0.75)]),
        small=small,
        medium=medium,
        large=large,
        images=len(truths),
        boxes=sum(len(truth) for truth in truths),
    )


def _recall(
    candidates: Sequence[Proposals],
    truths: Sequence[Tensor],
    ranges: Sequence[np.ndarray],
    k: int,
    thresholds: Sequence[float],
) -> np.ndarray:
    """Recall (R, T); NaN for a range without boxes. ``ranges``: per image, which boxes count in which range (R, M)."""
    if len(candidates) != len(truths):
        raise ValueError(f"proposals of {len(candidates)} images for ground truth of {len(truths)}")
    if k < 1:
        raise ValueError(f"k: expected at least one proposal an image, got {k}")
    if not sum(len(truth) for truth in truths):
        raise ValueError(f"no ground-truth box in {len(truths)} images: there is no recall to measure")
    found = np.zeros((len(ranges[0]), len(thresholds)))
    total = np.zeros((len(ranges[0]), 1))
    for proposals, truth, counts in zip(candidates, truths, ranges, strict=True):
        total += counts.sum(1, keepdims=True)
        if len(truth) and len(proposals):
            best = proposals.scores.argsort(descending=True, stable=True)[:k]
            # Double precision, as COCO's evaluator: an IoU of exactly the threshold must fall on the same side.
            ious = box.iou(proposals.boxes[best].detach().cpu().double(), truth.detach().cpu().double())
            found += _covered(ious, counts, thresholds)
    with np.errstate(invalid="ignore"):
        recall: np.ndarray = found / total
    return recall


def _covered(ious: Tensor, counts: np.ndarray, thresholds: Sequence[float]) -> np.ndarray:
    """Ground-truth boxes taken (R, T), for ious (N, M) with the best proposal first and counts (R, M)."""
    table: np.ndarray = ious.numpy()
    minimum = np.minimum(np.array(thresholds), 1 - 1e-10)[None, :, None]  # (1, T, 1)
    free = np.ones((len(counts), len(thresholds), table.shape[1]), bool)  # (R, T, M)
    for row in table[table.max(1) >= minimum.min()]:
        able = free & (row >= minimum)
        # A box that counts goes before one that is ignored; among equals the last wins, as in COCO's evaluator.
        rank = np.where(able, row + 2.0 * counts[:, None], -1.0)
        last = rank.shape[-1] - 1 - rank[..., ::-1].argmax(-1)[..., None]  # (R, T, 1)
        taken = np.take_along_axis(able, last, -1)
        np.put_along_axis(free, last, np.take_along_axis(free, last, -1) & ~taken, -1)
    covered: np.ndarray = (~free & counts[:, None]).sum(-1)
    return covered
