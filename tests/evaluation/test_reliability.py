"""Reliability figures and the threshold that refuses, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from groma.evaluation.calibration import best_threshold
from groma.evaluation.reliability import FLOOR, reliability


def test_reliability_by_hand() -> None:
    # Two bins: 0.1 and 0.5 fall into [0, 0.5], mean 0.3, half right; 0.8 and 1.0 into (0.5, 1], mean 0.9, half right.
    found = reliability(np.array([0.1, 0.8, 0.5, 1.0]), np.array([False, True, True, False]), bins=2)
    assert [(b.low, b.high, b.count) for b in found.bins] == [(0, 0.5, 2), (0.5, 1, 2)]
    assert [b.score for b in found.bins] == pytest.approx([0.3, 0.9])
    assert [b.right for b in found.bins] == [0.5, 0.5]
    assert found.ece == pytest.approx((2 * 0.2 + 2 * 0.4) / 4)
    assert found.brier == pytest.approx((0.01 + 0.04 + 0.25 + 1) / 4)
    assert found.nll == pytest.approx(-(math.log(0.9) + math.log(0.8) + math.log(0.5) + math.log(FLOOR)) / 4)
    assert found.to_dict()["bins"][1] == {"low": 0.5, "high": 1.0, "count": 2, "score": 0.9, "right": 0.5}


def test_bins_are_fifteen_and_open_below() -> None:
    found = reliability(np.array([0.0, 1 / 15, 0.0667, 1.0]), np.ones(4, bool))
    assert [(round(b.low * 15), round(b.high * 15), b.count) for b in found.bins] == [(0, 1, 2), (1, 2, 1), (14, 15, 1)]


@pytest.mark.parametrize("scores", [[math.nan, 0.5], [1.2, 0.5], [-0.1, 0.5], [], [0.5]])
def test_reliability_of_what_is_no_probability(scores: list[float]) -> None:
    with pytest.raises(ValueError, match=r"from 0 to 1|one \(E\) each"):
        reliability(np.array(scores), np.array([True, False][: 2 if scores else 0]))


# -- the threshold -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "present, absent, cap, expected",
    [
        ([0.9, 0.8, 0.3], [0.1, 0.2, 0.4], 1.0, (0.25, 2 / 3, 0.0)),  # 0.6 is as good and refuses more: the lower wins
        ([0.9, 0.8, 0.3], [0.1, 0.4, 0.4, 0.4], 1.0, (0.6, 1.0, 1 / 3)),
        ([0.9, 0.8, 0.3], [0.1, 0.4, 0.4, 0.4], 1 / 3, (0.6, 1.0, 1 / 3)),  # the cap itself is allowed
        ([0.9, 0.8, 0.3], [0.1, 0.4, 0.4, 0.4], 0.33, (0.2, 0.25, 0.0)),
        ([0.5], [0.9], 1.0, (0.0, 0.0, 0.0)),  # the wrong way round: refuse nothing
        ([0.5, 0.5], [0.5], 1.0, (0.0, 0.0, 0.0)),  # all equal
        ([1.0], [0.0], 0.0, (0.5, 1.0, 0.0)),
        ([0.2, 0.6], [0.2, 0.6], 1.0, (0.0, 0.0, 0.0)),  # ties everywhere
    ],
)
def test_threshold(present: list[float], absent: list[float], cap: float, expected: tuple[float, ...]) -> None:
    assert best_threshold(present, absent, cap) == pytest.approx(expected)


def test_threshold_keeps_its_cap_and_beats_every_other() -> None:
    random = np.random.default_rng(0)
    yes, no = (np.round(random.beta(*shape, 300), 2) for shape in ((4, 2), (2, 3)))
    for cap in (0.0, 0.05, 0.1, 1.0):
        threshold, refused, wronged = best_threshold(yes, no, cap)
        assert (refused, wronged) == ((no < threshold).mean(), (yes < threshold).mean())
        assert wronged <= cap
        tried = [((no < t).mean(), (yes < t).mean()) for t in np.linspace(0, 1, 401)]
        assert refused - wronged >= max(r - w for r, w in tried if w <= cap) - 1e-12


@pytest.mark.parametrize("present, absent", [([], [0.5]), ([0.5], []), ([math.nan], [0.1]), ([0.5], [2.0])])
def test_threshold_of_nothing_or_no_numbers(present: list[float], absent: list[float]) -> None:
    with pytest.raises(ValueError, match="some of both|from 0 to 1"):
        best_threshold(present, absent)
