"""The toy figure of the papers: where the methods end on a problem with two parameters and two tasks.

    python examples/toy.py                    # every method, 50,000 steps, toy.png: about an hour on one core
    python examples/toy.py --method ls --method bilb --method famo --method mgda --steps 20000 --output four.png

The problem is CAGrad's (Liu et al. 2021), as FAMO changed it (Liu et al. 2023, experiments/toy/problem.py): above
x2 = 0 two narrow logarithmic valleys, below it two bowls, the first loss scaled by 0.1. Five starts, Adam with 1e-3,
float64; draws matter for MARIGOLD alone. Figure 1 of BiLB4MTL (arXiv 2502.08585) shows the end of the method as one
star at (-1.51, -15.1), the point of the Pareto front where l1 / 0.1 = l2. Its settings are not published; those of
`METHODS["bilb"]` end there from the three lower starts, within 15,000 steps; from the two upper ones they are still in
the valleys after 50,000 (from (-8.5, 7.5) after 200,000). The plain sum of l1 / 0.1 and l2 is lowest in the star as
well and ends there from the same three: the figure shows what the scales do more than what a balancer does.

FAMO has the settings of its official toy run and ends where that does, on the front from every start: l2 = -15.5,
-15.0, -14.6, -16.3, -12.3. Its record is met to the last bit for all 50,000 steps (another order of the same sums: to
2e-4).

MARIGOLD has no toy run to go by. The losses are negative, which rules out its softmax(beta u / f); here the weights are
a plain softmax, the losses are in units of their scales, and perturbation and learning rate are ours. With ten draws
the three lower starts always end on the front, at l2 = -15.0 +- 0.9, -15.7 +- 0.7 and -14.8 +- 0.9; the upper ones left
the valleys in three and four of ten runs. The weights go on swinging. `exact` with `two_point` ends alike, with about
half the spread, and costs several times as much.

The gradient methods take the losses as they are. The figure names the processor time of all five starts; for 10,000
steps it was 23 s with LS, 45 s with FAMO, about 100 s with MGDA, PCGrad and CAGrad, 138 s with Nash-MTL, on a machine
that had other work. By then all four had come down from the two valleys to x2 = 0 or below, LS had not; Nash-MTL was on
the front from three starts, from (0, 0) in the star, MGDA near the ends of the front. PCGrad, CAGrad (c = 0.4) and
FairGrad clip to norm 1, as official code does. With alpha = 1 FairGrad has the direction of Nash-MTL, and Adam does not
see its length: their paths are the same.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from torch import Tensor

from hf_bilb import build_balancer
from hf_bilb.reporting.files import save_figure
from hf_bilb.reporting.plots import BLACK, BLUE, GREEN, ORANGE, PURPLE, VERMILLION

STARTS = ((-8.5, 7.5), (0.0, 0.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0))
LEARNING_RATE = 1e-3
FRONT_X1, FRONT_X2 = (-7.0, 7.0), -8.3552
SCALE = 0.1  # of the first loss


@dataclass(frozen=True)
class Method:
    """How a method is run: its balancer, the scales its losses are divided by, and its options."""

    title: str
    balancer: str
    options: Mapping[str, Any] = field(default_factory=dict)
    loss_scales: tuple[float, float] = (1.0, 1.0)


METHODS: dict[str, Method] = {
    "ls": Method("LS", "ls"),
    "bilb": Method(
        "BiLB",
        "bilb",
        {
            "router": "parameter",
            "activation": "softmax",
            "initial_logits": 0.0,
            "clamp": [0.2, 0.8],
            "normalization": "none",
            "tau": "one",
            "weight_denominator": "none",
            "pairs": "adjacent",
            "discrepancy_weight": 0.5,
            "learning_rate": LEARNING_RATE,
        },
        loss_scales=(SCALE, 1.0),
    ),
    "famo": Method(
        "FAMO",
        "famo",
        {
            "weight_decay": 0.0,
            "learning_rate": 0.025,
            "min_losses": [-21.0 * SCALE, -21.0],
            "reevaluate": "next_batch",
        },
    ),
    "marigold": Method(
        "MARIGOLD",
        "marigold",
        {
            "mode": "lagged",
            "estimator": "one_point_baseline",
            "parametrization": "softmax",
            "beta": 1.0,
            "perturbation": 0.3,
            "learning_rate": 0.01,
        },
        loss_scales=(SCALE, 1.0),
    ),
    "mgda": Method("MGDA", "mgda"),
    "pcgrad": Method("PCGrad", "pcgrad", {"max_norm": 1.0}),
    "cagrad": Method("CAGrad", "cagrad", {"c": 0.4, "max_norm": 1.0}),
    "imtl_g": Method("IMTL-G", "imtl_g"),
    "nash_mtl": Method("Nash-MTL", "nash_mtl"),
    "fairgrad": Method("FairGrad", "fairgrad", {"max_norm": 1.0}),
}


# ---------------------------------------------------------------------------------------------------- the problem


def task_losses(points: Tensor) -> Tensor:
    """The losses `[..., 2]` of FAMO's toy problem at `points [..., 2]`."""
    x1, x2 = points.unbind(-1)
    lowest = 5e-6
    valley_1 = (0.5 * (-x1 - 7) - torch.tanh(-x2)).abs().clamp(min=lowest).log() + 6
    valley_2 = (0.5 * (-x1 + 3) + torch.tanh(-x2) + 2).abs().clamp(min=lowest).log() + 6
    bowl_1 = ((-x1 + 7) ** 2 + 0.1 * (-x2 - 8) ** 2) / 10 - 20
    bowl_2 = ((-x1 - 7) ** 2 + 0.1 * (-x2 - 8) ** 2) / 10 - 20
    above, below = torch.tanh(x2 / 2).clamp(min=0), torch.tanh(-x2 / 2).clamp(min=0)
    return torch.stack([SCALE * (valley_1 * above + bowl_1 * below), valley_2 * above + bowl_2 * below], dim=-1)


