"""What is asserted of every method: the runs of a check, and their comparison. `make test` takes some checks of some
methods, `campaigns/test_every_method.py` all of every method."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.contract.cases import Case
from tests.distributed.checks import (
    LOG_TOLERANCE,
    MARGIN,
    TOLERANCE,
    assert_ranks_agree,
    assert_same_balancer,
    assert_same_logs,
)
from tests.distributed.conftest import Runs
from tests.distributed.methods import (
    STEPS,
    STEPS_BY_HAND,
    by_hand,
    by_trainer,
    cases,
    compares_updates,
    is_linear,
    looks_again,
    looks_at_gradients,
    micro_batches_on_ranks,
    only_normalizes,
    over_micro_batches,
    over_window,
    refused,
    takes_samples,
    windows_on_ranks,
    with_all_labels,
)
from tests.distributed.training import world_size
from tests.synthetic import relative_difference

EXACT = TOLERANCE["float64"]
OF_NUMBERS = LOG_TOLERANCE["float64"]


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        title: of its column in the campaign's report.
        runs: by name, which is unique among all checks that do not mean the same run.
        verify: asserts, with the results of one process and those of the ranks; returns the relative L2 difference of
            the parameters, NaN where no numbers are compared.
        applies: to which cases.
        on_ranks: whether two ranks run it, too.
    """

    title: str
    runs: Mapping[str, Callable[[Case], dict[str, Any]]]
    verify: Callable[[Runs, Case], float]
    applies: Callable[[Case], bool] = lambda case: True
    on_ranks: bool = False


def key(name: str, case: Case) -> str:
    """Of a run among the results."""
    return f"method/{name}/{case}"


def on_ranks(title: str, name: str, run: Callable[[Case], dict[str, Any]], **more: Any) -> Check:
    return Check(title, {name: run}, partial(verify_ranks, name), on_ranks=True, **more)


def verify_ranks(name: str, runs: Runs, case: Case) -> float:
    """Both ranks alike, bit for bit; parameters, balancer and logs those of one process with the whole batch."""
    at = key(name, case)
    found, expected = runs.ranks[0][at], runs.one[at]
    assert_ranks_agree(runs, at)
    assert found["steps"] == expected["steps"] == {"by_hand": STEPS_BY_HAND, "skip": STEPS}.get(name, found["steps"])
    if "smallest_gap" in expected:
        assert expected["smallest_gap"] > MARGIN["float64"], "equality would be a matter of luck"
    if "values" in found:
        torch.testing.assert_close(found["values"], expected["values"], rtol=OF_NUMBERS, atol=OF_NUMBERS)
    return equal(found, expected, case)


def equal(found: dict[str, Any], expected: dict[str, Any], case: Case) -> float:
    difference = relative_difference(found["parameters"], expected["parameters"])
    # The step of an Adam that has not run yet is the gradient's sign: two opposite trials then end at the same losses
    # but for rounding, which the first step of the method's own Adam takes for the signal.
    factor = 10 if case.option("estimator") == "two_point" else 1
    assert difference <= factor * EXACT, f"the parameters differ by {difference:.1e}"
    assert_same_balancer(found["balancer"], expected["balancer"], factor * OF_NUMBERS)
    if "logs" in found:
        assert_same_logs(found["logs"], expected["logs"], factor * OF_NUMBERS)
    return difference


def verify_window(parts: int, runs: Runs, case: Case) -> float:
    found, whole = (runs.one[key(f"window_{number}", case)] for number in (parts, 1))
    return equal(found, whole, case)


def verify_labels(parts: int, runs: Runs, case: Case) -> float:
    found, whole = (runs.one[key(f"all_labels_{number}", case)]["parameters"] for number in (parts, 1))
    difference = relative_difference(found, whole)
    assert difference <= EXACT, f"linear in the losses, but the parameters differ by {difference:.1e}"
    return difference


def verify_micro_batches(parts: int, runs: Runs, case: Case) -> float:
    found = runs.one[key(f"micro_batches_{parts}", case)]
    assert_one_step_an_update(found, case)
    difference = relative_difference(found["parameters"], found["by_loop"]["parameters"])
    assert difference <= EXACT, f"the parameters differ by {difference:.1e}"
    assert_same_objective(found["balancer"], found["by_loop"]["objective"])
    return difference


