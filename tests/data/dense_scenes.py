"""Made-up scenes for dense prediction: planes in front of a camera, and files of them in MTAN's layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hf_bilb.data.dense.augmentation import View
from hf_bilb.data.dense.surface_normals import Intrinsics

CAMERA = Intrinsics(fx=40.0, fy=42.0, cx=17.5, cy=11.0)
SIZE = (24, 32)
FOLDERS = {"image": "image", "segmentation": "label", "depth": "depth", "normals": "normal"}


def rays(size: tuple[int, int], camera: Intrinsics = CAMERA) -> NDArray[np.float64]:
    """`[H, W, 3]`, the point at depth 1 that each pixel sees."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    return np.stack([(columns - camera.cx) / camera.fx, (rows - camera.cy) / camera.fy, np.ones(size)], axis=-1)


def plane(
    normal: tuple[float, float, float], distance: float, size: tuple[int, int] = SIZE, camera: Intrinsics = CAMERA
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Depth `[H, W]` and unit normal `[3]` (to the camera) of the plane of all points P with normal . P = -distance."""
    unit = np.array(normal) / np.linalg.norm(normal)
    return -distance / (rays(size, camera) @ unit), unit


def scene(seed: int, size: tuple[int, int] = SIZE, num_classes: int = 13) -> dict[str, NDArray[np.float32]]:
    """Image, classes, depth and normals as MTAN's files hold them, with some pixels without a label."""
    generator = np.random.default_rng(seed)
    tilt = generator.uniform(-0.4, 0.4, 2)
    depth, normal = plane((tilt[0], tilt[1], -1.0), generator.uniform(1, 3), size)
    hole = generator.random(size) < 0.1
    classes = generator.integers(-1, num_classes, size)
    vectors = np.where(hole[..., None], 0, normal)
    return {
        "image": generator.random((*size, 3)).astype(np.float32),
        "segmentation": classes.astype(np.float32),
        "depth": np.where(hole, 0, depth)[..., None].astype(np.float32),
        "normals": vectors.astype(np.float32),
    }


def write_mtan(
    root: Path,
    counts: tuple[int, int] = (6, 4),
    size: tuple[int, int] = SIZE,
    tasks: tuple[str, ...] = ("segmentation", "depth", "normals"),
    num_classes: int = 13,
    classes_folder: str = "label",
) -> dict[str, list[dict[str, NDArray[np.float32]]]]:
    """Write the files of `scene`; returns the scenes of `train` and of `val`."""
    written: dict[str, list[dict[str, NDArray[np.float32]]]] = {}
    for part, count, first in (("train", counts[0], 0), ("val", counts[1], 1000)):
        written[part] = [scene(first + number, size, num_classes) for number in range(count)]
        for kind in ("image", *tasks):
            folder = root / part / (classes_folder if kind == "segmentation" else FOLDERS[kind])
            folder.mkdir(parents=True, exist_ok=True)
            for number, arrays in enumerate(written[part]):
                np.save(folder / f"{number}.npy", arrays[kind])
    return written


# --- what a view shows of an array, in an array of its own --------------------------------------------------------


def seen_image(view: View, pixels: NDArray[np.generic]) -> NDArray[np.float32]:
    out = np.full(pixels.shape, np.nan, np.float32)
    view.image(pixels, out)
    return out


def seen_labels(view: View, values: NDArray[np.generic]) -> NDArray[np.generic]:
    out = np.zeros(values.shape, values.dtype)
    view.nearest(values, out)
    return out


def seen_depth(view: View, values: NDArray[np.floating], inverse: bool = False) -> NDArray[np.float32]:
    out = np.full(values.shape, np.nan, np.float32)
    view.depth(values.astype(np.float32), out, inverse)
    return out


def seen_normals(view: View, values: NDArray[np.floating]) -> NDArray[np.float32]:
    out = np.full(values.shape, np.nan, np.float32)
    view.normals(values.astype(np.float32), out)
    return out
