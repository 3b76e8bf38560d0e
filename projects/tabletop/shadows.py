"""Soft shadows on the table and the wall, as two grey maps.

A shadow on a plane is the mesh sheared along the light. Each tile of one picture holds the
objects sheared along one ray of the lamp or of the room's light; the mean of the tiles is the
soft shadow. Nothing is traced, so a software renderer does it in milliseconds.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from vtkmodules.vtkCommonDataModel import vtkPolyData
from vtkmodules.vtkRenderingCore import vtkActor, vtkPolyDataMapper, vtkRenderer, vtkRenderWindow

from projects.tabletop.gl import draw, make_renderer, matrix, polydata, read_pixels
from projects.tabletop.meshes import kind_mesh
from projects.tabletop.world import Light, Placed

Array = NDArray[np.float64]
Shade = NDArray[np.float32]

TABLE_SPAN = (-6.0, 6.0, -4.5, 4.5)  # x, then y, of the table's map in units
WALL_SPAN = (-6.0, 6.0, 0.0, 9.0)  # x, then z, of the wall's map
_TILES = 5  # across and up
_LAMP, _ROOM, _WALL = 8, 10, 7  # rays: 25 in all
_ROOM_LOSS = 0.55  # share of the room's light that a crowded place loses


class ShadowCaster:
    """Turns objects into shadow maps, in a window it shares with the other passes."""

    def __init__(self, window: vtkRenderWindow) -> None:
        self._window = window
        self._mapper = vtkPolyDataMapper()
        actor = vtkActor()
        actor.SetMapper(self._mapper)
        actor.GetProperty().LightingOff()
        across, up = window.GetSize()
        self._width, self._height = across // _TILES, up // _TILES
        self._renderers = []
        for tile in range(_TILES * _TILES):
            x, y = tile % _TILES * self._width, tile // _TILES * self._height
            renderer = make_renderer(window, x, y, self._width, self._height)
            renderer.AddActor(actor)
            self._renderers.append(renderer)

    def cast(self, objects: tuple[Placed, ...], light: Light, wall_y: float) -> tuple[Shade, Shade]:
        """Share of light taken (rows, columns), 0..1, on the table and on the wall; first row at low y or z."""
        self._mapper.SetInputData(_together(objects))
        lamp = _cone(np.array(light.direction), light.softness, _LAMP)
        rays = [*lamp, *_dome(_ROOM)]
        for renderer, ray in zip(self._renderers[: len(rays)], rays, strict=True):
            _aim_at_table(renderer, ray)
        facing_wall = light.direction[1] < -0.12
        low_lamp = _cone(np.array(light.direction), light.softness, _WALL)
        for renderer, ray in zip(self._renderers[len(rays) :], low_lamp, strict=True):
            _aim_at_wall(renderer, ray if facing_wall else np.array([0.0, -1.0, 1.0]), wall_y)
        draw(self._window, self._renderers)
        tiles = self._read()
        table = light.shadow * _soften(tiles[:_LAMP].mean(axis=0), 1.0)
        room = _ROOM_LOSS * _soften(tiles[_LAMP : _LAMP + _ROOM].mean(axis=0), 2.5)
        table = 1 - (1 - table) * (1 - room)
        wall = light.shadow * _soften(tiles[_LAMP + _ROOM :].mean(axis=0), 1.5)
        return table, wall if facing_wall else np.zeros_like(wall)

    def _read(self) -> Shade:
        width, height = self._width * _TILES, self._height * _TILES
        covered = read_pixels(self._window, width, height, alpha=False)[..., 0] > 0
        tiles = covered.reshape(_TILES, self._height, _TILES, self._width).transpose(0, 2, 1, 3)
        return tiles.reshape(_TILES * _TILES, self._height, self._width).astype(np.float32)


def _together(objects: tuple[Placed, ...]) -> vtkPolyData:
    """All objects as one mesh: one drawing call a tile."""
    points, triangles, start = [], [], 0
    for one in objects:
        points.append(one.points(coarse=True))
        triangles.append(kind_mesh(one.kind, coarse=True).triangles + start)
        start += len(points[-1])
    return polydata(np.concatenate(points), np.concatenate(triangles))


def _cone(direction: Array, radius: float, count: int) -> list[Array]:
    """Rays spread evenly over a disc around a direction (a sunflower's spiral)."""
    side = np.cross(direction, (0.0, 0.0, 1.0))
    side = side / np.linalg.norm(side)
    up = np.cross(side, direction)
    rays = []
    for i in range(count):
        r, turn = radius * np.sqrt((i + 0.5) / count), i * 2.399963
        ray = direction + r * (np.cos(turn) * side + np.sin(turn) * up)
        rays.append(ray / np.linalg.norm(ray))
    return rays


def _dome(count: int) -> list[Array]:
    """Rays from all round, none close to the table."""
    rays = []
    for i in range(count):
        r, turn = 0.82 * np.sqrt((i + 0.5) / count), i * 2.399963
        rays.append(np.array([r * np.cos(turn), r * np.sin(turn), np.sqrt(1 - r * r)]))
    return rays


def _aim_at_table(renderer: vtkRenderer, ray: Array) -> None:
    x0, x1, y0, y1 = TABLE_SPAN
    shear = np.eye(4)
    shear[:2, 2] = -ray[:2] / ray[2]
    camera = renderer.GetActiveCamera()
    camera.SetFocalPoint((x0 + x1) / 2, (y0 + y1) / 2, 0)
    camera.SetPosition((x0 + x1) / 2, (y0 + y1) / 2, 20)
    camera.SetViewUp(0, 1, 0)
    _orthographic(renderer, (y1 - y0) / 2, shear)


def _aim_at_wall(renderer: vtkRenderer, ray: Array, wall_y: float) -> None:
    x0, x1, z0, z1 = WALL_SPAN
    shear = np.eye(4)
    for axis in (0, 2):
        shear[axis, 1] = -ray[axis] / ray[1]
        shear[axis, 3] = ray[axis] / ray[1] * wall_y
    camera = renderer.GetActiveCamera()
    camera.SetFocalPoint((x0 + x1) / 2, 0, (z0 + z1) / 2)
    camera.SetPosition((x0 + x1) / 2, -20, (z0 + z1) / 2)
    camera.SetViewUp(0, 0, 1)
    _orthographic(renderer, (z1 - z0) / 2, shear)


def _orthographic(renderer: vtkRenderer, half_height: float, shear: Array) -> None:
    camera = renderer.GetActiveCamera()
    camera.ParallelProjectionOn()
    camera.SetParallelScale(half_height)
    camera.SetClippingRange(1, 40)
    camera.SetModelTransformMatrix(matrix(shear))


def _soften(shade: Shade, radius: float) -> Shade:
    image = Image.fromarray((shade * 255 + 0.5).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), dtype=np.float32) / 255
