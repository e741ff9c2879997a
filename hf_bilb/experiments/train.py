"""Running a recipe: data, model, Trainer, one measurement at the end, and the folder that is left."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import click
from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from hf_bilb.experiments.build import (
    build_callbacks,
    build_trainer,
    check_model,
    load_data,
    preparing,
    resolve_data_options,
    training_arguments,
)
from hf_bilb.experiments.collect import collect_results, training_facts
from hf_bilb.experiments.folder import enter_folder, saying_how_to_go_on, write_image_gallery, write_recipe, write_run
from hf_bilb.experiments.gallery import gallery_rows
from hf_bilb.experiments.progress_bar import concise_progress, quieten
from hf_bilb.experiments.push import prepare_push, push_after_training, push_command
from hf_bilb.experiments.recipe import Recipe
from hf_bilb.experiments.run_card import write_card
from hf_bilb.experiments.timing import StepClock
from hf_bilb.hub.repository import Repository
from hf_bilb.reporting.results import RunResults
from hf_bilb.storage.disk_full import disk_full_explained
from hf_bilb.trainer.agreement import from_first_rank
from hf_bilb.trainer.tracker_images import TrackerImages
from hf_bilb.trainer.trainer import BilevelMTLTrainer


def run_recipe(recipe: Recipe, resume: bool = False) -> RunResults:
    """Train as `recipe` says, measure once on `evaluation.split`, and write everything into `trainer.output_dir`.

    Written, by the main process: `recipe.yaml` (before training), checkpoints, the model, `trainer_state.json`,
    `results.json`, `table.md`, `losses.png`, `weights.png`, of pixel-wise tasks `gallery.png`, and the model card,
    `README.md`; the pictures are sent to the trackers of `report_to`, too. With `trainer.push_to_hub` all of it is
    pushed then, once. Under several processes every rank calls this.

    Args:
        recipe: from `read_recipe`.
        resume: go on from the last complete checkpoint in the folder.

    Raises:
        OptionError: settings that do not fit together, or a folder that already holds a run (without `resume`).
        CheckpointError: `resume` without a complete checkpoint, or one that belongs to another run; a full disk.
        FolderInUseError: another run is writing into the folder.
        KeyboardInterrupt: interrupted; says how to go on.
        HubError: the Hub cannot be reached before the training, or took nothing after it: the run is complete then.
        MissingPackageError: the data set's package is not installed.
    """
    started = time.perf_counter()
    quieten()
    args = training_arguments(recipe)  # before anything is loaded: finds settings that contradict each other
    data_options = resolve_data_options(recipe)
    check_model(recipe)
    callbacks = build_callbacks(recipe)
    state = PartialState()
    folder = Path(args.output_dir)
    with contextlib.ExitStack() as held, disk_full_explained(folder):
        checkpoint = from_first_rank(lambda: enter_folder(folder, resume, held))
        repository = from_first_rank(lambda: prepare_push(recipe))
        if state.is_main_process:
            write_recipe(recipe, folder, resume)
        set_seed(args.seed)  # the model's initial weights; the Trainer seeds its own part
        with saying_how_to_go_on(folder) if state.is_main_process else contextlib.nullcontext():
            results = _train_and_measure(recipe, data_options, callbacks, checkpoint, started)
        if state.is_main_process:
            _share(recipe, results, repository)
        return results


def _share(recipe: Recipe, results: RunResults, repository: Repository | None) -> None:
    """Write the card and push. The other ranks do not wait for it: an upload may take longer than they would."""
    folder = recipe.output_dir
    name = folder.absolute().name if repository is None else repository.name
    write_card(folder, results, name, in_repository=repository is not None)
    if repository is None:
        return
    click.echo(f"pushing to {repository.address}")
    try:
        click.echo(f"pushed to {push_after_training(recipe, repository)}")
    except KeyboardInterrupt:
        command = push_command(folder, repository)
        raise KeyboardInterrupt(
            f"interrupted; {folder} is complete, but was not pushed; this pushes it: {command}"
        ) from None


def _train_and_measure(
    recipe: Recipe, data_options: Any, callbacks: list[TrainerCallback], checkpoint: str | None, started: float
) -> RunResults:
    """Everything that comes when the settings are checked and the folder is this run's own."""
    state, clock = PartialState(), StepClock()
    data = load_data(recipe, data_options)
    if data.summary and state.is_main_process:
        click.echo(data.summary)
    images = TrackerImages()
    trainer = build_trainer(recipe, data, callbacks=[clock, images, *callbacks])
    training = _train(trainer, checkpoint)
    _save(trainer)
    part = getattr(data, recipe.evaluation.split)
    measured = trainer.evaluate(part, metric_key_prefix=recipe.evaluation.split)
    drawn = gallery_rows(trainer, part, data) if recipe.evaluation.plots else []
    facts = {
        **training_facts(trainer, training, checkpoint),
        **clock.facts(),
        "total_seconds": round(time.perf_counter() - started, 2),
    }
    results = collect_results(recipe, data, measured, facts)
    if state.is_main_process:
        plots = write_run(recipe, results, trainer.state.log_history, data.task_names)
        images.send(trainer, [*plots, *write_image_gallery(recipe, data, drawn)])
    state.wait_for_everyone()
    return results


def _train(trainer: BilevelMTLTrainer, checkpoint: str | None) -> dict[str, float]:
    first_step = FirstStep()
    trainer.add_callback(first_step)
    with concise_progress(trainer), preparing("trainer", lambda: first_step.begun):
        return trainer.train(resume_from_checkpoint=checkpoint).metrics


class FirstStep(TrainerCallback):
    """Knows whether training has really begun, with loaders, optimizer and checkpoint in place."""

    begun = False

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """It has."""
        self.begun = True


def _save(trainer: BilevelMTLTrainer) -> None:
    """The model, for `hf_bilb.load` and `from_pretrained`, and the log."""
    trainer.save_model(_internal_call=True)  # with `push_to_hub`, Trainer would push here, with nothing measured
    trainer.save_state()
