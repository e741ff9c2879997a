"""A `transformers.Trainer` that knows the losses of K tasks and evaluates them exactly; it does not balance them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput

from hf_bilb.accumulation import ItemCounter, batch_size
from hf_bilb.data_trainer import GAVE_NOTHING, DataTrainer, Filler, nothing_to_dispatch, refuse_empty
from hf_bilb.errors import OptionError, TaskLossError
from hf_bilb.evaluation import EvaluationLosses, own_part
from hf_bilb.evaluation_loader import streamed_loader, whole_sets
from hf_bilb.learning_rate import step_schedule, updates_per_epoch
from hf_bilb.metrics.perplexity import LossMetrics
from hf_bilb.metrics.streaming import StreamingMetrics
from hf_bilb.passes import buffers_kept
from hf_bilb.predictions import NotJoinedError, PredictedFields
from hf_bilb.random_state import RandomState
from hf_bilb.task_losses import TaskLosses, as_task_losses
from hf_bilb.trainer_checks import ForwardColumns, check_settings, resolve_task_names
from hf_bilb.training_args import BilevelMTLTrainingArguments

logger = logging.getLogger(__name__)

#: Output fields of the contract; they are no predictions.
CONTRACT_FIELDS = ["losses", "num_items", "router_features", "auxiliary_loss"]

TaskLossFunc = Callable[[Any, Mapping[str, Any]], Any]
TaskItemCounts = Callable[[Mapping[str, Any]], Tensor]


class TaskLossTrainer(DataTrainer):
    """Finds the K losses in a model's output, in training and in evaluation; see `BilevelMTLTrainer` for the arguments.

    A model with one task may be an ordinary one that returns `loss`; its first output tells.
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
        self.task_loss_func = task_loss_func
        self._task_item_counts = task_item_counts
        self._ordinary: bool | None = None  # None = not known yet
        self._evaluation: EvaluationLosses | None = None
        self._fields: PredictedFields | None = None
        self._not_joined: list[str] = []
        self._settle_tasks()

    def _settle_tasks(self) -> None:
        """What follows from the arguments and the model; called again where they may have been changed."""
        check_settings(self)
        self.task_names = resolve_task_names(self)
        self.args.settle_best_metric(self.task_names, evaluation_names(self.eval_dataset))
        self._item_counter = ItemCounter(self._task_item_counts, self.label_names, self.task_names)
        if len(self.task_names) > 1 or self.task_loss_func is not None:
            self._settle_ordinary(False)
        elif self._ordinary is False:
            self._settle_ordinary(None)
        self._columns = ForwardColumns(self.accelerator.unwrap_model(self.model), self.label_names)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """`Trainer`'s, or that of `step_lr`."""
        options = self.args.step_lr_options()
        if options is not None and self.lr_scheduler is None:  # type: ignore[has-type]
            updates = updates_per_epoch(self, num_training_steps)
            self.lr_scheduler = step_schedule(optimizer or self.optimizer, options, updates)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def _named_outputs(self, outputs: Any) -> Any:
        """What a model without losses of its own returned, in the form that `Trainer` takes predictions from: it would
        take the first row of a tensor, or the first entry of a tuple, for the loss."""
        if self.task_loss_func is None or isinstance(outputs, Mapping):
            return outputs
        return {"logits": outputs} if isinstance(outputs, Tensor) else dict(enumerate(outputs))

    # --- losses --------------------------------------------------------------------------------------------------

    def _settle_ordinary(self, ordinary: bool | None) -> None:
        self._ordinary = ordinary
        # Our loss is normalised over the window; an ordinary model's is what Trainer takes it for.
        self.loss_is_scaled_for_ga = True if ordinary is False else None

    def _ordinary_loss(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any
    ) -> tuple[Tensor | None, Any]:
        """Trainer's own loss and outputs for an ordinary model; else None and, where it has run, its outputs."""
        if self._ordinary is False:
            return None, None
        if self._ordinary is None and self.compute_loss_func is None and self.label_smoother is None:
            watched = _Watched(model, self._columns)
            loss, outputs = super().compute_loss(watched, inputs, True, num_items_in_batch)
            self._settle_ordinary("losses" not in outputs if isinstance(outputs, Mapping) else True)
        else:
            self._settle_ordinary(True)
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        return (loss if self._ordinary else None), outputs

    def _is_ordinary(self, model: nn.Module, inputs: Mapping[str, Any]) -> bool:
        """Whether Trainer's own loss is taken, found out by a forward pass without gradients where it is not known."""
        if self._ordinary is None and self.compute_loss_func is None and self.label_smoother is None:
            with torch.no_grad(), buffers_kept(model), self.compute_loss_context_manager():
                now = RandomState.capture(self.args.device)
                outputs = model(**self._columns.select(self._prepare_inputs(dict(inputs)), keep_labels=True))
                now.restore()
            self._settle_ordinary("losses" not in outputs if isinstance(outputs, Mapping) else True)
        return self._ordinary is not False

    def _run(self, model: nn.Module, inputs: Mapping[str, Any]) -> Any:
        """The model's outputs for the columns that it takes."""
        return model(**self._columns.select(inputs))

    def _task_losses(self, outputs: Any, inputs: Mapping[str, Any]) -> TaskLosses:
        """The K losses in a model's outputs, or those that `task_loss_func` makes of them."""
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
        return as_task_losses(
            losses,
            num_items,
            self.task_names,
            default_items=batch_size(inputs),
            router_features=fields.get("router_features"),
            auxiliary_loss=fields.get("auxiliary_loss"),
        )

    def _filled_up(self, batches: list, num_batches: int) -> list:
        """An update of fewer than `num_batches` micro-batches, in the length of which the loop's steps are counted.

        That is the end of a pass of unknown length. An ordinary model's gradients wait for the next one, as in Trainer.
        """
        if not 0 < len(batches) < num_batches:
            return batches
        if self._is_ordinary(self.model_wrapped, batches[0]):
            self.data_position.wait(len(batches))
            return batches
        # First: it is the last micro-batch in whose backward pass the ranks communicate.
        return [Filler() for _ in range(num_batches - len(batches))] + batches

    # --- evaluation ----------------------------------------------------------------------------------------------

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Any = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> Any:
        if is_training:
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)
        refuse_empty(dataset, "test_dataset" if description == "test" else "eval_dataset")
        streamed = streamed_loader(self, dataset, description, batch_size)
        if streamed is not None:
            return streamed
        with whole_sets(self, dataset, drop_as_trainer=self._ordinary is not False):
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As in `Trainer`; `eval_loss` is the unweighted mean of the exact losses `eval_loss_<task>`.

        Output fields whose sizes differ from batch to batch (attentions of texts of different lengths) are no
        predictions.

        Raises:
            OptionError: data without a length give not a single batch.
        """
        of_losses = self.compute_metrics if isinstance(self.compute_metrics, LossMetrics) else None
        if of_losses is not None and description != "Prediction":
            prediction_loss_only = True  # a language model's predictions would not fit into memory
        while True:
            evaluation = self._begin_evaluation()
            try:
                output = super().evaluation_loop(
                    dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
                )
            except NotJoinedError as found:
                # Nothing is kept of what was found so far; the fields are known from now on.
                self._not_joined += found.names
                logger.warning(
                    "the output field(s) %s have other sizes in other batches: they are left out of the predictions",
                    ", ".join(found.names),
                )
                continue
            except (ValueError, TypeError) as error:
                if nothing_to_dispatch(error):
                    raise OptionError(GAVE_NOTHING.format(f"{metric_key_prefix}_dataset")) from None
                raise
            break
        if self._ordinary is False:
            if output.num_samples == 0:
                raise OptionError(GAVE_NOTHING.format(f"{metric_key_prefix}_dataset"))
            losses = evaluation.metrics(self.task_names, metric_key_prefix, of_losses)
            # Trainer's own is a mean of batch means, and zero where no task has a label.
            output.metrics.pop(f"{metric_key_prefix}_loss", None)
            output.metrics.update(losses)
            if not losses and description != "Prediction":
                logger.warning("no evaluation losses: the batches do not hold all of label_names %s", self.label_names)
        self._evaluation = None
        return output

    def _begin_evaluation(self) -> EvaluationLosses:
        self._evaluation = evaluation = EvaluationLosses(len(self.task_names), self.args.device)
        if isinstance(self.compute_metrics, StreamingMetrics):
            # What an evaluation that died has left must not count in this one.
            self.compute_metrics.reset()
        self._fields = None
        over_batches = self.args.eval_do_concat_batches and not self.args.batch_eval_metrics
        if self.preprocess_logits_for_metrics is None and (over_batches or self.args.world_size > 1):
            self._fields = PredictedFields(self.accelerator.gather, self.args.device, over_batches)
        return evaluation

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
        ignored = [*ignore_keys, *CONTRACT_FIELDS, *self._not_joined]
        if self._fields is None or prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignored)
        with self._fields.named_by(model):
            loss, predicted, labels = super().prediction_step(model, inputs, prediction_loss_only, ignored)
        self._fields.check(predicted, ignored)
        return loss, predicted, labels

    def _evaluated_loss(self, model: nn.Module, batch: TaskLosses, inputs: Mapping[str, Any]) -> Tensor:
        """The unweighted mean of the tasks' losses in one batch, which is also taken into the exact ones."""
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
        again = self._task_losses(self._run(model, part), part)
        return again if own > 0 else TaskLosses(again.losses, torch.zeros_like(again.num_items))


def evaluation_names(eval_dataset: Any) -> list[str]:
    """The names of several evaluation sets, which go before those of their metrics."""
    named = isinstance(eval_dataset, Mapping) or type(eval_dataset).__name__ == "DatasetDict"
    return [str(name) for name in eval_dataset] if named else []


def tensors_in(outputs: Any) -> Iterator[Tensor]:
    """The tensors in a model's nested outputs."""
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, Mapping):
        for value in outputs.values():
            yield from tensors_in(value)
    elif isinstance(outputs, (list, tuple)):
        for value in outputs:
            yield from tensors_in(value)


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
