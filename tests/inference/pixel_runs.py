"""Runs of models with tasks of pixels, on made-up images of different odd sizes, and on scenes in MTAN's layout."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tests.data.dense_scenes import write_mtan
from tests.inference.runs import Run, finished

#: Of the made-up images, in turn.
SIZES = ((37, 53), (24, 32), (41, 20))
NUM_CLASSES = 11
_ENCODER = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "layer_type": "basic",
}
RESNET: dict[str, Any] = {"name": "dense_backbone", "decoder_size": 8, "encoder": _ENCODER}
TASKS: dict[str, Any] = {
    "shape": {"type": "segmentation", "column": "mask", "classes": [f"class {n}" for n in range(NUM_CLASSES)]},
    "height (m)": {"type": "dense_regression", "column": "heights", "unit": "m", "missing": 0},
    "scene": {"type": "classification"},
    "flow": {"type": "dense_regression", "metrics": ["rmse", "r2"]},
    "brightness": {"type": "regression", "unit": "cd"},
}


def shapes(number: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float32]]:
    """An image `[H, W, 3]` of rectangles, the number of each one's class (255 in the first column), its height."""
    generator = np.random.default_rng(number)
    height, width = SIZES[number % len(SIZES)]
    classes = np.zeros((height, width), np.uint8)
    for _ in range(4):
        top, left = generator.integers(0, height - 4), generator.integers(0, width - 4)
        classes[top : top + generator.integers(4, 16), left : left + generator.integers(4, 16)] = generator.integers(
            1, NUM_CLASSES
        )
    noise = generator.integers(0, 20, (height, width, 3))
    image = np.clip(np.stack([20 * classes, 100 + 0 * classes, 250 - 20 * classes], axis=-1) + noise, 0, 255)
    heights = (2 + 0.5 * classes).astype(np.float32)
    classes[:, 0], heights[-1] = 255, 0
    return image.astype(np.uint8), classes, heights


def write_shapes(root: Path, count: int = 24) -> dict[str, str]:
    """Files of images and labels, some of which are missing, and a table of each part."""
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    rows = []
    for number in range(count):
        image, classes, heights = shapes(number)
        Image.fromarray(image).save(root / f"images/{number}.png")
        Image.fromarray(classes).save(root / f"labels/{number}.png")
        np.save(root / f"labels/{number}_heights.npy", heights)
        np.save(root / f"labels/{number}_flow.npy", np.stack([heights, -3 * heights]))
        mask = "" if number % 7 == 3 else f"labels/{number}.png"
        rows.append([f"images/{number}.png", mask, f"labels/{number}_heights.npy", f"labels/{number}_flow.npy",
                     ["wide", "small", "tall"][number % 3], float(image.mean())])  # fmt: skip
    parts = {"train": rows[:12], "validation": rows[12:14], "test": rows[14:]}
    for part, own in parts.items():
        with (root / f"{part}.csv").open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([["image", "mask", "heights", "flow", "scene", "brightness"], *own])
    return {part: str(root / f"{part}.csv") for part in parts}


def shapes_run(root: Path, **changes: Any) -> Run:
    """`dense_backbone` on a table, with tasks of pixels and of whole images."""
    files = write_shapes(root)
    data = {"name": "table", "files": files, "inputs": {"image": "image"}, "image_size": 32, "tasks": TASKS,
            "cache_dir": str(root / "cache"), **changes}  # fmt: skip
    return finished(root, RESNET, data, Path(files["test"]), max_steps=4, per_device_train_batch_size=6)


def scenes_run(root: Path, model: str = "segnet", name: str = "nyuv2", **changes: Any) -> Run:
    """A packaged set, of 5 test images; its test part as a table, too."""
    cityscapes = name == "cityscapes"
    tasks = ("segmentation", "depth") if cityscapes else ("segmentation", "depth", "normals")
    write_mtan(root, (6, 5), (32, 40), tasks, 7 if cityscapes else 13)
    folders = {"image": "image", "segmentation": "label", "depth": "depth", "normals": "normal"}
    columns = {kind: folders[kind] for kind in ("image", *tasks)}
    with (root / "test.csv").open("w", newline="", encoding="utf-8") as stream:
        names = [[f"val/{folder}/{number}.npy" for folder in columns.values()] for number in range(5)]
        csv.writer(stream).writerows([[*columns], *names])
    options = {"name": model, **({"width": 4} if model != "dense_backbone" else RESNET)}
    data = {"name": name, "folder": str(root), "cache_dir": str(root / "cache"), **changes}
    return finished(root, options, data, root / "test.csv", per_device_train_batch_size=3, per_device_eval_batch_size=2)
