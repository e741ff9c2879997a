"""The double loop of `bilb` against Algorithm 2 written out by hand, and what it must leave alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from hf_bilb import OptionError, build_balancer
from hf_bilb.errors import NonFiniteLossError, TaskLossError
from hf_bilb.losses.contract import TaskLosses
from tests.engine.algorithm_2 import D, K, Network, Part, Reference, part, trainable
from tests.engine.trained import ADAM, FEATURES, GAPS, LATE, NAMES, OPTIONS, PARTS, WHOLE, Trained, build

# --- the whole algorithm ------------------------------------------------------------------------------------------


def close(found: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12, msg=lambda text: f"{what}: {text}")


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], list[list[Part]], str]] = {
    "sgd": ({}, {}, WHOLE, "skip"),
    "adam": (ADAM, {}, WHOLE, "skip"),
    "softmax": ({**ADAM, "activation": "softmax"}, {}, WHOLE, "skip"),
    "power": ({**ADAM, "normalization": "power", "power": 0.4}, {}, WHOLE, "skip"),
    "log": ({**ADAM, "normalization": "log"}, {}, WHOLE, "skip"),
    "skip": ({**ADAM, "normalization": "power"}, {}, GAPS, "skip"),
    "hold": ({**ADAM, "normalization": "log"}, {}, GAPS, "hold"),
    "late_skip": ({**ADAM, "normalization": "log"}, {}, LATE, "skip"),
    "late_hold": ({**ADAM, "normalization": "power"}, {}, LATE, "hold"),
    "micro_batches": ({**ADAM, "normalization": "log"}, {}, PARTS, "skip"),
    "features": ({**ADAM, **FEATURES}, {}, WHOLE, "skip"),
    "features_log": ({**ADAM, **FEATURES, "activation": "sigmoid", "normalization": "log"}, {}, WHOLE, "skip"),
    "features_micro_batches": ({**ADAM, **FEATURES, "normalization": "power"}, {}, PARTS, "hold"),
    "dropout": (ADAM, {"dropout": 0.5}, WHOLE, "skip"),
    "dropout_micro_batches": ({**ADAM, **FEATURES}, {"dropout": 0.5}, PARTS, "skip"),
    "batch_norm": (ADAM, {"norm": True}, WHOLE, "skip"),
    "batch_norm_micro_batches": (ADAM, {"norm": True}, PARTS, "skip"),
    "tied": (ADAM, {"tied": True}, WHOLE, "skip"),
    "frozen_parameters": ({**ADAM, **FEATURES, "normalization": "log"}, {"frozen": True}, WHOLE, "skip"),
    "everything": (
        {**ADAM, **FEATURES, "normalization": "log"},
        {"dropout": 0.3, "norm": True, "tied": True, "frozen": True},
        PARTS,
        "hold",
    ),
}


@pytest.mark.parametrize(("options", "network", "batches", "absent_tasks"), CASES.values(), ids=CASES)
@pytest.mark.slow
def test_a_run_is_that_of_the_algorithm(
    options: dict[str, Any], network: dict[str, Any], batches: list[list[Part]], absent_tasks: str
) -> None:
    ours = Trained(Network(**network), absent_tasks, **options)
    by_hand = Reference(
        Network(**network), list(ours.balancer.objective.parameters()), {**OPTIONS, **options}, absent_tasks == "hold"
    )
    states = []
    for trained in (by_hand, ours):
        torch.manual_seed(5)
        for t, parts in enumerate(batches):
            trained.update(parts)
            if trained is ours:
                compare(ours, by_hand, t)
        states.append(torch.get_rng_state())
    # The inner passes have drawn nothing that shows.
    assert torch.equal(*states)
    for (name, one), (_, other) in zip(ours.model.named_buffers(), by_hand.x.named_buffers(), strict=True):
        close(one.double(), other.double(), name)
    assert not torch.equal(ours.x, ours.z)


def compare(ours: Trained, by_hand: Reference, t: int) -> None:
    run, report = by_hand.run, ours.balancer.lower_level_report
    close(ours.x, run.x[t], f"x after update {t}")
    close(ours.z, run.z[t], f"z after update {t}")
    close(ours.w, run.w[t], f"W after update {t}")
    assert report is not None
    found = (report.lower_gradient_at_z, report.lower_gradient_at_x, report.upper_gradient)
    assert [float(norm) for norm in found] == pytest.approx(run.norms[t], rel=1e-9, abs=1e-12)
    assert float(report.lower_at_x) == pytest.approx(run.lower_at_x[t], rel=1e-10, abs=1e-12)
    assert float(report.lower_at_z) == pytest.approx(run.lower_at_z[t], rel=1e-10, abs=1e-12)
    assert float(report.discrepancy) == pytest.approx(run.upper[t], rel=1e-10, abs=1e-12)


def test_the_correction_matters() -> None:
    # The comparison above is not empty: without the inner loop, or with z forgotten, W goes elsewhere.
    runs = {}
    for name, steps, forget in (("double", 3, False), ("single", 0, False), ("cold", 3, True)):
        trained = Trained(lower_level={**OPTIONS["lower_level"], "inner_steps": steps})
        for parts in WHOLE:
            if forget and trained.balancer._lower_level is not None:
                trained.balancer._lower_level.started = False
            trained.update(parts)
        runs[name] = trained.w
    assert (runs["double"] - runs["single"]).abs().max() > 1e-2
    assert (runs["double"] - runs["cold"]).abs().max() > 1e-4


@pytest.mark.parametrize("options", [{}, FEATURES], ids=["parameter", "features"])
def test_micro_batches_are_one_batch(options: dict[str, Any]) -> None:
    # Rows without labels for a task in one part: counts weigh, not parts.
    parts = [part(0, 5, missing=(1,)), part(1, 2), part(2, 1, missing=(0,))]
    together = Part(torch.cat([p.inputs for p in parts]), torch.cat([p.labels for p in parts]))
    one, several = (Trained(**ADAM, **options, normalization="log") for _ in range(2))
    for _ in range(4):
        one.update([together])
        several.update(parts)
        close(several.x, one.x, "x")
        close(several.z, one.z, "z")
        close(several.w, one.w, "W")


# --- what reevaluate may return -----------------------------------------------------------------------------------


def as_tensor(losses: Tensor, items: Tensor, features: Tensor) -> Tensor:
    return losses


def as_dict(losses: Tensor, items: Tensor, features: Tensor) -> dict[str, Tensor]:
    return dict(zip(NAMES, losses.unbind(), strict=True))


def with_whole_counts(losses: Tensor, items: Tensor, features: Tensor) -> TaskLosses:
    return TaskLosses(losses, items.long(), features)


@pytest.mark.parametrize("form", [as_tensor, as_dict])
def test_bare_losses_are_enough_where_backward_had_no_counts(form: Callable[..., Any]) -> None:
    results = []
    for returned in (TaskLosses, form):
        trained = Trained(**ADAM)
        for parts in WHOLE[:3]:
            trained.optimizer.zero_grad()
            trained.balancer.backward(trained.model(parts[0])[0])
            trained.optimizer.step()
            trained.balancer.step(reevaluate=lambda t=trained, p=parts[0], r=returned: r(*t.model(p)))
        results.append((trained.w, trained.z))
    for one, other in zip(*results, strict=True):
        close(one, other, "W or z")


def test_counts_may_be_whole_numbers() -> None:
    one, other = Trained(), Trained()
    for parts in GAPS[:3]:
        one.update(parts)
        other.update(parts, with_whole_counts)
        assert torch.equal(one.w, other.w) and torch.equal(one.z, other.z)


def test_bare_losses_are_refused_where_backward_had_counts() -> None:
    trained = Trained()
    trained.descend(GAPS[1])
    with pytest.raises(TaskLossError, match=r"^reevaluate: returned losses without counts, though backward"):
        trained.balancer.step(reevaluate=lambda: trained.model(GAPS[1][0])[0])


# --- the passes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_number_of_forward_passes(steps: int) -> None:
    one = Trained(lower_level={**OPTIONS["lower_level"], "inner_steps": steps})
    one.update(WHOLE[0])
    # x's, N with gradients, one at z_N; none at all without inner steps.
    assert one.model.calls == (1 if steps == 0 else 1 + steps + 1)
    several = Trained(lower_level={**OPTIONS["lower_level"], "inner_steps": steps})
    several.update(PARTS[0])
    # g of all parts must be known before the gradient of one: two passes for each of the N.
    assert several.model.calls == 3 * (1 if steps == 0 else 1 + 2 * steps + 1)


@pytest.mark.parametrize("batches", [WHOLE, PARTS], ids=["one", "several"])
def test_every_inner_pass_has_the_same_dropout_masks(batches: list[list[Part]]) -> None:
    trained = Trained(Network(dropout=0.5))
    for parts in batches[:2]:
        trained.descend(parts)
        trained.model.masks.clear()
        before = torch.get_rng_state()
        trained.balancer.step(reevaluate=[lambda p=p: TaskLosses(*trained.model(p)) for p in parts])
        assert torch.equal(torch.get_rng_state(), before)
        masks = trained.model.masks
        first = masks[: len(parts)]
        assert all(mask.any() for mask in first) and len(masks) > 3 * len(parts)
        for i, mask in enumerate(masks):
            assert torch.equal(mask, first[i % len(parts)])


class Replaced(Network):
    """Its buffers are replaced by new tensors, not changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(D, dtype=torch.float64))

    def forward(self, part: Part) -> tuple[Tensor, Tensor, Tensor]:
        losses, items, features = super().forward(part)
        self.mean = 0.9 * self.mean + 0.1 * features.detach().mean(dim=0)
        return losses, items, features


