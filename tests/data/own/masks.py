"""Made-up images with masks and arrays, and the table that names them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

HEIGHT, WIDTH = 24, 32
ROAD: dict[str, Any] = {"type": "segmentation", "column": "mask", "classes": ["sky", "road", "tree"]}
HEIGHTS: dict[str, Any] = {"type": "dense_regression", "column": "array", "unit": "m", "missing": 0}


def save(file: Path, values: NDArray[Any]) -> None:
    """A `.npy` file, or an image."""
    file.parent.mkdir(parents=True, exist_ok=True)
    np.save(file, values) if file.suffix == ".npy" else Image.fromarray(values).save(file)


def write_scenes(folder: Path, count: int = 12, height: int = HEIGHT, width: int = WIDTH) -> str:
    """A CSV with `count` rows: image, mask (none in row 3), array (none in row 4), scene, and brightness.

    Class of a pixel: its image's red (0, 100, 200), 255 in the first column. Height: blue / 10, in 16 bits, 0 in the
    last row.
    """
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        classes = rng.integers(0, 3, (height, width)).astype(np.uint8)
        heights = rng.integers(1, 21, (height, width)).astype(np.uint16)
        image = np.stack([100 * classes, np.full_like(classes, 7 * number), 10 * heights.astype(np.uint8)], axis=-1)
        classes[:, 0], heights[-1] = 255, 0
        save(folder / f"images/{number}.png", image)
        save(folder / f"masks/{number}.png", classes)
        save(folder / f"arrays/{number}.png", heights)
        mask, array = f"masks/{number}.png" if number != 2 else "", f"arrays/{number}.png" if number != 3 else ""
        scene = ("indoor", "outdoor")[number % 2] if number != 5 else ""
        rows.append([f"images/{number}.png", mask, array, scene, number])
    with (folder / "scenes.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([["image", "mask", "array", "scene", "brightness"], *rows])
    return str(folder / "scenes.csv")
