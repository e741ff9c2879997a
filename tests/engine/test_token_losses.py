"""Losses over tokens: against a plain loop over tasks, against transformers' own loss, and in what they allocate."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_bilb import BilevelMTLTrainer, BilevelMTLTrainingArguments
from hf_bilb.errors import TaskLossError
from hf_bilb.losses.tokens import TokenLosses, token_item_counts, token_task_losses


def made_up(
    rows: int = 5, length: int = 11, vocab: int = 13, tasks: int = 4, packed: bool = False, dtype: Any = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels with gaps, and task ids without a token of the last task."""
    generator = torch.Generator().manual_seed(3)
    logits = (torch.randn(rows, length, vocab, generator=generator, dtype=torch.float64) * 3).to(dtype)
    labels = torch.randint(0, vocab, (rows, length), generator=generator)
    labels[torch.rand(rows, length, generator=generator) < 0.4] = -100
    shape = (rows, length) if packed else (rows,)
    return logits.requires_grad_(), labels, torch.randint(0, tasks - 1, shape, generator=generator)


def plain_loop(logits: Tensor, labels: Tensor, task_ids: Tensor, tasks: int) -> tuple[Tensor, list[int]]:
    """One token after the other: the label at t is scored by the logits at t - 1 and belongs to the task at t."""
    terms: list[list[Tensor]] = [[] for _ in range(tasks)]
    for row in range(labels.shape[0]):
        for t in range(1, labels.shape[1]):
            if labels[row, t] != -100:
                task = int(task_ids[row] if task_ids.ndim == 1 else task_ids[row, t])
                scores = logits[row, t - 1]
                terms[task].append(torch.log(torch.exp(scores).sum()) - scores[labels[row, t]])
    means = [torch.stack(own).mean() if own else logits.sum() * 0 for own in terms]
    return torch.stack(means), [len(own) for own in terms]


