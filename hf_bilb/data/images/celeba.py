"""CelebA: 40 binary attributes of 202,599 faces of celebrities.

Liu, Luo, Wang, Tang: Deep Learning Face Attributes in the Wild, ICCV 2015. The aligned images, 178 x 218. Read from the
original files (non-commercial research only, from mmlab.ie.cuhk.edu.hk/projects/CelebA.html), or from the hub.

As in the multi-task papers (FAMO, LDC-MTL): the official partition (162,770 training, 19,867 validation, 19,962 test
images), the whole frame resized to 64 x 64, pixels in [0, 1] without any further normalisation, no augmentation; F1
of each attribute at a probability of 0.5, the model with the best mean F1 on the validation part, and Delta_m
against F1 of 40 models trained on one attribute each.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hf_bilb.config.options import check_one_of
from hf_bilb.data.cache import list_files
from hf_bilb.data.checks import check_at_least, check_folder, check_tasks, loading_from_hub, missing_column
from hf_bilb.data.images.files import ImageFiles, ImageSource, TableImages, prepare_images
from hf_bilb.data.images.rows import ImageRows
from hf_bilb.data.inputs.format import DataFormat
from hf_bilb.data.inputs.kinds import ImageInputs
from hf_bilb.data.rows import collate_images
from hf_bilb.data.splits import PARTS
from hf_bilb.data.task_data import DELTA_M_INFO, DataSetSpec, MetricInfo, TaskData, binary_losses
from hf_bilb.errors import OptionError
from hf_bilb.losses.task_names import CELEBA_ATTRIBUTES
from hf_bilb.losses.task_types import TaskType
from hf_bilb.metrics.multi_label import MEANS, MultiLabelMetrics, trivial_metrics

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

NUM_IMAGES = 202_599
IMAGE_FOLDER = "img_align_celeba"
LABEL_FILE = "list_attr_celeba.txt"
PARTITION_FILE = "list_eval_partition.txt"

#: Attribute -> F1 on the test part of a model trained on it alone; "FAMO issue 2", as LDC-MTL's CelebA trainer has it.
SINGLE_TASK_F1 = {
    "5_o_Clock_Shadow": 0.6736886,
    "Arched_Eyebrows": 0.68121034,
    "Attractive": 0.81524944,
    "Bags_Under_Eyes": 0.5760289,
    "Bald": 0.7205613,
    "Bangs": 0.8555076,
    "Big_Lips": 0.38203922,
    "Big_Nose": 0.58225113,
    "Black_Hair": 0.787647,
    "Blond_Hair": 0.8321292,
    "Blurry": 0.5029583,
    "Brown_Hair": 0.68694085,
    "Bushy_Eyebrows": 0.6781237,
    "Chubby": 0.5240381,
    "Double_Chin": 0.5161666,
    "Eyeglasses": 0.95694304,
    "Goatee": 0.6968786,
    "Gray_Hair": 0.67976356,
    "Heavy_Makeup": 0.8808315,
    "High_Cheekbones": 0.8582131,
    "Male": 0.97034,
    "Mouth_Slightly_Open": 0.93267566,
    "Mustache": 0.5057539,
    "Narrow_Eyes": 0.40307626,
    "No_Beard": 0.9703734,
    "Oval_Face": 0.48644206,
    "Pale_Skin": 0.60786104,
    "Pointy_Nose": 0.5261031,
    "Receding_Hairline": 0.56907415,
    "Rosy_Cheeks": 0.59815097,
    "Sideburns": 0.6858371,
    "Smiling": 0.924108,
    "Straight_Hair": 0.5424991,
    "Wavy_Hair": 0.7406311,
    "Wearing_Earrings": 0.71019936,
    "Wearing_Hat": 0.87365365,
    "Wearing_Lipstick": 0.9305602,
    "Wearing_Necklace": 0.33704284,
    "Wearing_Necktie": 0.7647628,
    "Young": 0.91907,
}
ATTRIBUTES = CELEBA_ATTRIBUTES


@dataclass(frozen=True)
class CelebaOptions:
    """What a recipe's `data:` section may set. Exactly one of `folder` and `hub` is set.

    Attributes:
        folder: with `img_align_celeba/*.jpg`, `list_attr_celeba.txt` and `list_eval_partition.txt`; each may also lie
            where the original archive has it, in `Img/`, `Anno/` and `Eval/`.
        hub: a name on the hub, or a folder that `datasets` reads: an image column, and a column for each task with
            true and false, 0 and 1, or -1 and 1; splits train, validation (or valid, val) and test.
        image_size: height and width that the whole frame is resized to.
        tasks: which attributes, in the order of the loss vector; null = all 40.
        max_train: the first so many training images; null = all.
        allow_missing: leave out images that are listed but not there, with a warning, instead of an error.
        cache_dir: where the decoded images are kept (2.5 GB at 64 x 64); null = `hf_bilb` in the folder of Hugging
            Face's caches.

    Raises:
        OptionError: both or none of `folder` and `hub`, an unknown task, a number out of range.
    """

    folder: str | None = None
    hub: str | None = None
    image_size: int = 64
    tasks: tuple[str, ...] | None = None
    max_train: int | None = None
    allow_missing: bool = False
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        check_one_of("folder (the original files) and hub (a name)", folder=self.folder, hub=self.hub)
        check_tasks(self.tasks, ATTRIBUTES)
        if not 8 <= self.image_size <= 1024:
            raise OptionError(f"image_size: {self.image_size} is not valid, expected 8 to 1024 pixels")
        check_at_least("max_train", self.max_train, 1, ", or null (all)")

    @property
    def task_names(self) -> tuple[str, ...]:
        """`tasks`, or all 40."""
        return ATTRIBUTES if self.tasks is None else self.tasks


@dataclass(frozen=True)
class Faces:
    """N images with labels.

    Attributes:
        images: the N images.
        labels: `[N, K]` float32, 0 or 1.
        parts: `[N]`, which of `PARTS`: 0 training, 1 validation, 2 test.
    """

    images: ImageSource
    labels: NDArray[np.float32]
    parts: NDArray[np.int8]


def load_celeba(options: CelebaOptions) -> TaskData:
    """CelebA, or a part of it, from decoded images in a memory-mapped file (see `prepare_images`).

    A part of the set is reported with a warning that says how many images each part has.

    Raises:
        OptionError: a folder, file or column that is missing, an image that is missing or does not decode, a label that
            is none: names file, task and row (the file's line, from 1).

    Cost: the first call decodes (80 s on one core for the whole set); later ones read the label file (2 s).
    """
    if options.folder is not None:
        faces = read_folder(Path(options.folder), options.task_names, options.allow_missing)
    else:
        assert options.hub is not None  # CelebaOptions asks for one of the two
        faces = read_hub(options.hub, options.task_names)
    where = options.folder or options.hub
    counts = [int((faces.parts == part).sum()) for part in range(3)]
    for name, count in zip(PARTS, counts, strict=True):
        if count == 0:
            raise OptionError(f"data: {where!r} has no {name} images")
    if sum(counts) < NUM_IMAGES:
        logger.warning(
            "%s: %d of CelebA's %d images (%d training, %d validation, %d test): results do not compare with those of "
            "the whole set", where, sum(counts), NUM_IMAGES, *counts,
        )  # fmt: skip
    file = prepare_images(faces.images, options.image_size, options.cache_dir)
    return task_data(file, faces, options)


def task_data(file: Path, faces: Faces, options: CelebaOptions) -> TaskData:
    """Everything the Trainer needs, from the decoded images of `faces` in `file`."""
    names = options.task_names
    base = [SINGLE_TASK_F1[name] for name in names]

    def part(number: int) -> ImageRows:
        rows = np.flatnonzero(faces.parts == number)
        chosen = rows[: options.max_train] if number == 0 else rows
        return ImageRows(file, chosen, faces.labels[chosen])

    train, validation, test = (part(number) for number in range(3))
    return TaskData(
        train=train,
        validation=validation,
        test=test,
        task_names=names,
        label_names=("labels",),
        data_collator=collate_images,
        compute_metrics=MultiLabelMetrics(names, base),
        metrics=_metric_infos(names),
        trivial_metrics=trivial_metrics(train.labels, test.labels, names, base),
        model_arguments={
            "tasks": dict.fromkeys(names, TaskType("multi_label")),
            "image_size": options.image_size,
        },
        metrics_by_batch=True,
        trivial_predictor="best constant answer",
        task_loss_func=binary_losses,
        format=DataFormat(ImageInputs("image", options.image_size), dict.fromkeys(names, TaskType("multi_label"))),
        single_task_base={f"{name}_f1": value for name, value in zip(names, base, strict=True)},
        single_task_source="F1 of models trained on one attribute of the whole CelebA each (FAMO, issue 2; LDC-MTL)",
    )


def _metric_infos(names: Sequence[str]) -> tuple[MetricInfo, ...]:
    titles = dict(zip(MEANS, ("mean F1", "mean accuracy", "mean AUC"), strict=True))
    return (
        *(MetricInfo(f"{name}_f1", name, "F1", "", higher_is_better=True, ideal=1.0) for name in names),
        *(MetricInfo(key, "", title, "", higher_is_better=True, ideal=1.0) for key, title in titles.items()),
        DELTA_M_INFO,
    )


# --- the original files -------------------------------------------------------------------------------------------


def read_folder(folder: Path, task_names: Sequence[str], allow_missing: bool = False) -> Faces:
    """Images, labels and partition of a folder in the original layout.

    Raises:
        OptionError: see `load_celeba`.
    """
    check_folder(folder, f"{IMAGE_FOLDER}, {LABEL_FILE} and {PARTITION_FILE}")
    label_file = _find(folder, "Anno", LABEL_FILE)
    partition_file = _find(folder, "Eval", PARTITION_FILE)
    image_folder = _find(folder, "Img", IMAGE_FOLDER)
    names, labels = read_labels(label_file, task_names)
    part_of = read_partition(partition_file)
    for row, name in enumerate(names, _FIRST_ROW):
        if name not in part_of:
            raise OptionError(f"{partition_file}: has no line for {name!r} ({label_file}, row {row})")
    files = list_files(image_folder)
    there = np.array([name in files for name in names])
    if not there.all():
        first = int(np.argmin(there))
        what = (
            f"{image_folder}: {(~there).sum()} of the {len(names)} images in {label_file} are missing, "
            f"first {names[first]!r} (row {first + _FIRST_ROW})"
        )
        if not allow_missing:
            raise OptionError(f"{what}; data.allow_missing=true leaves them out")
        logger.warning("%s; they are left out", what)
        names = [name for name, found in zip(names, there, strict=True) if found]
    parts = np.array([part_of[name] for name in names], np.int8)
    return Faces(ImageFiles(image_folder, names, files), labels[there], parts)


def _find(folder: Path, sub_folder: str, name: str) -> Path:
    for path in (folder / name, folder / sub_folder / name):
        if path.exists():
            return path
    raise OptionError(f"data.folder: {str(folder)!r} has neither {name} nor {sub_folder}/{name}")


_FIRST_ROW = 3  # line of the first image in the label file
_BITS = {"1": 1, "-1": 0}


def read_labels(file: Path, task_names: Sequence[str]) -> tuple[list[str], NDArray[np.float32]]:
    """The label file: number of images, names of the attributes, then a line for each image.

    Returns:
        N names of files, and labels `[N, K]`, 0 or 1, of `task_names`.

    Raises:
        OptionError: names file, row and task.
    """
    lines = _numbered_words(file)
    count, columns = _header(file, lines)
    for task in task_names:
        if task not in columns:
            raise missing_column(f"{file}, row 2", f"for task {task}", columns)
    names: list[str] = []
    rows: list[bytes] = []
    for row, (name, *values) in lines:
        if len(values) != len(columns):
            raise OptionError(f"{file}, row {row}: {len(values)} labels of {name!r}, expected {len(columns)}")
        try:
            rows.append(bytes(map(_BITS.__getitem__, values)))
        except KeyError as error:
            task = columns[values.index(error.args[0])]
            raise OptionError(
                f"{file}, row {row}: {error.args[0]!r} is no label of task {task}, expected -1 or 1"
            ) from None
        names.append(name)
    if len(names) != count:
        raise OptionError(f"{file}: lists {len(names)} images, expected {count}, as row 1 says; is it cut off?")
    labels = np.frombuffer(b"".join(rows), np.uint8).reshape(count, len(columns))
    return names, labels[:, [columns.index(task) for task in task_names]].astype(np.float32)


def _header(file: Path, lines: Iterator[tuple[int, list[str]]]) -> tuple[int, list[str]]:
    (_, first), (_, columns) = next(lines, (1, [])), next(lines, (2, []))
    if len(first) != 1 or not first[0].isdecimal():
        raise OptionError(f"{file}, row 1: {' '.join(first)[:60]!r} is not valid, expected the number of images")
    return int(first[0]), columns


def read_partition(file: Path) -> dict[str, int]:
    """Image -> 0 training, 1 validation, 2 test.

    Raises:
        OptionError: names file and row.
    """
    part_of: dict[str, int] = {}
    for row, words in _numbered_words(file):
        if len(words) != 2 or words[1] not in ("0", "1", "2"):
            raise OptionError(
                f"{file}, row {row}: {' '.join(words)[:60]!r} is not valid, expected an image and 0, 1 or 2"
            )
        part_of[words[0]] = int(words[1])
    return part_of


def _numbered_words(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number from 1 and words of each line that is not empty."""
    try:
        with open(file, encoding="utf-8-sig") as stream:
            for number, line in enumerate(stream, 1):
                if words := line.split():
                    yield number, words
    except (OSError, UnicodeError) as error:
        raise OptionError(f"{file}: cannot be read: {error}") from None


# --- the hub ------------------------------------------------------------------------------------------------------

_SPLITS = (("train",), ("validation", "valid", "val"), ("test",))


def read_hub(name: str, task_names: Sequence[str]) -> Faces:
    """A set on the hub, a folder that `load_dataset` reads, or one that `save_to_disk` wrote.

    Raises:
        OptionError: names the set, the task and the row (of its split, from 0).
    """
    splits = _load_splits(name)
    tables = {}
    for wanted in _SPLITS:
        found = [split for split in wanted if split in splits]
        if not found:
            raise OptionError(f"data.hub: {name!r} has no split {' or '.join(wanted)} (it has {', '.join(splits)})")
        tables[found[0]] = splits[found[0]]
    column = _image_column(name, tables["train"])
    labels = [_hub_labels(f"{name}, {split}", table, task_names) for split, table in tables.items()]
    parts = np.repeat(np.arange(3, dtype=np.int8), [len(table) for table in tables.values()])
    return Faces(TableImages(tables, column, name), np.concatenate(labels), parts)


def _load_splits(name: str) -> Mapping[str, datasets.Dataset]:
    import datasets

    with loading_from_hub(name, f"data.hub: {name!r} cannot be loaded"):
        if (Path(name) / "dataset_dict.json").is_file():
            return datasets.DatasetDict.load_from_disk(name)
        splits: Any = datasets.load_dataset(name)
        return splits


def _image_column(name: str, table: datasets.Dataset) -> str:
    import datasets

    found = [column for column, feature in table.features.items() if isinstance(feature, datasets.Image)]
    if len(found) != 1:
        held = ", ".join(table.column_names)
        raise OptionError(f"data.hub: {name!r} has {len(found)} image columns, expected one (columns: {held})")
    return str(found[0])


def _hub_labels(where: str, table: datasets.Dataset, task_names: Sequence[str]) -> NDArray[np.float32]:
    labels = np.empty((len(table), len(task_names)), np.float32)
    for k, task in enumerate(task_names):
        if task not in table.column_names:
            raise missing_column(where, f"for task {task}", table.column_names)
        values = np.array(table.select_columns([task])[:][task], dtype=object)  # without decoding the images
        allowed = (-1, 1) if -1 in values else (0, 1)
        wrong = [row for row, value in enumerate(values) if value not in allowed]
        if wrong:
            raise OptionError(
                f"{where}, row {wrong[0]}: {values[wrong[0]]!r} is no label of task {task}, expected "
                f"{allowed[0]} or {allowed[1]}"
            )
        labels[:, k] = values == 1
    return labels


SPEC = DataSetSpec(options=CelebaOptions, load=load_celeba)
