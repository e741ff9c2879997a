"""What every registered loss balancer and variant of it is run on: two ranks, windows of micro-batches, micro-batches
that are decided on one by one. `method_checks.py` says what is compared."""

from __future__ import annotations

from typing import Any

import torch

from hf_bilb.balancers.registry import GRADIENT_METHODS
from tests.contract.cases import CASES, GRADIENT_CASES, Case
from tests.distributed.micro_batch_loop import train_in_parts
from tests.distributed.models import FeatureModel, build_feature_model
from tests.distributed.training import SmallestGap, optimizer_settings, train, train_standalone, uneven_data
from tests.distributed.windows import over_windows, window_data
from tests.synthetic import SyntheticData, build_data

#: Named as those of a balancer that is built for four tasks: options of a method may name some of them.
NAMES = [f"task_{k}" for k in range(4)]
#: Rows of an update, in one, two or four micro-batches: 1 x 8, 2 x 4, 4 x 2.
UPDATE = 8
EPOCHS = 3
STEPS = 25 * EPOCHS
STEPS_BY_HAND = 30
ADAM = optimizer_settings(torch.float64)


def cases() -> dict[str, Case]:
    """Every case of the contract suite by name: registered method, variant of its options or normalization."""
    return {str(case): case for case in (*CASES, *GRADIENT_CASES)}


def only_normalizes(case: Case) -> bool:
    """Whether the case is a method's default with another normalization."""
    return case.label.startswith("normalization_")


def looks_again(case: Case) -> bool:
    """Whether an update runs its batch once more: a decision for each micro-batch would leave open which."""
    return (
        case.is_double_loop or case.option("reevaluate") == "same_batch" or case.option("mode") in ("exact", "commit")
    )


def looks_at_gradients(case: Case) -> bool:
    return case.name in GRADIENT_METHODS


def takes_samples(case: Case) -> bool:
    """Whether the micro-batches of an update are independent samples, so that their number counts."""
    return case.name in ("modo", "sdmgrad") and case.option("gradients") == "parameters"


def compares_updates(case: Case) -> bool:
    """Whether the method's parameters follow the losses from one update to the next."""
    return case.option("reevaluate") == "next_batch" or case.option("mode") == "lagged"


def is_linear(case: Case) -> bool:
    """Whether the coefficients of an update do not depend on its own losses, so that its micro-batches add up."""
    constant = case.name in ("ls", "rlw") or (case.name == "dwa" and case.option("window") == "epoch")
    return constant and case.option("normalization") == "none"


def balancer_of(case: Case) -> dict[str, Any]:
    """As a recipe says it; the length of the features is the model's."""
    options = {key: value for key, value in case.options.items() if key != "num_features"}
    if case.name == "bilb" and case.option("normalization") == "rescaled" and not case.option("smoothing"):
        # In the first update all rescaled losses are equal but for rounding, which gives each |d| a sign of its own.
        options["smoothing"] = 1e-4
    if case.name == "sdmgrad":
        # The official step size overshoots: rounding decides where the shares end.
        options["step_size"] = 0.1
    return {"name": case.name, **options}


def model_for_all() -> FeatureModel:
    return build_feature_model(torch.float64, task_names=NAMES)


# --- two ranks ----------------------------------------------------------------------------------------------------


def by_trainer(case: Case, absent: str) -> dict[str, Any]:
    """Three epochs, as schedules and records of epochs need them."""
    with SmallestGap() as gap:
        found = train(
            model_for_all(),
            uneven_data(torch.float64),
            balancer=balancer_of(case),
            absent_tasks=absent,
            num_train_epochs=EPOCHS,
            **ADAM,
        )
    return {**found, "smallest_gap": gap.value}


def by_hand(case: Case) -> dict[str, Any]:
    """DistributedDataParallel in a loop of one's own, with unequal shards; absent tasks are held."""
    options = balancer_of(case)
    if case.build(len(NAMES)).objective.num_features:
        options["num_features"] = model_for_all().config.num_router_features
    return train_standalone(
        options,
        model_for_all(),
        uneven_data(torch.float64),
        STEPS_BY_HAND,
        first_rank_rows=5,
        reevaluate_wrapped=case.looks_ahead,  # a pass through the wrapper that no backward pass follows
        absent_tasks="hold",
    )


def windows_on_ranks(case: Case) -> dict[str, Any]:
    """Two ranks take each update in four micro-batches of two rows, one process in one of sixteen."""
    return over_windows(model_for_all(), window_data(), whole=True, balancer=balancer_of(case), **ADAM)


def micro_batches_on_ranks(case: Case) -> dict[str, Any]:
    """A decision for each of two micro-batches, which two ranks have in halves."""
    return in_parts(case, 2, "micro_batch", rows_with_labels())


# --- accumulation -------------------------------------------------------------------------------------------------


def rows_with_labels(missing: float = 0.3) -> SyntheticData:
    return build_data(6 * UPDATE, dtype=torch.float64, missing=missing)


def in_parts(case: Case, parts: int, balance_over: str, data: SyntheticData) -> dict[str, Any]:
    """Updates of eight rows in `parts` micro-batches."""
    found = train(
        model_for_all(),
        data,
        balancer=balancer_of(case),
        accumulation=parts,
        global_batch=UPDATE,
        balance_over=balance_over,
        absent_tasks="skip",
        num_train_epochs=EPOCHS,
        logging_steps=4,
        **ADAM,
    )
    for entry in found["logs"]:
        entry.pop("epoch")  # counted in micro-batches, of which a short update has fewer
    return found


def over_window(case: Case, parts: int) -> dict[str, Any]:
    """Each epoch ends with an update of half the size."""
    return in_parts(case, parts, "window", build_data(5 * UPDATE + UPDATE // 2, dtype=torch.float64, missing=0.4))


def over_micro_batches(case: Case, parts: int) -> dict[str, Any]:
    """Beside the same by a plain loop."""
    by_loop = train_in_parts(
        balancer_of(case), model_for_all(), rows_with_labels(), update=UPDATE, parts=parts, epochs=EPOCHS
    )
    return {**in_parts(case, parts, "micro_batch", rows_with_labels()), "by_loop": by_loop}


def with_all_labels(case: Case, parts: int) -> dict[str, Any]:
    """Micro-batches with all labels: there a method that is linear in the losses is exact without a first pass."""
    return in_parts(case, parts, "micro_batch", rows_with_labels(missing=0.0))


def refused(case: Case) -> dict[str, Any]:
    try:
        in_parts(case, 2, "micro_batch", rows_with_labels())
    except ValueError as error:
        return {"error": str(error)}
    return {"error": None}
