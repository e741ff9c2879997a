"""A `transformers.Trainer` that knows the losses of K tasks and evaluates them exactly; it does not balance them."""

from __future__ import annotations

import dataclasses
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, TrainerControl
from transformers.trainer_utils import EvalLoopOutput

from hf_bilb.config.options import unknown_name
from hf_bilb.engine.replay import RandomState, unchanged
from hf_bilb.errors import MissingColumnError, OptionError, TaskLossError
from hf_bilb.losses.contract import TaskLosses, as_task_losses
from hf_bilb.metrics.perplexity import LossMetrics
from hf_bilb.metrics.trainer_metrics import StreamingMetrics
from hf_bilb.trainer.arguments import BilevelMTLTrainingArguments
from hf_bilb.trainer.checks import (
    check_losses,
    check_reporting,
    check_settings,
    has_task_names,
    look_inside,
    resolve_task_names,
)
from hf_bilb.trainer.collation import FilledLabels, with_missing_labels
from hf_bilb.trainer.columns import ForwardColumns, MissingColumns, config_of
from hf_bilb.trainer.data_trainer import (
    GAVE_NOTHING,
    DataTrainer,
    Filler,
    nothing_to_dispatch,
    refuse_empty,
    say_split_already,
)
from hf_bilb.trainer.evaluation import EvaluationLosses, own_part
from hf_bilb.trainer.evaluation_loader import streamed_loader, whole_sets
from hf_bilb.trainer.item_counts import ItemCounter, batch_size
from hf_bilb.trainer.metrics_by_task import MetricsByTask
from hf_bilb.trainer.parts import check_rates, freeze, split_groups
from hf_bilb.trainer.predictions import NotJoinedError, PredictedFields
from hf_bilb.trainer.schedules import step_schedule, updates_per_epoch
from hf_bilb.trainer.task_datasets import TASK_IDS, TaskCollator, TaskDatasets, sets_of

logger = logging.getLogger(__name__)

#: Output fields of the contract; they are no predictions.
CONTRACT_FIELDS = ["losses", "num_items", "router_features", "auxiliary_loss", "shared_features"]

TaskLossFunc = Callable[[Any, Mapping[str, Any]], Any]
TaskItemCounts = Callable[[Mapping[str, Any]], Tensor]


