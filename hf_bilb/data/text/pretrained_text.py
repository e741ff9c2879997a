"""Text for one encoder and K tasks: names of pretrained models, tokens kept flat, batches padded to their longest row.

A batch has the columns `input_ids [B, T]`, `attention_mask [B, T]`, `token_type_ids [B, T]` (where the tokenizer makes
them), `task_ids [B]` (int64) and `labels [B]` (float32: a class index or a score, NaN where missing).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from hf_bilb.config.pretrained import pretrained_path
from hf_bilb.errors import OptionError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LABEL_NAMES = ("labels", "task_ids")
ROWS_AT_ONCE = 10_000  # rows that are tokenized together: their Python lists take about 20 MB


def load_tokenizer(name: str, path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of `name` (see `pretrained_path`).

    Raises:
        OptionError: one line, when it cannot be loaded.
        MissingPackageError: its package is not installed.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    folder = pretrained_path(name, path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise OptionError(f"{path}: {name!r} gives no tokenizer: {' '.join(str(error).split())}") from None
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise OptionError(f"{path}: {name!r} gives no tokenizer")
    return tokenizer


# --- rows ---------------------------------------------------------------------------------------------------------


class TokenRows(Dataset[dict[str, Any]]):
    """A map-style data set of token sequences in memory: one flat array per column, so a row costs its tokens alone.

    Args:
        lengths: `[N]`, tokens per row.
        input_ids: `[sum of lengths]` int32, the rows one after the other.
        token_type_ids: the same in int8, or None for tokenizers that make none.
        task_ids: `[N]` int64; an attribute, so that a task sampler can read it without loading rows.
        labels: `[N]` float32, class index or score, NaN where missing.

    Raises:
        ValueError: when the arrays do not fit together.
    """

    def __init__(
        self,
        lengths: NDArray[np.int64],
        input_ids: NDArray[np.int32],
        token_type_ids: NDArray[np.int8] | None,
        task_ids: NDArray[np.int64],
        labels: NDArray[np.float32],
    ) -> None:
        num_tokens = int(lengths.sum())
        if not len(lengths) == len(task_ids) == len(labels):
            raise ValueError(f"{len(lengths)} lengths, {len(task_ids)} task_ids, {len(labels)} labels")
        if len(input_ids) != num_tokens or (token_type_ids is not None and len(token_type_ids) != num_tokens):
            raise ValueError(f"the lengths add up to {num_tokens}, but there are {len(input_ids)} input_ids")
        self.lengths = lengths
        self.task_ids = task_ids
        self.labels = labels
        self._tokens: dict[str, NDArray[np.integer]] = {"input_ids": input_ids}
        if token_type_ids is not None:
            self._tokens["token_type_ids"] = token_type_ids
        self._starts = np.concatenate([[0], np.cumsum(lengths)])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row `index`: views `input_ids [T]` (and `token_type_ids [T]`), scalars `task_ids` and `labels`."""
        row = range(len(self))[index]  # negative numbers, and IndexError beyond the end
        tokens = slice(self._starts[row], self._starts[row + 1])
        row_tokens = {name: column[tokens] for name, column in self._tokens.items()}
        return {**row_tokens, "task_ids": self.task_ids[row], "labels": self.labels[row]}

    @classmethod
    def concatenate(cls, parts: Sequence[TokenRows]) -> TokenRows:
        """The rows of all `parts`, one part after the other."""
        names = parts[0]._tokens.keys()
        tokens = {name: np.concatenate([part._tokens[name] for part in parts]) for name in names}
        return cls(
            np.concatenate([part.lengths for part in parts]),
            tokens["input_ids"],
            tokens.get("token_type_ids"),
            np.concatenate([part.task_ids for part in parts]),
            np.concatenate([part.labels for part in parts]),
        )


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Sequence[str]],
    labels: NDArray[np.float32],
    task_id: int,
    max_length: int,
) -> TokenRows:
    """Tokenize the rows of one task.

    Args:
        tokenizer: makes the special tokens, and token types where its model has them.
        texts: one list of N texts, or two for pairs.
        labels: `[N]`.
        task_id: the task's number.
        max_length: tokens after which a row is cut (of a pair, the longer text first), special tokens included.

    Cost: about 20,000 rows a second on one core with a fast tokenizer.
    """
    with_types = "token_type_ids" in tokenizer.model_input_names
    lengths: list[int] = []
    input_ids: list[NDArray[np.int32]] = [np.empty(0, np.int32)]
    token_types: list[NDArray[np.int8]] = [np.empty(0, np.int8)]
    for start in range(0, len(labels), ROWS_AT_ONCE):
        columns = [list(column[start : start + ROWS_AT_ONCE]) for column in texts]
        encoded = tokenizer(
            *columns,
            truncation=True,
            max_length=max_length,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=with_types,
        )
        lengths += map(len, encoded["input_ids"])
        input_ids += [np.array(row, np.int32) for row in encoded["input_ids"]]
        if with_types:
            token_types += [np.array(row, np.int8) for row in encoded["token_type_ids"]]
    return TokenRows(
        np.array(lengths, np.int64),
        np.concatenate(input_ids),
        np.concatenate(token_types) if with_types else None,
        np.full(len(labels), task_id, np.int64),
        labels.astype(np.float32),
    )


# --- batches ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PadTokens:
    """Collator: rows of `TokenRows` to a batch, padded on the right to the longest row of the batch.

    Attributes:
        pad_token_id: of the tokenizer. The attention mask says what is padding, but some encoders (RoBERTa) count
            positions by this token.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A batch as in the module's docstring; columns that the rows lack (labels, token types) are left out."""
        there = where_tokens_are(rows)
        batch = {"input_ids": padded_column(rows, "input_ids", there, self.pad_token_id)}
        if "token_type_ids" in rows[0]:
            batch["token_type_ids"] = padded_column(rows, "token_type_ids", there, 0)
        batch["attention_mask"] = torch.from_numpy(there.astype(np.int64))
        for name, dtype in (("task_ids", np.int64), ("labels", np.float32)):
            if name in rows[0]:
                batch[name] = torch.from_numpy(np.array([row[name] for row in rows], dtype))
        return batch


def where_tokens_are(rows: Sequence[Mapping[str, Any]]) -> NDArray[np.bool_]:
    """`[B, T]`: True where a batch of these rows, padded on the right to the longest, has a token."""
    lengths = np.array([len(row["input_ids"]) for row in rows])
    return np.arange(lengths.max()) < lengths[:, None]


def padded_column(rows: Sequence[Mapping[str, Any]], name: str, there: NDArray[np.bool_], filler: int) -> Tensor:
    """`[B, T]` int64: the rows' column `name` where `there` is True, `filler` elsewhere."""
    padded = np.full(there.shape, filler, np.int64)
    padded[there] = np.concatenate([row[name] for row in rows])
    return torch.from_numpy(padded)


def count_task_items(batch: Mapping[str, Any], num_tasks: int) -> Tensor:
    """How many labelled rows each task has in a batch: `[K]`, on the batch's device, without synchronising with it."""
    task_ids, labels = batch["task_ids"], batch["labels"]
    of_task = task_ids[:, None] == torch.arange(num_tasks, device=task_ids.device)
    return (of_task & ~labels.isnan()[:, None]).sum(dim=0)
