"""How the balancer hangs in the Trainer's loop, and how callbacks see it."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from hf_bilb.balancers.base import LossBalancer

if TYPE_CHECKING:
    from hf_bilb.trainer import BilevelMTLTrainer


def pass_balancer(handler: CallbackHandler, balancer: LossBalancer) -> None:
    """Let every callback event of `handler` carry the keyword `balancer`, beside `model` and `optimizer`."""
    handler.call_event = functools.partial(handler.call_event, balancer=balancer)


class BalancerCallback(TrainerCallback):
    """Steps the router after the optimizer's step, and tells the balancer where runs and epochs begin.

    It runs before the user's callbacks, so that these see the finished update.
    """

    def __init__(self, trainer: BilevelMTLTrainer) -> None:
        self._trainer = trainer
        self._dropped = False
        self._epoch: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._epoch = None
        self._trainer.begin_run()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        resumed = self._epoch is None and state.global_step > 0 and not args.ignore_data_skip
        # Counted from where the run begins or resumes: `state.epoch` lags behind when an epoch is cut short, and with a
        # data set of unknown length.
        self._epoch = int(state.epoch or 0) if self._epoch is None else self._epoch + 1
        self._trainer.balancer.on_epoch_begin(self._epoch)
        self._trainer.begin_epoch(self._epoch, kwargs["train_dataloader"], resumed)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._dropped = not self._trainer.update_is_valid()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._dropped:
            self._trainer.finish_update(dropped=False)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._dropped:
            # Only now: the learning rate's schedule looks at the skipped step in between.
            self._trainer.finish_update(dropped=True)
            self._dropped = False
