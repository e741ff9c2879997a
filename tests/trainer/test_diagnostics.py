"""`diagnostics`: the term that the single loop leaves out, recomputed in plain torch; training goes on as without."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch.func import functional_call

from hf_bilb import BilevelMTLTrainer, OptionError
from hf_bilb.cli import main
from hf_bilb.config.yaml import load_yaml
from hf_bilb.data import DATA_SETS
from tests.cli.made_up import MADE_UP, RECIPE
from tests.synthetic import SyntheticData, build_data
from tests.trainer.harness import (
    BATCH,
    FLOAT,
    Recorder,
    Run,
    arguments,
    batches,
    build_model,
    flat_parameters,
    run,
    untimed,
)
from tests.trainer.models import FeatureModel, NormalisedModel, build
from tests.trainer.test_double_loop import DOUBLE
from tests.trainer.test_single_task import feature_rows, ordinary
from tests.trainer.test_window import Passes

BILB: dict[str, Any] = {"name": "bilb", "learning_rate": 0.1}
PLAIN: dict[str, Any] = {
    **BILB, "normalization": "none", "pairs": "adjacent", "weight_denominator": "none", "discrepancy_weight": 0.02,
}  # fmt: skip
LOOK: dict[str, Any] = {"every_n_steps": 1, "inner_steps": 3, "inner_learning_rate": 0.05}
STEPS = 6
KEYS = {
    "bilevel/lower_gradient_at_z",
    "bilevel/lower_gradient_at_x",
    "bilevel/upper_gradient",
    "bilevel/lower_at_x",
    "bilevel/lower_at_z",
    "bilevel/discrepancy",
    "bilevel/gradient_ratio",
    "router/entropy",
    "router/clamped",
}


def data(missing: float = 0.0, steps: int = STEPS) -> SyntheticData:
    return build_data(steps * BATCH, dtype=FLOAT, missing=missing)


def looks(found: Run | BilevelMTLTrainer) -> list[dict[str, float]]:
    trainer = found.trainer if isinstance(found, Run) else found
    return [entry for entry in trainer.state.log_history if "bilevel/gradient_ratio" in entry]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# --- what is logged, and when -------------------------------------------------------------------------------------


def test_keys_and_steps(tmp_path: Path) -> None:
    found = run(tmp_path, data=data(steps=7), balancer=BILB, diagnostics={**LOOK, "every_n_steps": 3})
    assert [entry["step"] for entry in looks(found)] == [3, 6]
    assert all(entry.keys() == KEYS | {"step", "epoch"} for entry in looks(found))
    assert all(isinstance(entry[key], float) for entry in looks(found) for key in KEYS)


@pytest.mark.parametrize("logging_steps", [1, 2, 4])
def test_the_log_of_training_is_what_it_was(logging_steps: int, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"data": data(), "balancer": BILB, "logging_steps": logging_steps}
    found = run(tmp_path, diagnostics={**LOOK, "every_n_steps": 2}, **settings)
    plain = run(tmp_path, **settings)
    assert [entry["step"] for entry in looks(found)] == [2, 4, 6]
    without = [entry for entry in found.trainer.state.log_history if entry not in looks(found)]
    assert untimed(without) == untimed(plain.trainer.state.log_history)


def test_nothing_is_looked_at_where_nothing_is_learned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings: dict[str, Any] = {"balancer_warmup_steps": 2, "balancer_freeze_after": 5}
    for balancer in (BILB, DOUBLE):
        caplog.clear()
        found = run(tmp_path, data=data(steps=20), balancer=balancer, diagnostics=LOOK, **settings)
        assert [entry["step"] for entry in looks(found)] == [3, 4, 5]
        assert "does not move" not in caplog.text


def test_an_ordinary_model_has_no_levels(tmp_path: Path) -> None:
    trainer = BilevelMTLTrainer(
        model=ordinary(), args=arguments(tmp_path, balancer=BILB, diagnostics=LOOK), train_dataset=feature_rows()
    )
    trainer.train()
    assert trainer.state.global_step > 1 and looks(trainer) == []


# --- the numbers --------------------------------------------------------------------------------------------------


def plain_levels(w: Tensor, losses: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """g and f of `PLAIN`."""
    weighted = torch.sigmoid(w) * losses
    return weighted.sum(), (weighted[:-1] - weighted[1:]).abs().sum()


def default_levels(w: Tensor, losses: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """g and f of the defaults: 2 sqrt(l / l0), g over the fixed sum of the weights, f = (K - 1) mean over all pairs."""
    weighted = torch.sigmoid(w) * 2 * (losses / first).sqrt()
    pairs = [(weighted[i] - weighted[j]).abs() for i in range(len(w)) for j in range(i)]
    return weighted.sum() / torch.sigmoid(w).sum().detach(), torch.stack(pairs).mean() * (len(w) - 1)


Levels = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def losses_at(model: nn.Module, at: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    logits = functional_call(model, at, (batch["features"],)).logits
    present = batch["labels"].isfinite()
    errors = torch.where(present, logits - batch["labels"].nan_to_num(), 0.0).square()
    return errors.sum(0) / present.sum(0)


def gradient_norm(value: Tensor, w: Tensor) -> float:
    return float(torch.autograd.grad(value, w, retain_graph=True)[0].norm())


def expected_look(
    levels: Levels, x: Tensor, w: Tensor, batch: dict[str, Tensor], first: Tensor, steps: int, beta: float
) -> dict[str, float]:
    """Everything that is logged, from the definitions."""
    model = build_model(FLOAT)
    torch.nn.utils.vector_to_parameters(x, model.parameters())
    z = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    w = w.clone().requires_grad_()
    here, upper = levels(w, losses_at(model, z, batch), first)
    for _ in range(steps):
        point = {name: value.clone().requires_grad_() for name, value in z.items()}
        gradients = torch.autograd.grad(levels(w, losses_at(model, point, batch), first)[0], list(point.values()))
        z = {name: z[name] - beta * gradient for name, gradient in zip(z, gradients, strict=True)}
    there, _ = levels(w, losses_at(model, z, batch), first)
    shares = torch.sigmoid(w.detach()) / torch.sigmoid(w.detach()).sum()
    return {
        "bilevel/lower_gradient_at_z": gradient_norm(there, w),
        "bilevel/lower_gradient_at_x": gradient_norm(here, w),
        "bilevel/upper_gradient": gradient_norm(upper, w),
        "bilevel/gradient_ratio": gradient_norm(there, w) / gradient_norm(here, w),
        "bilevel/lower_at_x": float(here.detach()),
        "bilevel/lower_at_z": float(there.detach()),
        "bilevel/discrepancy": float(upper.detach()),
        "router/entropy": float(-(shares * shares.log()).sum() / torch.tensor(4.0, dtype=FLOAT).log()),
        "router/clamped": 0.0,
    }


class Routers(Recorder):
    """The router's parameters after each step, too."""

    def __init__(self) -> None:
        super().__init__()
        self.routers: list[Tensor] = []

    def on_step_end(self, *args: Any, balancer: Any, **kwargs: Any) -> None:
        super().on_step_end(*args, balancer=balancer, **kwargs)
        self.routers.append(balancer.state_dict()["objective.router.logits"])


