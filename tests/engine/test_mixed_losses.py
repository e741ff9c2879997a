"""Losses of tasks of mixed types against torch's own losses, task by task."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_bilb import LossBalancer, build_balancer
from hf_bilb.errors import OptionError, TaskLossError
from hf_bilb.losses.contract import as_task_losses
from hf_bilb.losses.mixed import MixedLosses
from hf_bilb.losses.task_types import TaskType, label_slices

TASKS = {
    "topic": TaskType("classification", 3, class_weights=(0.3, 1.0, 0.5)),
    "stars": TaskType("regression"),
    "tags": TaskType("token_classification", 5),
    "flags": TaskType("multi_label", 4, class_weights=(1.0, 3.0, 0.5, 2.0)),
    "place": TaskType("regression", 2),
    "mood": TaskType("classification", 5),
    "words": TaskType("token_classification", 2, class_weights=(0.1, 0.7)),
}
ROWS, TOKENS = 9, 6


def made_up(
    tasks: dict[str, TaskType], missing: float = 0.3, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Predictions of each task, with gradients, and a batch of labels of which a share is missing."""
    generator = torch.Generator().manual_seed(seed)
    logits, columns, tags = [], [], []
    for task in tasks.values():
        tokens = task.type == "token_classification"
        shape = (ROWS, TOKENS, task.size) if tokens else (ROWS, task.size)
        logits.append((2 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_())
        if tokens:
            labels = torch.randint(task.size, (ROWS, TOKENS), generator=generator)
            tags.append(labels.masked_fill(torch.rand(ROWS, TOKENS, generator=generator) < missing, -100))
            continue
        if task.type == "classification":
            labels = torch.randint(task.size, (ROWS, 1), generator=generator).float()
        elif task.type == "multi_label":
            labels = torch.randint(2, (ROWS, task.size), generator=generator).float()
        else:
            labels = torch.randn(ROWS, task.size, generator=generator)
        columns.append(labels.masked_fill(torch.rand(labels.shape, generator=generator) < missing, torch.nan))
    batch = {"labels": torch.cat(columns, dim=1)} if columns else {}
    return tuple(logits), {**batch, "tag_labels": torch.stack(tags, dim=2)} if tags else batch


def plain(tasks: dict[str, TaskType], logits: tuple[Tensor, ...], batch: dict[str, Tensor]) -> list[Tensor]:
    """Each task's loss by torch's own module, on the labels that are there alone."""
    found, tag = [], 0
    for (task, columns), given in zip(
        zip(tasks.values(), label_slices(tasks).values(), strict=True), logits, strict=True
    ):
        weights = torch.tensor(task.class_weights, dtype=given.dtype) if task.class_weights else None
        if task.type == "token_classification":
            labels, given, tag = batch["tag_labels"][:, :, tag].reshape(-1), given.reshape(-1, task.size), tag + 1
            there = labels != -100
        else:
            labels = batch["labels"][:, columns].to(given.dtype)
            there = ~labels.isnan()
        if not there.any():
            found.append(given.sum() * 0)
        elif task.has_classes:
            there = there.reshape(-1)
            found.append(nn.CrossEntropyLoss(weights)(given[there], labels.reshape(-1)[there].long()))
        elif task.type == "regression":
            found.append(nn.MSELoss()(given[there], labels[there]))
        else:
            losses = nn.BCEWithLogitsLoss(pos_weight=weights, reduction="none")(given, labels.nan_to_num())
            found.append(losses[there].mean())
    return found


def assert_equal_to_plain(tasks: dict[str, TaskType], logits: tuple[Tensor, ...], batch: dict[str, Tensor]) -> None:
    losses, _ = MixedLosses(tasks)({"logits": logits}, batch)
    expected = plain(tasks, logits, batch)
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-12, atol=1e-13)
    factors = torch.linspace(-1, 2, len(tasks), dtype=losses.dtype)
    found = torch.autograd.grad((losses * factors).sum(), logits)
    wanted = torch.autograd.grad((torch.stack(expected) * factors).sum(), logits)
    for name, one, other in zip(tasks, found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-14, msg=name)


