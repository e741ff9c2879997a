"""Running a recipe: data, model, Trainer, one measurement at the end, and the folder that is left."""

from __future__ import annotations

import contextlib
import importlib.metadata
import inspect
import logging
import platform
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import click
import torch
from accelerate import PartialState
from peft import PeftModel
from torch import nn
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.utils import logging as transformers_logging

from hf_bilb.config.options import nearest, parse_options
from hf_bilb.config.user_code import own_code
from hf_bilb.config.yaml import read_yaml
from hf_bilb.data import DATA_SETS, MetricInfo, TaskData
from hf_bilb.errors import HfBilbError, OptionError
from hf_bilb.experiments.gallery import gallery_rows
from hf_bilb.experiments.recipe import Recipe, differences, dump_recipe
from hf_bilb.experiments.timing import StepClock
from hf_bilb.models import MODELS, ModelSpec, PlainModelSpec
from hf_bilb.models.torch_module import check_columns
from hf_bilb.reporting.gallery import GalleryRow, write_gallery
from hf_bilb.reporting.plots import plot_run
from hf_bilb.reporting.results import FILE_NAME, MetricResult, RunResults, as_json, finite, write_results, write_text
from hf_bilb.reporting.tables import compare, render_markdown, render_text
from hf_bilb.storage import folder_lock
from hf_bilb.storage.disk_full import disk_full_explained
from hf_bilb.storage.folders import check_output_folder, make_output_folder
from hf_bilb.storage.weights import check_savable
from hf_bilb.trainer.agreement import from_first_rank
from hf_bilb.trainer.arguments import BilevelMTLTrainingArguments
from hf_bilb.trainer.checks import check_reporting
from hf_bilb.trainer.trainer import BilevelMTLTrainer, checkpointing

logger = logging.getLogger(__name__)

RECIPE_FILE = "recipe.yaml"
_RECIPE_HEAD = "# resolved from"
_VERSIONS_OF = ("hf-bilb", "torch", "transformers", "accelerate", "datasets", "numpy")


def run_recipe(recipe: Recipe, resume: bool = False) -> RunResults:
    """Train as `recipe` says, measure once on `evaluation.split`, and write everything into `trainer.output_dir`.

    Written, by the main process: `recipe.yaml` (before training), checkpoints, the model, `trainer_state.json`,
    `results.json`, `table.md`, `losses.png`, `weights.png`, of pixel-wise tasks `gallery.png`. Under several processes
    every rank calls this.

    Args:
        recipe: from `read_recipe`.
        resume: go on from the last complete checkpoint in the folder.

    Raises:
        OptionError: settings that do not fit together, or a folder that already holds a run (without `resume`).
        CheckpointError: `resume` without a complete checkpoint, or one that belongs to another run; a full disk.
        FolderInUseError: another run is writing into the folder.
        MissingPackageError: the data set's package is not installed.
    """
    started = time.perf_counter()
    _quieten()
    args = training_arguments(recipe)  # before anything is loaded: finds settings that contradict each other
    data_options = resolve_data_options(recipe)
    check_model(recipe)
    state = PartialState()
    folder = Path(args.output_dir)
    with contextlib.ExitStack() as held, disk_full_explained(folder):
        checkpoint = from_first_rank(lambda: _enter_folder(folder, resume, held))
        if state.is_main_process:
            _write_recipe(recipe, folder, resume)
        return _run(recipe, data_options, checkpoint, started)


def _run(recipe: Recipe, data_options: Any, checkpoint: str | None, started: float) -> RunResults:
    """Everything that comes when the settings are checked and the folder is this run's own."""
    args, state = training_arguments(recipe), PartialState()
    set_seed(args.seed)  # the model's initial weights; the Trainer seeds its own part
    # one process prepares the cache, the others read it
    with state.local_main_process_first(), _preparing("data"):
        data = DATA_SETS[recipe.data["name"]].load(data_options)
        _check_parts(data)
    with _preparing("model"):
        model = build_model(recipe, data)
    clock = StepClock()
    with _preparing("trainer"):
        trainer = BilevelMTLTrainer(
            model=model,
            args=training_arguments(recipe, data),
            train_dataset=data.train,
            eval_dataset=data.validation,
            data_collator=data.data_collator,
            compute_metrics=data.compute_metrics,
            processing_class=data.processing_class,
            task_item_counts=data.task_item_counts,
            task_loss_func=task_loss_func(recipe, data),
            callbacks=[clock],
        )
    training = _train(trainer, checkpoint)
    _save(trainer)
    part = getattr(data, recipe.evaluation.split)
    measured = trainer.evaluate(part, metric_key_prefix=recipe.evaluation.split)
    drawn = gallery_rows(trainer, part, data) if recipe.evaluation.plots else []
    facts = {
        **_training_facts(trainer, training, checkpoint),
        **clock.facts(),
        "total_seconds": round(time.perf_counter() - started, 2),
    }
    results = collect_results(recipe, data, measured, facts)
    if state.is_main_process:
        _write_folder(recipe, results, trainer.state.log_history, data.task_names)
        _write_gallery(recipe, data, drawn)
    state.wait_for_everyone()
    return results