def assert_as_defined(found: Run, levels: Levels, rows: SyntheticData, size: int) -> None:
    record = found.record
    assert isinstance(record, Routers) and len(record.routers) > 2
    x = [flat_parameters(build_model(FLOAT)), *record.parameters[:-1]]
    w = [torch.ones(4, dtype=FLOAT), *record.routers[:-1]]
    model = build_model(FLOAT)
    whole = batches(rows, size)
    first = losses_at(model, dict(model.named_parameters()), whole[0]).detach()
    for step, entry in enumerate(looks(found)):
        expected = expected_look(levels, x[step], w[step], whole[step], first, 3, 0.05)
        for key, value in expected.items():
            assert entry[key] == pytest.approx(value, rel=1e-11, abs=1e-14), (step, key)
    assert len(looks(found)) == len(record.routers)


@pytest.mark.parametrize(("balancer", "levels"), [(PLAIN, plain_levels), (BILB, default_levels)], ids=["plain", "ours"])
def test_the_values_as_defined(balancer: Any, levels: Levels, tmp_path: Path) -> None:
    rows = data(0.2)
    given: dict[str, Any] = {"trainer_arguments": {"callbacks": [Routers()]}}
    found = run(tmp_path, data=rows, balancer=balancer, diagnostics=LOOK, **given)
    found.record = given["trainer_arguments"]["callbacks"][0]
    assert_as_defined(found, levels, rows, BATCH)


