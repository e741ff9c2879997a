"""What reading rows of a user's gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_bilb.data.inputs.kinds import LabelColumns
from hf_bilb.data.inputs.labels import Labels, read_known_labels
from hf_bilb.data.own.csv_options import CsvOptions
from hf_bilb.data.own.files import Table
from hf_bilb.data.own.options import InputOptions, SourceOptions, SplitOptions
from hf_bilb.data.own.source import Source
from hf_bilb.data.rows import Rows
from hf_bilb.data.splits import Split
from hf_bilb.losses.task_types import TaskType


@dataclass(frozen=True)
class Wanted:
    """What is to be read besides the inputs: nothing, or the labels of these tasks.

    Attributes:
        csv: how text files are read.
        tasks, places: of the labels; empty: none are read.
    """

    csv: CsvOptions
    tasks: Mapping[str, TaskType]
    places: Mapping[str, LabelColumns]

    def labels(self, table: Table) -> Labels | None:
        """Those of the table's rows."""
        return read_known_labels(table, self.tasks, self.places) if self.places else None


@dataclass(frozen=True)
class Encoded:
    """Rows as a model takes them.

    Attributes:
        rows: a map-style data set.
        collator: makes batches of them.
        words: for tasks of tokens, of each row where its words begin: `[words]` places of their first tokens, -1 of
            those that were cut off.
    """

    rows: Rows
    collator: Callable[[list[Any]], dict[str, Any]]
    words: list[NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return len(self.rows)


def whole_table(table: Table, inputs: InputOptions) -> Source:
    """All rows of a table, as the data set `table` reads them."""
    every, none = np.arange(len(table.rows)), np.arange(0)
    options = SourceOptions("data", None, None, CsvOptions(), inputs, SplitOptions(), {})
    return Source(options, (table,), Split(every, none, none))
