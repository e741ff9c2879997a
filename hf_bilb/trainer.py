"""`BilevelMTLTrainer`: `transformers.Trainer` for K tasks in balance, at the cost of one backward pass.

The way of a batch: model -> K losses (`compute_loss`) -> global losses -> objective -> coefficients -> one backward
pass (`training_step`) -> optimizer -> router (`BalancerCallback.on_optimizer_step`) -> logs -> checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from hf_bilb import checkpointing, distributed
from hf_bilb.accumulation import AccumulationWindow, ItemCounter, batch_size
from hf_bilb.atomic_trainer import AtomicCheckpointTrainer
from hf_bilb.balancers.base import LossBalancer
from hf_bilb.balancers.registry import build_balancer
from hf_bilb.decision import NonFiniteLossError
from hf_bilb.evaluation import EvaluationLosses, own_part
from hf_bilb.running_log import MAX_TASKS_IN_LOG, RunningLog, append_vectors, truncate_vectors
from hf_bilb.task_losses import TaskLossError, TaskLosses, as_task_losses
from hf_bilb.trainer_callback import BalancerCallback, pass_balancer
from hf_bilb.trainer_checks import ForwardColumns, check_settings, resolve_task_names
from hf_bilb.training_args import BilevelMTLTrainingArguments
from hf_bilb.update import Update

logger = logging.getLogger(__name__)

#: Output fields of the contract; they are no predictions.
CONTRACT_FIELDS = ["losses", "num_items", "router_features", "auxiliary_loss"]

TaskLossFunc = Callable[[Any, Mapping[str, Any]], Any]
TaskItemCounts = Callable[[Mapping[str, Any]], Tensor]


class BilevelMTLTrainer(AtomicCheckpointTrainer):
    """Drop-in for `transformers.Trainer` that balances K task losses.

    Args:
        *args, **kwargs: those of `transformers.Trainer`; `args` is a `BilevelMTLTrainingArguments`.
        task_loss_func: `(outputs, batch) -> losses` or `-> (losses, num_items)`; losses a tensor `[K]` or a dict of
            scalars, num_items likewise. Without it the model's output fields `losses`, `num_items`, `auxiliary_loss`
            are taken (the contract stands in `hf_bilb.task_losses`).
        task_item_counts: `(batch) -> [K]`, how many items each task has in a batch, for gradient accumulation with
            partial labels; built in for label columns with -100 or NaN.

    With one task and an ordinary model that returns `loss`, it trains exactly as `Trainer`.

    Attributes:
        balancer: the `LossBalancer`; `trainer.balancer.coefficients` are the last coefficients `[K]`. Callbacks get it
            as the keyword `balancer` in every event.

    State: in each checkpoint, `balancer.safetensors` and `balancer.json`. Cost over `Trainer`: one all-reduce of 2K + 1
    numbers per micro-batch and arithmetic on K numbers; no extra forward or backward pass.

    Raises:
        OptionError: settings that cannot work (DataParallel, tensor or context parallelism, names and lengths that do
            not match, ...), when it is built.
        NonFiniteLossError: in training, naming task, step and value (`nonfinite_loss: raise`).
    """

    args: BilevelMTLTrainingArguments

    def __init__(
        self,
        *args: Any,
        task_loss_func: TaskLossFunc | None = None,
        task_item_counts: TaskItemCounts | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_settings(self)
        self.task_loss_func = task_loss_func
        self.task_names = resolve_task_names(self)
        self._item_counter = ItemCounter(task_item_counts, self.label_names, self.task_names)
        # A model with one task may be an ordinary one; its first output tells. None = not known yet.
        self._ordinary: bool | None = None
        self._settle_ordinary(None if len(self.task_names) == 1 and task_loss_func is None else False)
        self.balancer = self._build_balancer()
        self._initial_state = self.balancer.state_dict()
        self._restored = False
        self._running_log = RunningLog(self.task_names, self.balancer.device, self.balancer.dtype)
        self._columns = ForwardColumns(self.accelerator.unwrap_model(self.model), self.label_names)
        self._window: AccumulationWindow | None = None
        self._micro_batch = -1
        self._update: Update | None = None
        self._evaluation: EvaluationLosses | None = None
        pass_balancer(self.callback_handler, self.balancer)
        self.callback_handler.callbacks.insert(0, BalancerCallback(self))

    # --- set-up --------------------------------------------------------------------------------------------------

    def _build_balancer(self) -> LossBalancer:
        name, options = self.args.balancer_name_and_options()
        exact = any(parameter.dtype == torch.float64 for parameter in self.model.parameters())
        return build_balancer(
            name,
            task_names=self.task_names,
            absent_tasks=self.args.absent_tasks,
            task_priors=self.args.task_priors,
            device=self.args.device,
            dtype=torch.float64 if exact else torch.float32,
            **options,
        )

    # --- one batch -----------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """As in `Trainer`; under gradient accumulation also counts the items of the window."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._micro_batch = -1
        self._window = None
        if not self._ordinary and len(batches) > 1:
            counts = [self._item_counter.count(batch) for batch in batches]
            self._window = AccumulationWindow.count(counts, device, self.balancer.dtype)
        return batches, num_items

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | int | None:
        # Counting labels for the model's own loss scaling would cost a gather; our shares come from the task counts.
        return None if self._ordinary is False else super()._get_num_items_in_batch(batch_samples, device)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch: forward, decision on the global losses, this rank's exact share of the backward pass.

        Returns the micro-batch's part of F, detached. The router is updated after the optimizer's step
        (`finish_update`), so that a step that is dropped (overflow, `nonfinite_loss: skip`) leaves it alone.
        """
        self._micro_batch += 1
        if self._micro_batch == 0:
            self._update = Update(self.balancer, self.model, undoable=self.args.nonfinite_loss == "skip")
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, Any]:
        """In training the balanced loss of a micro-batch; in evaluation the unweighted mean of the tasks' losses."""
        outputs = None
        if self._ordinary is not False:
            if self._ordinary is None and self.compute_loss_func is None and self.label_smoother is None:
                watched = _Watched(model, self._columns)
                loss, outputs = super().compute_loss(watched, inputs, True, num_items_in_batch)
                self._settle_ordinary("losses" not in outputs if isinstance(outputs, Mapping) else True)
            else:
                self._settle_ordinary(True)
                loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            if self._ordinary:
                return (loss, outputs) if return_outputs else loss
        if outputs is None:
            outputs = model(**self._columns.select(inputs))
        batch = self._task_losses(outputs, inputs)
        loss = (
            self._balanced_loss(model, batch, outputs) if model.training else self._evaluated_loss(model, batch, inputs)
        )
        return (loss, outputs) if return_outputs else loss

    def _settle_ordinary(self, ordinary: bool | None) -> None:
        self._ordinary = ordinary
        # Our loss is normalised over the window; an ordinary model's is what Trainer takes it for.
        self.loss_is_scaled_for_ga = True if ordinary is False else None

    def _task_losses(self, outputs: Any, inputs: Mapping[str, Any]) -> TaskLosses:
        fields = outputs if isinstance(outputs, Mapping) else {}
        num_items = fields.get("num_items")
        if self.task_loss_func is not None:
            result = self.task_loss_func(outputs, inputs)
            losses, num_items = result if isinstance(result, tuple) else (result, None)
        elif "losses" in fields:
            losses = fields["losses"]
        else:
            got = ", ".join(fields) or type(outputs).__name__
            raise TaskLossError(
                f"the model returned no `losses` (it returned: {got}); return a field `losses` "
                f"[{len(self.task_names)}], or give the Trainer a task_loss_func(outputs, batch)"
            )
        missing = isinstance(losses, Mapping) and len(losses) < len(self.task_names)
        if self._window is not None and (missing or num_items is not None):
            self._item_counter.warn_unless_known(inputs, missing)
        return as_task_losses(
            losses,
            num_items,
            self.task_names,
            default_items=batch_size(inputs),
            router_features=fields.get("router_features"),
            auxiliary_loss=fields.get("auxiliary_loss"),
        )

    def _balanced_loss(self, model: nn.Module, batch: TaskLosses, outputs: Any) -> Tensor:
        share = None if self._window is None else self._window.share(max(self._micro_batch, 0))
        loss, decision = self.balancer.surrogate(batch, share=share)
        if not batch.complete and isinstance(model, DistributedDataParallel):
            # Heads without a loss on this rank may have one on another: every output takes part in the reduction.
            everywhere = [] if model.find_unused_parameters else list(model.parameters())
            zero = distributed.reach([*_tensors(outputs), *everywhere])
            loss = loss if zero is None else loss + zero.to(loss.dtype)
        self._running_log.add(decision, loss, share, batch.auxiliary_loss is not None)
        if self._update is not None:
            self._update.add(decision)
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            # Its backward pass ends in the optimizer's step: too late to look afterwards.
            self.update_is_valid()
        return loss

    # --- one update (called by BalancerCallback) -----------------------------------------------------------------

    def update_is_valid(self) -> bool:
        """Look at the update's losses, one host read; raise or drop it as `nonfinite_loss` says when one is invalid."""
        update = self._update
        problem = None if update is None else update.problem(self.state.global_step + 1)
        if update is None or problem is None:
            return True
        message, task, outside_domain = problem
        if self.args.nonfinite_loss == "raise" or outside_domain:
            raise NonFiniteLossError(message)
        self._drop_update(update, task)
        return False

    def _drop_update(self, update: Update, task: str) -> None:
        update.undo()
        self._running_log.drop(task)
        logger.warning("step %d is dropped: the loss of task %r is not finite", self.state.global_step + 1, task)
        scaler = self.accelerator.scaler
        if scaler is not None:
            # Clipping may have begun the scaler's round; closed at the same scale, it takes the next one.
            scaler.update(scaler.get_scale())
        # The prepared optimizer does nothing between synchronisation points, and reports the step as skipped.
        self.accelerator.gradient_state._set_sync_gradients(False)
        self.optimizer._is_overflow = True

    def finish_update(self, dropped: bool) -> None:
        """After the optimizer's step: step the router and count the update, unless either was skipped."""
        if dropped:
            self.optimizer._is_overflow = False
            self.accelerator.gradient_state._set_sync_gradients(True)
        elif self._update is not None and not self._update.empty:
            if self.accelerator.optimizer_step_was_skipped:
                self.balancer.discard()
            else:
                self.balancer.step()
            self._running_log.commit()
        self._update = None

    def begin_run(self) -> None:
        """At the start of a training loop: a fresh balancer unless one was just restored from a checkpoint."""
        self.balancer.bind(self.model, self.optimizer)
        if not self._restored:
            self.balancer.load_state_dict(self._initial_state)
            self._running_log.reset()
        self._restored = False
        self._update = None
        if self.is_world_process_zero() and len(self.task_names) > MAX_TASKS_IN_LOG:
            truncate_vectors(self.args.output_dir, self.state.global_step)

    # --- logs ----------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `Trainer`, plus `loss_mean`, `loss/<task>`, `weight/<task>`, `coefficient/<task>`, `discrepancy`."""
        if self._ordinary is False and "loss" in logs:
            ours, columns = self._running_log.drain()
            logs.update(ours)
            for message in self.balancer.diagnose():
                logger.warning("balancer %s: %s", self.balancer.name, message)
            if len(self.task_names) > MAX_TASKS_IN_LOG and self.is_world_process_zero():
                append_vectors(self.args.output_dir, self.state.global_step, self.state.epoch, columns)
        if self._ordinary is False and "train_loss" in logs:
            logs["train_loss"] = self._running_log.run_mean()
        super().log(logs, start_time)

    # --- evaluation ----------------------------------------------------------------------------------------------

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As in `Trainer`; `eval_loss` is the unweighted mean of the exact losses `eval_loss_<task>`."""
        self._evaluation = EvaluationLosses(len(self.task_names), self.balancer.device)
        output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        if self._ordinary is False:
            prefix = kwargs.get("metric_key_prefix", "eval")
            losses = self._evaluation.metrics(self.task_names, prefix)
            # Trainer's own is a mean of batch means, and zero where no task has a label.
            output.metrics.pop(f"{prefix}_loss", None)
            output.metrics.update(losses)
            if not losses and description != "Prediction":
                logger.warning("no evaluation losses: the batches do not hold all of label_names %s", self.label_names)
        self._evaluation = None
        return output

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Any, Any]:
        """As in `Trainer`; the contract's fields are no predictions, unknown columns are withheld from the model."""
        if self._ordinary:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if ignore_keys is None:
            ignore_keys = getattr(getattr(self.model, "config", None), "keys_to_ignore_at_inference", None) or [
                "past_key_values"
            ]
        if not self.label_names or any(inputs.get(name) is None for name in self.label_names):
            inputs = self._columns.select(inputs)
        return super().prediction_step(model, inputs, prediction_loss_only, [*ignore_keys, *CONTRACT_FIELDS])

    def _evaluated_loss(self, model: nn.Module, batch: TaskLosses, inputs: Mapping[str, Any]) -> Tensor:
        if self._evaluation is not None:
            self._evaluation.add(self._without_repetitions(model, batch, inputs))
        present = batch.num_items > 0
        losses = torch.where(present, batch.losses, torch.zeros_like(batch.losses))
        return losses.sum() / present.sum().clamp(min=1)

    def _without_repetitions(self, model: nn.Module, batch: TaskLosses, inputs: Mapping[str, Any]) -> TaskLosses:
        """The batch's losses without the examples that only fill the last batch up under several ranks."""
        progress = self.accelerator.gradient_state
        if self.args.world_size == 1 or not progress.end_of_dataloader or progress.remainder <= 0:
            return batch
        own, part = own_part(inputs, int(batch_size(inputs)), self.args.process_index, progress.remainder)
        if part is None:
            logger.warning(
                "the last evaluation batch repeats examples that cannot be told apart; its losses count them"
            )
            return batch
        again = self._task_losses(model(**self._columns.select(part)), part)
        return again if own > 0 else TaskLosses(again.losses, torch.zeros_like(again.num_items))

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in `Trainer`, from complete checkpoints only; a damaged, foreign or other-task checkpoint is refused with
        one line (`CheckpointError`) before anything is loaded. `training_loss` is the mean F of the whole run."""
        if self.model_init is None:
            # Like the optimizer, the balancer goes on from a former `train`; a model built anew gets a fresh one.
            self._initial_state = self.balancer.state_dict()
        self._restored = False
        output = super().train(*args, **kwargs)
        return output if self._ordinary else output._replace(training_loss=output.metrics["train_loss"])

    def _check_checkpoint(self, checkpoint: str) -> None:
        if checkpointing.has_balancer(checkpoint):
            checkpointing.read_balancer(checkpoint, self.balancer)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            checkpointing.save_balancer(output_dir, self.balancer, self._running_log)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        if checkpointing.has_balancer(checkpoint):
            checkpointing.load_balancer(checkpoint, self.balancer, self._running_log)
            self._restored = True
        else:
            logger.warning(
                "%s holds no balancer state (save_only_model): the balancer starts FRESH, as the optimizer does",
                checkpoint,
            )

    def _load_best_model(self) -> None:
        super()._load_best_model()
        best = self.state.best_model_checkpoint
        if checkpointing.has_balancer(best):
            checkpointing.load_balancer(best, self.balancer)
        else:
            logger.warning("%s holds no balancer state (save_only_model): the balancer stays at the last step", best)


class _Watched:
    """Calls the model for `Trainer.compute_loss`, which insists on a `loss` that a multi-task model need not return."""

    def __init__(self, model: nn.Module, columns: ForwardColumns) -> None:
        self.model = model
        self.columns = columns

    def __call__(self, **inputs: Any) -> Any:
        outputs = self.model(**self.columns.select(inputs, keep_labels=True))
        if isinstance(outputs, Mapping) and "loss" not in outputs and "losses" in outputs:
            return {**outputs, "loss": outputs["losses"].sum()}
        return outputs


def _tensors(outputs: Any) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, Mapping):
        for value in outputs.values():
            yield from _tensors(value)
    elif isinstance(outputs, (list, tuple)):
        for value in outputs:
            yield from _tensors(value)