@contextlib.contextmanager
def _preparing(section: str, begun: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Whatever fails before the first step is one line with the recipe's section: nothing is lost, and it is mostly the
    recipe's settings that a library or somebody's own code stumbles over. The error itself is the line's cause."""
    try:
        yield
    except (HfBilbError, MemoryError, torch.OutOfMemoryError, BrokenProcessPool):
        raise
    except (Exception, SystemExit) as error:
        if begun():
            raise
        place = own_code(error)
        where = f"{place}: " if place is not None else ""
        raise OptionError(f"{section}: {where}{type(error).__name__}: {error}") from error


def _check_parts(data: TaskData) -> None:
    """Raise `OptionError` for a part without rows; training would end before its first step, or measure nothing."""
    parts = {"training": data.train, "validation": data.validation, "test": data.test}
    if empty := [name for name, part in parts.items() if len(part) == 0]:  # type: ignore[arg-type]  # map-style
        raise OptionError(f"data: the {empty[0]} part has no rows")


def _quieten() -> None:
    """Leave out what says nothing to somebody who runs a recipe, in this process."""
    transformers_logging.disable_progress_bar()  # a bar per file that is written; the Trainer's own bar stays
    warnings.filterwarnings("ignore", message=".*'pin_memory' argument is set as true but no accelerator is found")


def _train(trainer: BilevelMTLTrainer, checkpoint: str | None) -> dict[str, float]:
    progress, first_step = ConciseProgress(), FirstStep()
    trainer.add_callback(first_step)
    trainer.remove_callback(ProgressCallback)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(progress)
    try:
        with _preparing("trainer", lambda: first_step.begun):
            return trainer.train(resume_from_checkpoint=checkpoint).metrics
    finally:
        if progress.training_bar is not None:  # training failed: what is said about it starts on a line of its own
            progress.training_bar.close()


def _save(trainer: BilevelMTLTrainer) -> None:
    trainer.save_model()
    trainer.save_state()
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not isinstance(model, PeftModel) or not trainer.args.should_save:
        return
    if not model.active_peft_config.base_model_name_or_path:
        # peft saves adapters alone; where it knows no base model by name, the config says what they belong on top of.
        # Beside a name it would be in the way: from_pretrained would look for the whole model in this folder.
        model.get_base_model().config.save_pretrained(trainer.args.output_dir)


def resolve_data_options(recipe: Recipe) -> Any:
    """The options of the recipe's data set; those that are null and follow the model take the model's value.

    Raises:
        OptionError: the model has no such option, so the data set's is required.
    """
    spec = DATA_SETS[recipe.data["name"]]
    options = _without_name(recipe.data)
    for key, of_model in spec.from_model.items():
        if options[key] is None:
            if of_model not in recipe.model:
                name = recipe.model["name"]
                raise OptionError(f"data.{key}: is required, since the model {name!r} has no option {of_model!r}")
            options[key] = recipe.model[of_model]
    return parse_options(spec.options, options, "data")


def check_model(recipe: Recipe) -> None:
    """See, before any data are read, that the model takes what the options of the data ask for.

    Raises:
        OptionError: it does not; names the models that do.
    """
    model = recipe.model["name"]
    for key, argument in DATA_SETS[recipe.data["name"]].model_needs.items():
        able = [name for name, spec in MODELS.items() if argument in _arguments(spec)]
        if recipe.data[key] is not None and model not in able:
            raise OptionError(
                f"data.{key}: {recipe.data[key]!r} asks for a model that takes {argument}, which {model!r} does not, "
                f"expected {' or '.join(able)}"
            )


def _arguments(spec: ModelSpec | PlainModelSpec) -> Collection[str]:
    """What a model names of what data may dictate; the rest, `PretrainedConfig` would swallow."""
    build = spec.build if isinstance(spec, PlainModelSpec) else spec.build or spec.config_class
    return inspect.signature(build).parameters


def training_arguments(recipe: Recipe, data: TaskData | None = None) -> BilevelMTLTrainingArguments:
    """The recipe's `trainer` and `balancer` sections as training arguments; with `data`, its tasks and label columns.

    Raises:
        OptionError: one line, for settings that do not fit together.
        MissingPackageError: a package that `report_to` needs is not installed.
    """
    settings = dict(recipe.trainer)
    if data is not None:
        settings.update(task_names=list(data.task_names), label_names=list(data.label_names))
        settings.setdefault("batch_eval_metrics", data.metrics_by_batch)
        _settle_best_metric(settings, data)
    try:
        args = BilevelMTLTrainingArguments(**settings, balancer=recipe.balancer)
    except Exception as error:  # of transformers: whatever it makes of settings that do not fit together
        raise OptionError(f"trainer: {error}") from None
    check_reporting(args.report_to, "trainer.report_to")
    return args


def _settle_best_metric(settings: dict[str, Any], data: TaskData) -> None:
    """The data set knows which way up its metrics are, so that no recipe has to say `greater_is_better`."""
    name = settings.get("metric_for_best_model")
    if name is None:
        return
    key = name.removeprefix("eval_")
    known = {metric.key: metric.higher_is_better for metric in data.metrics}
    losses = ["loss", *(f"loss_{task}" for task in data.task_names)]
    if key not in (*known, *losses):
        raise OptionError(
            f"trainer.metric_for_best_model: {name!r} is not measured on these data{nearest(key, [*known, *losses])}"
        )
    upwards = known.get(key, False)
    if settings.setdefault("greater_is_better", upwards) not in (None, upwards):
        better = "higher" if upwards else "lower"
        raise OptionError(
            f"trainer.greater_is_better: {not upwards} is wrong for {name!r}, which is better when {better}"
        )
    settings["greater_is_better"] = upwards


def build_model(recipe: Recipe, data: TaskData) -> nn.Module:
    """The recipe's model with fresh or pretrained weights; what the data dictate (sizes, task names) goes into it."""
    spec = MODELS[recipe.model["name"]]
    options = _without_name(recipe.model)
    if spec.build is not None:
        try:
            inspect.signature(spec.build).bind(spec.options, **data.model_arguments)
        except TypeError as error:
            raise OptionError(f"model.name: {recipe.model['name']!r} is no model for these data ({error})") from None
    if isinstance(spec, PlainModelSpec):
        model = spec.build(parse_options(spec.options, options, "model"), **data.model_arguments)
        rows = [data.train[0]]
        batch = rows[0] if data.data_collator is None else data.data_collator(rows)
        check_columns(model, batch, data.label_names)
        check_savable(model)
        return model
    if spec.build is not None:
        return spec.build(parse_options(spec.options, options, "model"), **data.model_arguments)
    known = _arguments(spec)
    if odd := next((key for key in data.model_arguments if key not in known), None):
        names = f"the model {recipe.model['name']!r} and the data {recipe.data['name']!r}"
        raise OptionError(f"model.name: {names} do not go together (the model has no {odd})")
    return spec.model_class(spec.config_class(**options, **data.model_arguments))


def task_loss_func(recipe: Recipe, data: TaskData) -> Callable[..., Any] | None:
    """The data set's losses, for a model that returns predictions alone; None for one with losses of its own.

    Raises:
        OptionError: the data set has none.
    """
    name = recipe.model["name"]
    if not isinstance(MODELS[name], PlainModelSpec):
        return None
    if data.task_loss_func is None:
        raise OptionError(
            f"model.name: {name!r} returns predictions alone, and the data set {recipe.data['name']!r} has no losses "
            "for them"
        )
    return data.task_loss_func


class FirstStep(TrainerCallback):
    """Knows whether training has really begun, with loaders, optimizer and checkpoint in place."""

    begun = False

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """It has."""
        self.begun = True


class ConciseProgress(ProgressCallback):
    """The Trainer's progress bar, with the loss beside it and a line per evaluation instead of every logged number."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show F and the mean loss; the K numbers of each kind are in the log history."""
        if self.training_bar is None or logs is None:
            return
        if "loss_mean" in logs:
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.4g}, mean of tasks {logs['loss_mean']:.4g}")
        if "eval_loss" in logs:
            self.training_bar.write(
                f"step {state.global_step}: validation loss {logs['eval_loss']:.4g} (mean of tasks)"
            )


