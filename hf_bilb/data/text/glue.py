"""GLUE: nine English text tasks for one encoder, as a mixture of any of them.

Wang, Singh, Michael, Hill, Levy, Bowman: GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language
Understanding, ICLR 2019, arXiv 1804.07461. Read from the original TSV files, or from the hub.

| task | text | label | metrics |
|---|---|---|---|
| cola | sentence | 0 unacceptable, 1 acceptable | Matthews |
| sst2 | sentence | 0 negative, 1 positive | accuracy |
| mrpc | two sentences | 1 equivalent | accuracy, F1 |
| stsb | two sentences | similarity, 0 to 5 | Pearson, Spearman |
| qqp | two questions | 1 duplicate | accuracy, F1 |
| mnli | premise, hypothesis | 0 entailment, 1 neutral, 2 contradiction | accuracy (matched) |
| qnli | question, sentence | 0 entailment, 1 not | accuracy |
| rte | two sentences | 0 entailment, 1 not | accuracy |
| wnli | two sentences | 0, 1 entailment | accuracy |

The labels of GLUE's test sets are hidden, so **its dev set is our test part**, and the validation part is held out of
the training rows. (The training rows of sst2 are phrases of the same sentences, and those of wnli come in pairs with
opposite labels: held-out rows of sst2 look easier, of wnli harder than new ones.) The scores of stsb stay as they are,
0 to 5: the model's output is a score, and its loss is in squared points, as in the usual fine-tuning scripts.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hf_bilb.config.options import check_one_of, unknown_name
from hf_bilb.data.checks import (
    check_at_least,
    check_folder,
    check_fraction,
    check_tasks,
    loading_from_hub,
    missing_column,
)
from hf_bilb.data.inputs.format import DataFormat
from hf_bilb.data.inputs.kinds import TextInputs
from hf_bilb.data.own.columns import words
from hf_bilb.data.own.csv_options import CsvOptions
from hf_bilb.data.own.files import Table, read_file
from hf_bilb.data.own.inputs import Inputs, text_inputs
from hf_bilb.data.own.joined import Joined
from hf_bilb.data.own.labels import TaskLabels, read_labels
from hf_bilb.data.own.options import InputOptions, SourceOptions, SplitOptions, TaskOptions, Value
from hf_bilb.data.own.source import Source
from hf_bilb.data.splits import PARTS, Split, hold_out
from hf_bilb.data.task_data import DataSetSpec, MetricInfo, TaskData
from hf_bilb.data.text.rows import TokenRows
from hf_bilb.errors import OptionError
from hf_bilb.losses.mixed import MixedLosses
from hf_bilb.losses.task_types import LABELS
from hf_bilb.metrics.base import Accumulator
from hf_bilb.metrics.classification import Accuracy, AccuracyAndF1, ConfusionMatrix, MatthewsCorrelation
from hf_bilb.metrics.correlation import PearsonSpearman
from hf_bilb.metrics.trainer_metrics import TaskMetrics

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

MAX_SCORE = 5.0


@dataclass(frozen=True)
class GlueTask:
    """A task of GLUE.

    Attributes:
        name: in recipes, in metric keys, and of its configuration on the hub.
        folder: of its TSV files.
        texts: the one or two text columns of the TSV files.
        label: the label column of the TSV files.
        classes: how the classes are written in the TSV files, in the hub's order; empty: the label is a score.
        metrics: what measures it.
        hub_texts: the text columns on the hub.
        columns: of TSV files without a header.
        dev: name of the TSV file with the dev set.
        hub_dev: name of the hub's split with the dev set.
        has_short_rows: the official training file has rows that are cut short; they are left out.
    """

    name: str
    folder: str
    texts: tuple[str, ...]
    label: str
    classes: tuple[str, ...]
    metrics: type[ConfusionMatrix] | type[PearsonSpearman]
    hub_texts: tuple[str, ...]
    columns: tuple[str, ...] | None = None
    dev: str = "dev"
    hub_dev: str = "validation"
    has_short_rows: bool = False

    def table_options(self, on_hub: bool) -> SourceOptions:
        """The columns, and what the values of the labels mean: on the hub the classes' numbers."""
        values: dict[str, tuple[Value, ...]] = {
            name: (number if on_hub else name,) for number, name in enumerate(self.classes)
        }
        column = "label" if on_hub else self.label
        labels = (
            TaskOptions("classification", column, classes=values)
            if self.classes
            else TaskOptions("regression", column, unit="points", standardize=False)
        )
        inputs = InputOptions(text=self.hub_texts if on_hub else self.texts)
        path = f"data, task {self.name}"
        return SourceOptions(path, None, None, CsvOptions(), inputs, SplitOptions(), {self.name: labels})

    def new_metrics(self) -> Accumulator:
        """A fresh accumulator of the task's metrics."""
        if issubclass(self.metrics, ConfusionMatrix):
            return self.metrics(num_classes=len(self.classes))
        return self.metrics()


