"""Draws a scene: the picture, and which object each pixel shows.

One window with several renderers serves every pass of a worker, so meshes and shaders are
uploaded once. The objects are drawn at twice the picture's size and halved over the room, which
mipmaps keep smooth; the id pass is drawn at the picture's size, flat, by the same camera.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from vtkmodules.vtkCommonDataModel import vtkPolyData
from vtkmodules.vtkRenderingCore import vtkActor, vtkLight, vtkPolyDataMapper, vtkRenderer

from projects.tabletop.gl import Quad, draw, make_renderer, make_window, painted, polydata, read_pixels
from projects.tabletop.meshes import kind_mesh
from projects.tabletop.shadows import TABLE_SPAN, WALL_SPAN, ShadowCaster
from projects.tabletop.surfaces import paint
from projects.tabletop.world import MOST_OBJECTS, Light, Placed, Scene

_SCALE = 2
_GLOSS = {"matte": 0.0, "shiny": 1.0}
_ID_STEP = 20  # distance between two ids in the red channel
_ID_OF_RED = ((np.arange(256) + _ID_STEP // 2) // _ID_STEP).astype(np.uint8)

# After VTK's own lights: a darker foot (the table takes light away), light from above rather than
# from below, and on shiny things a window and the bright room mirrored in the surface.
_FINISH_SHADER = """//VTK::Light::Impl
  vec3 eyeRay = normalize(vertexVC.xyz);
  float facingUp = dot(normalVCVSOutput, skyVC);
  float aboveTable = dot(skyVC, vertexVC.xyz) + eyeHeight;
  vec3 lit = fragOutput0.rgb * mix(0.66, 1.0, smoothstep(-0.05, 0.5, aboveTable)) * (0.87 + 0.13 * facingUp);
  if (gloss > 0.5) {
    vec3 mirror = reflect(eyeRay, normalVCVSOutput);
    float grazing = pow(1.0 - max(dot(-eyeRay, normalVCVSOutput), 0.0), 4.0);
    vec3 room = mix(tableTone, vec3(0.92, 0.95, 1.0), smoothstep(-0.25, 0.45, dot(mirror, skyVC)));
    lit = mix(lit, room, 0.07 + 0.55 * grazing);
    float ahead = dot(mirror, lampVC);
    vec2 pane = vec2(dot(mirror, lampRightVC), dot(mirror, lampUpVC)) / max(ahead, 0.01);
    vec2 edge = smoothstep(vec2(0.34, 0.44), vec2(0.27, 0.37), abs(pane));
    float bars = smoothstep(0.015, 0.035, abs(pane.x)) * smoothstep(0.015, 0.035, abs(pane.y));
    // Strip lights under a ceiling close by: even a flat lid shows one, since they move with the place.
    float rise = dot(mirror, skyVC);
    vec3 above = vertexVC.xyz + mirror * (3.0 - aboveTable) / max(rise, 0.05);
    float across = fract(dot(above, stripVC));
    float strip = smoothstep(0.0, 0.05, across) * smoothstep(0.30, 0.25, across);
    lit += strip * smoothstep(0.22, 0.42, rise) * (0.16 + 0.5 * grazing) * vec3(1.0, 0.98, 0.95);
    lit += step(0.0, ahead) * edge.x * edge.y * (0.35 + 0.65 * bars) * vec3(0.80);
  }
  vec4 paint = vertexColorVSOutput;
  bool flame = paint.r > 0.99 && paint.g > 0.90 && abs(paint.b - 0.45) < 0.02;
  fragOutput0.rgb = flame ? paint.rgb * (0.85 + 0.2 * max(-dot(eyeRay, normalVCVSOutput), 0.0)) : lit;
