"""A folder with what a model says of images: files for each image and task of pixels, and a table of them.

| file | what it is |
|---|---|
| `predictions.csv` | a row for each image: the files of its predictions, and what is said of the whole image |
| `classes.json` | task -> names of its classes 0, 1, ... |
| `<image>_<task>.png` | numbers of classes, as indices of a palette; of more than 256 classes 16 bits |
| `<image>_<task>.npy` | numbers: float32 `[height, width]`, or `[numbers, height, width]` |
| `<image>_<task>_preview.png` | on demand: the numbers, or directions, as colours |
| `<image>_<task>_probabilities.npy` | on demand: float32 `[classes, height, width]` |

`<image>` is the name of the image's file without its ending, or the number of the row in a table.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hf_bilb.config.options import shown
from hf_bilb.data.inputs.images import image_files
from hf_bilb.data.own.columns import holds_images
from hf_bilb.data.own.csv_options import CsvOptions
from hf_bilb.data.own.files import Table
from hf_bilb.errors import OptionError, StorageError
from hf_bilb.inference.image_predictions import ImagePrediction
from hf_bilb.inference.pixels import ImagePredictions, LoadedPixelModel
from hf_bilb.inference.tables import is_table, write_rows
from hf_bilb.losses.task_types import TaskType
from hf_bilb.reporting.previews import class_palette, direction_picture, number_picture
from hf_bilb.storage.folders import check_output_folder
from hf_bilb.storage.writing import folder_written_aside, write_text, written_aside

if TYPE_CHECKING:
    import datasets

#: The table in the folder.
INDEX = "predictions.csv"
CLASSES = "classes.json"
_PALETTE_SIZE = 256


@dataclass(frozen=True)
class MapFile:
    """A file that is written for every image.

    Attributes:
        column: of the table, without its prefix.
        ending: of the file's name, after that of the image.
        write: writes what is said of an image.
    """

    column: str
    ending: str
    write: Callable[[ImagePrediction, Path], None]


def map_files(model: LoadedPixelModel, all_classes: bool = False, preview: bool = False) -> list[MapFile]:
    """The files of each image, in the order of the tasks.

    Args:
        all_classes: of segmentation also the probabilities of all classes.
        preview: of a task of one number, and of directions, also a picture.
    """
    files = []
    for (name, task), stem in zip(model.tasks.items(), _in_file_names(model.tasks), strict=True):
        if task.type == "segmentation":
            files.append(MapFile(name, f"_{stem}.png", partial(_save_classes, name, task.size)))
            if all_classes:
                ending = f"_{stem}_probabilities.npy"
                files.append(MapFile(f"{name}_probabilities", ending, partial(_save_probabilities, name)))
        elif task.items == "pixels":
            files.append(MapFile(name, f"_{stem}.npy", partial(_save_numbers, name)))
            if preview and (task.size == 1 or name in model.directions):
                files.append(MapFile(f"{name}_preview", f"_{stem}_preview.png", partial(_save_preview, name)))
    return files


def check_output_place(output: Path, source: Path, force: bool) -> None:
    """Raise `OptionError` or `StorageError` where the folder `output` cannot be, or shall not be, written.

    With `force`, one that holds nothing but predictions is written anew.
    """
    if output.exists() and not output.is_dir():
        raise OptionError(
            f"--output: {shown(str(output))} is a file, expected a name that ends in .csv, .tsv, .jsonl or .parquet, "
            "or (of tasks of pixels) a folder"
        )
    if output.is_dir() and (source.resolve() == output.resolve() or output.resolve() in source.resolve().parents):
        raise OptionError(f"--output: {shown(str(output))} holds what is read")
    if output.is_dir() and any(output.iterdir()):
        if not force:
            raise OptionError(f"--output: {shown(str(output))} is already there; --force writes over it")
        _check_nothing_else(output)
    if not output.absolute().parent.is_dir():
        raise OptionError(f"--output: there is no folder {shown(str(output.parent))}")
    check_output_folder(output.absolute().parent, "--output")


def check_is_folder(output: Path) -> None:
    """Raise `OptionError` for the name of a table: predictions of pixels are many files."""
    if is_table(output):
        raise OptionError(
            f"--output: {shown(str(output))} is the name of a table, but the model has tasks of pixels, which are "
            "files for every image; expected the name of a folder"
        )


def write_images(
    predictions: ImagePredictions,
    rows: datasets.Dataset,
    source: Path,
    output: Path,
    files: Sequence[MapFile],
    prefix: str = "",
    all_classes: bool = False,
) -> None:
    """Write a folder of predictions, image by image, aside and then renamed.

    Args:
        rows: of the images; they stand in the table.
        source: that they are from: a table, a folder of images, or an image.
        files: of `map_files`.
        prefix: of the table's columns with predictions.
        all_classes: as of `ImagePrediction.to_columns`.

    Raises:
        OptionError: an image that does not decode.
        StorageError: a file that cannot be written.
    """
    names = _image_names(source, len(predictions), files)
    columns: dict[str, list[Any]] = {file.column: [name + file.ending for name in names] for file in files}
    try:
        with folder_written_aside(output) as aside:
            for name, prediction in zip(names, predictions, strict=True):
                for file in files:
                    with written_aside(aside / (name + file.ending)) as path:
                        file.write(prediction, path)
                for column, value in prediction.to_columns(all_classes).items():
                    columns.setdefault(column, []).append(value)
            _write_class_names(predictions.tasks, aside / CLASSES)
            added = {prefix + column: values for column, values in columns.items()}
            write_rows(rows, added, aside / INDEX, CsvOptions())
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"--output: {output}: cannot be written: {error.strerror or error}") from None


def _write_class_names(tasks: Mapping[str, TaskType], path: Path) -> None:
    names = {name: task.names for name, task in tasks.items() if task.type == "segmentation" and task.names}
    if names:
        write_text(path, json.dumps(names, indent=1, ensure_ascii=False) + "\n")


def without_images(rows: datasets.Dataset) -> datasets.Dataset:
    """The rows without columns that hold images themselves, which no cell of a text file can."""
    table = Table("", rows, Path())
    return rows.remove_columns([name for name in rows.column_names if holds_images(table, name)])


# --- names --------------------------------------------------------------------------------------------------------


def _in_file_names(tasks: Iterable[str]) -> list[str]:
    """Names of tasks without signs that a file's name cannot have; each once."""
    found: list[str] = []
    for name in tasks:
        plain = re.sub(r"[^\w.-]+", "_", name).strip("_") or "task"
        number = sum(one == plain or one.rpartition("-")[0] == plain for one in found)
        found.append(f"{plain}-{number + 1}" if number else plain)
    return found


