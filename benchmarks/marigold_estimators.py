"""MARIGOLD's estimators of dR/dlambda: mean against finite differences, and spread, in each mode.

    python benchmarks/marigold_estimators.py [--output benchmarks/results] [--directions 500]

The problem is that of the reference files (`tests/parity_data/README.md`, problem R): a regression MLP with K tasks, 16
rows a batch, in float64. R is the mean of the K losses after one step of the model's optimizer on the weighted sum.
Every number comes from balancers at work: weights that are u itself, plain descent at rate 1, so that one update moves
u by minus the estimate.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from output import write_results
from torch import Tensor

from hf_bilb import build_balancer
from tests.balancers.reference import ProblemR
from tests.balancers.test_marigold import FLOAT, after_a_step, circle, optimizer_for, problem, smoothed_gradient

CENTERS = {2: [0.6, 0.4], 3: [0.5, 0.3, 0.2]}
BATCH, NEXT_BATCH = 4, 5
VARIANTS = (
    ("exact", "one_point"),
    ("exact", "one_point_baseline"),
    ("exact", "two_point"),
    ("commit", "one_point"),
    ("commit", "one_point_baseline"),
    ("lagged", "one_point"),
    ("lagged", "one_point_baseline"),
)


class Given(torch.nn.Module):
    """Hands out the direction that it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.direction = torch.zeros(0)

    def forward(self, like: Tensor) -> Tensor:
        return self.direction

    def end_update(self) -> None:
        return


def estimates(kind: str, directions: Tensor, radius: float, mode: str, estimator: str) -> Tensor:
    """`[n, m]`: what one update of each mode estimates, for each direction, always from the same model."""
    num_tasks = directions.shape[1]
    model = problem(num_tasks)
    optimizer = optimizer_for(model, kind)
    found = []
    for direction in directions:
        # Together: the copy of the optimizer then steps the copy of the model.
        twin, own = copy.deepcopy((model, optimizer))
        balancer = build_balancer(
            "marigold",
            num_tasks,
            dtype=FLOAT,
            mode=mode,
            estimator=estimator,
            parametrization="identity",
            perturbation=radius,
            optimizer="sgd",
            learning_rate=1.0,
            initial=CENTERS[num_tasks],
        ).bind(twin, own)
        balancer.objective.draws = Given()
        balancer.objective.draws.direction = direction
        before = balancer.state_dict()["objective.logits"]
        update(balancer, twin, own, BATCH)
        if mode == "lagged":  # it compares when the next batch's losses are known
            balancer.backward(twin(NEXT_BATCH))
        found.append(before - balancer.state_dict()["objective.logits"])
    return torch.stack(found)


def update(balancer: Any, model: ProblemR, optimizer: torch.optim.Optimizer, batch: int) -> None:
    balancer.look_ahead(lambda: model(batch))
    optimizer.zero_grad()
    balancer.backward(model(batch))
    optimizer.step()
    balancer.step(reevaluate=lambda: model(batch))


def checks() -> list[str]:
    """Rows of the table that compares means with finite differences."""
    rows = []
    for kind in ("sgd", "adam"):
        model = problem(2)
        optimizer = optimizer_for(model, kind)

        def upper(weights: Tensor, model: Any = model, optimizer: Any = optimizer) -> float:
            return float(after_a_step(model, optimizer, weights).mean())

        expected = smoothed_gradient(upper, torch.tensor(CENTERS[2], dtype=FLOAT), 0.2)
        for mode, estimator in VARIANTS:
            if mode == "lagged":
                continue  # another batch's losses: not the gradient of this batch's R
            mean = estimates(kind, circle(48), 0.2, mode, estimator).mean(dim=0)
            error = float((mean - expected).norm() / expected.norm())
            rows.append(f"| {kind} | {mode} | {estimator} | {float(expected.norm()):.4g} | {error:.1e} |")
    return rows


def spreads(count: int) -> list[str]:
    """Rows of the table of root mean square sizes, beside the size of the true gradient."""
    rows = []
    for num_tasks in (2, 3):
        drawn = torch.randn(count, num_tasks, dtype=FLOAT, generator=torch.Generator().manual_seed(0))
        directions = drawn / drawn.norm(dim=1, keepdim=True)
        for kind in ("sgd", "adam"):
            for mode, estimator in VARIANTS:
                cells = []
                for radius in (1e-3, 1e-1):
                    values = estimates(kind, directions, radius, mode, estimator)
                    cells.append(f"{float(values.square().sum(dim=1).mean().sqrt()):.3g}")
                size = float(estimates(kind, directions, 1e-3, "exact", "two_point").mean(dim=0).norm())
                rows.append(f"| {num_tasks} | {kind} | {mode} | {estimator} | {size:.3g} | {' | '.join(cells)} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, help="folder for marigold_estimators.md")
    parser.add_argument("--directions", type=int, default=500, help="how many for the spreads")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "# MARIGOLD's estimators",
        "",
        f"`python benchmarks/marigold_estimators.py --directions {arguments.directions}` (torch {torch.__version__})",
        "",
        "## Mean",
        "",
        "Two tasks, r = 0.2: the mean over 48 equally spaced directions, against central differences of R averaged",
        "over the disk of radius r (copies of model and optimizer, nothing of ours).",
        "",
        "| optimizer | mode | estimator | size of the gradient | relative error of the mean |",
        "| --- | --- | --- | ---: | ---: |",
        *checks(),
        "",
        "## Spread",
        "",
        f"Root mean square of the estimate over {arguments.directions} random directions, beside the size of the",
        "gradient itself. `lagged` takes R from the next batch.",
        "",
        "| K | optimizer | mode | estimator | gradient | r = 1e-3 | r = 1e-1 |",
        "| ---: | --- | --- | --- | ---: | ---: | ---: |",
        *spreads(arguments.directions),
    ]
    text = "\n".join(lines) + "\n"
    print(text, end="")
    write_results(arguments.output, "marigold_estimators", text)


if __name__ == "__main__":
    main()
