"""NYU Depth V2 in MTAN's layout, written from the official file `nyu_depth_v2_labeled.mat`.

The file (2.8 GB, from cs.nyu.edu/~fergus/datasets/nyu_depth_v2.html) is MATLAB 7.3, which is HDF5, with its dimensions
turned around: `images [1449, 3, 640, 480]` uint8, `depths [1449, 640, 480]` float32 in metres (holes filled in),
`labels [1449, 640, 480]` uint16, 0 not labelled, else one of 894 classes; `sceneTypes [1, 1449]`, references to one of
27 names each (`bedroom`), a column of characters.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_bilb.data.cache import locked, writing, written_aside
from hf_bilb.data.dense.files import measured, resize_image, resize_nearest
from hf_bilb.data.dense.nyuv2_labels import NUM_IMAGES, NUM_RAW_CLASSES, classes_13, official_split
from hf_bilb.data.dense.surface_normals import NYUV2_CAMERA, normals_from_depth
from hf_bilb.data.jobs import available_cores, run_jobs
from hf_bilb.errors import MissingPackageError, OptionError

logger = logging.getLogger(__name__)

FRAME = (480, 640)
#: Size of MTAN's files.
MTAN_SIZE = (288, 384)
KINDS = ("image", "label", "depth", "normal")
SETTINGS = "prepared.json"
#: Labels of whole images, `data.image_labels` of the loader.
IMAGE_LABELS = "image_labels.csv"
SCENE = "scene"


@dataclass(frozen=True)
class _Job:
    """Images of the file, and the folders and numbers that they are written under."""

    file: Path
    rows: tuple[int, ...]
    places: tuple[tuple[Path, int], ...]
    size: tuple[int, int]


def prepare_nyuv2(
    file: Path,
    output: Path,
    size: tuple[int, int] = MTAN_SIZE,
    num_workers: int | None = None,
    split: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None,
) -> tuple[int, int]:
    """Write `{train,val}/{image,label,depth,normal}/<i>.npy` (see `hf_bilb.data.dense.nyuv2`), float32, and the kind of
    scene of each image as `image_labels.csv` with the columns `part,image,scene`.

    Classes are the 13; normals are computed from the depth at its full size (`normals_from_depth`), so figures for
    normals do not compare with those of MTAN's files, which have others. Images are resized bilinearly with
    antialiasing, labels by nearest pixel. `<i>` counts the images of a part in the official order. A file without
    scenes is told by a warning.

    Each file is written aside and renamed: a call that was interrupted goes on where it stood, and one that finds
    everything does nothing. Of several calls for one folder one writes, the others wait.

    Args:
        file: `nyu_depth_v2_labeled.mat`.
        output: the folder to write.
        size: height and width.
        num_workers: processes; None: as many as there are cores.
        split: positions of training and test images in the file, from 0; None: the official ones, 795 and 654.

    Returns:
        How many training and test images are there now.

    Raises:
        OptionError: a file that is something else or damaged, a folder that cannot be written to (no space left) or
            holds images prepared in another way.
        MissingPackageError: h5py is not installed.
        concurrent.futures.process.BrokenProcessPool: a worker was killed (no memory left).

    Cost: about 0.1 s an image and core (2.2 min for all with one process, 1.3 min with two), 0.3 GB of memory in each
    process, 5.1 GB of disk at 288 x 384.
    """
    count = _check_file(file)
    if split is None and count != NUM_IMAGES:
        raise OptionError(f"{file}: has {count} images, expected NYU Depth V2's {NUM_IMAGES}")
    train, test = official_split() if split is None else split
    with contextlib.ExitStack() as stack:
        with _writing(output):
            stack.enter_context(locked(output / ".prepared.lock", output))
            _check_output(output, {"size": list(size), "train": len(train), "val": len(test)})
            _write_scenes(file, output / IMAGE_LABELS, count, {"train": train, "val": test})
            jobs = list(_jobs(file, output, size, {"train": train, "val": test}))
        _run(jobs, len(train) + len(test), num_workers or available_cores())
    return len(train), len(test)


def _writing(output: Path) -> contextlib.AbstractContextManager[None]:
    return writing(f"{output}: cannot be written")


# --- the official file --------------------------------------------------------------------------------------------


def _open(file: Path) -> Any:
    try:
        import h5py
    except ImportError:
        raise MissingPackageError("preparing nyuv2 needs h5py: pip install hf-bilb[nyuv2]") from None
    try:
        return h5py.File(file, "r")
    except OSError as error:
        reason = "no such file" if not file.is_file() else " ".join(str(error).split())
        raise OptionError(f"{file}: cannot be read as nyu_depth_v2_labeled.mat (MATLAB 7.3): {reason}") from None


@contextlib.contextmanager
def _reading(file: Path, what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:  # what h5py makes of damage
        raise OptionError(f"{file}: {what} cannot be read: {' '.join(str(error).split())}") from None


def _check_file(file: Path) -> int:
    """The number of images."""
    height, width = FRAME
    expected = {"images": (3, width, height), "depths": (width, height), "labels": (width, height)}
    with _open(file) as content:
        for name, shape in expected.items():
            if name not in content:
                raise OptionError(f"{file}: has no {name} (it has {', '.join(content)}), expected NYU Depth V2's file")
            if not _is_array(content[name], "uif"):
                raise OptionError(f"{file}: {name} is no array of numbers, expected NYU Depth V2's file")
            if content[name].shape[1:] != shape:
                raise OptionError(f"{file}: {name} is {list(content[name].shape)}, expected [N, {str(shape)[1:-1]}]")
        return min(len(content[name]) for name in expected)


def _is_array(entry: Any, kinds: str) -> bool:
    """Whether an entry of the file is an array, not a folder, of numpy's `kinds` of values."""
    import h5py

    return isinstance(entry, h5py.Dataset) and entry.dtype.kind in kinds


