"""What a recipe says about data of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from hf_bilb.config.options import bounded, check_bounds, unknown_name
from hf_bilb.data.checks import check_at_least
from hf_bilb.data.own.csv_options import CsvOptions, check_repeats
from hf_bilb.data.own.words import word_of
from hf_bilb.data.splits import PARTS
from hf_bilb.errors import OptionError
from hf_bilb.losses.contract import check_task_names
from hf_bilb.losses.task_types import PIXEL_TYPES, RESERVED_COLUMNS, Kind
from hf_bilb.metrics.by_type import METRICS

_MOST_CLASSES = 32767  # that are kept in 16 bits
_IGNORED = 255  # what most masks have where there is no label

Patterns = str | tuple[str, ...]
Value = str | bool | int | float
InputKind = Literal["text", "image", "table"]


@dataclass(frozen=True)
class SplitOptions:
    """Which rows are drawn from the training rows, for the parts that have no files of their own.

    Attributes:
        validation, test: shares of the rows.
        group_by: a column; rows with the same value in it never lie in two parts. Of tasks with rows of their own, the
            same value goes into the same part in all tasks that have the same shares and seed; `validation` and `test`
            are then shares of the values, not of the rows.
        stratify_by: a column; the parts have the same shares of each of its values.
        seed: of the choice.
    """

    validation: float = bounded(0.1, above=0, below=1)
    test: float = bounded(0.1, above=0, below=1)
    group_by: str | None = None
    stratify_by: str | None = None
    seed: int = bounded(0, at_least=0)

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.group_by is not None and self.stratify_by is not None:
            raise OptionError(
                f"group_by: {self.group_by!r} and stratify_by {self.stratify_by!r} do not go together, expected one"
            )
        if self.validation + self.test >= 1:
            raise OptionError(f"validation: {self.validation:g} and test {self.test:g} leave no training rows")


@dataclass(frozen=True)
class InputOptions:
    """What a model sees: texts, or an image, or numbers and categories.

    Attributes:
        text: a column of texts, or two for pairs; for `token_classification` a column of lists of words.
        image: a column with the paths of image files, relative to the table's file, or with images of `datasets`.
        numeric: columns of numbers.
        categorical: columns of words, or of numbers that stand for words.
    """

    text: Patterns | None = None
    image: str | None = None
    numeric: tuple[str, ...] | None = None
    categorical: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        table = None if not (self.numeric or self.categorical) else True
        given = [key for key, value in (("text", self.text), ("image", self.image), ("numeric", table)) if value]
        if len(given) != 1:
            said = f"got {' and '.join(given)}" if given else "none is set"
            key = given[0] if given else "text"
            raise OptionError(f"{key}: one of text, image, and numeric / categorical is needed, {said}")
        if len(self.texts) > 2:
            raise OptionError(f"text: got {len(self.texts)} columns, expected one, or two for pairs")
        check_repeats("text", self.texts)
        check_repeats("numeric", (*(self.numeric or ()), *(self.categorical or ())))

    @property
    def texts(self) -> tuple[str, ...]:
        """The text columns."""
        return (self.text,) if isinstance(self.text, str) else self.text or ()

    @property
    def kind(self) -> InputKind:
        """Which of the three."""
        return "text" if self.texts else "image" if self.image else "table"

    @property
    def columns(self) -> dict[str, str]:
        """Column -> the option that names it."""
        named = [("text", self.texts), ("image", (self.image,) if self.image else ())]
        named += [("numeric", self.numeric or ()), ("categorical", self.categorical or ())]
        return {column: key for key, columns in named for column in columns}


@dataclass(frozen=True)
class TaskOptions:
    """A task: what its labels are, and in which column they stand.

    Attributes:
        type: `regression`, `classification`, `multi_label`, `token_classification`; of images also `segmentation` and
            `dense_regression`, for the model `dense_backbone`.
        column: of the labels; null = the one of the task's name. Of `multi_label`: of lists of words, or of 0 and 1; of
            `token_classification`: of lists of tags, one for each word of the text; of `segmentation`: paths of masks
            (or images of `datasets`), images with a class number at every pixel; of `dense_regression`: paths of `.npy`
            arrays, [height, width] or [channels, height, width], or of images of 8 or 16 bits. Both of the height and
            width of the row's image; an empty cell is an image without labels.
        columns: several columns of numbers (`regression`), or of 0 and 1 (`multi_label`).
        classes: the classes in order, or class -> the values that mean it (`{poor: [1, 2], good: [3, 4]}`); null = the
            sorted values of the training part. Of `segmentation`: the names of the class numbers 0, 1, ..., or null
            with `num_classes`.
        num_classes: of `segmentation`, where its classes have no names.
        ignore_index: of `segmentation`: the number of a pixel without a label; null = there is none.
        missing: of `dense_regression`: the number of a pixel without a label, such as 0; NaN always is one.
        unit: of a (dense) regression task's labels, for tables.
        standardize: of a (dense) regression task: labels get mean 0 and standard deviation 1 by the training part, and
            metrics are in the unit all the same; null = yes.
        class_weights: factors of the classes' losses, or of the positive labels' (`multi_label`). `balanced`: rows /
            (classes x rows of the class), of `segmentation` pixels; for `multi_label` negative / positive rows.
        metrics: what measures the task; null = what is usual for the type.
        files, hub, csv, inputs, split: of a task with rows of its own; see `OwnDataOptions`. `csv`, `inputs` and
            `split` are those of all tasks where they are null.
    """

    type: Kind
    column: str | None = None
    columns: tuple[str, ...] | None = None
    classes: tuple[Value, ...] | dict[str, tuple[Value, ...]] | None = None
    num_classes: int | None = None
    ignore_index: int | None = _IGNORED
    missing: float | None = None
    unit: str = ""
    standardize: bool | None = None
    class_weights: Literal["balanced"] | tuple[float, ...] | None = None
    metrics: tuple[str, ...] | None = None
    files: Patterns | dict[str, Patterns] | None = None
    hub: str | None = None
    csv: CsvOptions | None = None
    inputs: InputOptions | None = None
    split: SplitOptions | None = None

    def __post_init__(self) -> None:
        if self.column is not None and self.columns is not None:
            raise OptionError(f"column: {self.column!r} and columns {list(self.columns)} are both set, expected one")
        self._check_type("columns", "regression", "multi_label")
        self._check_type("unit", "regression", "dense_regression")
        self._check_type("standardize", "regression", "dense_regression")
        self._check_type("classes", "classification", "multi_label", "token_classification", "segmentation")
        self._check_type("class_weights", "classification", "multi_label", "token_classification", "segmentation")
        self._check_type("num_classes", "segmentation")
        self._check_type("ignore_index", "segmentation")
        self._check_type("missing", "dense_regression")
        check_repeats("columns", self.columns)
        check_repeats("metrics", self.metrics)
        listed = self.classes.values() if isinstance(self.classes, dict) else [self.classes or ()]
        check_repeats("classes", tuple(word_of(value) for values in listed for value in values))
        if self.type == "multi_label" and self.columns and self.classes:
            raise OptionError("classes: are for one column with lists of words; columns have their own names")
        if isinstance(self.class_weights, tuple) and not all(
            0 < weight < float("inf") for weight in self.class_weights
        ):
            raise OptionError(f"class_weights: {list(self.class_weights)} is not valid, expected numbers > 0")
        check_files(self.files, self.hub)
        if self.type == "segmentation":
            self._check_class_numbers()

    def _check_type(self, key: str, *types: str) -> None:
        value, default = getattr(self, key), getattr(type(self), key)
        if value is not None and value != default and self.type not in types:
            raise OptionError(f"{key}: says nothing for {self.type}, only for {', '.join(types)}")

    def _check_class_numbers(self) -> None:
        if isinstance(self.classes, dict):
            raise OptionError("classes: segmentation takes a list, the names of the class numbers 0, 1, ...")
        if (self.classes is None) is (self.num_classes is None):
            got = "none is set" if self.classes is None else "both are set"
            raise OptionError(f"num_classes: segmentation needs it, or the names of the classes, {got}")
        number = self.num_classes if self.classes is None else len(self.classes)
        assert number is not None
        if not 2 <= number <= _MOST_CLASSES:
            raise OptionError(f"num_classes: {number} is not valid, expected 2 to {_MOST_CLASSES}")
        if self.ignore_index == _IGNORED and number > _IGNORED:  # nobody has thought of it
            raise OptionError(f"ignore_index: {self.ignore_index} is one of the {number} classes; set another, or null")

    @property
    def class_words(self) -> dict[str, tuple[str, ...]] | None:
        """Class -> the words that mean it, where `classes` are given."""
        if isinstance(self.classes, dict):
            return {name: tuple(map(word_of, values)) for name, values in self.classes.items()}
        return None if self.classes is None else {name: (name,) for name in map(word_of, self.classes)}

    @property
    def has_rows(self) -> bool:
        """Whether it has files, or a set on the hub, of its own."""
        return self.files is not None or self.hub is not None

    def label_columns(self, name: str) -> tuple[str, ...]:
        """The columns of the labels of a task of this name."""
        return self.columns if self.columns is not None else (name if self.column is None else self.column,)


@dataclass(frozen=True)
class OwnDataOptions:
    """What a recipe's `data:` section may set. Exactly one of `files` and `hub`, or one of them in each task.

    Attributes:
        tasks: name -> `TaskOptions`, in the order of the loss vector.
        files: files of the parts, `{train: ..., validation: ..., test: ...}`, or of the training part alone. Paths and
            patterns (`reviews/*.csv`), one or a list, of `.csv`, `.tsv`, `.jsonl`, `.json` or `.parquet` files (text
            files may be packed: `.gz`, `.xz`, `.bz2`), or a folder that `datasets` saved.
        hub: `owner/name` or `owner/name:config`, with a split `train`, and those it has of `validation` and `test`.
        csv: how text files are read.
        inputs: what the model sees.
        split: what of the training rows becomes a part that is not given.
        tokenizer: of texts: a name on the hub, a folder or `package:<module>`; null = that of the model's `encoder`.
        max_length: of texts: tokens after which a row is cut.
        image_size: of images: height and width that the whole frame is resized to (bilinear with antialiasing); labels
            of pixels with it, each pixel that in which its centre lies.
        cache_dir: of images: where they, and labels of pixels, are kept decoded; null = `hf_bilb` in the folder of
            Hugging Face's caches.

    Raises:
        OptionError: settings that do not go together; names the option.
    """

    tasks: dict[str, TaskOptions]
    files: Patterns | dict[str, Patterns] | None = None
    hub: str | None = None
    csv: CsvOptions = field(default_factory=CsvOptions)
    inputs: InputOptions | None = None
    split: SplitOptions = field(default_factory=SplitOptions)
    tokenizer: str | None = None
    max_length: int = 128
    image_size: int = 224
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        check_at_least("max_length", self.max_length, 8)
        if not 8 <= self.image_size <= 1024:
            raise OptionError(f"image_size: {self.image_size} is not valid, expected 8 to 1024 pixels")
        self._check_tasks()
        self._check_rows()
        self._check_inputs()

    def _check_tasks(self) -> None:
        check_task_names(tuple(self.tasks), "tasks")
        for name, task in self.tasks.items():
            if "." in name:
                raise OptionError(f"tasks: {name!r} is not valid, expected a name without a full stop")
            if task.type in PIXEL_TYPES and name in RESERVED_COLUMNS:
                raise OptionError(f"tasks: {name!r} is the name of another column of a batch, expected another one")
            for metric in task.metrics or ():
                if metric not in METRICS[task.type]:
                    raise unknown_name(f"tasks.{name}.metrics", metric, METRICS[task.type])

    def _check_rows(self) -> None:
        own = [name for name, task in self.tasks.items() if task.has_rows]
        if not own:
            check_files(self.files, self.hub)
            if self.files is None and self.hub is None:
                raise OptionError("files: is required, or hub, the name of a set on the hub")
            for name, task in self.tasks.items():
                for key in ("csv", "inputs", "split"):
                    if getattr(task, key) is not None:
                        said = f"is for a task with files of its own, expected data.{key}"
                        raise OptionError(f"tasks.{name}.{key}: {said}")
            return
        if self.files is not None or self.hub is not None:
            key = "files" if self.files is not None else "hub"
            raise OptionError(f"{key}: is set, and the task {own[0]!r} has files of its own, expected one of the two")
        if without := [name for name in self.tasks if name not in own]:
            raise OptionError(f"tasks.{without[0]}.files: is required, since the task {own[0]!r} has files of its own")

    def _check_inputs(self) -> None:
        kinds = {}
        for name, task in self.tasks.items():
            where = f"tasks.{name}.inputs" if task.has_rows and task.inputs is not None else "inputs"
            inputs = self.inputs_of(name)
            kinds[inputs.kind] = name
            for column in task.label_columns(name):
                if column in inputs.columns:
                    raise OptionError(
                        f"{where}.{inputs.columns[column]}: the column {column!r} is the label of the task {name!r}"
                    )
            if task.type in PIXEL_TYPES and inputs.kind != "image":
                raise OptionError(f"{where}.image: the task {name!r} ({task.type}) needs a column of images")
            if task.type == "token_classification" and (inputs.kind != "text" or len(inputs.texts) != 1):
                raise OptionError(f"{where}.text: the task {name!r} needs one column of lists of words")
        if len(kinds) > 1:
            said = ", ".join(f"{kind} of {name!r}" for kind, name in kinds.items())
            raise OptionError(f"tasks: all need inputs of one kind, got {said}")
        if self.kind == "table" and len({self.inputs_of(name) for name in self.tasks}) > 1:
            raise OptionError("tasks: all need the same numeric and categorical columns; set data.inputs for all")

    def inputs_of(self, task: str) -> InputOptions:
        """The inputs of the task's rows."""
        inputs = self.tasks[task].inputs or self.inputs
        if inputs is None:
            raise OptionError("inputs: is required, expected one of text, image, and numeric / categorical")
        return inputs

    @property
    def kind(self) -> InputKind:
        """What the inputs are, those of all tasks."""
        return self.inputs_of(next(iter(self.tasks))).kind

    def sources(self) -> list[SourceOptions]:
        """The sets of rows: one that all tasks share, or one of each task."""
        if self.files is not None or self.hub is not None:
            first = next(iter(self.tasks))
            return [
                SourceOptions("data", self.files, self.hub, self.csv, self.inputs_of(first), self.split, self.tasks)
            ]
        return [
            SourceOptions(
                f"data.tasks.{name}",
                task.files,
                task.hub,
                task.csv or self.csv,
                self.inputs_of(name),
                task.split or self.split,
                {name: task},
            )
            for name, task in self.tasks.items()
        ]


@dataclass(frozen=True)
class SourceOptions:
    """A set of rows: where it is, and what is read from it.

    Attributes:
        path: of its options, for messages.
        files, hub, csv, inputs, split: see `OwnDataOptions`.
        tasks: those with labels in it.
    """

    path: str
    files: Patterns | dict[str, Patterns] | None
    hub: str | None
    csv: CsvOptions
    inputs: InputOptions
    split: SplitOptions
    tasks: Mapping[str, TaskOptions]


def check_files(files: Patterns | dict[str, Patterns] | None, hub: str | None) -> None:
    """Raise `OptionError` for both of `files` and `hub`, an unknown part, or no files for training."""
    if files is not None and hub is not None:
        raise OptionError(f"hub: {hub!r} and files are both set, expected one of them")
    if isinstance(files, dict):
        for part in files:
            if part not in PARTS:
                raise unknown_name("files", part, PARTS)
        if "train" not in files:
            raise OptionError("files.train: is required, expected the files of the training part")
