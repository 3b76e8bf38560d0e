"""What a scene is, and how one is drawn from (seed, split, index).

The same three numbers give the same scene, whatever was sampled before and wherever it runs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from projects.tabletop.camera import Camera
from projects.tabletop.meshes import kind_mesh
from projects.tabletop.surfaces import TABLE_PATTERNS, WALL_PATTERNS, Surface, sample_surface
from projects.tabletop.vocabulary import COLOURS, FINISHES, SIZES, SPLITS, pairs

Array = NDArray[np.float64]

MOST_OBJECTS = 10
_GAP = 0.05  # between two footprints, in units
_TABLE_X, _TABLE_Y = 3.3, (-2.3, 2.5)


@dataclass(frozen=True)
class Placed:
    """One object on the table: what it is, where it stands (units), how it is turned (degrees).

    ``scale`` holds its three axis scales; it includes the size and a little variety of shape.
    """

    kind: str
    colour: str
    size: str
    finish: str
    x: float
    y: float
    yaw: float
    scale: tuple[float, float, float]
    shade: tuple[float, float, float]  # the colour as painted, RGB in 0..1

    def points(self, coarse: bool = False) -> Array:
        """The mesh's points (P,3) in the world."""
        local = kind_mesh(self.kind, coarse).points * np.array(self.scale)
        turn = np.radians(self.yaw)
        rotate = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        return np.concatenate([local[:, :2] @ rotate.T + (self.x, self.y), local[:, 2:]], axis=1)


@dataclass(frozen=True)
class Light:
    """A distant lamp: unit direction towards it, its RGB strength, and the strength of the room's light."""

    direction: tuple[float, float, float]
    key: tuple[float, float, float]
    room: float
    softness: float  # radius of the lamp as seen from the table, in radians
    shadow: float  # how much of the light the lamp's shadow takes away, 0..1


@dataclass(frozen=True)
class Scene:
    """Everything a picture is made of."""

    camera: Camera
    light: Light
    table: Surface
    wall: Surface
    wall_y: float  # the wall stands here, upright
    objects: tuple[Placed, ...]


def generator(seed: int, split: str, index: int, purpose: int) -> Generator:
    """The random numbers of one scene: purpose 0 for its looks, 1 for its words."""
    return np.random.default_rng([seed, SPLITS.index(split), index, purpose])


def sample_scene(seed: int, split: str, index: int, width: int = 640, height: int = 480) -> Scene:
    """Draw scene ``index`` of a split: 3 to 10 objects, most of them wholly in the picture.

    A training scene holds no held-out colour+kind pair.
    """
    rng = generator(seed, split, index, 0)
    camera = _sample_camera(rng, width, height)
    light = _sample_light(rng)
    table = sample_surface(rng, TABLE_PATTERNS)
    wall = sample_surface(rng, WALL_PATTERNS)
    count = int(rng.integers(3, MOST_OBJECTS + 1))
    allowed = pairs(split)
    placed: list[Placed] = []
    for _ in range(6 * count):  # a crowded table may refuse an object; another kind may still fit
        if len(placed) == count:
            break
        candidate = _sample_object(rng, allowed, placed)
        spot = _find_spot(rng, camera, candidate, placed)
        if spot is not None:
            placed.append(spot)
    return Scene(camera, light, table, wall, float(rng.uniform(3.3, 4.2)), tuple(placed))


def _sample_camera(rng: Generator, width: int, height: int) -> Camera:
    pitch = np.radians(rng.uniform(21, 42))
    azimuth = np.radians(rng.uniform(-14, 14))
    distance = rng.uniform(8.3, 9.7)
    target = np.array([rng.uniform(-0.25, 0.25), rng.uniform(-0.1, 0.3), rng.uniform(0.45, 0.75)])
    away = np.array([np.sin(azimuth) * np.cos(pitch), -np.cos(azimuth) * np.cos(pitch), np.sin(pitch)])
    position = target + distance * away
    return Camera(
        position=tuple(float(v) for v in position),
        target=tuple(float(v) for v in target),
        view_angle=float(rng.uniform(31, 35)),
        roll=float(rng.normal(0, 0.8)),
        width=width,
        height=height,
    )