@pytest.mark.parametrize("model", [lambda: Network(norm=True), Replaced], ids=["batch_norm", "replaced"])
def test_step_leaves_model_and_gradients_as_they_are(model: Callable[[], Network]) -> None:
    trained = Trained(model(), **ADAM)
    for parts in PARTS[:2]:
        trained.descend(parts)
        kept = {name: (tensor, tensor.clone()) for name, tensor in trained.model.state_dict(keep_vars=True).items()}
        gradients = [parameter.grad.clone() for parameter in trainable(trained.model)]
        pointers = [parameter.data_ptr() for parameter in trained.model.parameters()]
        trained.balancer.step(reevaluate=[lambda p=p: TaskLosses(*trained.model(p)) for p in parts])
        now = trained.model.state_dict(keep_vars=True)
        for name, (tensor, value) in kept.items():
            assert now[name] is tensor and torch.equal(tensor, value), name
        assert pointers == [parameter.data_ptr() for parameter in trained.model.parameters()]
        assert all(torch.equal(p.grad, g) for p, g in zip(trainable(trained.model), gradients, strict=True))
        assert trained.model.training


def test_a_failure_on_the_way_leaves_the_model_as_it_is() -> None:
    trained = Trained(Network(norm=True))
    trained.update(WHOLE[0])
    trained.descend(WHOLE[1])
    before = {name: tensor.clone() for name, tensor in trained.model.state_dict().items()}
    random = torch.get_rng_state()
    calls = iter(range(10))

    def fail() -> TaskLosses:
        losses = TaskLosses(*trained.model(WHOLE[1][0]))
        torch.rand(3)
        if next(calls) == 2:
            raise KeyError("the user's own")
        return losses

    with pytest.raises(KeyError, match="the user's own"):
        trained.balancer.step(reevaluate=fail)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_z_holds_trainable_parameters_alone_and_tied_ones_once() -> None:
    keys = Trained(Network(frozen=True, tied=True)).balancer.state_dict().keys()
    names = {name.removeprefix("lower_level.z.") for name in keys if name.startswith("lower_level.z.")}
    assert names == {"middle.weight", "middle.bias", "again.bias", "heads.weight", "heads.bias"}


