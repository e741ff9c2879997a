"""Where predictions and labels of tasks of different types lie in an evaluation's batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hf_bilb.errors import MetricError, OptionError
from hf_bilb.losses.task_types import LABELS, TAG_LABELS, TaskType, have_one_output, pixel_tasks
from hf_bilb.metrics.trainer_metrics import as_tensor, of_task

if TYPE_CHECKING:  # takes seconds to import, and only the name is needed
    from transformers import EvalPrediction


class BatchReader:
    """Finds each task's outputs and labels in a batch, and checks their shapes; the layout is that of `MixedMetrics`.

    Args:
        tasks: task -> its type, in the order of the outputs.
        label_names: the columns of labels in a batch, in order.

    Raises:
        OptionError: `label_names` lacks a column that the tasks need.
    """

    def __init__(self, tasks: Mapping[str, TaskType], label_names: Sequence[str]) -> None:
        self.tasks = tasks
        self.label_names = tuple(label_names)
        self.widths = [task.label_width for task in tasks.values()]
        self.tagged = [name for name, task in tasks.items() if task.items == "tokens"]
        self.of_pixels = tuple(pixel_tasks(tasks))
        needed = [*([LABELS] if sum(self.widths) else []), *([TAG_LABELS] if self.tagged else []), *self.of_pixels]
        for name in needed:
            if name not in self.label_names:
                raise OptionError(f"label_names: {', '.join(self.label_names) or 'none'}, expected {name!r} among them")

    def read(self, prediction: EvalPrediction) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Task -> outputs and task -> labels: `[B, D]` each of numbers and binary labels, else `[B, C]` and `[B]`, or
        `[B, T, C]` and `[B, T]`; of pixels `[B, C, H, W]` and `[B, H, W]`, or `[B, D, H, W]` each.

        Raises:
            MetricError: a column that is missing, or shapes that do not fit, naming the task.
        """
        labels, outputs = self.labels(prediction.label_ids), self._outputs(prediction.predictions)
        for name, task in self.tasks.items():
            with of_task(name):
                _check_shapes(task, outputs[name], labels[name])
        return outputs, labels

    def labels(self, label_ids: Any) -> dict[str, Tensor]:
        """Task -> labels, as in `read`."""
        columns = self._label_columns(label_ids)
        return {**self._row_labels(columns), **self._tags(columns), **{name: columns[name] for name in self.of_pixels}}

    def _outputs(self, predictions: Any) -> dict[str, Tensor]:
        if isinstance(predictions, tuple) and predictions and isinstance(predictions[0], tuple):
            predictions = predictions[0]  # other outputs of the model stand behind the tuple of the tasks
        if have_one_output(self.tasks):
            return self._single_outputs(predictions)
        entries = predictions if isinstance(predictions, tuple) else (predictions,)
        if len(entries) < len(self.tasks):
            got = f"a tuple of {len(entries)}" if isinstance(predictions, tuple) else type(predictions).__name__
            raise MetricError(f"predictions: got {got}, expected a tuple with a tensor for each of {self._names()}")
        return {
            name: as_tensor(f"predictions of task {name!r}", entry)
            for name, entry in zip(self.tasks, entries, strict=False)
        }

    def _single_outputs(self, predictions: Any) -> dict[str, Tensor]:
        first = predictions[0] if isinstance(predictions, tuple) and predictions else predictions
        outputs = as_tensor("predictions", first)
        if outputs.ndim == 1 and len(self.tasks) == 1:
            outputs = outputs.unsqueeze(1)
        if outputs.ndim != 2 or outputs.shape[1] != len(self.tasks):
            raise MetricError(
                f"predictions: got {tuple(outputs.shape)}, expected [B, {len(self.tasks)}], a column for each of "
                f"{self._names()}"
            )
        return dict(zip(self.tasks, outputs.split(1, dim=1), strict=True))

    def _label_columns(self, label_ids: Any) -> dict[str, Tensor]:
        entries = label_ids if isinstance(label_ids, (tuple, list)) else (label_ids,)
        if label_ids is None or len(entries) != len(self.label_names):
            got = "None" if label_ids is None else f"{len(entries)} entries"
            raise MetricError(f"label_ids: got {got}, expected {', '.join(self.label_names)}")
        return {name: as_tensor(name, entry) for name, entry in zip(self.label_names, entries, strict=True)}

    def _row_labels(self, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        width = sum(self.widths)
        if not width:
            return {}
        labels = columns[LABELS]
        if labels.ndim == 1 and width == 1:
            labels = labels.unsqueeze(1)
        if labels.ndim != 2 or labels.shape[1] != width:
            raise MetricError(
                f"labels: got {tuple(labels.shape)}, expected [B, {width}], the columns of {self._names()}"
            )
        parts = labels.split(self.widths, dim=1)
        return {
            name: part.squeeze(1) if task.type == "classification" else part
            for (name, task), part in zip(self.tasks.items(), parts, strict=True)
        }

    def _tags(self, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self.tagged:
            return {}
        tags = columns[TAG_LABELS]
        if tags.ndim != 3 or tags.shape[2] != len(self.tagged):
            raise MetricError(
                f"tag_labels: got {tuple(tags.shape)}, expected [B, T, {len(self.tagged)}], the tags of "
                f"{', '.join(self.tagged)}"
            )
        return dict(zip(self.tagged, tags.unbind(dim=2), strict=True))

    def _names(self) -> str:
        return ", ".join(self.tasks)


#: Type -> how outputs and labels lie.
_LAYOUTS = {
    "classification": "[B, {}] and [B]",
    "token_classification": "[B, T, {}] and [B, T]",
    "segmentation": "[B, {}, H, W] and [B, H, W]",
    "dense_regression": "both [B, {}, H, W]",
}


def _check_shapes(task: TaskType, outputs: Tensor, labels: Tensor) -> None:
    if task.type == "segmentation":
        fits = labels.ndim == 3 and outputs.shape == (len(labels), task.size, *labels.shape[1:])
    elif task.type == "dense_regression":
        fits = labels.ndim == 4 and labels.shape[1] == task.size and outputs.shape == labels.shape
    else:
        fits = outputs.shape == ((*labels.shape, task.size) if task.has_classes else labels.shape)
    if not fits:
        layout = _LAYOUTS.get(task.type, "both [B, {}]").format(task.size)
        raise MetricError(
            f"predictions {tuple(outputs.shape)} and labels {tuple(labels.shape)}, expected {layout} ({task.type})"
        )
