"""The methods follow the reference implementations, step by step, to 1e-9 in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_bilb import build_balancer
from tests.balancers.reference import FOLDER, load, replay

TOLERANCE = 1e-9

# What the presets say, written out as options.
CELEBA = {
    "router": "parameter",
    "activation": "sigmoid",
    "initial_logits": 1.0,
    "normalization": "none",
    "tau": "weights",
    "weight_denominator": "detached_sum",
    "pairs": "adjacent",
    "router_gradient": "both",
}
QM9 = {**CELEBA, "activation": "sigmoid_relu", "normalization": "log", "reference": "every_epoch"}


def options_of(name: str, case: dict, written_out: bool) -> tuple[str, dict, str | None]:
    """(balancer, options, state entry) for a reference file."""
    own = {"optimizer": case["optimizer"], "learning_rate": case.get("method_lr", case["lr"])}
    if name.startswith("ldc_"):
        variant = case["variant"]
        base = {"celeba": CELEBA, "qm9": QM9}[variant] if written_out else {"preset": variant}
        own.update(base, learning_rate="follow_model", discrepancy_weight=case["lamb"])
        if variant == "qm9":
            own["initial_logits"] = case["w_0"].tolist()
        return "bilb", own, "objective.router.logits"
    if name.startswith("uw_"):
        initial = {"initial_log_variance": float(case["state"][0][0])}
        return "uw", {**own, **initial}, "objective.log_variance"
    return name.split("_")[0], own, None


CASES = sorted(path.stem for path in FOLDER.glob("*.npz"))


def test_all_reference_files_are_here() -> None:
    assert len(CASES) == 10, CASES


@pytest.mark.parametrize("written_out", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_trajectory(name: str, written_out: bool) -> None:
    case = load(name)
    balancer, options, state_name = options_of(name, case, written_out)
    ours = replay(case, build_balancer(balancer, num_tasks=case["K"], dtype=torch.float64, **options), state_name)
    reference = {
        "losses": case["losses"],
        "total": case["total"],
        "coefficients": case["eff_weights"] if name.startswith("ldc_") else case["weights"],
        "params": case["params"],
    }
    if name.startswith("ldc_"):
        # The reference's parameter vector ends with the router.
        reference["params"], reference["state"] = case["params"][:, : -case["K"]], case["params"][:, -case["K"] :]
    elif state_name is not None:
        reference["state"] = case["state"]
    assert ours.keys() == reference.keys()
    for key, expected in reference.items():
        deviation = np.abs(ours[key] - expected).max()
        assert deviation <= TOLERANCE, f"{name}: {key} deviates by {deviation:.2e}"
