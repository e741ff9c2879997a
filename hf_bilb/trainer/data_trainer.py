"""A `transformers.Trainer` that goes on exactly where its training data were, whatever their length."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import has_length

from hf_bilb.errors import OptionError
from hf_bilb.trainer.data_position import (
    DataPosition,
    SavedPosition,
    position_file,
    position_of_state,
    read_position,
    write_position,
)
from hf_bilb.trainer.hub_trainer import HubTrainer

logger = logging.getLogger(__name__)

GAVE_NOTHING = "{}: gave no batch at all, expected at least one example"


class Filler(dict[str, Any]):
    """A micro-batch without an example, which brings an update up to the number of micro-batches that the loop counts.

    `Trainer` steps after `gradient_accumulation_steps` micro-batches; where the length of a pass is not known, a last
    update of fewer would be left without its step, and its gradients be added to those of the next pass.
    """


class DataTrainer(HubTrainer):
    """Counts the passes over the training data and the updates of each, and resumes by that count.

    `Trainer` takes the position from `global_step` and the number of updates in a pass, which it does not know for data
    without a length (it takes `max_steps`), and which is another where a callback has cut a pass short.

    State: `data_position_<rank>.json` in each checkpoint.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.data_position = DataPosition()
        super().__init__(*args, **kwargs)

    # --- data that are not there -----------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`; raises `OptionError` before anything is loaded when a data set has no example."""
        refuse_empty(self.train_dataset, "train_dataset")
        if self.args.eval_strategy != "no":
            several = isinstance(self.eval_dataset, dict)
            for name, dataset in (self.eval_dataset if several else {"": self.eval_dataset}).items():
                refuse_empty(dataset, f"eval_dataset[{name!r}]" if several else "eval_dataset")
        return super().train(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """As in `Trainer`; raises `OptionError` when it would give no batch."""
        say_split_already(self.train_dataset, "train_dataset", self.args.world_size)
        loader = super().get_train_dataloader()
        if has_length(loader) and len(loader) == 0:
            examples = f"{len(self.train_dataset)} examples" if has_length(self.train_dataset) else "its examples"
            raise OptionError(
                f"train_dataset: {examples} make no batch of {self._train_batch_size} on each of "
                f"{self.args.world_size} rank(s); expected more, or dataloader_drop_last: false"
            )
        return loader

    # --- position --------------------------------------------------------------------------------------------------

    def _check_checkpoint(self, checkpoint: str) -> None:
        super()._check_checkpoint(checkpoint)
        read_position(checkpoint, self.args.process_index)

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        epoch, batches = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        accumulation = self.args.gradient_accumulation_steps
        where = SavedPosition(epoch, batches // accumulation)
        if resume_from_checkpoint is not None and self.state.global_step > 0:
            if num_train_epochs != sys.maxsize:
                where = self._known_length(resume_from_checkpoint, where, num_update_steps_per_epoch)
            elif self.state.global_step < max_steps:
                where = self._unknown_length(resume_from_checkpoint)
            else:
                where = SavedPosition(num_train_epochs, 0)  # nothing is left to do
            if self.args.ignore_data_skip and where.updates > 0:
                logger.warning(
                    "ignore_data_skip: pass %d over the training data begins again, though %d updates of it were done: "
                    "the run sees other rows than an uninterrupted one", where.epoch, where.updates,
                )  # fmt: skip
                where = SavedPosition(where.epoch, 0)
        self.data_position.start(replace(where, global_step=self.state.global_step))
        return where.epoch, where.updates * accumulation

    def _known_length(self, checkpoint: str, by_steps: SavedPosition, updates_per_pass: int) -> SavedPosition:
        """The position in data with a length; `by_steps` is Trainer's, which holds when the settings are others now."""
        saved = read_position(checkpoint, self.args.process_index)
        same = saved is not None and saved.global_step == self.state.global_step
        if saved is None or not same or saved.rows_per_update != self._rows_per_update():
            return by_steps
        return saved if saved.updates < updates_per_pass else SavedPosition(saved.epoch + 1, 0)

    def _unknown_length(self, checkpoint: str) -> SavedPosition:
        """The position in data without a length, of which `Trainer` only knows where it is in the first pass."""
        saved = read_position(checkpoint, self.args.process_index)
        if saved is None:
            saved = position_of_state(TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)))
            if saved is None:
                logger.warning(
                    "%s does not say where in the training data, which have no length, it was saved: they are gone "
                    "through from their beginning", checkpoint,
                )  # fmt: skip
                return SavedPosition(0, 0)
            logger.warning(
                "%s holds no data_position_0.json: by its trainer_state.json it was saved after %d updates of pass %d "
                "over the training data, where it goes on", checkpoint, saved.updates, saved.epoch,
            )  # fmt: skip
        updates, whole = saved.in_updates_of(self._rows_per_update())
        if not whole:
            logger.warning(
                "%s was saved with %d rows in an update, now it is %d: the training data go on at the nearest update, "
                "%d, of pass %d", checkpoint, saved.rows_per_update, self._rows_per_update(), updates, saved.epoch,
            )  # fmt: skip
        if saved.lost_batches:
            logger.warning(
                "%s was saved at the end of a pass whose last %d batch(es) made no whole update: their gradients are "
                "not in it", checkpoint, saved.lost_batches,
            )  # fmt: skip
        return replace(saved, updates=updates)

    def _rows_per_update(self) -> int:
        return int(self.get_total_train_batch_size(self.args))

    def _run_epoch(self, *, epoch: int, **loop: Any) -> None:
        self.data_position.begin_pass(epoch, self.state.global_step, self.train_dataset)
        super()._run_epoch(epoch=epoch, **loop)
        self.data_position.end_pass(self.state.global_step)

    @contextmanager
    def _batches_announced(
        self, announce: Callable[[list], None], filled_up: Callable[[list, int], list]
    ) -> Iterator[None]:
        """While training, announce whatever `get_batch_samples` returns: Trainer's, a subclass's, one put there.

        Args:
            announce: called with the micro-batches of the next step.
            filled_up: brings a step of too few micro-batches to the number in which the loop counts.
        """
        own = vars(self).get("get_batch_samples")
        collect = self.get_batch_samples

        def collected(epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
            batches, num_items = collect(epoch_iterator, num_batches, device)
            self.data_position.took(len(batches))
            announce(batches)
            whole = not 0 < len(batches) < num_batches
            return (batches if whole else filled_up(batches, num_batches)), num_items

        self.get_batch_samples = collected  # type: ignore[method-assign]
        try:
            yield
        finally:
            del self.get_batch_samples
            if own is not None:
                self.get_batch_samples = own  # type: ignore[method-assign]

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """As in `Trainer`.

        Raises:
            OptionError: data without a length give not a single batch, in the first place.
        """
        first = self.state.global_step == 0 and self.data_position.epoch == 0 and not self.data_position.given
        try:
            batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        except (ValueError, TypeError) as error:
            if first and nothing_to_dispatch(error):
                raise OptionError(GAVE_NOTHING.format("train_dataset")) from None
            raise
        if first and not batches:
            raise OptionError(GAVE_NOTHING.format("train_dataset"))
        return batches, num_items

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        position = self.data_position.saved(
            self.state.global_step, self._rows_per_update(), self.control.should_epoch_stop
        )
        rank = self.args.process_index
        with self._writing(output_dir, position_file(rank)):
            write_position(output_dir, rank, position)


def nothing_to_dispatch(error: Exception) -> bool:
    """Whether accelerate's dispatching loader fails because rank 0 has read nothing, which it does not say."""
    return "Batch does not contain any data" in str(error) or "passed to `_gpu_broadcast_one`" in str(error)


def say_split_already(dataset: Any, name: str, num_ranks: int) -> None:
    """Warn of a stream that `datasets.distributed.split_dataset_by_node` has divided: it would be divided once more."""
    split = getattr(dataset, "_distributed", None)  # where `datasets` keeps it; there is no public name
    if num_ranks > 1 and split is not None and split.world_size > 1:
        logger.warning(
            "%s: split_dataset_by_node has divided it among %d ranks, and Trainer divides what it is given once more: "
            "rows are left out; give it the whole data set", name, split.world_size,
        )  # fmt: skip


def refuse_empty(dataset: Any, name: str) -> None:
    """Raise `OptionError` for a data set whose length is 0."""
    if dataset is not None and has_length(dataset) and len(dataset) == 0:
        raise OptionError(f"{name}: is empty, expected at least one example")