# --- state --------------------------------------------------------------------------------------------------------


def test_z_is_warm_started_and_kept() -> None:
    trained = Trained()
    start = trained.x
    trained.descend(WHOLE[0])
    # z starts where x was before the model's step, and moves in `step` alone.
    assert torch.equal(trained.z, start) and not torch.equal(trained.x, start)
    trained.balancer.step(reevaluate=lambda: TaskLosses(*trained.model(WHOLE[0][0])))
    after = trained.z
    assert not torch.equal(after, start)
    trained.descend(WHOLE[1])
    assert torch.equal(trained.z, after)


@pytest.mark.parametrize("way", ["restart", "start_from"])
def test_restart_and_start_from_let_z_start_at_x(way: str) -> None:
    trained = Trained(**ADAM)
    for parts in WHOLE[:3]:
        trained.update(parts)
    state = trained.balancer.snapshot() if way == "restart" else trained.balancer.state_dict()
    getattr(trained.balancer, way)(state)
    here = trained.x
    assert not torch.equal(trained.z, here)
    trained.descend(WHOLE[3])
    assert torch.equal(trained.z, here)


def test_snapshot_and_rollback_leave_z() -> None:
    trained = Trained(**ADAM)
    trained.update(WHOLE[0])
    snapshot, w = trained.balancer.snapshot(), trained.w
    assert not any(name.startswith("lower_level") for name in snapshot)
    trained.update(WHOLE[1])
    z = trained.z
    trained.balancer.rollback(snapshot)
    assert torch.equal(trained.z, z) and torch.equal(trained.w, w)
    assert all(torch.equal(trained.balancer.snapshot()[name], tensor) for name, tensor in snapshot.items())


