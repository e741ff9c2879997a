"""What every registered balancer keeps: finite numbers, complete state, absence, symmetry, no device syncs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_bilb import list_balancers
from hf_bilb.balancers import LossBalancer
from hf_bilb.balancers.registry import GRADIENT_METHODS
from hf_bilb.losses.contract import as_task_losses
from hf_bilb.trainer.running_log import RunningLog
from hf_bilb.trainer.step import Part
from tests.contract.cases import (
    CASES,
    SEPARABLE,
    VARIANTS,
    Case,
    Tilted,
    advance,
    batch_for,
    features_for,
    random_losses,
)
from tests.products import in_turn

every_case = pytest.mark.parametrize("case", CASES, ids=str)


def build(case: Case, num_tasks: int, dtype: torch.dtype = torch.float64, **more: Any) -> LossBalancer:
    model = Tilted(num_tasks, dtype)
    balancer = case.build(num_tasks, dtype, **more).bind(model, torch.optim.SGD(model.parameters(), lr=1e-2))
    balancer.on_epoch_begin(0)
    return balancer


def assert_finite(balancer: LossBalancer) -> None:
    for name, tensor in balancer.state_dict().items():
        assert tensor.isfinite().all(), f"{name}: {tensor}"


def test_every_registered_balancer_is_here() -> None:
    assert {case.name for case in CASES} == set(list_balancers()) - set(GRADIENT_METHODS)
    assert set(VARIANTS) <= set(list_balancers())
    assert len({str(case) for case in CASES}) == len(CASES)


#: In this order every case gets a small and a large number of tasks.
SIZES = [(size, dtype) for dtype in (torch.float32, torch.float64) for size in (1, 1000, 2, 40)]


@pytest.mark.parametrize(("case", "size"), in_turn(CASES, SIZES, each=2), ids=str)
def test_finite(case: Case, size: tuple[int, torch.dtype]) -> None:
    num_tasks, dtype = size
    balancer = build(case, num_tasks, dtype)
    assert balancer.coefficients is None
    for row in random_losses(num_tasks, 4, dtype=dtype):
        leaf = row.clone().requires_grad_()
        balancer.look_ahead(lambda row=row: batch_for(balancer, row))
        value = balancer.backward(leaf, router_features=features_for(balancer))
        balancer.step(reevaluate=lambda row=row: batch_for(balancer, row))
        assert value.shape == () and value.dtype == dtype and value.isfinite()
        assert balancer.coefficients.shape == (num_tasks,)
        assert balancer.coefficients.dtype == dtype == leaf.grad.dtype
        assert leaf.grad.isfinite().all() and leaf.grad.any()
        assert not balancer.coefficients.requires_grad and not value.requires_grad
        if balancer.weights is not None:
            assert balancer.weights.shape == (num_tasks,) and balancer.weights.isfinite().all()
            assert not balancer.weights.requires_grad
    assert_finite(balancer)


@every_case
def test_float32_follows_float64(case: Case) -> None:
    coefficients = {}
    for dtype in (torch.float32, torch.float64):
        balancer = build(case, 7, dtype)
        coefficients[dtype] = torch.stack([advance(balancer, row) for row in random_losses(7, 4, dtype=dtype)])
    torch.testing.assert_close(coefficients[torch.float32].double(), coefficients[torch.float64], rtol=2e-4, atol=2e-5)


@every_case
def test_low_precision_losses(case: Case) -> None:
    # A bf16 model: the decision is taken in float32, the gradient goes back in the losses' own type.
    balancer = build(case, 5, torch.float32)
    leaf = random_losses(5, 1)[0].to(torch.bfloat16).requires_grad_()
    features = features_for(balancer)
    features = None if features is None else features.to(torch.bfloat16).requires_grad_()
    balancer.look_ahead(lambda: batch_for(balancer, leaf.detach()))
    value = balancer.backward(leaf, torch.full((5,), 70_000), router_features=features)
    if features is not None and not case.option("detach_features"):
        assert features.grad.dtype == torch.bfloat16 and features.grad.isfinite().all() and features.grad.any()
    assert value.dtype == torch.float32 and leaf.grad.dtype == torch.bfloat16
    assert leaf.grad.isfinite().all()


# --- state --------------------------------------------------------------------------------------------------------


def run(balancer: LossBalancer, parameters: Tensor, steps: range) -> Iterator[dict[str, Tensor]]:
    """Train `parameters [K]` with a loss per task; epochs of four steps, now and then a task is absent."""
    for t in steps:
        balancer.on_epoch_begin(t // 4)
        noise = random_losses(parameters.numel(), 1, seed=100 + t)[0]
        items = torch.ones_like(parameters)
        items[t % parameters.numel()] = float(t % 3 > 0)
        parameters.grad = None
        losses = (parameters - noise).square() + 0.05
        seen = losses.detach()
        balancer.look_ahead(lambda seen=seen, items=items: batch_for(balancer, seen, items))
        value = balancer.backward(losses, items, router_features=features_for(balancer))
        with torch.no_grad():
            parameters -= 0.05 * parameters.grad.clamp(-2, 2)  # GO4Align's coefficients have no scale
        balancer.step(reevaluate=lambda seen=seen, items=items: batch_for(balancer, seen, items))
        record = {"value": value, "parameters": parameters.detach().clone(), "coefficients": balancer.coefficients}
        if balancer.weights is not None:
            record["weights"] = balancer.weights
        yield record


@pytest.mark.parametrize(("case", "absent_tasks"), in_turn(CASES, ["skip", "hold"]), ids=str)
def test_resume_from_a_file_is_bit_identical(case: Case, absent_tasks: str, tmp_path: Path) -> None:
    num_tasks, cut, end = 5, 6, 12
    balancer = build(case, num_tasks, absent_tasks=absent_tasks)
    parameters = torch.full((num_tasks,), 0.5, dtype=torch.float64, requires_grad=True)
    list(run(balancer, parameters, range(cut)))
    save_file(balancer.state_dict(), tmp_path / "state.safetensors")
    saved, references = parameters.detach().clone(), balancer.reference_losses
    through = list(run(balancer, parameters, range(cut, end)))

    resumed = build(case, num_tasks, absent_tasks=absent_tasks)
    resumed.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert torch.equal(resumed.reference_losses, references)
    again = list(run(resumed, saved.requires_grad_(), range(cut, end)))
    for t, (one, other) in enumerate(zip(through, again, strict=True)):
        for key in one:
            assert torch.equal(one[key], other[key]), f"{key}, {t} steps after the resume"
    ours, theirs = resumed.state_dict(), balancer.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@every_case
def test_state_is_there_from_the_start_and_is_a_copy(case: Case) -> None:
    balancer = build(case, 4)
    before = balancer.state_dict()
    kept = {key: tensor.clone() for key, tensor in before.items()}
    for row in random_losses(4, 3):
        advance(balancer, row)
    assert balancer.state_dict().keys() == before.keys()
    assert all(torch.equal(before[key], kept[key]) for key in before)
    moved = balancer.state_dict()
    balancer.load_state_dict(before)
    assert all(torch.equal(balancer.state_dict()[key], kept[key]) for key in kept)
    balancer.load_state_dict(moved)
    assert all(torch.equal(balancer.state_dict()[key], moved[key]) for key in moved)


# --- absence ------------------------------------------------------------------------------------------------------


def take_router(target: LossBalancer, source: LossBalancer, tasks: Tensor) -> None:
    """Give `target` the own parameters that `source` has for `tasks` (their numbers, or a bool mask)."""
    with torch.no_grad():
        for parameter, other in zip(target.objective.parameters(), source.objective.parameters(), strict=True):
            parameter.copy_(other[tasks])


def subset_case(case: Case) -> bool:
    """Whether `skip` is the balancer of the present tasks alone: not with a softmax over all tasks' logits."""
    return case.name in SEPARABLE and case.option("activation") != "softmax"


