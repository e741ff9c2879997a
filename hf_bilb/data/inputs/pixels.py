"""Images of models with tasks of pixels, with the size that each had before it was resized, and labels of pixels.

Both are read when a batch asks for them, by the functions that read them for training: a batch has the columns of the
data set's, and `original_sizes [B, 2]`, height and width of each image as it was handed over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_bilb.data.dense.files import checked_image, checked_normals, measured, resize_image, resize_nearest
from hf_bilb.data.images.files import ImageSource, as_rgb, resized
from hf_bilb.data.inputs.encoded import Encoded, Wanted
from hf_bilb.data.inputs.images import as_given, find_rows, opened
from hf_bilb.data.inputs.kinds import LabelColumns, PixelInputs, SceneInputs
from hf_bilb.data.own.files import Table
from hf_bilb.data.own.image_rows import pixel_column
from hf_bilb.data.own.images import files_of
from hf_bilb.data.own.pixels import Masks, Numbers, check_same_size, decode_label
from hf_bilb.data.rows import BatchedRows, collate_images
from hf_bilb.errors import OptionError
from hf_bilb.losses.dense import IMAGE_LABELS
from hf_bilb.losses.masked import MISSING_INTEGER
from hf_bilb.losses.task_types import LABELS, TaskType, pixel_tasks

#: The column with height and width of each image as it was handed over.
SIZES = "original_sizes"

Size = tuple[int, int]
#: Number of an image -> `[3, H, W]` as the model takes it, uint8 or floats in [0, 1], and its size before that.
ReadImage = Callable[[int], tuple[NDArray[Any], Size]]
#: `[N, W]` labels of whole images, NaN where missing -> column -> those of a batch's columns.
OfImages = Callable[[NDArray[np.float32]], dict[str, Tensor]]


def encode_pixels(kind: PixelInputs, inputs: Any, tokenizer: Any, wanted: Wanted) -> Encoded:
    """Rows with `pixel_values` and `original_sizes`, as the data set `table` has them; see `ENCODERS`."""
    rows = find_rows(kind.column, inputs, wanted)
    read = partial(_read_picture, rows.source, kind.image_size)
    targets = Targets.find(rows.table, wanted, _numbers_of_images, _reader_of_table)
    return Encoded(LazyFrames(read, rows.places, (kind.image_size, kind.image_size), targets), collate_images)


def encode_scenes(kind: SceneInputs, inputs: Any, tokenizer: Any, wanted: Wanted) -> Encoded:
    """The same as the packaged sets of dense prediction have them; an array of floats stays as it is."""
    rows = find_rows(kind.column, inputs, wanted)
    read = partial(_read_scene, rows.source, kind.size)
    targets = Targets.find(rows.table, wanted, _classes_of_images, _reader_of_scenes)
    return Encoded(LazyFrames(read, rows.places, kind.size, targets), collate_images)


class LazyFrames(BatchedRows):
    """Images, decoded when they are asked for, with their labels where there are any.

    Args:
        read: an image.
        places: `[N]`, which of the images each row has.
        size: height and width of what `read` gives.
        targets: the labels; None: none are read.
    """

    def __init__(self, read: ReadImage, places: NDArray[np.int64], size: Size, targets: Targets | None) -> None:
        self.read, self.places, self.size, self.targets = read, places, size, targets

    def __len__(self) -> int:
        return len(self.places)

    def _batch(self, places: Sequence[int] | NDArray[np.int64]) -> dict[str, Any]:
        chosen = np.asarray(places)
        images, sizes = zip(*(self.read(int(place)) for place in self.places[chosen]), strict=True)
        batch = {"pixel_values": torch.stack([_in_unit_range(image) for image in images]), SIZES: torch.tensor(sizes)}
        return batch if self.targets is None else {**batch, **self.targets.batch(chosen, sizes, self.size)}


def _in_unit_range(image: NDArray[Any]) -> Tensor:
    values = torch.from_numpy(np.ascontiguousarray(image))
    return values.float().div_(255) if image.dtype == np.uint8 else values


def _read_picture(source: ImageSource, size: int, place: int) -> tuple[NDArray[np.uint8], Size]:
    with opened(source, place) as image:
        return resized(image, size, source.describe(place)), (image.height, image.width)


def _read_scene(source: ImageSource, size: Size, place: int) -> tuple[NDArray[Any], Size]:
    where, given = source.describe(place), as_given(source, place)
    if isinstance(given, np.ndarray):
        pixels = checked_image(given, where)
    else:
        with opened(source, place) as image:
            pixels = np.asarray(as_rgb(image, where))
    return resize_image(np.moveaxis(pixels, -1, 0), size), pixels.shape[:2]


# --- labels -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelReader:
    """How the labels of a task of pixels become a column of a batch.

    Attributes:
        read: the bytes of a file, and where it is named -> its label `[..., H, W]` in its own size.
        blank: `[..., 1, 1]`, a pixel without a label.
        column: B labels of the model's size -> the column.
    """

    read: Callable[[bytes, str], NDArray[Any]]
    blank: NDArray[Any]
    column: Callable[[NDArray[Any]], Tensor]


@dataclass(frozen=True)
class LabelFiles:
    """The labels of a task of pixels, of N rows.

    Attributes:
        reader: how they are read.
        files: the different ones; None: the table has no such column.
        rows: `[N]`, which of them each row has; -1: none.
    """

    reader: LabelReader
    files: ImageSource | None
    rows: NDArray[np.int64]

    @classmethod
    def find(cls, table: Table, column: str, what: str, reader: LabelReader) -> LabelFiles:
        """Those that a column names or holds."""
        if column not in table.rows.column_names:
            return cls(reader, None, np.full(len(table.rows), -1))
        return cls(reader, *files_of([(table, column)], f"column {column!r}: {what}", required=False))

    def column(self, rows: NDArray[np.int64], originals: Sequence[Size], size: Size) -> Tensor:
        """The column of some rows, whose images had the sizes `originals`; raises as `LabelReader.read`."""
        labels = [self._resized(row, original, size) for row, original in zip(rows.tolist(), originals, strict=True)]
        return self.reader.column(np.stack(labels))

    def _resized(self, row: int, original: Size, size: Size) -> NDArray[Any]:
        place, blank = int(self.rows[row]), self.reader.blank
        if place < 0:
            return np.broadcast_to(blank, (*blank.shape[:-2], *size))
        assert self.files is not None
        where = f"data: {self.files.describe(place)}"
        values = self.reader.read(self.files.read(place), where)
        check_same_size(values, original, where)
        return resize_nearest(values, size)


@dataclass(frozen=True)
class Targets:
    """The labels of N rows.

    Attributes:
        of_images: column -> `[N, ...]`, labels of whole images.
        of_pixels: task -> its labels.
    """

    of_images: Mapping[str, Tensor]
    of_pixels: Mapping[str, LabelFiles]

    @classmethod
    def find(
        cls, table: Table | None, wanted: Wanted, of_images: OfImages, reader: Callable[..., LabelReader]
    ) -> Targets | None:
        """Those of a table; None where none are wanted.

        Args:
            of_images: labels of whole images -> their columns.
            reader: a task of pixels, its name and `LabelColumns` -> how its labels are read.
        """
        labels = None if table is None else wanted.labels(table)
        if table is None or labels is None:
            return None
        files = {}
        for name, task in pixel_tasks(wanted.tasks).items():
            place, what = wanted.places[name], "mask" if task.type == "segmentation" else "array"
            files[name] = LabelFiles.find(table, place.columns[0], what, reader(name, task, place))
        return cls(of_images(labels.values) if labels.values.shape[1] else {}, files)

    def batch(self, rows: NDArray[np.int64], originals: Sequence[Size], size: Size) -> dict[str, Tensor]:
        """The columns of some rows, whose images had the sizes `originals`."""
        columns = {name: values[torch.from_numpy(rows)] for name, values in self.of_images.items()}
        return columns | {name: labels.column(rows, originals, size) for name, labels in self.of_pixels.items()}


def _numbers_of_images(values: NDArray[np.float32]) -> dict[str, Tensor]:
    return {LABELS: torch.from_numpy(values)}


def _classes_of_images(values: NDArray[np.float32]) -> dict[str, Tensor]:
    return {IMAGE_LABELS: torch.from_numpy(values).nan_to_num(nan=-1.0).long()}


def _reader_of_table(name: str, task: TaskType, place: LabelColumns) -> LabelReader:
    def column(values: NDArray[Any]) -> Tensor:
        return pixel_column(task, values, np.zeros(len(values), bool))

    if task.type == "segmentation":
        read = Masks(task.size, place.ignore_index).read
        return LabelReader(read, np.full((1, 1), MISSING_INTEGER, np.int16), column)
    return LabelReader(Numbers(task.size, place.missing).read, np.full((task.size, 1, 1), np.nan, np.float32), column)


def _reader_of_scenes(name: str, task: TaskType, place: LabelColumns) -> LabelReader:
    if name == "segmentation":
        read = Masks(task.size, place.ignore_index).read
        return LabelReader(read, np.full((1, 1), -1, np.int16), lambda values: torch.from_numpy(values).long())
    if name == "depth":
        return LabelReader(_read_depth, np.zeros((1, 1), np.float32), torch.from_numpy)
    return LabelReader(_read_normals, np.zeros((3, 1, 1), np.float32), torch.from_numpy)


def _read_depth(data: bytes, where: str) -> NDArray[np.float32]:
    return measured(_channels(data, where, 1)[0])


def _read_normals(data: bytes, where: str) -> NDArray[np.float32]:
    return checked_normals(_channels(data, where, 3), where)


def _channels(data: bytes, where: str, number: int) -> NDArray[Any]:
    """`[number, H, W]`, of an array that may have its channels last, as the files of the papers."""
    values = decode_label(data, where)
    values = values[None] if values.ndim == 2 else values
    if values.shape[-1] == number != values.shape[0]:
        values = np.moveaxis(values, -1, 0)
    if len(values) != number:
        raise OptionError(f"{where} is {list(values.shape)}, expected {number} numbers at each pixel")
    return values
