"""Surface normals of a depth image, from planes fitted to inverse depth.

A plane n·P = c, seen by a pinhole camera (P = Z ((u - cx) / fx, (v - cy) / fy, 1)), has an inverse depth that is linear
in the pixel:

    1 / Z = (n_x (u - cx) / fx + n_y (v - cy) / fy + n_z) / c

so a least-squares plane through 1 / Z in a window around a pixel (slopes a and b, value w in its middle) gives

    n ~ (fx a, fy b, w - a (u - cx) - b (v - cy)),

exact for planes however they lie, where gradients of depth itself are not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Intrinsics:
    """A pinhole camera in pixels; column and row of the principal point counted from 0."""

    fx: float
    fy: float
    cx: float
    cy: float


#: Kinect's colour camera, to which NYU Depth V2's depth is registered: its toolbox's `camera_params.m`, which counts
#: pixels from 1.
NYUV2_CAMERA = Intrinsics(fx=518.85790117450188, fy=519.46961112127485, cx=324.58244941119034, cy=252.73616633400465)


def normals_from_depth(
    depth: NDArray[np.floating], camera: Intrinsics, radius: int = 5, tolerance: float = 0.02
) -> NDArray[np.float32]:
    """Unit normals `[H, W, 3]` that point to the camera (x right, y down, z forward), zero vectors where not known.

    A normal is known where the whole window of 2 radius + 1 pixels squared has a depth, and the root mean square
    deviation of inverse depth from the plane is at most `tolerance` times its mean: not across edges.

    Args:
        depth: `[H, W]`, 0 (or not finite) where not measured.
        camera: of the depth image.
        radius: of the window. With 5, Kinect's noise at 2 m makes an error of about 3 degrees.
        tolerance: of the fit, relative.

    Cost: about 60 ms for 480 x 640.
    """
    known = np.isfinite(depth) & (depth > 0)
    inverse = np.where(known, 1 / np.where(known, depth, 1).astype(np.float64), 0)
    height, width = depth.shape
    result = np.zeros((height, width, 3), np.float32)
    if min(height, width) < 2 * radius + 1:
        return result
    rows, columns = np.arange(radius, height - radius)[:, None], np.arange(radius, width - radius)[None, :]
    pixels = (2 * radius + 1) ** 2
    spread = pixels * radius * (radius + 1) / 3  # sum of du^2 over the window
    total = _window_sums(inverse, radius)
    mean = total / pixels
    slope_u = (_window_sums(inverse * np.arange(width), radius) - columns * total) / spread
    slope_v = (_window_sums(inverse * np.arange(height)[:, None], radius) - rows * total) / spread
    squares = _window_sums(inverse**2, radius) - pixels * mean**2 - spread * (slope_u**2 + slope_v**2)
    fits = np.maximum(squares, 0) <= pixels * (tolerance * mean) ** 2
    whole = _window_sums(known.astype(np.float64), radius) > pixels - 0.5
    direction = np.stack(
        [
            camera.fx * slope_u,
            camera.fy * slope_v,
            mean - slope_u * (columns - camera.cx) - slope_v * (rows - camera.cy),
        ],
        axis=-1,
    )
    length = np.linalg.norm(direction, axis=-1, keepdims=True)
    good = (fits & whole)[..., None] & (length > 0)
    # n·P is positive for the direction above, so its opposite looks at the camera.
    inner = np.where(good, -direction / np.where(length > 0, length, 1), 0)
    result[radius : height - radius, radius : width - radius] = inner
    return result


def _window_sums(values: NDArray[np.float64], radius: int) -> NDArray[np.float64]:
    """`[H, W]` -> `[H - 2 radius, W - 2 radius]`, sums over the windows of 2 radius + 1 squared."""
    side = 2 * radius + 1
    for axis in (0, 1):
        sums = np.insert(np.cumsum(values, axis=axis), 0, 0, axis=axis)
        ahead, behind = np.arange(side, sums.shape[axis]), np.arange(sums.shape[axis] - side)
        values = np.take(sums, ahead, axis=axis) - np.take(sums, behind, axis=axis)
    return values
