"""The model card of a run, from what lies in its folder: results, log, and what the model says of itself."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hf_bilb.balancers.registry import get_balancer_spec
from hf_bilb.config.options import shown
from hf_bilb.config.pretrained import is_hub_name
from hf_bilb.config.yaml import dump_yaml
from hf_bilb.errors import OptionError
from hf_bilb.hub.card import CARD_FILE, CardFacts, CardTask, card_text, is_written_by_hand
from hf_bilb.hub.paths import base_name, without_machine
from hf_bilb.hub.snippet import snippet, without_package
from hf_bilb.inference.saved import FILE as SAVED_FILE
from hf_bilb.reporting.history import read_history
from hf_bilb.reporting.results import RunResults
from hf_bilb.storage.writing import write_text
from hf_bilb.trainer.running_log import VECTORS_FILE

ADAPTERS = "adapter_config.json"
#: Pictures of a run, and what they show.
IMAGES = {
    "losses.png": "Loss of each task over the steps",
    "weights.png": "Weights and coefficients over the steps",
    "levels.png": "Upper and lower level over the steps",
    "gradient_conflicts.png": "Conflicts between the tasks' gradients",
    "gallery.png": "Images with labels and predictions",
}
_MOST_NAMES = 20


def write_card(folder: Path, results: RunResults, name: str, in_repository: bool) -> Path:
    """Write `README.md` into a run's folder, unless somebody has made it his own; returns the file.

    Args:
        folder: of the finished run.
        results: of the run.
        name: what `hf_bilb.load` finds the model by.
        in_repository: whether the run is pushed, under this name.
    """
    path = folder / CARD_FILE
    if own_card(folder) is None:
        write_text(path, card_text(run_facts(folder, results, name, in_repository)))
    return path


def own_card(folder: Path) -> str | None:
    """The card that somebody has written himself; None where there is none."""
    path = folder / CARD_FILE
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8", errors="replace")
    return text if is_written_by_hand(text) else None


def run_facts(
    folder: Path, results: RunResults, name: str, in_repository: bool, license: str | None = None
) -> CardFacts:
    """What the card of a run says.

    Args:
        folder: of the run; pictures, log and `hf_bilb.json` are taken where they are there.
        results: of the run, also of one that an earlier version has measured.
        name: of the repository, or what else `hf_bilb.load` finds the model by.
        in_repository: whether it is, or will be, on the Hub, where the code of a packaged model lies next to it.
        license: the Hub's word for it.
    """
    saved = read_json(folder / SAVED_FILE)
    tasks = _tasks(results, saved)
    settings: Mapping[str, Any] = results.settings
    adapters = (folder / ADAPTERS).is_file()
    about = results.about.get("balancer") or _known_balancer(results.balancer)
    return CardFacts(
        name=name.rpartition("/")[2],
        balancer=results.balancer,
        tasks=tasks,
        metrics=tuple(results.metrics),
        measured_on=results.split,
        trivial_predictor=results.trivial_predictor,
        data=results.data,
        data_files=tuple(_data_files(settings.get("data", {}).get("files"))),
        hub_data=_hub_data(settings.get("data", {})),
        rows=results.about.get("rows", {}),
        paper=about.get("paper", ""),
        equation=about.get("equation", ""),
        balance=_balance(folder, [task.name for task in tasks]),
        balance_when="at the end of training, means over the last logging interval",
        training=tuple(_training(results)),
        versions=results.versions,
        images=[(file, caption) for file, caption in IMAGES.items() if (folder / file).is_file()],
        snippet=snippet(name, saved),
        without_package=without_package(name, results.model, adapters) if in_repository else "",
        recipe=dump_yaml(without_machine(settings)) if settings else "",
        pipeline_tag=_pipeline_tag(saved, tasks),
        base_model=base_model(settings.get("model", {})),
        adapters=adapters,
        license=license,
    )


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a file; empty where there is none, or another thing."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


# ---------------------------------------------------------------------------------------------------- model


def base_model(section: Mapping[str, Any]) -> str | None:
    """The name on the Hub of the model that a recipe's `model` section begins with; None: it begins with another."""
    name = _pretrained(section)
    return name if name is not None and is_hub_name(name) else None


def _pretrained(section: Mapping[str, Any]) -> str | None:
    name = section.get("encoder", section.get("model"))
    return name if isinstance(name, str) else None


def check_base_is_public(section: Mapping[str, Any], where: str) -> None:
    """Raise `OptionError` where adapters stand on a model that only this machine has: nobody else could load them."""
    name = _pretrained(section)
    if section.get("lora") is not None and name is not None and base_model(section) is None and ":" not in name:
        raise OptionError(
            f"{where}: adapters are pushed without the model that they stand on, and {shown(name)} is a folder of this "
            "machine: nobody else could load them; push that model and name it, or train without model.lora"
        )


def _tasks(results: RunResults, saved: Mapping[str, Any]) -> tuple[CardTask, ...]:
    if saved.get("tasks"):
        return tuple(CardTask(task["name"], task["type"], _outputs(task)) for task in saved["tasks"])
    losses = next(iter(results.losses.values()), {})
    names = [name for name in losses if name != "mean"] or [metric.task for metric in results.metrics if metric.task]
    return tuple(map(CardTask, dict.fromkeys(names)))


