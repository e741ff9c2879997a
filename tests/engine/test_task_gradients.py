"""Which parameters are shared, what the gradients are, and how the result reaches the parameters."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torchjd.aggregation import IMTLG

from hf_bilb import build_balancer
from hf_bilb.engine.gradient_balancer import GradientBalancer
from hf_bilb.engine.task_gradients import SharedParameters, gradient_rows, leaves_of
from hf_bilb.errors import NonFiniteLossError, OptionError, TaskLossError
from hf_bilb.losses.contract import TaskLosses

FLOAT = torch.float64


class Net(nn.Module):
    """A shared trunk, a head for each of three tasks, and the same number of outputs of heads that are stacked."""

    def __init__(self, zero: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(5, 4)
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(6, 1) for _ in range(3))
        self.stacked = nn.Linear(6, 3)
        self.unused = nn.Linear(2, 2)
        if zero:  # as adapters and many new heads begin: no gradient reaches the trunk
            for head in self.heads:
                nn.init.zeros_(head.weight)
            nn.init.zeros_(self.stacked.weight)
        self.double()

    def forward(self, batch: int = 7) -> tuple[Tensor, Tensor]:
        tokens = torch.arange(batch) % 5
        features = self.trunk(self.embedding(tokens))
        outputs = torch.cat([head(features) for head in self.heads], dim=1) + self.stacked(features)
        targets = torch.linspace(-1, 1, batch, dtype=FLOAT)[:, None] * torch.tensor([1.0, -2.0, 0.5], dtype=FLOAT)
        return (outputs - targets).square().mean(dim=0), features


TRUNK = ["embedding.weight", "trunk.0.weight", "trunk.0.bias"]


def shared_names(model: nn.Module, losses: Tensor, present: list[bool] | None = None) -> list[str]:
    shared = SharedParameters(len(losses), None)
    shared.bind(model)
    here = [True] * len(losses) if present is None else present
    shared.look(losses, here, here, None, False)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for parameter in shared.of_several]


# --- which parameters are shared -------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [False, True], ids=["drawn", "zero heads"])
def test_the_trunk_is_shared_and_heads_are_not_stacked_ones_neither(zero: bool) -> None:
    model = Net(zero)
    assert shared_names(model, model()[0]) == TRUNK


def test_tied_weights_are_listed_once_and_frozen_ones_not_at_all() -> None:
    model = Net()
    model.again = model.trunk
    model.trunk[0].bias.requires_grad_(False)
    assert shared_names(model, model()[0]) == TRUNK[:2]


def test_a_head_that_two_tasks_use_is_shared() -> None:
    model = Net()
    losses, features = model()
    losses = losses + torch.stack([torch.zeros((), dtype=FLOAT), model.heads[0](features).mean(), losses[2] * 0])
    assert "heads.0.weight" in shared_names(model, losses)


def test_dead_units_and_batch_norm_hide_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)).double()
    outputs = model(torch.randn(9, 3, dtype=FLOAT))
    assert shared_names(model, outputs.square().mean(0)) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_tasks_that_come_one_after_the_other_make_a_parameter_shared_when_the_second_comes() -> None:
    model = Net()
    shared = SharedParameters(3, None)
    shared.bind(model)
    first = [True, False, False]
    shared.look(model()[0], first, first, None, False)
    # Of a single task everything that it reaches is looked at.
    assert len(shared.looked_at) == 3 + 2 + 2
    second = [False, True, False]
    shared.look(model()[0], second, second, None, False)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert [names[id(parameter)] for parameter in shared.of_several] == TRUNK
    restored = SharedParameters(3, None)
    restored.bind(model)
    restored.load_state_dict(shared.state_dict())
    assert [id(p) for p in restored.of_several] == [id(p) for p in shared.of_several]
    assert restored.known.tolist() == [True, True, False]


def test_rows_of_an_embedding_that_one_task_alone_has_do_not_hide_that_others_are_shared() -> None:
    model = nn.Embedding(6, 2).double()
    a, b = model(torch.tensor([0, 1, 2])), model(torch.tensor([0, 4, 5]))
    assert shared_names(model, torch.stack([a.square().mean(), b.square().mean()])) == ["weight"]
    a, b = model(torch.tensor([1, 2])), model(torch.tensor([4, 5]))
    separate = SharedParameters(2, None)
    separate.bind(model)
    separate.look(torch.stack([a.square().mean(), b.square().mean()]), [True] * 2, [True] * 2, None, False)
    # Rows that nobody has reached leave it open; a later look finds out.
    assert separate._of_several == [] and separate.undecided
    a, b = model(torch.tensor([1, 3])), model(torch.tensor([3, 5]))
    losses = torch.stack([a.square().mean(), b.square().mean()])
    separate.look(losses, [True] * 2, [True] * 2, None, False)
    assert separate._of_several == []
    separate.look(losses, [True] * 2, [True] * 2, None, False, again=True)
    assert separate._of_several == [0] and not separate.undecided


def test_patterns_and_what_fits_none() -> None:
    model = Net()
    balancer = build_balancer("mgda", 3, dtype=FLOAT, shared_parameters=["trunk.*"]).bind(model)
    balancer.backward(model()[0])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert [names[id(parameter)] for parameter in balancer._shared.looked_at] == TRUNK[1:]
    with pytest.raises(OptionError, match=r"^shared_parameters: 'trunc\.0\.weight' means no .*trunk\.0\.weight"):
        build_balancer("mgda", 3, shared_parameters=["trunc.0.weight"]).bind(model)


def test_without_a_model_the_graph_tells_the_parameters() -> None:
    model = Net()
    losses, _ = model()
    found = leaves_of(losses)
    expected = [p for name, p in model.named_parameters() if not name.startswith("unused")]
    assert {id(p) for p in found} == {id(p) for p in expected} and len(found) == len(expected)
    bound = build_balancer("pcgrad", 3, dtype=FLOAT).bind(model)
    free = build_balancer("pcgrad", 3, dtype=FLOAT)
    given = build_balancer(
        "pcgrad", 3, dtype=FLOAT, shared_parameters=[dict(model.named_parameters())[n] for n in TRUNK]
    )
    results = []
    for balancer in (bound, free, given):
        model.zero_grad()
        balancer.backward(model()[0])
        results.append([dict(model.named_parameters())[name].grad.clone() for name in TRUNK])
    for one, *others in zip(*results, strict=True):
        assert all(torch.allclose(one, other, rtol=1e-12, atol=0) for other in others)


def test_a_parameter_that_nobody_shares_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    leaf = torch.ones(3, dtype=FLOAT, requires_grad=True)
    balancer = build_balancer("mgda", 3, dtype=FLOAT)
    for _ in range(2):
        leaf.grad = None
        balancer.backward(leaf * torch.tensor([1.0, 2.0, 4.0], dtype=FLOAT))
        balancer.step()
    assert [record.message for record in caplog.records].count(caplog.records[0].message) == 1
    assert "no parameter is reached by the losses of more than one task" in caplog.text
    # Orthogonal gradients: w_k inverse to |g_k|^2, which the official code scales to add up to K.
    expected = 3 / torch.tensor([1.0, 4.0, 16.0], dtype=FLOAT) / (1 + 1 / 4 + 1 / 16)
    torch.testing.assert_close(balancer.coefficients, expected, rtol=1e-12, atol=0)


# --- the gradients, and how they reach the parameters ----------------------------------------------------------------


@pytest.mark.parametrize("tasks_per_pass", [None, 1, 2])
def test_rows_are_those_of_a_plain_loop(tasks_per_pass: int | None) -> None:
    model = Net()
    losses, _ = model()
    counts = torch.tensor([7.0, 0.0, 3.0], dtype=FLOAT)
    inputs = [dict(model.named_parameters())[name] for name in (*TRUNK, "unused.weight")]
    rows = gradient_rows(TaskLosses(losses, counts), inputs, tasks_per_pass)
    for k in range(3):
        expected = torch.autograd.grad(losses[k] * (counts[k] > 0), inputs, retain_graph=True, allow_unused=True)
        for row, gradient, parameter in zip(rows, expected, inputs, strict=True):
            plain = torch.zeros(parameter.numel(), dtype=FLOAT) if gradient is None else gradient.flatten()
            torch.testing.assert_close(row[k], plain, rtol=1e-12, atol=1e-15)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("heads", ["sum", "weights"])
@pytest.mark.parametrize("options", [{}, {"shared_parameters": ["trunk.*"]}, {"gradients": "features"}], ids=str)
def test_the_trunk_descends_the_weighted_sum_and_the_heads_theirs(heads: str, options: dict[str, Any]) -> None:
    model = Net()
    balancer = build_balancer("nash_mtl", 3, dtype=FLOAT, heads=heads, **options).bind(model)
    losses, features = model()
    value = balancer.backward(losses, shared_features=features)
    assert float(value) == pytest.approx(float(losses.sum()), rel=1e-12)
    found, weights = gradients(model), balancer.coefficients
    model.zero_grad()
    (weights * model()[0]).sum().backward()
    weighted = gradients(model)
    model.zero_grad()
    model()[0].sum().backward()
    plain = gradients(model)
    assert found.keys() == weighted.keys() and (weights - 1).abs().max() > 0.05
    for name, gradient in found.items():
        expected = weighted if heads == "weights" or name in TRUNK else plain
        torch.testing.assert_close(gradient, expected[name], rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("options", [{}, {"shared_parameters": ["trunk.*"]}], ids=str)
def test_the_weights_are_those_of_the_gradients_looked_at(options: dict[str, Any]) -> None:
    model = Net()
    balancer = build_balancer("imtl_g", 3, dtype=FLOAT, **options).bind(model)
    balancer.backward(model()[0])
    names = TRUNK[1:] if options else TRUNK
    inputs = [dict(model.named_parameters())[name] for name in names]
    losses, _ = model()
    rows = [torch.autograd.grad(loss, inputs, retain_graph=True) for loss in losses]
    jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    combined = balancer.coefficients @ jacobian
    projections = jacobian @ combined / jacobian.norm(dim=1)
    torch.testing.assert_close(projections, projections.mean().expand(3), rtol=1e-9, atol=0)
    assert float(balancer.coefficients.sum()) == pytest.approx(1.0, rel=1e-12)


def test_parameters_given_themselves_are_the_shared_ones() -> None:
    model = Net()
    given = list(model.trunk.parameters())
    balancer = build_balancer("imtl_g", 3, dtype=FLOAT, shared_parameters=given)
    balancer.backward(model()[0])
    losses, _ = model()
    rows = [torch.autograd.grad(loss, given, retain_graph=True) for loss in losses]
    jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    projections = jacobian @ (balancer.coefficients @ jacobian) / jacobian.norm(dim=1)
    torch.testing.assert_close(projections, projections.mean().expand(3), rtol=1e-9, atol=0)


@pytest.mark.parametrize("where", ["field", "module"])
def test_features_are_those_of_the_output_or_of_a_module(where: str) -> None:
    model = Net()
    module = "trunk" if where == "module" else None
    balancer = build_balancer("imtl_g", 3, dtype=FLOAT, gradients="features", shared_module=module).bind(model)
    losses, features = model()
    balancer.backward(losses, shared_features=None if module else features)
    losses, features = model()
    rows = torch.stack([torch.autograd.grad(loss, features, retain_graph=True)[0].flatten() for loss in losses])
    projections = rows @ (balancer.coefficients @ rows) / rows.norm(dim=1)
    torch.testing.assert_close(projections, projections.mean().expand(3), rtol=1e-9, atol=0)


def test_an_aggregator_of_torchjd_at_features() -> None:
    model = Net()
    balancer = build_balancer("torchjd", 3, dtype=FLOAT, aggregator="IMTLG", gradients="features").bind(model)
    losses, features = model()
    balancer.backward(losses, shared_features=features)
    losses, features = model()
    rows = torch.stack([torch.autograd.grad(loss, features, retain_graph=True)[0].flatten() for loss in losses])
    torch.testing.assert_close(balancer.coefficients @ rows, IMTLG()(rows), rtol=1e-9, atol=1e-14)


class Words(nn.Module):
    """A layer that all tasks share, behind rows that each looks up itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.layer = nn.Embedding(8, 3).double(), nn.Linear(3, 2).double()

    def forward(self, *rows: list[int]) -> Tensor:
        outputs = [self.layer(self.embedding(torch.tensor(row))) for row in rows]
        return torch.stack([outputs[0].square().mean(), (outputs[1] - 1).square().mean()])


