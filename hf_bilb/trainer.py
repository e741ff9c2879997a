"""`BilevelMTLTrainer`: `transformers.Trainer` for K tasks in balance, at the cost of one backward pass.

The way of a batch: model -> K losses (`compute_loss`) -> global losses -> objective -> coefficients -> one backward
pass (`training_step`) -> optimizer -> router (`BalancerCallback.on_optimizer_step`) -> logs -> checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers.trainer_utils import TrainOutput

from hf_bilb import checkpointing, distributed
from hf_bilb.accumulation import AccumulationWindow
from hf_bilb.balancers.base import LossBalancer
from hf_bilb.balancers.registry import build_balancer
from hf_bilb.decision import Decision, share_of_window
from hf_bilb.diagnostics import LowerLevelDiagnostics
from hf_bilb.epochs import EpochDataset
from hf_bilb.errors import NonFiniteLossError
from hf_bilb.micro_batches import MicroBatches
from hf_bilb.running_log import MAX_TASKS_IN_LOG, RunningLog, append_vectors, truncate_vectors
from hf_bilb.task_loss_trainer import TaskLossTrainer, tensors_in
from hf_bilb.task_losses import TaskLosses
from hf_bilb.task_sampler import build_task_sampler, set_sampler_epoch
from hf_bilb.trainer_callback import BalancerCallback, pass_balancer
from hf_bilb.trainer_checks import check_balancer, check_sampling, plain_optimizer, with_num_features
from hf_bilb.update import Update
from hf_bilb.validity import Phase

logger = logging.getLogger(__name__)


class BilevelMTLTrainer(TaskLossTrainer):
    """Drop-in for `transformers.Trainer` that balances K task losses.

    Args:
        *args, **kwargs: those of `transformers.Trainer`; `args` is a `BilevelMTLTrainingArguments`.
        task_loss_func: `(outputs, batch) -> losses` or `-> (losses, num_items)`; losses a tensor `[K]` or a dict of
            scalars, num_items likewise. Without it the model's output fields `losses`, `num_items`, `router_features`,
            `auxiliary_loss` are taken (the contract stands in `hf_bilb.task_losses`).
        task_item_counts: `(batch) -> [K]`, how many items each task has in a batch, for gradient accumulation with
            partial labels under `balance_over: micro_batch`; built in for label columns with -100 or NaN.

    With one task and an ordinary model that returns `loss`, it trains exactly as `Trainer`.

    Attributes:
        balancer: the `LossBalancer`; `trainer.balancer.coefficients` are the last coefficients `[K]`. Callbacks get it
            as the keyword `balancer` in every event.

    State: in each checkpoint, `balancer.safetensors` and `balancer.json`. Cost over `Trainer`: one all-reduce of 2K + 2
    numbers per micro-batch and arithmetic on K numbers; no extra forward or backward pass, but for `balance_over:
    window` (one forward of each micro-batch more), a double loop, and diagnostics.

    Raises:
        OptionError: settings that cannot work (DataParallel, tensor or context parallelism, names and lengths that do
            not match, ...), when it is built.
        CheckpointError: `balancer_init_from` that does not fit, when it is built.
        NonFiniteLossError: in training, naming task, step and value (`nonfinite_loss: raise`).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._task_sampling = check_sampling(self)
        self.balancer = self._build_balancer()
        check_balancer(self)
        if self.args.balancer_init_from is not None:
            checkpointing.start_balancer_from(self.args.balancer_init_from, self.balancer)
        self._initial_state = self.balancer.snapshot()
        self._restored = False
        self._running_log = RunningLog(self.task_names, self.balancer.device, self.balancer.dtype)
        self._update: Update | None = None
        self._decision: Decision | None = None
        self._announce([])
        pass_balancer(self.callback_handler, self.balancer)
        self.callback_handler.callbacks.insert(0, BalancerCallback(self))
        diagnostics = self.args.diagnostics_options()
        if diagnostics is not None:
            self.add_callback(LowerLevelDiagnostics(self, diagnostics))

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
            **with_num_features(name, options, self.model),
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self._task_sampling is None:
            return super()._get_train_sampler(train_dataset)
        return build_task_sampler(
            self.train_dataset,  # with all its columns; what is handed over here lacks those that forward does not take
            self._task_sampling,
            self.task_names,
            batch_size=self._train_batch_size,
            num_ranks=self.args.world_size,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            split_batches=self.args.accelerator_config.split_batches,
        )

    def begin_epoch(self, epoch: int, dataloader: Any, resumed: bool) -> None:
        """Tell data set and task sampler which epoch comes, and how far into it a run goes on that is `resumed`."""
        if isinstance(self.train_dataset, EpochDataset):
            # accelerate does it too, but not in the epoch that a run goes on in.
            self.train_dataset.set_epoch(epoch)
        if self._task_sampling is None:
            return
        micro_batches = self.args.gradient_accumulation_steps
        updates_per_epoch = max(len(dataloader) // micro_batches + (len(dataloader) % micro_batches > 0), 1)
        done = self.state.global_step % updates_per_epoch * micro_batches if resumed else 0
        set_sampler_epoch(dataloader, epoch, done)

    # --- one batch -----------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """As in `Trainer`; keeps the micro-batches of the update, and counts their items under accumulation."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._announce(batches)
        return batches, num_items

    def _announce(self, batches: list) -> None:
        """These are the micro-batches of the next update, which `training_step` gets one after the other."""
        self._micro_batch = -1
        balancer = self.balancer
        replayed = balancer.needs_reevaluation or balancer.needs_look_ahead or self.args.diagnostics is not None
        self._micro_batches = MicroBatches(batches, self._forward, self.args.device, replayed)
        self._window: AccumulationWindow | None = None
        if not self._ordinary and len(batches) > 1 and self.args.balance_over == "micro_batch":
            counts = [self._item_counter.count(batch) for batch in batches]
            self._window = AccumulationWindow.count(counts, self.args.device, self.balancer.dtype)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | int | None:
        # Counting labels for the model's own loss scaling would cost a gather; our shares come from the task counts.
        return None if self._ordinary is False else super()._get_num_items_in_batch(batch_samples, device)

    def _forward(self, model: nn.Module, inputs: Mapping[str, Any]) -> TaskLosses:
        """The losses of one micro-batch, outside the pass that counts."""
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            return self._task_losses(self._run(model, inputs), inputs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch: forward, decision on the global losses, this rank's exact share of the backward pass.

        Returns the micro-batch's part of F, detached. The router is updated after the optimizer's step
        (`finish_update`), so that a step that is dropped (overflow, `nonfinite_loss: skip`) leaves it alone.
        """
        if self._micro_batch + 1 >= len(self._micro_batches):  # a trainer with a `get_batch_samples` of its own
            if self.args.gradient_accumulation_steps > 1 and not self._ordinary:
                raise RuntimeError("gradient accumulation: get_batch_samples must call super(), to know an update")
            self._announce([inputs])
        self._micro_batch += 1
        if self._micro_batch == 0:
            self._begin_update(model)
        self._micro_batches.begin(self._micro_batch)
        return super().training_step(model, inputs, num_items_in_batch)

    def _begin_update(self, model: nn.Module) -> None:
        self.balancer.phase = self._phase()
        self._update = Update(self.balancer, self.model, undoable=self.args.nonfinite_loss == "skip")
        self._decision = None
        over_window = self.args.balance_over == "window" and len(self._micro_batches) > 1
        if not over_window and not self.balancer.needs_look_ahead:
            return
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()  # schedule-free optimizers keep other parameters for evaluation
        if self._is_ordinary(model, self._micro_batches.batches[0]):
            return
        losses = self._micro_batches.first_pass(model) if over_window else []
        if self.balancer.needs_look_ahead:
            self._look_ahead()
        if over_window:
            self._decision = self._decide_for_window(losses, self._update)

    def _look_ahead(self) -> None:
        """The step that the update will take, tried and undone: clipped and unscaled as the real one is."""
        parameters, scaler = list(self.model.parameters()), self.accelerator.scaler

        def clip() -> None:
            if self.args.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(parameters, self.args.max_grad_norm)

        with self._step_named():
            self.balancer.look_ahead(
                self._micro_batches.runs(self.model),
                before_step=clip,
                loss_scale=1.0 if scaler is None else scaler.get_scale(),
            )

    @contextmanager
    def _step_named(self) -> Iterator[None]:
        """What the balancer says of losses beside those of the batch gets the number of the step."""
        try:
            yield
        except NonFiniteLossError as error:
            raise NonFiniteLossError(f"step {self.state.global_step + 1}: {error}") from None

    def _phase(self) -> Phase:
        step, last = self.state.global_step, self.args.balancer_freeze_after
        if step < self.args.balancer_warmup_steps:
            return "warmup"
        return "balancing" if last is None or step < last else "frozen"

    def _decide_for_window(self, losses: list[TaskLosses], update: Update) -> Decision:
        """F once, at the losses of all micro-batches together, of a first pass without gradients."""
        decision = self.balancer.decide(losses)
        has_auxiliary = any(batch.auxiliary_loss is not None for batch in losses)
        self._running_log.add(decision, decision.value + decision.auxiliary_loss, None, has_auxiliary)
        update.add(decision)
        return decision

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, Any]:
        """In training the balanced loss of a micro-batch; in evaluation the unweighted mean of the tasks' losses."""
        loss, outputs = self._ordinary_loss(model, inputs, num_items_in_batch)
        if loss is None:
            outputs = self._run(model, inputs) if outputs is None else outputs
            batch = self._task_losses(outputs, inputs)
            if not model.training:
                loss = self._evaluated_loss(model, batch, inputs)
            else:
                loss = self._balanced_loss(model, batch, outputs, inputs)
        return (loss, self._named_outputs(outputs)) if return_outputs else loss

    def _balanced_loss(self, model: nn.Module, batch: TaskLosses, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        if self._decision is not None:
            share = share_of_window(batch, self._decision, len(self._micro_batches))
            loss = self.balancer.attach(batch, self._decision, share=share)
        else:
            loss = self._decide_for_micro_batch(batch, inputs)
        if not batch.complete and isinstance(model, DistributedDataParallel):
            # Heads without a loss on this rank may have one on another: every output takes part in the reduction.
            everywhere = [] if model.find_unused_parameters else list(model.parameters())
            zero = distributed.reach([*tensors_in(outputs), *everywhere])
            loss = loss if zero is None else loss + zero.to(loss.dtype)
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            # Its backward pass ends in the optimizer's step: too late to look afterwards.
            self.update_is_valid()
        return loss

    def _decide_for_micro_batch(self, batch: TaskLosses, inputs: Mapping[str, Any]) -> Tensor:
        share = None
        if self._window is not None:
            self._item_counter.check(inputs, batch)
            share = self._window.share(max(self._micro_batch, 0))
        loss, decision = self.balancer.surrogate(batch, share=share)
        self._running_log.add(decision, loss, share, batch.auxiliary_loss is not None)
        if self._update is not None:
            self._update.add(decision)
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
        self._update = None
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
                with self._step_named():
                    self.balancer.step(reevaluate=self.reevaluations() if self.balancer.needs_reevaluation else None)
            self._running_log.commit()
        self._update = self._decision = self._window = None

    def reevaluations(self) -> list[Callable[[], TaskLosses]]:
        """For each micro-batch of the current update a function that runs the model on it once more, with the same
        dropout masks; empty where none is under way or no decision was taken (a dropped one, an ordinary model)."""
        # The bare model: a forward pass of DistributedDataParallel would expect a backward pass through its hooks.
        return [] if self._update is None or self._update.empty else self._micro_batches.runs(self.model)

    def begin_run(self) -> None:
        """At the start of a training loop: a fresh balancer unless one was just restored from a checkpoint."""
        self.balancer.bind(self.model, plain_optimizer(self.optimizer))
        if not self._restored:
            self.balancer.restart(self._initial_state)
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

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in `Trainer`, from complete checkpoints only; a damaged, foreign or other-task checkpoint is refused with
        one line (`CheckpointError`) before anything is loaded. `training_loss` is the mean F of the whole run."""
        if self.model_init is None:
            # Like the optimizer, the balancer goes on from a former `train`; a model built anew gets a fresh one.
            self._initial_state = self.balancer.snapshot()
            self.balancer.bind(self.model)
        self._restored = False
        output = super().train(*args, **kwargs)
        return output if self._ordinary else output._replace(training_loss=output.metrics["train_loss"])

    def _check_checkpoint(self, checkpoint: str) -> None:
        if checkpointing.has_balancer(checkpoint):
            self.balancer.bind(self.model)
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
            self.balancer.bind(self.model)
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
