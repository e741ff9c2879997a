"""Tables of people: text files whose columns become numbers, one-hot codes and binary labels.

What the data sets of this kind share. Numbers are standardised, and categories known, by the training rows alone; a
category that is only in other rows is all zeros there. A row's codes become its one-hot columns when it is
asked for: hundreds of columns would take hundreds of megabytes, and their codes take a few.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from lzma import LZMAError
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_bilb.config.options import nearest
from hf_bilb.data.checks import check_at_least, check_fraction, check_tasks
from hf_bilb.data.rows import BatchedRows, collate_vectors
from hf_bilb.data.splits import Split, held_out_count, split_rows
from hf_bilb.data.task_data import MetricInfo, Standardizer, TaskData, binary_losses
from hf_bilb.errors import OptionError
from hf_bilb.metrics.base import Accumulator
from hf_bilb.metrics.normalized_entropy import NormalizedEntropy
from hf_bilb.metrics.roc_auc import BinaryClassification

if TYPE_CHECKING:
    import pandas as pd
    from transformers import EvalPrediction

Floats = NDArray[np.float64]
#: The mean over the tasks of their areas under the ROC curve.
MEAN_ROC_AUC = "mean_roc_auc"


@dataclass(frozen=True)
class BinaryTask:
    """A task: its name, the column that it is read from, and which values are class 1 and class 0."""

    name: str
    column: str
    positive: frozenset[str]
    negative: frozenset[str]


@dataclass(frozen=True)
class Layout:
    """The columns of a table.

    Attributes:
        columns: of the file, in order.
        numbers: those that are quantities.
        left_out: those that are no features; the tasks' own are none either, whichever tasks are chosen, so that a
            model of one task sees what a model of all sees.
        tasks: every task there is.
    """

    columns: tuple[str, ...]
    numbers: tuple[str, ...]
    left_out: tuple[str, ...]
    tasks: tuple[BinaryTask, ...]

    @property
    def categories(self) -> tuple[str, ...]:
        """The columns whose values are words, or numbers that stand for words."""
        no_features = {*self.numbers, *self.left_out, *(task.column for task in self.tasks)}
        return tuple(name for name in self.columns if name not in no_features)

    def chosen(self, names: Sequence[str] | None) -> tuple[BinaryTask, ...]:
        """The tasks of these names, in this order; None: all."""
        known = {task.name: task for task in self.tasks}
        return tuple(known[name] for name in (known if names is None else names))


def check_fractions(validation: float, test: float) -> None:
    """Raise `OptionError` unless both are shares and leave something for training."""
    check_fraction("validation_fraction", validation)
    check_fraction("test_fraction", test)
    if validation + test >= 1:
        raise OptionError(
            f"validation_fraction: {validation} and test_fraction {test} leave no training rows, expected less than 1 "
            "together"
        )


@dataclass(frozen=True)
class TableOptions:
    """What a recipe's `data:` section may set of a table that is one file and is split at random.

    Attributes:
        file: where the table is; in which form, the data set says.
        tasks: which, in the order of the loss vector; null = all. The features do not depend on it.
        test_fraction, validation_fraction: shares of the rows.
        seed: of the shuffling before the split.
        known_tasks: every task that the data set has; no option.

    Raises:
        OptionError: an unknown task, shares that leave nothing, a seed below 0.
    """

    file: str
    tasks: tuple[str, ...] | None = None
    test_fraction: float = 0.2
    validation_fraction: float = 0.1
    seed: int = 0

    known_tasks: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        check_tasks(self.tasks, self.known_tasks)
        check_fractions(self.validation_fraction, self.test_fraction)
        check_at_least("seed", self.seed, 0)

    def split(self, num_rows: int) -> Split:
        """The rows of each part, one at least; raises `OptionError` where they are too few."""
        counts = [held_out_count(num_rows, share) for share in (self.validation_fraction, self.test_fraction)]
        if sum(counts) >= num_rows:
            raise OptionError(f"data: {self.file} has {num_rows} rows, too few to split")
        return split_rows(num_rows, self.seed, None, *counts)


# --- files --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """A file's rows: `numbers [N, D]`, `words [N, C]` (as they stand there), `labels [N, K]` of 0 and 1."""

    numbers: Floats
    words: NDArray[np.object_]
    labels: Floats

    def followed_by(self, other: Rows) -> Rows:
        """These rows, then the other ones."""
        return Rows(
            np.concatenate([self.numbers, other.numbers]),
            np.concatenate([self.words, other.words]),
            np.concatenate([self.labels, other.labels]),
        )


