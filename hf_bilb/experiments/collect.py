"""What a run has measured and what it cost, as `results.json` holds it."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hf_bilb.balancers.registry import get_balancer_spec
from hf_bilb.data import MetricInfo, TaskData
from hf_bilb.experiments.recipe import Recipe
from hf_bilb.reporting.results import MetricResult, RunResults, as_json, finite
from hf_bilb.trainer.trainer import BilevelMTLTrainer

_VERSIONS_OF = ("hf-bilb", "torch", "transformers", "accelerate", "datasets", "numpy")


def collect_results(
    recipe: Recipe, data: TaskData, measured: Mapping[str, float], training: Mapping[str, Any]
) -> RunResults:
    """Put what was measured (`evaluate`'s dict, keys prefixed by the split) in addition to the trivial predictor's
    figures."""
    split = recipe.evaluation.split
    losses = {"mean": finite(measured.get(f"{split}_loss"))}
    losses.update({task: finite(measured.get(f"{split}_loss_{task}")) for task in data.task_names})
    trivial = data.trivial_metrics if split == "test" else {}
    return RunResults(
        recipe=recipe.name,
        model=recipe.model["name"],
        data=recipe.data["name"],
        balancer=recipe.balancer["name"],
        split=split,
        metrics=[
            _metric_result(metric, measured.get(f"{split}_{metric.key}"), trivial, data) for metric in data.metrics
        ],
        losses={split: losses},
        training=dict(training),
        settings=as_json(recipe.to_dict()),
        versions=_versions(),
        trivial_predictor=data.trivial_predictor,
        base_source=data.single_task_source,
        about=_about(recipe, data),
    )


def _about(recipe: Recipe, data: TaskData) -> dict[str, Any]:
    parts = {"train": data.train, "validation": data.validation, "test": data.test}
    spec = get_balancer_spec(recipe.balancer["name"])
    return {
        "rows": {name: len(part) for name, part in parts.items()},  # type: ignore[arg-type]  # map-style
        "balancer": {"paper": spec.paper, "equation": spec.equation},
    }


def _metric_result(
    metric: MetricInfo, value: float | None, trivial: Mapping[str, float], data: TaskData
) -> MetricResult:
    return MetricResult(
        key=metric.key,
        task=metric.task,
        name=metric.name,
        unit=metric.unit,
        higher_is_better=metric.higher_is_better,
        value=finite(value),
        trivial=finite(trivial.get(metric.key)),
        ideal=metric.ideal,
        base=finite(data.single_task_base.get(metric.key)),
        group=data.task_groups.get(metric.task, ""),
        counted=metric.counted,
    )


def training_facts(trainer: BilevelMTLTrainer, metrics: Mapping[str, float], checkpoint: str | None) -> dict[str, Any]:
    state = trainer.state
    best = state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    return {
        "steps": state.global_step,
        "planned_steps": state.max_steps,
        "epochs": finite(state.epoch),
        "seconds": round(metrics["train_runtime"], 2),
        "resumed_from": None if checkpoint is None else Path(checkpoint).name,
        "measured_checkpoint": None if best is None else Path(best).name,
        "best_metric": finite(state.best_metric),
        "mean_loss": finite(metrics.get("train_loss")),
        "processes": trainer.args.world_size,
        "device": trainer.args.device.type,
        "device_name": _device_name(trainer.args.device),
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in _VERSIONS_OF}}
