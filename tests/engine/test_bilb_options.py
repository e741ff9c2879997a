"""Every option of `bilb`: it does what it says, by the paper's formula, and changes nothing else."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_bilb import OptionError, build_balancer
from hf_bilb.balancers import resolve_options
from hf_bilb.balancers.bilb import PRESETS, BilbOptions, EdgeFraction
from hf_bilb.balancers.router import UniformLogits
from hf_bilb.errors import TaskLossError
from hf_bilb.losses.contract import TaskLosses
from tests.engine.paper import LOGITS, MODEL_RATE, D, K, Toy, by_hand, drawn, end_to_end

#: A parameter router with everything switched on that the paper has; every option, written out.
BASE: dict[str, Any] = {
    "preset": None,
    "router": "parameter",
    "num_features": None,
    "activation": "sigmoid",
    "initial_logits": LOGITS,
    "clamp": None,
    "tau": "weights",
    "weight_denominator": "detached_sum",
    "discrepancy_weight": 0.05,
    "pairs": "adjacent",
    "smoothing": 0.0,
    "detach_features": False,
    "router_gradient": "both",
    "lower_level": "single_loop",
    "learning_rate": 0.1,
    "optimizer": "sgd",
    "normalization": "initial",
    "power": 0.5,
    "reference": "first_step",
    "coefficient_floor": None,
    "coefficient_scale": "as_defined",
}
FEATURES = {**BASE, "router": "features", "num_features": D, "activation": "softmax", "initial_logits": None}
LOOP = {"inner_steps": 2, "inner_learning_rate": 0.1}
DOUBLE = {**BASE, "lower_level": LOOP}
bases = pytest.mark.parametrize("base", [BASE, FEATURES, DOUBLE], ids=["parameter", "features", "double_loop"])

#: What follows from F.
OF_F = {"value", "coefficients", "model_gradient", "router_step"}
OF_UPPER = OF_F | {"discrepancy"}
OF_WEIGHTS = OF_UPPER | {"weights"}


def observed(options: dict[str, Any], epochs: tuple[int, int] = (0, 0)) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Everything that an update gives, and W before it; the update before it has only given references."""
    model = Toy()
    balancer = build_balancer("bilb", K, dtype=torch.float64, **options)
    balancer.bind(model, torch.optim.SGD(model.parameters(), lr=MODEL_RATE))
    for t in (0, 1):
        model.zero_grad()
        balancer.discard()
        balancer.on_epoch_begin(epochs[t])
        losses, features = model(t)
        features.retain_grad()
        value = balancer.backward(losses, router_features=features)
    before = [parameter.detach().clone() for parameter in balancer.objective.parameters()]
    assert features.grad is None or torch.equal(features.grad, features.grad[:1].expand_as(features))
    balancer.step(reevaluate=lambda: TaskLosses(losses := model(1)[0], torch.ones_like(losses), model(1)[1]))
    after = [parameter.detach() for parameter in balancer.objective.parameters()]
    z = balancer.state_dict().get("lower_level.z.x", model.x.detach())
    return {
        "value": value,
        "weights": balancer.weights,
        "discrepancy": balancer._last.discrepancy,
        "coefficients": balancer.coefficients,
        "feature_gradient": torch.zeros(D, dtype=torch.float64) if features.grad is None else features.grad.sum(dim=0),
        "model_gradient": model.x.grad,
        "router_step": torch.cat([(new - old).flatten() for new, old in zip(after, before, strict=True)]),
        "reference_losses": balancer.reference_losses,
        "z": z,
    }, before


def by_formula(options: dict[str, Any], epochs: tuple[int, int] = (0, 0)) -> dict[str, Tensor]:
    """What the update gives, which is first compared with the formulas of the paper."""
    found, router = observed(options, epochs)
    expected = by_hand(router, options, epochs)
    assert found.keys() == expected.keys()
    for key, quantity in expected.items():
        torch.testing.assert_close(
            found[key], quantity, rtol=1e-11, atol=1e-13, msg=lambda text, key=key: f"{key}: {text}"
        )
    if options["coefficient_floor"] is None and options["coefficient_scale"] == "as_defined":
        straight = end_to_end(router, options, epochs)
        torch.testing.assert_close(found["model_gradient"], straight, rtol=1e-11, atol=1e-13)
    return found