def find_file(folder: str, names: Sequence[str]) -> Path:
    """The first of the files that is there, as it is or packed (`.xz`, `.gz`).

    Raises:
        OptionError: the folder or the file is missing.
    """
    path = Path(folder)
    if not path.is_dir():
        raise OptionError(f"data.folder: there is no folder {folder!r}")
    for name in (name + packed for name in names for packed in ("", ".xz", ".gz")):
        if (path / name).is_file():
            return path / name
    raise OptionError(f"data.folder: {folder!r} has no file {' or '.join(names)} (as it is, .xz or .gz)")


def read_rows(path: Path, layout: Layout, tasks: Sequence[BinaryTask]) -> Rows:
    """Read a file of comma-separated values, with the columns' names in the first line or without.

    Raises:
        OptionError: the file or a column is missing, a row is cut short, a number is none, or a label is no class:
            one line with file, row (the first one is 1) and column or task.
    """
    table = _read_table(path, layout.columns)
    if not len(table):
        raise OptionError(f"data: {path} has no rows")
    numbers = [_numbers(path, table[name], name) for name in layout.numbers]
    words = [table[name].to_numpy(dtype=object) for name in layout.categories]
    labels = [_labels(path, table[task.column], task) for task in tasks]
    return Rows(np.stack(numbers, axis=1), np.stack(words, axis=1), np.stack(labels, axis=1))


def _read_table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    import pandas as pd

    try:
        # The first line alone tells about the header; UCI's adult.test begins with a remark instead.
        first = pd.read_csv(path, header=None, nrows=1, dtype=str, skipinitialspace=True, sep=",")
        names = [str(name).strip() for name in first.iloc[0]]
        remark = names[0].startswith("|")
        header = not remark and columns[0] in names
        table = pd.read_csv(
            path,
            header=0 if header else None,
            names=None if header else list(columns),
            skiprows=int(remark),
            dtype=str,
            keep_default_na=False,
            skipinitialspace=True,
            index_col=False,
        )
    except FileNotFoundError:
        raise OptionError(f"data: there is no file {str(path)!r}") from None
    except (OSError, EOFError, LZMAError, UnicodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise OptionError(f"data: {path} cannot be read: {' '.join(str(error).split())}") from None
    table.columns = [str(name).strip() for name in table.columns]
    for name in columns:
        if name not in table.columns:
            raise OptionError(f"data: {path} has no column {name!r}{nearest(name, table.columns)}")
    # An empty field in the middle is a category (hisp_origin in the census data); pandas fills short rows up with them.
    cut = np.flatnonzero(table.iloc[:, -1].fillna("") == "")
    if cut.size:
        raise OptionError(f"data: {path}, row {cut[0] + 1}: is cut short, its last column is empty")
    return table.fillna("")


def _numbers(path: Path, column: pd.Series[str], name: str) -> Floats:
    import pandas as pd

    values = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64)
    wrong = np.flatnonzero(~np.isfinite(values))
    if wrong.size:
        got = column.iloc[wrong[0]]
        raise OptionError(f"data: {path}, row {wrong[0] + 1}: column {name!r} is {got!r}, expected a number")
    return values


def _labels(path: Path, column: pd.Series[str], task: BinaryTask) -> Floats:
    stripped = column.str.strip()
    positive = stripped.isin(task.positive).to_numpy()
    wrong = np.flatnonzero(~(positive | stripped.isin(task.negative).to_numpy()))
    if wrong.size:
        expected = ", ".join(map(repr, sorted(task.positive) + sorted(task.negative)))
        raise OptionError(
            f"data: {path}, row {wrong[0] + 1}: task {task.name!r}: {column.name} {stripped.iloc[wrong[0]]!r} is no "
            f"label, expected one of {expected}"
        )
    return positive.astype(np.float64)


# --- features -----------------------------------------------------------------------------------------------------


class OneHotRows(BatchedRows):
    """Rows in memory: `features [F]` of numbers and one-hot categories, and `labels [K]`.

    Use `collate_vectors` with it.

    Args:
        numbers: `[N, D]`.
        codes: `[N, C]`, the category of each of C columns; -1 where it is none of them.
        sizes: categories of each column; F = D + their sum.
        labels: `[N, K]`.
    """

    def __init__(self, numbers: Tensor, codes: Tensor, sizes: Sequence[int], labels: Tensor) -> None:
        self.numbers, self.codes, self.labels = numbers, codes, labels
        self.num_categories = sum(sizes)
        self._starts = torch.tensor([0, *np.cumsum(sizes)[:-1]], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.numbers)

    def _batch(self, places: Sequence[int] | NDArray[np.int64]) -> dict[str, Tensor]:
        rows = torch.as_tensor(places)
        numbers, codes = self.numbers[rows], self.codes[rows].long()
        # One column more than there are, for the codes that are none.
        columns = torch.where(codes < 0, self.num_categories, codes + self._starts)
        one_hot = numbers.new_zeros(*numbers.shape[:-1], self.num_categories + 1).scatter_(-1, columns, 1.0)
        return {"features": torch.cat([numbers, one_hot[..., :-1]], dim=-1), "labels": self.labels[rows]}