_DIGITS = ("0", "1")
_ENTAILMENT = ("entailment", "not_entailment")
_SENTENCES = ("sentence1", "sentence2")

TASKS = {
    task.name: task
    for task in (
        GlueTask("cola", "CoLA", ("sentence",), "label", _DIGITS, MatthewsCorrelation, ("sentence",),
                 columns=("source", "label", "mark", "sentence")),
        GlueTask("sst2", "SST-2", ("sentence",), "label", _DIGITS, Accuracy, ("sentence",)),
        GlueTask("mrpc", "MRPC", ("#1 String", "#2 String"), "Quality", _DIGITS, AccuracyAndF1, _SENTENCES),
        GlueTask("stsb", "STS-B", _SENTENCES, "score", (), PearsonSpearman, _SENTENCES),
        GlueTask("rte", "RTE", _SENTENCES, "label", _ENTAILMENT, Accuracy, _SENTENCES),
        GlueTask("wnli", "WNLI", _SENTENCES, "label", _DIGITS, Accuracy, _SENTENCES),
        GlueTask("qnli", "QNLI", ("question", "sentence"), "label", _ENTAILMENT, Accuracy, ("question", "sentence")),
        GlueTask("qqp", "QQP", ("question1", "question2"), "is_duplicate", _DIGITS, AccuracyAndF1,
                 ("question1", "question2"), has_short_rows=True),
        GlueTask("mnli", "MNLI", _SENTENCES, "gold_label", ("entailment", "neutral", "contradiction"), Accuracy,
                 ("premise", "hypothesis"), dev="dev_matched", hub_dev="validation_matched"),
    )
}  # fmt: skip
METRIC_TITLES = {
    "accuracy": "accuracy",
    "f1": "F1",
    "matthews_correlation": "Matthews",
    "pearson": "Pearson",
    "spearman": "Spearman",
}
#: The mean over tasks of a task's mean metric; the benchmark's own score, times 1/100, when all nine are there.
MEAN_SCORE = "glue_score"
DEFAULT_TASKS = ("cola", "sst2", "mrpc", "stsb", "rte", "wnli")


@dataclass(frozen=True)
class GlueOptions:
    """What a recipe's `data:` section may set. Exactly one of `folder` and `hub` is set.

    Attributes:
        folder: with the TSV files: `CoLA/train.tsv`, `CoLA/dev.tsv`, `SST-2/...`; each may be packed (`train.tsv.xz`).
        hub: a name on the hub (`nyu-mll/glue`), or a folder laid out like it (`cola/train-*.parquet`).
        tasks: which tasks, in the order of the loss vector.
        tokenizer: a name on the hub, a folder or `package:<module>`; null = that of the model's `encoder`.
        max_length: tokens after which a row is cut.
        validation_fraction: the share of a task's training rows that is held out for validation.
        max_validation: at most so many rows of a task are held out; null = no limit.
        max_train: at most so many training rows of a task, one number for all tasks or a mapping task -> number; null
            = all. A smaller part is the beginning of a larger one, and the validation rows do not change with it.
        seed: of the choice of the validation rows; one task's rows do not depend on the other tasks.

    Raises:
        OptionError: both or none of `folder` and `hub`, an unknown task, a number out of range.
    """

    folder: str | None = None
    hub: str | None = None
    tasks: tuple[str, ...] = DEFAULT_TASKS
    tokenizer: str | None = None
    max_length: int = 128
    validation_fraction: float = 0.1
    max_validation: int | None = 1000
    max_train: int | dict[str, int] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_one_of("folder (with TSV files) and hub (a name)", folder=self.folder, hub=self.hub)
        check_tasks(self.tasks, TASKS)
        check_fraction("validation_fraction", self.validation_fraction)
        limits = self.max_train if isinstance(self.max_train, dict) else {"": self.max_train}
        for name, limit in limits.items():
            if name in TASKS and name not in self.tasks:
                raise OptionError(f"max_train.{name}: the task {name!r} is none of tasks ({', '.join(self.tasks)})")
            if name and name not in self.tasks:
                raise unknown_name("max_train", name, self.tasks)
            check_at_least(f"max_train.{name}" if name else "max_train", limit, 1)
        check_at_least("max_length", self.max_length, 8)
        check_at_least("max_validation", self.max_validation, 1)
        check_at_least("seed", self.seed, 0)

    def max_train_of(self, task: str) -> int | None:
        """The limit of one task."""
        return self.max_train.get(task) if isinstance(self.max_train, dict) else self.max_train