def _outputs(task: Mapping[str, Any]) -> str:
    names = list(map(str, task.get("names", ())))
    listed = ", ".join(names[:_MOST_NAMES]) + (f" and {len(names) - _MOST_NAMES} more" * (len(names) > _MOST_NAMES))
    if task["type"] in ("regression", "dense_regression"):
        unit, size = task.get("unit", ""), task.get("size", 1)
        at_pixels = f"{size} number{'s' * (size > 1)} at each pixel" if task["type"] == "dense_regression" else ""
        return "; ".join(filter(None, (at_pixels, listed, f"in {unit}" if unit else "")))
    if task["type"] == "multi_label" and task.get("size", 1) == 1:
        return "yes or no"
    kind = "labels" if task["type"] == "multi_label" else "classes"
    return f"{task.get('size', 1)} {kind}{f': {listed}' if listed else ''}"


def _pipeline_tag(saved: Mapping[str, Any], tasks: tuple[CardTask, ...]) -> str | None:
    """The Hub's word for what the model does with its inputs."""
    kind, types = saved.get("inputs", {}).get("kind"), {task.type for task in tasks}
    has_classes = bool(types & {"classification", "multi_label"})
    if kind == "text":
        return "token-classification" if types == {"token_classification"} else "text-classification"
    if kind in ("table", "features"):
        return "tabular-classification" if has_classes else "tabular-regression"
    if kind in ("pixels", "scenes"):
        return "image-segmentation" if "segmentation" in types else None
    if kind == "image":
        return "image-classification" if has_classes else None
    return {"smiles": "graph-ml", "prompt": "text-generation"}.get(str(kind))


# ---------------------------------------------------------------------------------------------------- data, training


def _hub_data(section: Mapping[str, Any]) -> str | None:
    """The data set's name on the Hub, without its configuration."""
    inner = [value for value in section.values() if isinstance(value, Mapping)]
    for one in (section, *inner):
        hub = one.get("hub")
        if isinstance(hub, str) and is_hub_name(name := hub.partition(":")[0]):
            return name
    return None


def _data_files(files: Any) -> Iterator[str]:
    if isinstance(files, str):
        yield base_name(files)
    elif isinstance(files, Mapping):
        for value in files.values():
            yield from _data_files(value)
    elif isinstance(files, (list, tuple)):
        for value in files:
            yield from _data_files(value)


def _known_balancer(name: str) -> dict[str, str]:
    try:
        spec = get_balancer_spec(name)
    except OptionError:  # registered by somebody's own code, which is not imported
        return {}
    return {"paper": spec.paper, "equation": spec.equation}


def _balance(folder: Path, tasks: list[str]) -> dict[str, dict[str, float]]:
    """The last weights and coefficients that were logged; of many tasks they lie in a file of their own."""
    found: dict[str, dict[str, float]] = {}
    for entry in read_history(folder):
        for kind in ("weight", "coefficient"):
            values = {task: entry[f"{kind}/{task}"] for task in tasks if f"{kind}/{task}" in entry}
            if values:
                found[kind] = values
    vectors = folder / VECTORS_FILE
    if not found and vectors.is_file() and (lines := vectors.read_text(encoding="utf-8").splitlines()):
        last = json.loads(lines[-1])
        for kind in ("weight", "coefficient"):
            if kind in last and len(last[kind]) == len(tasks):
                pairs = zip(tasks, last[kind], strict=True)
                found[kind] = {task: value for task, value in pairs if value is not None}
    return found


def _training(results: RunResults) -> Iterator[tuple[str, str]]:
    facts, trainer = results.training, results.settings.get("trainer", {})
    yield "Recipe", results.recipe
    yield "Model", results.model
    if "parameters" in facts:
        trained, total = facts["trained_parameters"], facts["parameters"]
        yield "Parameters", f"{total:,}" if trained == total else f"{total:,}, of which {trained:,} are trained"
    if "steps" in facts:
        epochs = facts.get("epochs")
        yield "Steps", f"{facts['steps']:,}" + (f" ({epochs:g} epochs)" if epochs is not None else "")
    for key, what in _SETTINGS.items():
        if trainer.get(key) is not None:
            yield what, str(trainer[key])
    if facts.get("step_seconds") is not None:
        yield "Time per step", f"{1000 * facts['step_seconds']:.3g} ms"
    if "seconds" in facts:
        yield "Time of the training", f"{facts['seconds']:,.0f} s"
    if facts.get("peak_memory_bytes") is not None:
        yield "Peak memory", f"{facts['peak_memory_bytes'] / 2**30:.3g} GiB"
    if "device" in facts:
        yield "Hardware", _hardware(facts)
    if facts.get("measured_checkpoint") is not None:
        yield "Measured checkpoint", str(facts["measured_checkpoint"])


_SETTINGS = {
    "per_device_train_batch_size": "Batch size on each device",
    "gradient_accumulation_steps": "Gradient accumulation steps",
    "learning_rate": "Learning rate",
    "seed": "Seed",
}


def _hardware(facts: Mapping[str, Any]) -> str:
    device = "CPU" if facts["device"] == "cpu" else str(facts["device"])
    kind = f"{device} ({facts['device_name']})" if facts.get("device_name") else device
    processes = facts.get("processes", 1)
    return kind if processes == 1 else f"{processes} processes, each on a {kind}"