def changes(base: dict[str, Any], epochs: tuple[int, int] = (0, 0), **option: Any) -> set[str]:
    """Which quantities differ, in any bit, from those of `base`; both are checked against the formulas."""
    one, other = by_formula(base, epochs), by_formula({**base, **option}, epochs)
    return {key for key in one if not torch.equal(one[key], other[key])}


def of(base: dict[str, Any], quantities: set[str], lower: bool = False) -> set[str]:
    """`quantities`, and the features' gradient where there are features; with `lower` z, which descends g."""
    features = {"feature_gradient"} if base["router"] == "features" else set()
    return quantities | features | ({"z"} if lower and base["lower_level"] != "single_loop" else set())


def fields(cls: type) -> Iterator[str]:
    """The options of a dataclass, and those of the dataclasses among their values."""
    for name, annotation in typing.get_type_hints(cls).items():
        if name not in {field.name for field in dataclasses.fields(cls)}:
            continue
        yield name
        for part in (annotation, *typing.get_args(annotation)):
            if dataclasses.is_dataclass(part):
                yield from fields(part)


@pytest.mark.parametrize("option", sorted(set(fields(BilbOptions))))
def test_every_option_has_its_test(option: str) -> None:
    assert f"test_{option}" in globals(), f"write test_{option}"


def test_the_options_here_are_all_there_are() -> None:
    assert BASE.keys() == {field.name for field in dataclasses.fields(BilbOptions)}
    assert {"inner_steps", "penalty_weight", "edge_fraction", "mean_of", "uniform", "seed"} <= set(fields(BilbOptions))


# --- f ------------------------------------------------------------------------------------------------------------


