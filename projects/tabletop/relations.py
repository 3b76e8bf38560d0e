"""How two things of a scene stand to each other, as a person would say it.

Every relation answers True, False, or None for too close to call.
"""

from __future__ import annotations

from collections.abc import Callable

from projects.tabletop.observed import Thing

SIDE_MARGIN = 0.055  # of the picture's width, between centres, for left and right
DEPTH_MARGIN = 0.75  # units along the table, for in front of and behind
_NEAR_X = 0.20  # of the width: further apart sideways, nothing is "in front of" or "behind"
_SCALE_MARGIN = 1.35  # real size, for larger
LOOK_MARGIN = 1.25  # apparent area, for larger
_ANY_AREA_MARGIN = 1.5  # apparent area, for larger than a thing of another kind


def left_of(a: Thing, b: Thing, width: int) -> bool | None:
    """Is a to the left of b in the picture?"""
    return _above(b.centre_x - a.centre_x, SIDE_MARGIN * width)


def right_of(a: Thing, b: Thing, width: int) -> bool | None:
    """Is a to the right of b in the picture?"""
    return left_of(b, a, width)


def in_front_of(a: Thing, b: Thing, width: int) -> bool | None:
    """Is a nearer to the viewer than b, and not far off to its side?"""
    aside = _above(abs(a.centre_x - b.centre_x), _NEAR_X * width, slack=0.06 * width)
    closer = _above(b.distance - a.distance, DEPTH_MARGIN)
    if aside is True or closer is False:
        return False
    return None if aside is None else closer


def behind(a: Thing, b: Thing, width: int) -> bool | None:
    """Is a farther from the viewer than b, and not far off to its side?"""
    return in_front_of(b, a, width)


def between(a: Thing, b: Thing, c: Thing, width: int) -> bool | None:
    """Does a stand between b and c from left to right, at about their depth?"""
    low, high = sorted((b, c), key=lambda one: one.centre_x)
    side = _both(left_of(low, a, width), left_of(a, high, width))
    if side is not True:
        return side
    share = (a.centre_x - low.centre_x) / (high.centre_x - low.centre_x)
    off = abs(a.distance - (low.distance + share * (high.distance - low.distance)))
    if off < 1.0:
        return True
    return None if off < 2.2 else False


def _above(value: float, margin: float, slack: float | None = None) -> bool | None:
    """True at the margin, False below zero (or below the margin less a slack), else None."""
    floor = 0.0 if slack is None else margin - slack
    return True if value >= margin else False if value <= floor else None


def _both(a: bool | None, b: bool | None) -> bool | None:
    if a is False or b is False:
        return False
    return True if a and b else None


def larger(a: Thing, b: Thing) -> bool | None:
    """Is a larger than b? Among one kind it must be so in truth and in the picture."""
    if a.kind != b.kind:
        return _ordered(a.whole_area / max(b.whole_area, 1), _ANY_AREA_MARGIN)
    by_scale = _ordered(a.scale / b.scale, _SCALE_MARGIN)
    by_look = _ordered(a.whole_area / max(b.whole_area, 1), LOOK_MARGIN)
    return by_scale if by_scale is by_look else None


def nearer(a: Thing, b: Thing) -> bool | None:
    """Is a nearer to the viewer than b, wherever it stands from side to side?"""
    return _above(b.distance - a.distance, 0.6 * DEPTH_MARGIN)


def _ordered(ratio: float, margin: float) -> bool | None:
    return True if ratio >= margin else False if ratio <= 1 / margin else None


Relation = Callable[[Thing, Thing, int], bool | None]

RELATIONS: dict[str, Relation] = {
    "to the left of": left_of,
    "left of": left_of,
    "to the right of": right_of,
    "right of": right_of,
    "in front of": in_front_of,
    "behind": behind,
}
