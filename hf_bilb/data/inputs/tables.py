"""Tables of a user's."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hf_bilb.data.inputs.encoded import Encoded, Wanted, whole_table
from hf_bilb.data.inputs.given import as_table, check_column
from hf_bilb.data.inputs.kinds import FeatureInputs, TableInputs
from hf_bilb.data.own import columns
from hf_bilb.data.own.files import Table
from hf_bilb.data.own.options import InputOptions
from hf_bilb.data.own.table import Encoder, read_cells
from hf_bilb.data.rows import VectorRows, collate_vectors
from hf_bilb.data.tables.one_hot import OneHotRows
from hf_bilb.data.task_data import Standardizer
from hf_bilb.errors import OptionError
from hf_bilb.losses.task_types import LABELS


def encode_table(kind: TableInputs, inputs: Any, tokenizer: Any, wanted: Wanted) -> Encoded:
    """Rows with `numeric` and `categorical`; see `ENCODERS`."""
    table = _checked(kind, inputs, wanted)
    source = whole_table(table, InputOptions(numeric=kind.numeric, categorical=kind.categorical))
    encoder = Encoder(kind.numeric, kind.categorical, _scale(kind), kind.categories)
    found = encoder.encode(read_cells(source), np.arange(len(table.rows)))
    labels = wanted.labels(table)
    if labels is not None:
        found[LABELS] = torch.from_numpy(labels.values)
    return Encoded(VectorRows(found), collate_vectors)


def encode_features(kind: FeatureInputs, inputs: Any, tokenizer: Any, wanted: Wanted) -> Encoded:
    """Rows with `features`; see `ENCODERS`."""
    table = _checked(kind, inputs, wanted)
    numbers = [columns.numbers(table, name) for name in kind.numeric]
    for name, values in zip(kind.numeric, numbers, strict=True):
        if (empty := np.flatnonzero(np.isnan(values))).size:
            raise OptionError(f"{table.place(int(empty[0]))}: column {name!r} is empty, expected a number")
    codes = [
        columns.words(table, name, kept=known).positions_in(known)
        for name, known in zip(kind.categorical, kind.categories, strict=True)
    ]
    matrix = np.stack(numbers, axis=1) if numbers else np.empty((len(table.rows), 0))
    of_words = np.stack(codes, axis=1) if codes else np.empty((len(table.rows), 0), np.int64)
    sizes = [len(known) for known in kind.categories]
    rows = OneHotRows(_scale(kind).tensor(matrix), torch.from_numpy(of_words), sizes, None)
    return Encoded(rows, collate_vectors)


def _checked(kind: TableInputs | FeatureInputs, inputs: Any, wanted: Wanted) -> Table:
    names = (*kind.numeric, *kind.categorical)
    table = as_table(inputs, wanted.csv, names)
    for name in names:
        check_column(name, table.features, table.name)
    return table


def _scale(kind: TableInputs | FeatureInputs) -> Standardizer:
    return Standardizer(np.array(kind.means), np.array(kind.stds))