"""


@dataclass(frozen=True)
class Rendered:
    """A drawn scene.

    image: (H, W, 3) RGB. ids: (H, W), 0 for table and wall, i + 1 where object i is seen.
    whole: the area in pixels each object would cover if nothing stood before it.
    """

    image: NDArray[np.uint8]
    ids: NDArray[np.uint8]
    whole: tuple[int, ...]


class Renderer:
    """Draws scenes of one picture size; make one per process."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._window = make_window(_SCALE * width, _SCALE * height)
        self._colour = make_renderer(self._window, 0, 0, _SCALE * width, _SCALE * height)
        self._room = make_renderer(self._window, 0, 0, width, height)
        self._flat = make_renderer(self._window, 0, 0, width, height)
        self._key, self._fill = vtkLight(), vtkLight()
        for light in (self._key, self._fill):
            light.SetLightTypeToSceneLight()
            self._colour.AddLight(light)
        self._table, self._wall = (Quad(self._room, repeat=True, smooth=True) for _ in range(2))
        self._table_shade, self._wall_shade = (Quad(self._room, repeat=False, smooth=False) for _ in range(2))
        self._solid = [_solid_actor(self._colour) for _ in range(MOST_OBJECTS)]
        self._plain = [_flat_actor(self._flat, i + 1) for i in range(MOST_OBJECTS)]
        self._shadows = ShadowCaster(self._window)
        self._meshes: dict[str, vtkPolyData] = {}

    def render(self, scene: Scene) -> Rendered:
        """Draw a scene. Raises ValueError for another picture size or too many objects."""
        if (scene.camera.width, scene.camera.height) != (self.width, self.height):
            raise ValueError(
                f"the scene is {scene.camera.width}x{scene.camera.height}, this renderer {self.width}x{self.height}"
            )
        if len(scene.objects) > MOST_OBJECTS:
            raise ValueError(f"{len(scene.objects)} objects, at most {MOST_OBJECTS} can be drawn")
        self._set_objects(scene)
        self._set_cameras(scene)
        ids = self._read_ids()
        whole = self._whole_areas(scene, ids)
        self._set_room(scene)
        return Rendered(self._compose(), ids, whole)

    def _compose(self) -> NDArray[np.uint8]:
        """The halved objects over the room; their alpha is how much of a pixel they cover."""
        draw(self._window, [self._room])
        room = Image.fromarray(read_pixels(self._window, self.width, self.height, alpha=False))
        draw(self._window, [self._colour])
        large = read_pixels(self._window, _SCALE * self.width, _SCALE * self.height, alpha=True)
        # Drawn or not drawn, nothing between: where alpha is 0 so are the colours, which is what "RGBa" asks for.
        weighed = Image.frombuffer("RGBa", large.shape[1::-1], large.tobytes(), "raw", "RGBa", 0, 1)
        bands = weighed.reduce(_SCALE).convert("RGBA").split()
        picture = Image.composite(Image.merge("RGB", bands[:3]), room, bands[3])
        return np.ascontiguousarray(np.asarray(picture)[::-1])

    def _set_objects(self, scene: Scene) -> None:
        for slot in range(MOST_OBJECTS):
            used = slot < len(scene.objects)
            self._solid[slot].SetVisibility(used)
            self._plain[slot].SetVisibility(used)
            if not used:
                continue
            one = scene.objects[slot]
            base = self._mesh(one.kind)
            self._plain[slot].GetMapper().SetInputData(base)
            self._solid[slot].GetMapper().SetInputData(painted(base, _point_colours(one)))
            self._solid[slot].GetShaderProperty().GetFragmentCustomUniforms().SetUniformf("gloss", _GLOSS[one.finish])
            for actor in (self._solid[slot], self._plain[slot]):
                actor.SetScale(*one.scale)
                actor.SetOrientation(0, 0, one.yaw)
                actor.SetPosition(one.x, one.y, 0)

    def _mesh(self, kind: str) -> vtkPolyData:
        if kind not in self._meshes:
            self._meshes[kind] = _solid_mesh(kind)
        return self._meshes[kind]

    def _set_cameras(self, scene: Scene) -> None:
        view = scene.camera
        up = view.axes()[1]
        for renderer in (self._colour, self._room, self._flat):
            camera = renderer.GetActiveCamera()
            camera.SetPosition(*view.position)
            camera.SetFocalPoint(*view.target)
            camera.SetViewUp(*up)
            camera.SetViewAngle(view.view_angle)
            camera.SetClippingRange(2.0, 40.0)

    def _read_ids(self) -> NDArray[np.uint8]:
        draw(self._window, [self._flat])
        red = read_pixels(self._window, self.width, self.height, alpha=False)[::-1, :, 0]
        return _ID_OF_RED[red]

    def _whole_areas(self, scene: Scene, ids: NDArray[np.uint8]) -> tuple[int, ...]:
        """Each object drawn alone, where another one comes near it; elsewhere what is seen is the whole."""
        seen = np.bincount(ids.ravel(), minlength=MOST_OBJECTS + 1)[1:]
        boxes = []
        for one in scene.objects:
            pixels = scene.camera.project(one.points())
            boxes.append(np.concatenate([pixels.min(axis=0) - 1, pixels.max(axis=0) + 1]))
        whole = [int(seen[i]) for i in range(len(boxes))]
        crowded = [i for i in range(len(boxes)) if any(_touch(boxes[i], boxes[j]) for j in range(len(boxes)) if j != i)]
        for group in _apart(crowded, boxes):
            areas = self._areas_alone(group, len(boxes))
            for i in group:
                whole[i] = int(areas[i])
        return tuple(whole)

    def _areas_alone(self, group: list[int], count: int) -> NDArray[np.int64]:
        """Areas (MOST_OBJECTS) in pixels with only ``group`` drawn, whose members do not touch."""
        for other in range(count):
            self._plain[other].SetVisibility(other in group)
        areas = np.bincount(self._read_ids().ravel(), minlength=MOST_OBJECTS + 1)[1:]
        for other in range(count):
            self._plain[other].SetVisibility(True)
        return areas

    def _set_room(self, scene: Scene) -> None:
        table_shade, wall_shade = self._shadows.cast(scene.objects, scene.light, scene.wall_y)
        light = scene.light
        glow = light.room + np.array(light.key) * (0.25 + 0.45 * light.direction[2])
        wall_glow = light.room + np.array(light.key) * (0.28 + 0.35 * max(-light.direction[1], 0.0))
        self._table.paint(paint(scene.table, np.minimum(glow, 1.08)))
        self._wall.paint(paint(scene.wall, np.minimum(wall_glow, 1.08)))
        y = scene.wall_y
        flat = np.array([[-14, -9, 0], [14, -9, 0], [14, y, 0], [-14, y, 0]], dtype=float)
        self._table.place(flat, flat[:, :2] / scene.table.tile)
        upright = np.array([[-14, y, 0], [14, y, 0], [14, y, 12], [-14, y, 12]], dtype=float)
        self._wall.place(upright, upright[:, [0, 2]] / scene.wall.tile)
        self._place_shades(table_shade, wall_shade, y)
        self._set_lights(light)
        self._set_finish(scene)

    def _place_shades(self, table: NDArray[np.float32], wall: NDArray[np.float32], y: float) -> None:
        x0, x1, y0, y1 = TABLE_SPAN
        rows = np.linspace(y0, y1, len(table))[:, None]
        table = 1 - (1 - table) * (1 - 0.45 * np.exp(-np.maximum(y - rows, 0) / 0.35))  # the wall takes light too
        self._table_shade.paint(_veil(table))
        front = y - 0.006  # the veils float just before the surfaces and meet without crossing
        corners = np.array([[-14, -9, 0.004], [14, -9, 0.004], [14, front, 0.004], [-14, front, 0.004]])
        self._table_shade.place(corners, (corners[:, :2] - (x0, y0)) / (x1 - x0, y1 - y0))
        _, _, z0, z1 = WALL_SPAN
        rows = np.linspace(z0, z1, len(wall))[:, None]
        wall = 1 - (1 - wall) * (1 - 0.40 * np.exp(-rows / 0.45))
        self._wall_shade.paint(_veil(wall))
        corners = np.array([[-14, front, 0.004], [14, front, 0.004], [14, front, 12], [-14, front, 12]])
        self._wall_shade.place(corners, (corners[:, [0, 2]] - (x0, z0)) / (x1 - x0, z1 - z0))

    def _set_lights(self, light: Light) -> None:
        direction = np.array(light.direction)
        other = np.array([-direction[0], -abs(direction[1]) - 0.6, 0.7])
        for lamp, towards, colour in ((self._key, direction, light.key), (self._fill, other, (0.16, 0.17, 0.19))):
            lamp.SetPosition(*(20 * towards))
            lamp.SetFocalPoint(0, 0, 0)
            lamp.SetColor(*colour)
        self._colour.SetAmbient(light.room, light.room, light.room)

    def _set_finish(self, scene: Scene) -> None:
        axes = scene.camera.axes() * np.array([[1.0], [1.0], [-1.0]])  # rows: right, up, back, as VTK's view axes
        # The mirrored window hangs on the lamp's side, but never behind the objects where none would see it.
        lamp = np.array(scene.light.direction) * (1.0, 0.55, 1.0) + (0.0, -0.35, 0.1)
        lamp = lamp / np.linalg.norm(lamp)
        right = np.cross((0.0, 0.0, 1.0), lamp)
        right = right / np.linalg.norm(right)
        tone = np.mean([scene.table.light, scene.table.dark], axis=0) * 0.6
        vectors = {
            "skyVC": axes @ (0.0, 0.0, 1.0),
            "lampVC": axes @ lamp,
            "lampRightVC": axes @ right,
            "lampUpVC": axes @ np.cross(lamp, right),
            "stripVC": axes @ (0.62, 0.36, 0.0),
            "tableTone": tone,
        }
        for actor in self._solid[: len(scene.objects)]:
            uniforms = actor.GetShaderProperty().GetFragmentCustomUniforms()
            for name, value in vectors.items():
                uniforms.SetUniform3f(name, [float(v) for v in value])
            uniforms.SetUniformf("eyeHeight", scene.camera.position[2])
            actor.GetProperty().SetAmbient(scene.light.room)


