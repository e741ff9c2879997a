"""The coefficients are dF/dlosses, the router's gradient is dF/dtheta: compared with central differences in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_bilb import build_balancer
from hf_bilb.balancers import LossBalancer
from hf_bilb.balancers.ls import LinearScalarization
from hf_bilb.engine.gradient_balancer import GradientBalancer
from hf_bilb.engine.objective import (
    Objective,
    ObjectiveValue,
    ProgressObjective,
    StepProgress,
    differentiate,
    progress_gradients,
)
from tests.contract.cases import CASES, GRADIENT_CASES, Case, Tilted, advance, features_for, random_losses
from tests.contract.frozen import Frozen, central_differences
from tests.products import in_turn

K = 6
TOLERANCE = 2e-7


def moved(case: Case, absent: int | None = None) -> tuple[LossBalancer, Tensor, Tensor]:
    """A balancer in mid-run (references taken, router moved), the next losses and which tasks are there."""
    balancer = case.build(K)
    model = Tilted(K, torch.float64)
    balancer.bind(model, torch.optim.SGD(model.parameters(), lr=1e-2))
    losses = random_losses(K, 5)
    for t, row in enumerate(losses[:4]):
        balancer.on_epoch_begin(t)  # methods that count epochs get beyond their first ones
        advance(balancer, row)
    active = torch.ones(K, dtype=torch.bool)
    if absent is not None:
        active[absent] = False
    return balancer, losses[4].clone(), active


def mean_features(balancer: LossBalancer) -> Tensor | None:
    features = features_for(balancer)
    return None if features is None else features.mean(dim=0)


@pytest.mark.parametrize(("case", "absent"), in_turn(CASES, [None, 2]), ids=str)
def test_coefficients(case: Case, absent: int | None) -> None:
    balancer, point, active = moved(case, absent)
    features = mean_features(balancer)

    def value() -> Tensor:
        with torch.no_grad():
            return balancer.objective(balancer.normalization(point), active, features).value

    # FAMO's scale and the weights of GO4Align and MARIGOLD are constants in the gradient though the losses are in them;
    # nobody else's detached parts hold losses.
    function = Frozen(value) if case.name in ("famo", "go4align", "marigold") else value
    expected = central_differences(function, point, 1e-6)
    found = differentiate(balancer.objective, balancer.normalization, point, active, features).coefficients
    scale = expected.abs().max()
    assert scale > 0
    # STCH's slopes are small beside log K, in which the differences lose digits.
    tolerance = 1e-6 if case.name == "stch" else TOLERANCE
    assert (found - expected).abs().max() <= tolerance * scale
    if absent is not None:
        assert expected[absent] == 0


@pytest.mark.parametrize(("case", "absent"), in_turn(CASES, [2, None]), ids=str)
def test_gradient_of_own_parameters(case: Case, absent: int | None) -> None:
    balancer, point, active = moved(case, absent)
    parameters = dict(balancer.objective.named_parameters())
    features = mean_features(balancer)
    found = differentiate(balancer.objective, balancer.normalization, point, active, features)
    assert len(found.parameter_gradients) == len(parameters)
    frozen = Frozen(lambda: balancer.objective(balancer.normalization(point), active, features).value)
    assert torch.equal(frozen().detach(), found.output.value)
    for (name, parameter), gradient in zip(parameters.items(), found.parameter_gradients, strict=True):
        expected = central_differences(lambda: frozen().detach(), parameter, 1e-5)
        scale = max(float(expected.abs().max()), 1e-3)
        deviation = float((gradient - expected).abs().max())
        assert deviation <= 1e-6 * scale, f"{name}: {gradient} instead of {expected}"


CLOSED = [
    case for case in [*CASES, *GRADIENT_CASES] if type(case.build(K).objective).closed_form is not Objective.closed_form
]
MASKS = [[True] * K, [True, False] * 3, [False] * 4 + [True, False], [False] * K]


def test_who_has_a_closed_form() -> None:
    assert {case.name for case in CLOSED} == {case.name for case in [*CASES, *GRADIENT_CASES]}


def in_mid_run(case: Case, dtype: torch.dtype) -> LossBalancer:
    """With references, a record, and parameters that are not alike."""
    balancer, model = case.build(K, dtype), Tilted(K, dtype)
    balancer.bind(model, torch.optim.SGD(model.parameters(), lr=1e-2))
    if not isinstance(balancer, GradientBalancer):
        for t, row in enumerate(random_losses(K, 4, seed=1, dtype=dtype)):
            balancer.on_epoch_begin(t)
            advance(balancer, row)
    with torch.no_grad():
        for parameter in balancer.objective.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return balancer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", [case for case in CLOSED if not case.option("num_features")], ids=str)
def test_a_closed_form_is_what_autograd_finds(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    balancer = in_mid_run(case, dtype)
    points = random_losses(K, len(MASKS)).to(dtype)
    given = [(point.clone(), torch.tensor(mask)) for point, mask in zip(points, MASKS, strict=True)]
    arguments = [(balancer.objective, balancer.normalization, point, active) for point, active in given]
    found = [differentiate(*once) for once in arguments]
    monkeypatch.setattr(type(balancer.objective), "closed_form", Objective.closed_form)
    for one, again in zip(found, arguments, strict=True):
        other = differentiate(*again)
        # To the last bit: a run that was begun with the one goes on with the other.
        assert torch.equal(one.coefficients, other.coefficients)
        assert one.coefficients.dtype == dtype and not one.coefficients.requires_grad
        for ours, theirs in zip(one.parameter_gradients, other.parameter_gradients, strict=True):
            assert torch.equal(ours, theirs)
        for ours, theirs in zip(one.output, other.output, strict=True):
            assert (ours is None) == (theirs is None)
            assert ours is None or (torch.equal(ours, theirs) and not ours.requires_grad)


PROGRESS = [case for case in CASES if isinstance(case.build(K).objective, ProgressObjective)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", PROGRESS, ids=str)
def test_what_a_step_teaches_in_closed_form(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    balancer = in_mid_run(case, dtype)
    objective = balancer.objective
    assert isinstance(objective, ProgressObjective)
    before, after, opposite = random_losses(K, 3, dtype=dtype)
    two = opposite if case.option("estimator") == "two_point" else None
    steps = [StepProgress(before, after, mask, mask, two) for mask in map(torch.tensor, MASKS)]
    found = [progress_gradients(objective, balancer.normalization, step) for step in steps]
    monkeypatch.setattr(
        type(objective), "progress_in_closed_form", ProgressObjective.progress_in_closed_form, raising=True
    )
    for ours, step in zip(found, steps, strict=True):
        theirs = progress_gradients(objective, balancer.normalization, step)
        assert len(ours) == len(theirs) > 0
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("power", [0.5, 0.3, 1.0, 2.0])
def test_the_slopes_of_a_power_of_large_small_and_solved_losses(power: float) -> None:
    # Its tangent goes on below a millionth of l0; there, and for powers other than 1/2, the last bit is another one.
    balancer = build_balancer("ls", 6, normalization="power", power=power, dtype=torch.float64)
    advance(balancer, torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=torch.float64))
    point = torch.tensor([2e5, 1.0, 3e-3, 4e-6, 5e-7, 0.0], dtype=torch.float64)
    value, factor, divisors = balancer.normalization.with_slopes(point)
    leaf = point.clone().requires_grad_()
    defined = balancer.normalization(leaf)
    (expected,) = torch.autograd.grad(defined.sum(), leaf)
    torch.testing.assert_close(value, defined.detach(), rtol=4e-16, atol=0.0)
    assert factor is not None
    torch.testing.assert_close(factor / divisors[0], expected, rtol=1e-15, atol=0.0)


def test_the_closed_form_of_a_class_is_not_that_of_one_with_another_f() -> None:
    class Squares(LinearScalarization):
        def forward(self, losses: Tensor, active: Tensor, features: Tensor | None) -> ObjectiveValue:
            return ObjectiveValue(torch.where(active, losses.square(), 0.0).sum())

    class Named(LinearScalarization):
        pass

    ls = build_balancer("ls", 2)
    point, active = torch.tensor([1.0, 3.0]), torch.tensor([True, True])
    squares, named = Squares(2, ls.options), Named(2, ls.options)  # type: ignore[arg-type]
    assert differentiate(squares, ls.normalization, point, active).coefficients.tolist() == [2.0, 6.0]
    assert named.closed_form(point, active) is not None


def test_what_an_objective_returns_is_kept_as_it_is() -> None:
    # The log puts several steps together: a parameter would have moved on by then.
    class Own(LinearScalarization):
        def __init__(self, whole: bool) -> None:
            super().__init__(2, build_balancer("ls", 2).options)  # type: ignore[arg-type]
            self.whole = whole
            self.theta = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))

        def forward(self, losses: Tensor, active: Tensor, features: Tensor | None) -> ObjectiveValue:
            theta = torch.ones_like(losses) * self.theta[:2]
            return ObjectiveValue((theta * losses).sum(), weights=self.theta.detach() if self.whole else self.theta[:2])

    for whole in (True, False):
        objective, point = Own(whole), torch.tensor([1.0, 3.0], dtype=torch.float64)
        normalization = build_balancer("ls", 2, dtype=torch.float64).normalization
        found = differentiate(objective, normalization, point, torch.tensor([True, True])).output.weights
        assert found is not None
        with torch.no_grad():
            objective.theta.zero_()
        assert found[:2].tolist() == [1.0, 1.0] and not found.requires_grad


WITH_FEATURES = [case for case in CASES if case.option("num_features")]


@pytest.mark.parametrize("absent", [None, 2], ids=["all", "one_absent"])
@pytest.mark.parametrize("case", WITH_FEATURES, ids=str)
def test_gradient_of_the_features(case: Case, absent: int | None) -> None:
    balancer, point, active = moved(case, absent)
    features = mean_features(balancer)
    found = differentiate(balancer.objective, balancer.normalization, point, active, features).feature_gradient
    frozen = Frozen(lambda: balancer.objective(balancer.normalization(point), active, features).value)
    expected = central_differences(lambda: frozen().detach(), features, 1e-5)
    assert expected.any() == (not case.option("detach_features"))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_the_applied_coefficients_are_those() -> None:
    # The whole way through backward(): what multiplies each loss is dF/dl, whatever the counts.
    balancer, point, active = moved(Case("bilb", "default"))
    expected = differentiate(balancer.objective, balancer.normalization, point, active).coefficients
    applied = advance(balancer, point, num_items=torch.tensor([3.0, 1, 5, 2, 2, 100]))
    assert torch.equal(balancer.coefficients, expected)
    # Times N_k / N_k, which rounds.
    torch.testing.assert_close(applied, expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize("router_gradient", ["both", "upper"])
def test_upper_lets_the_router_descend_the_discrepancy_alone(router_gradient: str) -> None:
    options = {"router_gradient": router_gradient, "tau": "one", "discrepancy_weight": 0.01}
    balancer, point, active = moved(Case("bilb", "tau_one", options))
    gradient = differentiate(balancer.objective, balancer.normalization, point, active).parameter_gradients[0]
    # With tau = 1 the discrepancy does not contain the router.
    assert bool(gradient.any()) == (router_gradient == "both")