def load_glue(options: GlueOptions) -> TaskData:
    """The mixture, tokenized, in memory (about 5 bytes a token).

    Raises:
        OptionError: a folder, file or column that is missing, or a label that is none: names file, row and column.
        MissingPackageError: the tokenizer's package is not installed.

    Cost: about 20,000 rows a second on one core, at every start; the six default tasks hold 88,000.
    """
    joined = join_glue(options)
    inputs = text_inputs(joined, options.tokenizer, options.max_length)
    return _task_data(joined, inputs, [TASKS[name] for name in options.tasks])


def join_glue(options: GlueOptions) -> Joined:
    """The rows of the tasks, each of which is a source of its own, with their labels and parts.

    Raises:
        OptionError: see `load_glue`; too few training rows of a task to hold any out.
    """
    whole = {name: open_task(TASKS[name], options) for name in options.tasks}
    sources = tuple(_with_validation(TASKS[name], source, options) for name, source in whole.items())
    # Of the whole training file: a small part of it may lack a class.
    labels = {name: read_task_labels(TASKS[name], source) for name, source in whole.items()}
    rows = {part: tuple(getattr(source.split, part) for source in sources) for part in PARTS}
    return Joined(sources, labels, {name: number for number, name in enumerate(whole)}, rows)


def _with_validation(task: GlueTask, source: Source, options: GlueOptions) -> Source:
    train, validation = split_training_rows(task, len(source.split.train), options)
    return replace(source, split=Split(train, validation, source.split.test))


def split_training_rows(
    task: GlueTask, num_rows: int, options: GlueOptions
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row numbers of the training and of the validation part, each in shuffled order.

    Raises:
        OptionError: when too few rows are left for either.
    """
    train, validation = hold_out(
        num_rows,
        # A seed of each task's own: what is held out of one does not depend on which others there are.
        [options.seed, list(TASKS).index(task.name)],
        options.validation_fraction,
        options.max_validation,
        options.max_train_of(task.name),
        owner=f" of {task.name}",
    )
    return train, validation


def _task_data(joined: Joined, inputs: Inputs, tasks: Sequence[GlueTask]) -> TaskData:
    types = joined.types
    train, test = inputs.parts["train"], inputs.parts["test"]
    assert isinstance(train, TokenRows) and isinstance(test, TokenRows)
    texts = tuple(dict.fromkeys(task.hub_texts for task in tasks))
    return TaskData(
        train=train,
        validation=inputs.parts["validation"],
        test=test,
        task_names=tuple(types),
        label_names=(LABELS,),
        data_collator=inputs.collator,
        compute_metrics=_task_metrics(tasks),
        metrics=_metric_infos(tasks),
        trivial_metrics=constant_predictor(train, test, tasks),
        model_arguments={"tasks": types, **inputs.model_arguments},
        task_item_counts=MixedLosses(types).count,
        metrics_by_batch=True,
        trivial_predictor="constant predictor",
        processing_class=inputs.processing_class,
        format=DataFormat(TextInputs(texts, inputs.model_arguments["max_length"]), types),
    )


def _task_metrics(tasks: Sequence[GlueTask]) -> TaskMetrics:
    return TaskMetrics({task.name: task.new_metrics() for task in tasks}, [task.name for task in tasks], MEAN_SCORE)


def _metric_infos(tasks: Sequence[GlueTask]) -> tuple[MetricInfo, ...]:
    of_tasks = [
        MetricInfo(f"{task.name}_{key}", task.name, METRIC_TITLES[key], "", higher_is_better=True, ideal=1.0)
        for task in tasks
        for key in task.metrics.metric_names
    ]
    return (*of_tasks, MetricInfo(MEAN_SCORE, "", "mean score", "", higher_is_better=True, ideal=1.0))


def constant_predictor(train: TokenRows, test: TokenRows, tasks: Sequence[GlueTask]) -> dict[str, float]:
    """The metrics on `test` of the predictor that knows the training labels alone: it always answers the most frequent
    class, or the mean score. Its correlations are 0."""
    from transformers import EvalPrediction

    predictions = []
    for task, column in zip(tasks, train.labels.T, strict=True):
        labels = column[~np.isnan(column)]
        answer = np.full(1, labels.mean(), np.float32)
        if task.classes:
            answer = np.eye(len(task.classes), dtype=np.float32)[np.bincount(labels.astype(np.int64)).argmax()]
        predictions.append(np.tile(answer, (len(test), 1)))
    return _task_metrics(tasks)(EvalPrediction(predictions=tuple(predictions), label_ids=test.labels))


# --- the rows of a task -------------------------------------------------------------------------------------------


def open_task(task: GlueTask, options: GlueOptions) -> Source:
    """The training rows and the dev rows of a task, none of them held out for validation.

    Raises:
        OptionError: see `load_glue`.
    """
    if options.folder is not None:
        folder = task_folder(Path(options.folder), task)
        tables = tuple(read_tsv(find_tsv(folder, part, task), task) for part in ("train", task.dev))
    else:
        assert options.hub is not None  # GlueOptions asks for one of the two
        tables = tuple(read_hub(options.hub, split, task) for split in ("train", task.hub_dev))
    columns = task.table_options(on_hub=options.folder is None)
    for table in tables:
        for name in (*columns.inputs.texts, *columns.tasks[task.name].label_columns(task.name)):
            if name not in table.rows.column_names:
                raise missing_column(table.name, f"{name!r} for task {task.name}", table.rows.column_names)
    count, total = len(tables[0].rows), sum(len(table.rows) for table in tables)
    nothing = np.empty(0, np.int64)
    return Source(columns, tables, Split(np.arange(count), nothing, np.arange(count, total)))


def read_task_labels(task: GlueTask, source: Source) -> TaskLabels:
    """The labels of all rows: classes, or scores.

    Raises:
        OptionError: a row that is cut short, has no label or one that is none; names file, row and column.
    """
    source.check_whole()
    options = source.options.tasks[task.name]
    (column,) = options.label_columns(task.name)
    labels = read_labels(source, task.name, options)
    source.check_filled(column, ~labels.has_label, f"a label of {task.name}")
    wrong = np.flatnonzero((labels.values < 0) | (labels.values > MAX_SCORE)) if not task.classes else np.empty(0)
    if wrong.size:
        place, score = source.place(int(wrong[0])), labels.values[wrong[0], 0]
        raise OptionError(f"data: {place}: column {column!r} is {score:g}, expected a score from 0 to {MAX_SCORE:g}")
    return labels


def task_folder(folder: Path, task: GlueTask) -> Path:
    """The task's folder; raises `OptionError` when it, or the whole folder, is not there."""
    check_folder(folder, f"GLUE's {task.folder}/train.tsv and so on")
    if not (folder / task.folder).is_dir():
        held = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir())) or "no folder"
        raise OptionError(
            f"data.folder: {str(folder)!r} has no folder {task.folder} for task {task.name} (it has {held})"
        )
    return folder / task.folder