def test_what_becomes_shared_later_is_looked_at_from_then_on() -> None:
    model = Words()
    balancer = build_balancer("imtl_g", 2, dtype=FLOAT).bind(model)
    for words in ([0, 1], [2, 3]), ([0, 5], [5, 3]):  # first no row is shared
        model.zero_grad()
        balancer.backward(model(*words))
        coefficients = balancer.coefficients
        balancer.step()
    inputs = list(model.parameters())
    rows = [torch.autograd.grad(loss, inputs, retain_graph=True) for loss in model([0, 5], [5, 3])]
    jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    projections = jacobian @ (coefficients @ jacobian) / jacobian.norm(dim=1)
    torch.testing.assert_close(projections[0], projections[1], rtol=1e-9, atol=0)


def test_a_rollback_forgets_what_was_gathered() -> None:
    model = Net()
    balancer = build_balancer("mgda", 3, dtype=FLOAT).bind(model)
    balancer.backward(model()[0])
    balancer.step()
    expected = balancer.coefficients.clone()
    before = balancer.snapshot()
    assert isinstance(balancer, GradientBalancer)
    other = TaskLosses(model(3)[0], torch.ones(3, dtype=FLOAT))
    balancer.gather(other)
    balancer.rollback(before)  # as after an error between two micro-batches
    balancer.backward(model()[0])
    assert torch.equal(balancer.coefficients, expected)