def _sample_light(rng: Generator) -> Light:
    azimuth = np.radians(rng.uniform(-115, 115))  # 0: from behind the viewer
    elevation = np.radians(rng.uniform(36, 66))
    direction = (np.sin(azimuth) * np.cos(elevation), -np.cos(azimuth) * np.cos(elevation), np.sin(elevation))
    warmth = rng.uniform(-0.05, 0.07)
    strength = rng.uniform(0.72, 0.95)
    return Light(
        direction=tuple(float(v) for v in direction),
        key=(float(strength * (1 + warmth)), float(strength), float(strength * (1 - warmth))),
        room=float(rng.uniform(0.40, 0.54)),
        softness=float(rng.uniform(0.04, 0.16)),
        shadow=float(rng.uniform(0.38, 0.62)),
    )


def _sample_object(rng: Generator, allowed: list[tuple[str, str]], placed: list[Placed]) -> Placed:
    """A new object at the origin; kinds and colours repeat often, or there would be little to tell apart."""
    choices = allowed
    like = placed[int(rng.integers(len(placed)))].kind if placed else ""
    if placed and rng.random() < 0.30 and sum(one.kind == like for one in placed) < 3:
        choices = [pair for pair in allowed if pair[1] == like]
    elif placed and rng.random() < 0.22:
        like = placed[int(rng.integers(len(placed)))].colour
        choices = [pair for pair in allowed if pair[0] == like]
    colour, kind = choices[int(rng.integers(len(choices)))]
    twins = [one for one in placed if (one.colour, one.kind) == (colour, kind)]
    if not twins and placed and rng.random() < 0.08:  # a second one of the same, for plurals
        twin = placed[int(rng.integers(len(placed)))]
        colour, kind = twin.colour, twin.kind
    size = list(SIZES)[int(rng.integers(2))]
    finish = FINISHES[int(rng.integers(2))]
    yaw = rng.uniform(0, 360)
    if kind == "cup":  # a handle turned away would leave no handle to see
        yaw = rng.choice([rng.uniform(-75, 25), rng.uniform(155, 255)])
    scale = SIZES[size] * rng.uniform(0.97, 1.03) * rng.uniform(0.94, 1.06, size=3)
    shade = np.clip(np.array(COLOURS[colour]) * rng.uniform(0.92, 1.06) + rng.normal(0, 0.012, size=3), 0.02, 1)
    return Placed(kind, colour, size, finish, 0.0, 0.0, float(yaw), tuple(map(float, scale)), tuple(map(float, shade)))


def _find_spot(rng: Generator, camera: Camera, one: Placed, placed: list[Placed]) -> Placed | None:
    """Put an object where it touches no other and stays (all but a sliver) in the picture, or give up."""
    reach = _reach(one)
    for _ in range(24):
        x, y = rng.uniform(-_TABLE_X, _TABLE_X), rng.uniform(*_TABLE_Y)
        if any(np.hypot(x - o.x, y - o.y) < reach + _reach(o) + _GAP for o in placed):
            continue
        moved = replace(one, x=float(x), y=float(y))
        pixels = camera.project(moved.points())
        low, high = pixels.min(axis=0), pixels.max(axis=0)
        slack = 0.08 * (high - low)
        if np.all(low >= -slack) and np.all(high <= (camera.width, camera.height) + slack):
            return moved
    return None


def _reach(one: Placed) -> float:
    """Radius of the circle an object keeps free around itself; corners may come close."""
    return kind_mesh(one.kind).radius * max(one.scale[:2]) * (0.88 if one.kind in ("book", "box", "cup") else 1.0)
