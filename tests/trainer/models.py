"""Variants of the synthetic model: router features, BatchNorm, random draws of every kind."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from hf_bilb.losses.masked import masked_mse
from tests.synthetic import SyntheticConfig, SyntheticModel, build_model

M = TypeVar("M", bound=SyntheticModel)


@dataclass
class FeatureOutput(ModelOutput):
    losses: Tensor | None = None
    num_items: Tensor | None = None
    logits: Tensor | None = None
    router_features: Tensor | None = None
    shared_features: Tensor | None = None


class FeatureModel(SyntheticModel):
    """The synthetic model, whose trunk's output is what a feature router looks at."""

    def forward(self, features: Tensor, labels: Tensor | None = None) -> FeatureOutput:  # type: ignore[override]
        hidden = self.trunk(features)
        logits = self.heads(hidden)
        losses, num_items = (None, None) if labels is None else masked_mse(logits, labels)
        return FeatureOutput(
            losses=losses, num_items=num_items, logits=logits, router_features=hidden, shared_features=hidden
        )


class NormalisedModel(SyntheticModel):
    """With BatchNorm, whose buffers a forward pass in training mode changes."""

    def __init__(self, config: SyntheticConfig) -> None:
        super().__init__(config)
        self.trunk.append(nn.BatchNorm1d(config.hidden_size))


class NoisyModel(SyntheticModel):
    """Draws from torch's, Python's and numpy's default generators in every forward pass in training mode."""

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Any:
        if self.training:
            noise = torch.rand(features.shape, dtype=features.dtype)
            features = features + 0.1 * (noise + random.random() + np.random.rand())
        return super().forward(features, labels)


def build(cls: type[M], dtype: torch.dtype = torch.float64, **config: Any) -> M:
    """A model of the class `cls` with the weights of `build_model`."""
    plain = build_model(torch.float64, **config)
    torch.manual_seed(0)
    built = cls(plain.config).double()
    found = built.load_state_dict(plain.state_dict(), strict=False)
    assert not found.unexpected_keys
    return built.to(dtype)
