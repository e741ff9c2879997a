"""What a data set hands over: its parts, tasks, metrics, and what it dictates to the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from hf_bilb.losses.masked import masked_bce_with_logits
from hf_bilb.metrics.info import DELTA_M_INFO as DELTA_M_INFO
from hf_bilb.metrics.info import MetricInfo as MetricInfo

if TYPE_CHECKING:  # they take seconds to import, or import this module, and only their names are needed
    import datasets
    from transformers import EvalPrediction

    from hf_bilb.data.inputs.format import DataFormat

    Part: TypeAlias = torch.utils.data.Dataset[Any] | datasets.Dataset


@dataclass(frozen=True)
class GalleryInfo:
    """What a gallery of pixel-wise tasks says about them.

    Attributes:
        class_names: of the segmentation's classes.
        depth_unit: `"m"`; empty when it has none.
        image_classes: task -> names of its classes, of the tasks with one class per image, in the order of their
            columns in `image_labels`.
    """

    class_names: tuple[str, ...] = ()
    depth_unit: str = ""
    image_classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskData:
    """A data set, ready for the Trainer.

    Attributes:
        train, validation, test: map-style data sets: `datasets.Dataset` or `torch.utils.data.Dataset`.
        task_names: the K tasks, in order.
        label_names: the columns that are labels (`TrainingArguments.label_names`).
        data_collator: for the Trainer; None for its default.
        compute_metrics: `EvalPrediction` -> metric key -> value, in the units of `metrics`.
        metrics: what `compute_metrics` returns, in order.
        trivial_metrics: the same for the best predictor that sees no input (regression: the training mean), on `test`.
        model_arguments: what the data dictate to the model (`num_features`, `task_names`, ...).
        task_item_counts: batch -> `[K]`, how many items each task has in it, where the label columns do not tell.
        metrics_by_batch: `compute_metrics` is a streaming one (`TrainingArguments.batch_eval_metrics`).
        trivial_predictor: name of that predictor in tables.
        processing_class: saved with the model, so that its folder is all that a prediction needs; a tokenizer.
        task_loss_func: `(outputs, batch)` -> losses `[K]`, num_items `[K]`, for models that return predictions alone.
        single_task_base: metric key -> the value of a model trained on its task alone, the base of Delta_m.
        single_task_source: where that base is from, for a reader.
        task_groups: task -> group of nearly equivalent tasks, which count once in the grouped Delta_m.
        gallery: for a run that shall draw some images with the predictions of its pixel-wise tasks; None: it does not.
        format: how rows of a user's become inputs of the trained model, and what its outputs mean; it is saved with the
            model. None: nobody but this data set makes inputs for it.
        summary: what a run says about the data before it trains, such as how many labels each task has; lines of text.
    """

    train: Part
    validation: Part
    test: Part
    task_names: tuple[str, ...]
    label_names: tuple[str, ...]
    data_collator: Callable[[list[Any]], dict[str, Any]] | None
    compute_metrics: Callable[[EvalPrediction], dict[str, float]]
    metrics: tuple[MetricInfo, ...]
    trivial_metrics: Mapping[str, float]
    model_arguments: Mapping[str, Any]
    task_item_counts: Callable[[Mapping[str, Any]], torch.Tensor] | None = None
    metrics_by_batch: bool = False
    trivial_predictor: str = "mean predictor"
    processing_class: Any = None
    task_loss_func: Callable[[Any, Mapping[str, Any]], tuple[torch.Tensor, torch.Tensor]] | None = None
    single_task_base: Mapping[str, float] = field(default_factory=dict)
    single_task_source: str = ""
    task_groups: Mapping[str, str] = field(default_factory=dict)
    gallery: GalleryInfo | None = None
    format: DataFormat | None = None
    summary: str = ""


@dataclass(frozen=True)
class DataSetSpec:
    """An entry of the registry.

    Attributes:
        options: dataclass of what a recipe's `data:` section may set.
        load: loads the set with them.
        from_model: option of the data -> option of the model whose value it takes when it is null, so that a recipe
            says it once (a text's tokenizer is that of the model's encoder); or a function that gives this mapping for
            the options of a recipe.
        model_needs: option of the data -> what the data then dictate to the model, which not every model takes.
    """

    options: type[Any]
    load: Callable[[Any], TaskData]
    from_model: Mapping[str, str] | Callable[[Mapping[str, Any]], Mapping[str, str]] = field(default_factory=dict)
    model_needs: Mapping[str, str] = field(default_factory=dict)


def binary_losses(outputs: Mapping[str, torch.Tensor], batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Binary cross-entropies `[K]` and numbers of labels `[K]`, for a model that returns `logits [B, K]` alone: a
    `task_loss_func`."""
    return masked_bce_with_logits(outputs["logits"], batch["labels"])


@dataclass(frozen=True)
class Standardizer:
    """Column means and standard deviations `[D]` (float64, population), taken from the training rows only."""

    means: NDArray[np.float64]
    stds: NDArray[np.float64]

    @classmethod
    def fit(cls, values: NDArray[np.floating]) -> Standardizer:
        """From `values [N, D]`, missing ones (NaN) left out; a column that never varies gets standard deviation 1, so
        that it becomes zero, and one without any value mean 0."""
        values = values.astype(np.float64)
        values = np.where(np.isnan(values).all(axis=0), 0.0, values)
        stds = np.nanstd(values, axis=0)
        # Their computed deviation may be a rounding error, not 0.
        constant = np.nanmin(values, axis=0) == np.nanmax(values, axis=0)
        # So may the mean be: of equal numbers near 1e20 it is off by more than 1e4.
        means = np.where(constant, np.nanmin(values, axis=0), np.nanmean(values, axis=0))
        return cls(means=means, stds=np.where(constant, 1.0, stds))

    def standardize(self, values: NDArray[np.floating]) -> NDArray[np.float64]:
        """`[N, D]` -> `[N, D]` with the training rows' mean 0 and standard deviation 1."""
        return (values - self.means) / self.stds

    def tensor(self, values: NDArray[np.floating]) -> torch.Tensor:
        """The same as float32 `[N, D]`, as a model takes it."""
        return torch.from_numpy(self.standardize(values)).float()
