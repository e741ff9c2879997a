"""A multilayer perceptron on molecular descriptors: one shared trunk, one small head per property."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from hf_bilb.losses.contract import check_task_names
from hf_bilb.losses.masked import masked_mse
from hf_bilb.losses.task_names import QM9_TARGETS
from hf_bilb.models.base import MultiTaskModel, check_dropout, check_size
from hf_bilb.models.heads import TaskHeads
from hf_bilb.models.outputs import KEYS_TO_IGNORE_AT_INFERENCE, MultiTaskOutput
from hf_bilb.models.spec import ModelSpec


@dataclass(frozen=True)
class Qm9MlpOptions:
    """What a recipe's `model:` section may set.

    Attributes:
        hidden_size: width of the trunk.
        num_layers: hidden layers of the trunk.
        head_size: hidden units of each task's head.
        dropout: after every layer of the trunk, in [0, 1).
    """

    hidden_size: int = 256
    num_layers: int = 3
    head_size: int = 16
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _check_sizes(self.hidden_size, self.num_layers, self.head_size, self.dropout)


class Qm9MlpConfig(PretrainedConfig):
    """Sizes of `Qm9MlpModel`.

    Args:
        num_features: length of a molecule's descriptor.
        task_names: the K properties, in the order of the labels' columns.
        feature_means, feature_stds: of the training molecules' descriptors, so that the saved model knows its scales.
        label_means, label_stds: of the training molecules' properties, in the data set's units.
        hidden_size: width of the trunk.
        num_layers: hidden layers of the trunk.
        head_size: hidden units of each task's head.
        dropout: after every layer of the trunk, in [0, 1).
        kwargs: what `PretrainedConfig` takes.

    Raises:
        OptionError: a size below 1, a dropout outside [0, 1), or task names that are empty or stand twice.
    """

    model_type = "qm9_mlp"
    keys_to_ignore_at_inference: ClassVar[list[str]] = list(KEYS_TO_IGNORE_AT_INFERENCE)

    def __init__(
        self,
        num_features: int = 34,
        task_names: Sequence[str] = QM9_TARGETS,
        feature_means: Sequence[float] | None = None,
        feature_stds: Sequence[float] | None = None,
        label_means: Sequence[float] | None = None,
        label_stds: Sequence[float] | None = None,
        hidden_size: int = Qm9MlpOptions.hidden_size,
        num_layers: int = Qm9MlpOptions.num_layers,
        head_size: int = Qm9MlpOptions.head_size,
        dropout: float = Qm9MlpOptions.dropout,
        **kwargs: Any,
    ) -> None:
        _check_sizes(hidden_size, num_layers, head_size, dropout)
        check_size("num_features", num_features)
        self.num_features = num_features
        self.task_names = list(check_task_names(task_names))
        self.feature_means, self.feature_stds = feature_means, feature_stds
        self.label_means, self.label_stds = label_means, label_stds
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.head_size = head_size
        self.dropout = dropout
        super().__init__(**kwargs)


def _check_sizes(hidden_size: int, num_layers: int, head_size: int, dropout: float) -> None:
    for key, value in (("hidden_size", hidden_size), ("num_layers", num_layers), ("head_size", head_size)):
        check_size(key, value)
    check_dropout(dropout)


class Qm9MlpModel(MultiTaskModel):
    """Predicts K standardised properties from standardised descriptors.

    Cost: one forward and one backward whatever K is; heads and losses are vectorised over the tasks.
    """

    config_class = Qm9MlpConfig
    base_model_prefix = "qm9_mlp"
    main_input_name = "features"

    def __init__(self, config: Qm9MlpConfig) -> None:
        super().__init__(config)
        layers: list[nn.Module] = []
        width = config.num_features
        for _ in range(config.num_layers):
            layers += [nn.Linear(width, config.hidden_size), nn.SiLU(), nn.Dropout(config.dropout)]
            width = config.hidden_size
        self.trunk = nn.Sequential(*layers)
        self.heads = TaskHeads(width, len(config.task_names), config.head_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # He et al.: keeps the variance through the layers, for SiLU as well. With torch's default (a sixth of that
        # variance) the errors after a minute of training are 5 % larger.
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
        elif isinstance(module, TaskHeads):
            module.reset_output_layers()

    def forward(
        self, features: Tensor, labels: Tensor | None = None, return_dict: bool | None = None
    ) -> MultiTaskOutput | tuple[Tensor, ...]:
        """Predictions, and with labels the loss of each task.

        Args:
            features: `[B, num_features]`.
            labels: `[B, K]`, NaN where missing; None for predictions alone.
            return_dict: False for a plain tuple of what is there; None follows the config.

        Returns:
            `MultiTaskOutput`: `logits [B, K]`, and with labels the mean squared errors `losses [K]`,
            `num_items [K]` and `router_features [B, hidden_size]` (the trunk's output).
        """
        hidden = self.trunk(features)
        logits = self.heads(hidden)
        losses = None if labels is None else masked_mse(logits, labels)
        return self._output(logits, losses, hidden, return_dict)

    @torch.no_grad()
    def predict(self, descriptors: Tensor) -> Tensor:
        """Properties `[B, K]` in the data set's units, from descriptors `[B, num_features]` as they come.

        Raises:
            ValueError: when the config has no means and standard deviations (the model was not trained by a recipe).
        """
        config = self.config
        scales = [config.feature_means, config.feature_stds, config.label_means, config.label_stds]
        if any(scale is None for scale in scales):
            raise ValueError("the config holds no feature and label scales; call the model on standardised features")
        x_mean, x_std, y_mean, y_std = (descriptors.new_tensor(scale) for scale in scales)
        features = ((descriptors - x_mean) / x_std).to(self.dtype)
        return self(features).logits.to(descriptors.dtype) * y_std + y_mean


SPEC = ModelSpec(Qm9MlpConfig, Qm9MlpModel, options=Qm9MlpOptions)
