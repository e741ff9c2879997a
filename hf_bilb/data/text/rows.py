"""Sequences of tokens: kept flat in memory, and padded to the longest of a batch.

A batch has the columns `input_ids [B, T]`, `token_type_ids [B, T]` (where the tokenizer makes them), `attention_mask
[B, T]` and the labels: `labels [B, W]` and `tag_labels [B, T, M]` of tasks of any types (`hf_bilb.losses.task_types`),
or `token_labels [B, T]` and `task_ids [B]` of a language model (`hf_bilb.data.text.instruction_rows`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_bilb.data.rows import Rows
from hf_bilb.losses.task_types import LABELS, TAG_LABELS
from hf_bilb.losses.tokens import IGNORED, TOKEN_LABELS


class SequenceRows(Rows):
    """Sequences of tokens in memory: one flat array per column, so a row costs its tokens alone.

    Args:
        lengths: `[N]`, tokens per row.
        columns: name -> `[sum of lengths]`, the rows one after the other.
        task_ids: see `Rows`.
    """

    def __init__(
        self,
        lengths: NDArray[np.int64],
        columns: Mapping[str, NDArray[np.integer]],
        task_ids: NDArray[np.int64] | None = None,
    ) -> None:
        self.lengths = lengths
        self.columns = dict(columns)
        self.task_ids = task_ids
        self._starts = np.concatenate([[0], np.cumsum(lengths)])

    def __len__(self) -> int:
        return len(self.lengths)

    def _tokens(self, place: int) -> dict[str, NDArray[np.integer]]:
        """The columns of a row, `[T]` each: views."""
        tokens = slice(self._starts[place], self._starts[place + 1])
        return {name: column[tokens] for name, column in self.columns.items()}


class TokenRows(SequenceRows):
    """Sequences with labels of the row, of its tokens, or of both.

    A row has views `input_ids [T]` (`token_type_ids [T]`), `labels [W]` and `tag_labels [T, M]`, those that there are.

    Args:
        lengths: `[N]`, tokens per row.
        input_ids: `[sum of lengths]` int32, the rows one after the other.
        token_type_ids: the same in int8, or None for tokenizers that make none.
        task_ids: `[N]` int64, where each row is of one task of several; no column, but an attribute.
        labels: `[N, W]` float32, NaN where missing; no column where W is 0.
        tag_labels: `[sum of lengths, M]`, -100 where missing; None: there are none.

    Raises:
        ValueError: when the arrays do not fit together.
    """

    def __init__(
        self,
        lengths: NDArray[np.int64],
        input_ids: NDArray[np.int32],
        token_type_ids: NDArray[np.int8] | None,
        task_ids: NDArray[np.int64] | None,
        labels: NDArray[np.float32],
        tag_labels: NDArray[np.int64] | None = None,
    ) -> None:
        given = {"input_ids": input_ids, "token_type_ids": token_type_ids, TAG_LABELS: tag_labels}
        columns = {name: column for name, column in given.items() if column is not None}
        num_tokens = int(lengths.sum())
        if len(lengths) != len(labels) or (task_ids is not None and len(task_ids) != len(labels)):
            of_tasks = "no" if task_ids is None else len(task_ids)
            raise ValueError(f"{len(lengths)} lengths, {of_tasks} task_ids, {len(labels)} labels")
        for name, column in columns.items():
            if len(column) != num_tokens:
                raise ValueError(f"the lengths add up to {num_tokens}, but there are {len(column)} {name}")
        super().__init__(lengths, columns, task_ids)
        self.labels = labels

    def _row(self, place: int) -> dict[str, Any]:
        row: dict[str, Any] = self._tokens(place)
        return row if self.labels.shape[1:] == (0,) else {**row, LABELS: self.labels[place]}

    def padded_tag_labels(self) -> NDArray[np.int64]:
        """Of all rows, padded to the longest, `[N, T, M]`."""
        values = self.columns[TAG_LABELS]
        there = np.arange(self.lengths.max()) < self.lengths[:, None]
        padded = np.full((*there.shape, values.shape[1]), IGNORED, np.int64)
        padded[there] = values
        return padded

    @classmethod
    def concatenate(cls, parts: Sequence[TokenRows]) -> TokenRows:
        """The rows of all `parts`, one part after the other."""
        columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns}
        tasks = [part.task_ids for part in parts if part.task_ids is not None]
        return cls(
            np.concatenate([part.lengths for part in parts]),
            columns["input_ids"],
            columns.get("token_type_ids"),
            np.concatenate(tasks) if tasks else None,
            np.concatenate([part.labels for part in parts]),
            columns.get(TAG_LABELS),
        )


# --- batches ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PadTokens:
    """Collator: rows of `SequenceRows` to a batch, padded on the right to the longest row of the batch.

    Attributes:
        pad_token_id: of the tokenizer. The attention mask says what is padding, but some encoders (RoBERTa) count
            positions by this token.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch as in the module's docstring; columns that the rows lack (labels, token types) are left out.

        A row has `labels [W]` and `tag_labels [T, M]`, as arrays or lists.
        """
        there = where_tokens_are(rows)
        batch = {"input_ids": padded_column(rows, "input_ids", there, self.pad_token_id)}
        if "token_type_ids" in rows[0]:
            batch["token_type_ids"] = padded_column(rows, "token_type_ids", there, 0)
        batch["attention_mask"] = torch.from_numpy(there.astype(np.int64))
        if TOKEN_LABELS in rows[0]:
            batch[TOKEN_LABELS] = padded_column(rows, TOKEN_LABELS, there, IGNORED)
        if TAG_LABELS in rows[0]:
            batch[TAG_LABELS] = padded_column(rows, TAG_LABELS, there, IGNORED)
        for name, dtype in (("task_ids", np.int64), (LABELS, np.float32)):
            if name in rows[0]:
                batch[name] = torch.from_numpy(np.array([row[name] for row in rows], dtype))
        return batch


def where_tokens_are(rows: Sequence[Mapping[str, Any]]) -> NDArray[np.bool_]:
    """`[B, T]`: True where a batch of these rows, padded on the right to the longest, has a token."""
    lengths = np.array([len(row["input_ids"]) for row in rows])
    return np.arange(lengths.max()) < lengths[:, None]


def padded_column(rows: Sequence[Mapping[str, Any]], name: str, there: NDArray[np.bool_], filler: int) -> Tensor:
    """`[B, T]` int64: the rows' column `name` where `there` is True, `filler` elsewhere; `[B, T, M]` of `[T, M]`."""
    values = np.concatenate([row[name] for row in rows])
    padded = np.full((*there.shape, *values.shape[1:]), filler, np.int64)
    padded[there] = values
    return torch.from_numpy(padded)
