"""torchjd's scalarizers beside our methods: which does the same as which, up to what factor, and where they differ.

`PAIRS` are trained side by side on problem R (`README.md` beside the parity files), each with a model, an optimizer and
parameters of its own, as torchjd's documentation says; `DEVIATIONS` is what no factor puts right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torchjd.scalarization import (
    DWA,
    FAMO,
    IMTLL,
    STCH,
    UW,
    Constant,
    GeometricMean,
    Mean,
    Random,
    Scalarizer,
    Sum,
)

from hf_bilb import build_balancer
from hf_bilb.balancers import LossBalancer
from tests.balancers.reference import flat, load, losses_of, replay

#: Largest difference allowed, as a share of the largest number of its kind: both do nearly the same arithmetic.
TOLERANCE = 1e-13
#: FAMO's logits follow differences of nearly equal losses, which Adam then divides by their own size.
FAMO_TOLERANCE = 1e-11
TASKS = (2, 3, 11, 40)
EPOCH_LENGTH = 4
OWN_RATE = 0.025


def problem(num_tasks: int) -> dict[str, Any]:
    """Problem R: the recorded arrays for K = 2 and 3, made-up ones of the same kind for more tasks."""
    recorded = {2: "ls_K2_sgd", 3: "ls_K3_adam"}
    if num_tasks in recorded:
        case = load(recorded[num_tasks])
    else:
        rng = np.random.default_rng(num_tasks)
        case = {
            "K": num_tasks,
            "T": 20,
            "X": rng.normal(size=(20, 16, 5)),
            "Y": rng.normal(size=(20, 16, num_tasks)),
            "s": np.logspace(-1, 1, num_tasks),
            "W1_0": 0.5 * rng.normal(size=(5, 6)),
            "b1_0": 0.1 * rng.normal(size=6),
            "V_0": 0.4 * rng.normal(size=(6, num_tasks)),
            "c_0": 0.1 * rng.normal(size=num_tasks),
            **({"optimizer": "sgd", "lr": 0.005} if num_tasks == 11 else {"optimizer": "adam", "lr": 0.01}),
        }
    case["epoch_len"] = EPOCH_LENGTH
    return case


def preference(num_tasks: int, total: float = 1.0) -> list[float]:
    """K different numbers > 0 with the sum `total`."""
    return (total * np.linspace(0.5, 1.5, num_tasks) / num_tasks).tolist()


def as_tensor(numbers: list[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


@dataclass(frozen=True)
class Pair:
    """One of torchjd's scalarizers and what does the same here.

    Attributes:
        name: of the scalarizer, with its arguments where they matter.
        relation: what holds, in words.
        scalarizer: builds it from K.
        balancer, options: what is built here from K.
        factor: ours = factor times theirs, of F and so of the coefficients.
        value_factor: the same of the reported value alone, on top of `factor`.
        states: names of the own parameters, here and there.
        same_rate: whether the own parameters share the model's rate (one group, as in torchjd's examples).
        draws: whether both draw random numbers; they are then given the same ones.
        tolerance: of the largest difference, as a share of the largest number of its kind.
    """

    name: str
    relation: str
    scalarizer: Callable[[int], Scalarizer]
    balancer: str
    options: Callable[[int], Mapping[str, Any]] = lambda num_tasks: {}
    factor: float = 1.0
    value_factor: Callable[[int], float] = lambda num_tasks: 1.0
    states: tuple[str, str] | None = None
    same_rate: bool = False
    draws: bool = False
    tolerance: float = TOLERANCE

    def build(self, case: Mapping[str, Any]) -> LossBalancer:
        """Ours, whose own parameters have the optimizer that torchjd's get."""
        own = {} if self.balancer == "famo" else {"optimizer": case["optimizer"]}
        rate = {"learning_rate": "follow_model" if self.same_rate else OWN_RATE}
        options = {**own, **rate, **self.options(case["K"])}
        return build_balancer(self.balancer, case["K"], dtype=torch.float64, **options)


