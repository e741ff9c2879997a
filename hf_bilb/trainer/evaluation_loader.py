"""Loaders of evaluation data that give every example once, however many ranks there are and whatever the set's length.

accelerate deals batches out so that all ranks have as many, and fills up with repetitions; `remainder` says how many
examples of the last batch are none. Of data without a length that are not read by rank 0 alone (`dispatch_batches:
false`), it does not say it.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.data_loader import DataLoaderShard
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer
from transformers.trainer_utils import has_length

logger = logging.getLogger(__name__)


class StreamRows(IterableDataset):
    """The rows of an iterable data set, read by worker processes, one by one in this process.

    Each worker's last batch is short, so batches made by workers are uneven in the middle of the stream, which cannot
    be dealt out to ranks; rows can.
    """

    def __init__(self, dataset: IterableDataset, batch_size: int, num_workers: int, **settings: Any) -> None:
        if num_workers > 0:
            settings["num_workers"] = num_workers
        self._loader = DataLoader(dataset, batch_size=batch_size, collate_fn=_as_they_are, **settings)

    def __iter__(self) -> Iterator[Any]:
        for rows in self._loader:
            yield from rows


def _as_they_are(rows: list) -> list:
    return rows


class OwnRows(IterableDataset):
    """One rank's rows of a stream that every rank reads, as many on each: blocks of `batch_size` rows in turn.

    What is left at the end is divided evenly, filled up with repetitions of itself. `tell(n)` is called before the last
    rows are given: n rows of all ranks' last batches are no repetitions; 0 = all.
    """

    def __init__(
        self, rows: IterableDataset, batch_size: int, rank: int, num_ranks: int, tell: Callable[[int], None]
    ) -> None:
        self._rows = rows
        self._size = batch_size
        self._rank, self._num_ranks = rank, num_ranks
        self._tell = tell

    def __iter__(self) -> Iterator[Any]:
        rows = iter(self._rows)
        while block := list(itertools.islice(rows, self._size * self._num_ranks)):
            size = -(-len(block) // self._num_ranks)
            if size < self._size or len(block) < self._size * self._num_ranks:
                self._tell(len(block))
            own = range(self._rank * size, (self._rank + 1) * size)
            yield from (block[i % len(block)] for i in own)


def streamed_loader(trainer: Trainer, dataset: Any, description: str, batch_size: int) -> Any:
    """A loader of evaluation data without a length for several ranks, where accelerate's counts repetitions or loses
    rows; None where it does neither.

    With `dispatch_batches: false` every rank reads the whole stream and makes batches of its own rows alone; they may
    differ in shape from rank to rank. Without, rank 0 reads, and with `dataloader_num_workers` it puts the rows of its
    workers together itself.
    """
    args, accelerator = trainer.args, trainer.accelerator
    if args.world_size == 1 or not isinstance(dataset, IterableDataset):
        return None
    everywhere = accelerator.dispatch_batches is False
    if not everywhere and args.dataloader_num_workers == 0:
        return None
    workers = (
        {"multiprocessing_context": args.dataloader_multiprocessing_context} if args.dataloader_num_workers else {}
    )
    rows = StreamRows(
        dataset, batch_size, args.dataloader_num_workers, prefetch_factor=args.dataloader_prefetch_factor, **workers
    )
    collate = trainer._get_collator_with_removed_columns(trainer.data_collator, description=description)
    settings = {"collate_fn": collate, "pin_memory": args.dataloader_pin_memory}
    if not everywhere:
        return accelerator.prepare(DataLoader(rows, batch_size=batch_size, **settings))
    if accelerator.split_batches:
        batch_size //= args.world_size

    def tell(remainder: int) -> None:
        loader.remainder = remainder

    own = OwnRows(rows, batch_size, args.process_index, args.world_size, tell)
    loader = DataLoaderShard(own, device=accelerator.device, batch_size=batch_size, **settings)
    return loader


@contextmanager
def whole_sets(trainer: Trainer, dataset: Any, drop_as_trainer: bool) -> Iterator[None]:
    """While it holds, loaders are made that give the whole set to every rank alike: settings for training are off.

    Args:
        drop_as_trainer: keep `dataloader_drop_last`, which `Trainer` applies to evaluation too, and say what it drops.
    """
    args, accelerator = trainer.args, trainer.accelerator
    drop, even = args.dataloader_drop_last, accelerator.even_batches
    if drop and drop_as_trainer and has_length(dataset):
        dropped = len(dataset) % (args.eval_batch_size * args.world_size)
        if dropped:
            logger.warning("dataloader_drop_last: the last %d of %d examples are not evaluated", dropped, len(dataset))
    args.dataloader_drop_last = drop and drop_as_trainer
    # Uneven ones leave a rank waiting for the others.
    accelerator.even_batches = True
    try:
        yield
    finally:
        args.dataloader_drop_last, accelerator.even_batches = drop, even
