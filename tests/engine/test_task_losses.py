"""The contract of losses: tensors, dicts, counts, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_bilb.errors import TaskLossError
from hf_bilb.losses.contract import as_task_losses

NAMES = ["homo", "lumo", "gap"]


def test_a_tensor_passes_as_it_is() -> None:
    losses = torch.rand(3, requires_grad=True)
    batch = as_task_losses(losses, None, NAMES, default_items=16.0)
    assert batch.losses is losses and batch.complete
    assert batch.num_items.tolist() == [16.0] * 3 and not batch.num_items.requires_grad
    assert as_task_losses(losses, torch.tensor([1, 0, 3]), NAMES).num_items.tolist() == [1.0, 0.0, 3.0]


def test_a_dict_takes_the_order_of_the_names() -> None:
    leaves = {name: torch.tensor([float(i)], requires_grad=True) for i, name in enumerate(reversed(NAMES))}
    batch = as_task_losses(leaves, {"gap": 1, "lumo": torch.tensor(2), "homo": 3.0}, NAMES)
    assert batch.losses.tolist() == [2.0, 1.0, 0.0] and batch.num_items.tolist() == [3.0, 2.0, 1.0]
    (batch.losses * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    assert {name: leaf.grad.item() for name, leaf in leaves.items()} == {"homo": 1.0, "lumo": 10.0, "gap": 100.0}


def test_a_task_missing_from_the_dict_is_absent() -> None:
    batch = as_task_losses({"lumo": torch.tensor(2.0)}, None, NAMES, default_items=8.0)
    assert not batch.complete
    assert batch.losses.tolist() == [0.0, 2.0, 0.0] and batch.num_items.tolist() == [0.0, 8.0, 0.0]
    counted = as_task_losses({"lumo": torch.tensor(2.0)}, {"lumo": 5}, NAMES)
    assert counted.num_items.tolist() == [0.0, 5.0, 0.0]


@pytest.mark.parametrize("counts", [{"lumo": 5, "homo": 3}, torch.tensor([3, 5, 2])])
def test_a_count_does_not_make_a_task_without_a_loss_present(counts: Any) -> None:
    batch = as_task_losses({"lumo": torch.tensor(2.0)}, counts, NAMES)
    assert batch.num_items.tolist() == [0.0, 5.0, 0.0]


class CountedName(str):
    """A task name that counts how often it is compared with another one."""

    comparisons = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        CountedName.comparisons += 1
        return str.__eq__(self, other)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["tensor", "dict"])
def test_a_thousand_names_are_not_compared_with_each_other(form: str) -> None:
    names = [CountedName(f"task_{k}") for k in range(1000)]
    # Equal names that are other objects, as a model makes them.
    keys = [CountedName(name) for name in names]
    CountedName.comparisons = 0
    values = torch.ones(1000)
    as_task_losses(values if form == "tensor" else dict(zip(keys, values.unbind(), strict=True)), None, names)
    assert CountedName.comparisons < 10_000


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_counts_are_exact_beyond_half_precision(dtype: torch.dtype) -> None:
    batch = as_task_losses(torch.ones(3, dtype=dtype), torch.full((3,), 100_001), NAMES)
    assert batch.losses.dtype == dtype and batch.num_items.tolist() == [100_001.0] * 3


ONE = torch.tensor(1.0)


@pytest.mark.parametrize(
    ("losses", "num_items", "message"),
    [
        (torch.ones(2), None, r"losses: got shape \(2,\), expected a tensor \[3\] or a dict, .* homo, lumo, gap"),
        (torch.ones(3, 1), None, r"losses: got shape \(3, 1\), expected a tensor \[3\]"),
        (torch.ones(()), None, r"losses: got shape \(\), expected a tensor \[3\]"),
        ([ONE] * 3, None, r"losses: got list, expected a tensor \[3\] or a dict"),
        (torch.ones(3, dtype=torch.int64), None, "losses: got dtype torch.int64, expected a floating point tensor"),
        ({}, None, "losses: the dict is empty, expected at least one of the tasks homo"),
        ({"hommo": ONE}, None, r"losses: 'hommo' is no task \(did you mean \"homo\"\?\); tasks: homo, lumo, gap"),
        ({"homo": torch.ones(2)}, None, r"losses: task 'homo' has shape \(2,\), expected a scalar tensor"),
        ({"homo": 1.0}, None, "losses: task 'homo' has float, expected a scalar tensor"),
        (torch.ones(3), torch.ones(2), r"num_items: got shape \(2,\), expected a tensor \[3\]"),
        (torch.ones(3), [1, 2, 3], r"num_items: got list, expected a tensor \[3\]"),
        (torch.ones(3), {"homo": 1, "lumo": 1}, "num_items: no count for task 'gap', which has a loss"),
        (torch.ones(3), {"homo": 1, "lumo": 1, "gpa": 1}, r"num_items: 'gpa' is no task \(did you mean \"gap\"\?\)"),
        ({"lumo": ONE}, {"homo": 1}, "num_items: no count for task 'lumo', which has a loss"),
    ],
)
def test_refused(losses: Any, num_items: Any, message: str) -> None:
    with pytest.raises(TaskLossError, match=r"^" + message) as caught:
        as_task_losses(losses, num_items, NAMES)
    assert "\n" not in str(caught.value)


def test_many_names_are_shortened() -> None:
    names = [f"t{k}" for k in range(1000)]
    with pytest.raises(TaskLossError, match=r"t0, t1, .*, t11, ... \(1000 in all\)"):
        as_task_losses(torch.ones(3), None, names)


def test_auxiliary_loss_is_a_scalar() -> None:
    with pytest.raises(TaskLossError, match=r"^auxiliary_loss: got shape \(2,\), expected a scalar"):
        as_task_losses(torch.ones(3), None, NAMES, auxiliary_loss=torch.ones(2))