class Transposed(Network):
    """Its parameters do not lie in memory as files want them."""

    def __init__(self) -> None:
        super().__init__()
        self.heads.weight = nn.Parameter(self.heads.weight.detach().t().contiguous().t())


@pytest.mark.parametrize("cut", [0, 1, 4])
@pytest.mark.parametrize("model", [Network, Transposed])
def test_resume_from_a_file_is_bit_identical(model: Callable[[], Network], cut: int, tmp_path: Path) -> None:
    trained = Trained(model(), "hold", **ADAM, normalization="log")
    for parts in GAPS[:cut]:
        trained.update(parts)
    save_file(trained.balancer.state_dict(), tmp_path / "balancer.safetensors")
    resumed = Trained(copy.deepcopy(trained.model), "hold", **ADAM, normalization="log")
    resumed.balancer.load_state_dict(load_file(tmp_path / "balancer.safetensors"))
    for parts in GAPS[cut:]:
        trained.update(parts)
        resumed.update(parts)
        for one, other in ((trained.x, resumed.x), (trained.z, resumed.z), (trained.w, resumed.w)):
            assert torch.equal(one, other)
    ours, theirs = trained.balancer.state_dict(), resumed.balancer.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_state_is_a_copy_and_z_no_alias_of_x() -> None:
    trained = Trained()
    before = trained.balancer.state_dict()
    kept = {name: tensor.clone() for name, tensor in before.items()}
    trained.update(WHOLE[0])
    assert all(torch.equal(before[name], kept[name]) for name in before)
    z, x = trained.z, trained.x
    with torch.no_grad():
        for parameter in trained.model.parameters():
            parameter.zero_()
    assert torch.equal(trained.z, z) and not torch.equal(trained.x, x)


def test_a_state_that_does_not_fit_the_model_changes_nothing() -> None:
    trained, other = Trained(), Trained(Network(frozen=True))
    trained.update(WHOLE[0])
    before = trained.balancer.state_dict()
    with pytest.raises(TaskLossError, match=r"entry 'lower_level.z.trunk.bias' is missing"):
        trained.balancer.load_state_dict(other.balancer.state_dict())
    unbound = build()
    with pytest.raises(TaskLossError, match=r"entry 'lower_level.started' is missing"):
        trained.balancer.load_state_dict(unbound.state_dict())
    assert all(torch.equal(before[name], tensor) for name, tensor in trained.balancer.state_dict().items())


