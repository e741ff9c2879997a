"""`DataFormat`: everything of the data that predicting needs, as plain values for a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hf_bilb.config.options import parse_options, unknown_name
from hf_bilb.data.inputs.kinds import ENCODERS, KINDS, DenseMeasurement, InputKind, LabelColumns
from hf_bilb.data.own.csv_options import CsvOptions
from hf_bilb.errors import OptionError
from hf_bilb.losses.task_types import TaskType

if TYPE_CHECKING:
    from hf_bilb.data.inputs.encoded import Encoded


@dataclass(frozen=True)
class DataFormat:
    """How rows become inputs of a model, and what its outputs mean.

    Attributes:
        inputs: one of `hf_bilb.data.inputs.kinds`.
        tasks: name -> type, in the order of the model's outputs; empty for models whose outputs are no such tasks.
        labels: task -> where its labels stand; empty where rows of a user's are not measured.
        csv: how text files are read, and which words mean an empty cell.
        dense: how it is measured, where the tasks are the papers' of dense prediction; else None.
    """

    inputs: InputKind
    tasks: Mapping[str, TaskType]
    labels: Mapping[str, LabelColumns] = field(default_factory=dict)
    csv: CsvOptions = field(default_factory=CsvOptions)
    dense: DenseMeasurement | None = None

    def encode(self, inputs: Any, tokenizer: Any, with_labels: bool = False) -> Encoded:
        """The rows of what a user hands over; with their labels on demand.

        Raises:
            OptionError: one line, with file, row and column.
        """
        from hf_bilb.data.inputs.encoded import Wanted  # with what reads files, which a data set need not import

        if with_labels and not self.labels:
            raise OptionError("evaluate: the model does not know in which columns its labels stand")
        wanted = Wanted(self.csv, self.tasks, self.labels if with_labels else {})
        encoded: Encoded = ENCODERS[self.inputs.kind](self.inputs, inputs, tokenizer, wanted)
        return encoded

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "inputs": {"kind": self.inputs.kind, **dataclasses.asdict(self.inputs)},
            "tasks": [{"name": name, **task.to_dict()} for name, task in self.tasks.items()],
            "labels": {name: dataclasses.asdict(place) for name, place in self.labels.items()},
            "csv": dataclasses.asdict(self.csv),
            **({} if self.dense is None else {"dense": dataclasses.asdict(self.dense)}),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], path: str) -> DataFormat:
        """What `to_dict` gave, read from the file `path`.

        Raises:
            OptionError: something else; names the key.
        """
        try:
            inputs = dict(values["inputs"])
            kind = inputs.pop("kind")
            if kind not in KINDS:
                raise unknown_name(f"{path}: inputs.kind", kind, KINDS)
            tasks = [dict(task) for task in values["tasks"]]
            labels = {name: parse_options(LabelColumns, place, path) for name, place in values["labels"].items()}
            return cls(
                parse_options(KINDS[kind], inputs, f"{path}: inputs"),
                {task.pop("name"): TaskType.from_dict(task) for task in tasks},
                labels,
                parse_options(CsvOptions, values["csv"], f"{path}: csv"),
                parse_options(DenseMeasurement, values["dense"], f"{path}: dense") if "dense" in values else None,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise OptionError(f"{path}: is damaged or of another version: {type(error).__name__}: {error}") from None
