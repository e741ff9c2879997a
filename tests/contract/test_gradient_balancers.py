"""What every gradient method keeps, like every loss balancer: finite numbers, complete state, absence, phases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_bilb import build_balancer
from hf_bilb.balancers.registry import GRADIENT_METHODS
from hf_bilb.engine.gradient_balancer import GradientBalancer
from hf_bilb.losses.contract import TaskLosses
from tests.contract.cases import GRADIENT_CASES as CASES
from tests.contract.cases import Case, random_losses
from tests.products import in_turn

#: Where the result of this step hangs on random numbers or on those before it, or nothing is held (`torchjd`).
REMEMBERS = ("torchjd", "gradvac", "moco", "modo", "sdmgrad", "gradnorm", "pcgrad", "graddrop")
FLOAT = torch.float64


every_case = pytest.mark.parametrize("case", CASES, ids=str)


class Shared(nn.Module):
    """K losses that are the given ones at the start, with gradients of every direction; and K heads of one number."""

    def __init__(self, num_tasks: int, dtype: torch.dtype = FLOAT, size: int = 6) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        directions = torch.randn(num_tasks, size, generator=generator, dtype=FLOAT).to(dtype) / size
        self.register_buffer("directions", directions)
        self.shared = nn.Parameter(torch.zeros(size, dtype=dtype))
        self.heads = nn.Parameter(torch.zeros(num_tasks, dtype=dtype))

    def forward(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        features = self.shared.expand(4, -1) * 1.0
        tilt = (features @ self.directions.T).mean(0)
        return losses * (tilt + self.heads).exp(), features


def build(case: Case, num_tasks: int, dtype: torch.dtype = FLOAT, **more: Any) -> tuple[GradientBalancer, Shared]:
    model = Shared(num_tasks, dtype)
    balancer = build_balancer(case.name, num_tasks, dtype=dtype, **{**case.options, **more})
    assert isinstance(balancer, GradientBalancer)
    balancer.bind(model, torch.optim.SGD(model.parameters(), lr=1e-2))
    balancer.on_epoch_begin(0)
    return balancer, model


def advance(
    balancer: GradientBalancer, model: Shared, row: Tensor, items: Tensor | None = None, rate: float = 0.0
) -> Tensor:
    """One step; returns the gradient of all parameters."""
    model.zero_grad()
    losses, features = model(row if items is None else row.where(items > 0, 0.0))
    balancer.backward(losses, items, shared_features=features)
    gradient = torch.cat([p.grad.flatten() for p in (model.shared, model.heads) if p.grad is not None])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad.clamp(-2, 2)
    balancer.step()
    return gradient


def test_every_gradient_method_is_here() -> None:
    assert {case.name for case in CASES} == set(GRADIENT_METHODS)


@pytest.mark.parametrize(("case", "size"), in_turn(CASES, [2, 40, 1, 3], each=2), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, FLOAT], ids=str)
def test_finite(case: Case, size: int, dtype: torch.dtype) -> None:
    balancer, model = build(case, size, dtype)
    assert balancer.coefficients is None
    for row in 1.5 + random_losses(size, 4, dtype=dtype):
        gradient = advance(balancer, model, row)
        assert gradient.dtype == dtype and gradient.isfinite().all() and gradient.any()
        assert balancer.coefficients.shape == (size,) and balancer.coefficients.dtype == dtype
        if balancer.weights is not None:
            assert balancer.weights.isfinite().all() and not balancer.weights.requires_grad


# GradDrop draws in the precision of the gradients.
@pytest.mark.parametrize("case", [case for case in CASES if case.name != "graddrop"], ids=str)
def test_float32_follows_float64(case: Case) -> None:
    found = {}
    for dtype in (torch.float32, FLOAT):
        balancer, model = build(case, 5, dtype)
        rows = 1.5 + random_losses(5, 3)
        found[dtype] = torch.stack([advance(balancer, model, row.to(dtype), rate=0.01) for row in rows]).double()
    scale = found[FLOAT].abs().max()
    assert (found[torch.float32] - found[FLOAT]).abs().max() <= 2e-3 * scale


@every_case
def test_resume_from_a_file_is_bit_identical(case: Case, tmp_path: Path) -> None:
    rows, items = 1.5 + random_losses(4, 10), torch.ones(10, 4, dtype=FLOAT)
    for t in range(10):
        items[t, t % 4] = float(t % 3 > 0)

    def go_on(balancer: GradientBalancer, model: Shared, steps: range) -> list[Tensor]:
        return [advance(balancer, model, rows[t], items[t], rate=0.05) for t in steps]

    balancer, model = build(case, 4)
    go_on(balancer, model, range(5))
    save_file(balancer.state_dict(), tmp_path / "state.safetensors")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    through = go_on(balancer, model, range(5, 10))

    resumed, other = build(case, 4)
    other.load_state_dict(weights)
    resumed.load_state_dict(load_file(tmp_path / "state.safetensors"))
    for one, two in zip(through, go_on(resumed, other, range(5, 10)), strict=True):
        assert torch.equal(one, two)


@every_case
def test_state_is_there_from_the_start_and_is_a_copy(case: Case) -> None:
    balancer, model = build(case, 4)
    before = balancer.state_dict()
    kept = {key: tensor.clone() for key, tensor in before.items()}
    for row in 1.5 + random_losses(4, 3):
        advance(balancer, model, row)
    assert balancer.state_dict().keys() == before.keys()
    balancer.load_state_dict(before)
    for key, tensor in balancer.state_dict().items():
        assert torch.equal(tensor.nan_to_num(), kept[key].nan_to_num()), key


@every_case
def test_the_warm_up_is_ls(case: Case) -> None:
    balancer, model = build(case, 4)
    balancer.phase = "warmup"
    before = balancer.snapshot()
    row = 1.5 + random_losses(4, 1)[0]
    found = advance(balancer, model, row)
    model.zero_grad()
    model(row)[0].sum().backward()
    torch.testing.assert_close(found, torch.cat([model.shared.grad, model.heads.grad]), rtol=1e-12, atol=0)
    after = balancer.snapshot()
    changed = {key for key in before if not torch.equal(before[key].nan_to_num(), after[key].nan_to_num())}
    assert changed <= {"memory.last_losses", "memory.seen"}


@every_case
def test_frozen_learns_nothing(case: Case) -> None:
    balancer, model = build(case, 4)
    rows = 1.5 + random_losses(4, 6)
    for row in rows[:3]:
        advance(balancer, model, row)
    balancer.phase = "frozen"
    before = balancer.state_dict()
    for row in rows[3:]:
        assert advance(balancer, model, row).isfinite().all()
    after = balancer.state_dict()
    changed = {key for key in before if not torch.equal(before[key].nan_to_num(), after[key].nan_to_num())}
    counted = {key for key in before if key.endswith("_extra_state")}  # how many steps there have been
    assert changed <= {"memory.last_losses", "guards.counts", "guards.dominated"} | counted


@every_case
def test_a_look_and_a_dropped_step_leave_no_trace(case: Case) -> None:
    plain, model = build(case, 4)
    looked, other = build(case, 4)
    rows = 1.5 + random_losses(4, 4)
    for t, row in enumerate(rows):
        expected = advance(plain, model, row)
        looked.preview(looked_batch(*other(row))).backward()
        if t == 2:  # decided on, and dropped
            before = looked.snapshot()
            looked.surrogate(looked_batch(*other(row)))
            looked.rollback(before)
            looked.discard()
        assert torch.equal(advance(looked, other, row), expected)


def looked_batch(losses: Tensor, features: Tensor) -> TaskLosses:
    return TaskLosses(losses, torch.ones_like(losses), shared_features=(features,))


#: Where what K is, or how many numbers are drawn, does not count.
SEPARABLE = [
    case
    for case in CASES
    if case.label in ("default", "features", "max_norm") and case.name not in ("pcgrad", "graddrop", "mgda", "sdmgrad")
]


@pytest.mark.parametrize("case", SEPARABLE, ids=str)
def test_skip_is_the_method_of_the_present_tasks(case: Case) -> None:
    there = torch.tensor([True, False, True, True])
    whole, model = build(case, 4, absent_tasks="skip")
    part, small = build(case, 3)
    small.directions.copy_(model.directions[there])
    for row in 1.5 + random_losses(4, 3):
        found = advance(whole, model, row.where(there, torch.nan), there.double())
        expected = advance(part, small, row[there])
        torch.testing.assert_close(found[:6], expected[:6], rtol=1e-9, atol=1e-12)
        assert found[6 + 1] == 0


@every_case
@pytest.mark.parametrize("absent_tasks", ["skip", "hold", "auto"])
def test_a_step_without_any_task(case: Case, absent_tasks: str) -> None:
    balancer, model = build(case, 3, absent_tasks=absent_tasks)
    nothing = torch.zeros(3, dtype=FLOAT)
    for row in (None, *(1.5 + random_losses(3, 2)), None):
        if row is None:
            gradient = advance(balancer, model, torch.full((3,), torch.nan, dtype=FLOAT), nothing)
            assert not gradient.any() and not balancer.coefficients.any()
        else:
            assert advance(balancer, model, row).any()


@pytest.mark.parametrize("case", [case for case in CASES if case.name not in REMEMBERS], ids=str)
def test_hold_takes_the_last_known_gramian(case: Case) -> None:
    held, model = build(case, 4, absent_tasks="hold")
    full, other = build(case, 4)
    row, there = 1.5 + random_losses(4, 1)[0], torch.tensor([True, False, True, True])
    for t in range(3):
        expected = advance(full, other, row)
        if t != 1:
            found = advance(held, model, row)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
            continue
        advance(held, model, row.where(there, torch.nan), there.double())
        torch.testing.assert_close(held.coefficients[there], full.coefficients[there], rtol=1e-7, atol=1e-10)
        assert held.coefficients[1] == 0


def test_a_single_task_keeps_its_weight_beside_held_ones() -> None:
    # Batches of one task each: the weights are those of all tasks, not of the lone one.
    held, model = build(Case("imtl_g", "default"), 2, absent_tasks="auto")
    row = torch.tensor([1.0, 3.0], dtype=FLOAT)
    found = []
    for t in range(4):
        there = torch.tensor([t % 2 == 0, t % 2 == 1])
        advance(held, model, row.where(there, torch.nan), there.double())
        found.append(float(held.coefficients[t % 2]))
    # Nothing is known of the angle: equal projections on both, that is weights inverse to the norms.
    norms = row * model.directions.norm(dim=1)
    expected = (1 / norms) / (1 / norms).sum()
    torch.testing.assert_close(torch.tensor(found[2:], dtype=FLOAT), expected, rtol=1e-9, atol=0)
