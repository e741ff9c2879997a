"""Dense prediction: images with pixelwise labels of up to three tasks, and classes of whole images, in batches.

A batch has the columns `pixel_values [B, 3, H, W]` (float32 in [0, 1], RGB) and those of the tasks, in their order:
`segmentation [B, H, W]` (int64, -1: not labelled), `depth [B, H, W]` (float32, 0: not measured), `normals [B, 3, H, W]`
(float32, zero vector: not known). An image without labels of a task has such pixels alone there. With image-level
tasks (`hf_bilb.data.dense.image_labels`) `image_labels [B, M]` comes last: int64, a column for each of them in their
order, -1 where missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_bilb.config.options import nearest
from hf_bilb.data.cache import Preparation, cache_root, fingerprint, prepare_arrays
from hf_bilb.data.checks import check_at_least
from hf_bilb.data.dense.augmentation import View, draw_view
from hf_bilb.data.dense.files import IMAGE, Column, mtan_columns, prepare_column
from hf_bilb.data.dense.image_labels import ImageLabels, read_image_labels
from hf_bilb.data.rows import MappedRows, collate_images
from hf_bilb.data.splits import draw_rows
from hf_bilb.data.task_data import GalleryInfo, TaskData
from hf_bilb.errors import OptionError
from hf_bilb.losses.contract import check_task_names
from hf_bilb.losses.dense import IMAGE_LABELS, dense_item_counts

#: Raise it when a figure of the trivial predictor changes.
_TRIVIAL_VERSION = 1
_TRIVIAL_IMAGES = 200  # training images that its constants are taken from, at most


@dataclass(frozen=True)
class DenseOptions:
    """Options of every dense data set.

    Attributes:
        folder: where the files are.
        size: [height, width] to resize to (images bilinear with antialiasing, labels nearest); null: as they are.
        tasks: the tasks, in the order wanted; null: all that the set has, then those of `image_labels`.
        image_labels: file with classes of whole images (`hf_bilb.data.dense.image_labels`), each of its columns a task;
            null: none.
        augment: training images are scaled and cropped at random and mirrored (`hf_bilb.data.dense.augmentation`), as
            in the papers; a pure function of (seed, epoch, image).
        num_train: use so many of the training images, drawn with `seed`; null: all.
        num_validation: so many training images, drawn with `seed`, are the validation part and not trained on; null:
            the test part serves as validation part, as in the papers, which report a mean over the last epochs on
            it (then choose no checkpoint by it).
        num_test: use so many of the test images, drawn with `seed`; null: all.
        seed: of these draws and of the augmentation.
        allow_missing: an image may lack the file of a task, or its line in `image_labels`, and then lacks its labels.
        delta_m_average: which form of depth's and normals' metrics Delta_m takes, the papers' mean over batches or the
            one over all pixels.
        cache_dir: folder of the memory-mapped cache; null: that of Hugging Face's caches.
    """

    folder: str
    size: tuple[int, int] | None = None
    tasks: tuple[str, ...] | None = None
    image_labels: str | None = None
    augment: bool = True
    num_train: int | None = None
    num_validation: int | None = None
    num_test: int | None = None
    seed: int = 0
    allow_missing: bool = False
    delta_m_average: Literal["batch_mean", "exact"] = "batch_mean"
    cache_dir: str | None = None

    def check(self, known_tasks: Sequence[str]) -> None:
        """Raise `OptionError` for what is out of range, or a task that the set does not have (which only the file
        tells where there are `image_labels`)."""
        check_task_names(known_tasks if self.tasks is None else self.tasks, "tasks")
        if self.image_labels is None:
            self.ordered_tasks(known_tasks)
        if self.size is not None and not all(8 <= side <= 4096 for side in self.size):
            raise OptionError(f"size: {list(self.size)} is not valid, expected [height, width], 8 to 4096 each")
        check_at_least("seed", self.seed, 0)
        for key in ("num_train", "num_validation", "num_test"):
            check_at_least(key, getattr(self, key), 1, ", or null")

    def ordered_tasks(self, known_tasks: Sequence[str]) -> tuple[str, ...]:
        """All tasks, in order: those of `tasks`, or all of `known_tasks`.

        Raises:
            OptionError: one that is not known.
        """
        for name in self.tasks or ():
            if name not in known_tasks:
                known = ", ".join(known_tasks)
                raise OptionError(f"tasks: {name!r} is not valid, expected of {known}{nearest(name, known_tasks)}")
        return tuple(known_tasks) if self.tasks is None else self.tasks

    def dense_tasks(self, known_tasks: Sequence[str]) -> tuple[str, ...]:
        """Those of `tasks` with a label at every pixel, in order; all of `known_tasks` for null."""
        return tuple(name for name in (known_tasks if self.tasks is None else self.tasks) if name in known_tasks)

    @property
    def cache_root(self) -> Path:
        """Folder of the cache."""
        return cache_root(self.cache_dir)


# --- rows ---------------------------------------------------------------------------------------------------------


class DenseRows(MappedRows):
    """Images and pixelwise labels in memory-mapped files.

    `rows[i]` is a dict of the columns above without B. Use `collate_images` with it.

    Augmented, a row is a pure function of (seed, epoch, number of the image in the files): it depends neither on the
    order of the rows, nor on workers, nor on which rows are chosen, nor on where a run was resumed.

    The epoch lies in shared memory, so that workers that live through several epochs see each new one.

    Args:
        files: `image` and the tasks -> `.npy` file with all images of the part (`hf_bilb.data.dense.files`); the order
            of the tasks is that of the columns.
        rows: `[N]`, which of the images, in the order of this set.
        augmentation_seed: None for no augmentation.
        inverse_depth: the augmentation multiplies `depth` by the scale, as 1 / depth or a disparity wants it, instead
            of dividing.
        image_labels: `[.., M]`, the classes of whole images, for each image in the files; None: no such column.

    Cost of an image of 288 x 384 with three labels, in a batch of 8 and on one core: 0.2 ms, augmented 1.4 ms; loading
    its four files with `np.load` 1.0 ms, and 2.6 ms (`benchmarks/dense_loading.py` measures it).
    """

    def __init__(
        self,
        files: Mapping[str, Path],
        rows: NDArray[np.int64],
        augmentation_seed: int | None = None,
        inverse_depth: bool = False,
        image_labels: NDArray[np.int64] | None = None,
    ) -> None:
        super().__init__(files, rows)
        self.augmentation_seed = augmentation_seed
        self.inverse_depth = inverse_depth
        self.image_labels = image_labels
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self.size: tuple[int, int] = self._arrays[IMAGE].shape[-2:]

    def set_epoch(self, epoch: int) -> None:
        """Rows that are asked for from now on, in whichever process, are those of this epoch."""
        self._epoch.fill_(epoch)

    def _batch(self, places: Sequence[int] | NDArray[np.int64]) -> dict[str, Tensor]:
        rows = self.rows[np.asarray(places)]
        if self.augmentation_seed is None:
            found = {name: torch.from_numpy(array[rows]) for name, array in self._arrays.items()}
        else:
            epoch, seed = int(self._epoch), self.augmentation_seed
            views = [draw_view(seed, epoch, row, self.size) for row in rows.tolist()]
            found = {name: self._seen(name, rows, views) for name in self._arrays}
        pixels = found.pop(IMAGE)
        as_bytes = self._arrays[IMAGE].dtype == np.uint8
        batch = {"pixel_values": pixels.float().div_(255) if as_bytes else pixels}
        batch.update({name: column.long() if name == "segmentation" else column for name, column in found.items()})
        if self.image_labels is not None:
            batch[IMAGE_LABELS] = torch.from_numpy(self.image_labels[rows])
        return batch

    def _seen(self, name: str, rows: NDArray[np.int64], views: Sequence[View]) -> Tensor:
        """A column `[B, ...]` of the images as the views show them."""
        array = self._arrays[name]
        batch = np.empty((len(rows), *array.shape[1:]), np.float32 if name == IMAGE else array.dtype)
        for place, row, view in zip(batch, rows, views, strict=True):
            if name == IMAGE:
                view.image(array[row], place)
            elif name == "depth":
                view.depth(array[row], place, self.inverse_depth)
            else:
                (view.normals if name == "normals" else view.nearest)(array[row], place)
        return torch.from_numpy(batch)


# --- the whole set ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DensePart:
    """The images of one part of a set, and their labels.

    Attributes:
        columns: images first, then the tasks.
        size: height and width of all of them.
        names: of the images, in their order, as `data.image_labels` has them.
    """

    columns: Sequence[Column]
    size: tuple[int, int]
    names: Sequence[str]


def mtan_part(
    folder: Path, label_folders: Mapping[str, str], num_classes: int, size: tuple[int, int] | None, allow_missing: bool
) -> DensePart:
    """A part in MTAN's layout; arguments and errors of `mtan_columns`. An image's name is its number."""
    columns, found_size = mtan_columns(folder, label_folders, num_classes, size, allow_missing)
    return DensePart(columns, found_size, [path.stem for path in columns[0].items])


@dataclass(frozen=True)
class DenseFacts:
    """What one data set says about itself.

    Attributes:
        name: of the set, and of its published base.
        tasks: those with a label at every pixel.
        class_names: of the segmentation's classes, in order.
        published: they are those of the published base of Delta_m.
        batch_size: of the evaluation of published tables.
        depth_unit: for tables.
        inverse_depth: see `DenseRows`.
    """

    name: str
    tasks: tuple[str, ...]
    class_names: tuple[str, ...]
    published: bool
    batch_size: int
    depth_unit: str
    inverse_depth: bool = False

    @property
    def num_classes(self) -> int:
        """Classes of the segmentation."""
        return len(self.class_names)


def dense_task_data(options: DenseOptions, facts: DenseFacts, train: DensePart, test: DensePart) -> TaskData:
    """Everything the Trainer needs, from the files of both parts; prepares the cache when it is not there yet.

    Raises:
        OptionError: parts of different size, more images asked for than there are, a file that holds something else, a
            task that no training image has labels of.
    """
    if train.size != test.size:
        sizes = " and ".join(f"{height} x {width}" for height, width in (train.size, test.size))
        raise OptionError(f"data.size: training and test images differ in size ({sizes}), expected [height, width]")
    train_rows, validation_rows, test_rows = _choose_rows(options, len(train.names), len(test.names))
    names, labels = _all_tasks(options, facts, train, test)
    _check_labelled(train, train_rows, labels)
    classes, image_tasks = labels.classes, {name: len(found) for name, found in labels.class_names.items()}
    metrics = _metrics(options, facts, names, image_tasks)
    computed = metrics()
    train_files, test_files = (_prepare(options, facts, name, part) for name, part in (("train", train), ("val", test)))
    of_train = partial(DenseRows, train_files, image_labels=classes.get("train"))
    training = of_train(train_rows, options.seed if options.augment else None, facts.inverse_depth)
    testing = DenseRows(test_files, test_rows, image_labels=classes.get("val"))
    return TaskData(
        train=training,
        validation=testing if validation_rows is None else of_train(validation_rows),
        test=testing,
        task_names=names,
        label_names=computed.label_names,
        data_collator=collate_images,
        compute_metrics=computed,
        metrics=computed.facts,
        trivial_metrics=_trivial_metrics(options, facts, training, testing, metrics),
        model_arguments={
            "task_names": list(names),
            "num_classes": facts.num_classes,
            **({"image_tasks": image_tasks} if image_tasks else {}),
        },
        task_item_counts=partial(dense_item_counts, task_names=names, image_tasks=tuple(image_tasks)),
        metrics_by_batch=True,
        trivial_predictor="best constant answer",
        single_task_base=computed.delta_m_base,
        single_task_source="models trained on one task each (tables of CAGrad, Nash-MTL, FAMO and LDC-MTL)",
        gallery=GalleryInfo(facts.class_names, facts.depth_unit, labels.class_names),
    )


def _all_tasks(
    options: DenseOptions, facts: DenseFacts, train: DensePart, test: DensePart
) -> tuple[tuple[str, ...], ImageLabels]:
    """The names of all tasks in order, and the labels of those of whole images."""
    if options.image_labels is None:
        return options.ordered_tasks(facts.tasks), ImageLabels({}, {})
    images = {"train": train.names, "val": test.names}
    labels = read_image_labels(Path(options.image_labels), images, options.allow_missing)
    try:
        names = options.ordered_tasks((*facts.tasks, *labels.class_names))
    except OptionError as error:
        raise OptionError(f"data.{error}") from None
    chosen = [name for name in names if name not in facts.tasks]
    return names, labels.of_tasks(chosen) if chosen else ImageLabels({}, {})


def _check_labelled(train: DensePart, rows: NDArray[np.int64], labels: ImageLabels) -> None:
    there = {column.kind: any(column.items[row] is not None for row in rows) for column in train.columns}
    for number, task in enumerate(labels.class_names):
        there[task] = bool((labels.classes["train"][rows, number] >= 0).any())
    for task, known in there.items():
        if not known:
            raise OptionError(f"data.tasks: none of the {len(rows)} training images has a label of task {task!r}")


def _metrics(
    options: DenseOptions, facts: DenseFacts, names: tuple[str, ...], image_tasks: Mapping[str, int]
) -> partial[Any]:
    """`DenseMetrics` with all its arguments."""
    from hf_bilb.metrics.dense import DenseMetrics, published_base

    return partial(
        DenseMetrics,
        names,
        facts.num_classes,
        delta_m_base=(published_base(facts.name, names) or None) if facts.published else None,
        batch_size=facts.batch_size,
        delta_m_average=options.delta_m_average,
        depth_unit=facts.depth_unit,
        image_tasks=image_tasks,
    )


def _choose_rows(
    options: DenseOptions, num_train: int, num_test: int
) -> tuple[NDArray[np.int64], NDArray[np.int64] | None, NDArray[np.int64]]:
    """Rows of the training part, of the validation part (None: the test part's), and of the test part, ascending."""
    held_out = options.num_validation or 0
    for key, wanted, there in (
        ("num_validation", held_out, num_train - 1),
        ("num_train", options.num_train or 1, num_train - held_out),
        ("num_test", options.num_test or 1, num_test),
    ):
        if wanted > there:
            raise OptionError(f"data.{key}: {wanted} is not valid, expected at most {there}, or null")
    validation, train = draw_rows(num_train, options.seed, held_out, options.num_train)
    (test,) = draw_rows(num_test, options.seed, options.num_test)
    return np.sort(train), np.sort(validation) if held_out else None, np.sort(test)


def _prepare(options: DenseOptions, facts: DenseFacts, part_name: str, part: DensePart) -> dict[str, Path]:
    lengths = {len(column.items) for column in part.columns}
    assert lengths == {len(part.names)}, lengths
    title = f"{facts.name}-{part_name}"
    return {column.kind: prepare_column(options.cache_root, title, column, part.size) for column in part.columns}


# --- the trivial predictor ----------------------------------------------------------------------------------------


def constant_answers(rows: DenseRows, num_classes: int) -> dict[str, Tensor]:
    """What a predictor that sees no input answers for every pixel: the most frequent class `[]`, the mean depth `[]`,
    the mean direction `[3]`; of at most 200 of the images, evenly spread. (For whole images: `frequent_classes`.)"""
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _TRIVIAL_IMAGES)).astype(np.int64))
    plain = DenseRows(rows.files, rows.rows)
    counts = torch.zeros(num_classes, dtype=torch.int64)
    depth, direction = torch.zeros(2, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for index in chosen.tolist():
        row = plain[index]
        if "segmentation" in row:
            counts += torch.bincount(row["segmentation"][row["segmentation"] >= 0], minlength=num_classes)
        if "depth" in row:
            depth += torch.stack([row["depth"].double().sum(), (row["depth"] != 0).sum().double()])
        if "normals" in row:
            direction += row["normals"].double().sum(dim=(1, 2))
    length = direction.norm()
    found = {
        "segmentation": counts.argmax(),
        "depth": (depth[0] / depth[1].clamp(min=1)).float(),
        "normals": (direction / length if length > 0 else torch.tensor([0.0, 0.0, -1.0])).float(),
    }
    return {name: found[name] for name in plain.files if name != IMAGE}


def frequent_classes(rows: DenseRows, image_tasks: Mapping[str, int]) -> dict[str, Tensor]:
    """What it answers for every image: the logits `[C]` of the most frequent class (of the first of them in a tie)."""
    answers = {}
    for column, (name, num_classes) in enumerate(image_tasks.items()):
        assert rows.image_labels is not None
        labels = rows.image_labels[rows.rows, column]
        counts = np.bincount(labels[labels >= 0], minlength=num_classes)
        answers[name] = torch.from_numpy(np.eye(num_classes)[counts.argmax()])
    return answers


def _trivial_metrics(
    options: DenseOptions, facts: DenseFacts, train: DenseRows, test: DenseRows, metrics: partial[Any]
) -> dict[str, float]:
    """The metrics of `constant_answers` on the test part; in the cache, since angles of all pixels take a minute."""

    def compute(_: object) -> dict[str, NDArray[Any]]:
        answers = constant_answers(train, facts.num_classes), frequent_classes(train, metrics.keywords["image_tasks"])
        found = _measure(*answers, test, metrics())
        return {"keys": np.array(list(found), dtype=np.str_), "values": np.array(list(found.values()), np.float64)}

    key = [str(train.files), train.rows.tobytes(), str(test.files), test.rows.tobytes(), str(metrics.keywords)]
    key += [part.image_labels.tobytes() for part in (train, test) if part.image_labels is not None]
    preparation = Preparation(
        name=f"{facts.name}-trivial-v{_TRIVIAL_VERSION}-{fingerprint(key)}",
        chunks=lambda: [None],
        compute=compute,
        size=lambda _: len(test),
        summarize=lambda arrays: {},
        description=f"{facts.name}: best constant answer",
        unit="images",
    )
    arrays, _ = prepare_arrays(options.cache_root, preparation, num_workers=1)
    return {str(key): float(value) for key, value in zip(arrays["keys"], arrays["values"], strict=True)}


def _measure(
    of_pixels: Mapping[str, Tensor], of_images: Mapping[str, Tensor], rows: DenseRows, metrics: Any
) -> dict[str, float]:
    from transformers import EvalPrediction

    found: dict[str, float] = {}
    for start in range(0, len(rows), 8):
        last = min(start + 8, len(rows))
        (batch,) = rows.__getitems__(range(start, last))
        predictions = {
            name: answer[:, None, None].expand_as(batch[name]) if answer.ndim else answer.expand_as(batch[name])
            for name, answer in of_pixels.items()
        }
        predictions.update({name: answer.expand(last - start, -1) for name, answer in of_images.items()})
        given: Any = EvalPrediction(predictions=predictions, label_ids=batch)
        found = metrics(given, compute_result=last == len(rows))
    return found