PAIRS = (
    Pair("Sum", "ls = Sum", lambda k: Sum(), "ls"),
    Pair(
        "Mean",
        "ls with coefficient_scale: sum_to_one has Mean's coefficients; it reports K Mean, the sum",
        lambda k: Mean(),
        "ls",
        lambda k: {"coefficient_scale": "sum_to_one"},
        value_factor=float,
    ),
    Pair(
        "Constant",
        "ls with task_priors = Constant",
        lambda k: Constant(as_tensor(preference(k))),
        "ls",
        lambda k: {"task_priors": preference(k)},
    ),
    Pair("Random", "rlw = Random, given the same normal numbers", lambda k: Random(), "rlw", draws=True),
    Pair("GeometricMean", "gls = GeometricMean", lambda k: GeometricMean(), "gls"),
    Pair("DWA()", "dwa with window: epoch = DWA", lambda k: DWA(), "dwa", lambda k: {"window": "epoch"}),
    Pair(
        "DWA(temperature=0.1)",
        "dwa with window: epoch = DWA",
        lambda k: DWA(0.1),
        "dwa",
        lambda k: {"window": "epoch", "temperature": 0.1},
    ),
    Pair(
        "UW, a group of its own",
        "uw = UW in a second group with rate 0.025",
        UW,
        "uw",
        states=("objective.log_variance", "log_var"),
    ),
    Pair(
        "UW, the model's rate",
        "uw with learning_rate: follow_model = UW in the model's group",
        UW,
        "uw",
        states=("objective.log_variance", "log_var"),
        same_rate=True,
    ),
    Pair(
        "IMTLL, a group of its own",
        "imtl_l = IMTLL in a second group with rate 0.025",
        IMTLL,
        "imtl_l",
        states=("objective.log_scale", "log_scale"),
    ),
    Pair(
        "IMTLL, the model's rate",
        "imtl_l with learning_rate: follow_model = IMTLL in the model's group",
        IMTLL,
        "imtl_l",
        states=("objective.log_scale", "log_scale"),
        same_rate=True,
    ),
    Pair(
        "FAMO()",
        "famo = FAMO with update() after the step",
        FAMO,
        "famo",
        states=("objective.logits", "_w"),
        tolerance=FAMO_TOLERANCE,
    ),
    Pair(
        "FAMO(min_losses, weight_decay=0.01)",
        "famo with min_losses and weight_decay = FAMO",
        lambda k: FAMO(k, min_losses=0.04 * as_tensor(preference(k)), weight_decay=0.01),
        "famo",
        lambda k: {"min_losses": [0.04 * number for number in preference(k)], "weight_decay": 0.01},
        states=("objective.logits", "_w"),
        tolerance=FAMO_TOLERANCE,
    ),
    Pair("STCH(0.5)", "stch = STCH, both with equal weights", lambda k: STCH(0.5), "stch", lambda k: {"mu": 0.5}),
    Pair(
        "STCH(0.5, weights, reference)",
        "stch with preference and ideal_point = STCH with weights of sum 1",
        lambda k: STCH(0.5, as_tensor(preference(k)), torch.full((k,), 0.01, dtype=torch.float64)),
        "stch",
        lambda k: {"mu": 0.5, "preference": preference(k), "ideal_point": 0.01},
    ),
    Pair(
        "STCH(0.5, weights of sum 4)",
        "stch with mu 0.125 = 1/4 STCH with mu 0.5: ours brings a preference to sum 1",
        lambda k: STCH(0.5, as_tensor(preference(k, total=4.0))),
        "stch",
        lambda k: {"mu": 0.125, "preference": preference(k, total=4.0)},
        factor=0.25,
    ),
)


@dataclass(frozen=True)
class Deviation:
    """Where torchjd does something else, and the test in `test_torchjd.py` that shows it."""

    scalarizers: str
    theirs: str
    ours: str
    test: str


