"""Text to tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hf_bilb.config.pretrained import pretrained_path
from hf_bilb.errors import OptionError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS_AT_ONCE = 10_000  # rows that are tokenized together: their Python lists take about 20 MB


def load_tokenizer(name: str, path: str, for_words: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of `name` (see `pretrained_path`); with `for_words` one that takes lists of words.

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
    return _for_words(tokenizer, folder, f"{path}: {name!r}") if for_words else tokenizer


def _for_words(tokenizer: PreTrainedTokenizerBase, folder: str, what: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    if not tokenizer.is_fast:
        raise OptionError(f"{what} is no fast tokenizer, which lists of words need")
    # Of byte-level tokenizers (RoBERTa): a word begins with a space, but for the first one of a text.
    if getattr(tokenizer, "add_prefix_space", None) is not False:
        return tokenizer
    spaced: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, add_prefix_space=True)
    return spaced


def check_max_length(tokenizer: PreTrainedTokenizerBase, max_length: int, name: str = "") -> None:
    """Raise `OptionError` when rows may become longer than the tokenizer's model takes; `name` is the tokenizer's."""
    if max_length > tokenizer.model_max_length:
        raise OptionError(
            f"data.max_length: {max_length} is not valid, expected at most {tokenizer.model_max_length}, "
            f"as the tokenizer{f' {name!r}' if name else ''} says"
        )


@dataclass(frozen=True)
class Tokens:
    """The tokens of N rows, one row after the other.

    Attributes:
        lengths: `[N]` int64, tokens per row.
        input_ids: `[sum of lengths]` int32.
        token_type_ids: the same in int8; None for tokenizers that make none.
        word_ids: the same in int64, of which word of its row a token is a part, -1 of none; None for texts.
    """

    lengths: NDArray[np.int64]
    input_ids: NDArray[np.int32]
    token_type_ids: NDArray[np.int8] | None
    word_ids: NDArray[np.int64] | None = None


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[Sequence[Any]], max_length: int, are_words: bool = False
) -> Tokens:
    """Tokenize rows.

    Args:
        tokenizer: makes the special tokens, and token types where its model has them.
        texts: one list of N texts, or two for pairs; with `are_words` one list of N lists of words.
        max_length: tokens after which a row is cut (of a pair, the longer text first), special tokens included.
        are_words: the texts are cut into words, and it is asked for which word each token is a part of.

    Cost: about 20,000 rows a second on one core with a fast tokenizer.
    """
    with_types = "token_type_ids" in tokenizer.model_input_names
    lengths: list[int] = []
    input_ids: list[NDArray[np.int32]] = [np.empty(0, np.int32)]
    token_types: list[NDArray[np.int8]] = [np.empty(0, np.int8)]
    word_ids: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    for start in range(0, len(texts[0]), ROWS_AT_ONCE):
        columns = [list(column[start : start + ROWS_AT_ONCE]) for column in texts]
        encoded = tokenizer(
            *columns,
            is_split_into_words=are_words,
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
        if are_words:
            for row in range(len(columns[0])):
                words = encoded.word_ids(row)
                word_ids.append(np.array([-1 if word is None else word for word in words], np.int64))
    return Tokens(
        np.array(lengths, np.int64),
        np.concatenate(input_ids),
        np.concatenate(token_types) if with_types else None,
        np.concatenate(word_ids) if are_words else None,
    )