# --- bind ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_binding_the_same_model_again_keeps_z() -> None:
    trained = Trained()
    trained.update(WHOLE[0])
    before = trained.balancer.state_dict()
    wrapped = DistributedDataParallel(trained.model)
    for again in (trained.model, wrapped, None, wrapped, trained.model):
        trained.balancer.bind(again)
        now = trained.balancer.state_dict()
        assert now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)
    other = Network()
    trained.balancer.bind(other)
    assert not trained.balancer.state_dict()["lower_level.started"]


def test_a_model_may_be_moved_between_bind_and_the_first_update() -> None:
    early = Trained(Network().float(), normalization="log")
    early.model.double()
    late = Trained(Network().float().double(), normalization="log")
    for parts in WHOLE[:2]:
        early.update(parts)
        late.update(parts)
    assert early.z.dtype == torch.float64
    assert torch.equal(early.z, late.z) and torch.equal(early.w, late.w)


def test_a_single_loop_keeps_no_second_model() -> None:
    single = build(lower_level="single_loop").bind(Network())
    assert not single.needs_model and not any(name.startswith("lower_level") for name in single.state_dict())
    assert build().needs_model and build().has_levels
    assert not build_balancer("uw", 2).has_levels


@pytest.mark.filterwarnings("ignore:FSDP is switching")
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("kind", ["dtensor", "fsdp", "fsdp_inside"])
def test_sharded_parameters_are_refused(kind: str) -> None:
    model: nn.Module = Network()
    if kind == "dtensor":
        mesh = init_device_mesh("cpu", (1,))
        model.heads.weight = nn.Parameter(distribute_tensor(model.heads.weight.detach(), mesh))
    elif kind == "fsdp":
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    else:
        model.middle = FullyShardedDataParallel(model.middle, device_id=torch.device("cpu"))
    with pytest.raises(OptionError, match=r"^lower_level: a double loop needs whole parameters, which FSDP has"):
        build().bind(model)
    # Who has no double loop may shard.
    build(lower_level="single_loop").bind(model)


# --- errors -------------------------------------------------------------------------------------------------------


def test_without_bind_or_reevaluate() -> None:
    unbound = build()
    losses = torch.ones(K, dtype=torch.float64, requires_grad=True)
    unbound.backward(losses)
    with pytest.raises(OptionError, match=r"^lower_level: a double loop needs balancer.bind\(model\)$"):
        unbound.step(reevaluate=lambda: losses)
    bound = Trained()
    bound.descend(WHOLE[0])
    with pytest.raises(OptionError, match=r"^lower_level: .* needs balancer.step\(reevaluate=lambda: model"):
        bound.balancer.step()
    with pytest.raises(RuntimeError, match=r"balancer.step\(\) needs a balancer.backward\(losses\) before it"):
        build().step(reevaluate=lambda: losses)


def test_losses_that_the_model_did_not_make_are_refused() -> None:
    # Without a gradient z would stand still, and nobody would know.
    trained = Trained()
    other = Network()

    def without_gradient() -> TaskLosses:
        with torch.no_grad():
            return TaskLosses(*trained.model(WHOLE[0][0]))

    for wrong in (without_gradient, lambda: TaskLosses(*other(WHOLE[0][0]))):
        trained.descend(WHOLE[0])
        with pytest.raises(OptionError, match=r"^lower_level: the losses of reevaluate\(\) do not depend on"):
            trained.balancer.step(reevaluate=wrong)
    # Gradients that the caller has switched off are switched on.
    one, other_run = Trained(), Trained()
    one.update(WHOLE[0])
    other_run.descend(WHOLE[0])
    with torch.no_grad():
        other_run.balancer.step(reevaluate=lambda: TaskLosses(*other_run.model(WHOLE[0][0])))
    assert torch.equal(one.w, other_run.w) and torch.equal(one.z, other_run.z)