def _image_names(source: Path, count: int, files: Sequence[MapFile]) -> list[str]:
    """What the names of an image's files begin with: the first choice with which they all differ."""
    images = image_files(source) or []
    numbers = [f"{row:0{len(str(count))}d}" for row in range(1, count + 1)]
    for names in ([one.stem for one in images], [one.name for one in images]):
        made = {(name + file.ending).lower() for name in names for file in files}
        if names and len(made) == len(names) * len(files):
            return names
    return numbers


def _check_nothing_else(folder: Path) -> None:
    """Raise `OptionError` unless a folder holds predictions alone, so that it may go."""
    index = folder / INDEX
    known = {INDEX, CLASSES}
    if index.is_file():
        with index.open(newline="", encoding="utf-8", errors="replace") as stream:
            known.update(cell for row in csv.reader(stream) for cell in row)
    for path in sorted(folder.iterdir()):
        if path.name not in known or path.is_dir():
            raise OptionError(
                f"--output: {shown(str(folder))} holds {shown(path.name)}, which is no prediction; --force writes over "
                "predictions alone"
            )


# --- contents -----------------------------------------------------------------------------------------------------


def _save_classes(task: str, num_classes: int, prediction: ImagePrediction, path: Path) -> None:
    from PIL import Image

    if num_classes > _PALETTE_SIZE:
        image = Image.fromarray(prediction[task].astype(np.uint16))
    else:
        image = Image.fromarray(prediction[task].astype(np.uint8))
        image.putpalette(class_palette())
    image.save(path, format="png")


def _save_numbers(task: str, prediction: ImagePrediction, path: Path) -> None:
    _save_array(prediction[task], path)


def _save_probabilities(task: str, prediction: ImagePrediction, path: Path) -> None:
    _save_array(prediction.probabilities[task], path)


def _save_array(values: NDArray[np.float32], path: Path) -> None:
    with path.open("wb") as file:  # of a path, numpy changes the name
        np.save(file, values)


def _save_preview(task: str, prediction: ImagePrediction, path: Path) -> None:
    from PIL import Image

    values = prediction[task]
    Image.fromarray(number_picture(values) if values.ndim == 2 else direction_picture(values)).save(path, format="png")
