"""torchjd's aggregators beside our methods, up to the factor between conventions; and the method `torchjd` itself."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any
from unittest import mock

import pytest
import torch
import torchjd.aggregation as jd

from hf_bilb.balancers.gradient.torchjd import split_torchjd_options
from hf_bilb.errors import OptionError
from tests.balancers.gradient.reference import build, direction_of, error, gradients, load

SHAPES = [(2, 8), (3, 20), (11, 50), (40, 100)]
shapes = pytest.mark.parametrize(("num_tasks", "size"), SHAPES)

#: Ours, its options, torchjd's, ours = factor(K) times torchjd's, and how far torchjd's own search goes.
PAIRS: dict[str, tuple[str, dict[str, Any], Any, Callable[[int], float], float]] = {
    "IMTL-G": ("imtl_g", {}, jd.IMTLG(), lambda k: 1.0, 1e-9),
    "Aligned-MTL": ("aligned_mtl", {}, jd.AlignedMTL(), float, 1e-9),
    "Aligned-MTL median": ("aligned_mtl", {"scale_mode": "median"}, jd.AlignedMTL(scale_mode="median"), float, 1e-9),
    "Aligned-MTL rmse": ("aligned_mtl", {"scale_mode": "rmse"}, jd.AlignedMTL(scale_mode="rmse"), float, 1e-9),
    "FairGrad": ("fairgrad", {}, jd.FairGrad(1.0), float, 1e-5),
    "FairGrad 2": ("fairgrad", {"alpha": 2.0}, jd.FairGrad(2.0), float, 1e-5),
    "Nash-MTL is FairGrad 1": ("nash_mtl", {}, jd.FairGrad(1.0), lambda k: 1.0, 1e-5),
    "MGDA": ("mgda", {}, jd.MGDA(epsilon=1e-12, max_iters=2000), float, 1e-2),
}


@shapes
@pytest.mark.parametrize("pair", PAIRS)
def test_ours_is_torchjd_s_times_a_factor(pair: str, num_tasks: int, size: int) -> None:
    name, options, aggregator, factor, tolerance = PAIRS[pair]
    jacobian = gradients(num_tasks, size, spread=0.3)
    found = direction_of(build(name, num_tasks, **options), jacobian)
    assert error(found, factor(num_tasks) * aggregator(jacobian)) < tolerance


def test_mgda_is_no_longer_than_what_torchjd_finds() -> None:
    jacobian = gradients(40, 100, spread=0.3)
    found = direction_of(build("mgda", 40), jacobian) / 40
    assert found.norm() < jd.MGDA()(jacobian).norm() < 1.05 * found.norm()


@pytest.mark.parametrize("num_tasks", [2, 3])
def test_recorded_directions_of_what_needs_more_packages(num_tasks: int) -> None:
    case = load(f"torchjd_K{num_tasks}")
    jacobian = case["J"]
    # Without the division by 1 + c^2, and the mean where ours is the sum.
    cagrad = direction_of(build("cagrad", num_tasks, c=0.4, rescale=0), jacobian)
    assert error(cagrad, num_tasks * case["dir_CAGrad04"]) < 1e-5  # an interior point method's
    assert error(direction_of(build("upgrad", num_tasks), jacobian), case["dir_UPGrad"]) < 1e-9
    aligned = direction_of(build("aligned_mtl", num_tasks, scale_mode="rmse"), jacobian)
    assert error(aligned, num_tasks * case["dir_AlignedMTL_rmse"]) < 1e-9


@shapes
def test_upgrad_is_torchjd_s_on_the_same_problem(num_tasks: int, size: int) -> None:
    # The one with torchjd's own sum of projections, the other ours.
    jacobian = gradients(num_tasks, size, spread=0.3)
    theirs = direction_of(build("torchjd", num_tasks), jacobian)
    assert error(direction_of(build("upgrad", num_tasks), jacobian), theirs) < 1e-12


@shapes
def test_pcgrad_with_the_same_orders(num_tasks: int, size: int) -> None:
    jacobian = gradients(num_tasks, size, spread=0.3)
    with mock.patch.object(torch, "randperm", torch.arange):
        theirs = jd.PCGrad()(jacobian)
    assert error(direction_of(build("pcgrad", num_tasks, order="identity"), jacobian), theirs) < 1e-9


@shapes
def test_gradvac_with_the_same_orders_over_steps(num_tasks: int, size: int) -> None:
    aggregator, method = jd.GradVac(beta=0.3, eps=0.0), build("gradvac", num_tasks, beta=0.3)
    for step in range(4):
        jacobian = gradients(num_tasks, size, step, spread=0.3)
        with mock.patch.object(torch, "randperm", torch.arange):
            theirs = aggregator(jacobian)
        assert error(direction_of(method, jacobian), theirs) < 1e-9
    assert error(method.targets, aggregator.gramian_weighting._phi_t) < 1e-9


@shapes
@pytest.mark.parametrize("leak", [0.0, 0.3])
def test_graddrop_with_the_same_draws(num_tasks: int, size: int, leak: float) -> None:
    jacobian = gradients(num_tasks, size)
    method = build("graddrop", num_tasks, leak=leak)
    draws = method.uniform(jacobian)
    with mock.patch.object(torch, "rand", return_value=draws):
        theirs = jd.GradDrop(leak=torch.full((num_tasks,), leak, dtype=torch.float64))(jacobian)
    assert error(direction_of(method, jacobian), theirs) < 1e-12


@shapes
def test_modo_and_sdmgrad_over_steps(num_tasks: int, size: int) -> None:
    modo, their_modo = build("modo", num_tasks, gamma=0.01), jd.MoDoWeighting(gamma=0.01, rho=0.1)
    sdmgrad, their_sdmgrad = build("sdmgrad", num_tasks, step_size=10.0), jd.SDMGradWeighting()
    tasks, losses = torch.arange(num_tasks), torch.ones(num_tasks, dtype=torch.float64)
    for step in range(4):
        cross = gradients(num_tasks, size, step, 0.3) @ gradients(num_tasks, size, step + 50, 0.3).T
        assert error(modo.weights(cross, losses, tasks), their_modo(cross)) < 1e-12
        # They add 1e-8 to the scale.
        assert error(sdmgrad.weights(cross, losses, tasks), their_sdmgrad(cross)) < 1e-6


# ---------------------------------------------------------------------------------------------- any class

NEEDED: dict[str, dict[str, Any]] = {
    "Constant": {"weights": [1, 2, 3, 4]},
    "CRMOGMWeighting": {"weighting": "MGDAWeighting", "alpha": 0.5},
    "FairGrad": {"alpha": 1.0},
    "Krum": {"n_byzantine": 1},
    "TrimmedMean": {"trim_number": 1},
    "ConFIG": {"pref_vector": [1, 2, 1, 1]},
    "GradDrop": {"leak": [0, 0.5, 0, 1]},
}
PACKAGES = ("CAGrad", "NashMTL")
CLASSES = [
    name
    for name in jd.__all__
    if not name.endswith(("Aggregator", "Weighting")) or name in ("CRMOGMWeighting", "MoDoWeighting")
]


@pytest.mark.parametrize("name", [name for name in CLASSES if name not in PACKAGES])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_class_gives_what_it_gives_by_itself(name: str, dtype: torch.dtype) -> None:
    arguments = NEEDED.get(name, {})
    method = build("torchjd", 4, aggregator=name, options=arguments)
    tensors = {k: torch.tensor(v).to(dtype) if isinstance(v, list) else v for k, v in arguments.items()}
    if name == "CRMOGMWeighting":
        tensors["weighting"] = jd.MGDAWeighting()
    if name in ("UPGrad", "DualProj"):
        tensors["projector"] = method._build([0, 1, 2, 3], torch.ones(1)).gramian_weighting.projector
    theirs = getattr(jd, name)(**tensors)
    for step in range(3):  # stateful ones go on
        jacobian = gradients(4, 9, step).to(dtype)
        torch.manual_seed(step)
        found = method.direction(jacobian, torch.ones(4), torch.arange(4))
        torch.manual_seed(step)
        expected = theirs(jacobian @ jacobian.T) @ jacobian if name.endswith("Weighting") else theirs(jacobian)
        assert found.gradient.dtype == dtype
        assert error(found.gradient, expected) < (1e-12 if dtype == torch.float64 else 2e-3)
        if found.weights is not None:
            assert error(found.weights.to(dtype) @ jacobian, found.gradient) < 1e-6


@pytest.mark.parametrize("num_tasks", [2, 3])
@pytest.mark.parametrize("name", ["UPGrad", "DualProj", "IMTLG", "ConFIG", "Mean", "Sum"])
def test_recorded_directions(name: str, num_tasks: int) -> None:
    case = load(f"torchjd_K{num_tasks}")
    found = direction_of(build("torchjd", num_tasks, aggregator=name), case["J"])
    assert error(found, case[f"dir_{name}"]) < 1e-9


def test_absent_tasks_take_their_numbers_with_them() -> None:
    method = build("torchjd", 3, aggregator="Constant", options={"weights": [1, 2, 4]})
    jacobian = gradients(2, 5)
    for first, second in ((0, 2), (1, 2), (0, 1)):
        found = method.direction(jacobian, torch.ones(2), torch.tensor([first, second]))
        torch.testing.assert_close(found.gradient, 2**first * jacobian[0] + 2**second * jacobian[1])


def test_frozen_it_remembers_nothing() -> None:
    options = {"aggregator": "CRMOGMWeighting", "options": {"weighting": "MGDAWeighting"}}
    found = []
    for frozen_step in (False, True):
        method = build("torchjd", 3, **options)
        direction_of(method, gradients(3, 9, 0))
        if frozen_step:
            direction_of(method.eval(), gradients(3, 9, 2))
        found.append(direction_of(method.train(), gradients(3, 9, 1)))
    assert torch.equal(found[0], found[1])
    direction_of(method, gradients(3, 9, 2))
    assert not torch.equal(direction_of(method, gradients(3, 9, 1)), found[0])


def test_building_it_draws_nothing() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    build("torchjd", 3, aggregator="Random")
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aggregator": "ConFG"}, "balancer.aggregator: 'ConFG' is not known (did you mean \"ConFIG\"?)"),
        (
            {"aggregator": "Krum", "options": {"n_byzantin": 1}},
            "balancer.options.n_byzantin: Krum has no such argument",
        ),
        ({"aggregator": "Krum", "options": {"n_byzantin": 1}}, '(did you mean "n_byzantine"?)'),
        ({"options": {"learning_rat": 1}}, '(did you mean "learning_rate"?)'),
        ({"aggregator": "Krum"}, "balancer.options.n_byzantine: is required by Krum"),
        ({"aggregator": "Krum", "options": {"n_byzantine": 3}}, "options: Krum refuses them: "),
        ({"aggregator": "UPGrad", "options": {"pref_vector": [1, 2]}}, "options: UPGrad refuses them: "),
        ({"aggregator": "NashMTL"}, "needs"),
        ({"aggregator": "CRMOGMWeighting", "options": {"weighting": "MGDAWeightin"}}, 'mean "MGDAWeighting"?'),
        ({"aggregator": "ConFIG", "heads": "weights"}, "balancer.heads: 'weights' is not valid, expected 'sum'"),
        ({"aggregator": "ConFIG", "every_n_steps": 2}, "balancer.every_n_steps: 2 is not valid, expected 1"),
        ({"aggregator": "Aggregator"}, "is not known"),
    ],
)
def test_mistakes_are_one_line(options: dict[str, Any], message: str) -> None:
    if message == "needs":
        if find_spec("cvxpy") is not None:
            pytest.skip("cvxpy is installed")
        message = "requires ['cvxpy', 'ecos'] to be installed"
    with pytest.raises(OptionError) as caught:
        build("torchjd", 3, **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_without_torchjd_it_says_what_to_install() -> None:
    missing = mock.patch.dict(sys.modules, {"torchjd": None, "torchjd.aggregation": None})
    with missing, pytest.raises(OptionError, match=r"pip install hf-bilb\[gradient\]"):
        build("torchjd", 3)


def test_keys_of_the_class_are_told_from_ours() -> None:
    split = split_torchjd_options({"aggregator": "Krum", "n_byzantine": 1, "heads": "sum"})
    assert split == {"aggregator": "Krum", "heads": "sum", "options": {"n_byzantine": 1}}
    split = split_torchjd_options({"aggregator": "CAGrad", "c": 0.4, "options": {"norm_eps": 1e-3}})
    assert split == {"aggregator": "CAGrad", "options": {"norm_eps": 1e-3, "c": 0.4}}
    assert split_torchjd_options({"max_norm": 1.0}) == {"max_norm": 1.0}
    with pytest.raises(OptionError, match=r"options\.c: is given twice, 0\.4 and 0\.5"):
        split_torchjd_options({"c": 0.4, "options": {"c": 0.5}})


def test_python_may_give_tensors() -> None:
    given = torch.tensor([1.0, 2.0, 3.0])
    method = build("torchjd", 3, aggregator="Constant", options={"weights": given})
    jacobian = gradients(3, 4)
    torch.testing.assert_close(direction_of(method, jacobian), given.double() @ jacobian)