@pytest.mark.parametrize("balance_over", ["micro_batch", "window"])
def test_under_accumulation_the_whole_update_is_looked_at(balance_over: str, tmp_path: Path) -> None:
    rows = build_data(64, dtype=FLOAT, missing=0.2)
    given: dict[str, Any] = {"trainer_arguments": {"callbacks": [Routers()]}}
    settings: dict[str, Any] = {"gradient_accumulation_steps": 4, "balance_over": balance_over, "balancer": PLAIN}
    found = run(tmp_path, data=rows, diagnostics=LOOK, **settings, **given)
    found.record = given["trainer_arguments"]["callbacks"][0]
    assert_as_defined(found, plain_levels, rows, 16)


def test_clamped_weights_are_counted(tmp_path: Path) -> None:
    balancer = {**BILB, "activation": "softmax", "initial_logits": [3.0, 0.0, 0.0, 1.5], "clamp": [0.1, 0.6]}
    found = run(tmp_path, data=data(), balancer=balancer, diagnostics=LOOK)
    # softmax is 0.75, 0.04, 0.04, 0.17: three lie outside.
    assert looks(found)[0]["router/clamped"] == 0.75


def test_a_feature_router(tmp_path: Path) -> None:
    balancer = {**PLAIN, "router": "features", "initial_logits": None}
    settings: dict[str, Any] = {"data": data(0.2), "balancer": balancer}
    plain = run(tmp_path, build(FeatureModel, num_router_features=8), **settings)
    found = run(tmp_path, build(FeatureModel, num_router_features=8), diagnostics=LOOK, **settings)
    assert torch.equal(plain.parameters, found.parameters)
    # By hand, in the first step: sigma = sigmoid(A z + b), z the batch's mean features at each point.
    model, batch = build(FeatureModel, num_router_features=8), batches(data(0.2))[0]
    router = BilevelMTLTrainer(model=model, args=arguments(tmp_path, balancer=balancer)).balancer.objective
    weight, bias = (parameter.detach().clone().requires_grad_() for parameter in router.parameters())

    def lower(at: dict[str, Tensor]) -> Tensor:
        features = functional_call(model, at, (batch["features"],)).router_features.mean(0)
        return (torch.sigmoid(weight @ features + bias) * losses_at(model, at, batch)).sum()

    z = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    norms = []
    for _ in range(4):
        value = lower(z)
        norms.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, [weight, bias], retain_graph=True)]))
        gradients = torch.autograd.grad(value, list(z.values()))
        z = {n: (p - 0.05 * g).detach().requires_grad_() for (n, p), g in zip(z.items(), gradients, strict=True)}
    first = looks(found)[0]
    assert first["bilevel/lower_gradient_at_x"] == pytest.approx(float(norms[0].norm()), rel=1e-11)
    assert first["bilevel/lower_gradient_at_z"] == pytest.approx(float(norms[3].norm()), rel=1e-11)


