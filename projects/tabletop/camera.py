"""A pinhole camera over the table. World: x right, y away from the viewer, z up; pixels: x right, y down."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Camera:
    """Where the picture is taken from.

    position, target: world points; view_angle: vertical opening in degrees; roll in degrees;
    width, height: of the picture in pixels.
    """

    position: tuple[float, float, float]
    target: tuple[float, float, float]
    view_angle: float
    roll: float
    width: int
    height: int

    @lru_cache(maxsize=1)  # noqa: B019  asked for at every object of a scene; one camera a scene
    def axes(self) -> Array:
        """Unit right, up and forward vectors of the camera, as the rows of a (3,3) array, to be read only."""
        forward = np.subtract(self.target, self.position)
        forward = forward / np.linalg.norm(forward)
        right = np.cross(forward, (0.0, 0.0, 1.0))
        right = right / np.linalg.norm(right)
        up = np.cross(right, forward)
        turn = np.radians(self.roll)
        return np.stack([np.cos(turn) * right + np.sin(turn) * up, np.cos(turn) * up - np.sin(turn) * right, forward])

    def project(self, points: Array) -> Array:
        """Pixels (P,2) of world points (P,3); a pixel's centre lies at its index + 0.5."""
        local = (points - np.array(self.position)) @ self.axes().T  # (P, 3): right, up, forward
        focal = 0.5 * self.height / np.tan(np.radians(self.view_angle) / 2)
        return np.stack(
            [self.width / 2 + focal * local[:, 0] / local[:, 2], self.height / 2 - focal * local[:, 1] / local[:, 2]],
            axis=1,
        )

    def distance_along_table(self, x: float, y: float) -> float:
        """How far a point of the table lies from the viewer, measured along the table, in units."""
        forward = self.axes()[2, :2]
        forward = forward / np.linalg.norm(forward)
        return float(np.dot((x - self.position[0], y - self.position[1]), forward))
