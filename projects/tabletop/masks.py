"""A mask's tight box and its outline as COCO polygons."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Box = tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels; x2 and y2 are one past the last pixel


def tight_box(mask: Mask) -> Box:
    """The smallest box that holds every pixel of the mask (H, W). Raises ValueError for an empty mask."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        raise ValueError("an empty mask has no box")
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def polygons(mask: Mask) -> list[list[int]]:
    """Outlines of the mask along pixel borders, each ``[x0, y0, x1, y1, ...]``.

    COCO fills the union of a list of polygons and knows no holes, so the loops of one connected
    part are threaded into one polygon: the hole's loop is entered and left along the same line,
    which cancels out. Rasterised by the COCO tools the list gives the mask back exactly.
    """
    x1, y1, x2, y2 = tight_box(mask)
    loops = _loops(np.pad(mask[y1:y2, x1:x2], 1))
    outer = [loop for loop in loops if _area(loop) > 0]
    holes = [loop for loop in loops if _area(loop) < 0]
    for hole in holes:
        home = min((i for i in range(len(outer)) if _inside(hole[0], outer[i])), key=lambda i: _area(outer[i]))
        outer[home] = _thread(outer[home], hole)
    return [[v + shift for x, y in loop for v, shift in ((x, x1), (y, y1))] for loop in outer]


Point = tuple[int, int]


def _loops(padded: Mask) -> list[list[Point]]:
    """Closed walks along the mask's border with the mask on the right hand (y down), corners only."""
    inside = padded.astype(np.int8)
    step: dict[Point, list[Point]] = {}
    down = np.diff(inside, axis=0)  # +1: the mask begins below this line
    for y, x in zip(*(axis.tolist() for axis in np.nonzero(down)), strict=True):
        a, b = (x - 1, y), (x, y)
        start, end = (a, b) if down[y, x] > 0 else (b, a)
        step.setdefault(start, []).append(end)
    across = np.diff(inside, axis=1)
    for y, x in zip(*(axis.tolist() for axis in np.nonzero(across)), strict=True):
        a, b = (x, y - 1), (x, y)
        start, end = (b, a) if across[y, x] > 0 else (a, b)
        step.setdefault(start, []).append(end)
    loops = []
    while step:
        first = next(iter(step))
        loops.append(_corners(_walk(step, first)))
    return loops


def _walk(step: dict[Point, list[Point]], first: Point) -> list[Point]:
    path, here, came = [], first, (0, 0)
    while True:
        path.append(here)
        ways = step[here]
        # Where two parts touch at a corner, turn right: each part keeps a loop of its own.
        turn = [came[0] * (way[1] - here[1]) - came[1] * (way[0] - here[0]) for way in ways]
        way = ways.pop(int(np.argmax(turn)) if len(ways) > 1 else 0)
        if not ways:
            del step[here]
        came, here = (way[0] - here[0], way[1] - here[1]), way
        if here == first:
            return path


def _corners(path: list[Point]) -> list[Point]:
    kept = []
    for i, (x, y) in enumerate(path):
        (px, py), (nx, ny) = path[i - 1], path[(i + 1) % len(path)]
        if (x - px) * (ny - y) != (y - py) * (nx - x):
            kept.append((x, y))
    return kept


def _area(loop: list[Point]) -> float:
    xy = np.array(loop, dtype=np.int64)
    following = np.roll(xy, -1, axis=0)
    return float(np.sum(xy[:, 0] * following[:, 1] - following[:, 0] * xy[:, 1])) / 2


def _inside(point: Point, loop: list[Point]) -> bool:
    """Is the pixel down and right of a corner inside a loop? (Crossings of a ray to the left.)"""
    x, y = point[0] - 0.5, point[1] + 0.5
    crossings = 0
    for (ax, ay), (bx, by) in zip(loop, loop[1:] + loop[:1], strict=True):
        if ax == bx and ax < x and min(ay, by) < y < max(ay, by):
            crossings += 1
    return crossings % 2 == 1


def _thread(outer: list[Point], hole: list[Point]) -> list[Point]:
    """Enter the hole from the outer corner nearest to it and return the same way."""
    a, b = np.array(outer), np.array(hole)
    distance = np.abs(a[:, None] - b[None]).sum(axis=-1)
    i, j = np.unravel_index(int(distance.argmin()), distance.shape)
    return [*outer[: i + 1], *hole[j:], *hole[: j + 1], *outer[i:]]


def compressed_rle(mask: Mask) -> str:
    """The ``counts`` string of a COCO run-length encoding of a mask (H, W).

    Runs go down the columns, beginning with a run of zeros. From the third on each is written as
    the difference to the one two before, in groups of five bits, each shifted into printable ASCII.
    """
    flat = mask.ravel(order="F")
    borders = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate([[0], borders, [flat.size]])).tolist()
    if flat[0]:
        runs.insert(0, 0)
    text = []
    for i, run in enumerate(runs):
        value = run - runs[i - 2] if i > 2 else run
        more = True
        while more:
            group = value & 31
            value >>= 5
            more = value != (-1 if group & 16 else 0)
            text.append(chr((group | 32 if more else group) + 48))
    return "".join(text)