def test_a_batch_without_any_task_moves_nothing_but_is_no_error() -> None:
    trained = Trained()
    trained.update(WHOLE[0])
    z, w = trained.z, trained.w
    trained.update([part(1, missing=(0, 1, 2))])
    assert torch.equal(trained.z, z) and torch.equal(trained.w, w)


def test_a_z_that_diverges_names_the_task_and_leaves_x() -> None:
    trained = Trained(lower_level={"inner_steps": 30, "inner_learning_rate": 1e6}, normalization="none")
    trained.descend([part(0, missing=(0,))])
    x, w = trained.x, trained.w
    with pytest.raises(NonFiniteLossError, match=r"^lower level: the loss of task 'b' is (nan|inf) at z") as caught:
        trained.balancer.step(reevaluate=lambda: TaskLosses(*trained.model(part(0, missing=(0,)))))
    assert "an inner_learning_rate below 1000000.0 may help" in str(caught.value) and "\n" not in str(caught.value)
    assert torch.equal(trained.x, x) and torch.equal(trained.w, w)


class Straight(nn.Module):
    """Losses that a step of z can bring below zero."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.losses = nn.Parameter(torch.tensor([1.0, 0.6, 2.0], dtype=torch.float64))

    def forward(self) -> Tensor:
        return self.losses * 1.0


@pytest.mark.parametrize("normalization", ["log", "power"])
def test_a_loss_at_z_outside_the_logarithm_is_named_and_spoils_nothing(normalization: str) -> None:
    model = Straight()
    balancer = build(lower_level={"inner_steps": 1, "inner_learning_rate": 3.0}, normalization=normalization).bind(
        model
    )
    balancer.backward(model())
    before = balancer.snapshot()
    if normalization == "power":
        # Below the reference the power goes on as its tangent: a value like any other.
        balancer.step(reevaluate=model)
        assert all(tensor.isfinite().all() for tensor in balancer.state_dict().values())
        return
    with pytest.raises(
        NonFiniteLossError, match=r"^lower level: the loss of task 'b' is -.* at z, which g cannot take"
    ):
        balancer.step(reevaluate=model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in balancer.snapshot().items())


# --- phases -------------------------------------------------------------------------------------------------------


def test_warm_up_has_no_inner_loop_and_z_starts_after_it() -> None:
    trained = Trained(normalization="log")
    z, w = trained.z, trained.w
    trained.balancer.phase = "warmup"
    for parts in WHOLE[:3]:
        trained.update(parts)
    assert trained.model.calls == 3
    assert torch.equal(trained.z, z) and torch.equal(trained.w, w)
    assert trained.balancer.reference_losses.isnan().all() and trained.balancer.lower_level_report is None
    # From there on it is the algorithm that begins at this x, with references of now.
    trained.balancer.phase = "balancing"
    by_hand = Reference(
        copy.deepcopy(trained.model), list(trained.balancer.objective.parameters()), {**OPTIONS, "normalization": "log"}
    )
    for t, parts in enumerate(WHOLE[3:]):
        by_hand.update(parts)
        trained.update(parts)
        compare(trained, by_hand, t)


def test_frozen_has_no_inner_loop() -> None:
    trained = Trained(**ADAM)
    for parts in WHOLE[:2]:
        trained.update(parts)
    trained.balancer.phase = "frozen"
    state, calls = trained.balancer.state_dict(), trained.model.calls
    for parts in WHOLE[2:]:
        trained.update(parts)
    assert trained.model.calls == calls + len(WHOLE[2:])
    now = trained.balancer.state_dict()
    changed = {name for name in state if not torch.equal(state[name], now[name])}
    assert changed == {"memory.last_losses", "guards.counts"}
    # Nor does step need a reevaluation.
    trained.descend(WHOLE[0])
    trained.balancer.step()