@bases
def test_discrepancy_weight(base: dict[str, Any]) -> None:
    assert changes(base, discrepancy_weight=0.02) == of(base, OF_F)
    nothing = by_formula({**base, "discrepancy_weight": 0.0})
    weights, normalised = nothing["weights"], Toy()(1)[0].detach() / Toy()(0)[0].detach()
    torch.testing.assert_close(nothing["value"], (weights * normalised).sum() / weights.sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("tau", ["weights", "one"])
@pytest.mark.parametrize("pairs", ["adjacent", "all"])
@bases
def test_edge_fraction(base: dict[str, Any], tau: str, pairs: str) -> None:
    base = {**base, "tau": tau, "pairs": pairs}
    expected = of(base, OF_F)
    if tau == "one":  # then f does not contain the router
        expected -= {"router_step", "feature_gradient"}
    assert changes(base, discrepancy_weight={"edge_fraction": 0.3}) == expected


def test_edge_fraction_with_a_penalty_weight() -> None:
    # F as a whole, lambda at its edge included, is multiplied with the weight of g.
    base = {**BASE, "discrepancy_weight": {"edge_fraction": 0.3}}
    once, twice = (by_formula({**base, "lower_level": loop}) for loop in ("single_loop", penalised(2.0, 0)))
    for key in ("value", "coefficients", "model_gradient", "router_step"):
        torch.testing.assert_close(twice[key], 2 * once[key], rtol=1e-13, atol=1e-15)


@bases
def test_pairs(base: dict[str, Any]) -> None:
    assert changes(base, pairs="all") == of(base, OF_UPPER)


@pytest.mark.parametrize("pairs", ["adjacent", "all"])
@bases
def test_smoothing(base: dict[str, Any], pairs: str) -> None:
    assert changes({**base, "pairs": pairs}, smoothing=0.02) == of(base, OF_UPPER)


@bases
def test_tau(base: dict[str, Any]) -> None:
    assert changes(base, tau="one") == of(base, OF_UPPER)


def test_tau_one_gives_the_router_nothing_from_f() -> None:
    one, other = (by_formula({**BASE, "tau": "one", "discrepancy_weight": weight}) for weight in (0.0, 0.05))
    assert torch.equal(one["router_step"], other["router_step"])
    assert not torch.equal(one["coefficients"], other["coefficients"])


# --- g ------------------------------------------------------------------------------------------------------------


@bases
def test_weight_denominator(base: dict[str, Any]) -> None:
    base = {**base, "activation": "sigmoid"}
    assert changes(base, weight_denominator="none") == of(base, OF_F, lower=True)
    # Whether the sum is detached is the business of sigma alone.
    through_features = {"model_gradient"} if base["router"] == "features" else set()
    assert changes(base, weight_denominator="sum") == of(base, {"router_step"}) | through_features


@pytest.mark.parametrize("base", [BASE, FEATURES], ids=["parameter", "features"])
def test_router_gradient(base: dict[str, Any]) -> None:
    # Through the features x descends g as before; that path is computed apart, which rounds.
    both, upper = by_formula(base), by_formula({**base, "router_gradient": "upper"})
    for key in both.keys() - {"router_step"}:
        torch.testing.assert_close(upper[key], both[key], rtol=1e-13, atol=1e-16)
    assert changes(base, router_gradient="upper") <= of(base, {"router_step", "model_gradient"})
    assert not torch.allclose(upper["router_step"], both["router_step"], rtol=0.1)
    alone = by_formula({**base, "router_gradient": "upper", "discrepancy_weight": 0.0})
    assert not alone["router_step"].any()


def test_router_gradient_upper_is_refused_in_a_double_loop() -> None:
    with pytest.raises(OptionError, match=r"^balancer.router_gradient: 'upper' is not valid with a double loop"):
        build_balancer("bilb", K, router_gradient="upper", lower_level=LOOP)
    # Without inner steps nothing is corrected.
    options = {**BASE, "lower_level": penalised(2.0, 0)}
    assert changes(options, router_gradient="upper") == {"router_step"}


# --- the router ---------------------------------------------------------------------------------------------------


def test_router() -> None:
    found = by_formula({**FEATURES, "activation": "sigmoid"})
    assert found["feature_gradient"].any()
    # Of the features a parameter router takes no notice; F is the same function of sigma.
    assert not by_formula(BASE)["feature_gradient"].any()
    model = Toy()
    balancer = build_balancer("bilb", K, dtype=torch.float64, **BASE)
    without = balancer.backward(model(0)[0])
    assert torch.equal(without, build_balancer("bilb", K, dtype=torch.float64, **BASE).backward(*pair(model(0))))


def pair(outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, None, Tensor]:
    return outputs[0], None, outputs[1]


def test_num_features() -> None:
    for length in (1, 7):
        state = build_balancer("bilb", K, **{**FEATURES, "num_features": length}).state_dict()
        assert state["objective.router.weight"].shape == (K, length)
        assert state["objective.router.bias"].shape == (K,)
    with pytest.raises(TaskLossError, match=rf"^router_features: got shape \(4, {D}\), expected \[B, 7\]$"):
        build_balancer("bilb", K, dtype=torch.float64, **{**FEATURES, "num_features": 7}).backward(*pair(Toy()(0)))
    for options, message in (
        ({"router": "features"}, "num_features: is required by router: features"),
        ({"router": "features", "num_features": 0}, "num_features: 0 is not valid, expected an integer >= 1"),
        ({"num_features": 3}, "num_features: has no effect with router: parameter"),
        ({"detach_features": True}, "detach_features: has no effect with router: parameter"),
    ):
        with pytest.raises(OptionError, match=rf"^balancer\.{message}"):
            build_balancer("bilb", K, **options)


@bases
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "sigmoid_relu"])
def test_activation(base: dict[str, Any], activation: str) -> None:
    if activation != base["activation"]:
        assert changes(base, activation=activation) == of(base, OF_WEIGHTS, lower=True)


