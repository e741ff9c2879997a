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
import lzma
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from hf_bilb.data.splits import PARTS, hold_out
from hf_bilb.data.task_data import DataSetSpec, MetricInfo, TaskData
from hf_bilb.data.text.rows import PadTokens, TokenRows
from hf_bilb.data.text.tokenization import check_max_length, load_tokenizer, tokenize
from hf_bilb.errors import OptionError
from hf_bilb.losses.mixed import MixedLosses
from hf_bilb.losses.task_types import LABELS, TaskType
from hf_bilb.metrics.base import Accumulator
from hf_bilb.metrics.classification import Accuracy, AccuracyAndF1, ConfusionMatrix, MatthewsCorrelation
from hf_bilb.metrics.correlation import PearsonSpearman
from hf_bilb.metrics.trainer_metrics import TaskMetrics

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

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

    @property
    def task_type(self) -> TaskType:
        """What the model predicts."""
        if self.classes:
            return TaskType("classification", len(self.classes), self.classes)
        return TaskType("regression", unit="points")

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
        OptionError: a folder, file or column that is missing, or a label that is none: names file, task and row.
        MissingPackageError: the tokenizer's package is not installed.

    Cost: about 20,000 rows a second on one core, at every start; the six default tasks hold 88,000.
    """
    if options.tokenizer is None:
        raise OptionError("data.tokenizer: is required where no model says it, expected a name, such as "
                          "google-bert/bert-base-uncased")  # fmt: skip
    rows = {name: read_task(TASKS[name], options) for name in options.tasks}
    tokenizer = load_tokenizer(options.tokenizer, "data.tokenizer")
    check_max_length(tokenizer, options.max_length, options.tokenizer)
    parts: dict[str, list[TokenRows]] = {part: [] for part in PARTS}
    for task_id, name in enumerate(options.tasks):
        for part, labelled in parts_of(TASKS[name], *rows[name], options).items():
            tokens = tokenize(
                tokenizer, labelled.texts, labelled.labels, task_id, len(options.tasks), options.max_length
            )
            parts[part].append(tokens)
    joined = {part: TokenRows.concatenate(tokens) for part, tokens in parts.items()}
    return task_data(joined, [TASKS[name] for name in options.tasks], tokenizer, options.max_length)


def parts_of(
    task: GlueTask, train: LabelledTexts, test: LabelledTexts, options: GlueOptions
) -> dict[str, LabelledTexts]:
    """The three parts of a task from what `read_task` gives; raises as `split_training_rows`."""
    trained, held_out = split_training_rows(task, len(train), options)
    return {"train": train.take(trained), "validation": train.take(held_out), "test": test}


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


def task_data(
    parts: Mapping[str, TokenRows], tasks: Sequence[GlueTask], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> TaskData:
    """Everything the Trainer needs, from tokenized parts `train`, `validation` and `test`."""
    pad_token_id = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id  # the attention mask hides it
    types = {task.name: task.task_type for task in tasks}
    return TaskData(
        train=parts["train"],
        validation=parts["validation"],
        test=parts["test"],
        task_names=tuple(types),
        label_names=(LABELS,),
        data_collator=PadTokens(pad_token_id),
        compute_metrics=_task_metrics(tasks),
        metrics=_metric_infos(tasks),
        trivial_metrics=constant_predictor(parts["train"], parts["test"], tasks),
        model_arguments={
            "tasks": types,
            "vocab_size": len(tokenizer),
            "max_length": max_length,
        },
        task_item_counts=MixedLosses(types).count,
        metrics_by_batch=True,
        trivial_predictor="constant predictor",
        processing_class=tokenizer,
        format=DataFormat(TextInputs(tuple(dict.fromkeys(task.hub_texts for task in tasks)), max_length), types),
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


# --- rows with text and label -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelledTexts:
    """Rows of one task: `texts` one or two lists of N texts, `labels [N]` class index or score."""

    texts: tuple[list[str], ...]
    labels: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: NDArray[np.int64]) -> LabelledTexts:
        """The rows of these numbers, in their order."""
        return LabelledTexts(tuple([column[row] for row in rows] for column in self.texts), self.labels[rows])


def read_task(task: GlueTask, options: GlueOptions) -> tuple[LabelledTexts, LabelledTexts]:
    """The training rows and the dev rows of a task.

    Raises:
        OptionError: see `load_glue`.
    """
    if options.folder is not None:
        folder = task_folder(Path(options.folder), task)
        return read_tsv(find_tsv(folder, "train", task), task), read_tsv(find_tsv(folder, task.dev, task), task)
    assert options.hub is not None  # GlueOptions asks for one of the two
    return read_hub(options.hub, "train", task), read_hub(options.hub, task.hub_dev, task)


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


def read_tsv(file: Path, task: GlueTask) -> LabelledTexts:
    """Read a TSV file as GLUE writes it: tabs part columns, quotes mean nothing, UTF-8 with or without a mark in front.

    Raises:
        OptionError: names the file, the task, and the row (the file's line, from 1) or the column.
    """
    lines = _numbered_cells(file, task)
    columns = task.columns or tuple(next(lines, (1, []))[1])
    for name in (*task.texts, task.label):
        if name not in columns:
            raise missing_column(str(file), f"{name!r} for task {task.name}", columns)
    positions = [columns.index(name) for name in task.texts]
    label_position = columns.index(task.label)
    texts: tuple[list[str], ...] = tuple([] for _ in positions)
    labels: list[float] = []
    short = 0
    for row, cells in lines:
        if task.has_short_rows and len(cells) < len(columns):
            short += 1
            continue
        if len(cells) != len(columns):
            raise OptionError(f"{file}, row {row}: {len(cells)} columns, expected {len(columns)} (task {task.name})")
        labels.append(_label(cells[label_position], task, file, row))
        for column, position in zip(texts, positions, strict=True):
            column.append(cells[position])
    if short:
        logger.warning("%s: %d rows of %s are cut short and left out", file, short, task.name)
    if not labels:
        raise OptionError(f"{file}: has no rows (task {task.name})")
    return LabelledTexts(texts, np.array(labels, np.float32))


def _numbered_cells(file: Path, task: GlueTask) -> Iterator[tuple[int, list[str]]]:
    """Line number from 1 and cells of each line that is not empty."""
    open_text = lzma.open if file.suffix == ".xz" else open
    try:
        # Not by the csv module: a carriage return inside a text is no end of a row.
        with open_text(file, "rt", encoding="utf-8-sig", newline="\n") as stream:
            for number, line in enumerate(stream, 1):
                if text := line.rstrip("\r\n"):
                    yield number, text.split("\t")
    except (OSError, EOFError, UnicodeError, lzma.LZMAError) as error:
        raise OptionError(f"{file}: cannot be read: {error} (task {task.name})") from None


def _label(text: str, task: GlueTask, file: Path, row: int) -> float:
    if task.classes:
        if text in task.classes:
            return float(task.classes.index(text))
        expected = ", ".join(task.classes)
        raise OptionError(f"{file}, row {row}: {text!r} is no label of {task.name}, expected one of {expected}")
    try:
        score = float(text)
    except ValueError:
        score = np.nan
    if not 0 <= score <= MAX_SCORE:
        raise OptionError(f"{file}, row {row}: {text!r} is no score of {task.name}, expected 0 to {MAX_SCORE:g}")
    return score


# --- the hub ------------------------------------------------------------------------------------------------------


def read_hub(name: str, split: str, task: GlueTask) -> LabelledTexts:
    """Read a split from the hub, or from a folder in the hub's layout (`<task>/<split>-*.parquet`), by `datasets`.

    Raises:
        OptionError: names the set, the task, and the row (from 0) or the column.
    """
    where = f"{name}, {split} (task {task.name})"
    rows = _load_split(name, split, task)
    for column in (*task.hub_texts, "label"):
        if column not in rows.column_names:
            raise missing_column(where, repr(column), rows.column_names)
    table = rows.with_format("numpy", columns=["label"])
    labels = np.asarray(table["label"][:] if len(table) else [])
    try:
        labels = labels.astype(np.float32)
    except (TypeError, ValueError):
        raise OptionError(f"{where}: the column 'label' holds no numbers") from None
    wrong = np.flatnonzero(~_are_labels(labels, task))
    if len(wrong):
        expected = f"0 to {len(task.classes) - 1}" if task.classes else f"a score from 0 to {MAX_SCORE:g}"
        raise OptionError(f"{where}, row {wrong[0]}: the label is {labels[wrong[0]]:g}, expected {expected}")
    return LabelledTexts(tuple(list(rows[column]) for column in task.hub_texts), labels)


def _are_labels(labels: NDArray[np.float32], task: GlueTask) -> NDArray[np.bool_]:
    if task.classes:
        return np.isin(labels, np.arange(len(task.classes)))
    return (labels >= 0) & (labels <= MAX_SCORE)


def _load_split(name: str, split: str, task: GlueTask) -> datasets.Dataset:
    import datasets

    with loading_from_hub(f"data.hub: {name!r} gives no {task.name}"):
        if not Path(name).is_dir():
            return datasets.load_dataset(name, task.name, split=split)
        # A folder may lack the README that tells `datasets` which folder is which configuration.
        files = sorted(str(file) for file in (Path(name) / task.name).glob(f"{split}-*.parquet"))
        if not files:
            raise OptionError(f"data.hub: {name!r} has no {task.name}/{split}-*.parquet")
        return datasets.load_dataset("parquet", data_files={split: files}, split=split)


SPEC = DataSetSpec(options=GlueOptions, load=load_glue, from_model={"tokenizer": "encoder"})