class Regression(nn.Module):
    """K = 3 linear regressions with the same coefficients: g is a quadratic function of them."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(2, dtype=FLOAT))

    def forward(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"losses": (features @ self.theta - labels.T).square().mean(1)}


def regression(noise: float) -> SyntheticData:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(16, 2, dtype=FLOAT, generator=generator)
    labels = features @ torch.tensor([1.0, -2.0], dtype=FLOAT)
    return SyntheticData(features, labels[:, None] + noise * torch.randn(16, 3, dtype=FLOAT, generator=generator))


def look_at_regression(folder: Path, noise: float) -> tuple[dict[str, float], SyntheticData]:
    rows = regression(noise)
    settings = {
        "task_names": ["a", "b", "c"],
        "per_device_train_batch_size": 16,
        "diagnostics": {**LOOK, "inner_steps": 400},
    }
    given = {**settings, "balancer": {**PLAIN, "initial_logits": [0.0, 1.0, 2.0]}}
    return looks(run(folder, Regression(), rows, **given))[0], rows


def test_z_reaches_the_minimum_of_a_convex_problem(tmp_path: Path) -> None:
    entry, rows = look_at_regression(tmp_path, 0.5)
    sigma = torch.sigmoid(torch.tensor([0.0, 1.0, 2.0], dtype=FLOAT))
    # argmin sum_k sigma_k |X theta - y_k|^2 is least squares on the weighted mean of the labels.
    target = (rows.labels * sigma).sum(1) / sigma.sum()
    minimum = torch.linalg.lstsq(rows.features, target[:, None]).solution[:, 0]
    losses = (rows.features @ minimum - rows.labels.T).square().mean(1)
    assert entry["bilevel/lower_at_z"] == pytest.approx(float((sigma * losses).sum()), rel=1e-10)
    gradient = (sigma * (1 - sigma) * losses).norm()
    assert entry["bilevel/lower_gradient_at_z"] == pytest.approx(float(gradient), rel=1e-10)
    # The tasks contradict each other: what the single loop leaves out does not vanish.
    assert 0.01 < entry["bilevel/gradient_ratio"] < 0.2


def test_the_ratio_vanishes_where_one_point_solves_all_tasks(tmp_path: Path) -> None:
    entry, _ = look_at_regression(tmp_path, 0.0)
    assert entry["bilevel/gradient_ratio"] < 1e-10 and entry["bilevel/lower_at_x"] > 1


# --- training goes on as without ----------------------------------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "batch": {},
    "micro_batch": {"gradient_accumulation_steps": 3},
    "window": {"gradient_accumulation_steps": 3, "balance_over": "window"},
    "clipped": {"max_grad_norm": 0.1, "optim": "adamw_torch"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_bit_for_bit_as_without(name: str, tmp_path: Path) -> None:
    def train(**more: Any) -> Run:
        model = build(NormalisedModel, dropout=0.3)
        return run(tmp_path, model, data(0.2, 12), balancer={**BILB, "preset": "qm9"}, **SETTINGS[name], **more)

    plain, found = train(), train(diagnostics=LOOK)
    assert len(looks(found)) == found.trainer.state.global_step >= 4
    assert same(dict(plain.trainer.model.state_dict()), dict(found.trainer.model.state_dict()))
    assert same(plain.trainer.balancer.state_dict(), found.trainer.balancer.state_dict())
    assert untimed(plain.steps) == untimed(found.steps)


def test_passes(tmp_path: Path) -> None:
    # N = 3: one look at x, three descents, one look at z; `accelerator.backward` once.
    for parts, expected in ((1, (1 + 3, 2, 1)), (4, (4 + 3 * 4, 4 + 3 * 4 + 4, 4))):
        passes = Passes()
        trainer = BilevelMTLTrainer(
            model=build_model(FLOAT),
            args=arguments(
                tmp_path,
                balancer=BILB,
                diagnostics={**LOOK, "every_n_steps": 2},
                per_device_train_batch_size=16 // parts,
                gradient_accumulation_steps=parts,
            ),
            train_dataset=build_data(48, dtype=FLOAT),
            callbacks=[passes],
        )
        passes.watch(trainer)
        trainer.train()
        # The first window's counts are compared with those of its losses, in a pass without gradients.
        first = (parts, parts if parts > 1 else 0, parts)
        assert passes.counts == [first, expected, (parts, 0, parts)]


def test_a_double_loop_is_reported_at_no_cost(tmp_path: Path) -> None:
    counts, found = [], []
    for diagnostics in (None, {"every_n_steps": 2}):
        passes = Passes()
        args = arguments(tmp_path, balancer=DOUBLE, diagnostics=diagnostics)
        trainer = BilevelMTLTrainer(model=build_model(FLOAT), args=args, train_dataset=data(), callbacks=[passes])
        passes.watch(trainer)
        trainer.train()
        counts.append(passes.counts)
        found.append(trainer)
    assert counts[0] == counts[1]
    assert torch.equal(*(flat_parameters(trainer.model) for trainer in found))
    assert [entry["step"] for entry in looks(found[1])] == [2, 4, 6]
    report = found[1].balancer.lower_level_report
    last = looks(found[1])[-1]
    assert report is not None
    assert last["bilevel/lower_at_z"] == float(report.lower_at_z)
    assert last["bilevel/gradient_ratio"] == float(report.lower_gradient_at_z / report.lower_gradient_at_x)
    assert last["bilevel/upper_gradient"] == float(report.upper_gradient)


@pytest.mark.parametrize("balancer", [BILB, DOUBLE], ids=["single", "double"])
def test_a_dropped_update_is_not_looked_at(balancer: Any, tmp_path: Path) -> None:
    rows = data()
    rows.labels[2 * BATCH, 1] = torch.inf
    settings: dict[str, Any] = {"data": rows, "balancer": balancer, "nonfinite_loss": "skip"}
    found = run(tmp_path, diagnostics=LOOK, **settings)
    assert [entry["step"] for entry in looks(found)] == [1, 2, 4, 5, 6]
    assert torch.equal(found.parameters, run(tmp_path, **settings).parameters)


def test_a_look_that_diverges_does_not_end_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = run(tmp_path, data=data(), balancer=BILB)
    with caplog.at_level(logging.WARNING, "hf_bilb"):
        found = run(tmp_path, data=data(), balancer=BILB, diagnostics={**LOOK, "inner_learning_rate": 1e200})
    assert torch.equal(plain.parameters, found.parameters) and looks(found) == []
    said = [message for message in caplog.messages if message.startswith("diagnostics, step 1: lower level: ")]
    assert len(said) == 1 and "inner_learning_rate below 1e+200 may help" in said[0]


# --- warnings -----------------------------------------------------------------------------------------------------


def warnings_of(folder: Path, caplog: pytest.LogCaptureFixture, steps: int = 12, **balancer: Any) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "hf_bilb"):
        run(folder, data=data(steps=steps), balancer={**BILB, **balancer}, diagnostics=LOOK)
    assert all(record.name == "hf_bilb.trainer.diagnostics" for record in caplog.records)
    return caplog.messages


def test_a_healthy_router_is_passed_over_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert warnings_of(tmp_path, caplog) == []


def test_a_collapsed_router_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # Of the task with the smallest loss: 0.05 is too large a step for it, with all the weight.
    given = {"activation": "softmax", "initial_logits": [0.0, 0.0, 9.0, 0.0], "normalization": "none"}
    (message,) = warnings_of(tmp_path, caplog, **given)
    assert message.startswith(
        "balancer bilb: the router has collapsed: one task has nearly all the weight (entropy 0.00"
    )


def test_one_task_has_all_the_weight_and_has_not_collapsed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = build_data(12 * BATCH, num_tasks=1, dtype=FLOAT)
    with caplog.at_level(logging.WARNING, "hf_bilb"):
        found = run(tmp_path, build_model(FLOAT, task_names=["only"]), rows, balancer=BILB, diagnostics=LOOK)
    assert len(looks(found)) == 12 and not any("collapsed" in message for message in caplog.messages)


def test_a_saturated_router_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = {"activation": "softmax", "initial_logits": [2.0, 2.0, -4.0, -4.0], "clamp": [0.2, 0.8]}
    (message,) = warnings_of(tmp_path, caplog, **given)
    assert message == (
        "balancer bilb: the router is saturated: 50% of its weights lie at their clamp, where they have no gradient"
    )


def test_an_inner_loop_that_ascends_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hf_bilb"):
        found = run(tmp_path, data=data(), balancer=BILB, diagnostics={**LOOK, "inner_learning_rate": 2.0})
    first = looks(found)[0]
    assert first["bilevel/lower_at_z"] > first["bilevel/lower_at_x"]
    assert [message for message in caplog.messages if "ascends" in message] == [
        f"balancer bilb: the inner loop ascends: g is {first['bilevel/lower_at_x']:.4g} at x and "
        f"{first['bilevel/lower_at_z']:.4g} at z; a smaller inner_learning_rate is needed for the ratio to mean "
        "something"
    ]


def test_the_z_of_a_double_loop_may_lag_behind_x(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # z hardly moves while x trains: no ascent.
    balancer = {**DOUBLE, "lower_level": {"inner_steps": 1, "inner_learning_rate": 1e-6}}
    with caplog.at_level(logging.WARNING, "hf_bilb"):
        found = run(tmp_path, data=data(steps=12), balancer=balancer, diagnostics=LOOK)
    assert any(entry["bilevel/lower_at_z"] > 1.1 * entry["bilevel/lower_at_x"] for entry in looks(found))
    assert caplog.messages == []


def test_a_router_that_never_moves_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert warnings_of(tmp_path, caplog, steps=10, learning_rate=0.0) == []
    (message,) = warnings_of(tmp_path, caplog, steps=14, learning_rate=0.0)
    assert message == (
        "balancer bilb: the router does not move: after 11 looks its parameters have changed by 0.0e+00 at most; "
        "a larger balancer learning_rate may help"
    )
    assert len(warnings_of(tmp_path, caplog, learning_rate=1e-5)) == 1
    assert warnings_of(tmp_path, caplog, learning_rate=1e-3) == []


def test_each_train_watches_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    args = arguments(tmp_path, balancer={**BILB, "learning_rate": 0.0}, diagnostics=LOOK)
    trainer = BilevelMTLTrainer(model=build_model(FLOAT), args=args, train_dataset=data(steps=11))
    with caplog.at_level(logging.WARNING, "hf_bilb"):
        trainer.train()
        assert len(caplog.messages) == 1
        trainer.train()
    assert len(caplog.messages) == 2 and caplog.messages[0] == caplog.messages[1]


# --- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"every_n_steps": 0}, "diagnostics.every_n_steps: 0 is not valid, expected an integer >= 1"),
        ({"every_n_steps": 2.5}, "diagnostics.every_n_steps: 2.5 is not valid, expected an integer"),
        ({"inner_steps": 0}, "diagnostics.inner_steps: 0 is not valid, expected an integer >= 1"),
        ({"inner_learning_rate": 0}, "diagnostics.inner_learning_rate: 0.0 is not valid, expected a number > 0"),
        ({"inner_learning_rate": "fast"}, "diagnostics.inner_learning_rate: 'fast' is not valid, expected a number"),
        ({"every_n": 5}, 'diagnostics.every_n: unknown option, value 5 (did you mean "every_n_steps"?)'),
        (True, "diagnostics: True is not a mapping of options"),
        ([5], "diagnostics: [5] is not a mapping of options"),
    ],
)
def test_options_are_checked_when_the_arguments_are_made(given: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError) as caught:
        arguments(tmp_path, diagnostics=given)
    assert str(caught.value) == message


def test_options_may_be_written_as_in_yaml(tmp_path: Path) -> None:
    options = arguments(tmp_path, diagnostics={"inner_learning_rate": "1e-3"}).diagnostics_options()
    assert options is not None and options.lower_level is not None
    assert options.lower_level.inner_learning_rate == 1e-3
    assert (options.lower_level.every_n_steps, options.lower_level.inner_steps) == (100, 10), "as documented"


@pytest.mark.parametrize("name", ["ls", "si", "uw"])
def test_a_method_without_levels_is_refused(name: str, tmp_path: Path) -> None:
    args = arguments(tmp_path, balancer=name, diagnostics={})
    with pytest.raises(OptionError) as caught:
        BilevelMTLTrainer(model=build_model(FLOAT), args=args)
    assert str(caught.value) == f"diagnostics: balancer {name!r} has no lower level to look at, expected bilb"


def test_in_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATA_SETS, "made_up", MADE_UP)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(RECIPE)
    override = "trainer.diagnostics={every_n_steps: 5, inner_learning_rate: 1e-3}"
    shown = CliRunner().invoke(main, ["show", "small.yaml", override], catch_exceptions=False)
    assert shown.exit_code == 0
    given = load_yaml(shown.stdout, "shown")["trainer"]["diagnostics"]
    assert given["every_n_steps"] == 5 and float(given["inner_learning_rate"]) == 1e-3
    refused = CliRunner().invoke(main, ["train", "small.yaml", "trainer.diagnostics.every_n=5"], catch_exceptions=False)
    assert refused.exit_code == 2 and refused.stderr.count("\n") == 1
    assert 'diagnostics.every_n: unknown option, value 5 (did you mean "every_n_steps"?)' in refused.stderr
    assert not (tmp_path / "run").exists()