class TaskLossTrainer(DataTrainer):
    """Finds the K losses in a model's output, in training and in evaluation; see `BilevelMTLTrainer` for the arguments.

    A model with one task may be an ordinary one, which is trained exactly as by `Trainer`: the first output with a loss
    tells (`keeps_contract`).
    """

    args: BilevelMTLTrainingArguments
    train_dataset: Any
    eval_dataset: Any
    control: TrainerControl

    def __init__(
        self,
        *args: Any,
        task_loss_func: TaskLossFunc | None = None,
        task_item_counts: TaskItemCounts | None = None,
        **kwargs: Any,
    ) -> None:
        self._made_optimizer = False  # whether the optimizer is Trainer's, not one that was handed over
        super().__init__(*args, **kwargs)
        look_inside(self)
        self.task_loss_func = task_loss_func
        self._task_item_counts = task_item_counts
        #: Tasks whose counts are batch sizes, and what has been said of evaluations.
        self._assumed: set[str] = set()
        self._remarks: set[str] = set()
        self._ordinary: bool | None = None  # None = not known yet
        self._evaluation: EvaluationLosses | None = None
        self._to_be_evaluated = False
        self._last_columns: list[str] = []
        self._fields: PredictedFields | None = None
        self._not_joined: list[str] = []
        self._settle_tasks()

    def _settle_tasks(self) -> None:
        """What follows from the arguments and the model; called again where they may have been changed."""
        check_settings(self)
        self._settle_parts()
        self.task_names = resolve_task_names(self)
        self._settle_data_sets()
        self.args.settle_best_metric(self.task_names, evaluation_names(self.eval_dataset))
        check_losses(self)
        trainer = weakref.proxy(self)
        several = isinstance(self.train_dataset, TaskDatasets)
        self._columns = ForwardColumns(
            self.model,
            self.label_names,
            withhold_labels=self.task_loss_func is not None,
            told=[TASK_IDS] if several else [],
        )
        self._missing_columns = MissingColumns(
            self._columns,
            self.label_names,
            self.args.remove_unused_columns,
            lambda: (trainer.train_dataset, trainer.eval_dataset),
        )
        counts = self._task_item_counts
        if counts is not None:
            counts = self._missing_columns.watching(counts, "task_item_counts")
        self._item_counter = ItemCounter(counts, self.label_names, self.task_names, self.args.ignore_index)
        if len(self.task_names) > 1 or self.task_loss_func is not None:
            self._settle_ordinary(False)
        elif self._ordinary is False:
            self._settle_ordinary(None)

    def _settle_data_sets(self) -> None:
        """Make one training set of several; look at the evaluation sets that go with them."""
        sets = sets_of(self.train_dataset)
        if sets is not None:
            self.train_dataset = TaskDatasets(sets, self.task_names, "train_dataset")
        if isinstance(self.eval_dataset, Mapping):
            self.eval_dataset = dict(self.eval_dataset)  # Trainer looks for a dict
        by_task = self._by_task(self.eval_dataset)
        if isinstance(self.compute_metrics, MetricsByTask):
            for task in self.compute_metrics.functions:
                if task not in self.task_names:
                    raise unknown_name("compute_metrics", task, self.task_names)
            if self.eval_dataset is not None and not by_task:
                raise OptionError(
                    "compute_metrics: a mapping task -> function needs evaluation sets of one task each: "
                    "eval_dataset={task: data set}, and train_dataset likewise"
                )

    def _settle_parts(self) -> None:
        """Freeze what `freeze` says; look whether `learning_rates` can be followed."""
        if self.model is None:
            return
        if self.args.freeze is not None:
            freeze(self.model, self.args.freeze)
        rates = self.args.learning_rates_options()
        if rates is None:
            return
        if self.optimizer is not None and not self._made_optimizer:
            raise OptionError("learning_rates: would be ignored with an optimizer of your own (optimizers=...)")
        check_rates(self.model, rates)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """`Trainer`'s, with groups of their own for the parts of `learning_rates`."""
        given = self.optimizer is not None
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        if not given:
            self._made_optimizer = True
            rates = self.args.learning_rates_options()
            if rates is not None:
                split_groups(optimizer, self.model, rates)
        return optimizer

    def _validate_args(self) -> None:
        super()._validate_args()
        check_reporting(self.args.report_to)

    # --- columns -------------------------------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        # Trainer would ask a wrapper's forward.
        if self._signature_columns is None:  # type: ignore[has-type]
            self._signature_columns = self._columns.signature

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        return dataset if self._columns.takes_everything else super()._remove_unused_columns(dataset, description)

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        if self._columns.takes_everything:
            return data_collator
        return super()._get_collator_with_removed_columns(data_collator, description)

    @property
    def kept_columns(self) -> list[str] | None:
        """The columns of a data set that reach the collator; None: all of them."""
        return (
            self._columns.signature if self.args.remove_unused_columns and not self._columns.takes_everything else None
        )

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
        if isinstance(outputs, Mapping) or self._ordinary is not False:
            return outputs
        if self.task_loss_func is None or is_dataclass(outputs):
            return fields_of(outputs)
        if isinstance(outputs, (list, tuple)):
            return dict(enumerate(outputs))
        if not isinstance(outputs, Tensor):
            raise TaskLossError(
                f"the model returned a {type(outputs).__name__}, which predictions cannot be taken from; expected a "
                "mapping, a dataclass, a tuple or a tensor"
            )
        return {"logits": outputs}

    # --- losses --------------------------------------------------------------------------------------------------

    def _settle_ordinary(self, ordinary: bool | None) -> None:
        self._ordinary = ordinary
        # Our loss is normalised over the window; an ordinary model's is what Trainer takes it for.
        self.loss_is_scaled_for_ga = True if ordinary is False else None

    def _ordinary_loss(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any
    ) -> tuple[Tensor | None, Any]:
        """Trainer's own loss and outputs for a model that is ordinary, or may be; else None, and its outputs."""
        given = self._columns.select(inputs)
        if self._trainer_makes_loss:
            self._settle_ordinary(True)
            if "labels" in inputs:
                given["labels"] = inputs["labels"]  # which Trainer takes away before it calls the model
        if self._ordinary:
            return super().compute_loss(model, given, True, num_items_in_batch)
        watched = _Watched(model)
        loss, _ = super().compute_loss(watched, given, True, num_items_in_batch)
        self._settle_by(watched.outputs)
        return (loss if self._ordinary else None), watched.outputs

    @property
    def _trainer_makes_loss(self) -> bool:
        """Whether Trainer makes the loss of one task itself, from the model's predictions."""
        return self._ordinary is not False and (self.compute_loss_func is not None or self.label_smoother is not None)

    def _is_ordinary(self, model: nn.Module, inputs: Mapping[str, Any]) -> bool:
        """Whether Trainer's own loss is taken, found out by a forward pass without gradients where it is not known."""
        if self._ordinary is None and self._trainer_makes_loss:
            self._settle_ordinary(True)
        elif self._ordinary is None:
            with torch.no_grad(), unchanged(model), self.compute_loss_context_manager():
                now = RandomState.capture(self.args.device)
                outputs = self._outputs(model, self._prepare_inputs(dict(inputs)))
                now.restore()
            self._settle_by(outputs)
        return self._ordinary is not False

    def _settle_by(self, outputs: Any) -> None:
        self._settle_ordinary(not keeps_contract(outputs, self.task_names[0], has_task_names(self)))
        losses = fields_of(outputs).get("losses")
        if self._ordinary and losses is not None and not has_task_names(self):
            shape = f" of shape {list(losses.shape)}" if isinstance(losses, Tensor) else ""
            logger.warning(
                "the model returns `loss` and `losses`%s, and there are no task_names: it is trained on `loss`, as by "
                "Trainer; name the tasks in task_names to balance `losses`",
                shape,
            )

    def _outputs(self, model: nn.Module, inputs: Any) -> Any:
        """The model's outputs for the columns that it takes."""
        if not isinstance(inputs, Mapping):
            self._columns.select(inputs)  # says what is wrong
        taken = self._columns.taken
        return model(**{key: value for key, value in inputs.items() if taken[key]})

    def _forward(self, model: nn.Module, inputs: Mapping[str, Any]) -> TaskLosses:
        """The losses of one micro-batch, outside the pass that counts."""
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            return self._task_losses(self._outputs(model, inputs), inputs)

    def _task_losses(self, outputs: Any, inputs: Mapping[str, Any]) -> TaskLosses:
        """The K losses in a model's outputs, or those that `task_loss_func` makes of them."""
        fields = fields_of(outputs)
        num_items = fields.get("num_items")
        if self.task_loss_func is not None:
            result = self._result_of_task_loss_func(self.task_loss_func, outputs, inputs)
            losses, num_items = result if isinstance(result, tuple) else (result, self._counts_of_model(num_items))
        elif "losses" in fields:
            losses = fields["losses"]
        else:
            got = ", ".join(fields) or type(outputs).__name__
            raise TaskLossError(
                f"the model returned no `losses` (it returned: {got}); return a field `losses` "
                f"[{len(self.task_names)}], or give the Trainer a task_loss_func(outputs, batch)"
            )
        counts = None if num_items is not None else self._item_counter.count(inputs)
        batch = as_task_losses(
            losses,
            num_items if counts is None else counts.num_items,
            self.task_names,
            router_features=fields.get("router_features"),
            auxiliary_loss=fields.get("auxiliary_loss"),
            shared_features=fields.get("shared_features"),
        )
        if counts is None or not counts.assumed:
            return batch
        assumed = [task for task in counts.assumed if not isinstance(losses, Mapping) or task in losses]
        self._assumed.update(assumed)
        several = self.args.world_size > 1 or self.args.gradient_accumulation_steps > 1
        if assumed and several and torch.is_grad_enabled():
            self._say_assumed()
        return dataclasses.replace(batch, counted=not assumed)

    def _say_assumed(self) -> None:
        self._item_counter.say_assumed([task for task in self.task_names if task in self._assumed])

    def _counts_of_model(self, num_items: Any) -> Any:
        """The model's output field `num_items`, where it is one of the contract's: `[K]`, or by task."""
        vector = isinstance(num_items, Tensor) and num_items.shape == (len(self.task_names),)
        return num_items if vector or isinstance(num_items, Mapping) else None

    def _result_of_task_loss_func(self, func: TaskLossFunc, outputs: Any, inputs: Mapping[str, Any]) -> Any:
        batch = self._missing_columns.watched(inputs, "task_loss_func")
        try:
            result = func(outputs, batch)
        except MissingColumnError:
            raise
        except KeyError as error:
            of_model = ", ".join(map(str, fields_of(outputs))) or type(outputs).__name__
            raise TaskLossError(
                f"task_loss_func: KeyError {error}; the model's outputs are: {of_model}; the batch's columns: "
                f"{', '.join(inputs)}"
            ) from error
        if isinstance(result, tuple) and len(result) != 2:
            raise TaskLossError(
                f"task_loss_func: returned a tuple of {len(result)}, expected losses (a tensor "
                f"[{len(self.task_names)}], or a dict task -> scalar), or the pair (losses, num_items)"
            )
        losses = result[0] if isinstance(result, tuple) and result else result
        if not has_task_names(self) and isinstance(losses, Mapping) and set(losses) != set(self.task_names):
            raise TaskLossError(
                f"task_names: not given, so that there is one task; task_loss_func returned losses of {list(losses)}: "
                f"set task_names={list(losses)}"
            )
        return result

    def _filled_up(self, batches: list, num_batches: int) -> list:
        """A step of fewer than `num_batches` micro-batches, brought to the length in which the loop counts.

        That is the end of a pass of unknown length. An ordinary model's gradients wait for the next one, as in Trainer.
        """
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
            with self._rows_prepared(dataset, description) as ready:
                return super()._get_dataloader(ready, description, batch_size, sampler_fn, is_training, dataloader_key)
        name = "test_dataset" if description == "test" else "eval_dataset"
        dataset = self._with_task(dataset, dataloader_key, name)
        refuse_empty(dataset, name)
        say_split_already(dataset, name, self.args.world_size)
        drop_as_trainer = self._ordinary is not False
        with self._rows_prepared(dataset, description) as ready, whole_sets(self, dataset, drop_as_trainer):
            streamed = streamed_loader(self, ready, description, batch_size)
            if streamed is not None:
                return streamed
            return super()._get_dataloader(ready, description, batch_size, sampler_fn, is_training, dataloader_key)

    @contextmanager
    def _rows_prepared(self, dataset: Any, description: str) -> Iterator[Any]:
        """Loaders of what this gives that are built inside turn labels that are None into NaN, or -100 among integers,
        where the collator is one that Trainer chose. The rows of several sets are prepared as those of their set."""
        given: Any = self.data_collator  # type: ignore[has-type]
        if isinstance(dataset, TaskDatasets):
            dataset, self.data_collator = self._prepared_sets(dataset, given, description)
        else:
            self.data_collator = self._labels_filled(given, dataset)
        try:
            yield dataset
        finally:
            self.data_collator = given

    def _labels_filled(self, collator: Any, dataset: Any) -> Any:
        several = len(self.task_names) > 1
        return with_missing_labels(collator, dataset, self.label_names, several, self._columns.taken)

    def _prepared_sets(self, sets: TaskDatasets, collator: Any, description: str) -> tuple[TaskDatasets, TaskCollator]:
        from datasets import Dataset

        ready: dict[str, Any] = {}
        prepare: dict[int, Callable[[list], list]] = {}
        for task, dataset in sets.datasets.items():
            filled = self._labels_filled(collator, dataset)
            fill = filled.fill if isinstance(filled, FilledLabels) else _as_they_are
            of_set = f"{description} ({task})"
            if isinstance(dataset, Dataset):
                dataset = self._remove_unused_columns(dataset, of_set)
            else:
                fill = self._get_collator_with_removed_columns(fill, of_set)
            ready[task], prepare[self.task_names.index(task)] = dataset, fill
        return TaskDatasets(ready, self.task_names, description), TaskCollator(collator, prepare)

    # --- evaluation sets of one task each --------------------------------------------------------------------------

    def _by_task(self, datasets: Any) -> dict[str, TaskDatasets]:
        """The evaluation sets that are of one task each, in the order of the tasks: those named like one, unless the
        training set is one alone, in which any row may have labels of any task."""
        several = self.train_dataset is None or isinstance(self.train_dataset, TaskDatasets)
        sets = (sets_of(datasets) or {}) if several else {}
        return {task: self._of_task(task, sets[task]) for task in self.task_names if task in sets}

    def _of_task(self, task: str, dataset: Any, name: str = "eval_dataset") -> TaskDatasets:
        if isinstance(dataset, TaskDatasets) and dataset.only_task == task:
            return dataset
        return TaskDatasets({task: dataset}, self.task_names, name)

    def _with_task(self, dataset: Any, key: str | None, name: str) -> Any:
        """An evaluation set with its task, where `self.eval_dataset`, or a mapping `{task: data set}`, tells it."""
        sets = sets_of(dataset)
        if sets is not None:
            if len(sets) != 1:
                raise OptionError(
                    f"{name}: got {len(sets)} data sets ({', '.join(sets)}), expected one: {{task: data set}}"
                )
            return self._of_task(*next(iter(sets.items())), name)
        if isinstance(self.eval_dataset, dict) and key is not None and self.eval_dataset.get(key) is dataset:
            return self._by_task({key: dataset}).get(key, dataset)
        return dataset

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **generate_arguments: Any,
    ) -> dict[str, float]:
        """As in `Trainer`: of a mapping name -> data set each is evaluated, as `<prefix>_<name>_loss` and so on.

        Where these sets are of one task each (those named like a task, unless the training set is one alone), the loss
        of each is that of its task, and what one evaluation of all would give is added, and logged: `<prefix>_loss`,
        the unweighted mean, and `<prefix>_loss_<task>`.
        """
        if isinstance(eval_dataset, TaskDatasets) and eval_dataset.only_task is None:
            eval_dataset = eval_dataset.datasets
        tasks = self._by_task(self.eval_dataset if eval_dataset is None else eval_dataset)
        if isinstance(eval_dataset, Mapping):
            eval_dataset = {**eval_dataset, **tasks}
        metrics: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **generate_arguments)
        keys = {task: f"{metric_key_prefix}_{task}_loss" for task in tasks}
        losses = {task: metrics[key] for task, key in keys.items() if key in metrics}
        if losses:
            metrics.update(self._evaluated_together(losses, metric_key_prefix))
        return metrics

    def _evaluated_together(self, losses: Mapping[str, float], prefix: str) -> dict[str, float]:
        """The metrics of losses that evaluations of one task each have found, logged and handed to the callbacks."""
        evaluation = EvaluationLosses(self.task_names, self.args.device)
        metrics = evaluation.metrics(losses, prefix, self._loss_metrics)
        self._say_once(evaluation.remarks(losses, prefix))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

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
        of_losses = self._loss_metrics
        if of_losses is not None and description != "Prediction":
            prediction_loss_only = True  # a language model's predictions would not fit into memory
        while True:
            evaluation = self._begin_evaluation(_task_of(dataloader))
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
            losses = evaluation.losses()
            # Trainer's own is a mean of batch means, and zero where no task has a label.
            output.metrics.pop(f"{metric_key_prefix}_loss", None)
            output.metrics.update(evaluation.metrics(losses, metric_key_prefix, of_losses))
            if losses or description != "Prediction":  # predictions need no labels
                self._remark(evaluation, losses, metric_key_prefix)
        self._evaluation = None
        return output

    def _remark(self, evaluation: EvaluationLosses, losses: Mapping[str, float], prefix: str) -> None:
        """Say what is missing in the losses of an evaluation, once for each kind of it."""
        if evaluation.num_batches == 0:
            logger.warning("%s: no evaluation losses: %s", prefix, self._why_no_losses())
            return
        if evaluation.assumed and (evaluation.num_batches > 1 or self.args.world_size > 1):
            self._say_assumed()
        self._say_once(evaluation.remarks(losses, prefix))

    def _say_once(self, remarks: list[str]) -> None:
        for remark in remarks:
            if remark not in self._remarks:
                self._remarks.add(remark)
                logger.warning("%s", remark)

    def _why_no_losses(self) -> str:
        """Trainer asks for a loss, and for metrics, only of batches that hold all label columns."""
        if not self.label_names:
            why = "label_names is empty; name the columns there that the losses are taken from"
        else:
            missing = [name for name in self.label_names if name not in self._last_columns]
            has = ", ".join(self._last_columns) or "none"
            why = f"the batches have no column {', '.join(map(repr, missing))} of label_names (their columns: {has})"
        return f"{why}; compute_metrics is not called either"

    @property
    def _loss_metrics(self) -> LossMetrics | None:
        return self.compute_metrics if isinstance(self.compute_metrics, LossMetrics) else None

    def _begin_evaluation(self, only: str | None) -> EvaluationLosses:
        self._evaluation = evaluation = EvaluationLosses(self.task_names, self.args.device, only)
        if isinstance(self.compute_metrics, MetricsByTask):
            self.compute_metrics.begin(only)
        elif isinstance(self.compute_metrics, StreamingMetrics):
            # What an evaluation that died has left must not count in this one.
            self.compute_metrics.reset()
        self._fields = None
        self.expect_batch()
        over_batches = self.args.eval_do_concat_batches and not self.args.batch_eval_metrics
        if self.preprocess_logits_for_metrics is None and (over_batches or self.args.world_size > 1):
            self._fields = PredictedFields(self.accelerator.gather, self.args.device, over_batches)
        return evaluation

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **generate_arguments: Any,
    ) -> tuple[Tensor | None, Any, Any]:
        """As in `Trainer`; the contract's fields are no predictions, unknown columns are withheld from the model.

        `generate_arguments` are those of `Seq2SeqTrainer`, before which this class may stand.
        """
        self.expect_batch()
        self._last_columns = [str(name) for name in inputs]
        try:
            return self._predicted(model, inputs, prediction_loss_only, ignore_keys, **generate_arguments)
        finally:
            self._to_be_evaluated = False

    def _predicted(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None,
        **generate_arguments: Any,
    ) -> tuple[Tensor | None, Any, Any]:
        labelled = bool(self.label_names) and all(inputs.get(name) is not None for name in self.label_names)
        ordinary = self._ordinary
        if ordinary is None and (labelled or self._trainer_makes_loss):
            # One more pass over the first batch: which of its outputs are predictions must be known before.
            ordinary = self._is_ordinary(model, inputs)
        if not ordinary:
            if ignore_keys is None:
                ignore_keys = getattr(config_of(self.model), "keys_to_ignore_at_inference", None) or ["past_key_values"]
            ignore_keys = [*ignore_keys, *CONTRACT_FIELDS, *self._not_joined]
        if isinstance(self, Seq2SeqTrainer) and self.args.predict_with_generate and not prediction_loss_only:
            return self._generated(model, inputs, labelled, ignore_keys, **generate_arguments)
        called: Any = model
        if not labelled:
            inputs = self._columns.select(inputs)
            called = _Named(model, self._named_outputs)
        if ordinary or self._fields is None or prediction_loss_only:
            return super().prediction_step(called, inputs, prediction_loss_only, ignore_keys, **generate_arguments)
        with self._fields.named_by(model):
            loss, predicted, labels = super().prediction_step(
                called, inputs, prediction_loss_only, ignore_keys, **generate_arguments
            )
        self._fields.check(predicted, ignore_keys or [])
        return loss, predicted, labels

    def _generated(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        labelled: bool,
        ignore_keys: list[str] | None,
        **generate_arguments: Any,
    ) -> tuple[Tensor | None, Any, Any]:
        """`Seq2SeqTrainer`'s generated tokens, in addition to the loss of `compute_loss`.

        It would take `loss` from a pass of its own, and give `generate` every column. Cost: as there, one forward pass.
        """
        columns = self._columns.select_to_generate(inputs)
        if self._ordinary:
            return super().prediction_step(model, columns, False, ignore_keys, **generate_arguments)
        loss = super().prediction_step(model, inputs, True, ignore_keys)[0] if labelled else None
        _, tokens, labels = super().prediction_step(_no_loss, columns, False, ignore_keys, **generate_arguments)
        if labelled and labels is None and tokens is not None:
            labels = self._prepare_inputs(inputs).get("labels")
        return loss, tokens, labels

    def expect_batch(self) -> None:
        """The next losses that `compute_loss` finds in evaluation mode count in the evaluation under way."""
        self._to_be_evaluated = True

    def _evaluated_loss(self, model: nn.Module, batch: TaskLosses, inputs: Mapping[str, Any]) -> Tensor:
        """The unweighted mean of the tasks' losses in one batch, which is also taken into the exact ones, once."""
        if self._evaluation is not None and self._to_be_evaluated:
            self._to_be_evaluated = False  # a second call for the same batch is a look
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
        again = self._task_losses(self._outputs(model, part), part)
        return again if own > 0 else TaskLosses(again.losses, torch.zeros_like(again.num_items))


