"""The balancer in a loop of one's own, as DESIGN shows it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_bilb import build_balancer
from hf_bilb.balancers import LossBalancer
from hf_bilb.engine.objective import differentiate
from hf_bilb.errors import NonFiniteLossError, TaskLossError
from tests.contract.cases import advance, random_losses

NAMES = ["a", "b", "c"]


class Model(nn.Module):
    """K = 3 losses of a small regression, as a tensor or as a dict."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3).double()

    def forward(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        x, y = (torch.randn(8, n, dtype=torch.float64, generator=generator) for n in (4, 3))
        return (self.layer(x) - 0.1 * y - x[:, :3]).square().mean(0)


def train(name: str, form: str, steps: int = 12, **options: Any) -> tuple[LossBalancer, Model, list[float]]:
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    balancer = build_balancer(name, task_names=NAMES, dtype=torch.float64, **options)
    values = []
    for t in range(steps):
        optimizer.zero_grad()
        losses = model(t)
        values.append(
            float(balancer.backward(losses if form == "tensor" else dict(zip(NAMES, losses.unbind(), strict=True))))
        )
        optimizer.step()
        balancer.step(reevaluate=lambda t=t: model(t))
    return balancer, model, values


@pytest.mark.parametrize("name", ["ls", "si", "uw", "bilb"])
def test_the_loop_of_the_design(name: str) -> None:
    balancer, model, values = train(name, "tensor")
    assert values[-1] < values[0]
    by_dict, other, again = train(name, "dict")
    assert values == again
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    assert torch.equal(balancer.coefficients, by_dict.coefficients)
    assert (balancer.weights is not None) == (name in ("uw", "bilb"))


def test_one_backward_is_the_sum_of_coefficients_times_losses() -> None:
    model = Model()
    balancer = build_balancer("bilb", 3, dtype=torch.float64)
    losses = model(0)
    expected = None
    for _ in range(2):
        model.zero_grad()
        balancer.backward(model(0))
        found = model.layer.weight.grad.clone()
        (balancer.coefficients * losses).sum().backward(retain_graph=True)
        expected = model.layer.weight.grad - found
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-16)


def test_losses_of_several_backwards_leave_the_users_gradients_alone() -> None:
    # backward() adds to .grad, as Tensor.backward does.
    model = Model()
    balancer = build_balancer("ls", 3, dtype=torch.float64)
    balancer.backward(model(0))
    first = model.layer.weight.grad.clone()
    balancer.backward(model(0))
    torch.testing.assert_close(model.layer.weight.grad, 2 * first, rtol=1e-14, atol=0)


# --- backward= ----------------------------------------------------------------------------------------------------


def test_backward_is_called_once_with_a_scalar_worth_f() -> None:
    calls: list[Tensor] = []

    def backward(loss: Tensor) -> None:
        calls.append(loss)
        (4.0 * loss).backward()

    model = Model()
    balancer = build_balancer("si", 3, dtype=torch.float64)
    value = balancer.backward(model(0), backward=backward)
    scaled = model.layer.weight.grad.clone()
    model.zero_grad()
    build_balancer("si", 3, dtype=torch.float64).backward(model(0))
    assert len(calls) == 1 and calls[0].shape == ()
    assert float(calls[0].detach()) == pytest.approx(float(value), rel=1e-14)
    torch.testing.assert_close(scaled, 4 * model.layer.weight.grad, rtol=1e-14, atol=0)


@pytest.fixture
def accelerator() -> Iterator[Any]:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state()
    PartialState._reset_state()
    yield Accelerator(cpu=True, gradient_accumulation_steps=1)
    AcceleratorState._reset_state()
    PartialState._reset_state()


def test_accelerator_backward(accelerator: Any) -> None:
    model, plain = Model(), Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    build_balancer("bilb", 3, dtype=torch.float64).backward(model(0), backward=accelerator.backward)
    build_balancer("bilb", 3, dtype=torch.float64).backward(plain(0))
    assert torch.equal(accelerator.unwrap_model(model).layer.weight.grad, plain.layer.weight.grad)


# --- refused losses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["ls", "si", "uw", "bilb"])
def test_a_nonfinite_loss_leaves_no_trace(name: str, bad: float) -> None:
    balancer, model, _ = train(name, "tensor", steps=3)
    before, coefficients = balancer.state_dict(), balancer.coefficients.clone()
    model.zero_grad()
    calls: list[Tensor] = []
    losses = model(9) * torch.tensor([1.0, bad, 1.0], dtype=torch.float64)
    with pytest.raises(NonFiniteLossError, match=r"^the loss of task 'b' is (nan|-?inf); ") as caught:
        balancer.backward(losses, backward=calls.append)
    assert "\n" not in str(caught.value) and not calls
    with pytest.raises(NonFiniteLossError):
        balancer.backward(losses)
    assert all(parameter.grad is None for parameter in model.parameters())
    after = balancer.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(balancer.coefficients, coefficients)
    balancer.step()
    assert all(torch.equal(before[key], balancer.state_dict()[key]) for key in before)


