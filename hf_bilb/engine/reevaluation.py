"""What a caller gives `step(reevaluate=...)`: the model on the same batch again, in one or several micro-batches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from hf_bilb.engine.replay import MicroBatch
from hf_bilb.errors import TaskLossError
from hf_bilb.losses.contract import TaskLosses, as_task_losses

Reevaluation = Callable[[], TaskLosses | Tensor | Mapping[str, Tensor]]


def as_micro_batches(
    runs: Reevaluation | Sequence[Reevaluation],
    task_names: Sequence[str],
    counted: bool,
    check: Callable[[TaskLosses], None],
) -> list[MicroBatch]:
    """`runs` with their losses brought to `TaskLosses`.

    Args:
        counted: whether `backward` had counts; losses without them are then refused.
        check: raises for losses that the balancer cannot take.

    Raises:
        TaskLossError: when one of them is called and does not fit.
    """

    def run(reevaluate: Reevaluation) -> TaskLosses:
        losses = reevaluate()
        if counted and not isinstance(losses, TaskLosses):
            raise TaskLossError(
                "reevaluate: returned losses without counts, though backward() had num_items; expected "
                "hf_bilb.losses.contract.TaskLosses(losses, num_items)"
            )
        batch = losses if isinstance(losses, TaskLosses) else as_task_losses(losses, None, task_names)
        check(batch)
        return batch

    return [functools.partial(run, one) for one in ([runs] if callable(runs) else runs)]