def test_features_that_are_missing_or_no_way_leads_back_to() -> None:
    model = Net()
    balancer = build_balancer("mgda", 3, dtype=FLOAT, gradients="features").bind(model)
    with pytest.raises(TaskLossError, match=r"^gradients: 'features' needs what the heads are given"):
        balancer.backward(model()[0])
    losses, features = model()
    with pytest.raises(TaskLossError, match=r"^shared_features: no loss leads back to them"):
        balancer.backward(losses, shared_features=features * 1.0)
    with pytest.raises(OptionError, match=r"^shared_module: 'trunc' is no module"):
        build_balancer("mgda", 3, gradients="features", shared_module="trunc").bind(model)


@pytest.mark.parametrize("heads", ["sum", "weights"])
def test_between_two_looks_the_last_weights_are_applied(heads: str) -> None:
    model = Net()
    balancer = build_balancer("mgda", 3, dtype=FLOAT, every_n_steps=3, heads=heads).bind(model)
    seen = []
    for step in range(5):
        model.zero_grad()
        assert balancer.needs_gradients == (step % 3 == 0)
        balancer.backward(model()[0])
        seen.append(balancer.coefficients)
        expected = gradients(model)
        model.zero_grad()
        (balancer.coefficients * model()[0]).sum().backward()
        torch.testing.assert_close(expected["trunk.0.weight"], gradients(model)["trunk.0.weight"], rtol=1e-11, atol=0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
        balancer.step()
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[2], seen[3]) and torch.equal(seen[3], seen[4])