@dataclass(frozen=True)
class Trajectories:
    """S descents: `points [n, S, 2]` and `losses [n, S, 2]` at `steps [n]`, the first and the last included.

    `seconds`: of processor time that all of them took together.
    """

    steps: NDArray[np.int64]
    points: NDArray[np.float64]
    losses: NDArray[np.float64]
    seconds: float


def descend(
    method: Method, starts: Sequence[tuple[float, float]], num_steps: int, record_every: int = 25
) -> Trajectories:
    """Descend from every start with the method; `num_steps` steps of Adam.

    The starts know nothing of each other: each has a balancer of its own, and Adam works on each number alone. They
    share the forward and the backward pass, which takes half the time. A gradient method looks at the gradients of its
    own start's two losses before that; it finds out by itself that the two parameters are shared.
    """

    def losses_at(points: Tensor) -> Tensor:
        return task_losses(points) / scales

    points = torch.tensor(starts, dtype=torch.float64, requires_grad=True)
    scales = torch.tensor(method.loss_scales, dtype=torch.float64)
    optimizer = torch.optim.Adam([points], lr=LEARNING_RATE)
    balancers = [build_balancer(method.balancer, num_tasks=2, dtype=torch.float64, **method.options) for _ in starts]
    recorded: list[tuple[int, Tensor]] = []
    begin = time.process_time()

    with click.progressbar(range(num_steps), label=f"{method.title:8}", show_pos=True) as bar:
        for step in bar:
            if step % record_every == 0:
                recorded.append((step, points.detach().clone()))
            optimizer.zero_grad()
            scalars: list[Tensor] = []
            for balancer, losses in zip(balancers, losses_at(points), strict=True):
                balancer.backward(losses, backward=scalars.append)
            torch.stack(scalars).sum().backward()
            optimizer.step()
            for balancer, point in zip(balancers, points.detach(), strict=True):
                # Called by methods that evaluate the losses once more after the step.
                balancer.step(reevaluate=partial(losses_at, point))

    recorded.append((num_steps, points.detach().clone()))
    seconds = time.process_time() - begin
    visited = torch.stack([x for _, x in recorded])
    steps = np.array([step for step, _ in recorded])
    return Trajectories(steps, visited.numpy(), task_losses(visited).numpy(), seconds)


# ---------------------------------------------------------------------------------------------------- what is shown


def table(results: Mapping[str, Trajectories]) -> str:
    """Where each start ends: parameters, losses, and how far the losses are apart in units of their scales."""
    lines = [f"{'method':8}{'start':>15}{'x1':>10}{'x2':>10}{'l1':>10}{'l2':>10}{'l1/0.1 - l2':>14}"]
    for name, result in results.items():
        for start, (x1, x2), (l1, l2) in zip(result.points[0], result.points[-1], result.losses[-1], strict=True):
            lines.append(
                f"{METHODS[name].title:8}{_coordinates(start):>15}{x1:10.3f}{x2:10.3f}{l1:10.3f}{l2:10.3f}"
                f"{l1 / SCALE - l2:14.3f}"
            )
    return "\n".join(lines)


COLOURS = (VERMILLION, BLUE, PURPLE, GREEN, ORANGE)  # of the starts
FRONT: dict[str, Any] = {"color": BLACK, "linewidth": 5, "alpha": 0.35, "solid_capstyle": "round"}
EQUAL: dict[str, Any] = {"color": BLACK, "linewidth": 0.9, "linestyle": ":"}
START: dict[str, Any] = {
    "marker": "o",
    "linestyle": "none",
    "markersize": 7,
    "markerfacecolor": "white",
    "markeredgewidth": 1.6,
}
END: dict[str, Any] = {"marker": "*", "linestyle": "none", "markersize": 15, "markeredgecolor": "white"}
SUM: dict[str, Any] = {"marker": "s", "linestyle": "none", "markersize": 12, "markerfacecolor": "0.62"}
PAPER: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1}
TICKS = (-10, -5, 0, 5, 10)
_COLUMNS = 5