DEVIATIONS = (
    Deviation(
        "Mean",
        "returns the mean",
        "`coefficient_scale` changes the coefficients, not the reported F: K times theirs",
        "test_trajectory",
    ),
    Deviation(
        "STCH",
        "takes `weights` as they are",
        "brings `preference` to sum 1; weights of sum S are mu / S and a factor S",
        "test_trajectory",
    ),
    Deviation(
        "Random",
        "draws from torch's global generator: any other random number changes the weights, a resume draws others",
        "draws from (seed, number of the update)",
        "test_random_draws_from_the_global_generator",
    ),
    Deviation(
        "DWA",
        "averages an epoch's batches, each alike",
        "averages its items; the same where all batches have as many",
        "test_dwa_averages_batches_where_we_average_items",
    ),
    Deviation(
        "DWA",
        "an epoch ends when `step()` is called; without it the weights stay 1",
        "an epoch begins with `on_epoch_begin(epoch)`; without it the first update is an error",
        "test_dwa_counts_epochs_by_calls",
    ),
    Deviation(
        "DWA",
        "weights are NaN once a task's mean loss was 0",
        "such a task has r = 1",
        "test_dwa_divides_by_a_mean_loss_of_zero",
    ),
    Deviation(
        "DWA",
        "`state_dict()` is empty: after a resume the weights are 1 for two epochs",
        "goes on as if not interrupted",
        "test_resume_of_dwa",
    ),
    Deviation(
        "FAMO",
        "`state_dict()` has the logits without Adam's moments: after a resume they go another way",
        "goes on as if not interrupted",
        "test_resume_of_famo",
    ),
    Deviation(
        "FAMO",
        "a loss below its bound gives F = NaN, and negative coefficients to the others",
        "an error that names the task",
        "test_famo_below_its_bound",
    ),
    Deviation(
        "GeometricMean",
        "a loss of 0 gives F = 0 with a NaN gradient",
        "an error that names the task",
        "test_geometric_mean_of_zero",
    ),
    Deviation(
        "UW, IMTLL",
        "own parameters are float32 unless moved, and in the model's optimizer, whose weight decay they get",
        "an Adam of their own with rate 0.025, no weight decay",
        "test_own_parameters_in_the_model_s_optimizer",
    ),
    Deviation(
        "all",
        "no absent tasks: the shape of the values may not change, and NaN stays NaN",
        "absent tasks take no part: the method over the others",
        "test_absent_tasks",
    ),
)


@contextmanager
def given_normals(draws: Tensor) -> Iterator[None]:
    """`torch.randn(K)` gives one row of `draws [n, K]` after another, each just once."""
    rows = iter(draws)

    def randn(*size: int, **_: Any) -> Tensor:
        row = next(rows)
        assert size == tuple(row.shape)
        return row.clone()

    with mock.patch.object(torch, "randn", randn):
        yield
    assert next(rows, None) is None, "fewer draws than updates"


def replay_torchjd(case: Mapping[str, Any], pair: Pair) -> dict[str, np.ndarray]:
    """What `reference.replay` records, of a model that is trained with torchjd's scalarizer times the pair's factor."""
    parameters = [torch.from_numpy(case[k].copy()).requires_grad_() for k in ("W1_0", "b1_0", "V_0", "c_0")]
    scalarizer = pair.scalarizer(case["K"]).double()
    groups: list[dict[str, Any]] = [{"params": parameters}]
    if isinstance(scalarizer, (UW, IMTLL)):
        groups.append({"params": list(scalarizer.parameters()), "lr": case["lr"] if pair.same_rate else OWN_RATE})
    optimizer = (torch.optim.Adam if case["optimizer"] == "adam" else torch.optim.SGD)(groups, lr=case["lr"])
    record: dict[str, list[np.ndarray]] = {"losses": [], "total": [], "coefficients": [], "params": [], "state": []}

    def snapshot() -> None:
        record["params"].append(flat(parameters))
        if pair.states is not None:
            record["state"].append(getattr(scalarizer, pair.states[1]).detach().numpy().copy())

    for t in range(case["T"]):
        snapshot()
        losses = losses_of(dict(case), parameters, t)
        losses.retain_grad()
        total = pair.factor * scalarizer(losses)
        optimizer.zero_grad()
        total.backward()
        assert losses.grad is not None
        record["losses"].append(losses.detach().numpy())
        record["total"].append(pair.value_factor(case["K"]) * total.detach().numpy())
        record["coefficients"].append(losses.grad.numpy())
        optimizer.step()
        if isinstance(scalarizer, FAMO):
            scalarizer.update(losses_of(dict(case), parameters, t))
        if isinstance(scalarizer, DWA) and (t + 1) % EPOCH_LENGTH == 0:
            scalarizer.step()
    snapshot()
    return {key: np.stack(rows) for key, rows in record.items() if rows}


def compare_with_torchjd(pair: Pair, num_tasks: int) -> dict[str, float]:
    """The largest difference in each kind of number over 20 steps, as a share of the largest number of its kind."""
    case = problem(num_tasks)
    draws = torch.from_numpy(np.random.default_rng(1).normal(size=(case["T"], num_tasks)))
    recorded = []
    for run in (
        lambda: replay(case, pair.build(case), None if pair.states is None else pair.states[0]),
        lambda: replay_torchjd(case, pair),
    ):
        with given_normals(draws) if pair.draws else nullcontext():
            recorded.append(run())
    ours, theirs = recorded
    assert ours.keys() == theirs.keys()
    assert all(ours[key].shape == theirs[key].shape for key in theirs)
    return {key: float(np.abs(ours[key] - theirs[key]).max() / np.abs(theirs[key]).max()) for key in theirs}
