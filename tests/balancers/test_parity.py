"""The methods follow the reference implementations, step by step, to 1e-9 in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_bilb import build_balancer
from tests.balancers.reference import (
    FOLDER,
    RecordedStarts,
    load,
    replay,
    replay_features,
    replay_marigold,
    replay_penalty,
)

TOLERANCE = 1e-9
#: Of files whose reference works in float32 inside, relative to the largest number of a kind.
RELATIVE = {"dwa_window4": 1e-5, "go4align_g2": 1e-5}
#: Steps per epoch of the methods that count epochs, which only the files' `note` says.
EPOCH_LENGTH = {"dwa_epoch": 4, "stch_mu0.25": 4, "stch_mu1.0": 4}

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
    if name.startswith("famo_"):
        # The files' `note`; xi has an Adam of its own whatever trains the model.
        bound = {"weight_decay": 1e-2, "min_losses": 0.02} if "minloss" in name else {"weight_decay": 1e-3}
        return "famo", {**bound, "learning_rate": 0.025}, "objective.logits"
    if name.startswith("uw_"):
        initial = {"initial_log_variance": float(case["state"][0][0])}
        return "uw", {**own, **initial}, "objective.log_variance"
    if name.startswith("dwa_"):
        return "dwa", {**own, "window": "epoch" if "epoch" in name else 4}, None
    if name.startswith("stch_mu"):
        return "stch", {**own, "mu": float(method_of(name).removeprefix("stch_mu")), "warmup_epochs": 1}, None
    if name.startswith("stch_closed"):
        preference = (np.linspace(0.5, 1.5, case["K"]) / case["K"]).tolist()
        return "stch", {**own, "mu": 0.5, "preference": preference, "ideal_point": 0.01}, None
    if name.startswith("go4align_"):
        groups = {"num_groups": case["num_groups"], "step_size": case["robust_step_size"]}
        return "go4align", {**own, **groups, "assignment": "lloyd" if written_out else "kmeans"}, None
    if name.startswith("imtl_l_"):
        return "imtl_l", own, "objective.log_scale"
    return name.split("_")[0], own, None


FILES = sorted(path.stem for path in FOLDER.glob("*.npz"))
FEATURES = [name for name in FILES if name.startswith(("ldc_city", "ldc_nyu"))]
PENALTY = [name for name in FILES if name.startswith("ldc_penalty")]
MARIGOLD = [name for name in FILES if name.startswith("marigold")]
OTHERS = (*FEATURES, *PENALTY, *MARIGOLD)
CASES = [name for name in FILES if name not in OTHERS and not name.startswith(("toy", "metrics"))]


def test_all_reference_files_are_here() -> None:
    assert (len(CASES), len(FEATURES), len(PENALTY), len(MARIGOLD)) == (31, 6, 3, 4), FILES


# What the presets of the feature routers say, written out; `city_v1` is the first public version of Cityscapes.
DENSE = {
    "router": "features",
    "activation": "softmax",
    "initial_logits": None,
    "clamp": [0.2, 0.8],
    "pairs": "adjacent",
}
WRITTEN_OUT = {
    "city": {**DENSE, "normalization": "none", "tau": "one", "weight_denominator": "none"},
    "nyu": {**DENSE, "normalization": "rescaled", "tau": "weights", "weight_denominator": "sum"},
    "city_v1": {**DENSE, "normalization": "rescaled", "tau": "weights", "weight_denominator": "none"},
}
PRESETS = {"city": {"preset": "cityscapes"}, "nyu": {"preset": "nyuv2"}}


@pytest.mark.parametrize("written_out", [False, True])
@pytest.mark.parametrize("name", FEATURES)
def test_trajectory_of_feature_routers(name: str, written_out: bool) -> None:
    case = load(name)
    variant = case["variant"]
    options = WRITTEN_OUT[variant] if written_out or variant not in PRESETS else PRESETS[variant]
    num_tasks, length = case["Wr_0"].shape
    own = {"optimizer": case["optimizer"], "learning_rate": "follow_model", "discrepancy_weight": case["lamb"]}
    balancer = build_balancer("bilb", num_tasks, dtype=torch.float64, num_features=length, **{**options, **own})
    ours = replay_features(case, balancer)
    reference = {key: case[key] for key in ("losses", "total", "params", "sigma")}
    reference["coefficients"] = case["eff_weights"]
    compare(name, ours, reference)


@pytest.mark.parametrize("name", PENALTY)
def test_trajectory_of_the_penalty_form(name: str) -> None:
    case = load(name)
    balancer = build_balancer(
        "bilb",
        case["K"],
        dtype=torch.float64,
        activation="softmax",
        initial_logits=0.0,
        normalization="none",
        weight_denominator="none",
        pairs="adjacent",
        tau={"sigma": "weights", "one": "one"}[case["tau"]],
        smoothing=case["smooth_gamma"],
        discrepancy_weight=1.0,
        optimizer="sgd",
        learning_rate=case["alpha"],
        lower_level={
            "inner_steps": case["N"],
            "inner_learning_rate": case["beta"],
            "penalty_weight": case["lam"],
        },
    )
    ours = replay_penalty(case, balancer)
    compare(name, ours, {key: case[key] for key in ours})
    logits = balancer.state_dict()["objective.router.logits"].numpy()
    assert np.abs(logits - case["W_final"]).max() <= TOLERANCE


@pytest.mark.parametrize("name", MARIGOLD)
def test_trajectory_of_marigold(name: str) -> None:
    case = load(name)
    own = {"beta": case["beta"], "perturbation": case["r"], "learning_rate": case["lr_ul"], "initial": 0.0}
    mode = name.split("_")[1]
    balancer = build_balancer("marigold", case["K"], dtype=torch.float64, mode=mode, **own)
    ours = replay_marigold(case, balancer)
    reference = {key: case[key] for key in ("losses", "losses_perturbed", "params")}
    for key in ("u", "v"):
        reference[key] = np.concatenate([case[key], case[f"{key}_final"][None]])
    if mode == "commit":
        reference["applied"] = case["lam"] + case["r"] * case["u_dir"]
    else:
        scores = np.exp(case["beta"] * reference["u"][1:] / case["losses"])
        reference["applied"] = scores / scores.sum(axis=1, keepdims=True)
    compare(name, ours, reference)


def method_of(name: str) -> str:
    """The part of a file's name before the number of tasks."""
    return name.partition("_K")[0]