@pytest.mark.parametrize("name", ["pcgrad", "graddrop"])
def test_the_gradient_of_the_shared_parameters_is_clipped_and_that_of_the_heads_not(name: str) -> None:
    model = Net()
    plain = build_balancer(name, 3, dtype=FLOAT).bind(model)
    plain.backward(model()[0])
    free = gradients(model)
    model.zero_grad()
    build_balancer(name, 3, dtype=FLOAT, max_norm=0.01).bind(model).backward(model()[0])
    clipped = gradients(model)
    norm = torch.cat([free[key].flatten() for key in TRUNK]).norm()
    for key in TRUNK:
        torch.testing.assert_close(clipped[key], free[key] * 0.01 / norm, rtol=1e-3, atol=1e-12)
    for key in free.keys() - set(TRUNK):
        torch.testing.assert_close(clipped[key], free[key], rtol=1e-12, atol=0)


def test_priors_and_scale_are_those_of_every_balancer() -> None:
    model = Net()
    priors = [1.0, 2.0, 0.5]
    for rules in ({"task_priors": priors}, {"coefficient_scale": "sum_to_k"}):
        plain = build_balancer("nash_mtl", 3, dtype=FLOAT).bind(model)
        ruled = build_balancer("nash_mtl", 3, dtype=FLOAT, **rules).bind(model)
        for balancer in (plain, ruled):
            model.zero_grad()
            balancer.backward(model()[0])
        factor = torch.tensor(priors, dtype=FLOAT) if "task_priors" in rules else 3 / plain.coefficients.sum()
        torch.testing.assert_close(ruled.coefficients, plain.coefficients * factor, rtol=1e-12, atol=0)


