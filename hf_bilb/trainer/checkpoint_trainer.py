"""A `transformers.Trainer` whose checkpoints are complete or not there, and that has its output folder to itself."""

from __future__ import annotations

import contextlib
import logging
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import SaveStrategy, TrainOutput

from hf_bilb.errors import CheckpointError
from hf_bilb.storage import folder_lock
from hf_bilb.storage.checkpoint_check import STATE, Findings
from hf_bilb.storage.checkpoint_rotation import rotate_checkpoints
from hf_bilb.storage.disk_full import bytes_of_model, bytes_of_optimizer, disk_full_error, disk_full_explained
from hf_bilb.storage.folders import check_output_folder
from hf_bilb.trainer import checkpointing
from hf_bilb.trainer.agreement import from_first_rank, together
from hf_bilb.trainer.finite_weights import weights_are_finite
from hf_bilb.trainer.weights_trainer import RestoringTrainer

logger = logging.getLogger(__name__)


class AtomicCheckpointTrainer(RestoringTrainer):
    """Writes checkpoints aside and renames them when they are finished; resumes from what was saved and nothing else.

    `Trainer` writes into `checkpoint-N` itself, file by file; a run killed meanwhile leaves half a checkpoint with the
    highest number, which `resume_from_checkpoint=True` then takes.

    One run at a time writes into an output folder (`hf_bilb.storage.folder_lock`). A checkpoint with finite weights is
    never deleted in favour of one without, nor is one without taken for the best. Files deleted or added by a
    callback's `on_save`, which comes after the rename, do not stand in the way of a resume.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Trainer's constructor already asks for the output folder.
        self._staging: Path | None = None
        self._save_failure: CheckpointError | None = None
        self._held: contextlib.ExitStack | None = None
        self._run_id = ""
        self._bytes_of_last = 0
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

    # --- a run ---------------------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As in `Trainer`.

        Args:
            resume_from_checkpoint: True takes the last checkpoint in the output folder that is complete and has finite
                weights (`hf_bilb.trainer.checkpointing.last_complete_checkpoint`); a path is taken as it is, with one
                warning that names what is missing or different.
            trial, ignore_keys_for_eval: see `Trainer`.

        Raises:
            CheckpointError: nothing to resume from, or it is damaged or does not fit: nothing is loaded then. Or no
                space was left on the disk for a checkpoint: earlier ones are intact then.
            FolderInUseError: another run is writing into the output folder.
            StorageError: the output folder cannot be written to.
        """
        self._check_output()
        run_folder = Path(super()._get_output_dir(trial))
        with self._running(), disk_full_explained(run_folder):
            if self._writes_into_folder() or resume_from_checkpoint is True:
                self._hold(run_folder)
            checkpoint = self._checkpoint_to_resume(run_folder, resume_from_checkpoint)
            return super().train(checkpoint, trial, ignore_keys_for_eval)

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """What is held is let go at its end, whatever the end is."""
        with contextlib.ExitStack() as self._held:
            try:
                yield
            finally:
                stack, self._held = self._held, None
                stack.close()

    def _writes_into_folder(self) -> bool:
        """Whether this run will write into the output folder; one that does not lets others be."""
        return self.args.save_strategy != SaveStrategy.NO

    def _hold(self, run_folder: Path) -> None:
        """Hold the run's folder until `train` returns."""
        held = self._held
        if held is None:
            return  # a checkpoint written by hand, outside a run

        def hold() -> None:
            held.enter_context(folder_lock.hold(run_folder, again=True))

        from_first_rank(hold)

    def _checkpoint_to_resume(self, run_folder: Path, asked: str | bool | None) -> str | None:
        """The checkpoint, looked at on all ranks before any loads a part of it; the run's id is settled, too."""

        def choose() -> tuple[str | None, str]:
            path = checkpointing.last_complete_checkpoint(run_folder) if asked is True else asked or None
            if path is not None and Path(path).is_dir():
                return str(path), checkpointing.run_id(run_folder, path)
            return path if path is None else str(path), checkpointing.run_id(run_folder, None)

        checkpoint, self._run_id = from_first_rank(choose)
        if checkpoint is not None:
            # Once on each machine: it may have a disk of its own.
            first_here = self.args.local_process_index == 0
            findings = together(lambda: checkpointing.verify(checkpoint) if first_here else None)
            together(lambda: self._check_checkpoint(checkpoint))
            if findings is not None and self.is_world_process_zero():
                self._say(findings)
        return checkpoint

    def _check_checkpoint(self, checkpoint: str) -> None:
        """Hook: raise `CheckpointError` when `checkpoint`, which can be loaded, does not fit this run; may not
        communicate."""
        try:
            TrainerState.load_from_json(str(Path(checkpoint) / STATE))
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{Path(checkpoint) / STATE}: is damaged or of another version: {error}") from None

    def _say(self, findings: Findings) -> None:
        """One warning with all that is missing or different in the checkpoint that is resumed from."""
        said = findings.describe(self._is_balancing())
        if said is not None:
            logger.warning("%s", said)

    def _is_balancing(self) -> bool:
        """Whether a user of this trainer expects a balancer."""
        return False

    # --- saving --------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_folder = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        staged, final = run_folder / checkpointing.STAGING / name, run_folder / name
        self._hold(run_folder)  # where saving was not foreseen when the run began
        if not self._run_id:  # outside a run
            self._run_id = from_first_rank(lambda: checkpointing.run_id(run_folder, None))
        finite = weights_are_finite(self.model, self.args.device)
        best_before = self.state.best_model_checkpoint
        try:
            self._on_saving_ranks(lambda: checkpointing.clear_staging(staged), staged)
            together(lambda: self._write_checkpoint(model, trial, staged))
            # Every rank has written its part before the rename, and none goes on before it.
            self._on_saving_ranks(lambda: checkpointing.publish(staged, final, self._run_id, finite), staged)
        except Exception:
            self.state.best_model_checkpoint = best_before
            if self.args.should_save:
                checkpointing.discard_staging(staged)
            raise
        self._bytes_of_last = sum(path.stat().st_size for path in final.rglob("*") if path.is_file())
        if not finite and self.is_world_process_zero():
            logger.warning("%s: its weights are NOT FINITE; the last checkpoint with finite weights is kept", final)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            rotate_checkpoints(run_folder, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _write_checkpoint(self, model: nn.Module, trial: Any, staged: Path) -> None:
        """All files of this rank but the marker, into `staged`."""
        self._staging, self._save_failure = staged.parent, None
        try:
            super()._save_checkpoint(model, trial)
            if self._save_failure is not None:
                raise self._save_failure
            run_folder = staged.parent.parent
            if self.state.best_global_step:
                # Trainer has looked for the best one next to this one, at the temporary place.
                best = run_folder / f"checkpoint-{self.state.best_global_step}"
                if best.name == staged.name or best.is_dir():
                    self.state.best_model_checkpoint = str(best)
            if self.args.should_save:
                self.state.save_to_json(str(staged / STATE))
        except Exception as error:
            raise self._save_failure or self._explained(error, staged) from None
        finally:
            self._staging = None

    def _on_saving_ranks(self, action: Callable[[], None], staged: Path) -> None:
        def act() -> None:
            try:
                if self.args.should_save:
                    action()
            except Exception as error:
                raise self._explained(error, staged) from None

        together(act)

    def _explained(self, error: Exception, folder: Path, file: str = "") -> Exception:
        """`error`, or one line in its place when the disk is full."""
        staged = folder.parent.name == checkpointing.STAGING
        shown = folder.parent.parent / folder.name if staged else None

        def needed() -> int:
            model = bytes_of_model(self.model)
            # What the last one took says most; before the first one, the tensors.
            return max(model + bytes_of_optimizer(self.optimizer), self._bytes_of_last) if staged else model

        return disk_full_error(error, folder, needed=needed, shown=shown, file=file) or error

    @contextlib.contextmanager
    def _writing(self, folder: str | None, file: str) -> Iterator[None]:
        """Says in one line when the disk is full. In a checkpoint only when `Trainer` is through with it: until then
        the other ranks wait for this one here and there."""
        try:
            yield
        except Exception as error:
            explained = self._explained(error, Path(folder or self.args.output_dir), file)
            if not isinstance(explained, CheckpointError) or explained is error:
                raise
            if self._staging is None:
                raise explained from None
            self._save_failure = self._save_failure or explained

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `Trainer`; a full disk is one line (`CheckpointError`) that names file and bytes needed."""
        with self._writing(output_dir, "model.safetensors"):
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._writing(output_dir, "optimizer.pt"):
            super()._save_optimizer_and_scheduler(output_dir)

    def _save_scaler(self, output_dir: str) -> None:
        with self._writing(output_dir, "scaler.pt"):
            super()._save_scaler(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        several = self.args.world_size > 1
        with self._writing(output_dir, f"rng_state_{self.args.process_index}.pth" if several else "rng_state.pth"):
            super()._save_rng_state(output_dir)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As in `Trainer`; weights that are not finite are never the best, whatever the metric says of them."""
        before = self.state.best_metric, self.state.best_global_step
        if not super()._determine_best_metric(metrics, trial):
            return False
        if weights_are_finite(self.model, self.args.device):
            return True
        self.state.best_metric, self.state.best_global_step = before
        return False

    # --- loading -------------------------------------------------------------------------------------------------

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _loading(checkpoint, "optimizer and learning rate schedule"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with _loading(checkpoint, "the gradient scaler"):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _loading(checkpoint, "the random state"):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        """As in `Trainer`, from a checkpoint that is what was saved; raises `CheckpointError` when it is not."""
        best, first_here = self.state.best_model_checkpoint, self.args.local_process_index == 0
        together(lambda: checkpointing.verify(best, model_alone=True) if first_here and Path(best).is_dir() else None)
        super()._load_best_model()


@contextlib.contextmanager
def _loading(checkpoint: str | None, what: str) -> Iterator[None]:
    """What fails when a part of a checkpoint is loaded, as one line."""
    try:
        yield
    except (CheckpointError, torch.OutOfMemoryError):
        raise
    except (
        RuntimeError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        EOFError,
        pickle.UnpicklingError,
    ) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(f"{checkpoint}: {what} cannot be loaded ({reason[:300]})") from error
