"""Data sets that are others in every epoch: what they give is a function of (epoch, index), so they have to know it."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class EpochDataset(Protocol):
    """A map-style data set whose rows depend on the epoch (augmentation): any that has `set_epoch`.

    The Trainer calls `set_epoch` at the beginning of every epoch, before the DataLoader's iterator is made, and so when
    a run goes on from a checkpoint in the middle of one. An implementation keeps the number where the DataLoader's
    worker processes see it: those that outlive an epoch (`dataloader_persistent_workers`) hold a copy of the data set
    from before, so it has to lie in shared memory (`torch.Tensor.share_memory_`).
    """

    def set_epoch(self, epoch: int) -> None:
        """The rows that are asked for from now on are those of this epoch, counted from 0."""

    def __len__(self) -> int:
        """How many rows; data without a length (`IterableDataset`) are told their epoch by accelerate."""

    def __getitem__(self, index: Any) -> Any:
        """A row."""
