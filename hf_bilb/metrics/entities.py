"""F1 of entities: spans of tokens that B-, I- and O tags mark, right when type, first and last token are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from hf_bilb.errors import MetricError, OptionError
from hf_bilb.losses.masked import MISSING_INTEGER
from hf_bilb.metrics.base import Accumulator

OUTSIDE, BEGIN, INSIDE = "O", "B-", "I-"


def are_bio_tags(names: Sequence[str]) -> bool:
    """Whether all names are `O`, `B-<type>` or `I-<type>`, and one at least has a type."""
    typed = [name for name in names if name[:2] in (BEGIN, INSIDE) and len(name) > 2]
    return bool(typed) and all(name == OUTSIDE or name in typed for name in names)


class EntityF1(Accumulator):
    """`f1_entity`: 2 hits / (entities predicted + entities there), over all types and rows together (micro F1).

    An entity is a `B-<type>` and the `I-<type>` of the same type behind it. An `I-<type>` that continues nothing begins
    an entity too, as in the CoNLL-2000 evaluation script and in seqeval's default mode; so tags where `B-` only parts
    neighbours (IOB1) are read as well. A hit has the type, the first and the last token of an entity that is there.

    `update(predictions, labels)` takes logits `[B, T, C]` and tags `[B, T]`, -100 where a token has none: padding, the
    further pieces of a word. Tokens without a tag are left out before spans are formed, so that a word's pieces do not
    part an entity; no entity goes beyond its row. A token with a NaN logit is predicted to be in no entity.

    Value: in [0, 1]; 0.0 where nothing is predicted and nothing there; no value without any tag.

    Args:
        tags: the names of the C tags.

    State: 5 integers. Cost of a batch: a sort of `[B, T]` and some operations on it, no device synchronisation.

    Raises:
        OptionError: names that are no such tags.

    Source: Tjong Kim Sang and De Meulder, Introduction to the CoNLL-2003 shared task: language-independent named entity
    recognition (CoNLL 2003), section 2.3.
    """

    metric_names: tuple[str, ...] = ("f1_entity",)
    higher_is_better: ClassVar[bool] = True
    _counts: Tensor

    def __init__(self, tags: Sequence[str]) -> None:
        if not are_bio_tags(tags):
            raise OptionError(f"tags: {', '.join(tags)} are not valid, expected O, B-<type> and I-<type>")
        types = list(dict.fromkeys(name[2:] for name in tags if name != OUTSIDE))
        # Of each tag, then of "no tag": number of its type, -1 for none; whether it begins an entity.
        self._types = torch.tensor([-1 if name == OUTSIDE else types.index(name[2:]) for name in tags] + [-1])
        self._begins = torch.tensor([name.startswith(BEGIN) for name in tags] + [False])
        self.reset()

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        size = len(self._types) - 1
        if predictions.ndim != 3 or predictions.shape != (*labels.shape, size):
            raise MetricError(
                f"predictions {tuple(predictions.shape)} and labels {tuple(labels.shape)}, "
                f"expected [B, T, {size}] and [B, T]"
            )
        if labels.numel() == 0:
            return
        logits = predictions.detach()
        predicted = logits.argmax(dim=-1).masked_fill(logits.isnan().any(dim=-1), size)
        there = labels != MISSING_INTEGER
        known = (labels >= 0) & (labels < size)
        # The tagged tokens of each row first, in their order.
        order = (~there).long().argsort(dim=1, stable=True)
        actual, predicted = (tags.where(known & there, size).long().gather(1, order) for tags in (labels, predicted))
        self._add(self._spans(actual), self._spans(predicted), there, there & ~known)

    def _spans(self, tags: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of tags `[B, T]`: where an entity starts, the type at each token, and where what starts there ends."""
        self._types, self._begins = self._types.to(tags.device), self._begins.to(tags.device)
        types = self._types[tags]
        starts = (types >= 0) & (self._begins[tags] | (types != functional.pad(types[:, :-1], (1, 0), value=-1)))
        continues = (types >= 0) & ~starts
        length = tags.shape[1]
        stops = torch.arange(length, device=tags.device).where(~continues, length)
        after = functional.pad(stops[:, 1:], (0, 1), value=length)
        return starts, types, after.flip(1).cummin(dim=1).values.flip(1)

    def _add(
        self,
        actual: tuple[Tensor, Tensor, Tensor],
        predicted: tuple[Tensor, Tensor, Tensor],
        there: Tensor,
        invalid: Tensor,
    ) -> None:
        hits = actual[0] & predicted[0] & (actual[1] == predicted[1]) & (actual[2] == predicted[2])
        counts = torch.stack([cells.sum() for cells in (hits, predicted[0], actual[0], there, invalid)])
        self._counts = self._counts.to(counts.device) + counts

    def compute(self) -> dict[str, float]:
        hits, predicted, actual, there, invalid = self._counts.tolist()
        if invalid:
            expected = f"tags 0 to {len(self._types) - 2}, -100 where missing"
            raise MetricError(f"labels: {invalid} are not valid, expected {expected}")
        if not there:
            return {}
        return {"f1_entity": 2 * hits / (predicted + actual) if predicted + actual else 0.0}

    def reset(self) -> None:
        # Hits, predicted entities, entities there; tokens with a tag, and with one that is none.
        self._counts = torch.zeros(5, dtype=torch.int64)

    def merge(self, other: EntityF1) -> None:
        self.check_mergeable(other)
        self._counts = self._counts + other._counts.to(self._counts.device)
