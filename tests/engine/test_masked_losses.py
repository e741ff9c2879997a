"""The masked losses against scikit-learn and torch on the selected subset; a NaN label never reaches a gradient."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, mean_absolute_error, mean_squared_error
from torch import Tensor
from torch.nn import functional

from hf_bilb.errors import TaskLossError
from hf_bilb.losses.masked import (
    masked_bce_with_logits,
    masked_cross_entropy,
    masked_l1,
    masked_mse,
    masked_task_means,
    valid_labels,
)

B, K = 11, 4


def bce(labels: np.ndarray, logits: np.ndarray) -> float:
    return float(log_loss(labels, 1 / (1 + np.exp(-logits)), labels=[0, 1]))


LOSSES = {
    "mse": (masked_mse, mean_squared_error),
    "l1": (masked_l1, mean_absolute_error),
    "bce": (masked_bce_with_logits, bce),
}


def partial(kind: str, missing: float) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions, labels with gaps, and the mask; the last task has no label at all."""
    generator = torch.Generator().manual_seed(4)
    predictions = torch.randn(B, K, dtype=torch.float64, generator=generator)
    labels = torch.randn(B, K, dtype=torch.float64, generator=generator)
    labels = (labels > 0).double() if kind == "bce" else labels
    mask = torch.rand(B, K, generator=generator) < 0.6
    mask[:, 3] = False
    return predictions.requires_grad_(), torch.where(mask, labels, torch.full_like(labels, missing)), mask


@pytest.mark.parametrize(("kind", "missing"), [*((kind, torch.nan) for kind in LOSSES), ("bce", -100.0)])
def test_against_sklearn_on_the_subset(kind: str, missing: float) -> None:
    ours, theirs = LOSSES[kind]
    predictions, labels, mask = partial(kind, missing)
    losses, num_items = ours(predictions, labels)
    assert num_items.tolist() == mask.sum(0).tolist() and num_items.dtype == torch.float64
    for k in range(K - 1):
        chosen = mask[:, k]
        expected = theirs(labels[chosen, k].numpy(), predictions[chosen, k].detach().numpy())
        assert losses[k].item() == pytest.approx(expected, rel=1e-12)
    assert losses[3] == 0 and num_items[3] == 0


@pytest.mark.parametrize("kind", LOSSES)
def test_gradients_are_those_of_the_subset(kind: str) -> None:
    ours: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = LOSSES[kind][0]
    formula = {"mse": functional.mse_loss, "l1": functional.l1_loss, "bce": functional.binary_cross_entropy_with_logits}
    predictions, labels, mask = partial(kind, torch.nan)
    coefficients = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    (gradient,) = torch.autograd.grad((coefficients * ours(predictions, labels)[0]).sum(), predictions)
    subset = sum(
        coefficients[k] * formula[kind](predictions[mask[:, k], k], labels[mask[:, k], k]) for k in range(K - 1)
    )
    (expected,) = torch.autograd.grad(subset, predictions)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)
    assert gradient.isfinite().all() and not gradient[~mask].any()


@pytest.mark.parametrize("kind", LOSSES)
def test_nan_labels_never_reach_the_graph(kind: str) -> None:
    # Predictions of masked entries may be anything the forward gave, but no NaN comes from the labels.
    ours = LOSSES[kind][0]
    predictions = torch.zeros(3, 2, requires_grad=True)
    losses, num_items = ours(predictions, torch.full((3, 2), torch.nan))
    losses.sum().backward()
    assert losses.tolist() == [0.0, 0.0] and num_items.tolist() == [0.0, 0.0]
    assert predictions.grad is not None and not predictions.grad.any()


@pytest.mark.parametrize("kind", ["mse", "l1"])
def test_minus_one_hundred_is_a_value_in_a_regression(kind: str) -> None:
    losses, num_items = LOSSES[kind][0](torch.zeros(2, 1), torch.tensor([[-100.0], [torch.nan]]))
    assert num_items == 1 and losses == (1e4 if kind == "mse" else 100)


def test_integer_labels_and_half_precision() -> None:
    logits = torch.randn(5, 2).to(torch.bfloat16).requires_grad_()
    labels = torch.tensor([[0, 1], [1, -100], [-100, 1], [1, 1], [0, 0]])
    losses, num_items = masked_bce_with_logits(logits, labels)
    assert num_items.tolist() == [4.0, 4.0] and num_items.dtype == torch.float32
    assert losses.dtype == torch.bfloat16 and losses.isfinite().all()


def test_shapes_must_agree() -> None:
    with pytest.raises(TaskLossError, match=r"^labels: got shape \(3,\), expected \(3, 1\) like the predictions"):
        masked_mse(torch.zeros(3, 1), torch.zeros(3))


@pytest.mark.parametrize("shape", [(7,), (2, 5, 3)])
def test_cross_entropy(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape[0], 6, *shape[1:], dtype=torch.float64, generator=generator).requires_grad_()
    labels = torch.randint(0, 6, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < 0.4] = -100
    loss, num_items = masked_cross_entropy(logits, labels)
    rows, chosen = logits.movedim(1, -1).reshape(-1, 6), labels.reshape(-1)
    valid = chosen != -100
    probabilities = rows[valid].softmax(-1).detach().numpy()
    expected = log_loss(chosen[valid].numpy(), probabilities, labels=list(range(6)))
    assert loss.item() == pytest.approx(expected, rel=1e-12) and num_items == valid.sum()
    torch.testing.assert_close(loss, functional.cross_entropy(logits, labels), rtol=1e-12, atol=0)


def test_cross_entropy_without_a_valid_label() -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    loss, num_items = masked_cross_entropy(logits, torch.full((4,), -100))
    loss.backward()
    assert loss == 0 and num_items == 0 and not logits.grad.any()


def test_masked_task_means_counts_per_column() -> None:
    values = torch.arange(6.0).reshape(3, 2)
    mask = torch.tensor([[True, False], [True, False], [False, True]])
    losses, num_items = masked_task_means(values, mask)
    assert losses.tolist() == [1.0, 5.0] and num_items.tolist() == [2.0, 1.0]


def test_valid_labels() -> None:
    assert valid_labels(torch.tensor([0.0, torch.nan, -100.0, 1.0])).tolist() == [True, False, False, True]
    assert valid_labels(torch.tensor([0, -100, 2])).tolist() == [True, False, True]


def test_a_label_that_is_no_class_is_named() -> None:
    logits, mask = torch.zeros(1, 3, 2, 2), torch.tensor([[[0, 255], [2, 255]]])
    for labels, value in ((mask, 255), (mask.masked_fill(mask == 255, -1), -1)):
        advice = f"where it stands for missing labels, pass ignore_index={value} "
        with pytest.raises(TaskLossError, match=f"^labels: {value} is no class, expected 0 to 2; {advice}"):
            masked_cross_entropy(logits, labels)
        loss, num_items = masked_cross_entropy(logits, labels, ignore_index=value)
        assert float(loss) == pytest.approx(np.log(3)) and float(num_items) == 2


def test_valid_labels_with_another_value_for_missing() -> None:
    assert valid_labels(torch.tensor([0, -100, 255]), ignore_index=255).tolist() == [True, False, False]
    assert valid_labels(torch.tensor([0.0, torch.nan, 255.0]), ignore_index=255).tolist() == [True, False, True]
