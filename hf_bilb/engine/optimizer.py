"""The balancer's own optimizer: apart from the model's, stepped by us, its state explicit from the start."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from hf_bilb.engine.monitor import TOO_LARGE_SQUARED


class OwnOptimizer:
    """`torch.optim.Adam` or `SGD` over the parameters of an objective, fed with gradients that the driver computed.

    Gradients of several micro-batches are combined as their item-weighted mean. `weight_decay` is an L2 penalty, whose
    gradient is added to theirs (no AdamW). In an update whose losses, or whose gradients, are beyond `TOO_LARGE` or not
    finite, the gradients count as zero: SGD stays, Adam goes on by its momentum, as for a task that is absent.

    State: the optimizer's moments, allocated here (torch would do it at the first step, when a checkpoint may already
    have been asked for).

    Attributes:
        has_gradient: whether one has been accumulated since the last step.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        kind: Literal["adam", "sgd"],
        learning_rate: float | Literal["follow_model"],
        weight_decay: float = 0.0,
    ) -> None:
        self._names = list(parameters)
        self._parameters: list[Tensor] = list(parameters.values())
        self._follows = learning_rate == "follow_model"
        self._model_optimizer: torch.optim.Optimizer | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        if self._parameters:
            rate = 0.0 if learning_rate == "follow_model" else learning_rate
            cls: type[torch.optim.Adam] | type[torch.optim.SGD] = (
                torch.optim.Adam if kind == "adam" else torch.optim.SGD
            )
            self._optimizer = cls(self._parameters, lr=rate, weight_decay=weight_decay)
            if kind == "adam":
                self._load({i: self._fresh_moments(p) for i, p in enumerate(self._parameters)})
        self._mean: list[Tensor] = []
        self._num_items: Tensor | None = None  # behind the mean
        self.has_gradient = False
        self._zero = torch.zeros((), dtype=self._parameters[0].dtype) if self._parameters else torch.zeros(())
        self._squares = self._zero

    @staticmethod
    def _fresh_moments(parameter: Tensor) -> dict[str, Tensor]:
        return {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Remember the model's optimizer, whose learning rate `follow_model` takes."""
        self._model_optimizer = optimizer

    def accumulate(self, gradients: Sequence[Tensor], num_items: Tensor, squares: Tensor) -> None:
        """Add one micro-batch's gradients, weighted by its items `[K]`, to the running mean; no device sync.

        Args:
            squares: scalar, the sum of the squares of the losses that they are of.
        """
        if self._optimizer is None or not gradients:
            return
        self.has_gradient = True
        if self._num_items is None:
            # A single micro-batch keeps its gradient to the last bit.
            self._mean, self._num_items, self._squares = list(gradients), num_items, squares
            return
        weight = num_items.sum()
        total = self._num_items.sum() + weight
        ratio = torch.where(total > 0, weight / total.clamp(min=torch.finfo(total.dtype).tiny), torch.zeros_like(total))
        self._mean = [
            mean + ratio.to(mean.dtype) * (new - mean) for mean, new in zip(self._mean, gradients, strict=True)
        ]
        self._num_items, self._squares = total, self._squares + squares

    def subtract(self, gradients: Sequence[Tensor], factor: float) -> None:
        """Take `factor` times `gradients` off the accumulated mean."""
        self._mean = [mean - factor * gradient for mean, gradient in zip(self._mean, gradients, strict=True)]

    def step(self) -> Tensor | None:
        """One optimizer step with the accumulated gradients, which are then forgotten.

        Returns:
            bool scalar on the device, False where the gradients counted as zero; None when there were none.
        """
        if self._optimizer is None or not self.has_gradient:
            return None
        if self._follows:
            if self._model_optimizer is None:
                raise RuntimeError(
                    "learning_rate: follow_model needs balancer.bind(optimizer=...) with the model's optimizer"
                )
            for group in self._optimizer.param_groups:
                group["lr"] = self._model_optimizer.param_groups[0]["lr"]
        gradients = [
            gradient.to(parameter.dtype) for parameter, gradient in zip(self._parameters, self._mean, strict=True)
        ]
        usable = _sum_of_squares(gradients, self._squares) < TOO_LARGE_SQUARED
        self._descend(self._optimizer, [torch.where(usable, gradient, self._zero) for gradient in gradients])
        self.discard()
        return usable

    @torch.no_grad()
    def _descend(self, optimizer: torch.optim.Optimizer, gradients: list[Tensor]) -> None:
        if isinstance(optimizer, torch.optim.Adam):
            # What its `step` calls, with what it has at hand: its profiling and its hooks take longer than K numbers.
            group, moments = optimizer.param_groups[0], [optimizer.state[p] for p in self._parameters]
            averages, squares, steps = ([each[key] for each in moments] for key in ("exp_avg", "exp_avg_sq", "step"))
            beta1, beta2 = group["betas"]
            adam(
                self._parameters, gradients, averages, squares, [], steps,
                amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"],
                eps=group["eps"], maximize=False, foreach=len(gradients) > 1,
            )  # fmt: skip
            return
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()

    @contextmanager
    def accumulation_kept(self) -> Iterator[None]:
        """Whatever is accumulated, stepped or discarded inside, the accumulated gradients are as before afterwards."""
        mean, num_items, squares = self._mean, self._num_items, self._squares
        try:
            yield
        finally:
            self.discard()
            self._mean, self._num_items, self._squares = mean, num_items, squares
            self.has_gradient = num_items is not None

    def discard(self) -> None:
        """Forget the accumulated gradients."""
        self._mean, self._num_items, self.has_gradient = [], None, False
        for parameter in self._parameters:
            parameter.grad = None

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        """Bring the moments where the parameters are (the step counter stays where torch wants it)."""
        if self._optimizer is None:
            return
        self._zero = self._zero.to(device=device, dtype=dtype)
        for state in self._optimizer.state.values():
            for key, value in state.items():
                if key != "step":
                    state[key] = value.to(device=device, dtype=dtype)

    def state_dict(self) -> dict[str, Tensor]:
        """`<parameter>.<moment>` -> tensor (copies)."""
        if self._optimizer is None:
            return {}
        state = self._optimizer.state_dict()["state"]
        return {
            f"{name}.{key}": state[i][key].clone()
            for i, name in enumerate(self._names)
            if i in state
            for key in state[i]
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore `state_dict()`; the entries were checked by the caller."""
        moments: dict[int, dict[str, Any]] = {}
        for key, tensor in state.items():
            name, moment = key.rsplit(".", 1)
            moments.setdefault(self._names.index(name), {})[moment] = tensor.clone()
        self._load(moments)
        self.discard()

    def _load(self, moments: Mapping[int, Mapping[str, Any]]) -> None:
        if self._optimizer is not None:
            self._optimizer.load_state_dict(
                {"state": moments, "param_groups": self._optimizer.state_dict()["param_groups"]}
            )


def _sum_of_squares(gradients: Sequence[Tensor], squares: Tensor) -> Tensor:
    """Scalar, `squares` added; infinite or NaN where a gradient is, or where a square overflows."""
    flat = (gradient.flatten() for gradient in gradients)
    return functools.reduce(torch.add, [torch.dot(one, one) for one in flat], squares)
