"""Which task each training batch shows: in proportion to size, by temperature, uniformly or in turn.

`TaskSampler` yields single example indices, and every consecutive run of `batch_size` of them is one batch. So it goes
where any sampler goes, and what stands behind it (PyTorch's `BatchSampler`, accelerate's `BatchSamplerShard`,
`DataLoaderDispatcher`, `SkipBatchSampler`) works as it is. All batches are full and their number is a multiple of the
number of ranks, so accelerate never fills an epoch up. With R ranks, batch i R + r is rank r's i-th.

    slot    what gets one task: an example (`batches: mixed`), a batch (`ranks: different`), or the R batches that the
            ranks see at the same time (`ranks: same`)
    stream  a task's examples, shuffled again in each pass: pass 0, pass 1, ...; every slot takes the next ones

Everything is a pure function of (seed, epoch) and of the sizes: there is nothing to save, and a run that goes on in the
middle of an epoch sees the same batches (`set_sampler_epoch` says what is needed for that).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher, SkipBatchSampler
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader, IterableDataset, Sampler, Subset

from hf_bilb.config.options import bounded, check_bounds
from hf_bilb.errors import OptionError

Strategy = Literal["proportional", "temperature", "uniform", "round_robin"]
Ints = NDArray[np.int64]

#: Parts of the seeds of independent random numbers.
_OF_STREAMS, _OF_EPOCHS, _OF_ROUNDING = 0, 1, 2
#: Halves the bias of who is together with whom each time; after 12 it is below 0.5 % (measured, 4 to 255 tasks).
_MIXING_ROUNDS = 12
#: Multiples of it, modulo 1, fill [0, 1) evenly, however many there are.
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class TaskSamplingOptions:
    """What `task_sampling` of the training arguments may set; n_k is the number of examples of task k.

    Attributes:
        strategy: `proportional`: every example once an epoch. `temperature`: task k's share is in proportion to
            n_k^(1 / temperature). `uniform`: every task has the same share. `round_robin`: the tasks in their order,
            again and again, also across epochs.
        temperature: of that strategy, which requires it; above 0. 1 gives shares in proportion to n_k, infinity equal
            ones.
        batches: `single_task`: all examples of a batch are of one task. `mixed`: each example is drawn by itself.
        ranks: `different` (the default): the batches that the ranks see at the same time are drawn one by one, and are
            of different tasks as far as the shares allow. `same`: they are of one task. Not for mixed batches.
        batches_per_epoch: how many batches a rank sees in an epoch; default: as many as with `proportional`, which
            itself does not take it.
        seed: of the order; default: `data_seed` of the training arguments, else their `seed`.

    Raises:
        OptionError: a number out of range, or an option that would say nothing.
    """

    strategy: Strategy = "proportional"
    temperature: float | None = None
    batches: Literal["single_task", "mixed"] = "single_task"
    ranks: Literal["same", "different"] | None = None
    batches_per_epoch: int | None = bounded(None, at_least=1, expected="1 or more")
    seed: int | None = bounded(None, at_least=0, expected="0 or more")

    def __post_init__(self) -> None:
        if self.strategy == "temperature" and self.temperature is None:
            raise OptionError('temperature: is required by strategy "temperature", expected a number above 0')
        if self.strategy != "temperature" and self.temperature is not None:
            raise OptionError(
                f'temperature: {self.temperature:g} says nothing for strategy "{self.strategy}", only for "temperature"'
            )
        if self.temperature is not None and not self.temperature > 0:
            raise OptionError(f"temperature: {self.temperature:g} is not valid, expected a number above 0")
        if self.batches == "mixed" and self.ranks is not None:
            raise OptionError(f'ranks: "{self.ranks}" says nothing for mixed batches, whose examples have a task each')
        check_bounds(self)
        if self.batches_per_epoch is not None and self.strategy == "proportional":
            raise OptionError(
                f"batches_per_epoch: {self.batches_per_epoch} is not valid with strategy "
                '"proportional", which shows every example once; use "temperature" with temperature 1'
            )


class TaskSampler(Sampler[int]):
    """Example indices in batches of one task each, or mixed ones, as `options` say.

    `proportional`: every example once an epoch. A task's last slot is completed from the beginning of its next shuffle
    (that of the next epoch); a task smaller than a slot repeats its examples in it. Where the number of batches is no
    multiple of the number of ranks (`ranks: different`), the tasks for whose size it means least give one batch more.
    Mixed batches are a plain shuffle of the whole set, completed likewise.

    The other strategies: of the M slots of an epoch, task k gets M p_k, rounded down or up so that over the epochs its
    share is exactly p_k; a multinomial draw would deviate by sqrt(M p_k (1 - p_k)). The slots stand in random order (of
    `round_robin`: in the tasks' order). A task's stream goes on over the epochs: each of its examples is shown before
    any is shown again, however small its share of an epoch is.

    `ranks: different`: of the M / R global batches, none shows a task more often than another plus once. So the R tasks
    are distinct where no task has more than M / R slots (p_k < 1 / R).

    The sequence of global batches depends on the number of ranks only through B R, except with `ranks: different`.

    Args:
        tasks: `[N]` int, the task of each example, 0 to K - 1.
        options: see `TaskSamplingOptions`; its seed goes before `seed`.
        task_names: the K tasks.
        batch_size: B, the examples of a rank's batch.
        num_ranks: R, data-parallel processes.
        seed: 0 or more.

    Attributes:
        shares: `[K]` float64, the expected share p_k of each task.
        num_ranks: R.
        epoch: what the next iterator shows; see `set_epoch`.

    State: none but `epoch`. Cost: once an epoch about 0.1 s for a million examples (NumPy, no loop over examples), 15
    microseconds for each pass through a task, and 8 bytes an example. Random numbers come from generators of its own.

    Raises:
        OptionError: a task without any example, or a number out of range.
    """

    def __init__(
        self,
        tasks: Tensor,
        options: TaskSamplingOptions,
        task_names: Sequence[str],
        batch_size: int,
        num_ranks: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for key, value, least in (("batch_size", batch_size, 1), ("num_ranks", num_ranks, 1), ("seed", seed, 0)):
            if value < least:
                raise OptionError(f"task_sampling: {key} {value} is not valid, expected {least} or more")
        self._seed = seed if options.seed is None else options.seed
        numbers = tasks.cpu().numpy()
        _check_tasks(numbers, task_names)
        sizes = np.bincount(numbers)
        rows = np.split(np.argsort(numbers, kind="stable"), np.cumsum(sizes)[:-1])
        shares = _shares(options, sizes)
        self.shares = torch.from_numpy(shares)
        self.num_ranks = num_ranks
        self.epoch = 0
        self._batch_size = batch_size
        self._start = 0
        whole = options.batches == "mixed" and options.strategy == "proportional"
        self._streams = [np.arange(len(tasks))] if whole else rows
        self._plan = _plan(options, sizes, shares, batch_size, num_ranks, self._seed)

    def __len__(self) -> int:
        return self._plan.num_slots * self._plan.slot_size

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Let the next iterator show `epoch`, 0, 1, ..., from batch `start` on; one that has begun is not touched."""
        self.epoch = epoch
        self._start = start * self._batch_size

    def __iter__(self) -> Iterator[int]:
        return _integers(self.order(self.epoch)[self._start :])

    def order(self, epoch: int) -> Tensor:
        """`[len(self)]` int64: the example indices of an epoch, in order."""
        slots, given = self._plan.draw(epoch)
        counts = np.bincount(slots, minlength=len(self._streams)) * self._plan.slot_size
        rows = np.concatenate([self._take(int(k), int(given[k]), int(counts[k])) for k in np.flatnonzero(counts)])
        order = np.empty((len(slots), self._plan.slot_size), dtype=np.int64)
        order[np.argsort(slots, kind="stable")] = rows.reshape(-1, self._plan.slot_size)
        return torch.from_numpy(order.reshape(-1))

    def _take(self, stream: int, start: int, length: int) -> Ints:
        """Examples `start` to `start + length - 1` of a stream."""
        rows = self._streams[stream]
        first, last = start // len(rows), (start + length - 1) // len(rows)
        passes = [
            _generator(self._seed, _OF_STREAMS, stream, number).permutation(rows) for number in range(first, last + 1)
        ]
        offset = start - first * len(rows)
        return np.concatenate(passes)[offset : offset + length]


def build_task_sampler(
    dataset: Any,
    options: TaskSamplingOptions,
    task_names: Sequence[str],
    batch_size: int,
    num_ranks: int = 1,
    seed: int = 0,
    split_batches: bool = False,
) -> TaskSampler:
    """The sampler of a data set for one loader.

    Args:
        dataset: see `example_tasks`; with all its columns, before the Trainer removes those that forward does not take.
        options: see `TaskSamplingOptions`.
        task_names: the K tasks.
        batch_size: that of the loader.
        num_ranks: data-parallel processes.
        seed: what the run's `data_seed` or `seed` is.
        split_batches: accelerate's setting: each batch of the loader is divided among the ranks.

    Raises:
        OptionError: see `example_tasks`, `TaskSampler`; a batch that cannot be divided.
    """
    if split_batches:
        if batch_size % num_ranks:
            raise OptionError(
                f"task_sampling: a batch of {batch_size} cannot be divided among {num_ranks} ranks (split_batches)"
            )
        batch_size //= num_ranks
    tasks = example_tasks(dataset, task_names)
    return TaskSampler(tasks, options, task_names, batch_size, num_ranks, seed)


def set_sampler_epoch(dataloader: DataLoader, epoch: int, batches_done: int = 0) -> None:
    """Tell the `TaskSampler` of a prepared data loader, if it has one, which epoch comes next; before it is iterated.

    `Trainer` and accelerate 1.15 hand the epoch down themselves, except behind `skip_first_batches` on several ranks or
    with `dispatch_batches`, that is, in the epoch that a run goes on in. There, this is needed; elsewhere it repeats
    what they do. (The loader that skips has the same sampler as the one that was prepared.)

    Args:
        dataloader: the prepared loader, not the one that `skip_first_batches` returns.
        epoch: 0, 1, ...
        batches_done: how many batches of each rank `skip_first_batches` is asked to skip. With `dispatch_batches` it
            skips so many of all ranks together; the sampler leaves out the rest.
    """
    batches = dataloader.batch_sampler
    while isinstance(batches, (BatchSamplerShard, SkipBatchSampler)):
        batches = batches.batch_sampler
    if isinstance(batches, BatchSampler) and isinstance(batches.sampler, TaskSampler):
        skips_too_few = isinstance(dataloader, DataLoaderDispatcher) and not dataloader.split_batches
        batches.sampler.set_epoch(epoch, batches_done * (batches.sampler.num_ranks - 1) if skips_too_few else 0)


def refuse_other_sampling(train_sampling_strategy: str, why: str = "task_sampling") -> None:
    """Raise `OptionError` when the Trainer's own `train_sampling_strategy` is set in addition to a task sampler.

    Args:
        train_sampling_strategy: the setting.
        why: what there is a task sampler for.
    """
    if train_sampling_strategy != "random":
        raise OptionError(
            f"train_sampling_strategy: {train_sampling_strategy!r} cannot be combined with {why}, whose order the task "
            'sampler decides; expected the default "random"'
        )


# --- where tasks come from ----------------------------------------------------------------------------------------


def example_tasks(dataset: Any, task_names: Sequence[str]) -> Tensor:
    """`[N]` int64: the task number of every example.

    From the column `task_ids` of a `datasets.Dataset`; the attribute `task_ids` `[N]` of a `torch.utils.data.Dataset`;
    a `Subset` of what is accepted here; a `ConcatDataset` of such data sets, or of exactly K that say nothing, one per
    task in the order of `task_names`. Cost: no example is loaded.

    Raises:
        OptionError: the data set has no indices (`IterableDataset`), does not say which tasks its examples have, has
            none of a task, or one of a task that there is not.
    """
    if isinstance(dataset, IterableDataset):  # of torch, which that of `datasets` becomes a subclass of, too
        raise OptionError(
            f"task_sampling: {type(dataset).__name__} has no index per example that a sampler could choose; "
            "mix the tasks' streams with datasets.interleave_datasets(..., probabilities=...) instead"
        )
    found = _task_ids(dataset, len(task_names))
    if found is None:
        raise OptionError(
            f"task_sampling: {type(dataset).__name__} does not say which task an example has; expected a column or "
            f"attribute `task_ids` [N], or a ConcatDataset of {len(task_names)} data sets in the order of task_names"
        )
    numbers = np.asarray(found)
    if numbers.shape != (len(dataset),) or numbers.dtype.kind not in "iu":
        raise OptionError(
            f"task_sampling: task_ids are {numbers.dtype} {list(numbers.shape)}, expected one integer for each of the "
            f"{len(dataset)} examples"
        )
    _check_tasks(numbers, task_names)
    return torch.from_numpy(numbers.astype(np.int64))


def _task_ids(dataset: Any, num_tasks: int) -> Any:
    from datasets import Dataset as TableOfRows

    if isinstance(dataset, TableOfRows):
        if "task_ids" not in dataset.column_names:
            return None
        column = dataset.data.column("task_ids").to_numpy()
        # Rows that were chosen or shuffled: reading them through `dataset` takes 200 times as long (18 s a million).
        return column if dataset._indices is None else column[dataset._indices.column(0).to_numpy()]
    if isinstance(dataset, Subset):
        inner = _task_ids(dataset.dataset, num_tasks)
        return None if inner is None else np.asarray(inner)[np.asarray(dataset.indices, dtype=np.int64)]
    if isinstance(dataset, ConcatDataset):
        parts = [_task_ids(part, num_tasks) for part in dataset.datasets]
        if all(part is not None for part in parts):
            return np.concatenate([np.asarray(part) for part in parts])
        if len(parts) != num_tasks or any(part is not None for part in parts):
            return None
        return np.repeat(np.arange(num_tasks), np.diff(dataset.cumulative_sizes, prepend=0))
    return getattr(dataset, "task_ids", None)


def _check_tasks(numbers: NDArray[np.integer], task_names: Sequence[str]) -> None:
    outside = (numbers < 0) | (numbers >= len(task_names))
    if outside.any():
        row = int(outside.argmax())
        raise OptionError(
            f"task_sampling: example {row} has task {numbers[row]}, expected 0 to {len(task_names) - 1} "
            f"({', '.join(task_names[:8])}{', ...' if len(task_names) > 8 else ''})"
        )
    counts = np.bincount(numbers, minlength=len(task_names))
    if not counts.all():
        raise OptionError(f"task_sampling: task {task_names[int(counts.argmin())]!r} has no example to draw")


# --- which task gets a slot ---------------------------------------------------------------------------------------


class _Plan(Protocol):
    """Which stream each slot of an epoch takes its examples from."""

    @property
    def num_slots(self) -> int: ...

    @property
    def slot_size(self) -> int: ...

    def draw(self, epoch: int) -> tuple[Ints, Ints]:
        """`[num_slots]`: the stream of each slot; `[S]`: how many examples each stream has given in former epochs."""


@dataclass(frozen=True)
class _Proportional:
    """The same number of slots in every epoch, and a new pass of the stream in each."""

    sizes: Ints
    counts: Ints
    slot_size: int
    group: int
    seed: int

    @classmethod
    def cover(cls, sizes: Ints, slot_size: int, group: int, seed: int) -> _Proportional:
        """As few slots as show every example, a multiple of `group`."""
        counts = -(-sizes // slot_size)
        for _ in range(-int(counts.sum()) % group):
            counts[np.argmin((counts + 1) / sizes)] += 1
        return cls(sizes, counts, slot_size, group, seed)

    @property
    def num_slots(self) -> int:
        return int(self.counts.sum())

    def draw(self, epoch: int) -> tuple[Ints, Ints]:
        slots = _deal(self.counts, self.group, _generator(self.seed, _OF_EPOCHS, epoch))
        return slots, epoch * self.sizes


@dataclass(frozen=True)
class _Drawn:
    """Slots by `shares`; every stream goes on where the last epoch left it."""

    shares: NDArray[np.float64]
    num_slots: int
    slot_size: int
    group: int
    seed: int

    def draw(self, epoch: int) -> tuple[Ints, Ints]:
        counts = self._counts(np.array([epoch]))
        given = self._counts(np.arange(epoch)) * self.slot_size
        return _deal(counts, self.group, _generator(self.seed, _OF_EPOCHS, epoch)), given

    def _counts(self, epochs: Ints) -> Ints:
        """`[K]`: the slots of each task in all of `epochs` together; in each, `num_slots` shares_k rounded."""
        # [0, M) is cut at M (p_1 + ... + p_k); task k gets the integers in its part after a shift by u. A shift of its
        # own per epoch, evenly spread over [0, 1), rounds each part up as often as its fraction says.
        first = _generator(self.seed, _OF_ROUNDING).random()
        shifts = (first + epochs * _GOLDEN_RATIO) % 1.0
        cuts = np.floor(self.num_slots * np.cumsum(self.shares)[:-1] + shifts[:, None]).sum(axis=0)
        return np.diff(cuts, prepend=0, append=self.num_slots * len(epochs)).astype(np.int64)


@dataclass(frozen=True)
class _RoundRobin:
    """Slot number s since the beginning of the run is of task s modulo K."""

    num_tasks: int
    num_slots: int
    slot_size: int

    def draw(self, epoch: int) -> tuple[Ints, Ints]:
        before = epoch * self.num_slots
        slots = (before + np.arange(self.num_slots)) % self.num_tasks
        given = (before + self.num_tasks - 1 - np.arange(self.num_tasks)) // self.num_tasks
        return slots, given * self.slot_size


def _plan(
    options: TaskSamplingOptions,
    sizes: Ints,
    shares: NDArray[np.float64],
    batch_size: int,
    num_ranks: int,
    seed: int,
) -> _Plan:
    mixed = options.batches == "mixed"
    global_batch = batch_size * num_ranks
    group = 1 if mixed or options.ranks == "same" else num_ranks
    block = global_batch // group
    cover = _Proportional.cover(np.array([sizes.sum()]) if mixed else sizes, block, group, seed)
    if options.strategy == "proportional":
        return cover
    slot_size = 1 if mixed else block
    batches = options.batches_per_epoch or cover.num_slots // group
    num_slots = batches * global_batch // slot_size
    if options.strategy == "round_robin":
        return _RoundRobin(len(sizes), num_slots, slot_size)
    return _Drawn(shares, num_slots, slot_size, group, seed)


def _shares(options: TaskSamplingOptions, sizes: Ints) -> NDArray[np.float64]:
    exponents = {"proportional": 1.0, "temperature": 1.0 / (options.temperature or 1.0)}
    # Relative to the largest, so that a low temperature does not overflow.
    weights = (sizes / sizes.max()) ** exponents.get(options.strategy, 0.0)
    return weights / weights.sum()


def _deal(counts: Ints, group: int, generator: np.random.Generator) -> Ints:
    """`[sum of counts]`: every task number as often as `counts [K]` says, at random, but evenly over the groups.

    No group of `group` consecutive slots holds a task more often than another group plus once.
    """
    tasks = np.repeat(np.arange(len(counts)), counts)
    if group == 1:
        return generator.permutation(tasks)
    # Dealt like a sorted pack of cards: even, but with the same neighbours together all the time.
    groups = tasks.reshape(group, -1).T
    for _ in range(_MIXING_ROUNDS):
        groups = _redeal(generator.permutation(groups), len(counts), generator)
    return generator.permuted(generator.permutation(groups), axis=1).reshape(-1)


def _redeal(groups: Ints, num_tasks: int, generator: np.random.Generator) -> Ints:
    """Put the slots of two groups together, sort them by task, the tasks in a random order, and deal them out again."""
    whole, size = len(groups) // 2 * 2, groups.shape[1]
    pairs = groups[:whole].reshape(-1, 2 * size)
    priorities = np.take_along_axis(generator.random((len(pairs), num_tasks)), pairs, axis=1)
    pairs = np.take_along_axis(pairs, np.argsort(priorities, axis=1), axis=1)
    return np.concatenate([pairs[:, 0::2], pairs[:, 1::2], groups[whole:]])


def _generator(seed: int, *numbers: int) -> np.random.Generator:
    # Padded with zeros, NumPy would take (1,) and (1, 0) for the same; no two purposes share their first number.
    return np.random.default_rng((seed, *numbers))


def _integers(order: Tensor) -> Iterator[int]:
    # A list of the whole epoch would take another 36 bytes an example.
    for part in order.split(1 << 16):
        yield from part.tolist()
