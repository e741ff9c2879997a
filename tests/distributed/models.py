"""The model of the distributed tests with router features out of its shared trunk; it notes what it has seen."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_bilb.losses.masked import masked_mse
from tests.synthetic import SyntheticConfig, SyntheticModel, SyntheticOutput

HIDDEN = 8


@dataclass
class FeatureOutput(SyntheticOutput):
    """With features for a router."""

    router_features: Tensor | None = None
    shared_features: Tensor | None = None


class FeatureModel(SyntheticModel):
    """`router_features [B', D]` are the trunk's output for the B' rows with a label, so that ranks differ in their
    number. `passes` notes of each training pass whether it took gradients, and its losses."""

    def __init__(self, config: SyntheticConfig) -> None:
        super().__init__(config)
        if config.batch_norm:
            self.trunk.insert(1, nn.BatchNorm1d(config.hidden_size))
        self.passes: list[tuple[bool, Tensor]] = []

    def get_input_embeddings(self) -> None:
        """There are none; accelerate asks, under FSDP."""

    def get_output_embeddings(self) -> None:
        """There are none."""

    def forward(self, features: Tensor, labels: Tensor) -> FeatureOutput:
        hidden = self.trunk(features)
        if self.training and self.config.dropout:
            # From the other generators that a forward pass may draw from.
            hidden = hidden * (1 + random.random() - np.random.rand())
        logits = self.heads(hidden)
        losses, num_items = masked_mse(logits, labels)
        if self.training:
            self.passes.append((torch.is_grad_enabled(), losses.detach().clone()))
        weight = self.config.auxiliary_weight
        return FeatureOutput(
            losses=losses,
            num_items=num_items,
            logits=logits,
            auxiliary_loss=weight * logits.square().mean() if weight else None,
            router_features=hidden[labels.isfinite().any(dim=1)],
            shared_features=hidden,
        )


def build_feature_model(
    dtype: torch.dtype, batch_norm: bool = False, model_class: type[FeatureModel] = FeatureModel, **config: Any
) -> FeatureModel:
    """The same weights in every process and, but for rounding, every precision."""
    sizes = {"hidden_size": HIDDEN, "num_router_features": HIDDEN}
    model = model_class(SyntheticConfig(batch_norm=batch_norm, **sizes, **config)).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.1 if name.endswith("bias") else 0.5
            parameter.copy_(scale * torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
    return model.to(dtype)
