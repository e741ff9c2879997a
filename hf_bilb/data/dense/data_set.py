"""A dense data set from the files of its parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_bilb.data.dense.files import Column, mtan_columns, prepare_column
from hf_bilb.data.dense.image_labels import ImageLabels, read_image_labels
from hf_bilb.data.dense.options import DenseOptions
from hf_bilb.data.dense.rows import DenseRows
from hf_bilb.data.dense.trivial import trivial_metrics
from hf_bilb.data.inputs.format import DataFormat
from hf_bilb.data.inputs.kinds import DenseMeasurement, LabelColumns, SceneInputs
from hf_bilb.data.rows import collate_images
from hf_bilb.data.splits import draw_rows
from hf_bilb.data.task_data import GalleryInfo, TaskData
from hf_bilb.errors import OptionError
from hf_bilb.losses.dense import dense_item_counts
from hf_bilb.losses.task_types import TaskType


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
        trivial_metrics=trivial_metrics(options.cache_root, facts.name, training, testing, metrics),
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
        format=_format(options, facts, names, labels, test.size),
        gallery=GalleryInfo(facts.class_names, facts.depth_unit, labels.class_names),
    )


def _format(
    options: DenseOptions, facts: DenseFacts, names: tuple[str, ...], labels: ImageLabels, size: tuple[int, int]
) -> DataFormat:
    known = {
        "segmentation": TaskType("segmentation", facts.num_classes, facts.class_names),
        "depth": TaskType("dense_regression", unit=facts.depth_unit),
        "normals": TaskType("dense_regression", 3),
        **{name: TaskType("classification", len(found), found) for name, found in labels.class_names.items()},
    }
    places = {name: LabelColumns((name,), ignore_index=-1 if name == "segmentation" else None) for name in names}
    measurement = DenseMeasurement(facts.batch_size, options.delta_m_average, _base(facts, names))
    return DataFormat(SceneInputs(size), {name: known[name] for name in names}, places, dense=measurement)


def _base(facts: DenseFacts, names: tuple[str, ...]) -> dict[str, float] | None:
    """The published base of Delta_m; None: there is none for these tasks."""
    from hf_bilb.metrics.dense import published_base

    return (published_base(facts.name, names) or None) if facts.published else None


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
    from hf_bilb.metrics.dense import DenseMetrics

    return partial(
        DenseMetrics,
        names,
        facts.num_classes,
        delta_m_base=_base(facts, names),
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
