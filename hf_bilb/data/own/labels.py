"""The labels of a task, from its columns, and what the task is: classes, means, weights."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_bilb.config.options import nearest, shown
from hf_bilb.config.yaml import flow
from hf_bilb.data.own import columns
from hf_bilb.data.own.columns import Lists, Words
from hf_bilb.data.own.images import FoundFiles, find_labels
from hf_bilb.data.own.options import TaskOptions
from hf_bilb.data.own.pixels import (
    Frames,
    LabelKind,
    Masks,
    Numbers,
    PixelLabels,
    decode_label,
    means_and_stds,
    prepare_labels,
)
from hf_bilb.data.own.source import Source
from hf_bilb.data.own.words import PERHAPS_MISSING, in_order, other_spelling
from hf_bilb.data.task_data import Standardizer
from hf_bilb.errors import OptionError
from hf_bilb.losses.class_weights import balanced_class_weights, balanced_weights_of_counts
from hf_bilb.losses.masked import MISSING_INTEGER
from hf_bilb.losses.task_types import TaskType
from hf_bilb.metrics.by_type import fitting_metrics

logger = logging.getLogger(__name__)

Floats = NDArray[np.float64]
_LISTED = 12  # classes that a message lists


@dataclass(frozen=True)
class Tags:
    """Labels of the words of N rows.

    Attributes:
        lengths: `[N]`, words of a row; -1: the row has no labels.
        codes: `[sum of lengths]`, classes of the words, one row after the other; -100 where missing.
    """

    lengths: NDArray[np.int64]
    codes: NDArray[np.int64]

    @property
    def starts(self) -> NDArray[np.int64]:
        """`[N + 1]`, where each row's words begin in `codes`."""
        return np.concatenate([[0], np.cumsum(np.maximum(self.lengths, 0))])

    def counts(self, rows: NDArray[np.int64], size: int) -> list[int]:
        """Of each of `size` classes, how many words of these rows have it."""
        chosen = np.repeat(np.isin(np.arange(len(self.lengths)), rows), np.maximum(self.lengths, 0))
        codes = self.codes[chosen]
        found: list[int] = np.bincount(codes[codes >= 0], minlength=size).tolist()
        return found

    def per_row(self) -> NDArray[np.int64]:
        """`[N]`, how many words of a row have a class."""
        labelled = np.concatenate([[0], np.cumsum(self.codes >= 0)])
        return np.diff(labelled[self.starts])


@dataclass(frozen=True)
class TaskLabels:
    """The labels of a task in all rows of its source.

    Attributes:
        type: what the task is.
        values: `[N, W]`, as in a batch, NaN where missing; of a task of tokens or pixels `[N, 0]`.
        tags: of a token task.
        has_label: `[N]`, whether a row has any.
        pixels: of a task of pixels, before they are standardised.
    """

    type: TaskType
    values: Floats
    tags: Tags | None
    has_label: NDArray[np.bool_]
    pixels: PixelLabels | None = None


def read_labels(source: Source, name: str, options: TaskOptions, frames: Frames | None = None) -> TaskLabels:
    """The labels of the task `name`.

    Args:
        source: with the columns.
        name, options: of the task.
        frames: the rows' images; None: the inputs are none, and no task is of pixels.

    Raises:
        OptionError: a value that is no label of its type, no label at all in the training part, one class alone, a
            class that the training part lacks, or a metric that does not fit the classes; names file, row and column.
    """
    labels: TaskLabels = getattr(_Reader(source, name, options, frames), options.type)()
    fitting = fitting_metrics(labels.type)
    for metric in options.metrics or ():
        if metric not in fitting:
            raise OptionError(
                f"data.tasks.{name}.metrics: {metric!r} does not fit {options.type} with {labels.type.size} "
                f"classes; these do: {', '.join(fitting)}"
            )
    return labels