@bases
def test_initial_logits(base: dict[str, Any]) -> None:
    assert changes(base, initial_logits=[0.1, 0.2, 0.3, 0.4, -2.0]) == of(base, OF_WEIGHTS, lower=True)
    name = "logits" if base["router"] == "parameter" else "bias"
    for value, logits in ((0.25, [0.25] * K), (LOGITS, LOGITS)):
        state = build_balancer("bilb", K, dtype=torch.float64, **{**base, "initial_logits": value}).state_dict()
        assert state[f"objective.router.{name}"].tolist() == logits
    with pytest.raises(OptionError, match=r"^balancer\.initial_logits: got 2 values, expected one for each of the 5"):
        build_balancer("bilb", K, **{**base, "initial_logits": [1.0, 2.0]})


def test_initial_logits_of_null_are_for_feature_routers() -> None:
    with pytest.raises(OptionError, match=r"^balancer\.initial_logits: null is for router: features"):
        build_balancer("bilb", K, initial_logits=None)


@pytest.mark.parametrize("base", [BASE, FEATURES], ids=["parameter", "features"])
def test_uniform(base: dict[str, Any]) -> None:
    options = {**base, "initial_logits": {"uniform": [0.2, 1.0], "seed": 4}}
    name = "logits" if base["router"] == "parameter" else "bias"
    drawn_logits = build_balancer("bilb", 1000, **options).state_dict()[f"objective.router.{name}"]
    assert drawn_logits.min() >= 0.2 and drawn_logits.max() < 1.0 and abs(drawn_logits.mean() - 0.6) < 0.03
    by_formula({**base, "initial_logits": {"uniform": [-2.0, 2.0]}})


@pytest.mark.parametrize("base", [BASE, FEATURES], ids=["parameter", "features"])
def test_seed(base: dict[str, Any]) -> None:
    def initial(seed: int) -> dict[str, Tensor]:
        state = build_balancer("bilb", K, **{**base, "initial_logits": {"uniform": [0, 1], "seed": seed}}).state_dict()
        return {key: tensor for key, tensor in state.items() if key.startswith("objective.")}

    one, again, other = initial(3), initial(3), initial(4)
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert not any(torch.equal(one[key], other[key]) for key in one)


@bases
def test_clamp(base: dict[str, Any]) -> None:
    low, high = (0.3, 0.6) if base["activation"] == "sigmoid" else (0.15, 0.25)
    assert changes(base, clamp=[low, high]) == of(base, OF_WEIGHTS, lower=True)
    free, clamped = by_formula(base), by_formula({**base, "clamp": [low, high]})
    # Cut, without renormalising what is left.
    assert clamped["weights"].tolist() == [min(max(weight, low), high) for weight in free["weights"].tolist()]
    at_bounds = (clamped["weights"] == low) | (clamped["weights"] == high)
    assert at_bounds.any() and not at_bounds.all()
    if base["router"] == "parameter":
        assert not clamped["router_step"][at_bounds].any() and clamped["router_step"][~at_bounds].all()


def test_detach_features() -> None:
    assert changes(FEATURES, detach_features=True) == {"feature_gradient", "model_gradient"}
    assert not by_formula({**FEATURES, "detach_features": True})["feature_gradient"].any()
    double = {**FEATURES, "lower_level": LOOP}
    assert changes(double, detach_features=True) == {"feature_gradient", "model_gradient", "z", "router_step"}


# --- the lower level ----------------------------------------------------------------------------------------------


def penalised(weight: float, steps: int = 2) -> dict[str, float]:
    return {**LOOP, "inner_steps": steps, "penalty_weight": weight}


@pytest.mark.parametrize("base", [BASE, FEATURES], ids=["parameter", "features"])
def test_lower_level(base: dict[str, Any]) -> None:
    assert changes(base, lower_level=LOOP) == {"router_step", "z"}
    # Without inner steps, and with g as it is, the single loop, bit for bit.
    assert changes(base, lower_level=penalised(1.0, 0)) == set()


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("base", [BASE, FEATURES], ids=["parameter", "features"])
def test_penalty_weight(base: dict[str, Any], steps: int) -> None:
    # z descends g itself, whatever its weight in F.
    base = {**base, "lower_level": penalised(1.0, steps)}
    assert changes(base, lower_level=penalised(3.0, steps)) == of(base, OF_F)