def compare(name: str, ours: dict, reference: dict) -> None:
    assert ours.keys() == reference.keys()
    for key, expected in reference.items():
        assert ours[key].shape == expected.shape, key
        deviation = np.abs(ours[key] - expected).max()
        relative = RELATIVE.get(method_of(name))
        tolerance = TOLERANCE if relative is None else relative * np.abs(expected).max()
        assert deviation <= tolerance, f"{name}: {key} deviates by {deviation:.2e}"


@pytest.mark.parametrize("written_out", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_trajectory(name: str, written_out: bool) -> None:
    case = load(name)
    if method_of(name) in EPOCH_LENGTH:
        case["epoch_len"] = EPOCH_LENGTH[method_of(name)]
    balancer, options, state_name = options_of(name, case, written_out)
    built = build_balancer(balancer, num_tasks=case["K"], dtype=torch.float64, **options)
    if options.get("assignment") == "lloyd" and "init_idx" in case:
        built.objective.starts = RecordedStarts(case)
    ours = replay(case, built, state_name)
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
    if name.startswith("stch_mu"):
        # The official code takes the largest exponent off and does not put it back: the gradient is the same.
        largest = np.log(case["losses"] / case["losses"][4:8].mean(0)).max(1)
        reference["total"] = case["total"] + case["K"] * largest * (np.arange(case["T"]) >= 8)
    compare(name, ours, reference)
