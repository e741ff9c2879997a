"""Replays a reference trajectory with our balancer: the recorded batches, the recorded initial parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
        balancer.step()
    snapshot()
    return {key: np.stack(rows) for key, rows in record.items() if rows}