@pytest.mark.parametrize("base", [BASE, FEATURES], ids=["parameter", "features"])
def test_inner_steps(base: dict[str, Any]) -> None:
    one, three = ({**LOOP, "inner_steps": n} for n in (1, 3))
    assert changes({**base, "lower_level": one}, lower_level=three) == {"router_step", "z"}


@pytest.mark.parametrize("base", [BASE, FEATURES], ids=["parameter", "features"])
def test_inner_learning_rate(base: dict[str, Any]) -> None:
    slow, fast = ({**LOOP, "inner_learning_rate": rate} for rate in (0.05, 0.2))
    assert changes({**base, "lower_level": slow}, lower_level=fast) == {"router_step", "z"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner_steps": -1}, "inner_steps: -1 is not valid, expected an integer >= 0"),
        ({"inner_steps": 1.5}, "inner_steps: 1.5 is not valid, expected an integer"),
        ({"inner_learning_rate": 0}, "inner_learning_rate: 0.0 is not valid, expected a number > 0"),
        ({"penalty_weight": 0}, "penalty_weight: 0.0 is not valid, expected a number > 0"),
        ({"inner_step": 1}, r'inner_step: unknown option, value 1 \(did you mean "inner_steps"\?\)'),
    ],
)
def test_lower_level_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=rf"^balancer\.lower_level\.{message}"):
        build_balancer("bilb", K, lower_level={**LOOP, **options})


def test_lower_level_is_no_other_word() -> None:
    with pytest.raises(OptionError, match=r"^balancer\.lower_level: 'double_loop' is not valid, expected"):
        build_balancer("bilb", K, lower_level="double_loop")


# --- the router's optimizer ---------------------------------------------------------------------------------------


@bases
def test_learning_rate(base: dict[str, Any]) -> None:
    assert changes(base, learning_rate=0.2) == {"router_step"}
    assert changes(base, learning_rate="follow_model") == {"router_step"}
    assert not by_formula({**base, "learning_rate": 0.0})["router_step"].any()


@bases
def test_optimizer(base: dict[str, Any]) -> None:
    assert changes(base, optimizer="adam") == {"router_step"}


# --- normalization ------------------------------------------------------------------------------------------------


@bases
@pytest.mark.parametrize("kind", ["none", "rescaled", "log", "power"])
def test_normalization(base: dict[str, Any], kind: str) -> None:
    assert changes(base, normalization=kind) == of(base, OF_UPPER, lower=True)


@bases
def test_power(base: dict[str, Any]) -> None:
    assert changes({**base, "normalization": "power"}, power=0.25) == of(base, OF_UPPER, lower=True)
    assert changes(base, power=0.25) == set()


@bases
@pytest.mark.parametrize("reference", ["every_epoch", {"mean_of": 2}], ids=["every_epoch", "mean_of"])
def test_reference(base: dict[str, Any], reference: Any) -> None:
    # At the first step of an epoch all l / l0 are one: what is smooth has no ties.
    base = {**base, "normalization": "rescaled", "smoothing": 1e-3}
    expected = of(base, OF_UPPER, lower=True) | {"reference_losses"}
    assert changes(base, (0, 1), reference=reference) == expected
    # What no normalization looks at changes nothing.
    assert changes({**base, "normalization": "none"}, (0, 1), reference=reference) == {"reference_losses"}
    if reference == "every_epoch":
        assert changes(base, (0, 0), reference=reference) == set()


def test_mean_of() -> None:
    assert changes({**BASE, "normalization": "rescaled"}, reference={"mean_of": 1}) == set()
    assert "reference_losses" in changes({**BASE, "reference": {"mean_of": 2}}, reference="first_step")


# --- the coefficients ---------------------------------------------------------------------------------------------


@bases
def test_coefficient_floor(base: dict[str, Any]) -> None:
    free, floored = by_formula(base), by_formula({**base, "coefficient_floor": 0.9})
    assert changes(base, coefficient_floor=0.9) == {"coefficients", "model_gradient"}
    lifted = floored["coefficients"] != free["coefficients"]
    assert lifted.any() and not lifted.all()