@pytest.mark.parametrize("missing", [0.0, 0.3, 0.9, 1.0])
def test_values_and_gradients_are_those_of_torch_s_losses_one_by_one(missing: float) -> None:
    assert_equal_to_plain(TASKS, *made_up(TASKS, missing))


@pytest.mark.parametrize(
    "tasks",
    [
        {"a": TaskType("regression"), "b": TaskType("regression")},
        {"a": TaskType("multi_label"), "b": TaskType("multi_label")},
        {"a": TaskType("classification", 2), "b": TaskType("classification", 2)},
        {"a": TaskType("token_classification", 3)},
        {"a": TaskType("token_classification", 3, class_weights=(1, 2, 3)), "b": TaskType("token_classification", 2)},
        {"a": TaskType("classification", 2), "b": TaskType("regression"), "c": TaskType("classification", 7)},
    ],
    ids=lambda tasks: "+".join(f"{task.type}{task.size}" for task in tasks.values()),
)
def test_one_type_alone_and_few_together(tasks: dict[str, TaskType]) -> None:
    assert_equal_to_plain(tasks, *made_up(tasks))


def test_tasks_of_one_output_each_may_be_one_tensor() -> None:
    tasks = {"a": TaskType("regression"), "b": TaskType("multi_label"), "c": TaskType("regression")}
    logits, batch = made_up(tasks)
    joined = MixedLosses(tasks)({"logits": torch.cat(logits, dim=1)}, batch)
    assert all(map(torch.equal, joined, MixedLosses(tasks)({"logits": logits}, batch)))


def test_items_are_labels_or_sums_of_weights_in_units_of_the_smallest() -> None:
    logits, batch = made_up(TASKS)
    _, num_items = MixedLosses(TASKS)({"logits": logits}, batch)
    labels, tags = batch["labels"], batch["tag_labels"]
    there = ~labels.isnan()
    weights = {0.0: 1.0, 1.0: 1 / 0.3, 2.0: 0.5 / 0.3}
    words = {0: 1.0, 1: 7.0}
    expected = [
        sum(weights[label] for label in labels[there[:, 0], 0].tolist()),
        there[:, 1].sum(),
        (tags[:, :, 0] >= 0).sum(),
        there[:, 2:6].sum(),
        there[:, 6:8].sum(),
        there[:, 8].sum(),
        sum(words[label] for label in tags[:, :, 1].flatten().tolist() if label >= 0),
    ]
    assert num_items.tolist() == pytest.approx([float(one) for one in expected], rel=1e-12)
    assert MixedLosses(TASKS).count(batch).tolist() == num_items.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_counts_of_a_batch_are_those_of_the_losses_to_the_last_bit(dtype: torch.dtype) -> None:
    # The Trainer compares them, and runs every window twice where they differ.
    for seed in range(20):
        logits, batch = made_up(TASKS, seed=seed, dtype=dtype)
        losses, num_items = MixedLosses(TASKS)({"logits": logits}, batch)
        counts = as_task_losses(losses, num_items, list(TASKS)).num_items
        assert torch.equal(MixedLosses(TASKS).count(batch).to(dtype), counts)


