"""`Predictions`: what a model says of N rows, by task, as arrays and as tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_bilb.config.options import nearest
from hf_bilb.losses.task_types import TaskType

if TYPE_CHECKING:
    import pandas as pd


class Predictions:
    """What a model says of N rows: `predictions[task]` is the answer, as a DataFrame's columns are.

    It iterates over the names of the tasks; `len` is N.

    | type | `predictions[task]` | `probabilities[task]` |
    |---|---|---|
    | regression | `[N]` numbers in the unit of the training data; `[N, D]` for D of them | - |
    | classification | `[N]` names of classes | `[N, C]` |
    | multi_label | `[N]` bools, `[N, M]` for M labels: probability of at least 1/2 | `[N]`, `[N, M]` |
    | token_classification | N lists with the name of a tag for each word, None where the text was cut off before it | \
N arrays `[words, C]`, NaN there |

    Attributes:
        tasks: name -> type; classes and labels are in the order of its `names`.
        probabilities: task -> see above.
        outputs: task -> what the model computed, `[N, size]` float32 (N arrays `[words, C]` of tokens), before
            `output * std + mean`, softmax or sigmoid.
    """

    def __init__(
        self, tasks: Mapping[str, TaskType], answers: Mapping[str, Any], probabilities: Mapping[str, Any],
        outputs: Mapping[str, Any], num_rows: int,
    ) -> None:  # fmt: skip
        self.tasks = dict(tasks)
        self._answers = dict(answers)
        self.probabilities = dict(probabilities)
        self.outputs = dict(outputs)
        self.num_rows = num_rows

    @classmethod
    def of(
        cls, tasks: Mapping[str, TaskType], found: Mapping[str, Sequence[Tensor]], words: list[NDArray[np.int64]] | None
    ) -> Predictions:
        """From the outputs of all batches.

        Args:
            tasks: name -> type.
            found: task -> outputs `[B, size]` of each batch; of tokens those `[T, C]` of each row.
            words: of each row the places of its words' first tokens, -1 where cut off.
        """
        answers: dict[str, Any] = {}
        probabilities: dict[str, Any] = {}
        outputs: dict[str, Any] = {}
        for name, task in tasks.items():
            if task.type == "token_classification":
                assert words is not None  # of lists of words
                of_words = [_of_words(*pair) for pair in zip(found[name], words, strict=True)]
                outputs[name], probabilities[name] = of_words, [_softmax(rows) for rows in of_words]
                answers[name] = [_tags(task, rows) for rows in of_words]
                continue
            outputs[name] = torch.cat([one.float() for one in found[name]]).numpy()
            answers[name], shares = _answer(task, outputs[name])
            if shares is not None:
                probabilities[name] = shares
        num_rows = len(next(iter(answers.values()), ()))
        return cls(tasks, answers, probabilities, outputs, num_rows)

    # --- by task --------------------------------------------------------------------------------------------------

    def __getitem__(self, task: str) -> Any:
        if task not in self.tasks:
            raise KeyError(f"{task!r} is no task of the model{nearest(task, self.tasks)}")
        return self._answers[task]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tasks)

    def __contains__(self, task: object) -> bool:
        return task in self.tasks

    def __len__(self) -> int:
        return self.num_rows

    def keys(self) -> Iterable[str]:
        """The names of the tasks, so that `dict(predictions)` has their answers."""
        return self.tasks.keys()

    def __repr__(self) -> str:
        return f"Predictions({self.num_rows} rows, tasks {', '.join(self)})"

    # --- tables ---------------------------------------------------------------------------------------------------

    def to_columns(self, all_classes: bool = False) -> dict[str, list[Any]]:
        """Column -> N plain values.

        * regression: `<task>`; of several numbers `<task>_<name>`, or `<task>_1` and so on.
        * classification: `<task>`, the class, and `<task>_probability`, its probability.
        * multi_label: `<task>`, 0 or 1, and `<task>_probability`; of several labels the list of those that apply,
          and `<task>_probability_<label>` for each of them.
        * token_classification: `<task>`, a list of tags, and `<task>_probability`, the list of their probabilities.

        Args:
            all_classes: of classification also `<task>_probability_<class>` for every class.
        """
        columns: dict[str, list[Any]] = {}
        for name, task in self.tasks.items():
            columns.update(getattr(self, f"_{task.type}")(name, task, all_classes))
        return columns

    def to_pandas(self, all_classes: bool = False) -> pd.DataFrame:
        """The columns of `to_columns` as a DataFrame, a row for each."""
        import pandas as pd

        return pd.DataFrame(self.to_columns(all_classes), index=range(self.num_rows))

    def to_records(self, all_classes: bool = False) -> list[dict[str, Any]]:
        """The columns of `to_columns`, as a dict for each row."""
        columns = self.to_columns(all_classes)
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def _regression(self, name: str, task: TaskType, all_classes: bool) -> dict[str, list[Any]]:
        values = self._answers[name]
        if task.size == 1:
            return {name: values.tolist()}
        return {f"{name}_{of}": column.tolist() for of, column in zip(_names(task), values.T, strict=True)}

    def _classification(self, name: str, task: TaskType, all_classes: bool) -> dict[str, list[Any]]:
        shares = self.probabilities[name]
        columns = {name: self._answers[name].tolist(), f"{name}_probability": shares.max(axis=1).tolist()}
        if all_classes:
            columns |= {f"{name}_probability_{of}": p.tolist() for of, p in zip(_names(task), shares.T, strict=True)}
        return columns

    def _multi_label(self, name: str, task: TaskType, all_classes: bool) -> dict[str, list[Any]]:
        shares, chosen = self.probabilities[name], self._answers[name]
        if task.size == 1:
            return {name: chosen.astype(int).tolist(), f"{name}_probability": shares.tolist()}
        names = _names(task)
        listed = [[label for label, applies in zip(names, row, strict=True) if applies] for row in chosen]
        of_labels = {f"{name}_probability_{of}": p.tolist() for of, p in zip(names, shares.T, strict=True)}
        return {name: listed, **of_labels}

    def _token_classification(self, name: str, task: TaskType, all_classes: bool) -> dict[str, list[Any]]:
        best = [
            [None if np.isnan(word).any() else float(word.max()) for word in row] for row in self.probabilities[name]
        ]
        return {name: self._answers[name], f"{name}_probability": best}


# --- one task -----------------------------------------------------------------------------------------------------


def _names(task: TaskType) -> tuple[str, ...]:
    """Of its numbers, classes or labels; numbers from 1 (of classes from 0) where they have none."""
    first = 0 if task.has_classes else 1
    return task.names or tuple(str(number) for number in range(first, first + task.size))


def _answer(task: TaskType, outputs: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[np.float64] | None]:
    """The answers and their probabilities, from `[N, size]`."""
    if task.type == "regression":
        values = outputs.astype(np.float64)
        if task.means:
            values = values * np.array(task.stds) + np.array(task.means)
        return (values[:, 0] if task.size == 1 else values), None
    if task.type == "classification":
        return np.array(_names(task), object)[outputs.argmax(axis=1)], _softmax(outputs)
    shares = torch.from_numpy(outputs).double().sigmoid().numpy()
    shares = shares[:, 0] if task.size == 1 else shares
    return shares >= 0.5, shares


def _softmax(outputs: NDArray[np.float32]) -> NDArray[np.float64]:
    return torch.from_numpy(outputs).double().softmax(dim=-1).numpy()


def _of_words(tokens: Tensor, places: NDArray[np.int64]) -> NDArray[np.float32]:
    """`[words, C]`, NaN where a word has no token."""
    rows = tokens.float().numpy()[np.maximum(places, 0)]
    return np.where(places[:, None] < 0, np.float32(np.nan), rows)


def _tags(task: TaskType, rows: NDArray[np.float32]) -> list[str | None]:
    names = _names(task)
    return [None if np.isnan(row).any() else names[int(row.argmax())] for row in rows]