def find_tsv(folder: Path, part: str, task: GlueTask) -> Path:
    """`<part>.tsv`, or packed `<part>.tsv.xz`; raises `OptionError` when neither is there."""
    for name in (f"{part}.tsv", f"{part}.tsv.xz"):
        if (folder / name).is_file():
            return folder / name
    raise OptionError(f"data.folder: {str(folder)!r} has neither {part}.tsv nor {part}.tsv.xz for task {task.name}")


def read_tsv(file: Path, task: GlueTask) -> Table:
    """Read a TSV file as GLUE writes it: tabs part columns, quotes mean nothing, UTF-8 with or without a mark in front.

    Raises:
        OptionError: see `read_file`.
    """
    table = read_file(file, "train", CsvOptions(columns=task.columns))
    if not task.has_short_rows:
        return table
    last = words(table, table.rows.column_names[-1])
    if short := int((last.codes < 0).sum()):
        logger.warning("%s: %d rows of %s are cut short and left out", file, short, task.name)
    return replace(table, rows=table.rows.select(np.flatnonzero(last.codes >= 0)))


# --- the hub ------------------------------------------------------------------------------------------------------


def read_hub(name: str, split: str, task: GlueTask) -> Table:
    """Read a split from the hub, or from a folder in the hub's layout (`<task>/<split>-*.parquet`), by `datasets`.

    Raises:
        OptionError: there is none.
    """
    import datasets

    rows = _load_split(name, split, task)
    if isinstance(rows.features.get("label"), datasets.ClassLabel):  # whose names are not those of the TSV files
        rows = rows.cast_column("label", datasets.Value("int64"))
    return Table(f"{name}, {split} (task {task.name})", rows, Path())


def _load_split(name: str, split: str, task: GlueTask) -> datasets.Dataset:
    import datasets

    with loading_from_hub(name, f"data.hub: {name!r} gives no {task.name}"):
        if not Path(name).is_dir():
            return datasets.load_dataset(name, task.name, split=split)
        # A folder may lack the README that tells `datasets` which folder is which configuration.
        files = sorted(str(file) for file in (Path(name) / task.name).glob(f"{split}-*.parquet"))
        if not files:
            raise OptionError(f"data.hub: {name!r} has no {task.name}/{split}-*.parquet")
        return datasets.load_dataset("parquet", data_files={split: files}, split=split)


SPEC = DataSetSpec(options=GlueOptions, load=load_glue, from_model={"tokenizer": "encoder"})
