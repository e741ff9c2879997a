"""Replays a reference trajectory with our balancer: the recorded batches, the recorded initial parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from hf_bilb.balancers import LossBalancer

FOLDER = Path(__file__).parent.parent / "parity_data"


def load(name: str) -> dict[str, Any]:
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        return {key: (file[key] if file[key].shape else file[key].item()) for key in file}


def losses_of(case: dict[str, Any], parameters: list[Tensor], t: int) -> Tensor:
    """The K losses of problem R or B at step t, as `README.md` beside the files defines them."""
    inputs, labels = torch.from_numpy(case["X"][t]), torch.from_numpy(case["Y"][t])
    w1, b1, v, c = parameters
    predictions = torch.tanh(inputs @ w1 + b1) @ v + c
    if case.get("variant") == "celeba":
        return torch.nn.functional.binary_cross_entropy(torch.sigmoid(predictions), labels, reduction="none").mean(0)
    offset = 0.0 if case.get("variant") == "qm9" else 0.05
    return torch.from_numpy(case["s"]) * (predictions - labels).square().mean(0) + offset


def features_of(case: dict[str, Any], parameters: list[Tensor], t: int) -> tuple[Tensor, Tensor]:
    """The K losses and the router features [B, 4K] of problem D at step t (`README.md` beside the files)."""
    inputs, labels = torch.from_numpy(case["X"][t]), torch.from_numpy(case["Y"][t])
    trunk, offset, heads, bias = parameters
    hidden = torch.tanh(torch.einsum("bd,kdh->kbh", inputs, trunk) + offset[:, None])
    predictions = torch.einsum("kbh,kh->bk", hidden, heads) + bias
    losses = torch.from_numpy(case["s"]) * (predictions - labels).square().mean(0) + 0.05
    pooled = hidden.unflatten(-1, (4, 2, 2)).mean(dim=(-2, -1))
    return losses, pooled.transpose(0, 1).flatten(1)


def replay_features(case: dict[str, Any], balancer: LossBalancer) -> dict[str, np.ndarray]:
    """Train T steps with a feature router; its parameters stand at the end of `params`, as in the reference."""
    parameters = [torch.from_numpy(case[f"{k}_0"].copy()).requires_grad_() for k in ("A", "a", "q", "r")]
    state = balancer.state_dict()
    state["objective.router.weight"] = torch.from_numpy(case["Wr_0"].copy())
    state["objective.router.bias"] = torch.from_numpy(case["br_0"].copy())
    balancer.load_state_dict(state)
    cls = torch.optim.Adam if case["optimizer"] == "adam" else torch.optim.SGD
    optimizer = cls(parameters, lr=case["lr"])
    balancer.bind(optimizer=optimizer)
    record: dict[str, list[np.ndarray]] = {"losses": [], "total": [], "coefficients": [], "params": [], "sigma": []}

    def snapshot() -> None:
        router = list(balancer.objective.parameters())
        record["params"].append(torch.cat([p.detach().ravel() for p in [*parameters, *router]]).numpy().copy())

    for t in range(case["T"]):
        snapshot()
        losses, features = features_of(case, parameters, t)
        optimizer.zero_grad()
        record["total"].append(balancer.backward(losses, router_features=features).numpy())
        record["losses"].append(losses.detach().numpy())
        record["coefficients"].append(balancer.coefficients.numpy().copy())
        record["sigma"].append(balancer.weights.numpy().copy())
        optimizer.step()
        balancer.step()
    snapshot()
    return {key: np.stack(rows) for key, rows in record.items()}


class ProblemR(torch.nn.Module):
    """Problem R as a model, which a double loop can be bound to."""

    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__()
        self.case = case
        self.weights = torch.nn.ParameterList(
            torch.from_numpy(case[k].copy()).requires_grad_() for k in ("W1_0", "b1_0", "V_0", "c_0")
        )

    def forward(self, t: int) -> Tensor:
        return losses_of(self.case, list(self.weights), t)


def flat(tensors: Any) -> np.ndarray:
    return torch.cat([tensor.detach().ravel() for tensor in tensors]).numpy().copy()


def replay_penalty(case: dict[str, Any], balancer: LossBalancer) -> dict[str, np.ndarray]:
    """The penalty form: x and W from the same (W, x, z_N), z warm-started and kept; everything the reference has."""
    model = ProblemR(case)
    optimizer = torch.optim.SGD(model.parameters(), lr=case["alpha"])
    balancer.bind(model, optimizer)
    names = ("losses", "sigma", "W", "f", "params")
    double = ("z", "g_x", "g_z", "norm_gradW_g_x", "norm_gradW_g_zN", "norm_gradW_f")
    record: dict[str, list[Any]] = {name: [] for name in (names + double if case["N"] else names)}
    for t in range(case["T"]):
        record["params"].append(flat(model.parameters()))
        record["W"].append(balancer.state_dict()["objective.router.logits"].numpy())
        optimizer.zero_grad()
        losses = model(t)
        balancer.backward(losses)
        record["losses"].append(losses.detach().numpy())
        record["sigma"].append(balancer.weights.numpy().copy())
        record["f"].append(balancer._last.discrepancy.numpy().copy())
        optimizer.step()
        balancer.step(reevaluate=lambda t=t: model(t))
        if case["N"]:
            report = balancer.lower_level_report
            state = balancer.state_dict()
            record["z"].append(flat(state[f"lower_level.z.weights.{i}"] for i in range(4)))
            levels = report.lower_at_x, report.lower_at_z
            gradients = report.lower_gradient_at_x, report.lower_gradient_at_z, report.upper_gradient
            for name, value in zip(double[1:], (*levels, *gradients), strict=True):
                record[name].append(value.numpy())
    record["params"].append(flat(model.parameters()))
    return {key: np.stack(rows) for key, rows in record.items()}


def replay_marigold(case: dict[str, Any], balancer: LossBalancer) -> dict[str, np.ndarray]:
    """MARIGOLD with the recorded directions; u and v stand before each step and at the end."""
    model = ProblemR(case)
    cls = torch.optim.Adam if case["ll"] == "adam" else torch.optim.SGD
    optimizer = cls(model.parameters(), lr=case["lr_ll"])
    balancer.bind(model, optimizer)
    names = ("losses", "losses_perturbed", "applied", "params", "u", "v")
    record: dict[str, list[np.ndarray]] = {name: [] for name in names}

    def snapshot() -> None:
        state = balancer.state_dict()
        record["params"].append(flat(model.parameters()))
        record["u"].append(state["objective.logits"].numpy())
        record["v"].append(state["objective.worst_logits"].numpy())

    def run(t: int) -> Tensor:
        losses = model(t)
        seen.append(losses.detach().numpy().copy())
        return losses

    for t in range(case["T"]):
        snapshot()
        seen: list[np.ndarray] = []
        direction = torch.from_numpy(case["u_dir"][t])
        with mock.patch.object(balancer.objective.draws, "forward", lambda like, direction=direction: direction):
            balancer.look_ahead(lambda t=t: run(t))
            optimizer.zero_grad()
            losses = model(t)
            balancer.backward(losses)
            optimizer.step()
            balancer.step(reevaluate=lambda t=t: run(t))
        record["losses"].append(losses.detach().numpy())
        record["losses_perturbed"].append(seen[-1])
        record["applied"].append(balancer.coefficients.numpy().copy())
    snapshot()
    return {key: np.stack(rows) for key, rows in record.items()}


class RecordedStarts(torch.nn.Module):
    """Draws that make the search of GO4Align's groups begin where it did in the reference."""

    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__()
        self.rows, self.num_tasks, self.update = case["init_idx"], case["K"], 0

    def forward(self, like: Tensor) -> Tensor:
        draws = torch.ones(self.num_tasks, dtype=like.dtype)
        for rank, k in enumerate(self.rows[self.update]):
            draws[k] = rank - len(self.rows[0])
        return draws

    def end_step(self) -> None:
        self.update += 1


