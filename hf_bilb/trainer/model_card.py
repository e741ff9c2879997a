"""The model card of a Trainer that is used from Python: what it knows of its model, its tasks and its balancer."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from hf_bilb.balancers.registry import get_balancer_spec
from hf_bilb.hub.card import CardFacts, CardTask
from hf_bilb.hub.snippet import snippet, without_package
from hf_bilb.reporting.results import MetricResult, finite
from hf_bilb.storage.adapter_weights import has_adapters
from hf_bilb.storage.weights import unwrapped

if TYPE_CHECKING:
    from hf_bilb.trainer.trainer import BilevelMTLTrainer

_VERSIONS_OF = ("hf-bilb", "torch", "transformers", "accelerate")
_SPEEDS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "jit_compilation_time")


def trainer_facts(trainer: BilevelMTLTrainer, name: str | None, **given: Any) -> CardFacts:
    """What a card says of the model of `trainer`, as far as it is known.

    Args:
        trainer: trained or not.
        name: of the model; None: that of the repository, or of the output folder.
        **given: fields of `CardFacts` that the user has named.
    """
    model = unwrapped(trainer.model)
    folder = Path(trainer.args.output_dir).absolute().name
    is_pushed = bool(trainer.hub_model_id or trainer.args.hub_model_id)
    repository = trainer.hub_model_id or trainer.args.hub_model_id or folder
    model_type = str(getattr(getattr(model, "config", None), "model_type", ""))
    spec = get_balancer_spec(trainer.balancer.name)
    facts: dict[str, Any] = {
        "name": name or str(repository).rpartition("/")[2],
        "balancer": trainer.balancer.name,
        "tasks": tuple(_tasks(trainer.task_names, getattr(model, "config", None))),
        "metrics": tuple(_metrics(trainer.state.log_history, trainer.task_names)),
        "measured_on": "evaluation",
        "rows": dict(_rows(trainer)),
        "paper": spec.paper,
        "equation": spec.equation,
        "balance": _balance(trainer),
        "balance_when": "of the last step",
        "training": tuple(_training(trainer)),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _VERSIONS_OF}},
        "snippet": _snippet(trainer, model, str(repository)),
        "without_package": without_package(str(repository), model_type, has_adapters(model)) if is_pushed else "",
        "adapters": has_adapters(model),
    }
    return CardFacts(**{**facts, **given})


def _tasks(names: Sequence[str], config: Any) -> Iterator[CardTask]:
    types = getattr(config, "task_types", None) or {}
    for name in names:
        task = types.get(name)
        yield CardTask(name, "" if task is None else task.type, "" if task is None else task.unit)


def _metrics(history: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> Iterator[MetricResult]:
    """Those of the last evaluation, each with the task that its name ends with."""
    last: Mapping[str, Any] = next((e for e in reversed(history) if any(k.startswith("eval_") for k in e)), {})
    for key, value in last.items():
        name = key.removeprefix("eval_")
        if name == key or name in _SPEEDS or not isinstance(value, (int, float)):
            continue
        task = max((task for task in tasks if name.endswith(f"_{task}")), key=len, default="")
        metric = name.removesuffix(f"_{task}").replace("_", " ")
        yield MetricResult(name, task, metric, "", higher_is_better=False, value=finite(value), trivial=None)


def _rows(trainer: BilevelMTLTrainer) -> Iterator[tuple[str, int]]:
    parts: dict[str, Any] = {"train": trainer.train_dataset, "evaluation": trainer.eval_dataset}
    for name, part in parts.items():
        if isinstance(part, Mapping):
            yield from ((f"{name}, {key}", len(one)) for key, one in part.items() if hasattr(one, "__len__"))
        elif hasattr(part, "__len__"):
            yield name, len(part)


def _balance(trainer: BilevelMTLTrainer) -> dict[str, dict[str, float]]:
    if trainer.state.global_step == 0:
        return {}
    found = {"weight": trainer.balancer.weights, "coefficient": trainer.balancer.coefficients}
    return {
        kind: dict(zip(trainer.task_names, values.tolist(), strict=True))
        for kind, values in found.items()
        if values is not None
    }


def _training(trainer: BilevelMTLTrainer) -> Iterator[tuple[str, str]]:
    args, state = trainer.args, trainer.state
    yield "Model", type(unwrapped(trainer.model)).__name__
    yield "Parameters", f"{sum(p.numel() for p in trainer.model.parameters()):,}"
    yield "Steps", f"{state.global_step:,}" + (f" ({state.epoch:g} epochs)" if state.epoch else "")
    yield "Batch size on each device", str(args.per_device_train_batch_size)
    yield "Learning rate", f"{args.learning_rate:g}"
    yield "Seed", str(args.seed)
    cuda = args.device.type == "cuda"
    device = torch.cuda.get_device_name(args.device) if cuda else f"{args.device.type} ({platform.machine()})"
    yield "Hardware", device if args.world_size == 1 else f"{args.world_size} processes, each on {device}"


def _snippet(trainer: BilevelMTLTrainer, model: torch.nn.Module, name: str) -> str:
    if (described := trainer.model_files.get("hf_bilb.json")) is not None:
        return snippet(name, json.loads(described))
    home = type(model).__module__.partition(".")[0]
    if not isinstance(model, PreTrainedModel) or home not in ("hf_bilb", "transformers") or has_adapters(model):
        return ""  # of a user's own class it is not known where others find it
    kind = type(model).__name__
    if home == "transformers":
        return f"from transformers import {kind}\n\nmodel = {kind}.from_pretrained({name!r})"
    return snippet(name, {})
