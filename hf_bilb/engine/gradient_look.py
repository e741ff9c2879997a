"""A look at the gradients of the tasks: how long they are, and which of them point against each other.

    J_k = grad l_k of the global batch,   norm_k = ||J_k||,   cosine_ab = J_a . J_b / (||J_a|| ||J_b||)

with respect to the shared parameters, which are found, or named. It changes nothing: parameters, `.grad` and buffers
are as before.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_bilb.engine.reduction import all_reduce_sum
from hf_bilb.engine.replay import MicroBatch, unchanged
from hf_bilb.engine.task_gradients import GlobalGradients, RunningGradients, SharedParameters, reduce_gradients


class GradientReport(NamedTuple):
    """What a look has found; float64, on the CPU, the same on every rank.

    Attributes:
        norms: `[K]`, in the unit of the task's loss over that of the parameters; NaN where the task has no items in the
            global batch, or its gradient is not finite.
        cosines: `[K, K]`, symmetric, in [-1, 1]; NaN where either norm is NaN or zero.
    """

    norms: Tensor
    cosines: Tensor

    @property
    def pairs(self) -> Tensor:
        """The cosines of the pairs a < b that have one, `[P]`."""
        a, b = torch.triu_indices(len(self.norms), len(self.norms), offset=1)
        cosines = self.cosines[a, b]
        return cosines[cosines.isfinite()]


class GradientLook:
    """Measures the gradients of the K losses of one batch with respect to the parameters that tasks share.

    State: which parameters are shared, as found in the batches that were looked at; it is not saved, and found again.

    Args:
        num_tasks: K.
        patterns: names of the parameters, with `*`; None: all that more than one task's loss reaches.
        key: of the patterns, in messages.
    """

    def __init__(
        self, num_tasks: int, patterns: Sequence[str] | None = None, key: str = "diagnostics.gradients.parameters"
    ) -> None:
        self._finds = patterns is None
        self._shared = SharedParameters(num_tasks, patterns, key)

    def bind(self, model: nn.Module) -> None:
        """Take the trainable parameters of `model`, without a wrapper; the same ones keep what is known of them.

        Raises:
            OptionError: a pattern that fits no trainable parameter.
        """
        self._shared.bind(model)

    def measure(
        self, model: nn.Module, runs: Sequence[MicroBatch], group: dist.ProcessGroup | None = None
    ) -> GradientReport:
        """Look at the global batch.

        Args:
            model: the model that is run, without a wrapper; the parameters that are trainable now.
            runs: for each micro-batch of this rank what runs the model on it, and leaves the random generators alone;
                all ranks have equally many.
            group: the ranks that share the batch.

        Cost: a forward pass of each micro-batch and, one after the other, K backward passes to the shared parameters; a
        task that is seen for the first time costs one more of each. K d numbers of memory for d shared parameters, in
        float32 at least, and about twice that while they are put together. An all-reduce of K (d + 1) numbers. One host
        read of K (K + 1).
        """
        self.bind(model)
        with unchanged(model), _eager():
            return self._measure(runs, group)

    def _measure(self, runs: Sequence[MicroBatch], group: dist.ProcessGroup | None) -> GradientReport:
        if self._finds and not bool(self._shared.known.all()):
            # In passes of their own, as the parameters have to be the same in all micro-batches.
            for run in runs:
                batch = run()
                here, everywhere = (
                    (items > 0).tolist() for items in (batch.num_items, all_reduce_sum(batch.num_items.detach(), group))
                )
                self._shared.look(batch.losses, here, everywhere, group, alone=False)
        inputs, running = self._shared.looked_at, RunningGradients()
        for run in runs:
            running.add(run(), inputs, of_features=False, tasks_per_pass=1)
        return _report(reduce_gradients([running], group, alone=False))


def _report(found: GlobalGradients) -> GradientReport:
    gramian = torch.where((found.sample_items[0] > 0).to(found.gramian.device)[:, None], found.gramian, torch.nan).cpu()
    norms = gramian.diagonal().clamp(min=0).sqrt()
    norms = torch.where(norms.isfinite(), norms, torch.nan)
    lengths = torch.where(norms > 0, norms, torch.nan)
    # Divided twice: a product of two large norms may be beyond the numbers that there are.
    cosines = gramian / lengths / lengths[:, None]
    cosines = ((cosines + cosines.T) / 2).clamp(-1, 1)
    return GradientReport(norms, torch.where(cosines.isfinite(), cosines, torch.nan))


def _eager() -> AbstractContextManager[object]:
    """Compiled models run as they are written: the graph of a compiled one can be walked back only once."""
    if "torch._dynamo" not in sys.modules:  # nobody has compiled anything; it takes long to import
        return nullcontext()
    return torch.compiler.set_stance("force_eager")
