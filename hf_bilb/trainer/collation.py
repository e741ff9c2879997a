"""Labels that are None: NaN in columns of floats, -100 in columns of integers, before a batch is made.

Data sets of several tasks that are joined (`concatenate_datasets`, `interleave_datasets`) have None in the label
columns of the other tasks, and `with_format("torch")` gives NaN for it, which turns class numbers into floats. What a
column holds is taken from the data set, not from a batch, which may have no value at all: integers stay integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import DataCollatorWithPadding, DefaultDataCollator, default_data_collator

from hf_bilb.errors import TaskLossError
from hf_bilb.losses.masked import MISSING_INTEGER

if TYPE_CHECKING:
    import pyarrow as pa

Collator = Callable[[list[Any]], Any]


@dataclass(frozen=True)
class LabelColumn:
    """What a label column holds.

    Attributes:
        integer: whole numbers, classes and truth values (missing: -100); else floats (missing: NaN).
        shape: of one row; None = not known.
    """

    integer: bool
    shape: tuple[int, ...] | None = None


def with_missing_labels(
    collator: Collator, dataset: Any, label_names: Sequence[str], several_tasks: bool, taken: Mapping[str, bool]
) -> Collator:
    """`collator`, with labels that are None filled in, for batches of `dataset`.

    Args:
        collator: the Trainer's; only those that the Trainer chooses itself (`default_data_collator`, padding by the
            tokenizer) are touched. Any other is returned as it is.
        dataset: of `datasets`, whose features say what the label columns hold; or any other, whose rows say it.
        label_names: the label columns; a row may lack one altogether.
        several_tasks: whether there are. A data set without any label, and with one task a column without any, is left
            to `collator`, which drops it.
        taken: whether the model's forward takes a column, by its name: None in such a one is an error of one line.

    Cost: none for a data set of `datasets` whose columns have no nulls.
    """
    if collator is not default_data_collator and type(collator) not in (DefaultDataCollator, DataCollatorWithPadding):
        return collator
    # The default collator makes a column `labels` of either.
    names = [*label_names, *(("label", "label_ids") if "labels" in label_names else ())]
    from datasets import Dataset, IterableDataset

    kinds: dict[str, LabelColumn] | None = None
    if isinstance(dataset, Dataset):
        nullable = {name: dataset.data.column(name) for name in dataset.column_names}
        nullable = {name: column for name, column in nullable.items() if _has_nulls(column.chunks)}
        if not nullable:
            return collator
        empty = {name for name, column in nullable.items() if column.null_count == len(column)}
        labels = [name for name in names if name in dataset.column_names]
        left = empty if not several_tasks or empty.issuperset(labels) else set()
        kinds = _kinds(
            {name: nullable[name].type for name in labels if name in nullable and name not in left}, nullable
        )
    elif isinstance(dataset, IterableDataset) and dataset.features is not None:
        schema = dataset.features.arrow_schema
        kinds = _kinds({name: schema.field(name).type for name in names if name in schema.names}, {})
    return FilledLabels(collator, names, kinds, taken)


class FilledLabels:
    """Fills missing labels in the rows, then has `collator` make the batch.

    Args:
        collator: makes a batch of rows.
        label_names: columns that may have missing values.
        kinds: what those to look at hold; None = look at all, and go by what their rows hold.
        taken: whether the model's forward takes a column, by its name.

    State: what columns of unknown kind or length have held so far.
    """

    def __init__(
        self,
        collator: Collator,
        label_names: Sequence[str],
        kinds: Mapping[str, LabelColumn] | None,
        taken: Mapping[str, bool],
    ) -> None:
        self._collator = collator
        self._label_names = list(label_names)
        self._kinds = None if kinds is None else dict(kinds)
        self._taken = taken
        self._seen: dict[str, LabelColumn] = {}

    def __call__(self, rows: list[Any]) -> Any:
        """A batch; raises as `fill`."""
        return self._collator(self.fill(rows))

    def fill(self, rows: list[Any]) -> list[Any]:
        """The rows with their missing labels; raises `TaskLossError` where an input is None, or nothing tells what a
        column of None holds."""
        rows = [row if isinstance(row, Mapping) else vars(row) for row in rows]
        self._check_inputs(rows)
        names = self._label_names if self._kinds is None else list(self._kinds)
        columns = {name: [row.get(name) for row in rows] for name in names if any(name in row for row in rows)}
        # Of a data set that says nothing of its labels, a batch without any is that of one that has none.
        if self._kinds is not None or any(value is not None for values in columns.values() for value in values):
            filled = {name: self._fill(name, values) for name, values in columns.items() if self._is_due(name, values)}
            if filled:
                rows = [{**row, **{name: values[i] for name, values in filled.items()}} for i, row in enumerate(rows)]
        return rows

    def _is_due(self, name: str, values: list[Any]) -> bool:
        """Whether a value is missing, or class numbers have become floats, as `with_format` does next to a null; truth
        values become 0 and 1, so that there is room for -100."""
        if self._kinds is not None:
            integer = self._kinds[name].integer
            return any(_is_missing(value) or (integer and not _is_whole(value)) for value in values)
        missing = any(_is_missing(value) for value in values)
        there = [value for value in values if value is not None]
        if there and not isinstance(there[0], (str, bytes, Mapping)):
            before = self._seen.get(name)
            integer = not any(map(holds_floats, there)) and (before is None or before.integer)
            self._seen[name] = LabelColumn(integer, np.shape(there[0]))
        return missing

    def _fill(self, name: str, values: list[Any]) -> list[Any]:
        column = self._seen.get(name) if self._kinds is None else self._kinds[name]
        if column is None:
            raise TaskLossError(
                f"label column {name!r}: all {len(values)} labels of a batch are None, and nothing says whether they "
                "are integers; use a data set of `datasets` with features, or NaN / -100 for missing labels"
            )
        shape = next((np.shape(value) for value in values if value is not None), column.shape)
        if self._kinds is not None:
            self._kinds[name] = LabelColumn(column.integer, shape)
        if shape is None:
            raise TaskLossError(
                f"label column {name!r}: all {len(values)} labels of a batch are None, and nothing says how long they "
                "are; give the column a fixed length, or use NaN / -100 for missing labels"
            )
        if column.integer:
            self._check_digits(name, values)
        kind: type = next((type(value) for value in values if isinstance(value, (Tensor, np.ndarray))), list)
        if kind is np.ndarray and not shape:
            kind = list  # of `label`, the default collator takes an array for a float
        return [_filled(value, column.integer, shape, kind) for value in values]

    def _check_digits(self, name: str, values: list[Any]) -> None:
        """`with_format` makes whole numbers float32 next to a null, which holds those up to 2^24."""
        for value in values:
            if isinstance(value, (Tensor, np.ndarray, np.generic)) and holds_floats(value):
                found = torch.as_tensor(value)
                if found.dtype != torch.float64 and bool((found.abs() >= 2**24).any()):
                    raise TaskLossError(
                        f"label column {name!r}: whole numbers of 2^24 and more lose digits where with_format makes "
                        "them float32 next to None; use with_format(None), or -100 in place of None"
                    )

    def _check_inputs(self, rows: list[Mapping[str, Any]]) -> None:
        """The default collator drops a column whose first row is None, and fails on one in another row."""
        for name in rows[0]:
            if name in self._label_names or not self._taken[name]:
                continue
            values = [row.get(name) for row in rows]
            missing = [i for i, value in enumerate(values) if value is None]
            if missing and len(missing) < len(rows) and not any(isinstance(value, str) for value in values):
                raise TaskLossError(
                    f"column {name!r}: row {missing[0]} of a batch of {len(rows)} is None, which the model cannot "
                    f"take; only label columns (label_names: {self._label_names}) may have missing values"
                )


def _filled(value: Any, integer: bool, shape: tuple[int, ...], kind: type) -> Any:
    """A row's labels without None, of the type that the column's other rows have."""
    missing = MISSING_INTEGER if integer else math.nan
    if kind is list and not shape and not isinstance(value, (np.generic, list)):
        return missing if _is_missing(value) or value != value else int(value) if integer else float(value)
    if isinstance(value, list):
        value = _filled_list(value)
    if value is None:
        array = torch.full(shape, math.nan)
    else:
        array = value if isinstance(value, Tensor) else torch.tensor(value)
    if integer and array.is_floating_point():
        array = torch.where(array.isnan(), float(MISSING_INTEGER), array.double()).long()
    elif integer:
        array = array.long()
    elif not array.is_floating_point():
        array = array.float()
    return array if kind is Tensor else array.numpy() if kind is np.ndarray else array.tolist()


def _filled_list(values: Iterable[Any]) -> list[Any]:
    """Nested lists with NaN for None: floats that `_filled` makes integers again."""
    return [_filled_list(v) if isinstance(v, list) else math.nan if v is None else v for v in values]


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, list) and any(map(_is_missing, value)))


def holds_floats(value: Any) -> bool:
    """Whether a label, or a list of them, is of floats; no whole numbers, classes or truth values."""
    if isinstance(value, Tensor):
        return value.is_floating_point()
    if isinstance(value, (np.ndarray, np.generic)):
        return bool(np.issubdtype(value.dtype, np.floating))
    return isinstance(value, float) or (isinstance(value, list) and any(map(holds_floats, value)))


def _is_whole(value: Any) -> bool:
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return not holds_floats(value) and value.dtype not in (torch.bool, np.bool_)
    return all(map(_is_whole, value)) if isinstance(value, list) else type(value) is int


def _has_nulls(chunks: Iterable[Any]) -> bool:
    import pyarrow as pa

    for chunk in chunks:
        if isinstance(chunk, pa.ExtensionArray):
            chunk = chunk.storage
        if chunk.null_count > 0:
            return True
        nested = isinstance(chunk, (pa.ListArray, pa.LargeListArray, pa.FixedSizeListArray))
        if nested and _has_nulls([chunk.values]):
            return True
    return False


def _kinds(types: Mapping[str, pa.DataType], columns: Mapping[str, pa.ChunkedArray]) -> dict[str, LabelColumn]:
    """By name, of the columns of numbers among `types`; their `columns`, where given, tell lengths that vary."""
    found = {}
    for name, kind in types.items():
        column = _label_column(kind)
        if column is not None and column.shape is None and name in columns:
            column = LabelColumn(column.integer, _first_shape(columns[name]))
        if column is not None:
            found[name] = column
    return found


def _label_column(kind: pa.DataType) -> LabelColumn | None:
    """What a column of an arrow type holds; None for what is no number."""
    import pyarrow as pa

    sizes: list[int | None] = []
    while isinstance(kind, (pa.BaseExtensionType, pa.ListType, pa.LargeListType, pa.FixedSizeListType)):
        if isinstance(kind, pa.BaseExtensionType):
            kind = kind.storage_type
            continue
        sizes.append(kind.list_size if isinstance(kind, pa.FixedSizeListType) else None)
        kind = kind.value_type
    integer = pa.types.is_integer(kind) or pa.types.is_boolean(kind)
    if not integer and not pa.types.is_floating(kind):
        return None
    known = [size for size in sizes if size is not None]
    return LabelColumn(integer, tuple(known) if len(known) == len(sizes) else None)


def _first_shape(column: pa.ChunkedArray) -> tuple[int, ...] | None:
    for chunk in column.chunks:
        if chunk.null_count < len(chunk):
            return np.shape(chunk[chunk.is_valid().index(True).as_py()].as_py())
    return None
