"""A small smooth multi-task model and its data, the same for every test that trains: deterministic, float64-capable.

The trunk is a two-layer tanh network, the K heads are one linear layer, the losses are `masked_mse`: no kink, no
BatchNorm, so that two ways to compute the same gradient differ by rounding alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from hf_bilb.losses.masked import masked_mse

TASK_NAMES = ["alpha", "beta", "gamma", "delta"]


class SyntheticConfig(PretrainedConfig):
    """Sizes of a `SyntheticModel`; `auxiliary_weight` > 0 adds an auxiliary loss."""

    model_type = "hf_bilb_synthetic"

    def __init__(
        self,
        num_features: int = 6,
        hidden_size: int = 8,
        task_names: list[str] | None = None,
        dropout: float = 0.0,
        auxiliary_weight: float = 0.0,
        **kwargs: Any,
    ) -> None:
        self.num_features = num_features
        self.hidden_size = hidden_size
        self.task_names = list(task_names or TASK_NAMES)
        self.dropout = dropout
        self.auxiliary_weight = auxiliary_weight
        self.keys_to_ignore_at_inference = ["losses", "num_items", "router_features", "auxiliary_loss"]
        super().__init__(**kwargs)


@dataclass
class SyntheticOutput(ModelOutput):
    """Output of `SyntheticModel`; see the contract of losses."""

    losses: Tensor | None = None
    num_items: Tensor | None = None
    logits: Tensor | None = None
    auxiliary_loss: Tensor | None = None


class SyntheticModel(PreTrainedModel):
    """tanh network with K linear heads as one layer; takes `features [B, D]` and `labels [B, K]` with NaN = missing."""

    config_class = SyntheticConfig
    accepts_loss_kwargs = False

    def __init__(self, config: SyntheticConfig) -> None:
        super().__init__(config)
        self.trunk = nn.Sequential(
            nn.Linear(config.num_features, config.hidden_size),
            nn.Tanh(),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden_size, config.hidden_size),
            nn.Tanh(),
        )
        self.heads = nn.Linear(config.hidden_size, len(config.task_names))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.5)
            nn.init.normal_(module.bias, std=0.1)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> SyntheticOutput:
        logits = self.heads(self.trunk(features))
        losses, num_items = (None, None) if labels is None else masked_mse(logits, labels)
        weight = self.config.auxiliary_weight
        auxiliary = weight * logits.square().mean() if weight and labels is not None else None
        return SyntheticOutput(losses=losses, num_items=num_items, logits=logits, auxiliary_loss=auxiliary)


class SyntheticKwargsModel(SyntheticModel):
    """The same with `**kwargs` in its forward, which makes Trainer believe that it scales its loss itself."""

    accepts_loss_kwargs = None

    def forward(self, features: Tensor, labels: Tensor | None = None, **kwargs: Any) -> SyntheticOutput:
        if kwargs:
            raise AssertionError(f"the trainer forwarded {sorted(kwargs)}")
        return super().forward(features, labels)


class SyntheticData(Dataset):
    """Rows `{"features": [D], "labels": [K]}`, from tensors."""

    def __init__(self, features: Tensor, labels: Tensor) -> None:
        self.features, self.labels = features, labels

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"features": self.features[index], "labels": self.labels[index]}


def build_model(
    dtype: torch.dtype = torch.float32, seed: int = 0, kwargs_forward: bool = False, **config: Any
) -> SyntheticModel:
    """A model whose weights depend on `seed` alone."""
    torch.manual_seed(seed)
    cls = SyntheticKwargsModel if kwargs_forward else SyntheticModel
    # Drawn in float64 and rounded: both precisions start from the same model.
    model = cls(SyntheticConfig(**config)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.1 if name.endswith("bias") else 0.5
            parameter.copy_(scale * torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
    return model.to(dtype)


def build_data(
    size: int,
    num_tasks: int = len(TASK_NAMES),
    dtype: torch.dtype = torch.float32,
    missing: float = 0.0,
    num_features: int = 6,
    seed: int = 1,
) -> SyntheticData:
    """`size` rows; task k's targets are smooth functions of the features on its own scale, a share `missing` is NaN."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(size, num_features, dtype=torch.float64, generator=generator)
    mixing = torch.randn(num_features, num_tasks, dtype=torch.float64, generator=generator)
    scales = torch.logspace(-0.3, 0.3, num_tasks, dtype=torch.float64)
    noise = 0.3 * torch.randn(size, num_tasks, dtype=torch.float64, generator=generator)
    labels = scales * (torch.sin(features @ mixing) + noise)
    absent = torch.rand(size, num_tasks, dtype=torch.float64, generator=generator) < missing
    return SyntheticData(features.to(dtype), labels.masked_fill(absent, torch.nan).to(dtype))


def flat_parameters(model: nn.Module) -> Tensor:
    """All parameters as one vector, float64, detached."""
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Relative L2 difference of two vectors."""
    return float((found - expected).norm() / expected.norm())
