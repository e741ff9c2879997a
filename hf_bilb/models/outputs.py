"""What our models return."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput

# Fields that evaluation must not collect as predictions; a config says so in `keys_to_ignore_at_inference`.
KEYS_TO_IGNORE_AT_INFERENCE = ("losses", "num_items", "router_features", "auxiliary_loss", "shared_features")


@dataclass
class MultiTaskOutput(ModelOutput):
    """Output of a model with K tasks, as `BilevelMTLTrainer` reads it.

    Attributes:
        losses: `[K]` in the order of the config's `task_names`, masked means; only with labels.
        num_items: `[K]` valid items behind each loss; only with labels.
        logits: the predictions, `[B, K]` where every task predicts one number, or one tensor for each task.
        router_features: `[B, D]`, the shared representation, for balancers that route by features; only with labels.
        auxiliary_loss: scalar that is added to the balanced loss as it is, or None.
        shared_features: what the heads are given, for gradient methods with `gradients: features`; only with labels.
    """

    losses: Tensor | None = None
    num_items: Tensor | None = None
    logits: Tensor | tuple[Tensor, ...] | None = None
    router_features: Tensor | None = None
    auxiliary_loss: Tensor | None = None
    shared_features: Tensor | tuple[Tensor, ...] | None = None