def _scenes(file: Path, count: int) -> list[str] | None:
    """The kind of scene of each image, empty where it has none; None where the file does not say."""
    with _open(file) as content:
        if "sceneTypes" not in content:
            return None
        cells = content["sceneTypes"]
        # References are what a cell array consists of.
        if not _is_array(cells, "O") or "ref" not in (cells.dtype.metadata or {}) or cells.size != count:
            found = f"{cells.dtype} {list(cells.shape)}" if _is_array(cells, "uifSUVObc") else "a folder"
            raise OptionError(f"{file}: sceneTypes is {found}, expected references [1, {count}]")
        with _reading(file, "sceneTypes"):
            return [_text(content[cell]) for cell in cells[()].ravel()]


def _text(cell: Any) -> str:
    # Of an empty cell MATLAB writes the shape as its contents.
    return "" if "MATLAB_empty" in cell.attrs else "".join(map(chr, cell[()].ravel().tolist())).strip()


# --- the folder ---------------------------------------------------------------------------------------------------


def _check_output(output: Path, settings: dict[str, Any]) -> None:
    """Folders, and a note of how they were prepared, so that two ways do not mix."""
    for part in ("train", "val"):
        for kind in KINDS:
            (output / part / kind).mkdir(parents=True, exist_ok=True)
    note = output / SETTINGS
    if note.is_file():
        try:
            before = json.loads(note.read_text(encoding="utf-8"))
        except ValueError as error:
            raise OptionError(f"{note}: cannot be read: {error}") from None
        if before != settings:
            raise OptionError(f"{output}: holds images prepared with {before}, not {settings}; choose another folder")
        return
    if any((output / "train" / "image").iterdir()):
        raise OptionError(f"{output}: holds images that were not prepared by this command; choose another folder")
    note.write_text(json.dumps(settings) + "\n", encoding="utf-8")


def _write_scenes(file: Path, target: Path, count: int, split: dict[str, NDArray[np.int64]]) -> None:
    """One that is there already stays: it may have got more columns."""
    if target.is_file():
        return
    scenes = _scenes(file, count)
    if scenes is None:
        logger.warning("%s: has no sceneTypes, so there will be no %s", file, target.name)
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["part", "image", SCENE])
    for part, rows in split.items():
        writer.writerows([part, number, scenes[row]] for number, row in enumerate(rows.tolist()))
    with written_aside(target) as aside:
        aside.write_text(text.getvalue(), encoding="utf-8")


def _jobs(file: Path, output: Path, size: tuple[int, int], split: dict[str, NDArray[np.int64]]) -> Iterator[_Job]:
    """What is not there yet, a few images each."""
    for part, rows in split.items():
        folder = output / part
        left = [
            (row, (folder, number))
            for number, row in enumerate(rows.tolist())
            if not all((folder / kind / f"{number}.npy").is_file() for kind in KINDS)
        ]
        for start in range(0, len(left), 4):
            chosen, places = zip(*left[start : start + 4], strict=True)
            yield _Job(file, chosen, places, size)


def _run(jobs: list[_Job], count: int, num_workers: int) -> None:
    from tqdm import tqdm

    left = sum(len(job.rows) for job in jobs)
    with tqdm(total=count, initial=count - left, desc="preparing nyuv2", unit=" images") as bar:
        for count in run_jobs(_write, jobs, num_workers):
            bar.update(count)


def _write(job: _Job) -> int:
    with _open(job.file) as content:
        for row, (folder, number) in zip(job.rows, job.places, strict=True):
            arrays = _arrays(job.file, content, row, job.size)
            with _writing(folder.parent):
                for kind in KINDS:
                    _save(folder / kind / f"{number}.npy", arrays[kind])
    return len(job.rows)


def _arrays(file: Path, content: Any, row: int, size: tuple[int, int]) -> dict[str, NDArray[Any]]:
    """What is written of one image."""
    with _reading(file, f"image {row}"):
        labels, depth, image = (content[name][row] for name in ("labels", "depths", "images"))
    if labels.max() > NUM_RAW_CLASSES:
        raise OptionError(f"{file}: image {row} has label {labels.max()}, expected 0 to {NUM_RAW_CLASSES}")
    depth = measured(depth.T)
    pixels = resize_image(image.transpose(0, 2, 1).astype(np.float32) / 255, size)
    normals = np.moveaxis(normals_from_depth(depth, NYUV2_CAMERA), -1, 0)
    return {
        "image": np.moveaxis(pixels, 0, -1),
        "label": resize_nearest(classes_13()[labels.T], size),
        "depth": resize_nearest(depth, size)[:, :, None],
        "normal": np.moveaxis(resize_nearest(normals, size), 0, -1),
    }


def _save(path: Path, values: NDArray[Any]) -> None:
    # Not straight into the file, where numpy does not say why it could not write.
    content = io.BytesIO()
    np.save(content, np.ascontiguousarray(values, dtype=np.float32))
    with written_aside(path) as aside:
        aside.write_bytes(content.getbuffer())
