"""The parameter router: its activations, clamp and initial values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hf_bilb import build_balancer
from hf_bilb.balancers.router import ParameterRouter, UniformLogits, initial_values
from hf_bilb.errors import OptionError

LOGITS = [-2.0, -0.5, 0.0, 0.3, 4.0]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


FORMULAS = {
    "sigmoid": [sigmoid(x) for x in LOGITS],
    "sigmoid_relu": [sigmoid(max(x, 0.0)) for x in LOGITS],
    "softmax": [math.exp(x) / sum(math.exp(y) for y in LOGITS) for x in LOGITS],
}


def weights_and_slopes(activation: str, clamp: tuple[float, float] | None) -> tuple[Tensor, Tensor]:
    router = ParameterRouter(5, activation, LOGITS, clamp)  # type: ignore[arg-type]
    weights = router()
    (gradient,) = torch.autograd.grad(weights[4] + weights[0], router.logits)
    return weights.detach(), gradient


@pytest.mark.parametrize("activation", FORMULAS)
def test_activations(activation: str) -> None:
    weights, _ = weights_and_slopes(activation, None)
    assert weights.tolist() == pytest.approx(FORMULAS[activation], rel=1e-14)


@pytest.mark.parametrize("activation", FORMULAS)
def test_clamp_cuts_without_renormalising_and_stops_the_gradient(activation: str) -> None:
    weights, gradient = weights_and_slopes(activation, (0.1, 0.9))
    assert weights.tolist() == pytest.approx([min(max(w, 0.1), 0.9) for w in FORMULAS[activation]], rel=1e-14)
    # The last weight is cut; the first one too where it is below 0.1.
    assert FORMULAS[activation][4] > 0.9 and gradient[4] == 0


def test_sigmoid_relu_is_dead_below_zero() -> None:
    weights, gradient = weights_and_slopes("sigmoid_relu", None)
    assert weights[:3].tolist() == [0.5, 0.5, 0.5] and gradient[0] == 0 and gradient[4] > 0


def test_initial_values() -> None:
    assert initial_values(0.25, 3, "x").tolist() == [0.25] * 3
    assert initial_values([1.0, 2.0], 2, "x").tolist() == [1.0, 2.0]
    drawn = initial_values(UniformLogits((0.2, 1.0), seed=4), 1000, "x")
    assert drawn.min() >= 0.2 and drawn.max() < 1.0 and abs(drawn.mean() - 0.6) < 0.03
    assert torch.equal(drawn, initial_values(UniformLogits((0.2, 1.0), seed=4), 1000, "x"))
    assert not torch.equal(drawn, initial_values(UniformLogits((0.2, 1.0), seed=5), 1000, "x"))
    with pytest.raises(OptionError, match=r"^logits: got 1 values, expected one for each of the 2 tasks$"):
        initial_values([1.0], 2, "logits")


def test_drawn_logits_leave_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    build_balancer("bilb", 4, preset="qm9")
    assert torch.equal(torch.rand(3), expected)
