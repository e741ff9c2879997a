"""Made-up batches of a model's inputs: what it is traced with, and compared on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_bilb.data.inputs.kinds import (
    FeatureInputs,
    ImageInputs,
    InputKind,
    NoInputs,
    SceneInputs,
    TableInputs,
    TextInputs,
)
from hf_bilb.inference.batches import forward_columns

_TRACED_TOKENS = 8
#: Frames of models that take any: the one that is traced, and a larger one.
_FRAMES = ((64, 96), (96, 160))


@dataclass(frozen=True)
class MadeUpInputs:
    """Batches of random values, which a model takes as it takes a user's rows.

    Attributes:
        axes: input -> dimension that is not fixed -> its name.
        make: number of rows, whether they are as long as they can be, and a random generator -> a batch.
        names: those of the inputs that the model takes.
    """

    axes: dict[str, dict[int, str]]
    make: Callable[[int, bool, torch.Generator], dict[str, Tensor]]
    names: frozenset[str] | None

    def batch(self, rows: int, longest: bool, seed: int) -> dict[str, Tensor]:
        """A batch with `rows` rows, the same for the same seed."""
        made = self.make(rows, longest, torch.Generator().manual_seed(seed))
        return {name: values for name, values in made.items() if self.names is None or name in self.names}


def made_up_inputs(kind: InputKind, model: nn.Module, tokenizer: Any) -> MadeUpInputs:
    """The inputs of a model that reads rows of this kind.

    Args:
        kind: one of text, image, table and features; or none, of a model of pixels.
        model: it.
        tokenizer: of texts.
    """
    takes = forward_columns(model)
    if isinstance(kind, TextInputs):
        return _texts(kind, tokenizer, takes)
    if isinstance(kind, TableInputs):
        return _table(kind, takes)
    if isinstance(kind, FeatureInputs):
        return _features(kind, takes)
    if isinstance(kind, SceneInputs):
        return _images(kind.size, takes)
    assert isinstance(kind, ImageInputs | NoInputs)  # others are refused before the model is loaded
    side = kind.image_size if isinstance(kind, ImageInputs) else getattr(model.config, "image_size", None)
    return _images(None if side is None else (side, side), takes)


def _texts(kind: TextInputs, tokenizer: Any, takes: frozenset[str] | None) -> MadeUpInputs:
    names = ["input_ids", "attention_mask", *(["token_type_ids"] * ("token_type_ids" in tokenizer.model_input_names))]
    padding = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def make(rows: int, longest: bool, random: torch.Generator) -> dict[str, Tensor]:
        length = kind.max_length if longest else min(_TRACED_TOKENS, kind.max_length)
        lengths = torch.randint(1, length + 1, (rows, 1), generator=random)
        lengths[0] = length
        mask = (torch.arange(length) < lengths).long()
        ids = torch.randint(len(tokenizer), (rows, length), generator=random)
        made = {"input_ids": torch.where(mask == 1, ids, padding), "attention_mask": mask}
        made["token_type_ids"] = torch.randint(2, (rows, length), generator=random) * mask
        return {name: made[name] for name in names}

    return MadeUpInputs({name: {0: "batch", 1: "sequence"} for name in names}, make, takes)


def _table(kind: TableInputs, takes: frozenset[str] | None) -> MadeUpInputs:
    """A fifth of the numbers is missing, and some words are not known."""

    def make(rows: int, longest: bool, random: torch.Generator) -> dict[str, Tensor]:
        made = {}
        if kind.numeric:
            numbers = torch.randn(rows, len(kind.numeric), generator=random)
            missing = torch.rand(numbers.shape, generator=random) < 0.2
            made["numeric"] = torch.where(missing, torch.nan, numbers)
        if kind.categorical:
            codes = [torch.randint(len(known) + 1, (rows,), generator=random) for known in kind.categories]
            made["categorical"] = torch.stack(codes, dim=1)
        return made

    return MadeUpInputs({name: {0: "batch"} for name in ("numeric", "categorical")}, make, takes)


def _features(kind: FeatureInputs, takes: frozenset[str] | None) -> MadeUpInputs:
    def make(rows: int, longest: bool, random: torch.Generator) -> dict[str, Tensor]:
        parts = [torch.randn(rows, len(kind.numeric), generator=random)]
        for known in kind.categories:
            codes = torch.randint(len(known) + 1, (rows,), generator=random)
            parts.append(torch.eye(len(known) + 1)[codes][:, :-1])
        return {"features": torch.cat(parts, dim=1)}

    return MadeUpInputs({"features": {0: "batch"}}, make, takes)


def _images(size: tuple[int, int] | None, takes: frozenset[str] | None) -> MadeUpInputs:
    """Of one size, or where none is said of any."""

    def make(rows: int, longest: bool, random: torch.Generator) -> dict[str, Tensor]:
        frame = _FRAMES[longest] if size is None else size
        return {"pixel_values": torch.rand(rows, 3, *frame, generator=random)}

    axes = {0: "batch"} if size is not None else {0: "batch", 2: "height", 3: "width"}
    return MadeUpInputs({"pixel_values": axes}, make, takes)
