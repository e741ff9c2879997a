"""How balancing hangs in the Trainer's loop, and how callbacks see the balancer.

What training depends on is no callback of the list, which users empty and replace: the handler that calls the list does
it, before the callbacks, so that these see the finished step.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

if TYPE_CHECKING:
    from hf_bilb.trainer.trainer import BilevelMTLTrainer


class BalancerCallbackHandler(CallbackHandler):
    """The Trainer's handler of callbacks, which first lets the trainer do its own part of an event.

    Callbacks get the keyword `balancer` in every event, in addition to `model`, `optimizer` and the others, where their
    method takes it (by that name, or by `**kwargs`).

    Args:
        before: the handler whose callbacks and objects this one takes over.
        trainer: whose balancer it is.
    """

    def __init__(self, before: CallbackHandler, trainer: BilevelMTLTrainer) -> None:
        self.__dict__.update(vars(before))
        # A trainer that nobody holds is gone at once, with its model and the workers of its loader.
        self._trainer = weakref.proxy(trainer)
        self._dropped = False
        self._takes: dict[tuple[type, str], bool] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Begin the run; then as in `CallbackHandler`."""
        self._dropped = False
        self._trainer.begin_run()
        return super().on_train_begin(args, state, control, **kwargs)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Tell balancer, data set and task sampler which epoch comes."""
        epoch = self._trainer.data_position.epoch
        self._trainer.balancer.on_epoch_begin(epoch)
        self._trainer.begin_epoch(epoch, self.train_dataloader)
        return super().on_epoch_begin(args, state, control, **kwargs)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Look whether losses and gradient are finite, while the step can still be dropped."""
        step = self._trainer.current_step
        problem = step.problem(state.global_step + 1)
        sound = step.begun and problem is None
        self._dropped = not (sound or self._trainer.goes_on(problem))
        return super().on_pre_optimizer_step(args, state, control, **kwargs)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Step the balancer after the model."""
        if not self._dropped:
            self._trainer.finish_step(dropped=False)
        return super().on_optimizer_step(args, state, control, **kwargs)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Close a step that was dropped."""
        if self._dropped:
            # Only now: the learning rate's schedule looks at the skipped step in between.
            self._trainer.finish_step(dropped=True)
            self._dropped = False
        return super().on_step_end(args, state, control, **kwargs)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any, **kwargs: Any
    ) -> TrainerControl:
        """Stop where `early_stopping` says so."""
        if self._trainer.has_stopped_improving():
            control.should_training_stop = True
        return super().on_evaluate(args, state, control, metrics, **kwargs)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """As in `CallbackHandler`; after the callbacks, whose looks at losses do not count, the next batch does."""
        control = super().on_prediction_step(args, state, control, **kwargs)
        self._trainer.expect_batch()
        return control

    def call_event(
        self, event: str, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Call every callback's method `event`; what it returns, if anything, is the control from then on."""
        for callback in self.callbacks:
            method = getattr(callback, event)
            own = {"balancer": self._trainer.balancer} if self._takes_balancer(type(callback), event, method) else {}
            result = method(
                args,
                state,
                control,
                model=self.model,
                processing_class=self.processing_class,
                optimizer=self.optimizer,
                lr_scheduler=self.lr_scheduler,
                train_dataloader=self.train_dataloader,
                eval_dataloader=self.eval_dataloader,
                **own,
                **kwargs,
            )
            control = control if result is None else result
        return control

    def _takes_balancer(self, kind: type, event: str, method: Callable[..., Any]) -> bool:
        key = (kind, event)
        if key not in self._takes:
            self._takes[key] = _takes_keyword(method, "balancer")
        return self._takes[key]


def _takes_keyword(method: Callable[..., Any], name: str) -> bool:
    try:
        parameters = inspect.signature(method).parameters
    except (TypeError, ValueError):  # some callables have no signature to look at
        return True
    anything = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return anything or name in parameters
