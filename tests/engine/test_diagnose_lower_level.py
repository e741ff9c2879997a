"""`diagnose_lower_level`: its numbers are those of an independent computation, and it changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_bilb import OptionError, build_balancer
from hf_bilb.engine.double_loop import LowerLevelReport
from hf_bilb.errors import NonFiniteLossError
from hf_bilb.losses.contract import TaskLosses
from tests.engine.algorithm_2 import K, Network, Part, Reference
from tests.engine.trained import ADAM, FEATURES, OPTIONS, PARTS, WHOLE, Trained


@pytest.mark.parametrize("options", [{}, {**FEATURES, "activation": "softmax"}], ids=["parameter", "features"])
@pytest.mark.parametrize("network", [{}, {"dropout": 0.4, "norm": True, "frozen": True}], ids=["plain", "dropout"])
@pytest.mark.parametrize("parts", [WHOLE[2], PARTS[2]], ids=["one", "several"])
def test_diagnose_measures_and_changes_nothing(
    options: dict[str, Any], network: dict[str, Any], parts: list[Part]
) -> None:
    options = {**ADAM, **options, "normalization": "log", "lower_level": "single_loop"}
    trained = Trained(Network(**network), **options)
    for earlier in WHOLE[:2]:
        trained.update(earlier)
    runs = [lambda p=p: TaskLosses(*trained.model(p)) for p in parts]
    trained.optimizer.zero_grad()
    trained.balancer.backward(*trained.model(parts[0]))
    before = everything(trained)
    report = trained.balancer.diagnose_lower_level(trained.model, runs, 4, 0.07)
    after = everything(trained)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    again = trained.balancer.diagnose_lower_level(trained.model, runs, 4, 0.07)
    assert all(torch.equal(one, other) for one, other in zip(report, again, strict=True))

    # By hand: an update at these x and W, whose inner loop starts at x.
    loop = {"inner_steps": 4, "inner_learning_rate": 0.07, "penalty_weight": 1.0}
    w = list(trained.balancer.objective.parameters())
    by_hand = Reference(copy.deepcopy(trained.model), w, {**OPTIONS, **options, "lower_level": loop})
    by_hand.references = dict(enumerate(trained.balancer.reference_losses.tolist()))
    update_with_one_set_of_masks(by_hand, parts)
    run = by_hand.run
    found = (report.lower_gradient_at_z, report.lower_gradient_at_x, report.upper_gradient)
    assert [float(norm) for norm in found] == pytest.approx(run.norms[0], rel=1e-9)
    assert float(report.ratio) == pytest.approx(run.norms[0][0] / run.norms[0][1], rel=1e-9)
    assert float(report.lower_at_x) == pytest.approx(run.lower_at_x[0], rel=1e-10)
    assert float(report.lower_at_z) == pytest.approx(run.lower_at_z[0], rel=1e-10)
    assert float(report.discrepancy) == pytest.approx(run.upper[0], rel=1e-10)


def update_with_one_set_of_masks(by_hand: Reference, parts: Sequence[Part]) -> None:
    """`update`, in which the pass at x has the masks of the passes at z."""
    random, losses = torch.get_rng_state(), by_hand.losses

    def replayed(model: nn.Module, parts: Sequence[Part]) -> tuple[dict[int, Tensor], Tensor]:
        torch.set_rng_state(random)
        return losses(model, parts)

    by_hand.losses = replayed  # type: ignore[method-assign]
    by_hand.update(parts)
    torch.set_rng_state(random)


def everything(trained: Trained) -> dict[str, Tensor]:
    """All that may not change: model, gradients, balancer, random numbers, what the next step would do."""
    found = {f"model.{name}": tensor.clone() for name, tensor in trained.model.state_dict().items()}
    found.update(
        (f"grad.{name}", parameter.grad.clone())
        for name, parameter in trained.model.named_parameters()
        if parameter.grad is not None
    )
    found.update((f"balancer.{name}", tensor) for name, tensor in trained.balancer.state_dict().items())
    found["random"] = torch.get_rng_state()
    found["coefficients"] = trained.balancer.coefficients.clone()
    resumed = copy.deepcopy(trained.balancer)
    resumed.step()
    found.update((f"next.{name}", tensor) for name, tensor in resumed.state_dict().items())
    return found


def test_diagnose_of_a_double_loop_starts_at_x_and_leaves_its_z() -> None:
    double = Trained(**ADAM)
    for parts in WHOLE[:2]:
        double.update(parts)
    double.descend(WHOLE[2])
    single = Trained(double.model, **{**ADAM, "lower_level": "single_loop"})
    single.balancer.rollback(double.balancer.snapshot())
    before = double.balancer.state_dict()
    reports = [
        each.balancer.diagnose_lower_level(double.model, lambda: TaskLosses(*double.model(WHOLE[2][0])), 3, 0.05)
        for each in (double, single)
    ]
    assert all(torch.equal(one, other) for one, other in zip(*reports, strict=True))
    now = double.balancer.state_dict()
    assert all(torch.equal(before[name], now[name]) for name in before)


def test_diagnose_refuses_a_method_without_levels() -> None:
    model = Network()
    with pytest.raises(OptionError, match=r"^diagnostics: balancer 'uw' has no lower level, expected bilb$"):
        build_balancer("uw", K).diagnose_lower_level(model, lambda: model(WHOLE[0][0])[0], 2, 0.1)


def test_diagnose_names_a_z_that_diverges_and_changes_nothing() -> None:
    trained = Trained(lower_level="single_loop")
    trained.descend(WHOLE[0])
    before = everything(trained)
    with pytest.raises(NonFiniteLossError, match=r"^lower level: the loss of task 'a' is (nan|inf) at z"):
        trained.balancer.diagnose_lower_level(trained.model, lambda: TaskLosses(*trained.model(WHOLE[0][0])), 30, 1e6)
    after = everything(trained)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_what_a_report_says_of_the_weights() -> None:
    def report(weights: list[float], at_z: float = 1.0, at_x: float = 4.0) -> LowerLevelReport:
        numbers = [torch.tensor(x, dtype=torch.float64) for x in (at_z, at_x, 0.0, 0.0, 0.0, 0.0)]
        return LowerLevelReport(*numbers, torch.tensor(weights, dtype=torch.float64), torch.zeros(()))

    assert float(report([0.2, 0.2, 0.2]).ratio) == 0.25
    assert float(report([0.2, 0.2, 0.2]).entropy) == pytest.approx(1.0)
    assert float(report([3.0, 0.0, 0.0]).entropy) == 0.0
    half = float(report([0.5, 0.5, 0.0, 0.0]).entropy)
    assert half == pytest.approx(0.5)
    trained = Trained(lower_level="single_loop", clamp=[0.45, 0.7])
    trained.descend(WHOLE[0])
    run = lambda: TaskLosses(*trained.model(WHOLE[0][0]))  # noqa: E731
    found = trained.balancer.diagnose_lower_level(trained.model, run, 1, 0.1)
    # sigmoid of 0.4, -0.3, 1.1 is 0.599, 0.426, 0.750.
    assert float(found.clamped_share) == pytest.approx(2 / 3)
    assert found.weights.tolist() == pytest.approx([0.5987, 0.45, 0.7], abs=1e-4)