@bases
@pytest.mark.parametrize("scale", ["sum_to_one", "sum_to_k"])
def test_coefficient_scale(base: dict[str, Any], scale: str) -> None:
    assert changes(base, coefficient_scale=scale) == {"coefficients", "model_gradient"}


# --- presets ------------------------------------------------------------------------------------------------------

DENSE = {"router": "features", "activation": "softmax", "clamp": (0.2, 0.8), "initial_logits": None}
PARAMETER = {"router": "parameter", "clamp": None, "weight_denominator": "detached_sum"}
#: The table of the official trainers, `shared/ALGORITHMS.md` section 1.11 (LDC-MTL @7c39465).
TABLE: dict[str, dict[str, Any]] = {
    "cityscapes": {
        **DENSE, "normalization": "none", "tau": "one", "weight_denominator": "none", "discrepancy_weight": 0.1,
    },
    "nyuv2": {
        **DENSE, "normalization": "rescaled", "reference": "first_step", "tau": "weights",
        "weight_denominator": "sum", "discrepancy_weight": 0.05,
    },
    "celeba": {
        **PARAMETER, "activation": "sigmoid", "initial_logits": 1.0, "normalization": "none", "tau": "weights",
        "discrepancy_weight": 0.01,
    },
    "qm9": {
        **PARAMETER, "activation": "sigmoid_relu", "initial_logits": UniformLogits((0.2, 1.0)), "normalization": "log",
        "reference": "every_epoch", "tau": "weights", "discrepancy_weight": 0.05,
    },
}  # fmt: skip
#: What all four have in common: the single loop, neighbours, |d|, nothing done to coefficients, features attached.
COMMON = {
    "pairs": "adjacent",
    "smoothing": 0.0,
    "detach_features": False,
    "router_gradient": "both",
    "lower_level": "single_loop",
    "optimizer": "adam",
    "coefficient_floor": None,
    "coefficient_scale": "as_defined",
}


@pytest.mark.parametrize("preset", TABLE)
def test_preset(preset: str) -> None:
    assert PRESETS.keys() == TABLE.keys()
    own = {"num_features": D} if TABLE[preset]["router"] == "features" else {}
    resolved: Any = resolve_options("bilb", {"preset": preset, **own})
    for key, value in {**COMMON, **TABLE[preset]}.items():
        assert getattr(resolved, key) == value and type(getattr(resolved, key)) is type(value), key
    # Written out they are the preset, in everything that can be measured.
    written_out = {key: getattr(resolved, key) for key in BASE if key != "preset"}
    assert dataclasses.replace(resolved, preset=None) == resolve_options("bilb", written_out)
    as_recipe = {**written_out, "clamp": list(resolved.clamp) if resolved.clamp else None}
    one, _ = observed({"preset": preset, **own}, (0, 1))
    other = by_formula({**as_recipe, "preset": None}, (0, 1))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("preset", TABLE)
def test_what_is_given_beside_a_preset_overrides_it(preset: str) -> None:
    given = {"router": "parameter", "initial_logits": 0.5, "discrepancy_weight": {"edge_fraction": 0.2}, "tau": "one"}
    resolved: Any = resolve_options("bilb", {"preset": preset, **given})
    assert (resolved.router, resolved.initial_logits, resolved.tau) == ("parameter", 0.5, "one")
    assert resolved.discrepancy_weight == EdgeFraction(0.2)
    assert resolved.weight_denominator == TABLE[preset]["weight_denominator"]


def test_a_feature_preset_says_what_it_needs() -> None:
    with pytest.raises(OptionError, match=r"^balancer\.num_features: is required by router: features"):
        build_balancer("bilb", K, preset="cityscapes")


def test_the_formulas_see_every_mistake_here() -> None:
    # The comparison is not empty: another lambda, W or epoch, and the formulas do not fit.
    found, router = observed(BASE)
    for wrong in (
        by_hand(router, {**BASE, "discrepancy_weight": 0.051}, (0, 0)),
        by_hand([router[0] + 1e-6 * drawn(K, seed=5)], BASE, (0, 0)),
    ):
        assert not torch.allclose(found["coefficients"], wrong["coefficients"], rtol=1e-9, atol=0)