@pytest.mark.parametrize("packed", [False, True])
def test_losses_counts_and_gradients_equal_a_plain_loop(packed: bool) -> None:
    logits, labels, task_ids = made_up(packed=packed)
    losses, num_items = token_task_losses(logits, labels, task_ids, 4)
    expected, counts = plain_loop(logits, labels, task_ids, 4)
    assert num_items.tolist() == counts == token_item_counts(labels, task_ids, 4).tolist()
    assert counts[3] == 0 and min(counts[:3]) > 3
    torch.testing.assert_close(losses, expected, rtol=1e-13, atol=1e-13)
    factors = torch.tensor([1.0, 0.2, -3.0, 5.0], dtype=torch.float64)
    (ours,) = torch.autograd.grad(losses @ factors, logits)
    (theirs,) = torch.autograd.grad(expected @ factors, logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_a_batch_without_any_item_has_zero_losses_and_gradients() -> None:
    logits, labels, task_ids = made_up()
    losses, num_items = token_task_losses(logits, torch.full_like(labels, -100), task_ids, 4)
    losses.sum().backward()
    assert losses.tolist() == num_items.tolist() == [0.0] * 4
    assert logits.grad.eq(0).all()


def test_what_stands_in_task_ids_where_there_is_no_label_does_not_matter() -> None:
    logits, labels, task_ids = made_up(packed=True)
    other = torch.where(labels == -100, -7, task_ids)
    other[:, 0] = 99
    assert torch.equal(
        token_task_losses(logits, labels, other, 4)[0], token_task_losses(logits, labels, task_ids, 4)[0]
    )


@pytest.mark.parametrize("wrong", [4, -1])
def test_a_task_id_out_of_range_is_no_loss_of_another_task(wrong: int) -> None:
    logits, labels, task_ids = made_up(rows=40)
    task_ids[7] = wrong
    with pytest.raises(IndexError):
        token_task_losses(logits, labels, task_ids, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_with_one_task_it_is_the_loss_of_transformers(dtype: torch.dtype) -> None:
    logits, labels, _ = made_up(rows=6, length=300, vocab=50, dtype=dtype)
    (loss,), (count,) = token_task_losses(logits, labels, torch.zeros(6, dtype=torch.int64), 1)
    theirs = ForCausalLMLoss(logits, labels, vocab_size=50)
    assert loss.dtype == theirs.dtype == torch.float32
    assert count == (labels[:, 1:] != -100).sum()
    torch.testing.assert_close(loss, theirs, rtol=2e-7, atol=0)
    (ours,) = torch.autograd.grad(loss, logits)
    (expected,) = torch.autograd.grad(theirs, logits)
    assert torch.equal(ours, expected)


def test_a_mean_over_many_tokens_is_as_accurate_as_its_dtype() -> None:
    logits, labels, _ = made_up(rows=1, length=400_000, vocab=2, dtype=torch.float32)
    zeros = torch.zeros(1, dtype=torch.int64)
    loss = token_task_losses(logits, labels, zeros, 1)[0]
    exact = token_task_losses(logits.double(), labels, zeros, 1)[0]
    # One running sum in float32 is off by 1e-5 here.
    torch.testing.assert_close(loss.double(), exact, rtol=5e-7, atol=0)


class LargeTensors(TorchDispatchMode):
    """How many tensors of the size of the logits each operation makes."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else (output,):
            view = func.is_view or "view" in str(func)
            if isinstance(tensor, Tensor) and tensor.numel() >= self.size and not view:
                self.found.append(str(func))
        return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_the_size_of_the_logits_is_made_that_transformers_does_not_make(dtype: torch.dtype) -> None:
    logits, labels, task_ids = made_up(rows=4, length=20, vocab=200, tasks=8, dtype=dtype)
    made = []
    for loss_of in (
        lambda: token_task_losses(logits, labels, task_ids, 8)[0].sum(),
        lambda: ForCausalLMLoss(logits, labels, vocab_size=200),
    ):
        with LargeTensors(logits.numel() // 2) as tensors:
            torch.autograd.grad(loss_of(), logits)
        made.append(sorted(tensors.found))
    assert made[0] == made[1]
    assert len(made[0]) >= 3


def test_what_does_not_fit_is_said() -> None:
    logits, labels, task_ids = made_up()
    with pytest.raises(TaskLossError, match=r"^token_labels: got shape \(5, 10\) for logits \(5, 11, 13\), expected"):
        token_task_losses(logits, labels[:, 1:], task_ids, 4)
    with pytest.raises(TaskLossError, match=r"^task_ids: got shape \(4,\), expected \[5\], .* or \[5, 11\]"):
        token_task_losses(logits, labels, task_ids[1:], 4)
    losses = TokenLosses(4)
    with pytest.raises(TaskLossError, match=r"^task_ids: is no column of the batch, which has token_labels$"):
        losses({"logits": logits}, {"token_labels": labels})
    with pytest.raises(TaskLossError, match=r"^labels: the model has computed a loss of its own"):
        losses({"logits": logits, "loss": logits.sum()}, {"token_labels": labels, "task_ids": task_ids})


# --- through the Trainer ------------------------------------------------------------------------------------------


def examples() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(12):
        tokens = torch.randint(1, 40, (9,), generator=generator)
        labels = torch.where(torch.arange(9) < 3, -100, tokens)
        rows.append({"input_ids": tokens, "labels": labels, "token_labels": labels, "task_ids": torch.tensor(0)})
    return rows


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.slow
def test_one_task_trains_as_with_the_plain_trainer(tmp_path: Path, accumulation: int) -> None:
    config = LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    torch.manual_seed(0)
    start = LlamaForCausalLM(config)
    settings = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation,
                "max_steps": 3, "learning_rate": 1.0, "optim": "sgd", "report_to": "none", "use_cpu": True,
                "disable_tqdm": True, "save_strategy": "no", "seed": 1}  # fmt: skip
    dropped = {"token_labels", "task_ids"}
    plain = Trainer(
        copy.deepcopy(start),
        TrainingArguments(str(tmp_path / "plain"), **settings),
        train_dataset=[{k: v for k, v in row.items() if k not in dropped} for row in examples()],
    )
    plain.train()
    losses = TokenLosses(1)
    ours = BilevelMTLTrainer(
        copy.deepcopy(start),
        BilevelMTLTrainingArguments(
            str(tmp_path / "ours"), **settings, balancer="ls", label_names=["token_labels", "task_ids"]
        ),
        train_dataset=[{k: v for k, v in row.items() if k != "labels"} for row in examples()],
        task_loss_func=losses,
        task_item_counts=losses.count,
    )
    ours.train()
    moved = 0.0
    for before, expected, found in zip(
        start.parameters(), plain.model.parameters(), ours.model.parameters(), strict=True
    ):
        assert torch.equal(found, expected)
        moved += float((expected.detach() - before.detach()).abs().max())
    assert moved > 0.01