@pytest.mark.parametrize("case", [case for case in CASES if subset_case(case)], ids=str)
def test_skip_is_the_balancer_of_the_present_tasks(case: Case) -> None:
    # Tasks 0, 3 and 5 of six never come: for adjacent pairs the gap is bridged.
    there = torch.tensor([False, True, True, False, True, False])
    whole, part = build(case, 6), build(case, 3)
    take_router(part, whole, there)
    for row in random_losses(6, 6):
        row = torch.where(there, row, torch.full_like(row, torch.nan))
        coefficients = advance(whole, row, num_items=there.double())
        expected = advance(part, row[there])
        torch.testing.assert_close(coefficients[there], expected, rtol=1e-12, atol=0)
        assert not coefficients[~there].any()
        if part.weights is not None:
            torch.testing.assert_close(whole.weights[there], part.weights, rtol=1e-12, atol=0)
    assert_finite(whole)
    assert whole.reference_losses[~there].isnan().all()


# Under `mean_of` the reference has one observation less after a missed step; in a double loop z does not descend in it,
# and a trial step leaves a held loss as it was.
HOLD_ALONE = [c for c in CASES if c.label != "mean_of" and not c.is_double_loop and not c.looks_ahead]


@pytest.mark.parametrize("case", HOLD_ALONE, ids=str)
def test_hold_compares_with_the_last_known_loss(case: Case) -> None:
    # One balancer sees all tasks; the other misses task 1 in the third step, in which its loss would not have changed.
    held, full = build(case, 4, absent_tasks="hold"), build(case, 4, absent_tasks="hold")
    rows = random_losses(4, 4)
    rows[2, 1] = rows[1, 1]
    items, others = torch.tensor([1.0, 0, 1, 1]), torch.tensor([True, False, True, True])
    for t, row in enumerate(rows):
        expected = advance(full, row)
        if t != 2:
            assert torch.equal(advance(held, row), expected)
            continue
        coefficients = advance(held, torch.where(others, row, torch.full_like(row, torch.nan)), items)
        assert torch.equal(coefficients[others], expected[others])
        assert coefficients[1] == 0 and expected[1] != 0