def assert_one_step_an_update(found: dict[str, Any], case: Case) -> None:
    """Of the method's own parameters, by the counter of its Adam."""
    steps = {float(number) for key, number in found["balancer"].items() if key.endswith(".step")}
    # What is compared with the update before it has nothing to compare the first one with.
    assert steps <= {found["steps"] - compares_updates(case)}


def assert_same_objective(balancer: dict[str, Any], expected: dict[str, Tensor]) -> None:
    """The parameters and records of the objective, by its own names."""
    prefix = "objective."
    own = {key.removeprefix(prefix): value for key, value in balancer.items() if key.startswith(prefix)}
    assert_same_balancer(own, expected, OF_NUMBERS)


def verify_refusal(runs: Runs, case: Case) -> float:
    error = runs.one[key("refused", case)]["error"]
    assert error is not None, "a batch cannot be run once more where each micro-batch is decided on by itself"
    assert error.startswith("balance_over: 'micro_batch' is not valid") and "'window'" in error
    return math.nan


def decides_on_parts(case: Case) -> bool:
    return not looks_again(case)


def by_losses_alone(case: Case) -> bool:
    return not looks_again(case) and not looks_at_gradients(case)


def as_one_batch(case: Case) -> bool:
    return not takes_samples(case)


def accumulation_checks(parts: int) -> dict[str, Check]:
    """Of an update of eight rows in `parts` micro-batches, in one process."""
    return {
        f"window_{parts}": Check(
            "`window`",
            {f"window_{number}": partial(over_window, parts=number) for number in (1, parts)},
            partial(verify_window, parts),
            as_one_batch,
        ),
        f"micro_batches_{parts}": Check(
            "`micro_batch`, plain loop",
            {f"micro_batches_{parts}": partial(over_micro_batches, parts=parts)},
            partial(verify_micro_batches, parts),
            by_losses_alone,
        ),
        f"all_labels_{parts}": Check(
            "`micro_batch`, linear",
            {f"all_labels_{number}": partial(with_all_labels, parts=number) for number in (1, parts)},
            partial(verify_labels, parts),
            is_linear,
        ),
    }


CHECKS: dict[str, Check] = {
    "skip": on_ranks("two ranks, `skip`", "skip", partial(by_trainer, absent="skip")),
    "hold": on_ranks("two ranks, `hold`", "hold", partial(by_trainer, absent="hold")),
    "by_hand": on_ranks("two ranks, own loop", "by_hand", by_hand),
    "windows": on_ranks("two ranks x 4, `window`", "windows", windows_on_ranks, applies=as_one_batch),
    "parts": on_ranks("two ranks x 2, `micro_batch`", "parts", micro_batches_on_ranks, applies=decides_on_parts),
    "refused": Check("`micro_batch` refused", {"refused": refused}, verify_refusal, looks_again),
    **accumulation_checks(2),
    **accumulation_checks(4),
}
#: What `make test` takes, of the sampled cases.
SAMPLED = ("skip", "by_hand", "windows", "window_4", "micro_batches_4", "all_labels_4", "refused")
#: What is asked of a method with another normalization, which is none of the method's business.
OF_NORMALIZATIONS = ("skip", "windows", "window_4")

#: In `make test`, of each method that does more than evaluate F.
SAMPLE = (
    "dwa-epoch",
    "famo-default",
    "famo-next_batch",
    "graddrop-default",
    "go4align-groups_2",
    "marigold-default",
    "marigold-exact",
    "gradnorm-default",
    "imtl_g-features",
    "marigold-lagged",
    "mgda-default",
    "moco-max_norm",
    "modo-default",
    "nash_mtl-every_3",
    "pcgrad-weights",
    "stch-schedule_mu",
)


def sample() -> list[tuple[Case, str]]:
    """Cases with names of checks, for `make test`."""
    found = cases()
    return [(found[name], check) for name in SAMPLE for check in checks_of(found[name], SAMPLED)]


def checks_of(case: Case, among: Iterable[str] = tuple(CHECKS)) -> list[str]:
    """Names of the checks that are run on `case`."""
    allowed = OF_NORMALIZATIONS if only_normalizes(case) else tuple(CHECKS)
    return [name for name in among if name in allowed and CHECKS[name].applies(case)]


def scenarios(pairs: Iterable[tuple[Case, str]]) -> dict[str, Callable[[], dict[str, Any]]]:
    """What this number of ranks runs for the checks."""
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for case, check in pairs:
        if world_size() == 1 or CHECKS[check].on_ranks:
            found.update({key(name, case): partial(run, case) for name, run in CHECKS[check].runs.items()})
    return found
