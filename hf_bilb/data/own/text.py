"""Texts of a source as tokens, with labels of rows and of words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hf_bilb.data.own import columns
from hf_bilb.data.own.files import Table
from hf_bilb.data.own.labels import Tags
from hf_bilb.data.own.source import Source
from hf_bilb.data.text.rows import TokenRows
from hf_bilb.data.text.tokenization import Tokens, encode
from hf_bilb.errors import OptionError
from hf_bilb.losses.masked import MISSING_INTEGER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Texts:
    """The texts of N rows: one or two columns of texts, or one of lists of words.

    Attributes:
        columns: `[1 or 2][N]`, texts, or lists of words.
        are_words: which of the two.
    """

    columns: tuple[list[Any], ...]
    are_words: bool

    def take(self, rows: Rows) -> Texts:
        """The rows of these numbers, in their order."""
        return Texts(tuple([column[row] for row in rows] for column in self.columns), self.are_words)

    @property
    def num_empty(self) -> int:
        """Rows without any text."""
        return sum(not any(row) for row in zip(*self.columns, strict=True))


def read_texts(source: Source, need_words: bool) -> Texts:
    """The texts of all rows; an empty cell is the empty text.

    Raises:
        OptionError: texts where words are needed, or words next to a second column; names file and column.
    """
    names = source.options.inputs.texts
    are_words = need_words or any(columns.holds_lists(table, name) for name in names for table in source.tables)
    if are_words and len(names) > 1:
        raise OptionError(f"{source.options.path}.inputs.text: lists of words are one column, got {', '.join(names)}")
    read: Callable[[Table, str], list[Any]] = columns.word_lists if are_words else columns.texts
    return Texts(tuple(list(chain.from_iterable(source.each(read, name))) for name in names), are_words)


def check_lengths(source: Source, texts: Texts, tags: Tags, column: str) -> None:
    """Raise `OptionError` for the first row whose list of tags has another length than its list of words."""
    words = np.array([len(row) for row in texts.columns[0]], np.int64)
    wrong = np.flatnonzero((tags.lengths >= 0) & (tags.lengths != words))
    if wrong.size:
        row = int(wrong[0])
        raise OptionError(
            f"data: {source.place(row)}: column {column!r} has {tags.lengths[row]} tags, "
            f"{source.options.inputs.texts[0]!r} has {words[row]} words"
        )


def tokenize_texts(
    tokenizer: PreTrainedTokenizerBase,
    texts: Texts,
    rows: Rows,
    labels: NDArray[np.float32],
    tags: Sequence[Tags | None],
    max_length: int,
) -> TokenRows:
    """Some rows as tokens, with their `labels [N, W]`, and labels of the tokens for M tasks.

    The first token of a word has the word's label, the others have none, nor have words that were cut off. A task
    without tags (of another source) has no labels.
    """
    chosen = texts.take(rows)
    return labelled_tokens(encode(tokenizer, chosen.columns, max_length, chosen.are_words), rows, labels, tags)


def labelled_tokens(tokens: Tokens, rows: Rows, labels: NDArray[np.float32], tags: Sequence[Tags | None]) -> TokenRows:
    """The tokens of `rows` with their labels, see `tokenize_texts`."""
    missing = np.full(len(tokens.input_ids), MISSING_INTEGER)
    of_tasks = [missing if one is None else aligned_tags(tokens, one, rows) for one in tags]
    tag_labels = np.stack(of_tasks, axis=1) if of_tasks else None
    return TokenRows(tokens.lengths, tokens.input_ids, tokens.token_type_ids, None, labels, tag_labels)


def aligned_tags(tokens: Tokens, tags: Tags, rows: Rows) -> NDArray[np.int64]:
    """`[sum of lengths]`: the labels of the tokens of `rows`."""
    row_of = np.repeat(np.arange(len(rows)), tokens.lengths)
    labelled = first_tokens(tokens) & (tags.lengths[rows][row_of] >= 0)
    labels = np.full(len(labelled), MISSING_INTEGER)
    words = tokens.word_ids
    assert words is not None  # of lists of words
    labels[labelled] = tags.codes[tags.starts[rows][row_of[labelled]] + words[labelled]]
    return labels


def first_tokens(tokens: Tokens) -> NDArray[np.bool_]:
    """`[sum of lengths]`: whether a token is the first one of its word, of rows of lists of words."""
    assert tokens.word_ids is not None
    row_of = np.repeat(np.arange(len(tokens.lengths)), tokens.lengths)
    words = tokens.word_ids
    is_first = np.ones(len(words), bool)
    is_first[1:] = (words[1:] != words[:-1]) | (row_of[1:] != row_of[:-1])
    return is_first & (words >= 0)