def _solid_mesh(kind: str) -> vtkPolyData:
    mesh = kind_mesh(kind)
    return polydata(mesh.points, mesh.triangles, mesh.normals)


def _solid_actor(renderer: vtkRenderer) -> vtkActor:
    actor = vtkActor()
    mapper = vtkPolyDataMapper()
    mapper.SetScalarModeToUsePointData()
    actor.SetMapper(mapper)
    actor.GetShaderProperty().AddFragmentShaderReplacement("//VTK::Light::Impl", True, _FINISH_SHADER, False)
    look = actor.GetProperty()
    look.SetDiffuse(0.85)
    look.SetSpecular(0.0)
    look.SetInterpolationToPhong()
    renderer.AddActor(actor)
    return actor


def _flat_actor(renderer: vtkRenderer, number: int) -> vtkActor:
    actor = vtkActor()
    mapper = vtkPolyDataMapper()
    mapper.ScalarVisibilityOff()
    actor.SetMapper(mapper)
    actor.GetProperty().LightingOff()
    actor.GetProperty().SetColor(number * _ID_STEP / 255, 1.0, 1.0)
    renderer.AddActor(actor)
    return actor


def _point_colours(one: Placed) -> NDArray[np.uint8]:
    mesh = kind_mesh(one.kind)
    colours = mesh.share[:, None] * np.array(one.shade) + mesh.fixed
    return np.clip(colours * 255 + 0.5, 0, 255).astype(np.uint8)


def _veil(shade: NDArray[np.float32]) -> NDArray[np.uint8]:
    """A near-black picture whose opacity is the shade."""
    out = np.zeros((*shade.shape, 4), np.uint8)
    out[..., :3] = (10, 10, 16)
    out[..., 3] = np.clip(shade * 255 + 0.5, 0, 255)
    return out


def _apart(slots: list[int], boxes: list[NDArray[np.float64]]) -> list[list[int]]:
    """The slots in few groups, so that no two boxes of a group touch: a group is drawn in one pass."""
    groups: list[list[int]] = []
    for i in slots:
        home = next((g for g in groups if not any(_touch(boxes[i], boxes[j]) for j in g)), None)
        if home is None:
            groups.append([i])
        else:
            home.append(i)
    return groups


def _touch(a: NDArray[np.float64], b: NDArray[np.float64]) -> bool:
    return bool(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3])
