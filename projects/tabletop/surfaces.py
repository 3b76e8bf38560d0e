"""Table and wall patterns: grey-level tiles made once, tinted per scene between two quiet colours."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

Grey = NDArray[np.float32]

TABLE_PATTERNS = ("plain", "wood", "planks", "stone", "cloth", "checks")
WALL_PATTERNS = ("plain", "plaster", "bricks", "stripes", "dots", "panels")

_TURNABLE = ("wood", "planks", "stone", "cloth", "plaster")

_SIDE = 512
_VARIANTS = 4

# Low in saturation: the objects, not the room, carry the nine colour names.
_TINTS = (
    ((0.62, 0.47, 0.34), (0.47, 0.33, 0.22)),
    ((0.76, 0.63, 0.48), (0.62, 0.48, 0.34)),
    ((0.48, 0.35, 0.27), (0.36, 0.25, 0.19)),
    ((0.80, 0.78, 0.74), (0.67, 0.65, 0.61)),
    ((0.60, 0.61, 0.63), (0.49, 0.50, 0.53)),
    ((0.68, 0.72, 0.76), (0.56, 0.61, 0.66)),
    ((0.70, 0.74, 0.68), (0.58, 0.63, 0.57)),
    ((0.79, 0.71, 0.66), (0.68, 0.60, 0.55)),
    ((0.45, 0.47, 0.50), (0.35, 0.37, 0.40)),
    ((0.82, 0.77, 0.66), (0.72, 0.66, 0.55)),
)


@dataclass(frozen=True)
class Surface:
    """A pattern, which of its variants, its two colours (RGB, 0..1), tile size in units, and a turn."""

    pattern: str
    variant: int
    light: tuple[float, float, float]
    dark: tuple[float, float, float]
    tile: float
    turned: bool


def sample_surface(rng: Generator, patterns: tuple[str, ...]) -> Surface:
    """Draw a surface with one of the patterns."""
    pattern = patterns[int(rng.integers(len(patterns)))]
    light, dark = _TINTS[int(rng.integers(len(_TINTS)))]
    tone = rng.uniform(0.88, 1.1)
    return Surface(
        pattern=pattern,
        variant=int(rng.integers(_VARIANTS)),
        light=tuple(float(min(v * tone, 1.0)) for v in light),
        dark=tuple(float(min(v * tone, 1.0)) for v in dark),
        tile=float(rng.uniform(4.0, 6.5)),
        turned=bool(rng.random() < 0.5),
    )


def paint(surface: Surface, glow: NDArray[np.float64]) -> NDArray[np.uint8]:
    """The surface's tile under light of an RGB strength, (512, 512, 3); it repeats without a visible seam."""
    grey = _pattern(surface.pattern, surface.variant)
    if surface.turned and surface.pattern in _TURNABLE:
        grey = np.ascontiguousarray(grey.T)
    level = np.linspace(0, 1, 256)[:, None]
    colours = (level * np.array(surface.light) + (1 - level) * np.array(surface.dark)) * glow  # (256, 3)
    return np.take(np.clip(colours * 255 + 0.5, 0, 255).astype(np.uint8), grey, axis=0)


