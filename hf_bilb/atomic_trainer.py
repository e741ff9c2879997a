"""A `transformers.Trainer` whose checkpoints are complete or not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer_utils import TrainOutput, rotate_checkpoints

from hf_bilb import checkpointing
from hf_bilb.folders import check_output_folder


class AtomicCheckpointTrainer(Trainer):
    """Writes checkpoints aside and renames them when they are finished; resumes from complete ones only.

    `Trainer` writes into `checkpoint-N` itself, file by file; a run killed meanwhile leaves half a checkpoint with the
    highest number, which `resume_from_checkpoint=True` then takes.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Trainer's constructor already asks for the output folder.
        self._staging: Path | None = None
        try:
            super().__init__(*args, **kwargs)
        except OSError:
            self._check_output()  # what Trainer makes its folder with says less
            raise
        self._check_output()

    def _check_output(self) -> None:
        """Raise `StorageError` where this process shall write into a folder that it cannot write to."""
        if self.args.should_save:
            check_output_folder(self.args.output_dir, "output_dir")

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in `Trainer`; `resume_from_checkpoint=True` takes the last *complete* checkpoint.

        Raises:
            CheckpointError: no complete checkpoint, or the given one is incomplete or damaged; nothing is loaded then.
            StorageError: the output folder cannot be written to.
        """
        self._check_output()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = checkpointing.last_complete_checkpoint(self.args.output_dir)
        if resume_from_checkpoint:
            checkpointing.verify(resume_from_checkpoint)
            self._check_checkpoint(str(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _check_checkpoint(self, checkpoint: str) -> None:
        """Hook: raise `CheckpointError` when `checkpoint`, which is complete, does not fit this run."""

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_folder = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        staged, final = run_folder / checkpointing.STAGING / name, run_folder / name
        if self.args.should_save:
            checkpointing.clear_staging(staged)
        self.accelerator.wait_for_everyone()
        self._staging = staged.parent
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        if self.state.best_global_step:
            # Trainer has looked for the best one beside this one, at the temporary place.
            best = run_folder / f"checkpoint-{self.state.best_global_step}"
            if best == final or best.is_dir():
                self.state.best_model_checkpoint = str(best)
        if self.args.should_save:
            self.state.save_to_json(str(staged / "trainer_state.json"))
        # Every rank has written its part before the rename, and none goes on before it.
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpointing.publish(staged, final)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            kept = self.state.best_model_checkpoint
            rotate_checkpoints(str(run_folder), self.args.save_total_limit, kept, use_mtime=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Trainer pushes while the checkpoint is still staged; `_save_checkpoint` does it once it is in place.
        if self._staging is None:
            super()._push_from_checkpoint(checkpoint_folder)
