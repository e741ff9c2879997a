"""A `transformers.Trainer` that pushes a checkpoint as a whole or not at all."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import PushInProgress

from hf_bilb.hub.files import LAST_CHECKPOINT, REPLACED, files_of, model_files
from hf_bilb.hub.remote_code import with_code
from hf_bilb.hub.repository import Repository, push_files
from hf_bilb.trainer.checkpoint_trainer import AtomicCheckpointTrainer

CODE_MESSAGE = "Code of the model"


class HubTrainer(AtomicCheckpointTrainer):
    """Pushes in the middle of a training as `hub_strategy` says, in the background, each time in one commit.

    `Trainer` commits model and checkpoint apart, and large ones in several parts: a run that is killed meanwhile leaves
    half a checkpoint on the Hub. A push that fails is made up for by the next one.
    """

    push_in_progress: Any

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in `Trainer`; a packaged model's code follows in a commit of its own, for `trust_remote_code=True`."""
        pushed = super().push_to_hub(commit_message, blocking, token, revision, private, **kwargs)
        if pushed is None:  # this process does not push
            return None
        folder = Path(self.args.output_dir)
        local = model_files(folder)
        repository = self._repository(token, revision)
        whole = with_code(local)
        added = {name: content for name, content in whole.items() if content is not local.get(name)}
        if not added:
            return pushed
        if blocking:
            return push_files(repository, added, CODE_MESSAGE)
        return self._background.run_as_future(lambda: [pushed.result(), push_files(repository, added, CODE_MESSAGE)][1])

    def _repository(self, token: str | None = None, revision: str | None = None) -> Repository:
        args = self.args
        return Repository(
            str(self.hub_model_id), None, revision or args.hub_revision, token or args.hub_token, "hub_model_id"
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Trainer asks while the checkpoint is still staged; `_save_checkpoint` asks once it is in place.
        strategy = self.args.hub_strategy
        if self._staging is not None or strategy == HubStrategy.END or not self.is_world_process_zero():
            return
        if self._is_pushing() and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        folder = Path(checkpoint_folder)
        repository = self._repository()
        files = with_code(model_files(folder))
        replaced, message = list(REPLACED), self._progress()
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            place = LAST_CHECKPOINT if strategy == HubStrategy.CHECKPOINT else folder.name
            files |= files_of(folder, place)
            replaced.append(f"{place}/*")
            message += ", checkpoint"
        job = self._background.run_as_future(push_files, repository, files, message, replaced)
        if self._is_pushing():
            self.push_in_progress.jobs.append(job)
        else:
            self.push_in_progress = PushInProgress([job])

    @cached_property
    def _background(self) -> HfApi:
        # The jobs of one HfApi run one after the other. Those of two may overtake each other, and an older checkpoint
        # would replace a newer one.
        return HfApi()

    def _is_pushing(self) -> bool:
        return self.push_in_progress is not None and not self.push_in_progress.is_done()

    def _progress(self) -> str:
        by_epoch = self.args.save_strategy == SaveStrategy.EPOCH
        where = f"epoch {int(self.state.epoch or 0)}" if by_epoch else f"step {self.state.global_step}"
        return f"Training in progress, {where}"
