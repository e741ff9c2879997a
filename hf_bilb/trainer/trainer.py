"""`BilevelMTLTrainer`: `transformers.Trainer` for K tasks in balance, at the cost of one backward pass.

The way of a batch: model -> K losses (`compute_loss`) -> global losses -> objective -> coefficients -> one backward
pass (`training_step`) -> optimizer -> router (`BalancerCallbackHandler`) -> logs -> checkpoint.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import DataCollator, EvalPrediction, PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import TrainOutput, default_compute_objective

from hf_bilb.balancers.registry import build_balancer
from hf_bilb.engine import reduction
from hf_bilb.engine.balancer import LossBalancer
from hf_bilb.engine.gradient_balancer import GradientBalancer
from hf_bilb.engine.gradient_check import tasks_with_nonfinite_slope
from hf_bilb.engine.records import Phase
from hf_bilb.engine.replay import unchanged
from hf_bilb.engine.weighting import share_of_window
from hf_bilb.errors import NonFiniteLossError, TaskLossError, TrainerError
from hf_bilb.hub.card import CARD_FILE, card_text, is_written_by_hand
from hf_bilb.losses.contract import TaskLosses, short_names
from hf_bilb.storage.writing import write_text
from hf_bilb.trainer import checkpointing, compat
from hf_bilb.trainer.accumulation import WindowCounter
from hf_bilb.trainer.arguments import AS_IT_IS, OWN_FIELDS, as_bilevel_arguments, is_task_loss
from hf_bilb.trainer.callback import BalancerCallbackHandler
from hf_bilb.trainer.checks import (
    RunSettings,
    check_balancer,
    check_sampling,
    plain_optimizer,
    resolve_absent_tasks,
)
from hf_bilb.trainer.data_trainer import Filler
from hf_bilb.trainer.diagnostics import LowerLevelDiagnostics
from hf_bilb.trainer.early_stopping import evaluations_without_gain, values_of
from hf_bilb.trainer.epochs import EpochDataset
from hf_bilb.trainer.gradient_diagnostics import GradientDiagnostics
from hf_bilb.trainer.losses_trainer import (
    TaskItemCounts,
    TaskLossFunc,
    TaskLossTrainer,
    evaluation_names,
    tensors_in,
)
from hf_bilb.trainer.metrics_by_task import Metrics, MetricsByTask
from hf_bilb.trainer.model_card import trainer_facts
from hf_bilb.trainer.running_log import MAX_TASKS_IN_LOG, RunningLog, append_vectors, truncate_vectors
from hf_bilb.trainer.sampling import build_task_sampler, set_sampler_epoch
from hf_bilb.trainer.sharded import check_same_reach, find_unused, local_part, reshard
from hf_bilb.trainer.step import GRADIENT, OptimizerStep, Part, Problem

logger = logging.getLogger(__name__)


class BilevelMTLTrainer(TaskLossTrainer):
    """Drop-in for `transformers.Trainer` that balances K task losses.

    Args:
        model, ..., preprocess_logits_for_metrics: those of `transformers.Trainer`, in its order. `args` may be plain
            `TrainingArguments` or None: `trainer.args` is then a copy with the fields of `BilevelMTLTrainingArguments`.
        train_dataset: also a mapping task -> data set, one for each task, with columns of their own: their rows are
            drawn by `task_sampling` (by default in batches of one task, every row once an epoch). Each batch gets the
            column `task_ids` `[B]` int64, positions in `task_names`, which is the keys unless it is given; the model's
            forward gets it if it takes it. `trainer.train_dataset` is then a `TaskDatasets`, with the mapping as its
            attribute `datasets`.
        eval_dataset: also a mapping name -> data set, which are evaluated one after the other, as by `Trainer`:
            `eval_<name>_loss`. Next to a mapping `train_dataset`, those whose names are tasks are of that task alone;
            `eval_loss`, the unweighted mean, and `eval_loss_<task>` are added (see `evaluate`).
        compute_metrics: also a mapping task -> function, where `eval_dataset` is one task -> data set.
        task_loss_func: `(outputs, batch) -> losses` or `-> (losses, num_items)`; losses a tensor `[K]` or a dict of
            scalars, num_items likewise. Without it the model's output fields `losses`, `num_items`, `router_features`,
            `auxiliary_loss` are taken (the contract stands in `hf_bilb.losses.contract`).
        task_item_counts: `(batch) -> [K]`, how many items each task has in a batch, for losses that come without
            `num_items`, and for windows of gradient accumulation; built in for label columns with -100 or NaN
            (`hf_bilb.trainer.item_counts`).

    With one task and an ordinary model that returns `loss`, it trains exactly as `Trainer`.

    Attributes:
        balancer: the `LossBalancer`; `trainer.balancer.coefficients` are the last coefficients `[K]`. Callbacks get it
            as the keyword `balancer` in every event.
        current_step: the `OptimizerStep` under way: its micro-batches and what was decided on them.

    State: in each checkpoint, `balancer.safetensors` and `balancer.json`. Cost over `Trainer`: one all-reduce of 2K + 1
    numbers per micro-batch and arithmetic on K numbers; no extra forward or backward pass, but for `balance_over:
    window` (one forward of each micro-batch more), a double loop, and diagnostics.

    Raises:
        OptionError: settings that cannot work (DataParallel, tensor or context parallelism, names and lengths that do
            not match, ...), when it is built.
        CheckpointError: `balancer_init_from` that does not fit, when it is built.
        NonFiniteLossError: in training, naming task, step and value (`nonfinite_loss: raise`).
    """

    balancer: LossBalancer
    callback_handler: CallbackHandler

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | Mapping[str, Metrics] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        task_loss_func: TaskLossFunc | None = None,
        task_item_counts: TaskItemCounts | None = None,
    ) -> None:
        compat.check_versions()
        # Not every Trainer that may stand between ours and `Trainer` takes it (`Seq2SeqTrainer` does not).
        rarely = {} if optimizer_cls_and_kwargs is None else {"optimizer_cls_and_kwargs": optimizer_cls_and_kwargs}
        super().__init__(
            model=model,
            args=as_bilevel_arguments(args),
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            compute_loss_func=compute_loss_func,
            compute_metrics=MetricsByTask(compute_metrics) if isinstance(compute_metrics, Mapping) else compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            task_loss_func=task_loss_func,
            task_item_counts=task_item_counts,
            **rarely,
        )
        self._diagnostics: list[TrainerCallback] = []
        self._dropped_in_a_row = 0
        self._overflow_said = False
        self._unlogged_norm: Tensor | None = None
        self._settings: RunSettings | None = None
        self._settle_balancing()
        self._adopt_callbacks()

    # --- set-up --------------------------------------------------------------------------------------------------

    def _settle_balancing(self) -> None:
        """Build everything that follows from the arguments, unless they are those it was built from.

        `hyperparameter_search` and users change arguments of a Trainer that is already built; a balancer of the same
        method, options and tasks goes on with what it has learned, any other one starts from nothing.
        """
        self.args.check_settings()
        self._settle_tasks()
        self._task_sampling = check_sampling(self)
        settings = RunSettings.of(self)
        former = self._settings
        if settings == former:
            check_balancer(self)
            self._window_counter = self._build_window_counter()
            return
        learned = None if former is None or former.method != settings.method else self.balancer.snapshot()
        self.balancer = self._build_balancer(settings)
        check_balancer(self)
        if isinstance(self.balancer, GradientBalancer):
            self.balancer.bind(self.model)  # part of its state is of the parameters' size
        if learned is not None:
            self.balancer.rollback(learned)
        elif self.args.balancer_init_from is not None:
            checkpointing.start_balancer_from(self.args.balancer_init_from, self.balancer)
        if former is not None and self.model_init is None:
            goes_on = "goes on" if learned is not None else "starts fresh"
            logger.warning("the arguments were changed since the last training: balancer %s %s", settings.name, goes_on)
        self._initial_state = self.balancer.snapshot()
        self._restored = False
        self._running_log = RunningLog(self.task_names, self.balancer.device, self.balancer.dtype)
        self._window_counter = self._build_window_counter()
        self._settle_diagnostics()
        self._announce([])
        self._settings = settings  # last: what was refused on the way is refused again the next time

    def _settle_diagnostics(self) -> None:
        for callback in self._diagnostics:
            if callback in self.callback_handler.callbacks:
                self.remove_callback(callback)
        self._diagnostics = []
        options = self.args.diagnostics_options()
        if options is not None and options.lower_level is not None:
            self._diagnostics.append(LowerLevelDiagnostics(self, options.lower_level))
        if options is not None and options.gradients is not None:
            self._diagnostics.append(GradientDiagnostics(self, options.gradients))
        for callback in self._diagnostics:
            self.add_callback(callback)

    def _adopt_callbacks(self) -> None:
        """Let the handler of callbacks do our part, too; one that was put in its place does it from the next run on."""
        if not isinstance(self.callback_handler, BalancerCallbackHandler):
            self.callback_handler = BalancerCallbackHandler(self.callback_handler, self)

    def _hp_search_setup(self, trial: Any) -> None:
        """As in `Trainer`, which casts a trial's values to the type of the old ones: not those of our own arguments.

        Every `train` comes here, with the run's model in place and before a checkpoint is loaded.
        """
        old = {key: getattr(self.args, key) for key in OWN_FIELDS}
        for key in OWN_FIELDS:
            setattr(self.args, key, AS_IT_IS)
        try:
            super()._hp_search_setup(trial)
        finally:
            for key, value in old.items():
                if getattr(self.args, key) is AS_IT_IS:
                    setattr(self.args, key, value)
        if self.model_init is not None:  # a model built again, and a trial's arguments; else `train` has done it
            self._settle_balancing()

    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], dict[str, float]] | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As in `Trainer`, also over the arguments of balancing: `{"balancer": "famo"}`, or a mapping with options.

        The default objective is Trainer's: the loss, or the sum of the metrics where there are any. The tasks' losses
        `eval_loss_<task>` are none of them.
        """
        objective = self._objective_of_search if compute_objective is None else compute_objective
        return super().hyperparameter_search(hp_space, objective, *args, **kwargs)

    def _objective_of_search(self, metrics: dict[str, float]) -> float:
        names = evaluation_names(self.eval_dataset)
        others = [name for name in names if name not in self._by_task(self.eval_dataset)]
        kept = {
            key: value
            for key, value in metrics.items()
            if is_task_loss(key, (), others) or not is_task_loss(key, self.task_names, names)
        }
        return float(default_compute_objective(kept))

    def _build_balancer(self, settings: RunSettings) -> LossBalancer:
        return build_balancer(
            settings.name,
            task_names=self.task_names,
            absent_tasks=resolve_absent_tasks(self),
            task_priors=self.args.task_priors,
            device=self.args.device,
            dtype=settings.dtype,
            **settings.options,
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

    def has_stopped_improving(self) -> bool:
        """Whether `early_stopping` ends the training here; the evaluation is in the log already."""
        options = self.args.early_stopping_options()
        metric = self.args.metric_for_best_model
        if options is None or metric is None or not self.is_in_train:
            return False
        values = values_of(self.state.log_history, metric)
        better = bool(self.args.greater_is_better)
        without = evaluations_without_gain(values, better, options.threshold)
        if without >= options.patience:
            logger.info("early_stopping: %s was not better in the last %d evaluations", metric, without)
        return without >= options.patience

    def begin_epoch(self, epoch: int, dataloader: Any) -> None:
        """Tell data set and task sampler which epoch comes, and how far into it a resumed run goes on."""
        if isinstance(self.train_dataset, EpochDataset):
            # accelerate does it too, but not in the epoch that a run goes on in.
            self.train_dataset.set_epoch(epoch)
        if self._task_sampling is not None:
            done = self.data_position.skipped_updates * self.args.gradient_accumulation_steps
            set_sampler_epoch(dataloader, epoch, done)

    # --- the Hub -------------------------------------------------------------------------------------------------

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """As in `Trainer`: write `README.md` into the output folder. It tells of tasks, metrics and balancer.

        Args:
            language, license, tags, model_name: for the head of the card.
            finetuned_from: the model on the Hub that this one was made from.
            tasks: the Hub's word for what the model does; of several, the first.
            dataset_tags: the data set's name on the Hub; of several, the first.
            dataset, dataset_args: the data set's name for a reader.
        """
        path = Path(self.args.output_dir) / CARD_FILE
        if not self.is_world_process_zero():
            return
        if path.is_file() and is_written_by_hand(path.read_text(encoding="utf-8")):
            return
        given = {
            "language": _several(language),
            "license": license,
            "tags": _several(tags),
            "base_model": finetuned_from,
            "pipeline_tag": next(iter(_several(tasks)), None),
            "hub_data": next(iter(_several(dataset_tags)), None),
            "data": ", ".join((*_several(dataset), *_several(dataset_args))),
        }
        write_text(path, card_text(trainer_facts(self, model_name, **given)))

    # --- one batch -----------------------------------------------------------------------------------------------

    def _announce(self, batches: list) -> None:
        """These are the micro-batches of the next step, which `training_step` gets one after the other."""
        balancer = self.balancer
        replayed = balancer.needs_reevaluation or balancer.needs_look_ahead or self.args.diagnostics is not None
        self.current_step = OptimizerStep(batches, weakref.WeakMethod(self._forward), self.args.device, replayed)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | int | None:
        # Counting labels for the model's own loss scaling would cost a gather; our shares come from the task counts.
        return None if self._ordinary is False else super()._get_num_items_in_batch(batch_samples, device)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch: forward, decision on the global losses, this rank's exact share of the backward pass.

        Returns the micro-batch's part of F, detached. The router is updated after the optimizer's step
        (`finish_step`), so that a step that is dropped (overflow, `nonfinite_loss: skip`) leaves it alone.
        """
        if isinstance(inputs, Filler):
            return torch.zeros((), device=self.args.device)
        if self.current_step.number + 1 >= len(self.current_step.batches):  # called by hand
            self._announce_by_hand(model, inputs)
        step = self.current_step
        step.number += 1
        if step.number == 0:
            self._begin_step(model, step)
        step.next()
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
            if self._ordinary is False and step.calls == 0:
                raise TrainerError(
                    f"compute_loss of {type(self).__name__} never called that of BilevelMTLTrainer: the tasks would "
                    "not be balanced; call super().compute_loss, or give the Trainer a task_loss_func"
                )
        finally:
            step.calls = None
        return loss

    def _announce_by_hand(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        if self.args.gradient_accumulation_steps > 1 and not self._is_ordinary(model, inputs):
            raise TrainerError(
                f"gradient_accumulation_steps: {self.args.gradient_accumulation_steps} micro-batches make an update, "
                "and balancing needs all of them: training_step was called with one that get_batch_samples did not "
                "return"
            )
        self._announce([inputs])

    def _begin_step(self, model: nn.Module, step: OptimizerStep) -> None:
        self.balancer.phase = self._phase()
        several = len(step.batches) > 1
        over_window = self.args.balance_over == "window" and several
        if several and not over_window:
            self._count_window(model, step)
        if over_window or self.balancer.needs_look_ahead:
            self._to_training(model)
        step.begin(self.balancer, self.model, undoable=self.args.nonfinite_loss == "skip")
        if not over_window and not self.balancer.needs_look_ahead:
            return
        if self._ordinary is not False and self._is_ordinary(model, step.batches[0]):
            return
        losses = step.window_losses(model) if over_window else []
        if self.balancer.needs_look_ahead:
            self._look_ahead(step)
        if over_window:
            # F once, at the losses of all micro-batches together, of a first pass without gradients.
            step.weighting = self.balancer.decide(losses)
            step.parts.append(Part(step.weighting, step.weighting.value + step.weighting.auxiliary_loss, None))

    def _build_window_counter(self) -> WindowCounter:
        return WindowCounter(self._item_counter, self.task_names, self.balancer.device, self.balancer.dtype)

    def _to_training(self, model: nn.Module) -> None:
        """Before a pass that comes before `Trainer.training_step`."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()  # schedule-free optimizers keep other parameters for evaluation

    def _count_window(self, model: nn.Module, step: OptimizerStep) -> None:
        """The shares of the micro-batches that come, each of which is balanced on its own."""
        if self._ordinary:
            return

        def first_pass() -> list[TaskLosses]:
            self._to_training(model)
            return step.first_pass(model)

        # Before a model with one task has run, nobody knows whether it has losses of ours.
        known = self._ordinary is False
        step.window = self._window_counter.window(step.batches, first_pass if known else None)

    def _look_ahead(self, step: OptimizerStep) -> None:
        """The step that will be taken, tried and undone: clipped and unscaled as the real one is."""
        parameters, scaler = list(self.model.parameters()), self.accelerator.scaler

        def clip() -> None:
            if self.args.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(parameters, self.args.max_grad_norm)

        scale = 1.0 if scaler is None else scaler.get_scale()
        try:
            self.balancer.look_ahead(step.runs(self.model), before_step=clip, loss_scale=scale)
        except NonFiniteLossError as error:
            raise self._with_step(error) from None

    def _with_step(self, error: NonFiniteLossError) -> NonFiniteLossError:
        """What the balancer says of losses other than those of the batch gets the number of the step."""
        return NonFiniteLossError(f"step {self.state.global_step + 1}: {error}")

    def _phase(self) -> Phase:
        step, last = self.state.global_step, self.args.balancer_freeze_after
        if step < self.args.balancer_warmup_steps:
            return "warmup"
        return "balancing" if last is None or step < last else "frozen"

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, Any]:
        """In training mode the balanced loss of a micro-batch; in evaluation the unweighted mean of the tasks' losses.

        It is pure but where `training_step` calls it, once for each micro-batch: only then does the balancer learn from
        the losses, and only then are they logged. Called by hand it returns what the loss of this rank's batch would
        be, without communication; its gradients reach the model's parameters as in a step.
        """
        loss, outputs = None, None
        if self._ordinary is not False:
            loss, outputs = self._ordinary_loss(model, inputs, num_items_in_batch)
        if loss is None:
            outputs = self._outputs(model, inputs) if outputs is None else outputs
            batch = self._task_losses(outputs, inputs)
            if not model.training:
                loss = self._evaluated_loss(model, batch, inputs)
            else:
                loss = self._balanced_loss(model, batch, outputs, inputs)
        return (loss, self._named_outputs(outputs)) if return_outputs else loss

    def _balanced_loss(self, model: nn.Module, batch: TaskLosses, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        step = self.current_step
        if step.calls is None:
            return self.balancer.preview(batch)
        step.calls += 1
        if step.weighting is not None:
            share = share_of_window(batch, step.weighting, len(step.batches), max(step.number, 0))
            loss = self.balancer.apply(batch, step.weighting, share)
        else:
            loss = self._weigh_micro_batch(batch, step)
        in_order = self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage >= 2
        if not batch.complete:
            # Heads without a loss on this rank may have one on another: every one takes part in the reduction. On one
            # process alike, so that an optimizer with momentum does the same on any number of them.
            if in_order or self._finds_unused(model):
                zero = reduction.reach(tensors_in(outputs))
                loss = loss if zero is None else loss + zero.to(loss.dtype)
            else:
                loss = reduction.reach_rest(loss, model.parameters())
        if not loss.requires_grad:
            raise TaskLossError(
                "losses: none of them depends on a trainable parameter (detached, or made under torch.no_grad), "
                "expected losses that a backward pass can start from"
            )
        if in_order:
            check_same_reach(loss, self.model.named_parameters())
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            # Its backward pass ends in the optimizer's step: too late to look afterwards.
            self.goes_on(self.current_step.problem(self.state.global_step + 1))
        return loss

    def _finds_unused(self, model: nn.Module) -> bool:
        """Whether DistributedDataParallel looks for parameters without a gradient; what it would do, on one process.
        FSDP2 is told to (`begin_run`), DeepSpeed does not."""
        if isinstance(model, DistributedDataParallel):
            return bool(model.find_unused_parameters)
        if self.is_deepspeed_enabled:
            return False
        if self.args.ddp_find_unused_parameters is not None:
            return bool(self.args.ddp_find_unused_parameters)
        return not (isinstance(self.model, PreTrainedModel) and compat.checkpoints_activations(self.args, self.model))

    def _weigh_micro_batch(self, batch: TaskLosses, step: OptimizerStep) -> Tensor:
        share = None if step.window is None else step.window.share(max(step.number, 0))
        if step.calls != 1:
            # Two passes in one step, with other dropout masks: the balancer learns from the first one.
            return self.balancer.preview(batch, share, alone=False)
        if step.window is not None:
            self._window_counter.compare(step.window, max(step.number, 0), batch)
        loss, weighting = self.balancer.surrogate(batch, share=share)
        step.parts.append(Part(weighting, loss.detach(), share))
        return loss

    # --- the optimizer's step (called by BalancerCallbackHandler) -------------------------------------------------

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """As in `Trainer`, which asks for it in every step before the optimizer's; also looked at."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.current_step.gradient_norm = self._norm_to_look_at(self._unlogged_norm if norm is None else norm)
        return norm

    def goes_on(self, problem: Problem | None) -> bool:
        """Whether the step is taken in spite of what was found in its losses or gradient; raise, or drop it, as
        `nonfinite_loss` says."""
        step = self.current_step
        if not step.begun:
            self._check_begun()
        if problem is None or (problem.task == GRADIENT and self._is_clipped_away(step)):
            return True
        if self.args.nonfinite_loss == "raise" or problem.refused:
            message = (
                problem.message if problem.task != GRADIENT else f"{problem.message}: {self._say_whose_gradient(step)}"
            )
            raise NonFiniteLossError(self._item_counter.explain(message, problem.task, step.batches))
        self._drop_step(step, problem.task)
        return False

    def _check_begun(self) -> None:
        if self._ordinary is False:
            raise TrainerError(
                f"training_step of {type(self).__name__} never called that of BilevelMTLTrainer: the tasks would not "
                "be balanced; call super().training_step"
            )

    def _norm_to_look_at(self, norm: Any) -> Tensor | None:
        """The gradient's norm; None where a GradScaler looks at the gradient, and skips the step when it overflows."""
        scaler = self.accelerator.scaler
        if norm is None or (scaler is not None and scaler.is_enabled()):
            return None
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        return norm if isinstance(norm, Tensor) else torch.tensor(norm)

    def _is_clipped_away(self, step: OptimizerStep) -> bool:
        """Whether the gradient is finite and only its norm overflows (a loss of 1e30): clipping has made it zero.

        Looked at where the norm is not finite; said once.
        """
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if self.args.max_grad_norm <= 0 or not gradients:
            return False
        bad = torch.stack([~local_part(grad).isfinite().all() for grad in gradients]).any().float()
        if bool(reduction.all_reduce_sum(bad)):
            return False
        if not self._overflow_said:
            self._overflow_said = True
            task, loss = step.largest_loss()
            logger.warning(
                "step %d: the gradient's norm is beyond its number type, so that clipping makes the gradient zero; the "
                "largest loss is that of task %r, %.4g",
                *(self.state.global_step + 1, task, loss),
            )
        return True

    def _say_whose_gradient(self, step: OptimizerStep) -> str:
        """Which tasks have a gradient that is not finite, from one more pass over the step's batches."""
        tasks: list[str] = []
        looks = not self.is_fsdp_enabled and not self.is_deepspeed_enabled
        if looks:
            parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            with unchanged(self.model):
                tasks = tasks_with_nonfinite_slope(step.again(self.model), parameters, self.task_names)
        if not tasks:
            task, loss = step.largest_loss()
            found = "no single task's slope is undefined" if looks else "whose is not looked for in sharded parameters"
            return (
                f"{found}; the largest loss is that of task {task!r}, {loss:.4g}, whose "
                "gradient may be too large for the number type (fix the data or the model, or set nonfinite_loss: skip)"
            )
        shown = ", ".join(repr(task) for task in tasks[:8])
        return (
            f"that of task {shown} is not defined; look for a root or a norm at 0, and for a mean over no items that "
            "is masked afterwards (mask before the mean), or set nonfinite_loss: skip"
        )

    def _drop_step(self, step: OptimizerStep, task: str) -> None:
        step.undo()
        self._running_log.drop(task)
        whose = "the gradient" if task == GRADIENT else f"the loss of task {task!r}"
        logger.warning("step %d is dropped: %s is not finite", self.state.global_step + 1, whose)
        scaler = self.accelerator.scaler
        if scaler is not None:
            # Clipping may have begun the scaler's round; closed at the same scale, it takes the next one.
            scaler.update(scaler.get_scale())
        # The prepared optimizer does nothing between synchronisation points, and reports the step as skipped.
        self.accelerator.gradient_state._set_sync_gradients(False)
        self.optimizer._is_overflow = True

    def finish_step(self, dropped: bool) -> None:
        """After the optimizer's step: step the router and count the step, unless either was skipped."""
        step = self.current_step
        if dropped:
            self.optimizer._is_overflow = False
            self.accelerator.gradient_state._set_sync_gradients(True)
            self._count_dropped()
        elif step.begun and step.parts:
            if self.accelerator.optimizer_step_was_skipped:
                self.balancer.discard()
                self._count_dropped()
            else:
                self._dropped_in_a_row = 0
                self._step_balancer()
            self._running_log.commit(step.parts)
        step.begun = False

    def _step_balancer(self) -> None:
        if not self.balancer.needs_reevaluation:
            self.balancer.step()
            return
        try:
            self.balancer.step(reevaluate=self.reevaluations())
        except NonFiniteLossError as error:
            raise self._with_step(error) from None
        finally:
            reshard(self.model)

    def _count_dropped(self) -> None:
        self._dropped_in_a_row += 1
        if self._dropped_in_a_row >= self.args.max_dropped_steps:
            raise NonFiniteLossError(
                f"step {self.state.global_step}: the last {self._dropped_in_a_row} steps were dropped because losses "
                "or gradients were not finite; nothing is learned any more (max_dropped_steps)"
            )

    def reevaluations(self) -> list[Callable[[], TaskLosses]]:
        """For each micro-batch of the current step a function that runs the model on it once more, with the same
        dropout masks; empty where none is under way or nothing was decided (a dropped one, an ordinary model)."""
        # The bare model: a forward pass of DistributedDataParallel would expect a backward pass through its hooks.
        return self.current_step.runs(self.model) if self.current_step.begun and self.current_step.parts else []

    def begin_run(self) -> None:
        """At the start of a training loop: a fresh balancer unless one was just restored from a checkpoint."""
        self.balancer.bind(self.model, plain_optimizer(self.optimizer))
        find_unused(self.model)
        self._watch_gradient()
        if not self._restored:
            self.balancer.restart(self._initial_state)
            self._running_log.reset()
        self._restored = False
        self._window_counter = self._build_window_counter()
        self._announce([])
        self._dropped_in_a_row = 0
        if self.is_world_process_zero() and len(self.task_names) > MAX_TASKS_IN_LOG:
            truncate_vectors(self.args.output_dir, self.state.global_step)

    def _watch_gradient(self) -> None:
        """DeepSpeed tells no norm of the gradient at stage 0, and has forgotten the gradient when it returns."""
        self._unlogged_norm = None
        if not self.is_deepspeed_enabled or self.accelerator.state.deepspeed_plugin.zero_stage > 0:
            return
        trainer: Any = weakref.proxy(self)

        def keep_norm(optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            trainer._unlogged_norm = torch.nn.utils.get_total_norm(gradients)

        plain_optimizer(self.optimizer).register_step_pre_hook(keep_norm)

    # --- logs ----------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `Trainer`, plus `loss_mean`, `loss/<task>`, `weight/<task>`, `coefficient/<task>`, `discrepancy`."""
        if self._ordinary is False and "loss" in logs:
            ours, columns = self._running_log.drain()
            logs.update(ours)
            for message in self.balancer.diagnose():
                logger.warning("balancer %s: %s", self.balancer.name, message)
            told = self._window_counter.due_message()
            if told is not None:
                logger.warning("%s", told)
            if len(self.task_names) > MAX_TASKS_IN_LOG and self.is_world_process_zero():
                append_vectors(self.args.output_dir, self.state.global_step, self.state.epoch, columns)
        if self._ordinary is False and "train_loss" in logs:
            logs["train_loss"] = self._running_log.run_mean()
            unseen = self.balancer.unseen_tasks() if self.state.global_step > 0 else []
            if unseen:
                logger.warning("%s had no label, or no loss, in any step: not trained", short_names(unseen))
        super().log(logs, start_time)

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As in `Trainer`, from complete checkpoints only; a damaged, foreign or other-task checkpoint is refused with
        one line (`CheckpointError`) before anything is loaded. `training_loss` is the mean F of the whole run.

        Arguments that were changed since the last training, or are changed by a trial of `hyperparameter_search`, hold
        for this one: `balancer`, `task_names` and the others.
        """
        if self.model is not None:  # a search sets it to None between its trials; `_hp_search_setup` comes later
            self._settle_balancing()
        self._adopt_callbacks()
        if self.model_init is None:
            # Like the optimizer, the balancer goes on from a former `train`; a model built again gets a fresh one.
            self._initial_state = self.balancer.snapshot()
            self.balancer.bind(self.model)
        self._restored = False
        with self._batches_announced(self._announce, self._filled_up):
            output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        return output if self._ordinary else output._replace(training_loss=output.metrics["train_loss"])

    def _check_checkpoint(self, checkpoint: str) -> None:
        super()._check_checkpoint(checkpoint)
        if checkpointing.has_whole_balancer(checkpoint):
            self.balancer.bind(self.model)
            checkpointing.read_balancer(checkpoint, self.balancer)
        else:
            checkpointing.check_description(checkpoint, self.balancer)

    def _is_balancing(self) -> bool:
        # An ordinary model is known as such after its first output only; what may be one has one task.
        return self._ordinary is False

    def _writes_into_folder(self) -> bool:
        looks = any(isinstance(callback, GradientDiagnostics) for callback in self._diagnostics)
        return super()._writes_into_folder() or len(self.task_names) > MAX_TASKS_IN_LOG or looks

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            with self._writing(output_dir, checkpointing.TENSORS):
                checkpointing.save_balancer(output_dir, self.balancer, self._running_log, self._run_id)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        # Without its files it starts fresh, which has been said when the checkpoint was looked at.
        if checkpoint is not None and checkpointing.has_whole_balancer(checkpoint):
            self.balancer.bind(self.model)
            checkpointing.load_balancer(checkpoint, self.balancer, self._running_log)
            self._restored = True

    def _load_best_model(self) -> None:
        super()._load_best_model()
        best = self.state.best_model_checkpoint
        if checkpointing.has_whole_balancer(best):
            checkpointing.load_balancer(best, self.balancer)
        elif self._is_balancing():
            logger.warning("%s holds no balancer state (save_only_model): the balancer stays at the last step", best)


def _several(given: str | list[str] | None) -> tuple[str, ...]:
    return () if given is None else (given,) if isinstance(given, str) else tuple(given)