def test_a_normalization_scales_the_gradients() -> None:
    model = Net()
    balancer = build_balancer("mgda", 3, dtype=FLOAT, normalization="log").bind(model)
    losses, _ = model()
    balancer.backward(losses)
    inputs = [dict(model.named_parameters())[name] for name in TRUNK]
    losses, _ = model()
    rows = [torch.autograd.grad(loss.log(), inputs, retain_graph=True) for loss in losses]
    jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    weights = balancer.coefficients * losses.detach()  # d l_k = l_k d log l_k
    shortest = weights @ jacobian
    # The point of the hull that is nearest to 0: no gradient of a task with weight is shorter along it, none is beyond.
    along = jacobian @ shortest
    assert float(weights.sum()) == pytest.approx(3.0, rel=1e-9)
    assert float(along.min()) == pytest.approx(float(shortest @ shortest) / 3, rel=1e-6)


def test_accelerates_scaling_and_accumulation_see_an_ordinary_backward_pass() -> None:
    model = Net()
    balancer = build_balancer("pcgrad", 3, dtype=FLOAT, order="identity").bind(model)
    balancer.backward(model()[0])
    once = gradients(model)
    model.zero_grad()
    balancer = build_balancer("pcgrad", 3, dtype=FLOAT, order="identity").bind(model)
    for _ in range(2):
        balancer.backward(model()[0], backward=lambda loss: (loss / 2).backward())
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, once[name], rtol=1e-12, atol=0)


# --- what can go wrong -----------------------------------------------------------------------------------------------


