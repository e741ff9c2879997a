"""The feature router: what reaches the features, the global mean, micro-batches, what is refused, state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_bilb import build_balancer
from hf_bilb.balancers import LossBalancer
from hf_bilb.engine.weighting import WindowShare, surrogate_loss
from hf_bilb.errors import NonFiniteLossError, TaskLossError
from hf_bilb.losses.contract import TaskLosses
from tests.engine.paper import drawn

K, D = 3, 4
NAMES = ["a", "b", "c"]
LOSSES = torch.tensor([0.7, 2.0, 0.3], dtype=torch.float64)
PRESETS = ["cityscapes", "nyuv2"]
OPTIONS: dict[str, Any] = {
    "router": "features",
    "num_features": D,
    "activation": "softmax",
    "initial_logits": [0.3, 0.1, -0.2],
    "weight_denominator": "sum",
    "discrepancy_weight": 0.1,
    "normalization": "log",
    "optimizer": "sgd",
    "learning_rate": 0.5,
}


def build(dtype: torch.dtype = torch.float64, **options: Any) -> LossBalancer:
    """A balancer whose references have been taken at other losses; its router has not moved."""
    balancer = build_balancer("bilb", task_names=NAMES, dtype=dtype, **{**OPTIONS, **options})
    first = torch.tensor([0.5, 1.0, 2.0], dtype=dtype, requires_grad=True)
    balancer.backward(first, router_features=torch.zeros(1, D, dtype=dtype))
    balancer.discard()
    return balancer


def preset(name: str) -> LossBalancer:
    options = {key: value for key, value in OPTIONS.items() if key in ("router", "num_features", "learning_rate")}
    return build_balancer("bilb", task_names=NAMES, dtype=torch.float64, preset=name, **options)


def after_backward(
    balancer: LossBalancer, features: Tensor, losses: Tensor = LOSSES, num_items: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """F, and what reached the losses and the features."""
    leaf, features = losses.clone().requires_grad_(), features.clone().requires_grad_()
    value = balancer.backward(leaf, num_items, router_features=features)
    assert leaf.grad is not None
    return value, leaf.grad, torch.zeros_like(features) if features.grad is None else features.grad


def value_at(balancer: LossBalancer, features: Tensor) -> float:
    value, _, _ = after_backward(balancer, features)
    balancer.discard()
    return float(value)


# --- the gradient that reaches the features -----------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("rows", [1, 5])
def test_the_gradient_of_the_features_is_that_of_f(activation: str, rows: int) -> None:
    balancer, features = build(activation=activation), drawn(rows, D, seed=1)
    _, _, gradient = after_backward(balancer, features)
    step = 1e-6
    for b in range(rows):
        for d in range(D):
            change = torch.zeros_like(features)
            change[b, d] = step
            slope = (value_at(balancer, features + change) - value_at(balancer, features - change)) / (2 * step)
            assert float(gradient[b, d]) == pytest.approx(slope, rel=1e-6, abs=1e-9)
    assert gradient.abs().min() > 1e-4


@pytest.mark.parametrize("name", PRESETS)
def test_the_gradient_of_the_features_is_that_of_the_presets_f(name: str) -> None:
    balancer, features = preset(name), drawn(6, D, seed=1)
    _, _, gradient = after_backward(balancer, features)
    step = 1e-6
    direction = drawn(6, D, seed=2)
    slope = (value_at(balancer, features + step * direction) - value_at(balancer, features - step * direction)) / 2e-6
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-6)
    assert abs(slope) > 1e-3


def test_a_clamped_router_gives_the_features_nothing() -> None:
    options = {"activation": "sigmoid", "clamp": [0.2, 0.8], "initial_logits": [9.0, -9.0, 9.0]}
    _, coefficients, gradient = after_backward(build(**options), drawn(4, D, seed=1))
    assert not gradient.any() and coefficients.all()


def test_warm_up_gives_the_features_nothing_and_frozen_as_before() -> None:
    features = drawn(4, D, seed=1)
    _, _, balancing = after_backward(build(), features)
    for phase, expected in (("warmup", torch.zeros_like(features)), ("frozen", balancing)):
        balancer = build()
        balancer.phase = phase  # type: ignore[assignment]
        _, _, gradient = after_backward(balancer, features)
        assert torch.equal(gradient, expected)


# --- the mean over the global batch -------------------------------------------------------------------------------


def test_the_router_sees_the_mean_over_rows() -> None:
    features = drawn(7, D, seed=1)
    balancer = build()
    router = {key: tensor for key, tensor in balancer.state_dict().items() if key.startswith("objective.router")}
    after_backward(balancer, features)
    logits = router["objective.router.weight"] @ features.mean(dim=0) + router["objective.router.bias"]
    torch.testing.assert_close(balancer.weights, torch.softmax(logits, dim=0), rtol=1e-14, atol=0)


@pytest.mark.parametrize("sizes", [[1, 2, 5], [4, 4], [8]], ids=str)
def test_micro_batches_of_different_size_are_one_batch(sizes: list[int]) -> None:
    # Items differ from rows, and task c has labels in the first micro-batch alone.
    features, labels = drawn(8, D, seed=1), drawn(8, K, seed=2).abs() + 0.1
    valid = torch.ones(8, K, dtype=torch.bool)
    valid[sizes[0] :, 2] = False
    valid[0, 0] = False

    def losses(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        count = mask.sum(dim=0).double()
        return (values * mask).sum(dim=0) / count.clamp(min=1), count

    one, several = build(), build()
    whole, whole_features = labels.clone().requires_grad_(), features.clone().requires_grad_()
    mean, count = losses(whole, valid)
    value = one.backward(mean, count, router_features=whole_features)
    one.step()

    parts, part_features = labels.clone().requires_grad_(), features.clone().requires_grad_()
    batches = []
    for rows in torch.arange(8).split(sizes):
        mean, count = losses(parts[rows], valid[rows])
        batches.append(TaskLosses(mean, count, part_features[rows]))
    decision = several.decide(batches)
    equal = torch.full((K,), 1 / len(sizes), dtype=torch.float64)
    total = 0.0
    for batch in batches:
        local = batch.num_items / decision.num_items
        share = WindowShare(local, equal, equal[0], torch.ones((), dtype=torch.float64), len(sizes))
        scalar = surrogate_loss(batch, decision, share)
        scalar.backward()
        total += float(scalar.detach())
    several.step()

    torch.testing.assert_close(decision.value, value, rtol=1e-13, atol=0)
    assert total == pytest.approx(float(value), rel=1e-13)
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(part_features.grad, whole_features.grad, rtol=1e-12, atol=1e-15)
    for ours, theirs in zip(several.objective.parameters(), one.objective.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-15)


def test_a_micro_batch_without_rows_has_no_part_in_the_mean() -> None:
    one, several = build(), build()
    features = drawn(5, D, seed=1)
    items = torch.full((K,), 5.0, dtype=torch.float64)
    nothing = TaskLosses(torch.zeros(K, dtype=torch.float64), torch.zeros_like(items), features[:0])
    decision = several.decide([TaskLosses(LOSSES, items, features), nothing])
    torch.testing.assert_close(decision.value, one.backward(LOSSES.clone().requires_grad_(), items, features))
    assert several.refused([several.decide([nothing])])[0] is None


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (None, r"there are none, expected \[B, 4\] for router: features of 'bilb'"),
        (torch.zeros(2, 3), r"got shape \(2, 3\), expected \[B, 4\]"),
        (torch.zeros(4), r"got shape \(4,\), expected \[B, 4\]"),
        (torch.zeros(2, 4, 1), r"got shape \(2, 4, 1\), expected \[B, 4\]"),
        (torch.zeros(2, 4, device="meta"), "are torch.float32 on meta, expected floating point numbers on cpu"),
        (torch.zeros(2, 4, dtype=torch.int64), "are torch.int64 on cpu, expected floating point numbers on cpu"),
    ],
)
def test_refused(features: Tensor | None, message: str) -> None:
    balancer = build()
    before, leaf = balancer.state_dict(), LOSSES.clone().requires_grad_()
    with pytest.raises(TaskLossError, match=rf"^router_features: {message}$") as caught:
        balancer.backward(leaf, router_features=features)
    assert "\n" not in str(caught.value)
    assert leaf.grad is None and all(torch.equal(before[key], balancer.state_dict()[key]) for key in before)
    # So it is in a list of micro-batches, whichever it is.
    items = torch.ones(K, dtype=torch.float64)
    good = TaskLosses(LOSSES, items, drawn(2, D, seed=1))
    with pytest.raises(TaskLossError, match=rf"^router_features: {message}$"):
        balancer.decide([good, TaskLosses(LOSSES, items, features)])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_named_and_leave_no_trace(bad: float) -> None:
    balancer = build_balancer("bilb", task_names=NAMES, dtype=torch.float64, **OPTIONS)
    before, features = balancer.state_dict(), drawn(3, D, seed=1)
    features[1, 2] = bad
    leaf = LOSSES.clone().requires_grad_()
    with pytest.raises(NonFiniteLossError, match=r"the weights are .*nan.*: router_features are not finite$"):
        balancer.backward(leaf, router_features=features)
    assert leaf.grad is None and all(torch.equal(before[key], balancer.state_dict()[key]) for key in before)
    # A batch like one with a loss that is not finite: it can be dropped.
    decision = balancer.decide([TaskLosses(LOSSES, torch.ones(K, dtype=torch.float64), features)])
    assert balancer.refused([decision])[0] is decision
    message, what, outside_domain = balancer.describe_invalid(decision, step=7)
    assert " at step 7: " in message and what == "router_features" and not outside_domain


def test_a_parameter_router_takes_no_notice_of_features() -> None:
    for features in (None, drawn(2, D, seed=1), torch.full((2, 9), torch.nan), torch.zeros(3, device="meta")):
        balancer = build_balancer("bilb", K, dtype=torch.float64)
        value = balancer.backward(LOSSES.clone().requires_grad_(), router_features=features)
        assert torch.equal(
            value, build_balancer("bilb", K, dtype=torch.float64).backward(LOSSES.clone().requires_grad_())
        )


# --- precision and state ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision(dtype: torch.dtype) -> None:
    # A model in low precision: the decision is taken in the balancer's, the gradient goes back in the features' own.
    exact, features = build(), drawn(64, D, seed=1).to(dtype)
    _, expected, of_features = after_backward(exact, features.double(), LOSSES.to(dtype).double())
    rough = build(torch.float32)
    value, coefficients, gradient = after_backward(rough, features, LOSSES.to(dtype))
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(rough.weights.double(), exact.weights, rtol=1e-6, atol=0)
    digits = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(coefficients.double(), expected, rtol=digits, atol=0)
    torch.testing.assert_close(gradient.double(), of_features, rtol=digits, atol=1e-7)


def test_a_sum_of_features_beyond_half_precision() -> None:
    # 300 rows of 300 are more than float16 holds; their mean is not.
    features = torch.full((300, D), 300.0, dtype=torch.float16, requires_grad=True)
    balancer = build(torch.float32)
    scalars: list[Tensor] = []
    value = balancer.backward(LOSSES.float().requires_grad_(), router_features=features, backward=scalars.append)
    assert value.isfinite() and float(scalars[0].detach()) == pytest.approx(float(value), rel=1e-5)


def test_the_router_starts_as_a_linear_layer_the_same_everywhere() -> None:
    torch.manual_seed(0)
    one = build_balancer("bilb", 200, **{**OPTIONS, "num_features": 50, "initial_logits": None}).state_dict()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    other = build_balancer("bilb", 200, **{**OPTIONS, "num_features": 50, "initial_logits": None}).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    layer = torch.nn.Linear(50, 200)
    for name, like in (("weight", layer.weight), ("bias", layer.bias)):
        ours = one[f"objective.router.{name}"]
        assert torch.equal(ours, other[f"objective.router.{name}"]) and ours.shape == like.shape
        # Uniform in +-1/sqrt(D): the largest is near the bound, the spread that of a uniform distribution.
        assert 0.97 * 50**-0.5 < ours.abs().max() < 50**-0.5
        assert float(ours.std()) == pytest.approx(float(like.detach().std()), rel=0.1)
        assert abs(float(ours.mean())) < 0.02


def test_state_round_trip(tmp_path: Path) -> None:
    balancer = build(optimizer="adam", learning_rate=0.05)
    rows = [(drawn(3, D, seed=t), drawn(K, seed=50 + t).abs() + 0.1) for t in range(6)]
    for features, losses in rows[:3]:
        after_backward(balancer, features, losses)
        balancer.step()
    save_file(balancer.state_dict(), tmp_path / "balancer.safetensors")
    resumed = build_balancer("bilb", K, dtype=torch.float64, **{**OPTIONS, "optimizer": "adam", "learning_rate": 0.05})
    resumed.load_state_dict(load_file(tmp_path / "balancer.safetensors"))
    for features, losses in rows[3:]:
        for one, other in zip(
            after_backward(balancer, features, losses), after_backward(resumed, features, losses), strict=True
        ):
            assert torch.equal(one, other)
        balancer.step()
        resumed.step()
    ours, theirs = balancer.state_dict(), resumed.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert {"objective.router.weight", "optimizer.router.bias.exp_avg_sq"} <= ours.keys()


def test_the_state_of_another_kind_or_size_of_router_is_refused() -> None:
    with pytest.raises(TaskLossError, match=r"'objective.router.(bias|logits)' is (missing|unknown)"):
        build().load_state_dict(build_balancer("bilb", K).state_dict())
    with pytest.raises(TaskLossError, match=r"'objective.router.weight' has shape \(3, 9\), expected \(3, 4\)"):
        build().load_state_dict(build_balancer("bilb", K, **{**OPTIONS, "num_features": 9}).state_dict())
