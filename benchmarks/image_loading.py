"""What the cache of decoded images gains: batches from it against JPEG files that are decoded in every epoch.

    python benchmarks/image_loading.py [--folder data/celeba] [--output benchmarks/results]

The faces of a folder in CelebA's original layout, or made-up JPEG files of its size (178 x 218), at 64 x 64 in batches
of 256 drawn at random, through a DataLoader with 0 and with 2 workers. Whole loops are timed (with the start of their
workers) on the wall clock; the ways alternate, and the best loop counts, since other processes only slow down.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from output import write_results
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from hf_bilb.data.cache import list_files
from hf_bilb.data.images.files import ImageFiles, decode, prepare_images
from hf_bilb.data.images.rows import ImageRows
from hf_bilb.data.rows import collate_images

BATCH, SIZE, TASKS = 256, 64, 40


class DecodedEachTime(Dataset[dict[str, Tensor]]):
    """The usual data set: a file is opened and decoded whenever its row is asked for."""

    def __init__(self, source: ImageFiles, labels: np.ndarray) -> None:
        self.source = source
        self.labels = labels

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        pixels = torch.from_numpy(decode(self.source.read(row), SIZE, self.source.describe(row)).copy())
        return {"pixel_values": pixels.float().div_(255), "labels": torch.from_numpy(self.labels[row])}


def write_made_up(folder: Path, count: int) -> None:
    """Smooth colours with some noise, which compress about as photographs do."""
    generator = np.random.default_rng(0)
    for row in range(count):
        colours = Image.fromarray(generator.integers(0, 256, (6, 5, 3), dtype=np.uint8)).resize((178, 218))
        noise = generator.integers(-12, 13, (218, 178, 3))
        pixels = np.clip(np.asarray(colours) + noise, 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=75)
        (folder / f"{row:06d}.jpg").write_bytes(file.getvalue())


@dataclass(frozen=True)
class Result:
    """Images a second through the DataLoader, in the best loop."""

    way: str
    workers: int
    images_per_second: float


def loop(rows: Dataset[dict[str, Tensor]], workers: int, images: int) -> float:
    """Images a second of a loop over so many."""
    sampler = RandomSampler(rows, replacement=True, num_samples=images)
    loader = DataLoader(rows, batch_size=BATCH, sampler=sampler, collate_fn=collate_images, num_workers=workers)
    started = time.perf_counter()
    seen = sum(len(batch["labels"]) for batch in loader)
    return seen / (time.perf_counter() - started)


def measure(source: ImageFiles, cache: Path, repeats: int) -> tuple[list[Result], float]:
    """The ways compared, and the images a second of the first decoding."""
    labels = np.zeros((len(source), TASKS), np.float32)
    started = time.perf_counter()
    file = prepare_images(source, SIZE, str(cache))
    first = len(source) / (time.perf_counter() - started)
    ways: dict[str, Callable[[], Dataset[dict[str, Tensor]]]] = {
        "cache": lambda: ImageRows(file, np.arange(len(source)), labels),
        "decoded each time": lambda: DecodedEachTime(source, labels),
    }
    cases = [(way, workers) for way in ways for workers in (0, 2)]
    best = dict.fromkeys(cases, 0.0)
    for _ in range(repeats):
        for way, workers in cases:
            images = 40 * BATCH if way == "decoded each time" else 400 * BATCH
            best[way, workers] = max(best[way, workers], loop(ways[way](), workers, images))
    return [Result(way, workers, speed) for (way, workers), speed in best.items()], first


def report(results: list[Result], first: float, source: ImageFiles, shape: tuple[int, int]) -> str:
    slowest = {result.workers: result.images_per_second for result in results if result.way != "cache"}
    lines = ["| rows from | workers | images/s | against decoding each time |", "|---|---|---|---|"]
    lines += [
        f"| {r.way} | {r.workers} | {r.images_per_second:,.0f} | x {r.images_per_second / slowest[r.workers]:.1f} |"
        for r in results
    ]
    processor = platform.processor() or platform.machine()
    note = (
        f"{len(source):,} JPEG files of {shape[0]} x {shape[1]}, served at {SIZE} x {SIZE} in batches of {BATCH}; "
        f"{os.cpu_count()} cores ({processor}), torch {torch.__version__}. Decoding once into the "
        f"cache, in threads: {first:,.0f} images/s. Files and cache lie in memory after the first pass. A worker hands "
        "its batches (12.6 MB each) over through shared memory, which costs more than reading them from the cache."
    )
    return "\n".join([*lines, "", note])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--folder", type=Path, help="in CelebA's original layout; default: made-up files")
    parser.add_argument("--images", type=int, default=4000, help="how many made-up files")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="folder for image_loading.json and .md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if arguments.folder is None:
            write_made_up(folder, arguments.images)
        images = folder if arguments.folder is None else arguments.folder / "img_align_celeba"
        files = list_files(images)
        source = ImageFiles(images, sorted(files), files)
        with Image.open(images / source.names[0]) as image:
            shape = image.size
        results, first = measure(source, folder / "cache", arguments.repeats)
    text = report(results, first, source, shape)
    print(text)
    content = {"prepared_per_second": first, "results": [asdict(result) for result in results]}
    write_results(arguments.output, "image_loading", f"# Loading images\n\n{text}\n", content)


if __name__ == "__main__":
    main()
