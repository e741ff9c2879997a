"""Texts of a user's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_bilb.data.inputs.encoded import Encoded, Wanted, whole_table
from hf_bilb.data.inputs.given import INPUTS, as_table, check_column
from hf_bilb.data.inputs.kinds import TextInputs
from hf_bilb.data.own.files import Table
from hf_bilb.data.own.options import InputOptions
from hf_bilb.data.own.text import check_lengths, first_tokens, labelled_tokens, read_texts
from hf_bilb.data.text.rows import PadTokens
from hf_bilb.data.text.tokenization import Tokens, encode
from hf_bilb.errors import OptionError


def encode_texts(kind: TextInputs, inputs: Any, tokenizer: Any, wanted: Wanted) -> Encoded:
    """Rows with `input_ids`, and of lists of words the places of the words; see `ENCODERS`."""
    table = as_table(inputs, wanted.csv, _unnamed(kind, inputs))
    source = whole_table(table, InputOptions(text=_chosen(kind, table)))
    texts = read_texts(source, need_words=kind.are_words)
    labels = wanted.labels(table)
    for name, tags in ({} if labels is None else labels.tags).items():
        check_lengths(source, texts, tags, wanted.places[name].columns[0])
    tokens = encode(tokenizer, texts.columns, kind.max_length, texts.are_words)
    every = np.arange(len(table.rows))
    values = np.empty((len(every), 0), np.float32) if labels is None else labels.values
    rows = labelled_tokens(tokens, every, values, [] if labels is None else list(labels.tags.values()))
    pad_token_id = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    words = _word_places(tokens, texts.columns[0]) if kind.are_words else None
    return Encoded(rows, PadTokens(pad_token_id), words)


def _chosen(kind: TextInputs, table: Table) -> tuple[str, ...]:
    """The longest choice of columns that the table has."""
    known = table.rows.column_names
    choices = sorted(kind.columns, key=len, reverse=True)
    if found := next((names for names in choices if all(name in known for name in names)), None):
        return found
    # Of several choices the one of which most is there says what is missing.
    wanted = max(kind.columns, key=lambda names: sum(name in known for name in names))
    for name in wanted:
        check_column(name, table.features, table.name)
    return wanted


def _unnamed(kind: TextInputs, inputs: Any) -> tuple[str, ...]:
    """What the texts, or pairs of texts, of a list are called."""
    rows = inputs if isinstance(inputs, Sequence) and not isinstance(inputs, str) else ()
    first = rows[0] if len(rows) else None
    if first is None or isinstance(first, Mapping):
        return kind.columns[0]
    is_pair = isinstance(first, tuple | list) and not kind.are_words
    found = next((names for names in kind.columns if len(names) == 1 + is_pair), None)
    if found is None:
        expected = "one text a row, got pairs" if is_pair else "pairs of texts, got single ones"
        raise OptionError(f"{INPUTS}: expected {expected} ({', '.join(kind.columns[0])})")
    return found


def _word_places(tokens: Tokens, words: Sequence[Sequence[str]]) -> list[NDArray[np.int64]]:
    """Of each row the places of its words' first tokens, -1 of words that were cut off or have no token."""
    assert tokens.word_ids is not None
    first, starts = first_tokens(tokens), np.concatenate([[0], np.cumsum(tokens.lengths)])
    found = []
    for row, of_row in enumerate(words):
        span = slice(starts[row], starts[row + 1])
        places, at = np.full(len(of_row), -1, np.int64), np.flatnonzero(first[span])
        places[tokens.word_ids[span][at]] = at
        found.append(places)
    return found
