"""What the memory-mapped cache gains for dense prediction: batches from it against one `np.load` per file.

    python benchmarks/dense_loading.py [--folder data/nyuv2] [--output benchmarks/results]

The images of a folder in MTAN's layout, or made-up ones of its size (288 x 384), with classes, depth and normals, in
batches of 8 drawn at random, through a DataLoader with 0 and with 2 workers; as they are, and augmented. The other way
is that of the papers' code: four files an image are loaded and, when augmented, resampled one by one with torch.
Whole loops are timed (with the start of their workers) on the wall clock; the ways alternate, and the best loop
counts, since other processes only slow down.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from output import write_results
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, RandomSampler

from hf_bilb.data.dense.files import MTAN_FOLDERS, mtan_columns, prepare_column
from hf_bilb.data.dense.rows import DenseRows
from hf_bilb.data.rows import collate_images

BATCH, CLASSES = 8, 13
KINDS = {"pixel_values": "image", **MTAN_FOLDERS}


class LoadedEachTime(Dataset[dict[str, Tensor]]):
    """The usual data set: four files are loaded whenever their row is asked for, and augmented one by one."""

    def __init__(self, part: Path, augment: bool) -> None:
        self.part = part
        self.augment = augment
        self.length = len(list((part / "image").glob("*.npy")))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        arrays = {kind: torch.from_numpy(np.load(self.part / name / f"{row}.npy")) for kind, name in KINDS.items()}
        found = {kind: values.float() if values.ndim == 2 else values.movedim(-1, 0) for kind, values in arrays.items()}
        found["depth"] = found["depth"][0]
        if self.augment:
            found = self._augmented(found)
        found["segmentation"] = found["segmentation"].long()
        return found

    def _augmented(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        size = found["depth"].shape
        scale = random.choice((1.0, 1.2, 1.5))
        height, width = int(size[0] / scale), int(size[1] / scale)
        top, left = random.randint(0, size[0] - height), random.randint(0, size[1] - width)
        for kind, values in found.items():
            part = values[..., top : top + height, left : left + width].reshape(1, -1, height, width)
            smooth = {"mode": "bilinear", "align_corners": True} if kind == "pixel_values" else {"mode": "nearest"}
            found[kind] = functional.interpolate(part, size, **smooth).reshape(values.shape)
        found["depth"] = found["depth"] / scale
        if random.random() < 0.5:
            found = {kind: values.flip(-1) for kind, values in found.items()}
            found["normals"][0] *= -1
        return found


def write_made_up(part: Path, count: int) -> None:
    """Random numbers: nothing is compressed, so what they are plays no role."""
    generator = np.random.default_rng(0)
    arrays = {
        "image": generator.random((288, 384, 3), dtype=np.float32),
        "label": generator.integers(-1, CLASSES, (288, 384)).astype(np.float32),
        "depth": generator.uniform(1, 5, (288, 384, 1)).astype(np.float32),
        "normal": np.full((288, 384, 3), [0, 0, -1], np.float32),
    }
    for kind, values in arrays.items():
        (part / kind).mkdir(parents=True)
        for row in range(count):
            np.save(part / kind / f"{row}.npy", values)


@dataclass(frozen=True)
class Result:
    """Images a second through the DataLoader, in the best loop."""

    way: str
    augmented: bool
    workers: int
    images_per_second: float


def loop(rows: Dataset[dict[str, Tensor]], workers: int, images: int) -> float:
    """Images a second of a loop over so many."""
    sampler = RandomSampler(rows, replacement=True, num_samples=images)
    loader = DataLoader(rows, batch_size=BATCH, sampler=sampler, collate_fn=collate_images, num_workers=workers)
    started = time.perf_counter()
    seen = sum(len(batch["pixel_values"]) for batch in loader)
    return seen / (time.perf_counter() - started)


def measure(part: Path, cache: Path, images: int, repeats: int) -> tuple[list[Result], float, tuple[int, int]]:
    """The ways compared, the images a second of the first reading, and their size."""
    columns, size = mtan_columns(part, MTAN_FOLDERS, CLASSES, None, allow_missing=False)
    started = time.perf_counter()
    files = {column.kind: prepare_column(cache, "benchmark", column, size) for column in columns}
    count = len(columns[0].items)
    first = count / (time.perf_counter() - started)
    ways: dict[str, Callable[[bool], Dataset[dict[str, Tensor]]]] = {
        "cache": lambda augment: DenseRows(files, np.arange(count), 0 if augment else None),
        "np.load": lambda augment: LoadedEachTime(part, augment),
    }
    cases = [(way, augment, workers) for augment in (False, True) for workers in (0, 2) for way in ways]
    best = dict.fromkeys(cases, 0.0)
    for _ in range(repeats):
        for way, augment, workers in cases:
            best[way, augment, workers] = max(best[way, augment, workers], loop(ways[way](augment), workers, images))
    return [Result(*case, speed) for case, speed in best.items()], first, size


def report(results: list[Result], first: float, size: tuple[int, int]) -> str:
    usual = {(r.augmented, r.workers): r.images_per_second for r in results if r.way == "np.load"}
    lines = ["| rows from | augmented | workers | images/s | against np.load |", "|---|---|---|---|---|"]
    lines += [
        f"| {r.way} | {'yes' if r.augmented else 'no'} | {r.workers} | {r.images_per_second:,.0f} | "
        f"x {r.images_per_second / usual[r.augmented, r.workers]:.1f} |"
        for r in results
    ]
    processor = platform.processor() or platform.machine()
    megabytes = BATCH * size[0] * size[1] * 36 / 1e6  # float32 image, depth and normals, int64 classes
    note = (
        f"{size[0]} x {size[1]}, three tasks, batches of {BATCH}; {os.cpu_count()} cores ({processor}), torch "
        f"{torch.__version__}. Reading the files once into the cache, in processes: {first:,.0f} images/s. Files and "
        f"cache lie in memory after the first pass. A worker hands its batches ({megabytes:.0f} MB each) over through "
        "shared memory, whose fresh pages cost more than what it does to the images: with workers that is what counts "
        "either way, beside the training that they leave alone."
    )
    return "\n".join([*lines, "", note])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--folder", type=Path, help="in MTAN's layout; default: made-up files")
    parser.add_argument("--files", type=int, default=100, help="how many made-up images")
    parser.add_argument("--images", type=int, default=1600, help="images of a loop")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="folder for dense_loading.json and .md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        part = Path(temporary) / "train" if arguments.folder is None else arguments.folder / "train"
        if arguments.folder is None:
            write_made_up(part, arguments.files)
        results, first, size = measure(part, Path(temporary) / "cache", arguments.images, arguments.repeats)
    text = report(results, first, size)
    print(text)
    content = {"prepared_per_second": first, "results": [asdict(result) for result in results]}
    write_results(arguments.output, "dense_loading", f"# Loading dense prediction\n\n{text}\n", content)


if __name__ == "__main__":
    main()