# ---------------------------------------------------------------------------------------------------- the folder


def _enter_folder(folder: Path, resume: bool, held: contextlib.ExitStack) -> str | None:
    """Hold the folder from now on, and look at what is in it; the first rank does it for all."""
    check_output_folder(folder, "trainer.output_dir")
    if not resume:
        make_output_folder(folder, "trainer.output_dir")
    if not resume or folder.is_dir():  # else there is nothing to resume, and no folder is left behind
        held.enter_context(folder_lock.hold(folder))
    return _check_folder(folder, resume)


def _check_folder(folder: Path, resume: bool) -> str | None:
    """The checkpoint to resume from, or None for a fresh start; refuses to start over in the folder of another run."""
    if resume:
        return checkpointing.last_complete_checkpoint(folder)
    held = [path.name for path in (folder / FILE_NAME, *sorted(folder.glob("checkpoint-*"))) if path.exists()]
    if held:
        raise OptionError(
            f"trainer.output_dir: {str(folder)!r} already holds a run ({held[0]}): --resume goes on with it, "
            "another folder starts anew"
        )
    path = folder / RECIPE_FILE
    if path.is_file() and not path.read_bytes().startswith(_RECIPE_HEAD.encode()):
        raise OptionError(f"trainer.output_dir: {str(path)!r} was not written by a run and would be lost")
    return None


