"""Prompts and responses as tokens for a causal language model, and batches of them: padded, or packed into one row.

| column | padded | packed |
|---|---|---|
| `input_ids` | `[B, T]` | `[1, N]`, the examples one after the other |
| `attention_mask` | `[B, T]`, 0 where padded | - |
| `position_ids` | - | `[1, N]`, from 0 in every example |
| `use_cache` | - | False: with a cache `transformers` would take the row for a single example |
| `token_labels` | `[B, T]`, -100: no item | `[1, N]` |
| `task_ids` | `[B]` | `[1, N]`, the task of each token |

Packed rows have no padding. `transformers` keeps the examples apart by the position ids: FlashAttention runs them as
separate sequences, at the cost of each; `sdpa` and `eager` mask them block by block, at the cost of a row of N tokens
(N^2), which pays where examples are short. Models that do neither are refused (`models.token_influence`). Packed and
padded batches have the same losses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from hf_bilb.data.text.rows import PadTokens, SequenceRows
from hf_bilb.data.text.tokenization import ROWS_AT_ONCE
from hf_bilb.errors import OptionError
from hf_bilb.losses.tokens import IGNORED, TOKEN_LABELS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class InstructionRows(SequenceRows):
    """Examples whose tokens have labels.

    A row has `input_ids [T]`, `token_labels [T]` and the scalar `task_ids`; packed also `position_ids [T]`.

    Args:
        lengths: `[N]`, tokens per example.
        ignored: `[N]`, how many of its first tokens are no items: the prompt's, and 1 at least, which nothing predicts.
        input_ids: `[sum of lengths]` int32, the examples one after the other.
        task_ids: `[N]` int64.
        packed: rows bring `position_ids`, by which `PackExamples` packs them.

    Raises:
        ValueError: when the arrays do not fit together.
    """

    task_ids: NDArray[np.int64]

    def __init__(
        self,
        lengths: NDArray[np.int64],
        ignored: NDArray[np.int64],
        input_ids: NDArray[np.int32],
        task_ids: NDArray[np.int64],
        packed: bool = False,
    ) -> None:
        if not len(lengths) == len(ignored) == len(task_ids) or len(input_ids) != lengths.sum():
            raise ValueError(f"{len(lengths)} lengths of {lengths.sum()} tokens do not fit {len(input_ids)} input_ids")
        super().__init__(lengths, {"input_ids": input_ids}, task_ids)
        self.ignored = ignored
        self.packed = packed

    def _row(self, place: int) -> dict[str, Any]:
        tokens = self._tokens(place)["input_ids"]
        labels = tokens.astype(np.int64)
        labels[: self.ignored[place]] = IGNORED
        positions = {"position_ids": np.arange(len(tokens))} if self.packed else {}
        return {"input_ids": tokens, TOKEN_LABELS: labels, "task_ids": self.task_ids[place], **positions}

    def items(self, task_id: int) -> NDArray[np.integer]:
        """The tokens that are items, of one task, as they follow each other."""
        within = np.arange(self._starts[-1]) - np.repeat(self._starts[:-1], self.lengths)
        counts = within >= np.repeat(self.ignored, self.lengths)
        return self.columns["input_ids"][counts & np.repeat(self.task_ids == task_id, self.lengths)]


@dataclass(frozen=True)
class Truncated:
    """How many rows were cut to fit, and how many of those lost a part of the response."""

    rows: int
    responses: int


def tokenize_instructions(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    responses: Sequence[str],
    task_ids: NDArray[np.int64],
    max_length: int,
    train_on_prompt: bool = False,
    packed: bool = False,
    in_template: bool = False,
) -> tuple[InstructionRows, Truncated]:
    """An example is [BOS, where the tokenizer puts one] prompt response EOS; the two texts are tokenized apart.

    What is longer than `max_length` loses tokens of the prompt, its first ones; what then still is loses the end of the
    response.

    Args:
        prompts, responses: N texts each, joined as they are; no response is empty.
        task_ids: `[N]`.
        train_on_prompt: tokens of the prompt are items as well.
        packed: see `InstructionRows`.
        in_template: the texts hold the special tokens of a chat template already, BOS and EOS are not added.

    Raises:
        OptionError: a tokenizer without an end-of-sequence token.

    Cost: about 20,000 short rows a second on one core with a fast tokenizer.
    """
    if tokenizer.eos_token_id is None:
        raise OptionError("data.tokenizer: has no end-of-sequence token, which ends a response")
    bos, eos = ([], []) if in_template else (leading_token(tokenizer), [tokenizer.eos_token_id])
    tokens: list[NDArray[np.int32]] = [np.empty(0, np.int32)]
    ignored: list[int] = []
    cut = cut_responses = 0
    for prompt, response in zip(_encoded(tokenizer, prompts), _encoded(tokenizer, responses), strict=True):
        answer = [*response, *eos]
        room = max_length - len(bos) - len(answer)
        kept = prompt[max(len(prompt) - max(room, 0), 0) :]
        cut += len(prompt) > room
        cut_responses += room < 0
        example = [*bos, *kept, *answer][:max_length]
        ignored.append(1 if train_on_prompt else max(len(bos) + len(kept), 1))
        tokens.append(np.array(example, np.int32))
    lengths = np.array([len(example) for example in tokens[1:]], np.int64)
    rows = InstructionRows(lengths, np.array(ignored, np.int64), np.concatenate(tokens), task_ids, packed)
    return rows, Truncated(cut, cut_responses)


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Iterator[list[int]]:
    for start in range(0, len(texts), ROWS_AT_ONCE):
        yield from tokenizer(
            list(texts[start : start + ROWS_AT_ONCE]),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # it would warn of rows that are cut here
        )["input_ids"]


def leading_token(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-sequence token, where the tokenizer puts it in front of a text."""
    around = tokenizer("")["input_ids"]
    return around[:1] if around and around[0] == tokenizer.bos_token_id else []


# --- batches ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackExamples(PadTokens):
    """Collator: rows of `InstructionRows` that bring `position_ids` to one packed row, others to a padded batch.

    Validation and test rows bring none: of a packed row an evaluation under several ranks could not drop the examples
    that only fill the last batch up.
    """

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch as in the module's docstring."""
        if "position_ids" not in rows[0]:
            return super().__call__(rows)
        columns = {
            name: np.concatenate([row[name] for row in rows]) for name in ("input_ids", "position_ids", TOKEN_LABELS)
        }
        # The first label of an example is -100: nothing is predicted across the border.
        columns["task_ids"] = np.repeat(
            np.array([row["task_ids"] for row in rows], np.int64), [len(row["input_ids"]) for row in rows]
        )
        packed = {name: torch.from_numpy(column.astype(np.int64))[None] for name, column in columns.items()}
        return {**packed, "use_cache": False}
