"""Metrics of pixel-wise tasks as a `compute_metrics`: mIoU, pixel accuracy, depth errors, angles of surface normals;
and of tasks with one class per image in addition to them: accuracy and macro-averaged F1.

Keys are `<task>_<metric>`. Errors of depth and angles of normals come in two forms:

    depth_abs_error              over all measured pixels of the set: every pixel counts once
    depth_abs_error_batch_mean   mean over evaluation batches of a batch's figure, as in the papers' tables (MTAN,
                                 CAGrad, Nash-MTL, FAMO, LDC-MTL): their batches are of 2 images on NYUv2, of 8 on
                                 Cityscapes, and their median angle is a mean of medians

Segmentation is accumulated over the whole set in the papers too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import Tensor

from hf_bilb.config.options import unknown_name
from hf_bilb.errors import MetricError, OptionError, TaskLossError
from hf_bilb.losses.contract import check_task_names
from hf_bilb.losses.dense import IMAGE_LABELS, check_dense_task, labels_by_task
from hf_bilb.metrics.delta_m import DELTA_M, DELTA_M_BY_TASK, delta_m, grouped_delta_m
from hf_bilb.metrics.dense_accumulators import DenseAccumulator, Depth, ImageClasses, Normals, Segmentation
from hf_bilb.metrics.info import DELTA_M_INFO, MetricInfo, check_different_keys
from hf_bilb.metrics.trainer_metrics import StreamingMetrics, as_tensor, check_base, of_task

if TYPE_CHECKING:  # takes seconds to import, and only the name is needed
    from transformers import EvalPrediction

BATCH_MEAN = "_batch_mean"
Average = Literal["batch_mean", "exact"]

#: What models trained on one task each reach, with batch averages: the base of Delta_m in CAGrad's, Nash-MTL's, FAMO's
#: and LDC-MTL's tables. The relative depth error is mean(|p - t| / t) with no factor of 100, as in their code: it is as
#: large as 27.77 on Cityscapes because MTAN's inverse depths come close to 0.
PUBLISHED_BASES: Mapping[str, Mapping[str, float]] = {
    "nyuv2": {
        "segmentation_miou": 0.3830,
        "segmentation_pixel_accuracy": 0.6376,
        "depth_abs_error": 0.6754,
        "depth_rel_error": 0.2780,
        "normals_mean_angle": 25.01,
        "normals_median_angle": 19.21,
        "normals_within_11_25": 0.3014,
        "normals_within_22_5": 0.5720,
        "normals_within_30": 0.6915,
    },
    "cityscapes": {
        "segmentation_miou": 0.7401,
        "segmentation_pixel_accuracy": 0.9316,
        "depth_abs_error": 0.0125,
        "depth_rel_error": 27.77,
    },
}

# Metric -> title, unit, whether higher is better.
_ABOUT = {
    "segmentation_miou": ("mIoU", "", True),
    "segmentation_pixel_accuracy": ("pixel accuracy", "", True),
    "depth_abs_error": ("absolute error", "", False),
    "depth_rel_error": ("relative error", "", False),
    "normals_mean_angle": ("mean angle", "deg", False),
    "normals_median_angle": ("median angle", "deg", False),
    "normals_within_11_25": ("within 11.25 deg", "", True),
    "normals_within_22_5": ("within 22.5 deg", "", True),
    "normals_within_30": ("within 30 deg", "", True),
}
# The same for a task with one class per image.
_ABOUT_IMAGES = {"accuracy": ("accuracy", "", True), "macro_f1": ("macro F1", "", True)}


def published_base(data: str, task_names: Sequence[str]) -> dict[str, float]:
    """The published base of Delta_m on `nyuv2` or `cityscapes`, of the given tasks.

    Raises:
        OptionError: another data set.
    """
    if data not in PUBLISHED_BASES:
        raise unknown_name("data", data, PUBLISHED_BASES)
    return {key: value for key, value in PUBLISHED_BASES[data].items() if key.split("_", 1)[0] in task_names}


class ImageStatistics(dict[str, Tensor]):
    """Task -> one row of statistics for each image: what `DenseMetrics.per_image` makes of predictions and labels."""


class DenseMetrics(StreamingMetrics):
    """Metrics of `segmentation`, `depth` and `normals`, or some of them, and of tasks with one class per image, for
    `Trainer(compute_metrics=...)`.

    With `TrainingArguments(batch_eval_metrics=True)` the Trainer hands over batch by batch, on the device and gathered
    from all ranks without the repetitions that fill up the last batch; without, everything in one call. Either way the
    figures are the same, whatever the batch size and the number of ranks are.

    A batch: predictions are a mapping from tasks, or a tuple or list in the order of `task_names` (for one task a
    tensor will do); `label_ids` the same of `label_names`. Shapes: see `Segmentation`, `Depth`, `Normals` and
    `ImageClasses` in `hf_bilb.metrics.dense_accumulators`; the labels of all M image tasks are one column
    `image_labels [B, M]`. A whole image may lack a task's labels.

    Under several ranks the Trainer gathers the predictions, 68 bytes a pixel with 13 classes, and every rank measures
    those of all. Where that costs, give it `preprocess_logits_for_metrics=metrics.per_image` too: 8 bytes a pixel with
    normals, some hundred an image without (`Trainer.predict` then returns those statistics, on data that have labels).
    96 images of 288 x 384 on two CPU ranks: 4 s, or 1 s, on top of the 53 s that the papers' SegNet takes to predict.

    Args:
        task_names: some of `hf_bilb.losses.dense.DENSE_TASKS` and those of `image_tasks`, in the order of predictions.
        num_classes: of the segmentation; not looked at without it.
        delta_m_base: `<task>_<metric>` (without suffix) -> result of models trained on that task alone, for Delta_m
            (`published_base`); None for none.
        batch_size: images of an evaluation batch for the `_batch_mean` form; published tables: 2 on NYUv2, 8 on
            Cityscapes.
        delta_m_average: which of the two forms Delta_m takes, and tables' means and ranks; the published base is one of
            batch means.
        depth_unit: of depths, for tables: `"m"`.
        image_tasks: task -> number of classes, of the tasks with one class per image.

    Returned, at the last batch: both forms of each metric, for the tasks that have a labelled pixel in the set; where
    all metrics of the base are there `delta_m`, the flat mean over them, as in the papers (a task with five metrics
    counts five times), and `delta_m_by_task`, where a task counts once. Both in percent, lower is better.

    Attributes:
        label_names: the columns of the labels, in order: the dense tasks, then `image_labels` where there are any.
        keys: what is returned for a set with labels of every task, in order.
        facts: title, unit and direction of each of them; of two forms of a metric one is counted (`MetricInfo`).
        delta_m_base: key -> value as it is used, with the suffix where the form has one; empty for none.

    State: 184 counts with 13 classes, some sums, with normals 1.4 MB of counts and the angles of fewer than
    `batch_size` images, on the predictions' device. It ends with the last batch, or an error in here; `reset` drops it.

    Cost of a batch: no device synchronisation. Eight NYUv2 images (288 x 384) with three tasks take one core 0.14 s and
    150 MB for the moment; the predictions of its test set would take 4.6 GB.

    Raises:
        OptionError: a task that is none of the three and no image task, a number out of range, two tasks with a metric
            of the same name, a base of a metric that is not there.
    """

    def __init__(
        self,
        task_names: Sequence[str],
        num_classes: int,
        delta_m_base: Mapping[str, float] | None = None,
        batch_size: int = 1,
        delta_m_average: Average = "batch_mean",
        depth_unit: str = "",
        image_tasks: Mapping[str, int] | None = None,
    ) -> None:
        self.task_names = check_task_names(task_names)
        given = dict(image_tasks or {})
        # In the order of the columns of `image_labels`.
        self.image_tasks = {name: given[name] for name in self.task_names if name in given}
        dense = tuple(name for name in self.task_names if name not in given)
        for name in dense:
            check_dense_task(name)
        self.label_names = (*dense, IMAGE_LABELS) if self.image_tasks else dense
        if batch_size < 1:
            raise OptionError(f"batch_size: {batch_size} is not valid, expected 1 or more")
        if "segmentation" in self.task_names and num_classes < 2:
            raise OptionError(f"num_classes: {num_classes} is not valid, expected 2 or more")
        if delta_m_average not in get_args(Average):
            raise unknown_name("delta_m_average", delta_m_average, get_args(Average))
        self.accumulators = {
            name: ImageClasses(given[name]) if name in given else _accumulator(name, num_classes, batch_size)
            for name in self.task_names
        }
        metrics = self._metric_facts(depth_unit, BATCH_MEAN if delta_m_average == "batch_mean" else "")
        check_different_keys(metrics)
        self.delta_m_base = self._resolve_base(delta_m_base, delta_m_average, [fact.key for fact in metrics])
        self._of_key = {fact.key: fact for fact in metrics}
        self.facts = (*metrics, *(_DELTA_FACTS if self.delta_m_base else ()))
        self.keys = tuple(fact.key for fact in self.facts)

    def per_image(self, predictions: Any, labels: Any) -> Any:
        """Statistics of each image, which stand for predictions and labels: for `preprocess_logits_for_metrics`.

        Args:
            predictions, labels: of a batch, as in the class.

        Returns:
            `ImageStatistics`, on the predictions' device; the predictions as they are where there are no labels.

        Raises:
            MetricError: tasks that are missing, shapes that do not fit.
        """
        if labels is None:
            return predictions
        found, expected = _named("predictions", predictions, self.task_names), self._labels(labels)
        rows = ImageStatistics()
        for name, accumulator in self.accumulators.items():
            with of_task(name):
                rows[name] = accumulator.per_image(found[name].detach(), expected[name])
        return rows

    def reset(self) -> None:
        """Forget everything."""
        for accumulator in self.accumulators.values():
            accumulator.reset()

    def merge(self, other: DenseMetrics) -> None:
        """Add what `other` has seen. The figures over all pixels are then those of one object that saw everything; an
        unfinished batch of either counts as a batch.

        Raises:
            MetricError: it has other tasks, another number of classes or another batch size.
        """
        if other.task_names != self.task_names:
            raise MetricError(f"merge: got the tasks {other.task_names}, expected {self.task_names}")
        for name, accumulator in self.accumulators.items():
            accumulator.merge(other.accumulators[name])

    def _add_batch(self, prediction: EvalPrediction) -> None:
        rows: Any = prediction.predictions
        if not isinstance(rows, ImageStatistics):
            if prediction.label_ids is None:
                raise MetricError(f"label_ids: got None, expected labels of {', '.join(self.label_names)}")
            rows = self.per_image(rows, prediction.label_ids)
        for name, accumulator in self.accumulators.items():
            with of_task(name):
                accumulator.add(as_tensor("predictions", rows[name]))

    def _compute(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, accumulator in self.accumulators.items():
            with of_task(name):
                values = accumulator.compute()
            found.update({f"{name}_{metric}": value for metric, value in values.items()})
        base = self.delta_m_base
        if base and base.keys() <= found.keys():
            measured, singles = [found[key] for key in base], list(base.values())
            higher = [self._of_key[key].higher_is_better for key in base]
            tasks = [self._of_key[key].task for key in base]
            found[DELTA_M] = delta_m(measured, singles, higher)
            found[DELTA_M_BY_TASK] = grouped_delta_m(measured, singles, higher, tasks)
        return found

    def _labels(self, given: Any) -> Mapping[str, Any]:
        """Task -> labels."""
        columns = _named("labels", given, self.label_names)
        try:
            return labels_by_task(columns, list(self.image_tasks))
        except TaskLossError as error:
            raise MetricError(f"labels: {error}") from None

    def _metric_facts(self, depth_unit: str, counted: str) -> list[MetricInfo]:
        """Of two forms that of the suffix `counted` counts."""
        facts = []
        for name, accumulator in self.accumulators.items():
            suffixes = ("", BATCH_MEAN) if accumulator.averaged else ("",)
            for suffix in suffixes:
                for metric in accumulator.metric_names:
                    about = _ABOUT_IMAGES[metric] if name in self.image_tasks else _ABOUT[f"{name}_{metric}"]
                    title, unit, higher = about
                    title += ", mean of batches" if suffix else ""
                    unit = depth_unit if metric == "abs_error" else unit
                    ideal, counts = 1.0 if higher else None, len(suffixes) == 1 or suffix == counted
                    facts.append(MetricInfo(f"{name}_{metric}{suffix}", name, title, unit, higher, ideal, counts))
        return facts

    def _resolve_base(
        self, given: Mapping[str, float] | None, average: Average, keys: Sequence[str]
    ) -> dict[str, float]:
        if given is None:
            return {}
        check_base(given, [key for key in keys if not key.endswith(BATCH_MEAN)])
        base = {}
        for key, value in given.items():
            averaged = average == "batch_mean" and key + BATCH_MEAN in keys
            base[key + BATCH_MEAN if averaged else key] = float(value)
        return base


def _named(what: str, given: Any, names: Sequence[str]) -> dict[str, Tensor]:
    """Name -> tensor, of a mapping or of entries in the order of the names."""
    if isinstance(given, (tuple, list)) and given and isinstance(given[0], (Mapping, tuple, list)):
        given = given[0]  # further outputs of the model
    if isinstance(given, Mapping):
        for name in names:
            if name not in given:
                raise MetricError(f"{what}: task {name!r} is missing, got {', '.join(map(str, given)) or 'none'}")
        return {name: as_tensor(f"{what} of task {name!r}", given[name]) for name in names}
    entries = given if isinstance(given, (tuple, list)) else [given]
    if len(entries) != len(names):
        raise MetricError(f"{what}: got {len(entries)} entries, expected one for each of {', '.join(names)}")
    return {name: as_tensor(f"{what} of task {name!r}", x) for name, x in zip(names, entries, strict=True)}


def _accumulator(name: str, num_classes: int, batch_size: int) -> DenseAccumulator:
    if name == "segmentation":
        return Segmentation(num_classes)
    return Depth(batch_size) if name == "depth" else Normals(batch_size)


_DELTA_FACTS = (
    DELTA_M_INFO,
    MetricInfo(DELTA_M_BY_TASK, "", "Delta_m by task", "%", higher_is_better=False),
)
