"""The order that `TaskSampler` makes: shares against their definitions, coverage, a pure function of the epoch."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from transformers import HfArgumentParser

from hf_bilb import BilevelMTLTrainer, BilevelMTLTrainingArguments
from hf_bilb.config.options import parse_options
from hf_bilb.errors import OptionError
from hf_bilb.trainer.sampling import (
    TaskSampler,
    TaskSamplingOptions,
    build_task_sampler,
    example_tasks,
    refuse_other_sampling,
    set_sampler_epoch,
)
from tests.synthetic import TASK_NAMES, build_model, flat_parameters
from tests.task_sampling.training import TaskData, build_trainer, expected_batches

NAMES = ["alpha", "beta", "gamma", "delta"]
#: Largest and smallest differ by a factor of 100; delta is smaller than a batch.
SIZES = [600, 150, 37, 6]
SINGLE: list[dict[str, Any]] = [
    {},
    {"ranks": "same"},
    {"strategy": "temperature", "temperature": 2.0},
    {"strategy": "temperature", "temperature": 5.0, "ranks": "same"},
    {"strategy": "uniform"},
    {"strategy": "uniform", "ranks": "same"},
    {"strategy": "round_robin"},
    {"strategy": "round_robin", "ranks": "same"},
]
MIXED: list[dict[str, Any]] = [
    {"batches": "mixed"},
    {"batches": "mixed", "strategy": "temperature", "temperature": 2.0},
    {"batches": "mixed", "strategy": "uniform"},
    {"batches": "mixed", "strategy": "round_robin"},
]
PROPORTIONAL = [options for options in SINGLE + MIXED if "strategy" not in options]
DRAWN = [options for options in SINGLE + MIXED if options.get("strategy") in ("temperature", "uniform")]


def name_of(options: Any) -> str:
    return (
        "-".join(str(value) for value in options.values()) or "default" if isinstance(options, dict) else str(options)
    )


def tasks_of(sizes: list[int], seed: int = 0) -> Tensor:
    ordered = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return ordered[torch.randperm(len(ordered), generator=torch.Generator().manual_seed(seed))]


TASKS = tasks_of(SIZES)


def sampler(
    options: dict[str, Any], batch_size: int = 8, num_ranks: int = 1, seed: int = 0, tasks: Tensor = TASKS
) -> TaskSampler:
    names = [f"task_{k}" for k in range(int(tasks.max()) + 1)]
    return TaskSampler(tasks, TaskSamplingOptions(**options), names, batch_size, num_ranks, seed)


def shares_by_definition(options: dict[str, Any], sizes: list[int]) -> list[float]:
    strategy = options.get("strategy", "proportional")
    exponent = {"proportional": 1.0, "temperature": 1 / options.get("temperature", 1)}.get(strategy, 0.0)
    weights = [size**exponent for size in sizes]
    return [weight / sum(weights) for weight in weights]


# --- batches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 7, 32])
@pytest.mark.parametrize("options", SINGLE + MIXED, ids=name_of)
def test_batches_are_full_and_every_rank_gets_as_many(options: dict[str, Any], batch_size: int, num_ranks: int) -> None:
    made = sampler(options, batch_size, num_ranks)
    order = list(made)
    assert len(order) == len(made)
    assert all(type(index) is int and 0 <= index < len(TASKS) for index in order)
    assert len(order) % (batch_size * num_ranks) == 0
    batches = TASKS[torch.tensor(order)].view(-1, num_ranks, batch_size)
    if options.get("batches") != "mixed":
        assert (batches == batches[:, :, :1]).all(), "a batch holds one task"
    if options.get("ranks") == "same":
        assert (batches == batches[:, :1, :1]).all(), "all ranks are at the same task"


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("options", PROPORTIONAL, ids=name_of)
def test_proportional_shows_every_example_in_every_epoch(options: dict[str, Any], num_ranks: int) -> None:
    made = sampler(options, 8, num_ranks)
    for epoch in range(3):
        counts = Counter(made.order(epoch).tolist())
        assert counts.keys() == set(range(len(TASKS)))
        for task, size in enumerate(SIZES):
            of_task = [counts[row] for row in (task == TASKS).nonzero().flatten().tolist()]
            assert max(of_task) - min(of_task) <= 1, "what completes a batch is spread evenly"
            # At most one incomplete slot per task, and with `different` a batch more for some.
            assert sum(of_task) < size + 8 * num_ranks * (2 if options else 3)
    assert len(made) < len(TASKS) + 8 * num_ranks * (len(SIZES) + 1)


def test_proportional_on_one_rank_adds_nothing_but_what_completes_the_last_batches() -> None:
    counts = torch.bincount(TASKS[sampler({}).order(0)]).tolist()
    assert counts == [math.ceil(size / 8) * 8 for size in SIZES] == [600, 152, 40, 8]
    assert len(sampler({"batches": "mixed"})) == math.ceil(sum(SIZES) / 8) * 8


def test_a_last_batch_is_completed_from_the_beginning_of_the_next_shuffle() -> None:
    made = sampler({}, tasks=tasks_of([20, 300]))
    for epoch in range(3):
        now, after = (made.order(e)[tasks_of([20, 300])[made.order(e)] == 0].tolist() for e in (epoch, epoch + 1))
        assert sorted(now[:20]) == sorted(after[:20]) == sorted(set(now))
        assert now[20:] == after[:4]


def test_batches_that_make_up_a_multiple_of_the_ranks_come_from_large_tasks() -> None:
    # 10 + 10 + 1 batches of 8; of three more, none comes from the smallest, which would be shown twice.
    tasks = tasks_of([80, 79, 8])
    counts = torch.bincount(tasks[sampler({}, 8, 4, tasks=tasks).order(0)]) // 8
    assert counts.tolist() == [12, 11, 1]


# --- shares -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("options", DRAWN, ids=name_of)
def test_shares_are_those_of_the_definition(options: dict[str, Any], num_ranks: int) -> None:
    made = sampler(options, 8, num_ranks)
    expected = shares_by_definition(options, SIZES)
    assert made.shares.tolist() == pytest.approx(expected, rel=1e-12)
    slot = 1 if "batches" in options else 8 * num_ranks if "ranks" in options else 8
    num_slots = len(made) // slot
    total = np.zeros(4)
    epochs = 100
    for epoch in range(epochs):
        counts = torch.bincount(TASKS[made.order(epoch)], minlength=4).numpy() / slot
        assert (abs(counts - num_slots * np.array(expected)) < 1).all(), "rounded, not drawn"
        total += counts
    # Over the epochs, the rounding evens out: far below the sqrt(M p (1 - p) / epochs) of a multinomial draw.
    assert abs(total / epochs - num_slots * np.array(expected)).max() < 0.05


def test_a_task_that_is_worth_a_twelfth_of_a_batch_comes_about_every_twelfth_epoch() -> None:
    # 11 slots; delta is worth 0.083 of one.
    tasks = tasks_of([600, 150, 37, 6])
    made = sampler({"strategy": "temperature", "temperature": 1.0, "batches_per_epoch": 11}, 8, tasks=tasks)
    there = [int((tasks[made.order(epoch)] == 3).any()) for epoch in range(1000)]
    assert sum(there) == pytest.approx(1000 * 11 * 6 / 793, abs=3)
    gaps = np.diff(np.flatnonzero(there))
    assert 6 <= gaps.min() <= gaps.max() <= 24


@pytest.mark.parametrize("options", [o for o in DRAWN + PROPORTIONAL if o.get("ranks") != "same"], ids=name_of)
def test_every_place_of_an_epoch_is_drawn_by_the_shares(options: dict[str, Any]) -> None:
    """Frequencies over 800 epochs of the first, a middle and the last place of each of two ranks, against p."""
    batch_size, num_ranks, epochs = 4, 2, 800
    made = sampler(options, batch_size, num_ranks)
    found = np.stack([TASKS[made.order(epoch)].numpy() for epoch in range(epochs)])
    expected = np.array(shares_by_definition(options, SIZES))
    if options == {}:
        counts = np.bincount(found[0], minlength=4)
        expected = counts / counts.sum()
    middle = len(made) // 2 // 8 * 8
    for place in (0, 4, middle, middle + 4, -5, -1):
        frequencies = np.bincount(found[:, place], minlength=4) / epochs
        # Five standard deviations of a binomial.
        assert (abs(frequencies - expected) <= 5 * np.sqrt(expected * (1 - expected) / epochs) + 1e-9).all(), place


def test_the_order_of_single_task_batches_is_that_of_independent_draws() -> None:
    made = sampler({"strategy": "uniform"}, 8)
    pairs: Counter[tuple[int, int]] = Counter()
    for epoch in range(60):
        tasks = TASKS[made.order(epoch)][::8].tolist()
        pairs.update(itertools.pairwise(tasks))
    total = sum(pairs.values())
    for pair in itertools.product(range(4), repeat=2):
        # p^2 for any two tasks, but for the M - 1 in drawing without replacement.
        assert pairs[pair] / total == pytest.approx(1 / 16, abs=5 * math.sqrt(1 / 16 / total))


def test_round_robin_takes_the_tasks_in_turn_across_epochs() -> None:
    for ranks, repeat in (("same", 2), ("different", 1)):
        made = sampler({"strategy": "round_robin", "ranks": ranks, "batches_per_epoch": 7}, 8, 2)
        found = [task for epoch in range(5) for task in TASKS[made.order(epoch)][:: 8 * repeat].tolist()]
        assert found == [slot % 4 for slot in range(5 * 14 // repeat)]
    made = sampler({"strategy": "round_robin", "batches": "mixed", "batches_per_epoch": 7}, 5)
    found = [task for epoch in range(5) for task in TASKS[made.order(epoch)].tolist()]
    assert found == [slot % 4 for slot in range(5 * 7 * 5)]


@pytest.mark.parametrize("options", [o for o in SINGLE + MIXED if "strategy" in o], ids=name_of)
def test_an_epoch_has_as_many_batches_as_with_proportional(options: dict[str, Any]) -> None:
    proportional = {key: value for key, value in options.items() if key in ("batches", "ranks")}
    assert len(sampler(options, 8, 3)) == len(sampler(proportional, 8, 3))
    assert len(sampler({**options, "batches_per_epoch": 5}, 8, 3)) == 5 * 8 * 3


# --- ranks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "num_ranks"), [([500] * 4, 2), ([500] * 4, 4), (SIZES, 2), (SIZES, 3), ([90] * 20, 8)]
)
@pytest.mark.parametrize("strategy", ["uniform", "temperature", "proportional"])
def test_different_ranks_see_different_tasks_as_far_as_can_be(sizes: list[int], num_ranks: int, strategy: str) -> None:
    tasks = tasks_of(sizes)
    options = {"strategy": strategy, "temperature": 3.0 if strategy == "temperature" else None}
    made = sampler(options, 5, num_ranks, tasks=tasks)
    for epoch in range(3):
        groups = tasks[made.order(epoch)][::5].view(-1, num_ranks)
        counts = torch.stack([torch.bincount(group, minlength=len(sizes)) for group in groups])
        assert (counts.max(dim=0).values - counts.min(dim=0).values <= 1).all()
        if (counts.sum(dim=0) <= len(groups)).all():
            assert (counts <= 1).all(), "all ranks at different tasks"


def test_with_as_many_tasks_as_ranks_each_rank_has_its_own_and_they_take_turns() -> None:
    tasks = tasks_of([500] * 4)
    groups = tasks[sampler({"strategy": "uniform"}, 5, 4, tasks=tasks).order(0)][::5].view(-1, 4)
    assert (groups.sort(dim=1).values == torch.arange(4)).all()
    frequencies = torch.nn.functional.one_hot(groups, 4).double().mean(dim=0)
    assert (frequencies - 0.25).abs().max() <= 5 * math.sqrt(0.25 * 0.75 / len(groups))


def test_every_two_tasks_meet_equally_often() -> None:
    tasks = tasks_of([1000] * 6)
    made = sampler({"strategy": "uniform"}, 2, 2, tasks=tasks)
    groups = torch.cat([tasks[made.order(epoch)][::2].view(-1, 2) for epoch in range(8)])
    pairs = Counter(tuple(sorted(group)) for group in groups.tolist())
    expected = len(groups) / 15
    assert len(pairs) == 15
    assert max(abs(count - expected) for count in pairs.values()) <= 5 * math.sqrt(expected)


@pytest.mark.parametrize(
    "options", [o for o in SINGLE + MIXED if o.get("ranks") == "same" or "batches" in o], ids=name_of
)
def test_global_batches_do_not_depend_on_the_number_of_ranks(options: dict[str, Any]) -> None:
    orders = [sampler(options, 12 // ranks, ranks).order(2) for ranks in (1, 2, 3)]
    assert torch.equal(orders[0], orders[1]) and torch.equal(orders[0], orders[2])


# --- streams ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("options", [o for o in SINGLE + MIXED if "strategy" in o], ids=name_of)
def test_no_example_is_shown_twice_more_than_another_of_its_task(options: dict[str, Any], num_ranks: int) -> None:
    """Over the epochs a large task is shown whole, although each epoch holds a part of it only."""
    made = sampler({**options, "batches_per_epoch": 20}, 8, num_ranks)
    counts = torch.zeros(len(TASKS), dtype=torch.int64)
    first_repeated = 0
    for epoch in range(60):
        counts += torch.bincount(made.order(epoch), minlength=len(TASKS))
        for task in range(4):
            of_task = counts[task == TASKS]
            assert of_task.max() - of_task.min() <= 1
        first_repeated = first_repeated or (epoch if counts[TASKS == 0].max() > 1 else 0)
    assert counts[TASKS == 0].min() >= 1, "alpha was shown whole"
    assert first_repeated >= 3, "an epoch was to hold a part of it only"


@pytest.mark.parametrize("options", [{"strategy": "uniform"}, {}, *MIXED[:2]], ids=name_of)
def test_every_pass_every_task_and_every_seed_has_a_shuffle_of_its_own(options: dict[str, Any]) -> None:
    tasks = torch.arange(2).repeat(50)
    made = sampler(options, 50, tasks=tasks)

    def rows(epoch: int, task: int, seed: int = 0) -> list[int]:
        order = sampler(options, 50, tasks=tasks, seed=seed).order(epoch)
        return (order[tasks[order] == task] // 2).tolist()[:40]

    shown = [rows(0, 0), rows(0, 1), rows(1, 0), rows(2, 0), rows(0, 0, seed=1)]
    assert all(a != b for a, b in itertools.combinations(shown, 2))
    assert all(part != sorted(part) for part in shown)
    assert len(made) == 100


def test_where_an_example_stands_in_a_shuffle_is_uniform() -> None:
    made = sampler({}, 4, tasks=torch.zeros(20, dtype=torch.int64))
    places = torch.stack([made.order(epoch).argsort() for epoch in range(2000)]).double()
    # A place 0 to 19: mean 9.5, variance (20^2 - 1) / 12.
    assert (places.mean(dim=0) - 9.5).abs().max() <= 5 * math.sqrt(399 / 12 / 2000)


# --- a pure function of seed and epoch ----------------------------------------------------------------------------


@pytest.mark.parametrize("options", SINGLE + MIXED, ids=name_of)
def test_the_order_depends_on_seed_and_epoch_alone(options: dict[str, Any]) -> None:
    forth, back = sampler(options, 8, 2), sampler(options, 8, 2)
    orders = [forth.order(epoch) for epoch in range(4)]
    torch.manual_seed(99), random.seed(99), np.random.seed(99)
    for epoch in reversed(range(4)):
        back.set_epoch(epoch)
        assert list(back) == orders[epoch].tolist()
    assert not torch.equal(orders[0], orders[1])
    # Round robin in turn, but with other examples.
    assert not torch.equal(orders[0], sampler(options, 8, 2, seed=1).order(0))
    by_option = sampler({**options, "seed": 1}, 8, 2, seed=7).order(0)
    assert torch.equal(by_option, sampler(options, 8, 2, seed=1).order(0))


@pytest.mark.parametrize("options", SINGLE + MIXED, ids=name_of)
def test_global_random_numbers_are_left_alone(options: dict[str, Any]) -> None:
    torch.manual_seed(98), random.seed(98), np.random.seed(98)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    list(sampler(options))
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


def test_an_iterator_that_has_begun_keeps_its_epoch() -> None:
    made = sampler({})
    begun = iter(made)
    made.set_epoch(1)
    assert list(begun) == made.order(0).tolist()


def test_a_million_examples_take_no_loop_over_them() -> None:
    # Generous: about 0.1 s; a Python loop takes several.
    import time

    tasks = torch.randint(0, 20, (1_000_000,), generator=torch.Generator().manual_seed(0))
    made = sampler({"strategy": "temperature", "temperature": 2.0, "batches": "mixed"}, 32, 2, tasks=tasks)
    start = time.process_time()
    made.order(5)
    assert time.process_time() - start < 1.5


# --- loaders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, SINGLE[2], SINGLE[5], MIXED[0], MIXED[2]], ids=name_of)
def test_accelerate_deals_the_batches_out_as_they_are(
    options: dict[str, Any], num_ranks: int, even: bool, drop_last: bool, split: bool
) -> None:
    Accelerator(cpu=True)
    for rank in range(num_ranks):
        made = sampler(options, 8, num_ranks)
        loader_batch = 8 * num_ranks if split else 8
        prepared = prepare_data_loader(
            DataLoader(TensorDataset(torch.arange(len(TASKS))), loader_batch, sampler=made, drop_last=drop_last),
            num_processes=num_ranks,
            process_index=rank,
            split_batches=split,
            even_batches=even,
        )
        for epoch in (0, 1, 4):
            prepared.set_epoch(epoch)
            designed = made.order(epoch).view(-1, num_ranks, 8)[:, rank].tolist()
            assert len(prepared) == len(designed)
            assert [batch[0].tolist() for batch in prepared] == designed
        # A run that goes on in the middle of an epoch: behind this loader the epoch is not handed down.
        made.set_epoch(0)
        set_sampler_epoch(prepared, 2, batches_done=3)
        resumed = skip_first_batches(prepared, 3)
        resumed.set_epoch(2)
        designed = made.order(2).view(-1, num_ranks, 8)[3:, rank].tolist()
        assert [batch[0].tolist() for batch in resumed] == designed


def test_setting_the_epoch_of_a_loader_with_another_sampler_does_nothing() -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[int]:
            return iter(range(3))

    set_sampler_epoch(DataLoader(TensorDataset(torch.arange(4)), 2, shuffle=True), 1)
    set_sampler_epoch(DataLoader(Stream(), 2), 1)


def test_batches_that_are_split_among_the_ranks() -> None:
    data = TensorDataset(torch.arange(len(TASKS)))
    data.task_ids = TASKS
    options = TaskSamplingOptions(strategy="uniform", ranks="different")
    whole = build_task_sampler(data, options, NAMES, batch_size=8, num_ranks=2, seed=3)
    split = build_task_sampler(data, options, NAMES, batch_size=16, num_ranks=2, seed=3, split_batches=True)
    assert torch.equal(whole.order(1), split.order(1))
    with pytest.raises(OptionError, match=r"^task_sampling: a batch of 9 cannot be divided among 2 ranks"):
        build_task_sampler(data, options, NAMES, batch_size=9, num_ranks=2, split_batches=True)


# --- where tasks come from ----------------------------------------------------------------------------------------


class Told(Dataset):
    """Says the tasks of its examples in whatever form it is given."""

    def __init__(self, task_ids: Any, size: int | None = None) -> None:
        self.task_ids = task_ids
        self.size = len(task_ids) if size is None else size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        raise AssertionError("no example is to be loaded")


IDS = [2, 0, 1, 1, 0, 2, 2]


def table(**columns: Any) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"task_ids": IDS, "text": list("abcdefg"), **columns})


def explode(batch: Any) -> Any:
    raise AssertionError("no example is to be loaded")


@pytest.mark.parametrize(
    "dataset",
    [
        Told(IDS),
        Told(tuple(IDS)),
        Told(np.array(IDS, dtype=np.int8)),
        Told(torch.tensor(IDS, dtype=torch.int32)),
        table(),
        table().with_format("torch"),
        table().with_transform(explode),
        table().with_format("numpy", columns=["text"]),
        Subset(Told(list(reversed(IDS))), list(range(6, -1, -1))),
        ConcatDataset([Told(IDS[:3]), table().select(range(3, 7))]),
    ],
    ids=["list", "tuple", "array", "tensor", "table", "torch", "transform", "other column", "subset", "concatenated"],
)
def test_tasks_of_a_data_set(dataset: Any) -> None:
    found = example_tasks(dataset, NAMES[:3])
    assert found.dtype == torch.int64
    assert found.tolist() == IDS


def test_tasks_of_a_table_whose_rows_were_chosen_and_shuffled() -> None:
    shuffled = table().shuffle(seed=1)
    some = shuffled.select([5, 0, 3, 2, 1, 6])
    joined = datasets.concatenate_datasets([some, table(), shuffled])
    for rows in (shuffled, some, shuffled.select(range(1, 7)), joined, joined.select(range(19, 3, -1))):
        assert example_tasks(rows, NAMES[:3]).tolist() == [row["task_ids"] for row in rows]


def test_concatenated_data_sets_are_the_tasks_in_order() -> None:
    parts = [TensorDataset(torch.zeros(n)) for n in (3, 1, 2)]
    assert example_tasks(ConcatDataset(parts), NAMES[:3]).tolist() == [0, 0, 0, 1, 2, 2]
    assert example_tasks(Subset(ConcatDataset(parts), [5, 3, 0]), NAMES[:3]).tolist() == [2, 1, 0]


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Stream(), r"^task_sampling: Stream has no index per example .* datasets.interleave_datasets\("),
        (table().to_iterable_dataset(), r"^task_sampling: IterableDataset has no index per example"),
        (
            table().to_iterable_dataset().with_format("torch"),
            r"^task_sampling: \w+ has no index per example",
        ),
        (
            TensorDataset(torch.zeros(3)),
            r"^task_sampling: TensorDataset does not say which task .* `task_ids` \[N\], or a ConcatDataset of 3 data",
        ),
        (table().remove_columns("task_ids"), r"^task_sampling: Dataset does not say which task"),
        (ConcatDataset([TensorDataset(torch.zeros(3))] * 2), r"^task_sampling: ConcatDataset does not say which task"),
        (
            ConcatDataset([Told([0, 1]), *[TensorDataset(torch.zeros(3))] * 2]),
            r"^task_sampling: ConcatDataset does not say which task",
        ),
        (
            Told([0.0, 1.0]),
            r"^task_sampling: task_ids are float64 \[2\], expected one integer for each of the 2 ",
        ),
        (Told(["alpha", "beta"]), r"^task_sampling: task_ids are <U5 \[2\], expected one integer"),
        (table(task_ids=["alpha"] * 7), r"^task_sampling: task_ids are object \[7\], expected one integer"),
        (table(task_ids=[0, 1, None, 0, 1, 2, 2]), r"^task_sampling: task_ids are float64 \[7\], expected one integer"),
        (Told([True, False]), r"^task_sampling: task_ids are bool \[2\], expected one integer"),
        (Told([[0], [1]]), r"^task_sampling: task_ids are int64 \[2, 1\], expected one integer"),
        (Told([0, 1], size=3), r"^task_sampling: task_ids are int64 \[2\], expected .* 3 examples"),
    ],
)
def test_a_data_set_that_cannot_be_sampled_is_one_line(dataset: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message) as error:
        example_tasks(dataset, NAMES[:3])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 1, 0], r"^task_sampling: task 'gamma' has no example to draw$"),
        ([0, 1, 3, 2], r"^task_sampling: example 2 has task 3, expected 0 to 2 \(alpha, beta, gamma\)$"),
        ([0, -1, 1, 2], r"^task_sampling: example 1 has task -1, expected 0 to 2"),
    ],
)
def test_task_numbers_that_do_not_fit(ids: list[int], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        example_tasks(Told(ids), NAMES[:3])
    with pytest.raises(OptionError, match=message):
        TaskSampler(torch.tensor(ids), TaskSamplingOptions(), NAMES[:3], 2)


# --- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"stratgy": "uniform"},
            r'^task_sampling.stratgy: unknown option, value .uniform. \(did you mean "strategy"\?\)',
        ),
        ({"strategy": "unifrom"}, r'^task_sampling.strategy: .unifrom. is not valid, .* \(did you mean "uniform"\?\)'),
        ({"ranks": "diferent"}, r'^task_sampling.ranks: .diferent. is not valid, .*did you mean "different"'),
        ({"strategy": "temperature"}, r'^task_sampling.temperature: is required by strategy "temperature"'),
        ({"strategy": "temperature", "temperature": 0}, r"^task_sampling.temperature: 0 is not valid, .* above 0$"),
        ({"strategy": "temperature", "temperature": "hot"}, r"^task_sampling.temperature: .hot. is not valid"),
        (
            {"strategy": "uniform", "temperature": 2},
            r'^task_sampling.temperature: 2 says nothing for strategy "uniform"',
        ),
        ({"batches": "mixed", "ranks": "same"}, r'^task_sampling.ranks: "same" says nothing for mixed batches'),
        ({"strategy": "uniform", "batches_per_epoch": 0}, r"^task_sampling.batches_per_epoch: 0 is not valid"),
        ({"batches_per_epoch": 9}, r'^task_sampling.batches_per_epoch: 9 is not valid with strategy "proportional"'),
        ({"seed": -1}, r"^task_sampling.seed: -1 is not valid, expected 0 or more$"),
    ],
)
def test_a_wrong_option_is_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message) as error:
        parse_options(TaskSamplingOptions, given, "task_sampling")
    assert "\n" not in str(error.value)


def test_an_infinite_temperature_is_uniform_and_one_is_proportional() -> None:
    shares = {
        temperature: sampler({"strategy": "temperature", "temperature": temperature}).shares.tolist()
        for temperature in (1.0, math.inf, 0.01)
    }
    assert shares[1.0] == pytest.approx([size / sum(SIZES) for size in SIZES])
    assert shares[math.inf] == [0.25] * 4
    assert shares[0.01][0] == pytest.approx(1.0)


@pytest.mark.parametrize(("batch_size", "num_ranks", "seed"), [(0, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_numbers_out_of_range(batch_size: int, num_ranks: int, seed: int) -> None:
    with pytest.raises(OptionError, match=r"^task_sampling: \w+ -?\d is not valid, expected [01] or more$"):
        TaskSampler(TASKS, TaskSamplingOptions(), NAMES, batch_size, num_ranks, seed)


def test_one_task_is_a_plain_shuffle() -> None:
    for options in (*SINGLE, *MIXED):
        order = sampler(options, 4, tasks=torch.zeros(12, dtype=torch.int64)).order(0)
        assert sorted(order.tolist()) == list(range(12))


@pytest.mark.parametrize("other", ["sequential", "group_by_length", "batch_rebalance"])
def test_another_sampling_strategy_beside_it_is_refused(other: str) -> None:
    refuse_other_sampling("random")
    with pytest.raises(OptionError, match=f"^train_sampling_strategy: '{other}' cannot be combined with task_sampling"):
        refuse_other_sampling(other)


# --- the Trainer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling", [{}, {"strategy": "temperature", "temperature": 2}, MIXED[2], {"seed": 11}], ids=name_of
)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_trainer_shows_the_batches_of_the_sampler(
    tmp_path: Path, sampling: dict[str, Any], accumulation: int
) -> None:
    data = TaskData()
    trainer = build_trainer(
        build_model(), data, sampling, output_dir=str(tmp_path), gradient_accumulation_steps=accumulation, data_seed=8
    )
    trainer.train()
    assert trainer.seen == expected_batches(data, sampling, 3, batch_size=4, num_ranks=1, rank=0, seed=8)
    per_epoch = len(trainer.seen) // 3
    assert trainer.state.global_step == 3 * math.ceil(per_epoch / accumulation)
    assert trainer.seen[:per_epoch] != trainer.seen[per_epoch : 2 * per_epoch]


def test_auto_holds_absent_tasks_in_a_run_of_single_task_batches(tmp_path: Path) -> None:
    # One process stands for two ranks of different tasks: its batches hold two of the four.
    def trained(absent_tasks: str) -> Tensor:
        model = build_model()
        settings = {"output_dir": str(tmp_path), "absent_tasks": absent_tasks, "num_train_epochs": 2}
        build_trainer(model, TaskData(), {}, 2, per_device_train_batch_size=8, **settings).train()
        return flat_parameters(model)

    held = trained("hold")
    assert torch.equal(trained("auto"), held) and not torch.equal(trained("skip"), held)
    mixed = build_trainer(build_model(), TaskData(), MIXED[0], output_dir=str(tmp_path), absent_tasks="auto")
    assert mixed.balancer.absent_tasks == "auto"


def test_a_second_training_shows_the_same_batches_again(tmp_path: Path) -> None:
    trainer = build_trainer(build_model(), TaskData(), {}, output_dir=str(tmp_path), num_train_epochs=2)
    trainer.train()
    first, trainer.seen = trainer.seen, []
    trainer.train()
    assert trainer.seen == first


def test_the_trainer_finds_tasks_in_a_column_that_it_removes(tmp_path: Path) -> None:
    data = TaskData()
    rows = datasets.Dataset.from_dict(
        {"features": data.features.tolist(), "labels": data.labels.tolist(), "task_ids": data.task_ids.tolist()}
    )
    args = BilevelMTLTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", task_sampling={"strategy": "uniform"}, seed=5
    )
    trainer = BilevelMTLTrainer(model=build_model(), args=args, train_dataset=rows)
    loader = trainer.get_train_dataloader()
    assert "task_ids" not in next(iter(loader))
    options = TaskSamplingOptions(strategy="uniform")
    assert (
        list(loader.batch_sampler.sampler)
        == TaskSampler(data.task_ids, options, TASK_NAMES, 8, seed=5).order(0).tolist()
    )


def test_without_task_sampling_the_order_is_that_of_the_trainer(tmp_path: Path) -> None:
    args = BilevelMTLTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = BilevelMTLTrainer(model=build_model(), args=args, train_dataset=TaskData())
    assert not isinstance(trainer._get_train_sampler(), TaskSampler)


def test_wrong_settings_are_said_before_training(tmp_path: Path) -> None:
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}
    with pytest.raises(OptionError, match=r"^task_sampling.strategy: .unifrom. is not valid"):
        BilevelMTLTrainingArguments(task_sampling={"strategy": "unifrom"}, **settings)
    args = BilevelMTLTrainingArguments(task_sampling={}, train_sampling_strategy="group_by_length", **settings)
    with pytest.raises(OptionError, match=r"^train_sampling_strategy: 'group_by_length' cannot be combined"):
        BilevelMTLTrainer(model=build_model(), args=args, train_dataset=TaskData())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Stream(), r"^task_sampling: Stream has no index per example"),
        (TaskData((5, 4, 0, 3)), r"^task_sampling: task 'gamma' has no example to draw$"),
        (TensorDataset(torch.zeros(3)), r"^task_sampling: TensorDataset does not say which task"),
    ],
    ids=["stream", "no example", "no tasks"],
)
def test_data_that_cannot_be_sampled_are_refused_when_the_trainer_is_built(
    tmp_path: Path, data: Any, message: str
) -> None:
    args = BilevelMTLTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", task_sampling={}, max_steps=3
    )
    with pytest.raises(OptionError, match=message):
        BilevelMTLTrainer(model=build_model(), args=args, train_dataset=data)


def test_task_sampling_on_a_command_line() -> None:
    given = ["--task_sampling", '{"strategy": "temperature", "temperature": 2, "batches": "mixed"}', "--use_cpu"]
    (args,) = HfArgumentParser(BilevelMTLTrainingArguments).parse_args_into_dataclasses(given)
    assert args.task_sampling_options() == TaskSamplingOptions("temperature", 2.0, "mixed")