def replay(case: dict[str, Any], balancer: LossBalancer, state_name: str | None) -> dict[str, np.ndarray]:
    """Train T steps and record what the reference recorded (losses, total, coefficients, parameters, state)."""
    parameters = [torch.from_numpy(case[k].copy()).requires_grad_() for k in ("W1_0", "b1_0", "V_0", "c_0")]
    cls = torch.optim.Adam if case["optimizer"] == "adam" else torch.optim.SGD
    optimizer = cls(parameters, lr=case["lr"])
    balancer.bind(optimizer=optimizer)
    record: dict[str, list[np.ndarray]] = {"losses": [], "total": [], "coefficients": [], "params": [], "state": []}

    def snapshot() -> None:
        record["params"].append(torch.cat([p.detach().ravel() for p in parameters]).numpy().copy())
        if state_name is not None:
            record["state"].append(balancer.state_dict()[state_name].numpy())

    for t in range(case["T"]):
        snapshot()
        if "epoch_len" in case:
            balancer.on_epoch_begin(t // case["epoch_len"])
        losses = losses_of(case, parameters, t)
        optimizer.zero_grad()
        record["total"].append(balancer.backward(losses).numpy())
        record["losses"].append(losses.detach().numpy())
        record["coefficients"].append(balancer.coefficients.numpy().copy())
        optimizer.step()
        balancer.step(reevaluate=lambda t=t: losses_of(case, parameters, t))  # FAMO alone asks for it
    snapshot()
    return {key: np.stack(rows) for key, rows in record.items() if rows}