@pytest.mark.parametrize("case", [case for case in CASES if subset_case(case)], ids=str)
def test_hold_leaves_out_a_task_until_it_is_first_seen(case: Case) -> None:
    held, skipped = build(case, 4, absent_tasks="hold"), build(case, 4, absent_tasks="skip")
    items = torch.tensor([1.0, 1, 0, 1], dtype=torch.float64)
    rows = random_losses(4, 4)
    for row in rows[:3]:
        assert torch.equal(advance(held, row, items), advance(skipped, row, items))
    coefficients = advance(held, rows[3])
    assert coefficients[2] != 0 and coefficients.isfinite().all()
    if case.options.get("reference") != "every_epoch":
        assert held.reference_losses[2] == rows[3, 2]
    assert_finite(held)


@pytest.mark.parametrize(("case", "absent_tasks"), in_turn(CASES, ["skip", "hold", "auto"]), ids=str)
def test_a_step_without_any_task(case: Case, absent_tasks: str) -> None:
    balancer = build(case, 3, absent_tasks=absent_tasks)
    rows = random_losses(3, 4)
    nothing = torch.zeros(3, dtype=torch.float64)
    for row in (rows[0], None, rows[1], None, rows[2]):
        if row is None:
            before = balancer.state_dict()
            coefficients = advance(balancer, torch.full((3,), torch.nan, dtype=torch.float64), nothing)
            assert not coefficients.any()
            after = balancer.state_dict()
            kept = [key for key in before if key.startswith(("normalization.", "memory."))]
            assert kept and all(torch.equal(before[key], after[key]) for key in kept)
        else:
            assert advance(balancer, row).any()
        assert_finite(balancer)
        assert balancer.coefficients.isfinite().all()


