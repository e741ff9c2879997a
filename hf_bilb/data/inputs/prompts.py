"""Prompts of a user's; and inputs that no user has at hand."""

from __future__ import annotations

from typing import Any

from hf_bilb.data.inputs.encoded import Encoded, Wanted
from hf_bilb.data.inputs.given import as_table, check_column
from hf_bilb.data.inputs.kinds import NoInputs, PromptInputs
from hf_bilb.data.own import columns
from hf_bilb.data.own.csv_options import CsvOptions
from hf_bilb.errors import OptionError


def read_prompts(kind: PromptInputs, inputs: Any, csv: CsvOptions) -> list[str]:
    """N texts; raises as `as_table`."""
    table = as_table(inputs, csv, (kind.column,))
    check_column(kind.column, table.features, table.name)
    return columns.texts(table, kind.column)


def encode_prompts(kind: PromptInputs, inputs: Any, tokenizer: Any, wanted: Wanted) -> Encoded:
    """Raises `OptionError`."""
    raise OptionError("evaluate: a language model has no outputs of tasks, hf-bilb train measures its perplexities")


def encode_nothing(kind: NoInputs, inputs: Any, tokenizer: Any, wanted: Wanted) -> Encoded:
    """Raises `OptionError`."""
    raise kind.refusal()
