"""Made-up faces in CelebA's original layout: a bright image smiles, and so the attribute can be learned."""

from __future__ import annotations

import io
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hf_bilb.data.images.celeba import ATTRIBUTES
from hf_bilb.data.images.files import decode

SMILING = ATTRIBUTES.index("Smiling")


def made_up(count: int, seed: int = 0) -> tuple[list[bytes], NDArray[np.int64]]:
    """`count` JPEG files and labels `[count, 40]`, 0 or 1."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, (count, len(ATTRIBUTES)))
    files = []
    for row in range(count):
        low = 128 if labels[row, SMILING] else 0
        file = io.BytesIO()
        # Larger than what is cached, and not square.
        Image.fromarray(generator.integers(low, low + 128, (22, 18, 3), dtype=np.uint8)).save(file, "JPEG", quality=95)
        files.append(file.getvalue())
    return files, labels


def name_of(row: int) -> str:
    return f"{row + 1:06d}.jpg"


def write_celeba(root: Path, parts: tuple[int, int, int] = (12, 5, 6), archive: bool = False) -> NDArray[np.int64]:
    """Write the files, those of the three parts in turn; returns the labels `[N, 40]`, 0 or 1.

    Args:
        root: the folder.
        parts: training, validation and test images.
        archive: in Img/, Anno/ and Eval/, as in the original archive.
    """
    files, labels = made_up(sum(parts))
    images, anno, partition = (root / sub if archive else root for sub in ("Img", "Anno", "Eval"))
    for folder in (images / "img_align_celeba", anno, partition):
        folder.mkdir(parents=True, exist_ok=True)
    for row, data in enumerate(files):
        (images / "img_align_celeba" / name_of(row)).write_bytes(data)
    lines = [str(len(files)), " ".join(ATTRIBUTES) + " "]
    lines += [f"{name_of(row)} " + " ".join(f"{2 * bit - 1:2d}" for bit in labels[row]) for row in range(len(files))]
    (anno / "list_attr_celeba.txt").write_text("\n".join(lines) + "\n")
    part_of = np.repeat([0, 1, 2], parts)
    text = "".join(f"{name_of(row)} {part}\n" for row, part in enumerate(part_of))
    (partition / "list_eval_partition.txt").write_text(text)
    return labels


def change_line(file: Path, number: int, old: str, new: str) -> None:
    """Replace the first `old` in line `number` (from 1); an empty `old` replaces the whole line."""
    lines = file.read_text().split("\n")
    lines[number - 1] = lines[number - 1].replace(old, new, 1) if old else new
    file.write_text("\n".join(lines))


class Counted:
    """A source of made-up images that says which were read, and can fail or wait."""

    key = "made-up"

    def __init__(self, count: int = 10) -> None:
        self.files, _ = made_up(count)
        self.versions = ["0"] * count
        self.reads: list[int] = []
        self.broken: int | None = None
        self.seconds = 0.0

    def __len__(self) -> int:
        return len(self.files)

    def fingerprint(self, rows: range) -> str:
        return "-".join(self.versions[row] for row in rows)

    def read(self, row: int) -> bytes:
        self.reads.append(row)
        time.sleep(self.seconds)
        return b"broken" if row == self.broken else self.files[row]

    def describe(self, row: int) -> str:
        return f"image {row}"

    def pixels(self) -> NDArray[np.uint8]:
        return np.stack([decode(data, 16, "x") for data in self.files])