@every_case
def test_the_first_step_without_any_task(case: Case) -> None:
    empty, fresh = build(case, 3), build(case, 3)
    row = random_losses(3, 1)[0]
    empty.look_ahead(lambda: batch_for(empty, row, torch.zeros(3)))
    value = empty.backward(row.clone().requires_grad_(), torch.zeros(3), router_features=features_for(empty))
    assert value == 0
    empty.discard()
    assert torch.equal(advance(empty, row), advance(fresh, row))


# --- symmetry -----------------------------------------------------------------------------------------------------

ORDER = torch.tensor([3, 0, 4, 2, 1])


def permuted_runs(case: Case) -> list[Tensor]:
    """Coefficients of five steps with the tasks in their order, and in another order (brought back)."""
    results = []
    for order in (torch.arange(5), ORDER):
        balancer = build(case, 5)
        take_router(balancer, build(case, 5), order)
        rows = random_losses(5, 5, seed=3)[:, order]
        results.append(torch.stack([advance(balancer, row) for row in rows])[:, order.argsort()])
    return results


SYMMETRIC = [case for case in CASES if not case.depends_on_order and case.name in SEPARABLE]


@pytest.mark.parametrize("case", SYMMETRIC, ids=str)
def test_the_order_of_the_tasks_does_not_matter(case: Case) -> None:
    straight, permuted = permuted_runs(case)
    torch.testing.assert_close(straight, permuted, rtol=1e-10, atol=1e-12)


def test_adjacent_pairs_do_depend_on_the_order() -> None:
    straight, permuted = permuted_runs(Case("bilb", "celeba", {"preset": "celeba"}))
    assert (straight - permuted).abs().max() > 1e-3


# --- no device synchronisation ------------------------------------------------------------------------------------


class ForbidSync(TorchDispatchMode):
    """Raises at operations that read the device from the host, or whose output shape depends on values."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "bincount")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name.startswith("index") and any(
            index is not None and index.dtype == torch.bool for arg in args if isinstance(arg, list) for index in arg
        )
        if masks or name in self.FORBIDDEN:
            raise AssertionError(f"synchronises with the device: {func}")
        return func(*args, **(kwargs or {}))


def whole_step(balancer: LossBalancer, row: Tensor, form: str) -> None:
    """What a training step does with K losses, up to the optimizers' steps."""
    log = RunningLog(balancer.task_names, balancer.device, balancer.dtype)
    losses = row * 1.0 if form == "tensor" else dict(zip(balancer.task_names, row.unbind(), strict=True))
    features = features_for(balancer)
    features = None if features is None else features.requires_grad_()
    batch = as_task_losses(losses, None, balancer.task_names, default_items=8.0, router_features=features)
    surrogate, weighting = balancer.surrogate(batch)
    surrogate.backward()
    log.commit([Part(weighting, surrogate.detach(), None)])


@pytest.mark.parametrize(("case", "form"), in_turn(CASES, ["tensor", "dict"]), ids=str)
def test_a_step_reads_nothing_from_the_device(case: Case, form: str) -> None:
    balancer = build(case, 4, absent_tasks="hold")
    row = random_losses(4, 1)[0].requires_grad_()
    with ForbidSync():
        whole_step(balancer, row, form)


def test_the_probe_for_syncs_works() -> None:
    values = torch.tensor([1.0, -1.0])
    for synchronising in (lambda: values.max().item(), lambda: bool(values.any()), lambda: values[values > 0]):
        with pytest.raises(AssertionError, match="synchronises"), ForbidSync():
            synchronising()


@pytest.mark.parametrize(("case", "form"), in_turn(CASES, ["dict", "tensor"]), ids=str)
def test_a_step_runs_on_a_device_without_values(case: Case, form: str) -> None:
    # On the meta device every attempt to look at a value raises, `tolist()` and copies to the host included.
    balancer = case.build(4, torch.float32, device="meta", absent_tasks="hold")
    balancer.on_epoch_begin(0)
    whole_step(balancer, torch.empty(4, device="meta", requires_grad=True), form)
    assert balancer.coefficients.device.type == "meta"