def _as_they_are(rows: list) -> list:
    return rows


def _task_of(dataloader: Any) -> str | None:
    """The task of all rows of an evaluation, where its data set is of one of several."""
    dataset = getattr(dataloader, "dataset", None)
    return dataset.only_task if isinstance(dataset, TaskDatasets) else None


def evaluation_names(eval_dataset: Any) -> list[str]:
    """The names of several evaluation sets, which go before those of their metrics."""
    named = isinstance(eval_dataset, Mapping) or type(eval_dataset).__name__ == "DatasetDict"
    return [str(name) for name in eval_dataset] if named else []


def tensors_in(outputs: Any) -> Iterator[Tensor]:
    """The tensors in a model's nested outputs."""
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, Mapping) or is_dataclass(outputs):
        for value in fields_of(outputs).values():
            yield from tensors_in(value)
    elif isinstance(outputs, (list, tuple)):
        for value in outputs:
            yield from tensors_in(value)


def fields_of(outputs: Any) -> Mapping[Any, Any]:
    """A model's outputs by name, where they have names: a mapping, a dataclass or a named tuple; else nothing."""
    if isinstance(outputs, Mapping):
        return outputs
    if is_dataclass(outputs):
        return {field.name: getattr(outputs, field.name) for field in fields(outputs)}
    return outputs._asdict() if isinstance(outputs, tuple) and hasattr(outputs, "_asdict") else {}


