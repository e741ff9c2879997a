"""`LoadedLanguageModel`: what `hf_bilb.load` gives for a causal language model."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_bilb.data.inputs.format import DataFormat
from hf_bilb.data.inputs.kinds import PromptInputs
from hf_bilb.data.inputs.prompts import read_prompts
from hf_bilb.data.text.instruction_rows import leading_token
from hf_bilb.errors import OptionError
from hf_bilb.inference.batches import check_batch_size, device_of, with_progress
from hf_bilb.inference.responses import Responses


class LoadedLanguageModel:
    """A trained language model that answers prompts.

    Attributes:
        model: of transformers, or with adapters of peft; in evaluation mode.
        tokenizer: its tokenizer.
        format: how rows become prompts.
        folder: that it was loaded from.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, data_format: DataFormat, folder: Path) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.format = data_format
        self.folder = folder

    def predict(
        self,
        inputs: Any,
        batch_size: int = 8,
        progress: bool | None = None,
        max_new_tokens: int = 128,
        **generate: Any,
    ) -> Responses:
        """The responses to prompts, which are tokenized as in training.

        Args:
            inputs: a list of prompts; or a file, DataFrame, data set or list of dicts with a column `prompt`.
            batch_size: prompts at a time.
            progress: as of `LoadedModel.predict`.
            max_new_tokens: at most so many tokens of a response.
            generate: further arguments of transformers' `generate` (`do_sample=True`, `num_beams=4`, ...); without
                them the most probable token is taken at every step.

        Raises:
            OptionError: a column that is missing; arguments that `generate` does not take.
        """
        check_batch_size(batch_size)
        kind = self.format.inputs
        assert isinstance(kind, PromptInputs)
        prompts = read_prompts(kind, inputs, self.format.csv)
        settings = {"do_sample": False, "max_new_tokens": max_new_tokens, **generate}
        chunks = (prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size))
        responses = []
        for chunk in with_progress(chunks, math.ceil(len(prompts) / batch_size), progress):
            responses += self._answer(kind, chunk, settings)
        return Responses(responses)

    def columns(self, all_classes: bool = False) -> list[str]:
        """The names in `Responses.to_columns`."""
        return list(Responses([]).to_columns())

    def evaluate(self, inputs: Any, batch_size: int = 8, progress: bool | None = None) -> dict[str, float]:
        """Raises `OptionError`: perplexities are measured by `hf-bilb train`."""
        raise OptionError("evaluate: a language model has no tasks' outputs; its perplexities are in results.json")

    def tokens_of(self, prompt: str) -> list[int]:
        """The tokens of a prompt: what stands before a response in training."""
        kind = self.format.inputs
        assert isinstance(kind, PromptInputs)
        if not kind.in_template:
            own = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
            return [*leading_token(self.tokenizer), *own]
        turns = [{"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _answer(self, kind: PromptInputs, prompts: list[str], settings: dict[str, Any]) -> list[str]:
        room = max(kind.max_length - 1, 1)
        rows = [self.tokens_of(prompt)[-room:] for prompt in prompts]
        ids, mask = self._padded(rows)
        pad = self._pad_token_id
        model: Any = self.model
        with torch.inference_mode(), _one_line_errors():
            written = model.generate(input_ids=ids, attention_mask=mask, pad_token_id=pad, **settings)
        return list(self.tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True))

    @property
    def _pad_token_id(self) -> int:
        found = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if found is None else found)

    def _padded(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """On the left: a response begins where its prompt ends."""
        width, device = max(max(map(len, rows)), 1), device_of(self.model)
        ids = torch.full((len(rows), width), self._pad_token_id)
        mask = torch.zeros((len(rows), width), dtype=torch.int64)
        for place, row in enumerate(rows):
            if row:
                ids[place, -len(row) :] = torch.tensor(row)
                mask[place, -len(row) :] = 1
        return ids.to(device), mask.to(device)

    def __repr__(self) -> str:
        return f"LoadedLanguageModel({str(self.folder)!r})"


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """What `generate` says of arguments that it does not take."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise OptionError(f"predict: {' '.join(str(error).split())}") from None