@pytest.mark.parametrize(
    ("name", "options", "cause"),
    [
        ("si", {}, "takes logarithms"),
        ("bilb", {}, "has normalization: power"),
        ("bilb", {"normalization": "log"}, "has normalization: log"),
        ("ls", {"normalization": "initial"}, "has normalization: initial"),
    ],
)
@pytest.mark.parametrize("bad", [0.0, -1.5])
def test_a_loss_outside_the_domain_names_the_cause(name: str, options: dict[str, Any], cause: str, bad: float) -> None:
    balancer = build_balancer(name, task_names=NAMES, **options)
    before = balancer.state_dict()
    with pytest.raises(NonFiniteLossError) as caught:
        advance(balancer, torch.tensor([1.0, 2.0, bad]))
    assert str(caught.value) == f"the loss of task 'c' is {bad}, but balancer '{name}' {cause}: losses must be > 0"
    assert all(torch.equal(before[key], balancer.state_dict()[key]) for key in before)
    assert balancer.coefficients is None


def test_an_absent_loss_may_be_anything() -> None:
    for name in ("ls", "si", "bilb"):
        balancer = build_balancer(name, 3)
        found = advance(balancer, torch.tensor([1.0, float("nan"), 2.0]), torch.tensor([1.0, 0.0, 1.0]))
        assert found[1] == 0 and found.isfinite().all() and found[0] != 0
        # Nor does it show in the scalar that is differentiated, whose value is logged.
        scalars: list[Tensor] = []
        leaf = torch.tensor([1.0, float("nan"), 2.0], requires_grad=True)
        value = balancer.backward(leaf, torch.tensor([1.0, 0.0, 1.0]), backward=scalars.append)
        assert float(scalars[0].detach()) == pytest.approx(float(value), rel=1e-6)


def test_negative_losses_are_fine_where_no_logarithm_is() -> None:
    for name, options in (("ls", {}), ("uw", {}), ("bilb", {"preset": "celeba"})):
        assert advance(build_balancer(name, 3, **options), torch.tensor([-1.0, 2.0, 0.0])).isfinite().all()


@pytest.mark.parametrize("name", ["si", "bilb"])
def test_a_coefficient_that_overflows_is_refused(name: str) -> None:
    # 1 / l of a denormal loss is infinite in float32: the step would destroy the model.
    options = {"normalization": "none"} if name == "si" else {"normalization": "log"}
    balancer = build_balancer(name, task_names=NAMES, **options)
    advance(balancer, torch.tensor([1.0, 2.0, 3.0]))
    leaf = torch.tensor([1.0, 1e-42, 3.0], requires_grad=True)
    with pytest.raises(NonFiniteLossError, match="coefficient of task 'b' is"):
        balancer.backward(leaf)
    assert leaf.grad is None


# --- several backwards before one step ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["uw", "bilb"])
def test_router_gradients_are_the_item_weighted_mean(name: str) -> None:
    options = {"optimizer": "sgd", "learning_rate": 1.0}
    balancer = build_balancer(name, 3, dtype=torch.float64, **options)
    advance(balancer, random_losses(3, 1)[0])
    ((key, parameter),) = balancer.objective.named_parameters()
    before = parameter.detach().clone()
    rows, items = random_losses(3, 3, seed=5), torch.tensor([[4.0, 4, 4], [1, 0, 2], [10, 20, 3]])
    gradients = []
    for row, counts in zip(rows, items, strict=True):
        found = differentiate(balancer.objective, balancer.normalization, row, counts > 0)
        gradients.append(found.parameter_gradients[0])
        balancer.backward(row.clone().requires_grad_(), num_items=counts)
    balancer.step()
    share = items.sum(1, dtype=torch.float64)
    expected = before - (share.unsqueeze(1) * torch.stack(gradients)).sum(0) / share.sum()
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-13, atol=0, msg=key)


def test_one_backward_keeps_its_gradient_to_the_last_bit_and_discard_forgets_it() -> None:
    balancer = build_balancer("uw", 3, dtype=torch.float64, optimizer="sgd", learning_rate=1.0)
    row = random_losses(3, 1)[0]
    balancer.backward(row.clone().requires_grad_())
    balancer.discard()
    balancer.step()
    assert not balancer.state_dict()["objective.log_variance"].any()
    gradient = differentiate(
        balancer.objective, balancer.normalization, row, torch.ones(3, dtype=torch.bool)
    ).parameter_gradients[0]
    advance(balancer, row)
    assert torch.equal(balancer.state_dict()["objective.log_variance"], -gradient)