def keeps_contract(outputs: Any, task_name: str, named: bool) -> bool:
    """Whether the model of one task keeps the contract of losses, or is an ordinary one, trained on its `loss`.

    Without `losses` it is ordinary, and so is a tuple. With `losses` and no `loss` it keeps the contract. With both it
    is ordinary (`losses` are then whatever its author calls so: of each example, each layer, each part), unless
    `losses` are [1], or a dict of the one task, and are said to be of tasks: by `num_items` in addition to them or task
    names.

    Args:
        outputs: of the model, with labels.
        task_name: the one task.
        named: whether arguments or config name it.
    """
    found = {key: value for key, value in fields_of(outputs).items() if value is not None}
    losses = found.get("losses")
    if losses is None or "loss" not in found:
        return losses is not None
    one = list(losses) == [task_name] if isinstance(losses, Mapping) else getattr(losses, "shape", None) == (1,)
    return one and (named or "num_items" in found)


def _no_loss(**columns: Any) -> dict[str, Tensor]:
    """Called in place of a model whose loss is known already."""
    return {"loss": torch.zeros(())}


class _Named:
    """Calls the model for `Trainer.prediction_step` and gives its outputs the form that predictions are taken from."""

    training = False

    def __init__(self, model: nn.Module, name: Callable[[Any], Any]) -> None:
        self.model = model
        self.name = name

    def __call__(self, **inputs: Any) -> Any:
        return self.name(self.model(**inputs))


class _Watched:
    """Calls the model for `Trainer.compute_loss`, which insists on a `loss` that a multi-task model need not return.

    Attributes:
        outputs: what the model returned.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.outputs: Any = None

    def __call__(self, **inputs: Any) -> Any:
        self.outputs = self.model(**inputs)
        named = fields_of(self.outputs)
        if named.get("loss") is None and named.get("losses") is not None:
            return {"loss": torch.zeros(())}
        return self.outputs
