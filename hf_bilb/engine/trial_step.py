"""Steps of the model's optimizer that are tried on a batch and undone: a look at the losses after them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_bilb.engine import reduction
from hf_bilb.engine.reduction import GlobalBatch
from hf_bilb.engine.replay import (
    MicroBatch,
    evaluate,
    same_random_numbers,
    summed_gradients,
    summed_over_ranks,
    unchanged,
    whole_parameters,
)
from hf_bilb.engine.weighting import Weighting, share_of_window, surrogate_loss
from hf_bilb.losses.contract import TaskLosses


class LookAhead:
    """Tries steps of any torch optimizer and brings parameters, its state and the model's buffers back bit for bit.

    Args:
        model: what the micro-batches run.
        optimizer: the model's; not one that steps during the backward pass.

    It has no state between updates. Cost of `try_steps`: a copy of the trainable parameters and of the optimizer's
    state, one set of gradients for each weighting, one step and one forward pass of each micro-batch for each.

    Raises:
        OptionError: a model whose parameters are sharded.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        whole_parameters(model, "a trial step")
        self.model = model
        self.optimizer = optimizer
        self._parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Whatever happens to the model's buffers inside, they are as before afterwards."""
        with unchanged(self.model):
            yield

    def first_pass(self, micro_batches: Sequence[MicroBatch]) -> list[TaskLosses]:
        """The losses at the model's parameters; of a single micro-batch attached to the graph."""
        if len(micro_batches) > 1:
            return evaluate(micro_batches, self._parameters)
        with torch.enable_grad(), same_random_numbers(self._parameters):
            return [micro_batches[0]()]

    def try_steps(
        self,
        parts: Sequence[TaskLosses],
        micro_batches: Sequence[MicroBatch],
        weightings: Sequence[Weighting],
        before_step: Callable[[], object] | None,
        loss_scale: float,
        group: dist.ProcessGroup | None,
    ) -> list[GlobalBatch]:
        """For each of `weightings` the global losses after the step that it asks for.

        Args:
            parts: of `first_pass`.
            before_step: called with the gradients in place, such as clipping.
            loss_scale: of the losses in the backward pass; taken off the gradients again.
        """
        ranks, number = reduction.data_parallel_size(group), len(micro_batches)

        def share(weighting: Weighting) -> Callable[[TaskLosses], Tensor]:
            def scalar(part: TaskLosses) -> Tensor:
                of_window = share_of_window(part, weighting, number) if number > 1 else None
                return surrogate_loss(part, weighting, of_window) * loss_scale

            return scalar

        with torch.enable_grad(), same_random_numbers(self._parameters):
            again = parts if number == 1 else (run() for run in micro_batches)
            found = summed_gradients(self._parameters, again, [share(weighting) for weighting in weightings])
        results = []
        for gradients in found:
            summed = summed_over_ranks(gradients, self._parameters, group)
            scaled = [None if one is None else one / (ranks * loss_scale) for one in summed]
            with self._stepped(scaled, before_step):
                results.append(reduction.reduce_losses(evaluate(micro_batches, self._parameters), False, group))
        return results

    @contextmanager
    def _stepped(self, gradients: Sequence[Tensor | None], before_step: Callable[[], object] | None) -> Iterator[None]:
        with unchanged(parameters=self._parameters, optimizer=self.optimizer):
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                parameter.grad = gradient
            if before_step is not None:
                before_step()
            self.optimizer.step()
            yield