def test_batches_combine_by_their_items_to_the_loss_of_the_whole() -> None:
    logits, batch = made_up(TASKS)
    whole, items = MixedLosses(TASKS)({"logits": logits}, batch)
    parts = []
    for rows in (slice(0, 1), slice(1, 5), slice(5, None)):
        some = {name: column[rows] for name, column in batch.items()}
        parts.append(MixedLosses(TASKS)({"logits": tuple(part[rows] for part in logits)}, some))
    total = sum(losses * count for losses, count in parts)
    torch.testing.assert_close(total / items, whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(sum(count for _, count in parts), items, rtol=1e-12, atol=0)


def test_a_balancer_combines_ranks_and_micro_batches_of_small_weights_exactly() -> None:
    # A sum of weights below 1 would be clamped to 1 on the way.
    tasks = {"a": TaskType("classification", 2, class_weights=(0.01, 0.03))}
    logits, batch = made_up(tasks)
    losses = MixedLosses(tasks)
    balancer: LossBalancer = build_balancer("ls", task_names=["a"], dtype=torch.float64)
    found = losses({"logits": logits}, batch)
    balancer.backward(found[0], num_items=found[1])
    expected = torch.autograd.grad(plain(tasks, logits, batch)[0], logits)
    torch.testing.assert_close(logits[0].grad, expected[0], rtol=1e-12, atol=0)


def test_a_task_that_is_not_finite_spoils_no_other() -> None:
    logits, batch = made_up(TASKS, missing=0.0)
    with torch.no_grad():
        logits[1][0] = torch.inf
    losses, _ = MixedLosses(TASKS)({"logits": logits}, batch)
    assert losses.isfinite().tolist() == [name != "stars" for name in TASKS]


def test_each_loss_reaches_the_outputs_of_its_task_alone() -> None:
    # Gradient methods find shared parameters by a NaN that is sent back from one loss.
    logits, batch = made_up(TASKS)
    losses, _ = MixedLosses(TASKS)({"logits": logits}, batch)
    for k in range(len(TASKS)):
        seed = torch.zeros_like(losses)
        seed[k] = torch.nan
        gradients = torch.autograd.grad(losses, logits, seed, retain_graph=True)
        assert [bool(gradient.isnan().any()) for gradient in gradients] == [k == other for other in range(len(TASKS))]


@pytest.mark.parametrize("missing", ["labels", "tag_labels"])
def test_a_column_that_is_not_there_has_no_label(missing: str) -> None:
    logits, batch = made_up(TASKS, missing=0.0)
    del batch[missing]
    losses, num_items = MixedLosses(TASKS)({"logits": logits}, batch)
    gone = [(task.type == "token_classification") == (missing == "tag_labels") for task in TASKS.values()]
    assert num_items.eq(0).tolist() == gone == losses.eq(0).tolist()
    assert MixedLosses(TASKS).count(batch).eq(0).tolist() == gone
    losses.sum().backward()
    assert all(part.grad is not None for part in logits)


def test_half_precision_is_raised_to_float32_and_autocast_changes_nothing() -> None:
    logits, batch = made_up(TASKS, dtype=torch.bfloat16)
    losses, num_items = MixedLosses(TASKS)({"logits": logits}, batch)
    assert losses.dtype == num_items.dtype == torch.float32
    wide = tuple(part.detach().float() for part in logits)
    exact, _ = MixedLosses(TASKS)({"logits": wide}, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, _ = MixedLosses(TASKS)({"logits": wide}, batch)
    assert torch.equal(losses, exact) and torch.equal(cast, exact)


def test_the_device_is_not_waited_for() -> None:
    class NoHostRead(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert func.overloadpacket not in (
                torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select,
            )  # fmt: skip
            return func(*args, **(kwargs or {}))

    losses = MixedLosses(TASKS)
    logits, batch = made_up(TASKS)
    meta = {name: column.to("meta") for name, column in batch.items()}
    given = tuple(part.detach().to("meta").requires_grad_() for part in logits)
    losses({"logits": given}, meta)  # copies its indices
    with NoHostRead():
        losses({"logits": given}, meta)[0].sum().backward()
        losses.count(meta)


def test_what_is_computed_in_inference_mode_first_can_be_trained_afterwards() -> None:
    tasks = {"a": TaskType("classification", 2), "only here": TaskType("classification", 11, class_weights=(2,) * 11)}
    logits, batch = made_up(tasks)
    losses = MixedLosses(tasks)
    with torch.inference_mode():
        losses({"logits": logits}, batch)
    losses({"logits": logits}, batch)[0].sum().backward()
    assert logits[1].grad is not None


def test_it_can_be_copied_and_pickled() -> None:
    logits, batch = made_up(TASKS)
    losses = MixedLosses(TASKS)
    expected = losses({"logits": logits}, batch)[0]
    for other in (copy.deepcopy(losses), pickle.loads(pickle.dumps(losses))):
        assert torch.equal(other({"logits": logits}, batch)[0], expected)


def test_minus_a_hundred_is_a_number_and_no_class() -> None:
    tasks = {"a": TaskType("classification", 2), "b": TaskType("regression"), "c": TaskType("multi_label")}
    logits, batch = made_up(tasks, missing=0.0)
    batch["labels"][0] = -100.0
    losses, num_items = MixedLosses(tasks)({"logits": logits}, batch)
    assert num_items.tolist() == [ROWS - 1, ROWS, ROWS - 1] == MixedLosses(tasks).count(batch).tolist()
    expected = nn.MSELoss()(logits[1], batch["labels"][:, 1:2].double())
    torch.testing.assert_close(losses[1], expected, rtol=1e-12, atol=0)


def test_the_counts_of_the_first_tasks_alone_are_in_their_places() -> None:
    tasks = {"a": TaskType("regression"), "b": TaskType("regression"), "c": TaskType("token_classification", 2)}
    _, batch = made_up(tasks, missing=0.0)
    del batch["tag_labels"]
    assert MixedLosses(tasks).count(batch).tolist() == [ROWS, ROWS, 0]


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "place", "value", "message"),
    [
        ("labels", (2, 0), 3.0, "labels: 3 of task 'topic' is none, expected a class from 0 to 2, or NaN where it is"),
        ("labels", (2, 0), 1.5, "labels: 1.5 of task 'topic' is none"),
        ("labels", (0, 8), -1.0, "labels: -1 of task 'mood' is none, expected a class from 0 to 4"),
        ("labels", (0, 3), 2.0, "labels: 2 of task 'flags' is none, expected 0 to 1, or NaN"),
        ("labels", (0, 1), torch.inf, "labels: inf of task 'stars' is none, expected a finite number"),
        ("tag_labels", (1, 2, 0), 5, "labels: 5 of task 'tags' is none, expected a class from 0 to 4, or -100 where"),
        ("tag_labels", (1, 2, 1), -1, "labels: -1 of task 'words' is none, expected a class from 0 to 1"),
    ],
)
def test_a_label_that_is_none_is_named(column: str, place: tuple[int, ...], value: float, message: str) -> None:
    logits, batch = made_up(TASKS)
    batch[column][place] = value
    with pytest.raises(TaskLossError) as raised:
        MixedLosses(TASKS)({"logits": logits}, batch)
    assert str(raised.value).startswith(message) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.zeros(ROWS, 5)}, r"labels: got shape \(9, 5\), expected \[B, 9\] as the outputs' \[9\]"),
        ({"labels": torch.zeros(4, 9)}, r"labels: got shape \(4, 9\), expected \[B, 9\] as the outputs' \[9\]"),
        ({"labels": torch.zeros(ROWS)}, r"labels: got shape \(9,\)"),
        ({"tag_labels": torch.zeros(ROWS, 5, 2).long()}, r"tag_labels: got shape \(9, 5, 2\), expected \[B, T, 2\]"),
    ],
)  # fmt: skip
def test_labels_of_another_shape(changes: dict[str, Tensor], message: str) -> None:
    logits, batch = made_up(TASKS)
    with pytest.raises(TaskLossError, match=message):
        MixedLosses(TASKS)({"logits": logits}, {**batch, **changes})