class Stopped(nn.Module):
    """A loss whose gradient is not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, dtype=FLOAT))

    def forward(self) -> Tensor:
        return torch.stack([self.weight.square().sum().sqrt() + 1, (self.weight - 1).square().sum()])


@pytest.mark.parametrize("name", ["mgda", "graddrop", "torchjd"])
def test_a_gradient_that_is_not_finite_names_its_task_before_anything_is_written(name: str) -> None:
    model = Stopped()
    balancer = build_balancer(name, task_names=["a", "b"], dtype=FLOAT).bind(model)
    before = balancer.snapshot()
    with pytest.raises(NonFiniteLossError, match=r"^the gradient of task 'a'(, 'b')? is not finite"):
        balancer.backward(model())
    assert model.weight.grad is None
    after = balancer.snapshot()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("tasks_per_pass", [None, 1])
def test_activation_checkpointing_without_reentrance(tasks_per_pass: int | None) -> None:
    model = Net()
    plain = build_balancer("pcgrad", 3, dtype=FLOAT).bind(model)
    plain.backward(model()[0])
    expected = gradients(model)
    model.zero_grad()
    trunk = model.trunk.forward
    model.trunk.forward = lambda x: checkpoint(trunk, x, use_reentrant=False)
    balancer = build_balancer("pcgrad", 3, dtype=FLOAT, tasks_per_pass=tasks_per_pass).bind(model)
    balancer.backward(model()[0])
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-12, atol=0)


def test_bf16_autocast() -> None:
    model = Net().float()
    balancer = build_balancer("nash_mtl", 3).bind(model)

    def losses() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = model.stacked(model.trunk(model.embedding(torch.arange(5))))
            return functional.mse_loss(outputs, torch.ones_like(outputs), reduction="none").mean(0).float()

    balancer.backward(losses())
    found = gradients(model)
    model.zero_grad()
    (balancer.coefficients * losses()).sum().backward()
    for name, gradient in gradients(model).items():
        assert (found[name] - gradient).norm() <= 0.02 * gradient.norm()


def test_several_ranks_need_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_bilb.engine.task_gradients.data_parallel_size", lambda group: 2)
    monkeypatch.setattr("hf_bilb.engine.gradient_balancer.all_reduce_sum", lambda values, group=None: values)
    balancer = build_balancer("mgda", 3, dtype=FLOAT)
    with pytest.raises(OptionError, match=r"^gradient methods on several ranks need balancer\.bind\(model\)"):
        balancer.backward(Net()()[0])


def test_losses_that_are_what_is_trained() -> None:
    leaf = torch.tensor([1.0, 2.0], dtype=FLOAT, requires_grad=True)
    balancer = build_balancer("imtl_g", 2, dtype=FLOAT)
    balancer.backward(leaf)
    torch.testing.assert_close(leaf.grad, torch.tensor([0.5, 0.5], dtype=FLOAT))
    with pytest.raises(TaskLossError, match=r"^losses: none of them depends on a trainable parameter"):
        build_balancer("mgda", 2, dtype=FLOAT).backward(leaf.detach())


METHODS = ["mgda", "pcgrad", "graddrop"]


@pytest.mark.parametrize("name", METHODS)
def test_what_the_bound_model_does_not_have_descends_what_heads_do(name: str) -> None:
    model = Net()
    temperature = torch.tensor(0.5, dtype=FLOAT, requires_grad=True)  # in no module
    balancer = build_balancer(name, 3, dtype=FLOAT, heads="sum").bind(model.trunk)
    balancer.backward(model()[0] * temperature)
    found = gradients(model)
    model.zero_grad()
    known, temperature.grad = temperature.grad, None
    (model()[0] * temperature).sum().backward()
    torch.testing.assert_close(known, temperature.grad, rtol=1e-12, atol=0)
    for key, gradient in gradients(model).items():
        if not key.startswith("trunk."):
            torch.testing.assert_close(found[key], gradient, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("bound", [True, False])
def test_parameters_that_are_frozen_added_or_thawed_on_the_way(bound: bool, name: str) -> None:
    model = Net()
    model.embedding.requires_grad_(False)
    balancer = build_balancer(name, 3, dtype=FLOAT)
    if bound:
        balancer.bind(model)
    balancer.backward(model()[0])
    balancer.step()
    assert model.embedding.weight.grad is None
    model.embedding.requires_grad_(True)
    model.trunk[0].bias.requires_grad_(False)
    model.stacked.weight = nn.Parameter(model.stacked.weight.detach().clone())
    model.zero_grad()
    fresh_model = Net()
    fresh_model.trunk[0].bias.requires_grad_(False)
    fresh = build_balancer(name, 3, dtype=FLOAT).bind(fresh_model)
    if name != "graddrop":  # which draws again
        fresh.load_state_dict({**fresh.state_dict(), **{k: v for k, v in balancer.snapshot().items() if "extra" in k}})
    balancer.backward(model()[0])
    fresh.backward(fresh_model()[0])
    found, expected = gradients(model), gradients(fresh_model)
    assert found.keys() == expected.keys() and "embedding.weight" in found and "trunk.0.bias" not in found
    if name == "mgda":
        for key, gradient in expected.items():
            torch.testing.assert_close(found[key], gradient, rtol=1e-11, atol=1e-14)


def test_a_module_that_is_called_twice_gives_both_outputs() -> None:
    model = Net()

    def losses() -> tuple[Tensor, Tensor, Tensor]:
        one, other = model.trunk(model.embedding(torch.arange(5))), model.trunk(model.embedding(torch.arange(3)))
        return (
            torch.stack([model.stacked(one)[:, 0].square().mean(), model.stacked(other)[:, 1].exp().mean()]),
            one,
            other,
        )

    balancer = build_balancer("nash_mtl", 2, dtype=FLOAT, gradients="features", shared_module="trunk").bind(model)
    balancer.backward(losses()[0])
    found, *features = losses()
    rows = []
    for loss in found:
        parts = torch.autograd.grad(loss, features, retain_graph=True, allow_unused=True)
        rows.append([torch.zeros_like(x) if g is None else g for g, x in zip(parts, features, strict=True)])
    jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    weights = balancer.coefficients
    torch.testing.assert_close(jacobian @ (weights @ jacobian), 1 / weights, rtol=1e-9, atol=0)


def test_copies_belong_to_no_model_and_hold_no_graph() -> None:
    model = Net()
    balancer = build_balancer("mgda", 3, dtype=FLOAT, gradients="features", shared_module="trunk").bind(model)
    balancer.backward(model()[0])
    balancer.step()
    copied_model = copy.deepcopy(model)  # as an average of the weights is made
    assert torch.equal(copied_model.trunk[0].weight, model.trunk[0].weight)
    stored = pickle.loads(pickle.dumps(model))  # as torch.save writes a whole model
    for copied in (copied_model, stored):
        copied()
    assert isinstance(balancer, GradientBalancer) and balancer._outputs_of_module == []
    plain = build_balancer("pcgrad", 3, dtype=FLOAT, order="identity").bind(model)
    plain.backward(model()[0])
    plain.step()
    for copied in (copy.deepcopy(plain), pickle.loads(pickle.dumps(plain))):
        expected, found = [], []
        for balancer, grads in ((plain, expected), (copied, found)):
            model.zero_grad()
            balancer.backward(model()[0])
            grads += gradients(model).values()
        assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-15) for a, b in zip(found, expected, strict=True))


def test_hooks_of_balancers_that_are_gone_are_gone() -> None:
    model = Net()
    for _ in range(3):
        build_balancer("mgda", 3, gradients="features", shared_module="trunk").bind(model)
        gc.collect()
    assert not model.trunk._forward_hooks


@pytest.mark.parametrize("own", [False, True], ids=["shared", "of one task"])
@pytest.mark.parametrize("tasks_per_pass", [None, 1])
def test_sparse_gradients(tasks_per_pass: int | None, own: bool) -> None:
    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        table, head = nn.Embedding(6, 3, sparse=sparse).double(), nn.Linear(3, 2).double()
        extra = nn.Embedding(4, 1, sparse=sparse and own).double()
        model = nn.ModuleList([table, head, extra])
        balancer = build_balancer("pcgrad", 2, dtype=FLOAT, tasks_per_pass=tasks_per_pass).bind(model)
        outputs = head(table(torch.tensor([0, 1, 1, 5])))
        losses = torch.stack(
            [outputs[:, 0].square().mean() + extra(torch.tensor([1])).sum(), outputs[:, 1].exp().mean()]
        )
        balancer.backward(losses)
        found.append([p.grad.to_dense() if p.grad.is_sparse else p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-15) for a, b in zip(*found, strict=True))


def test_a_task_that_trains_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = Net()
    losses, _ = model()
    losses = torch.stack([losses[0], losses[1].detach(), losses[2]])
    build_balancer("mgda", task_names=["a", "b", "c"], dtype=FLOAT).bind(model).backward(losses)
    assert "the loss of task 'b' depends on no parameter that is trained" in caplog.text
    with pytest.raises(TaskLossError, match=r"^the model has no parameter that is trained"):
        build_balancer("mgda", 3, dtype=FLOAT).bind(Net().requires_grad_(False)).backward(model()[0])
    numbers, ones = nn.Linear(2, 2, dtype=torch.complex128), torch.ones(2, dtype=torch.complex128)
    with pytest.raises(TaskLossError, match=r"^parameter 'weight' is complex"):
        build_balancer("mgda", 2, dtype=FLOAT).bind(numbers).backward(numbers(ones).abs())


def test_what_is_refused() -> None:
    for options, message in (
        ({"shared_parameters": []}, r"^balancer\.shared_parameters: is empty"),
        (
            {"shared_parameters": ["a", nn.Parameter(torch.ones(1))]},
            r"^balancer\.shared_parameters: names and parameters",
        ),
        ({"max_norm": 1.0, "every_n_steps": 2}, r"^balancer\.max_norm: 1.0 is not valid with every_n_steps: 2"),
        ({"max_norm": 1.0, "gradients": "features"}, r"^balancer\.max_norm: 1.0 is not valid with gradients"),
        ({"shared_module": "trunk"}, r"^balancer\.shared_module: is the module whose output"),
        ({"gradients": "features", "shared_parameters": ["a"]}, r"^balancer\.shared_parameters: are not looked at"),
        ({"every_n_steps": 0}, r"^balancer\.every_n_steps: 0 is not valid"),
        ({"tasks_per_pass": 0}, r"^balancer\.tasks_per_pass: 0 is not valid"),
    ):
        with pytest.raises(OptionError, match=message):
            build_balancer("mgda", 3, **options)
    with pytest.raises(OptionError, match=r"^balancer\.gradients: 'features' is not valid, expected 'parameters'"):
        build_balancer("torchjd", 3, aggregator="ConFIG", gradients="features")
    with pytest.raises(OptionError, match="'ls' does not look at gradients"):
        build_balancer("ls", 3, shared_parameters=[nn.Parameter(torch.ones(1))])
    with pytest.raises(OptionError, match=r"^balancer 'moco' remembers a gradient .*bind\(model\)"):
        build_balancer("moco", 3, dtype=FLOAT).backward(Net()()[0])
    assert isinstance(build_balancer("mgda", 3), GradientBalancer)
