"""Is a score what it says? Of all answers that score 0.7, seven in ten should be right.

Expected calibration error (ECE) and the reliability table are those of Guo et al. 2017 ("On Calibration of Modern
Neural Networks", section 2, equation 3): bins of equal width ((m - 1) / M, m / M], M = 15 as in their section 5; ECE
is the mean over answers of the gap between a bin's mean score and its share of right answers. A score can be
calibrated and useless (always the base rate), so the two proper scoring rules stand beside it: negative
log-likelihood (NLL) and the Brier score, the mean squared difference of score and outcome (Brier 1950).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

BINS = 15
FLOOR = 1e-12
"""NLL takes a probability below this for this: a certain answer that is wrong costs 27.6 nats, not infinitely many."""


@dataclass(frozen=True)
class Bin:
    """The answers that score in (low, high]; the first bin has score 0 too. ``score``: their mean, ``right``: share."""

    low: float
    high: float
    count: int
    score: float
    right: float


@dataclass(frozen=True)
class Reliability:
    """ECE in [0, 1], NLL in nats and Brier score in [0, 1] over ``count`` answers; ``bins`` leaves out empty ones."""

    count: int
    ece: float
    nll: float
    brier: float
    bins: tuple[Bin, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, rounded to six decimals."""
        rows = [
            {"low": round(b.low, 6), "high": round(b.high, 6), "count": b.count, "score": round(b.score, 6),
             "right": round(b.right, 6)}
            for b in self.bins
        ]  # fmt: skip
        figures = {name: round(float(getattr(self, name)), 6) for name in ("ece", "nll", "brier")}
        return {"count": self.count, **figures, "bins": rows}


def reliability(scores: np.ndarray, right: np.ndarray, bins: int = BINS) -> Reliability:
    """Figures of scores (E) in [0, 1] against what happened, ``right`` (E) bool.

    ValueError for no scores, lengths that differ, or a score that is no number from 0 to 1.

    >>> reliability(np.array([0.9, 0.8, 0.1]), np.array([True, False, False]), bins=2).ece
    0.2666666666666667
    """
    scores, right = np.asarray(scores, dtype=np.float64), np.asarray(right, dtype=bool)
    if scores.shape != right.shape or scores.ndim != 1 or not len(scores):
        raise ValueError(f"scores {scores.shape} and outcomes {right.shape}: expected one (E) each, E at least 1")
    if not ((scores >= 0) & (scores <= 1)).all():  # false for NaN too
        wrong = scores[~((scores >= 0) & (scores <= 1))][0]
        raise ValueError(f"score: got {wrong}, expected a number from 0 to 1")
    edges = np.arange(bins + 1) / bins
    place = np.searchsorted(edges[1:-1], scores, side="left")  # an edge belongs to the bin below it
    rows = [
        Bin(float(edges[m]), float(edges[m + 1]), int(own.sum()), float(scores[own].mean()), float(right[own].mean()))
        for m in range(bins)
        if (own := place == m).any()
    ]
    likelihood = np.where(right, scores, 1 - scores)
    return Reliability(
        count=len(scores),
        ece=sum(row.count * abs(row.score - row.right) for row in rows) / len(scores),
        nll=float(-np.log(np.maximum(likelihood, FLOOR)).mean()),
        brier=float(((scores - right) ** 2).mean()),
        bins=tuple(rows),
    )
