"""`BilevelMTLTrainer`: `transformers.Trainer` for K tasks in balance, at the cost of one backward pass.

The way of a batch: model -> K losses (`compute_loss`) -> global losses -> objective -> coefficients -> one backward pass
(`training_step`) -> optimizer -> router (`BalancerCallback.on_optimizer_step`) -> logs -> checkpoint.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, rotate_checkpoints

from hf_bilb import checkpointing, distributed
from hf_bilb.accumulation import AccumulationWindow, label_counts
from hf_bilb.balancers.base import LossBalancer, NonFiniteLossError, describe_invalid
from hf_bilb.balancers.registry import build_balancer
from hf_bilb.evaluation import EvaluationLosses, first_examples, own_examples
from hf_bilb.options import OptionError
from hf_bilb.running_log import MAX_TASKS_IN_LOG, RunningLog, append_vectors, truncate_vectors
from hf_bilb.task_losses import TaskLosses, TaskLossError, as_task_losses, check_task_names
from hf_bilb.trainer_callback import BalancerCallback, pass_balancer
from hf_bilb.training_args import BilevelMTLTrainingArguments

logger = logging.getLogger(__name__)

#: Output fields of the contract; they are no predictions.
CONTRACT_FIELDS = ["losses", "num_items", "router_features", "auxiliary_loss"]

TaskLossFunc = Callable[[Any, Mapping[str, Any]], Any]
TaskItemCounts = Callable[[Mapping[str, Any]], Tensor]


class BilevelMTLTrainer(Trainer):
    """Drop-in for `transformers.Trainer` that balances K task losses.

    Args:
        *args, **kwargs: those of `transformers.Trainer`; `args` is a `BilevelMTLTrainingArguments`.
        task_loss_func: `(outputs, batch) -> losses` or `-> (losses, num_items)`; losses a tensor `[K]` or a dict task ->
            scalar, num_items likewise. Without it the model's output fields `losses`, `num_items`, `auxiliary_loss` are
            taken (the contract stands in `hf_bilb.task_losses`).
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
        self._staging: Path | None = None
        super().__init__(*args, **kwargs)
        self._check_settings()
        self.task_loss_func = task_loss_func
        self.task_item_counts = task_item_counts
        self.task_names = self._resolve_task_names()
        # A model with one task may be an ordinary one; its first output tells. None = not known yet.
        self._ordinary: bool | None = None if len(self.task_names) == 1 and task_loss_func is None else False
        self.loss_is_scaled_for_ga = None if self._ordinary is None else True
        self.balancer = self._build_balancer()
        self._running_log = RunningLog(self.task_names, self.balancer.device, self.balancer.dtype)
        self._initial_state = self.balancer.state_dict()
        self._restored = False
        self._window: AccumulationWindow | None = None
        self._micro_batch = -1
        self._invalid: Tensor | None = None
        self._invalid_losses: Tensor | None = None
        self._before_update: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None
        self._evaluation: EvaluationLosses | None = None
        self._counts_warned = False
        self._forward_names, self._forward_takes_any = self._forward_signature()
        pass_balancer(self.callback_handler, self.balancer)
        self.callback_handler.callbacks.insert(0, BalancerCallback(self))

    # --- set-up --------------------------------------------------------------------------------------------------

    def _check_settings(self) -> None:
        args = self.args
        if not isinstance(args, BilevelMTLTrainingArguments):
            raise OptionError(f"args: got {type(args).__name__}, expected BilevelMTLTrainingArguments")
        if args.n_gpu > 1:
            raise OptionError(
                f"n_gpu: {args.n_gpu} GPUs in one process mean DataParallel, which averages F over shards; "
                "start one process per GPU with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one"
            )
        sizes = {"tensor": self.get_tp_size(), "context": self.get_cp_size(), "sequence": self.get_sp_size()}
        for kind, size in sizes.items():
            if size > 1:
                raise OptionError(f"parallelism_config: {kind} parallelism ({size}) is not supported: losses would be counted {size} times")
        if args.nonfinite_loss == "skip" and self.is_deepspeed_enabled:
            raise OptionError("nonfinite_loss: 'skip' is not valid with DeepSpeed, which steps inside its backward pass; use 'raise'")

    def _resolve_task_names(self) -> tuple[str, ...]:
        config = getattr(self.model, "config", None)
        of_model = getattr(config, "task_names", None)
        names = self.args.task_names if self.args.task_names is not None else of_model
        if names is None:
            return ("task_0",)
        if of_model is not None and list(of_model) != list(names):
            raise OptionError(f"task_names: {list(names)} do not match model.config.task_names {list(of_model)}")
        if len(names) > 1 and self.compute_loss_func is not None:
            raise OptionError("compute_loss_func: would be ignored with several tasks; use task_loss_func")
        return check_task_names(names)

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

    def _forward_signature(self) -> tuple[set[str], bool]:
        model = self.accelerator.unwrap_model(self.model)
        base = model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model
        parameters = inspect.signature(base.forward).parameters
        return set(parameters), any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())

    def _model_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The columns that the model's forward takes; label columns go to `task_loss_func` alone unless it names them."""
        if self._forward_takes_any:
            return {k: v for k, v in inputs.items() if k in self._forward_names or k not in self.label_names}
        return {k: v for k, v in inputs.items() if k in self._forward_names}

    # --- one batch -----------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """As in `Trainer`; under gradient accumulation also counts the items of the window."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._micro_batch = -1
        self._window = None
        if self._ordinary is False and len(batches) > 1:
            self._window = AccumulationWindow.count([self._item_counts(batch) for batch in batches], device)
        return batches, num_items

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | int | None:
        # Counting labels for the model's own loss scaling would cost a gather; our shares come from the task counts.
        return None if self._ordinary is False else super()._get_num_items_in_batch(batch_samples, device)

    def _item_counts(self, batch: Mapping[str, Any]) -> Tensor:
        if self.task_item_counts is not None:
            counts = self.task_item_counts(batch)
            if not isinstance(counts, Tensor) or counts.shape != (len(self.task_names),):
                raise TaskLossError(f"task_item_counts: returned {counts!r}, expected a tensor [{len(self.task_names)}]")
            return counts
        counts = label_counts(batch, self.label_names, len(self.task_names))
        if counts is not None:
            return counts
        return torch.full((len(self.task_names),), float(find_batch_size(batch) or 1))

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch: forward, decision on the global losses, this rank's exact share of the backward pass.

        Returns the micro-batch's part of F, detached. The router is updated after the optimizer's step, so that a step
        that is dropped (overflow, `nonfinite_loss: skip`) leaves it alone.
        """
        self._micro_batch += 1
        if self._micro_batch == 0 and self.args.nonfinite_loss == "skip":
            buffers = {name: buffer.detach().clone() for name, buffer in self.model.named_buffers()}
            self._before_update = (self.balancer.state_dict(), buffers)
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, Any]:
        """In training the balanced loss of a micro-batch; in evaluation the unweighted mean of the present tasks' losses."""
        outputs = None
        if self._ordinary is not False:
            if self._ordinary is None and self.compute_loss_func is None and self.label_smoother is None:
                watched = _Watched(model)
                loss, outputs = super().compute_loss(watched, inputs, True, num_items_in_batch)
                self._settle_ordinary("losses" not in outputs if isinstance(outputs, Mapping) else True)
            else:
                self._settle_ordinary(True)
                loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            if self._ordinary:
                return (loss, outputs) if return_outputs else loss
        if outputs is None:
            outputs = model(**self._model_inputs(inputs))
        batch = self._task_losses(outputs, inputs)
        loss = self._balanced_loss(model, batch, outputs) if model.training else self._evaluated_loss(model, batch, inputs)
        return (loss, outputs) if return_outputs else loss

    def _settle_ordinary(self, ordinary: bool) -> None:
        self._ordinary = ordinary
        self.loss_is_scaled_for_ga = None if ordinary else True

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
                f"the model returned no `losses` (it returned: {got}); return a field `losses` [{len(self.task_names)}], "
                "or give the Trainer a task_loss_func(outputs, batch)"
            )
        if num_items is not None and self._window is not None and not self._counts_warned:
            self._warn_about_counts(inputs)
        return as_task_losses(
            losses,
            num_items,
            self.task_names,
            default_items=float(find_batch_size(inputs) or 1),
            router_features=fields.get("router_features"),
            auxiliary_loss=fields.get("auxiliary_loss"),
        )

    def _warn_about_counts(self, inputs: Mapping[str, Any]) -> None:
        self._counts_warned = True
        if self.task_item_counts is None and label_counts(inputs, self.label_names, len(self.task_names)) is None:
            logger.warning(
                "gradient accumulation with counts `num_items`, but the label columns %s do not tell the counts of a whole "
                "window: micro-batches are weighted by their size; give the Trainer task_item_counts(batch) -> [K]",
                self.label_names,
            )

    def _balanced_loss(self, model: nn.Module, batch: TaskLosses, outputs: Any) -> Tensor:
        share = None if self._window is None else self._window.share(max(self._micro_batch, 0))
        loss, decision = self.balancer.surrogate(batch, share=share)
        if not batch.complete and isinstance(model, DistributedDataParallel):
            # Heads without a loss on this rank may have one on another: every output takes part in the reduction.
            everywhere = [] if model.find_unused_parameters else list(model.parameters())
            zero = distributed.reach([*_tensors(outputs), *everywhere])
            loss = loss if zero is None else loss + zero.to(loss.dtype)
        fraction = loss.new_ones(()) if share is None else share.fraction
        self._running_log.add(decision, fraction, batch.auxiliary_loss is not None)
        if self._invalid is None:
            self._invalid, self._invalid_losses = decision.invalid, decision.losses
        else:
            fresh = decision.invalid[:-1] > self._invalid[:-1]
            self._invalid_losses = torch.where(fresh, decision.losses, self._invalid_losses)
            self._invalid = torch.maximum(self._invalid, decision.invalid)
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            # Its backward pass ends in the optimizer's step: too late to look afterwards.
            self.update_is_valid()
        return loss

    # --- one update (called by BalancerCallback) -----------------------------------------------------------------

    def update_is_valid(self) -> bool:
        """Look at the update's losses, one host read; raise or drop it as `nonfinite_loss` says when one is invalid."""
        if self._invalid is None or not bool(self._invalid.any()):
            return True
        codes, losses = self._invalid, self._invalid_losses
        self._invalid = self._invalid_losses = None
        if self.args.nonfinite_loss == "raise" or bool((codes == 2).any()):
            raise NonFiniteLossError(describe_invalid(codes, losses, self.balancer, self.state.global_step + 1))
        self._drop_update([*self.task_names, "auxiliary_loss"][int(codes.argmax())])
        return False

    def _drop_update(self, task: str) -> None:
        state, buffers = self._before_update
        self.balancer.load_state_dict(state)
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                buffer.copy_(buffers[name])
        self._running_log.drop(task)
        logger.warning("step %d is dropped: the loss of task %r is not finite", self.state.global_step + 1, task)
        if self.accelerator.scaler is not None:
            # Close the scaler's round, or it refuses the next one.
            if self.args.max_grad_norm <= 0:
                self.accelerator.unscale_gradients(self.optimizer)
            self.accelerator.scaler.update()
        # The prepared optimizer does nothing between synchronisation points, and reports the step as skipped.
        self.accelerator.gradient_state._set_sync_gradients(False)
        self.optimizer._is_overflow = True

    def finish_update(self, dropped: bool) -> None:
        """After the optimizer's step: step the router and count the update, unless either was skipped."""
        if dropped:
            self.optimizer._is_overflow = False
            self.accelerator.gradient_state._set_sync_gradients(True)
        elif self._invalid is not None:
            if self.accelerator.optimizer_step_was_skipped:
                self.balancer.discard()
            else:
                self.balancer.step()
            self._running_log.commit()
        self._invalid = self._invalid_losses = None

    def begin_run(self) -> None:
        """At the start of a training loop: a fresh balancer unless one was just restored from a checkpoint."""
        self.balancer.bind(self.model, self.optimizer)
        if not self._restored:
            self.balancer.load_state_dict(self._initial_state)
            self._running_log.reset()
        self._restored = False
        self._invalid = self._invalid_losses = None
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
            output.metrics.update(self._evaluation.metrics(self.task_names, prefix))
        self._evaluation = None
        return output

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Any, Any]:
        """As in `Trainer`; the contract's fields are no predictions, and unknown columns are withheld from the model."""
        if self._ordinary:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if ignore_keys is None:
            ignore_keys = getattr(getattr(self.model, "config", None), "keys_to_ignore_at_inference", None) or ["past_key_values"]
        if not self.label_names or any(inputs.get(name) is None for name in self.label_names):
            inputs = self._model_inputs(inputs)
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
        size = int(find_batch_size(inputs) or 0)
        own = own_examples(size, self.args.process_index, progress.remainder)
        # Every rank runs the same forward passes (sharded models communicate in them), on one example at least.
        cut = first_examples(inputs, size, max(own, 1))
        if cut is None:
            logger.warning("the last evaluation batch repeats examples that cannot be told apart; its losses count them")
            return batch
        again = self._task_losses(model(**self._model_inputs(cut)), cut)
        return again if own > 0 else TaskLosses(again.losses, torch.zeros_like(again.num_items))

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in `Trainer`. `resume_from_checkpoint=True` takes the last *complete* checkpoint; a damaged, foreign or
        other-task checkpoint is refused with one line (`CheckpointError`) before anything is loaded."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = checkpointing.last_complete_checkpoint(self.args.output_dir)
        if resume_from_checkpoint:
            checkpointing.verify(resume_from_checkpoint)
            if checkpointing.has_balancer(resume_from_checkpoint):
                checkpointing.read_balancer(resume_from_checkpoint, self.balancer)
        self._initial_state = self.balancer.state_dict()
        self._restored = False
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        return output if self._ordinary else output._replace(training_loss=output.metrics["train_loss"])

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_folder = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        staged, final = run_folder / checkpointing.STAGING / name, run_folder / name
        if self.args.should_save:
            checkpointing.clear_staging(staged)
        self.accelerator.wait_for_everyone()
        self._staging = staged.parent
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        if self.state.best_model_checkpoint is not None:
            # Best so far may be this one, which Trainer has seen at its temporary place.
            self.state.best_model_checkpoint = str(run_folder / Path(self.state.best_model_checkpoint).name)
        if self.args.should_save:
            self.state.save_to_json(str(staged / "trainer_state.json"))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpointing.publish(staged, final)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(run_folder), self.args.save_total_limit, best, use_mtime=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:
            super()._push_from_checkpoint(checkpoint_folder)

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
            logger.warning("%s holds no balancer state (save_only_model): the balancer starts FRESH, as the optimizer does", checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        best = self.state.best_model_checkpoint
        if checkpointing.has_balancer(best):
            checkpointing.load_balancer(best, self.balancer)
        else:
            logger.warning("%s holds no balancer state (save_only_model): the balancer stays at the last step", best)


class _Watched:
    """Calls the model for `Trainer.compute_loss`, which insists on a `loss` that a multi-task model need not return."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, **inputs: Any) -> Any:
        outputs = self.model(**inputs)
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
