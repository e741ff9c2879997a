"""What somebody sees who runs a recipe: one bar with the loss next to it, and a line for each evaluation."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging as transformers_logging

from hf_bilb.trainer.trainer import BilevelMTLTrainer


def quieten() -> None:
    """Leave out what says nothing to somebody who runs a recipe, in this process."""
    transformers_logging.disable_progress_bar()  # a bar per file that is written; the Trainer's own bar stays
    warnings.filterwarnings("ignore", message=".*'pin_memory' argument is set as true but no accelerator is found")


@contextlib.contextmanager
def concise_progress(trainer: BilevelMTLTrainer) -> Iterator[None]:
    """`ConciseProgress` in place of the Trainer's own bar, or none where `disable_tqdm` says so."""
    progress = ConciseProgress()
    trainer.remove_callback(ProgressCallback)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(progress)
    try:
        yield
    finally:
        if progress.training_bar is not None:  # training failed: what is said about it starts on a line of its own
            progress.training_bar.close()


class ConciseProgress(ProgressCallback):
    """The Trainer's progress bar, with the loss next to it and a line per evaluation instead of every logged number."""

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