def _codes(words: NDArray[np.object_], train: NDArray[np.int64]) -> tuple[NDArray[np.int16], list[list[str]]]:
    """`[N, C]`, positions among the categories of the training rows (-1: none of them), and those of each column."""
    import pandas as pd

    codes, known = [], []
    for column in words.T:
        values = pd.Series(column).str.strip()
        categories = sorted(set(values.iloc[train]))
        codes.append(pd.Index(categories).get_indexer(values).astype(np.int16))
        known.append(categories)
    return np.stack(codes, axis=1), known


def binary_task_data(rows: Rows, split: Split, layout: Layout, tasks: Sequence[BinaryTask]) -> TaskData:
    """Everything the Trainer needs: features encoded by the training rows, metrics and losses of the binary tasks."""
    of_numbers = Standardizer.fit(rows.numbers[split.train])
    codes, known = _codes(rows.words, split.train)

    def part(chosen: NDArray[np.int64]) -> OneHotRows:
        numbers = torch.from_numpy(of_numbers.standardize(rows.numbers[chosen])).float()
        labels = torch.from_numpy(rows.labels[chosen]).float()
        return OneHotRows(numbers, torch.from_numpy(codes[chosen]), sizes, labels)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        return binary_metrics(prediction.predictions, prediction.label_ids, names)

    names = tuple(task.name for task in tasks)
    sizes = [len(categories) for categories in known]
    of_categories = [
        f"{column}={value}" for column, values in zip(layout.categories, known, strict=True) for value in values
    ]
    return TaskData(
        train=part(split.train),
        validation=part(split.validation),
        test=part(split.test),
        task_names=names,
        label_names=("labels",),
        data_collator=collate_vectors,
        compute_metrics=compute_metrics,
        metrics=binary_metric_infos(names),
        trivial_metrics=_share_predictor(rows.labels[split.train], rows.labels[split.test], names),
        model_arguments={
            "num_features": rows.numbers.shape[1] + sum(sizes),
            "task_names": list(names),
            "feature_names": [*layout.numbers, *of_categories],
            "feature_means": of_numbers.means.tolist(),
            "feature_stds": of_numbers.stds.tolist(),
        },
        trivial_predictor="training share",
        task_loss_func=binary_losses,
    )


# --- losses and metrics -------------------------------------------------------------------------------------------


def binary_metric_infos(names: Sequence[str]) -> tuple[MetricInfo, ...]:
    """What `binary_metrics` returns: three figures for each task, then the mean area."""
    infos = [
        info
        for name in names
        for info in (
            MetricInfo(f"{name}_roc_auc", name, "AUROC", "", higher_is_better=True, ideal=1.0),
            MetricInfo(f"{name}_accuracy", name, "accuracy", "", higher_is_better=True, ideal=1.0),
            MetricInfo(f"{name}_normalized_entropy", name, "NE", "", higher_is_better=False),
        )
    ]
    return (*infos, MetricInfo(MEAN_ROC_AUC, "", "mean AUROC", "", higher_is_better=True, ideal=1.0))


def binary_metrics(logits: NDArray[Any], labels: NDArray[Any], names: Sequence[str]) -> dict[str, float]:
    """Area under the ROC curve, accuracy and normalised entropy of each task; what is not defined is left out.

    Args:
        logits, labels: `[N, K]`; labels NaN where missing.
        names: of the K tasks.
    """
    found: dict[str, float] = {}
    areas = []
    for column, name in enumerate(names):
        accumulators: list[Accumulator] = [BinaryClassification(("roc_auc", "accuracy")), NormalizedEntropy()]
        for accumulator in accumulators:
            accumulator.update(torch.as_tensor(logits[:, column]), torch.as_tensor(labels[:, column]))
            found |= {f"{name}_{metric}": value for metric, value in accumulator.compute().items()}
        areas += [found[key] for key in (f"{name}_roc_auc",) if key in found]
    return {**found, **({MEAN_ROC_AUC: sum(areas) / len(areas)} if areas else {})}


def _share_predictor(train: Floats, test: Floats, names: Sequence[str]) -> dict[str, float]:
    """The metrics on `test [N, K]` of always predicting the share of positive labels in `train [M, K]`."""
    shares = train.mean(axis=0)
    with np.errstate(divide="ignore"):  # a task with one class in the training rows: an infinite logit
        logits = np.log(shares) - np.log1p(-shares)
    return binary_metrics(np.broadcast_to(logits, test.shape).copy(), test, names)