@cache
def _pattern(name: str, variant: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng([7, (TABLE_PATTERNS + WALL_PATTERNS).index(name), variant])
    grain = 0.04 * rng.standard_normal((_SIDE, _SIDE)).astype(np.float32)
    return np.clip((_PAINTERS[name](rng) + grain) * 255, 0, 255).astype(np.uint8)


def _noise(rng: Generator, rows: int, columns: int) -> Grey:
    """Smooth noise in 0..1 that tiles: a small random grid, wrapped and enlarged."""
    grid = rng.random((rows, columns)).astype(np.float32)
    wrapped = np.pad(grid, 2, mode="wrap")
    cell_h, cell_w = _SIDE // rows, _SIDE // columns
    large = Image.fromarray(wrapped).resize(((columns + 4) * cell_w, (rows + 4) * cell_h), Image.Resampling.BICUBIC)
    out = np.asarray(large)[2 * cell_h :, 2 * cell_w :][: rows * cell_h, : columns * cell_w]
    return np.clip(out, 0, 1)


def _grid() -> tuple[Grey, Grey]:
    y, x = np.mgrid[0:_SIDE, 0:_SIDE].astype(np.float32) / _SIDE
    return x, y


def _plain(rng: Generator) -> Grey:
    return 0.55 + 0.25 * (_noise(rng, 4, 4) - 0.5)


def _wood(rng: Generator) -> Grey:
    _, y = _grid()
    bend = 0.06 * _noise(rng, 4, 2) + 0.015 * _noise(rng, 16, 4)
    rings = 0.5 + 0.5 * np.sin(2 * np.pi * 9 * (y + bend))
    return 0.25 + 0.38 * rings + 0.35 * _noise(rng, 128, 4)


def _planks(rng: Generator) -> Grey:
    _, y = _grid()
    boards = 4
    tone = rng.random(boards).astype(np.float32)[(y * boards).astype(int)]
    joint = np.abs((y * boards) % 1.0 - 0.5) > 0.485
    return np.where(joint, 0.0, 0.30 + 0.35 * tone + 0.35 * _noise(rng, 128, 4))


def _stone(rng: Generator) -> Grey:
    cloud = 0.5 * _noise(rng, 4, 4) + 0.3 * _noise(rng, 8, 8) + 0.2 * _noise(rng, 32, 32)
    vein = np.exp(-np.abs(cloud - 0.5) * 45)
    return 0.25 + 0.9 * cloud - 0.35 * vein


def _cloth(rng: Generator) -> Grey:
    x, y = _grid()
    weave = np.sin(2 * np.pi * 96 * x) * np.sin(2 * np.pi * 96 * y)
    return 0.5 + 0.12 * weave + 0.3 * (_noise(rng, 8, 8) - 0.5)


def _checks(rng: Generator) -> Grey:
    x, y = _grid()
    n = int(rng.choice([4, 6, 8]))
    wide = ((x * n) % 1.0 < 0.5).astype(np.float32) + ((y * n) % 1.0 < 0.5).astype(np.float32)
    return 0.15 + 0.36 * wide + 0.1 * (_noise(rng, 8, 8) - 0.5)


def _plaster(rng: Generator) -> Grey:
    return 0.25 + 0.3 * _noise(rng, 8, 8) + 0.2 * _noise(rng, 32, 32) + 0.15 * _noise(rng, 128, 128)


def _bricks(rng: Generator) -> Grey:
    x, y = _grid()
    rows, columns = 16, 6
    row = (y * rows).astype(int)
    across = (x * columns + 0.5 * (row % 2)) % columns
    tone = rng.random((rows, columns)).astype(np.float32)[row, across.astype(int) % columns]
    joint = (np.abs(across % 1.0 - 0.5) > 0.475) | (np.abs((y * rows) % 1.0 - 0.5) > 0.44)
    return np.where(joint, 0.95, 0.15 + 0.45 * tone + 0.15 * _noise(rng, 64, 64))


def _stripes(rng: Generator) -> Grey:
    x, _ = _grid()
    n = int(rng.choice([6, 10, 14]))
    edge = np.clip(8 * np.sin(2 * np.pi * n * x), -1, 1)
    return 0.5 + 0.28 * edge + 0.08 * (_noise(rng, 8, 8) - 0.5)


def _dots(rng: Generator) -> Grey:
    x, y = _grid()
    n = int(rng.choice([8, 12]))
    shifted = x * n + 0.5 * ((y * n).astype(int) % 2)
    inside = np.hypot(shifted % 1.0 - 0.5, (y * n) % 1.0 - 0.5) < 0.2
    return np.where(inside, 0.9, 0.4) + 0.06 * (_noise(rng, 8, 8) - 0.5)


def _panels(rng: Generator) -> Grey:
    x, _ = _grid()
    n = int(rng.choice([4, 6]))
    groove = np.exp(-((np.abs((x * n) % 1.0 - 0.5) - 0.5) ** 2) * 3000)
    return 0.60 - 0.5 * groove + 0.2 * (_noise(rng, 4, 128) - 0.5)


_PAINTERS = {
    "plain": _plain,
    "wood": _wood,
    "planks": _planks,
    "stone": _stone,
    "cloth": _cloth,
    "checks": _checks,
    "plaster": _plaster,
    "bricks": _bricks,
    "stripes": _stripes,
    "dots": _dots,
    "panels": _panels,
}
