"""The twelve kinds as triangle meshes, at the scale of one unit = a large cup's height.

Every surface is a grid patch; patches meet at sharp edges, and normals are smooth inside a patch.
Legend: U V grid sides, P points, F triangles.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_STEPS = 40  # around a surface of revolution
_METAL = (0.62, 0.63, 0.66)
FLAME = (1.0, 0.92, 0.45)  # no object is painted so: the renderer lets it glow
_PAPER = (0.93, 0.90, 0.82)


@dataclass(frozen=True)
class Mesh:
    """One kind: points (P,3), normals (P,3), triangles (F,3), and each point's paint.

    A point's colour is ``share * object colour + fixed``; share (P,), fixed (P,3).
    """

    points: Array
    normals: Array
    triangles: NDArray[np.int64]
    share: Array
    fixed: Array

    @property
    def radius(self) -> float:
        """Largest distance from the upright axis, in units."""
        return float(np.hypot(self.points[:, 0], self.points[:, 1]).max())

    @property
    def height(self) -> float:
        """Height above the table, in units."""
        return float(self.points[:, 2].max())


@dataclass(frozen=True)
class Patch:
    """A smooth piece of a surface, as a grid of points; ``share`` and ``fixed`` mix its colour."""

    grid: Array  # (U, V, 3); dP/dv x dP/du points outwards
    share: float = 1.0
    fixed: tuple[float, float, float] = (0.0, 0.0, 0.0)
    closed_v: bool = False
    closed_u: bool = False


def _lathe(profile: list[tuple[float, float]], share: float = 1.0, fixed: tuple = (0.0, 0.0, 0.0)) -> Patch:
    """Turn a profile of (radius, z), walked with the inside on its left, about the z axis."""
    rz = np.array(profile, dtype=float)
    angle = np.linspace(0, 2 * np.pi, _STEPS + 1)
    radius = np.maximum(rz[:, :1], 1e-4)  # a pole keeps a sliver so that its normal exists
    grid = np.stack([radius * np.cos(angle), radius * np.sin(angle), np.repeat(rz[:, 1:], len(angle), axis=1)], axis=-1)
    return Patch(grid, share, fixed, closed_v=True)


def _curve(knots: list[tuple[float, float]], steps: int = 24) -> list[tuple[float, float]]:
    """A smooth profile through the knots (Catmull-Rom)."""
    p = np.array([knots[0], *knots, knots[-1]], dtype=float)
    out: list[tuple[float, float]] = []
    spans = len(knots) - 1
    for t in np.linspace(0, spans, steps):
        i = min(int(t), spans - 1)
        f = t - i
        a, b, c, d = p[i : i + 4]
        q = 0.5 * (2 * b + (c - a) * f + (2 * a - 5 * b + 4 * c - d) * f**2 + (3 * b - a - 3 * c + d) * f**3)
        out.append((float(q[0]), float(q[1])))
    return out


def _tube(centre: Array, radius: float, closed: bool) -> Patch:
    """Sweep a circle along a curve (U,3) in the xz plane, or any plane where it does not twist."""
    step = np.gradient(centre, axis=0)
    if closed:
        step = np.roll(centre[:-1], -1, axis=0) - np.roll(centre[:-1], 1, axis=0)
        step = np.concatenate([step, step[:1]])
    tangent = step / np.linalg.norm(step, axis=1, keepdims=True)
    plane = np.cross(centre[0] - centre[len(centre) // 3], centre[len(centre) // 2] - centre[0])
    side = plane / np.linalg.norm(plane)
    across = np.cross(side, tangent)
    angle = np.linspace(0, 2 * np.pi, 15)[:, None]
    ring = np.cos(angle)[None] * across[:, None] + np.sin(angle)[None] * side
    return Patch(centre[:, None] + radius * ring, closed_v=True, closed_u=closed)


def _block(low: tuple, high: tuple, share: float = 1.0, fixed: tuple = (0.0, 0.0, 0.0)) -> list[Patch]:
    """The six flat faces of an upright block."""
    lo, hi = np.array(low, dtype=float), np.array(high, dtype=float)
    faces = []
    for axis in range(3):
        v_axis, u_axis = (axis + 1) % 3, (axis + 2) % 3
        for end in (0, 1):
            grid = np.zeros((2, 2, 3))
            for u in (0, 1):
                for v in (0, 1):
                    corner = np.zeros(3)
                    corner[axis] = (lo, hi)[end][axis]
                    corner[v_axis] = (lo, hi)[v if end else 1 - v][v_axis]
                    corner[u_axis] = (lo, hi)[u][u_axis]
                    grid[u, v] = corner
            faces.append(Patch(grid, share, fixed))
    return faces


def _normals(patch: Patch) -> Array:
    """Unit normals (U,V,3) of a grid patch."""
    du, dv = np.gradient(patch.grid, axis=0), np.gradient(patch.grid, axis=1)
    if patch.closed_v:
        dv[:, 0] = dv[:, -1] = patch.grid[:, 1] - patch.grid[:, -2]
    if patch.closed_u:
        du[0] = du[-1] = patch.grid[1] - patch.grid[-2]
    normal = np.cross(dv, du)
    return normal / np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-12)


def _join(patches: list[Patch]) -> Mesh:
    points, normals, triangles, share, fixed = [], [], [], [], []
    start = 0
    for patch in patches:
        u, v = patch.grid.shape[:2]
        index = start + np.arange(u * v).reshape(u, v)
        a, b, c, d = index[:-1, :-1], index[:-1, 1:], index[1:, 1:], index[1:, :-1]
        triangles += [np.stack([a, b, c], -1).reshape(-1, 3), np.stack([a, c, d], -1).reshape(-1, 3)]
        points.append(patch.grid.reshape(-1, 3))
        normals.append(_normals(patch).reshape(-1, 3))
        share.append(np.full(u * v, patch.share))
        fixed.append(np.tile(patch.fixed, (u * v, 1)))
        start += u * v
    return Mesh(*map(np.concatenate, (points, normals, triangles, share, fixed)))


def _arc(cx: float, cz: float, rx: float, rz: float, start: float, stop: float, steps: int) -> Array:
    angle = np.radians(np.linspace(start, stop, steps))
    return np.stack([cx + rx * np.cos(angle), np.zeros(steps), cz + rz * np.sin(angle)], axis=1)


def _cup() -> list[Patch]:
    return [
        _lathe([(0, 0), (0.34, 0)]),
        _lathe(_curve([(0.34, 0), (0.41, 0.10), (0.44, 0.5), (0.46, 0.95)], 12)),
        _lathe(_curve([(0.46, 0.95), (0.435, 0.975), (0.41, 0.95)], 6)),
        _lathe(_curve([(0.41, 0.95), (0.39, 0.5), (0.36, 0.12)], 10), share=0.72),
        _lathe([(0.36, 0.12), (0.0, 0.08)], share=0.62),
        _tube(_arc(0.43, 0.50, 0.33, 0.29, -84, 84, 18), 0.07, closed=False),
    ]


def _bowl() -> list[Patch]:
    return [
        _lathe([(0, 0), (0.30, 0)]),
        _lathe([(0.30, 0), (0.28, 0.07)]),
        _lathe(_curve([(0.28, 0.07), (0.55, 0.20), (0.74, 0.42), (0.80, 0.62)], 14)),
        _lathe(_curve([(0.80, 0.62), (0.775, 0.64), (0.75, 0.62)], 5)),
        _lathe(_curve([(0.75, 0.62), (0.68, 0.42), (0.48, 0.22), (0.0, 0.12)], 16), share=0.78),
    ]


def _plate() -> list[Patch]:
    return [
        _lathe([(0, 0), (0.55, 0)]),
        _lathe([(0.55, 0), (0.95, 0.13)]),
        _lathe([(0.95, 0.13), (0.95, 0.16), (0.93, 0.17)]),
        _lathe(_curve([(0.93, 0.17), (0.66, 0.10), (0.58, 0.05)], 8)),
        _lathe([(0.58, 0.05), (0.56, 0.045)], share=0.7),
        _lathe([(0.56, 0.045), (0.0, 0.045)], share=0.9),
    ]


def _bottle() -> list[Patch]:
    return [
        _lathe([(0, 0), (0.29, 0)]),
        _lathe(
            _curve([(0.29, 0), (0.33, 0.05), (0.33, 0.9), (0.30, 1.10), (0.14, 1.34), (0.115, 1.50), (0.115, 1.74)], 32)
        ),
        _lathe([(0.145, 1.68), (0.145, 1.88)], share=0.0, fixed=_METAL),
        _lathe([(0.145, 1.88), (0, 1.88)], share=0.0, fixed=_METAL),
    ]


def _vase() -> list[Patch]:
    outside = [(0.27, 0), (0.30, 0.06), (0.50, 0.50), (0.42, 0.90), (0.19, 1.20), (0.22, 1.38), (0.38, 1.55)]
    inside = [(0.35, 1.55), (0.18, 1.36), (0.14, 1.15)]
    return [
        _lathe([(0, 0), (0.27, 0)]),
        _lathe(_curve(outside, 36)),
        _lathe([(0.38, 1.55), (0.35, 1.55)]),
        _lathe(_curve(inside, 8), share=0.55),
        _lathe([(0.14, 1.15), (0.0, 1.15)], share=0.3),
    ]


def _ball() -> list[Patch]:
    angle = np.linspace(-np.pi / 2, np.pi / 2, 28)
    return [_lathe([(0.52 * float(np.cos(a)), 0.52 + 0.52 * float(np.sin(a))) for a in angle])]


def _book() -> list[Patch]:
    w, d, h, board = 0.64, 0.47, 0.30, 0.045
    return [
        *_block((-w, -d, 0), (w, d, board)),
        *_block((-w, -d, h - board), (w, d, h)),
        *_block((-w, -d, board), (w, -d + board, h - board)),
        *_block((-w + 0.04, -d + board, board), (w - 0.04, d - 0.04, h - board), share=0.0, fixed=_PAPER),
    ]


def _box() -> list[Patch]:
    return [
        *_block((-0.48, -0.40, 0), (0.48, 0.40, 0.56)),
        *_block((-0.48, -0.40, 0.56), (0.48, 0.40, 0.585), share=0.3),
        *_block((-0.52, -0.44, 0.585), (0.52, 0.44, 0.80), share=0.92),
    ]


def _can() -> list[Patch]:
    metal = {"share": 0.0, "fixed": _METAL}
    return [
        _lathe([(0, 0), (0.36, 0)], **metal),
        _lathe([(0.36, 0), (0.40, 0.03), (0.40, 0.09)], **metal),
        _lathe([(0.385, 0.09), (0.385, 1.01)]),
        _lathe([(0.40, 1.01), (0.40, 1.08), (0.37, 1.11)], **metal),
        _lathe([(0.37, 1.11), (0.35, 1.06)], share=0.0, fixed=(0.4, 0.4, 0.43)),
        _lathe([(0.35, 1.06), (0.22, 1.06)], **metal),
        _lathe([(0.22, 1.06), (0.20, 1.045)], share=0.0, fixed=(0.4, 0.4, 0.43)),
        _lathe([(0.20, 1.045), (0.0, 1.045)], **metal),
    ]


def _ring() -> list[Patch]:
    angle = np.linspace(0, 2 * np.pi, _STEPS + 9)
    centre = np.stack([0.50 * np.cos(angle), 0.50 * np.sin(angle), np.full(len(angle), 0.15)], axis=1)
    return [_tube(centre, 0.15, closed=True)]


def _cone() -> list[Patch]:
    return [
        _lathe([(0, 0), (0.55, 0)]),
        _lathe([(0.55, 0), (0.37, 0.45), (0.19, 0.9), (0.03, 1.3)]),
        _lathe(_curve([(0.03, 1.3), (0.015, 1.325), (0, 1.33)], 4)),
    ]


def _candle() -> list[Patch]:
    flame = _curve([(0, 1.14), (0.075, 1.24), (0.055, 1.36), (0, 1.52)], 12)
    return [
        _lathe([(0, 0), (0.22, 0)]),
        _lathe([(0.22, 0), (0.22, 1.05)]),
        _lathe(_curve([(0.22, 1.05), (0.19, 1.075), (0.12, 1.05), (0, 1.04)], 8), share=0.85),
        _lathe([(0.018, 1.04), (0.018, 1.16)], share=0.0, fixed=(0.08, 0.07, 0.06)),
        _lathe(flame, share=0.0, fixed=FLAME),
    ]


BUILDERS = {
    "cup": _cup,
    "bowl": _bowl,
    "plate": _plate,
    "bottle": _bottle,
    "vase": _vase,
    "ball": _ball,
    "book": _book,
    "box": _box,
    "can": _can,
    "ring": _ring,
    "cone": _cone,
    "candle": _candle,
}


@cache
def kind_mesh(kind: str, coarse: bool = False) -> Mesh:
    """The mesh of a kind, standing on z = 0 around the z axis; a cup's handle points along +x.

    A coarse mesh has about an eighth of the triangles, enough for a soft shadow.
    Raises KeyError for a word that is not in ``vocabulary.KINDS``.
    """
    patches = BUILDERS[kind]()
    return _join([_thin(patch) for patch in patches] if coarse else patches)


def _thin(patch: Patch) -> Patch:
    u, v = patch.grid.shape[:2]
    rows = np.linspace(0, u - 1, min(u, max(2, u // 2))).round().astype(int)
    columns = np.linspace(0, v - 1, min(v, 2 + v // 4)).round().astype(int)
    return replace(patch, grid=patch.grid[rows][:, columns])
