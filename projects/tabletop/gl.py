"""The few VTK objects the renderer is made of: windows, meshes, textures, pixels back."""

from __future__ import annotations

import numpy as np
import vtkmodules.vtkRenderingOpenGL2 as opengl  # also registers OpenGL behind vtkRenderingCore
from numpy.typing import NDArray
from vtkmodules.util.numpy_support import numpy_to_vtk, numpy_to_vtkIdTypeArray, vtk_to_numpy
from vtkmodules.vtkCommonCore import vtkPoints, vtkUnsignedCharArray
from vtkmodules.vtkCommonDataModel import vtkCellArray, vtkImageData, vtkPolyData
from vtkmodules.vtkCommonMath import vtkMatrix4x4
from vtkmodules.vtkRenderingCore import vtkActor, vtkPolyDataMapper, vtkRenderer, vtkRenderWindow, vtkTexture

Array = NDArray[np.float64]
Pixels = NDArray[np.uint8]


def make_window(width: int, height: int) -> vtkRenderWindow:
    """An off-screen window. EGL needs no display, so it comes first where VTK has it."""
    kind = getattr(opengl, "vtkEGLRenderWindow", vtkRenderWindow)
    window = kind()
    window.SetOffScreenRendering(1)
    window.AlphaBitPlanesOn()
    window.SetMultiSamples(0)  # the colour pass is drawn at twice the size instead
    # Nobody looks at this window: its pixels are read back from where they were drawn, not copied to a display first.
    window.SwapBuffersOff()
    if hasattr(window, "SetFrameBlitModeToNoBlit"):
        window.SetFrameBlitModeToNoBlit()
    window.SetSize(width, height)
    return window


def make_renderer(window: vtkRenderWindow, x: int, y: int, width: int, height: int) -> vtkRenderer:
    """A renderer on a rectangle of the window (pixels, y up), drawn only when asked for."""
    renderer = vtkRenderer()
    across, up = window.GetSize()
    renderer.SetViewport(x / across, y / up, (x + width) / across, (y + height) / up)
    renderer.AutomaticLightCreationOff()
    renderer.GetCullers().RemoveAllItems()  # they do not know of a model transform
    renderer.SetBackground(0, 0, 0)
    renderer.SetBackgroundAlpha(0.0)
    renderer.DrawOff()
    window.AddRenderer(renderer)
    return renderer


def draw(window: vtkRenderWindow, renderers: list[vtkRenderer]) -> None:
    """Draw these renderers and no others."""
    for renderer in renderers:
        renderer.DrawOn()
    window.Render()
    for renderer in renderers:
        renderer.DrawOff()


def read_pixels(window: vtkRenderWindow, width: int, height: int, alpha: bool) -> Pixels:
    """The window's lower left (height, width, 3 or 4) pixels, first row at the bottom."""
    data = vtkUnsignedCharArray()
    read = window.GetRGBACharPixelData if alpha else window.GetPixelData
    read(0, 0, width - 1, height - 1, 0, data, 0)
    return vtk_to_numpy(data).reshape(height, width, 4 if alpha else 3)


def polydata(points: Array, triangles: NDArray[np.int64], normals: Array | None = None) -> vtkPolyData:
    """Points (P,3), triangles (F,3) and normals (P,3) as VTK holds them."""
    data = vtkPolyData()
    holder = vtkPoints()
    holder.SetData(numpy_to_vtk(points.astype(np.float32), deep=True))
    data.SetPoints(holder)
    cells = vtkCellArray()
    cells.SetData(3, numpy_to_vtkIdTypeArray(triangles.ravel().astype(np.int64), deep=True))
    data.SetPolys(cells)
    if normals is not None:
        data.GetPointData().SetNormals(numpy_to_vtk(normals.astype(np.float32), deep=True))
    return data


def painted(base: vtkPolyData, colours: Pixels) -> vtkPolyData:
    """The same mesh with a colour (P,3) at each point."""
    data = vtkPolyData()
    data.ShallowCopy(base)
    scalars = numpy_to_vtk(np.ascontiguousarray(colours), deep=True)
    data.GetPointData().SetScalars(scalars)
    return data


class Quad:
    """A flat textured rectangle that takes no light of its own."""

    def __init__(self, renderer: vtkRenderer, repeat: bool, smooth: bool) -> None:
        self._data = vtkPolyData()
        cells = vtkCellArray()
        cells.SetData(4, numpy_to_vtkIdTypeArray(np.arange(4), deep=True))
        self._data.SetPolys(cells)
        self._texture = vtkTexture()
        self._texture.SetRepeat(repeat)
        self._texture.SetInterpolate(True)
        self._texture.SetMipmap(smooth)
        mapper = vtkPolyDataMapper()
        mapper.SetInputData(self._data)
        self.actor = vtkActor()
        self.actor.SetMapper(mapper)
        self.actor.SetTexture(self._texture)
        self.actor.GetProperty().LightingOff()
        renderer.AddActor(self.actor)

    def place(self, corners: NDArray[np.float64], uv: NDArray[np.float64]) -> None:
        """Give it four corners (4,3) in order and their texture coordinates (4,2)."""
        holder = vtkPoints()
        holder.SetData(numpy_to_vtk(corners.astype(np.float32), deep=True))
        self._data.SetPoints(holder)
        self._data.GetPointData().SetTCoords(numpy_to_vtk(uv.astype(np.float32), deep=True))
        self._data.Modified()

    def paint(self, pixels: Pixels) -> None:
        """Give it an image (H, W, 3 or 4), first row at v = 0."""
        height, width, channels = pixels.shape
        image = vtkImageData()
        image.SetDimensions(width, height, 1)
        flat = numpy_to_vtk(np.ascontiguousarray(pixels).reshape(-1, channels), deep=True)
        image.GetPointData().SetScalars(flat)
        self._texture.SetInputData(image)


def matrix(rows: NDArray[np.float64]) -> vtkMatrix4x4:
    """A VTK matrix of a (4,4) array."""
    out = vtkMatrix4x4()
    out.DeepCopy(tuple(float(v) for v in rows.ravel()))
    return out
