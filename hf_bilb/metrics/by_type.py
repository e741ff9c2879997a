"""Which metrics fit a task, by its type: their names, the default ones, and what tables say about them.

| type | default | others |
|---|---|---|
| regression | `mae`, `rmse`, `r2` | `mse`, `nmse`, `pearson`, `spearman` |
| classification, 2 classes | `accuracy`, `f1` (of class 1) | `f1_macro`, `balanced_accuracy`, `matthews`, `roc_auc` |
| classification, more | `accuracy`, `f1_macro` | `balanced_accuracy`, `matthews` |
| multi_label | `f1`, `roc_auc`, `accuracy`; of one label `normalized_entropy` too | `normalized_entropy` |
| token_classification | `accuracy`, `f1_macro`; before them `f1_entity`, of B-, I- and O tags | as of classes |
| segmentation | `miou`, `pixel_accuracy` | |
| dense_regression | `mae`, `rmse` | `r2`, `mse`, `nmse`, `pearson` |

`mae` and `rmse` are in the task's unit, `mse` in its square. A task of D numbers or M labels has the mean over those of
its columns in which the metric is defined. So the D numbers of one task should have one unit: the mean of an error in
metres and one in degrees has none, and the larger one decides it. Numbers of different units are better one task each.
`f1_macro` is the mean over classes or tags, `balanced_accuracy` the mean of their recalls. `miou` is the mean, over the
classes that labels or predictions of the set hold, of intersection over union; it and all metrics of pixels are over
all labelled pixels of the set, each of which counts once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hf_bilb.config.options import shown, unknown_name
from hf_bilb.errors import OptionError
from hf_bilb.losses.task_types import TaskType
from hf_bilb.metrics.entities import are_bio_tags
from hf_bilb.metrics.info import MetricInfo, check_different_keys


@dataclass(frozen=True)
class Metric:
    """What is known about a metric whatever the task is.

    Attributes:
        title: in tables.
        higher_is_better: then 1 is ideal.
        signed: whether a model that learns something can still have 0 or less, of which Delta_m has no share.
        unit_power: of the task's unit.
    """

    title: str
    higher_is_better: bool = True
    signed: bool = False
    unit_power: int = 0


_CLASSES = {
    "accuracy": Metric("accuracy"),
    "f1": Metric("F1"),
    "f1_macro": Metric("macro F1"),
    "balanced_accuracy": Metric("balanced accuracy"),
    "matthews": Metric("Matthews", signed=True),
}
_ROC_AUC = {"roc_auc": Metric("AUROC")}
_NUMBERS = {
    "mae": Metric("MAE", higher_is_better=False, unit_power=1),
    "rmse": Metric("RMSE", higher_is_better=False, unit_power=1),
    "r2": Metric("R2", signed=True),
    "mse": Metric("MSE", higher_is_better=False, unit_power=2),
    "nmse": Metric("nMSE", higher_is_better=False),
    "pearson": Metric("Pearson", signed=True),
}

#: Type -> metric; a task's default ones stand first.
METRICS: Mapping[str, Mapping[str, Metric]] = {
    "regression": {**_NUMBERS, "spearman": Metric("Spearman", signed=True)},
    "classification": {**_CLASSES, **_ROC_AUC},
    "multi_label": {
        "f1": Metric("F1"),
        **_ROC_AUC,
        "accuracy": Metric("accuracy"),
        "normalized_entropy": Metric("NE", higher_is_better=False),
    },
    "token_classification": {"f1_entity": Metric("entity F1"), **_CLASSES},
    "segmentation": {"miou": Metric("mIoU"), "pixel_accuracy": Metric("pixel accuracy")},
    "dense_regression": _NUMBERS,
}
#: Key of the mean over tasks.
MEAN_SCORE = "mean_score"


def fitting_metrics(task: TaskType) -> dict[str, Metric]:
    """The metrics that there are for `task`; its default ones stand first."""
    metrics = dict(METRICS[task.type])
    if task.has_classes and task.size > 2:  # of one class against several others, and of two scores
        metrics = {name: metric for name, metric in metrics.items() if name not in ("f1", "roc_auc")}
    if task.type == "token_classification" and not are_bio_tags(task.names):
        del metrics["f1_entity"]
    return metrics


def default_metrics(task: TaskType) -> tuple[str, ...]:
    """What is measured of `task` where nothing else is said."""
    names = tuple(fitting_metrics(task))
    of_entities = "f1_entity" in names
    numbers = {
        "regression": 3,
        "classification": 2,
        "multi_label": 4 if task.size == 1 else 3,
        "token_classification": 3 if of_entities else 2,
        "segmentation": 2,
        "dense_regression": 2,
    }
    return names[: numbers[task.type]]


def chosen_metrics(
    tasks: Mapping[str, TaskType], metrics: Mapping[str, Sequence[str]] | None, path: str = "metrics"
) -> dict[str, tuple[str, ...]]:
    """Task -> its metrics in order: those of `metrics`, else the default ones.

    Raises:
        OptionError: a task that is none; a metric that is unknown, does not fit the task, or stands twice; none. The
            message begins with `<path>.<task>`.
    """
    given = {} if metrics is None else metrics
    for name in given:
        if name not in tasks:
            raise unknown_name(path, name, tasks)
    return {
        name: _checked(given[name], task, f"{path}.{name}") if name in given else default_metrics(task)
        for name, task in tasks.items()
    }


def _checked(names: Sequence[str], task: TaskType, path: str) -> tuple[str, ...]:
    if isinstance(names, str) or not names or len(set(names)) < len(names):
        raise OptionError(f"{path}: {shown(names)} is not valid, expected a list of one or more different names")
    fitting = fitting_metrics(task)
    for name in names:
        if name in fitting:
            continue
        if not any(name in known for known in METRICS.values()):
            raise unknown_name(path, name, fitting)
        raise OptionError(f"{path}: {name!r} does not fit {_described(task)}; these do: {', '.join(fitting)}")
    return tuple(names)


def _described(task: TaskType) -> str:
    if task.type == "classification":
        return f"classification with {task.size} classes"
    if task.type == "token_classification":
        names = "" if are_bio_tags(task.names) else " that are not O, B-<type> and I-<type>"
        return f"token_classification with {task.size} tags{names}"
    return task.type


def metric_infos(tasks: Mapping[str, TaskType], chosen: Mapping[str, Sequence[str]]) -> tuple[MetricInfo, ...]:
    """What tables say about the chosen metrics of every task, then about `mean_score` where there is one.

    Ranks, ratios and Delta_m take one metric of each task (`MetricInfo.counted`), so that every task counts once: the
    first whose value is above 0 for any model that learns something, else the first. (A metric with 0 or less in a
    single-task run, such as a Matthews correlation, can be no base of Delta_m, which is then left out with a note.)

    `mean_score`, the mean over tasks of each one's first metric, is one where all of these are scores with 1 as their
    ideal. Errors have units, and errors and scores have no common mean: what remains to choose a checkpoint by is the
    loss, in which regression tasks are standardised.

    Raises:
        OptionError: two metrics would have one key.
    """
    infos = [info for name, task in tasks.items() for info in _infos_of_task(name, task, chosen[name])]
    check_different_keys(infos)
    firsts = [METRICS[task.type][chosen[name][0]] for name, task in tasks.items()]
    if all(metric.higher_is_better for metric in firsts):
        infos.append(MetricInfo(MEAN_SCORE, "", "mean score", "", higher_is_better=True, ideal=1.0))
    return tuple(infos)


def _infos_of_task(name: str, task: TaskType, chosen: Sequence[str]) -> list[MetricInfo]:
    metrics = {key: METRICS[task.type][key] for key in chosen}
    counted = next((key for key, metric in metrics.items() if not metric.signed), chosen[0])
    return [
        MetricInfo(
            key=f"{name}_{key}",
            task=name,
            name=metric.title,
            unit=_unit(task.unit, metric.unit_power),
            higher_is_better=metric.higher_is_better,
            ideal=1.0 if metric.higher_is_better else None,
            counted=key == counted,
        )
        for key, metric in metrics.items()
    ]


def _unit(unit: str, power: int) -> str:
    if not unit or power == 0:
        return ""
    return unit if power == 1 else f"({unit})^{power}"