def rows_of(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """`[sum of lengths]`: the row of each value of lists, whose lengths are -1 where there is none."""
    return np.repeat(np.arange(len(lengths)), np.maximum(lengths, 0))


def multi_hot(lengths: NDArray[np.int64], codes: NDArray[np.int64], size: int) -> Floats:
    """`[N, M]`: 1 for the classes in a row's list (`codes [sum of lengths]`, -1: none), NaN where there is no list."""
    values = np.zeros((len(lengths), size))
    values[rows_of(lengths)[codes >= 0], codes[codes >= 0]] = 1.0
    values[lengths < 0] = np.nan
    return values


def unknown_class(place: str, column: str, word: str, why: str, classes: Sequence[str]) -> OptionError:
    """The error for a word that is none of the classes."""
    hint = nearest(word, classes) or f" (classes: {', '.join(classes[:_LISTED])})"
    return OptionError(f"{place}: column {column!r} is {shown(word)}, which {why}{hint}")


class _Reader:
    """A method for each type of task."""

    def __init__(self, source: Source, name: str, options: TaskOptions, frames: Frames | None) -> None:
        self.source = source
        self.frames = frames
        self.name = name
        self.options = options
        self.columns = options.label_columns(name)
        self.path = f"data.tasks.{name}"
        self.train = source.split.train

    # --- the types ------------------------------------------------------------------------------------------------

    def regression(self) -> TaskLabels:
        values = np.stack([self.source.numbers(column) for column in self.columns], axis=1)
        for column, of_column in zip(self.columns, values.T, strict=True):
            self._check_some(~np.isnan(of_column[self.train]), column)
        names = self.columns if len(self.columns) > 1 else ()
        scale: dict[str, Any] = {}
        if self.options.standardize is not False:
            fitted = Standardizer.fit(values[self.train])
            values = fitted.standardize(values)
            scale = {"means": fitted.means.tolist(), "stds": fitted.stds.tolist()}
        task = self._type(len(self.columns), names, unit=self.options.unit, **scale)
        return TaskLabels(task, values, None, np.any(~np.isnan(values), axis=1))

    def classification(self) -> TaskLabels:
        found = self.source.words(self.columns[0], self._kept)
        classes, codes = self._coded(found, self.train, self.source.place)
        values = np.where(codes < 0, np.nan, codes)[:, None]
        weights = self._weights(codes[self.train], classes)
        return TaskLabels(self._type(len(classes), classes, class_weights=weights), values, None, codes >= 0)

    def multi_label(self) -> TaskLabels:
        if self.options.columns is None and self._has_lists():
            names, values = self._of_lists()
        else:
            names, values = self.columns, np.stack([self.source.bits(column) for column in self.columns], axis=1)
        known = ~np.isnan(values)
        for label, of_label in zip(names, known[self.train].T, strict=True):
            self._check_some(of_label, label)
        weights = self._positive_weights(values[self.train], names)
        return TaskLabels(self._type(len(names), names, class_weights=weights), values, None, np.any(known, axis=1))

    def token_classification(self) -> TaskLabels:
        lengths, classes, codes = self._coded_lists()
        rows = rows_of(lengths)
        weights = self._weights(codes[np.isin(rows, self.train)], classes)
        labelled = np.isin(np.arange(len(lengths)), rows[codes >= 0])
        tags = Tags(lengths, np.where(codes < 0, MISSING_INTEGER, codes))
        task = self._type(len(classes), classes, class_weights=weights)
        return TaskLabels(task, np.empty((len(lengths), 0)), tags, labelled)

    # --- pixels ---------------------------------------------------------------------------------------------------

    def segmentation(self) -> TaskLabels:
        classes = tuple(self.options.class_words or ())
        number = len(classes) or self.options.num_classes
        assert number is not None  # TaskOptions asks for one of the two
        found = find_labels(self.source, self.columns[0], "mask")
        labels = self._pixels(found, Masks(number, self.options.ignore_index))
        weights = self.options.class_weights or ()
        if weights == "balanced":
            counts = labels.facts_of(self.train).sum(axis=0).astype(np.int64).tolist()
            with self._named():
                weights = balanced_weights_of_counts(counts, classes)
        return self._of_pixels(self._type(number, classes, class_weights=weights), labels)

    def dense_regression(self) -> TaskLabels:
        found = find_labels(self.source, self.columns[0], "array")
        first = found.rows[0][self.train]
        self._check_some(first >= 0, self.columns[0])
        place = int(first[first >= 0][0])
        values = decode_label(found.files.read(place), f"data: {found.files.describe(place)}")
        channels = len(values) if values.ndim == 3 else 1
        labels = self._pixels(found, Numbers(channels, self.options.missing))
        facts = labels.facts_of(self.train)
        for channel, count in enumerate(facts[:, :, 0].sum(axis=0).tolist()):
            self._check_some(np.array([count]), self.columns[0], f", channel {channel}" if channels > 1 else "")
        scale: dict[str, Any] = {"unit": self.options.unit}
        if self.options.standardize is not False:
            means, stds = means_and_stds(facts)
            scale |= {"means": means.tolist(), "stds": stds.tolist()}
        return self._of_pixels(self._type(channels, (), **scale), labels)

    def _pixels(self, found: FoundFiles, kind: LabelKind) -> PixelLabels:
        assert self.frames is not None  # OwnDataOptions asks for images
        self._check_some(found.rows[0][self.train] >= 0, self.columns[0])
        labels = prepare_labels(found.files, found.rows[0], self.frames, kind, self.name)
        self._check_some(labels.number()[self.train] > 0, self.columns[0])
        return labels

    def _of_pixels(self, task: TaskType, labels: PixelLabels) -> TaskLabels:
        number = labels.number()
        return TaskLabels(task, np.empty((len(number), 0)), None, number > 0, labels)

    # --- multi-label by lists -------------------------------------------------------------------------------------

    def _has_lists(self) -> bool:
        return any(self.source.each(columns.has_lists, self.columns[0]))

    def _of_lists(self) -> tuple[tuple[str, ...], Floats]:
        """The labels' names, and `[N, M]`: 1 for those in a row's list, NaN where there is no list."""
        lengths, classes, codes = self._coded_lists(least=1)
        return classes, multi_hot(lengths, codes, len(classes))

    def _coded_lists(self, least: int = 2) -> tuple[NDArray[np.int64], tuple[str, ...], NDArray[np.int64]]:
        """Lengths of the lists, the classes, and the class of each value, one list after the other."""
        lengths, found = self._joined(self.source.each(columns.lists, self.columns[0]))
        rows = rows_of(lengths)
        of_train = np.flatnonzero(np.isin(rows, self.train))
        return lengths, *self._coded(found, of_train, lambda value: self.source.place(int(rows[value])), least)

    def _joined(self, lists: Sequence[Lists]) -> tuple[NDArray[np.int64], Words]:
        """Lengths of the lists, and their values as words."""
        found = [columns.words_of(of_table.values, of_table.feature, table, self._kept)
                 for of_table, table in zip(lists, self.source.tables, strict=True)]  # fmt: skip
        return np.concatenate([of_table.lengths for of_table in lists]), Words.joined(found)

    # --- classes --------------------------------------------------------------------------------------------------

    @property
    def _kept(self) -> set[str]:
        """Words of the classes that are given: such a word is never a missing one."""
        return {word for words in (self.options.class_words or {}).values() for word in words}

    def _coded(
        self, found: Words, train: NDArray[np.int64], place: Any, least: int = 2
    ) -> tuple[tuple[str, ...], NDArray[np.int64]]:
        """The classes, and each value's number among them, -1 where missing."""
        column = self.columns[0]
        # As in labels of PyTorch and Hugging Face.
        found = found.without({str(MISSING_INTEGER)} - self._kept)
        self._check_some(found.codes[train] >= 0, column)
        given = self.options.class_words
        groups = given or {word: (word,) for word in (found.known if found.declared else in_order(found.used(train)))}
        classes = tuple(groups)
        if not given and (odd := sorted(PERHAPS_MISSING.intersection(classes))):
            logger.warning("%s: %s of column %r is a class; if it means an empty cell, set data.csv.missing: [%s]",
                           self.path, ", ".join(map(repr, odd)), column, ", ".join(map(json.dumps, odd)))  # fmt: skip
        if not isinstance(self.options.classes, dict) and (pair := other_spelling(classes)):
            logger.warning("%s: %r and %r of column %r are two classes; for one, set classes: %s, and the others",
                           self.path, *pair, column, flow({pair[0]: list(pair)}))  # fmt: skip
        places = {word: number for number, words in enumerate(groups.values()) for word in words}
        codes = found.numbered(places, unknown=-2)
        used = np.unique(codes[train])
        used = used[used != -1]
        if len(used) < least and used[0] >= 0:
            raise OptionError(
                f"{self.path}: column {column!r} has only one class in the training part: {classes[used[0]]!r}"
            )
        wrong = np.flatnonzero(codes == -2)
        if wrong.size:
            word = found.known[found.codes[wrong[0]]]
            why = f"is no class of the task {self.name!r}" if given else "is in no row of the training part"
            raise unknown_class(f"data: {place(int(wrong[0]))}", column, word, why, list(places))
        return classes, codes

    def _check_some(self, labelled: NDArray[Any], column: str, which: str = "") -> None:
        if not labelled.any():
            raise OptionError(f"{self.path}: column {column!r}{which} has no label in the training part")

    # --- weights --------------------------------------------------------------------------------------------------

    def _weights(self, codes: NDArray[np.int64], classes: Sequence[str]) -> tuple[float, ...]:
        if self.options.class_weights != "balanced":
            return self.options.class_weights or ()
        with self._named():
            return balanced_class_weights(np.where(codes < 0, MISSING_INTEGER, codes), len(classes), classes)

    def _positive_weights(self, values: Floats, names: Sequence[str]) -> tuple[float, ...]:
        if self.options.class_weights != "balanced":
            return self.options.class_weights or ()
        positive, negative = (values == 1).sum(axis=0), (values == 0).sum(axis=0)
        for name, ones, zeros in zip(names, positive, negative, strict=True):
            if not ones or not zeros:
                kind = "positive" if not ones else "negative"
                raise OptionError(
                    f"{self.path}.class_weights: {name!r} has no {kind} row in the training part, so there is no "
                    "balanced weight for it"
                )
        return tuple((negative / positive).tolist())

    def _type(self, size: int, names: Sequence[str], **more: Any) -> TaskType:
        with self._named():
            return TaskType(self.options.type, size, tuple(names), **more)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Put the task in front of an error."""
        try:
            yield
        except OptionError as error:
            raise OptionError(f"{self.path}.{error}") from None