def _write_recipe(recipe: Recipe, folder: Path, resume: bool) -> None:
    """Write the resolved recipe; on a resume, say where it differs from the one that the run was started with."""
    make_output_folder(folder, "trainer.output_dir")
    path = folder / RECIPE_FILE
    if resume and path.is_file():
        before = read_yaml(path)
        for difference in differences(before, recipe.to_dict()) if isinstance(before, Mapping) else []:
            logger.warning("%s: this folder's run was started with another value: %s", path, difference)
    write_text(path, f"{_RECIPE_HEAD} the recipe {recipe.name!r} by hf-bilb\n{dump_recipe(recipe)}")


def _write_folder(recipe: Recipe, results: RunResults, history: list[dict[str, Any]], tasks: tuple[str, ...]) -> None:
    folder = Path(recipe.output_dir)
    write_results(results, folder)
    table = compare([results], [results.balancer])
    write_text(folder / "table.md", render_markdown(table))
    if recipe.evaluation.plots:
        plot_run(history, tasks, folder, title=f"{recipe.name} ({results.balancer})")
    what = "results" if any(metric.higher_is_better for metric in results.metrics) else "errors"
    click.echo(f"\n{results.split} {what} of {recipe.name} ({results.balancer}):\n\n{render_text(table)}")
    click.echo(f"{results.training['steps']} steps in {results.training['seconds']:.0f} s; all files are in {folder}")


def _write_gallery(recipe: Recipe, data: TaskData, rows: list[GalleryRow]) -> None:
    if rows and data.gallery is not None:
        title = f"{recipe.name} ({recipe.balancer['name']}): {recipe.evaluation.split} images"
        tasks = list(rows[0].prediction)
        write_gallery(rows, tasks, Path(recipe.output_dir), title, data.gallery.class_names, data.gallery.depth_unit)


# ---------------------------------------------------------------------------------------------------- results


def collect_results(
    recipe: Recipe, data: TaskData, measured: Mapping[str, float], training: Mapping[str, Any]
) -> RunResults:
    """Put what was measured (`evaluate`'s dict, keys prefixed by the split) beside the trivial predictor's figures."""
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
    )


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


def _training_facts(trainer: BilevelMTLTrainer, metrics: Mapping[str, float], checkpoint: str | None) -> dict[str, Any]:
    state = trainer.state
    best = state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    return {
        "steps": state.global_step,
        "epochs": finite(state.epoch),
        "seconds": round(metrics["train_runtime"], 2),
        "resumed_from": None if checkpoint is None else Path(checkpoint).name,
        "measured_checkpoint": None if best is None else Path(best).name,
        "best_metric": finite(state.best_metric),
        "mean_loss": finite(metrics.get("train_loss")),
        "processes": trainer.args.world_size,
        "device": trainer.args.device.type,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    }


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in _VERSIONS_OF}}


def _without_name(section: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key != "name"}
