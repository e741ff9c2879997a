"""Numbers and categories of a source, as a table model takes them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_bilb.data.inputs.kinds import TableInputs
from hf_bilb.data.own.columns import Words
from hf_bilb.data.own.options import InputOptions
from hf_bilb.data.own.source import Source
from hf_bilb.data.own.words import in_order
from hf_bilb.data.task_data import Standardizer

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Cells:
    """The inputs of N rows.

    Attributes:
        numeric: `[N, D]`, NaN where missing.
        categorical: C columns.
    """

    numeric: NDArray[np.float64]
    categorical: tuple[Words, ...]


def read_cells(source: Source, kept: Collection[str] = ()) -> Cells:
    """The inputs of all rows of a source; of words that mean a missing one, `kept` are categories.

    Raises:
        OptionError: a number that is none: names file, row and column.
    """
    names = source.options.inputs.numeric or ()
    numbers = [source.numbers(name) for name in names]
    numeric = np.stack(numbers, axis=1) if numbers else np.empty((len(source), 0))
    return Cells(numeric, tuple(source.words(name, kept) for name in source.options.inputs.categorical or ()))


@dataclass(frozen=True)
class Encoder:
    """How cells become numbers: known from the training rows alone.

    Attributes:
        numeric, categorical: names of the columns.
        scale: of the D columns of numbers.
        categories: of each of the C columns its values, in order.
        empty: columns without a value in the training rows.
    """

    numeric: tuple[str, ...]
    categorical: tuple[str, ...]
    scale: Standardizer
    categories: tuple[tuple[str, ...], ...]
    empty: tuple[str, ...] = ()

    @classmethod
    def fit(
        cls,
        inputs: InputOptions,
        sources: Sequence[Cells],
        train: Sequence[Rows],
        order: Callable[[Iterable[str]], list[str]] = in_order,
    ) -> Encoder:
        """From the training rows of every source; `order` is that of a column's categories."""
        categorical = inputs.categorical or ()
        numbers = np.concatenate([cells.numeric[rows] for cells, rows in zip(sources, train, strict=True)])
        used = [
            {word for cells, rows in zip(sources, train, strict=True) for word in cells.categorical[place].used(rows)}
            for place in range(len(categorical))
        ]
        known = tuple(tuple(order(of_column)) for of_column in used)
        names = (*(inputs.numeric or ()), *categorical)
        filled = (*(~np.isnan(numbers)).any(axis=0), *map(bool, known))
        empty = tuple(name for name, has_value in zip(names, filled, strict=True) if not has_value)
        return cls(inputs.numeric or (), categorical, Standardizer.fit(numbers), known, empty)

    def encode(self, cells: Cells, rows: Rows) -> dict[str, Tensor]:
        """`numeric [N, D]` float32, standardised, NaN where missing; `categorical [N, C]` int64, 0 where missing or not
        known. Of these, those that have columns."""
        found: dict[str, Tensor] = {}
        if self.numeric:
            found["numeric"] = self.scale.tensor(cells.numeric[rows])
        if self.categorical:
            codes = [
                words.positions_in(known)[rows] + 1
                for words, known in zip(cells.categorical, self.categories, strict=True)
            ]
            found["categorical"] = torch.from_numpy(np.stack(codes, axis=1))
        return found

    @property
    def inputs(self) -> TableInputs:
        """For the saved model: what was learned from the training rows."""
        means, stds = (tuple(values.tolist()) for values in (self.scale.means, self.scale.stds))
        return TableInputs(self.numeric, means, stds, self.categorical, self.categories)

    @property
    def model_arguments(self) -> dict[str, Any]:
        """What a model has to know of it."""
        return {
            "numeric_names": list(self.numeric),
            "numeric_means": self.scale.means.tolist(),
            "numeric_stds": self.scale.stds.tolist(),
            "categories": dict(zip(self.categorical, map(list, self.categories), strict=True)),
        }