def test_outputs_of_another_shape_and_batches_without_labels() -> None:
    logits, batch = made_up(TASKS)
    with pytest.raises(TaskLossError, match=r"logits: got shape \(9, 14\), expected \[B, 15\], of \[3, 1, 4, 2, 5\]"):
        MixedLosses(TASKS)({"logits": (logits[0], *logits[2:])}, batch)
    with pytest.raises(TaskLossError, match=r"logits: got none, expected \[B, T, 7\], of \[5, 2\] outputs a task"):
        MixedLosses(TASKS)({"logits": tuple(part for part in logits if part.ndim == 2)}, batch)
    with pytest.raises(TaskLossError, match=r"^labels: the batch has no column of labels \(it has x\)"):
        MixedLosses(TASKS).count({"x": torch.zeros(2)})


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({}, "^tasks: is empty"),
        ({"a": TaskType("classification", 2, class_weights=(1.0, 0.0))}, r"^tasks\.a\.class_weights: 0\.0 is not"),
        ({"a": TaskType("multi_label", 1, class_weights=(float("nan"),))}, r"^tasks\.a\.class_weights: nan is not"),
        ({"a": TaskType("regression", 1, class_weights=(2.0,))}, r"^tasks\.a\.class_weights: a regression task has"),
    ],
)
def test_tasks_that_have_no_losses(tasks: dict[str, TaskType], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        MixedLosses(tasks)