# --- epochs, learning rate, state ---------------------------------------------------------------------------------


def test_on_epoch_begin_twice_is_once() -> None:
    balancer = build_balancer("ls", 2, normalization="initial", reference="every_epoch", dtype=torch.float64)
    rows = [torch.tensor(row, dtype=torch.float64) for row in ([1.0, 1], [2.0, 2], [4.0, 4], [8.0, 8])]
    balancer.on_epoch_begin(0)
    advance(balancer, rows[0])
    balancer.on_epoch_begin(0)
    advance(balancer, rows[1])
    assert balancer.reference_losses.tolist() == [1.0, 1.0]
    balancer.on_epoch_begin(1)
    balancer.on_epoch_begin(1)
    advance(balancer, rows[2])
    assert balancer.reference_losses.tolist() == [4.0, 4.0]
    resumed = build_balancer("ls", 2, normalization="initial", reference="every_epoch", dtype=torch.float64)
    resumed.load_state_dict(balancer.state_dict())
    resumed.on_epoch_begin(1)
    advance(resumed, rows[3])
    assert resumed.reference_losses.tolist() == [4.0, 4.0]


def test_follow_model_takes_the_current_learning_rate() -> None:
    model = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    balancer = build_balancer("uw", 2, optimizer="sgd", learning_rate="follow_model", dtype=torch.float64)
    row = torch.tensor([3.0, 3.0], dtype=torch.float64)
    balancer.backward(row.clone().requires_grad_())
    with pytest.raises(RuntimeError, match=r"learning_rate: follow_model needs balancer.bind\(optimizer=...\)"):
        balancer.step()
    balancer.discard()
    balancer.bind(optimizer=model)
    for rate in (0.5, 0.125):
        model.param_groups[0]["lr"] = rate
        before = balancer.state_dict()["objective.log_variance"]
        advance(balancer, row)
        moved = balancer.state_dict()["objective.log_variance"] - before
        gradient = 0.5 * (1 - torch.exp(-before) * row)
        torch.testing.assert_close(moved, -rate * gradient, rtol=1e-12, atol=0)


def test_reference_losses_are_nan_until_seen() -> None:
    balancer = build_balancer("bilb", 3)
    assert balancer.reference_losses.isnan().all()
    advance(balancer, torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0.0, 1.0]))
    assert balancer.reference_losses.isnan().tolist() == [False, True, False]


def test_step_needs_a_backward() -> None:
    with pytest.raises(RuntimeError, match=r"balancer.step\(\) needs a balancer.backward\(losses\) before it"):
        build_balancer("bilb", 2).step()


def test_losses_on_another_device_are_refused() -> None:
    with pytest.raises(TaskLossError, match=r"losses: are on meta, the balancer is on cpu; call balancer.to\(device\)"):
        build_balancer("ls", 2).backward(torch.empty(2, device="meta", requires_grad=True))


def test_precision_can_be_changed() -> None:
    balancer = build_balancer("bilb", 2).to(dtype=torch.float64)
    row = random_losses(2, 1)[0]
    assert balancer.dtype == torch.float64 and advance(balancer, row).dtype == torch.float64
    assert balancer.state_dict()["optimizer.router.logits.exp_avg"].dtype == torch.float64
    with pytest.raises(ValueError, match=r"dtype: torch.float16 is not valid"):
        build_balancer("ls", 2, dtype=torch.float16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("memory.seen"), "balancer state: entry 'memory.seen' is missing"),
        (lambda state: state.update(extra=torch.zeros(1)), "balancer state: entry 'extra' is unknown"),
        (
            lambda state: state.update({"memory.last_losses": torch.zeros(2)}),
            r"balancer state: entry 'memory.last_losses' has shape \(2,\), expected \(3,\) for 3 tasks",
        ),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change: Any, message: str) -> None:
    balancer = build_balancer("bilb", 3)
    advance(balancer, torch.tensor([1.0, 2.0, 3.0]))
    before = balancer.state_dict()
    foreign = build_balancer("bilb", 3).state_dict()
    change(foreign)
    with pytest.raises(TaskLossError, match=message):
        balancer.load_state_dict(foreign)
    assert all(torch.equal(before[key], balancer.state_dict()[key]) for key in before)


def test_the_state_of_another_method_is_refused() -> None:
    with pytest.raises(TaskLossError, match="was it saved by another method or version"):
        build_balancer("uw", 3).load_state_dict(build_balancer("bilb", 3).state_dict())