def figure(results: Mapping[str, Trajectories]) -> Figure:
    """Two panels a method, the paths in the plane of the parameters and below it in the plane of the losses."""
    blocks = -(-len(results) // _COLUMNS)
    columns = -(-len(results) // blocks)
    drawing = Figure(figsize=(3.7 * columns + 2.4, 7.6 * blocks), layout="constrained")
    axes = drawing.subplots(2 * blocks, columns, squeeze=False)
    for empty in axes[-2:, len(results) - columns * (blocks - 1) :].flat:
        empty.set_visible(False)
    for number, (name, result) in enumerate(results.items()):
        block, column = divmod(number, columns)
        parameters, losses = axes[2 * block : 2 * block + 2, column]
        parameters.set_title(f"{METHODS[name].title}\n{result.steps[-1]:,} steps, {_shown(result.seconds)}")
        _draw_parameters(parameters, result)
        _draw_losses(losses, result)
        if column == 0:
            parameters.set_ylabel("parameter $x_2$")
            losses.set_ylabel("loss of the second task, $l_2$")
    drawing.legend(handles=_legend(), loc="outside right upper", frameon=False)
    return drawing


def _shown(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


def _draw_parameters(axis: Axes, result: Trajectories) -> None:
    x1, x2 = np.meshgrid(np.linspace(-10, 10, 401), np.linspace(-10, 10, 401))
    losses = task_losses(torch.from_numpy(np.stack([x1, x2], axis=-1))).numpy()
    sums = losses[..., 0] / SCALE + losses[..., 1]
    axis.contourf(x1, x2, sums, levels=20, colors=[str(shade) for shade in np.linspace(0.62, 0.99, 21)])
    axis.plot(FRONT_X1, (FRONT_X2, FRONT_X2), **FRONT)
    _draw_paths(axis, result.points)
    axis.set(xlim=(-10, 10), ylim=(-10, 10), xticks=TICKS, yticks=TICKS, xlabel="parameter $x_1$", aspect="equal")


def _draw_losses(axis: Axes, result: Trajectories) -> None:
    x1 = torch.linspace(*FRONT_X1, 200, dtype=torch.float64)
    front = task_losses(torch.stack([x1, torch.full_like(x1, FRONT_X2)], dim=-1)).numpy()
    axis.plot(front[:, 0], front[:, 1], **FRONT)
    axis.plot((-2.2, 1.1), (-22, 11), **EQUAL)
    _draw_paths(axis, result.losses)
    _name_ends(axis, result.losses[-1])
    axis.set(xlim=(-3.7, 1.5), ylim=(-26, 14), xlabel="loss of the first task, $l_1$")


def _draw_paths(axis: Axes, paths: NDArray[np.float64]) -> None:
    for path, colour in zip(np.moveaxis(paths, 1, 0), COLOURS, strict=True):
        axis.plot(path[:, 0], path[:, 1], color=colour, linewidth=1.3, alpha=0.85)
        axis.plot(*path[0], color=colour, zorder=3, **START)
        # Black for all: several paths end in one point, where colours would hide one another.
        axis.plot(*path[-1], color=BLACK, zorder=4, **END)


def _name_ends(axis: Axes, ends: NDArray[np.float64]) -> None:
    """Write the coordinates at the points near the front where paths end, once where several do."""
    named: list[tuple[float, float]] = []
    for x, y in sorted((float(x), float(y)) for x, y in ends if x / SCALE + y < -9):
        if any(abs(x - a) < 1.3 and abs(y - b) < 2 for a, b in named):
            continue
        named.append((x, y))
        below: dict[str, Any] = {"xytext": (-7, -10), "ha": "right", "va": "top"}
        axis.annotate(f"({x:.2f}, {y:.1f})", (x, y), textcoords="offset points", fontsize=9, bbox=PAPER, **below)


def _legend() -> list[Line2D]:
    paths = [
        Line2D([], [], color=colour, label=f"from {_coordinates(start)}")
        for start, colour in zip(STARTS, COLOURS, strict=True)
    ]
    marks = [
        Line2D([], [], color=BLACK, label="start", **START),
        Line2D([], [], color=BLACK, label="end", **END),
        Line2D([], [], label="Pareto front", **FRONT),
        Line2D([], [], label="$l_1 / 0.1 = l_2$", **EQUAL),
        Line2D([], [], label="$l_1 / 0.1 + l_2$, dark: low", markeredgewidth=0, **SUM),
    ]
    return paths + marks


def _coordinates(point: Sequence[float]) -> str:
    return f"({point[0]:g}, {point[1]:g})"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--method", "names", multiple=True, type=click.Choice(list(METHODS)), help="May be repeated; default all."
)
@click.option("--steps", type=click.IntRange(min=1), default=50_000, show_default=True, help="Steps from each start.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), default="toy.png", show_default=True)
def main(names: tuple[str, ...], steps: int, output: Path) -> None:
    """Draw the paths of the methods on the toy problem and print where they end."""
    if not output.absolute().parent.is_dir():
        raise click.BadParameter(f"{output}: there is no folder {output.parent}", param_hint="--output")
    torch.set_num_threads(1)
    results = {name: descend(METHODS[name], STARTS, steps) for name in names or METHODS}
    print(table(results))
    print(f"wrote {save_figure(figure(results), output)}")


if __name__ == "__main__":
    main()
