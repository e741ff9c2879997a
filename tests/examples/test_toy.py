"""The toy example: the reference's problem and first steps, and the end that the paper's figure shows."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from examples import toy
from hf_bilb import build_balancer

TITLES = tuple(f"{method.title:8} " for method in toy.METHODS.values())
FILES = Path(__file__).parents[1] / "parity_data"


def recorded(method: str) -> dict[str, np.ndarray]:
    with np.load(FILES / f"toy_{method}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in ("inits", "x", "losses", "x_first20", "famo_logits")}


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    return recorded("ls")


def balanced_point() -> tuple[float, float]:
    """The losses where l1 / 0.1 = l2 on the Pareto front: x1 = 0 by symmetry, x2 by search over the bowl alone."""
    x2 = np.linspace(-9, -8, 1_000_001)
    bowl = ((7.0**2 + 0.1 * (x2 + 8) ** 2) / 10 - 20) * np.tanh(-x2 / 2)
    return 0.1 * float(bowl.min()), float(bowl.min())


def test_the_problem_is_the_reference_s(reference):
    assert np.array_equal(toy.STARTS, reference["inits"])
    losses = toy.task_losses(torch.from_numpy(reference["x"])).numpy()
    assert np.abs(losses - reference["losses"]).max() < 1e-12


def test_the_valleys_have_a_floor():
    # In the middle of a valley the logarithm's argument is zero; the floor is 5e-6.
    across = 2 * math.tanh(5)
    first, second = toy.task_losses(torch.tensor([[across - 7, 5.0], [7 - across, 5.0]], dtype=torch.float64))
    bottom = (math.log(5e-6) + 6) * math.tanh(2.5)
    assert float(first[0]) == pytest.approx(0.1 * bottom, abs=1e-12)
    assert float(second[1]) == pytest.approx(bottom, abs=1e-12)


def test_first_steps_of_ls_are_the_reference_s(reference):
    ours = toy.descend(toy.METHODS["ls"], toy.STARTS, num_steps=20, record_every=1)
    assert list(ours.steps) == list(range(21))
    assert np.abs(ours.points[:20].swapaxes(0, 1) - reference["x_first20"]).max() <= 1e-9


def test_first_thousand_steps_of_famo_are_the_reference_s(monkeypatch):
    built = []

    def build(*args, **options):
        built.append(build_balancer(*args, **options))
        return built[-1]

    reference = recorded("famo")
    monkeypatch.setattr(toy, "build_balancer", build)
    ours = toy.descend(toy.METHODS["famo"], toy.STARTS, num_steps=1001, record_every=1)
    logits = np.stack([balancer.state_dict()["objective.logits"].numpy() for balancer in built])
    # Row 1 of `famo_logits`: what step 1000 was taken with, its losses compared with those of step 999.
    off = {
        "x_first20": np.abs(ours.points[:20].swapaxes(0, 1) - reference["x_first20"]).max(axis=(1, 2)),
        "x": np.abs(ours.points[1000] - reference["x"][:, 1]).max(axis=1),
        "famo_logits": np.abs(logits - reference["famo_logits"][:, 1]).max(axis=1),
    }
    assert np.array_equal(toy.STARTS, reference["inits"]) and np.abs(logits).min() > 0.01
    assert off["x_first20"].max() <= 1e-9
    # From (0, 0) the losses change by 1e-6 at first, and Adam makes whole steps of what rounding leaves of that.
    assert {key: np.delete(values, 1).max() <= 1e-9 for key, values in off.items()} == dict.fromkeys(off, True)
    assert off["famo_logits"][1] <= 1e-6 and off["x"][1] <= 1e-8


def marigold_by_hand(start, directions):
    """MARIGOLD with the options of the example, equations 8-11 with softmax weights; the points that it visits."""
    point = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    u, v = torch.zeros(2, 2, dtype=torch.float64)
    model, own = torch.optim.Adam([point], lr=1e-3), torch.optim.Adam([u, v], lr=0.01)
    visited, last, along = [], None, None
    for direction in directions:
        visited.append(point.detach().clone())
        losses = toy.task_losses(point) / torch.tensor([0.1, 1.0], dtype=torch.float64)
        if last is not None:
            decrements, lam, rho = losses.detach() - last, torch.softmax(u, 0), torch.softmax(v, 0)
            slope = 2 / 0.3 * torch.dot(rho, decrements) * along
            u.grad = lam * (slope - torch.dot(lam, slope))
            v.grad = -rho * (decrements - torch.dot(rho, decrements))
            own.step()
        last, along = losses.detach(), direction
        model.zero_grad()
        torch.dot(torch.softmax(u, 0) + 0.3 * direction, losses).backward()
        model.step()
    return torch.stack(visited).numpy()


@pytest.mark.parametrize("start", toy.STARTS)
def test_first_steps_of_marigold_are_those_of_a_plain_loop(start, monkeypatch):
    directions = []

    def build(*args, **options):
        balancer = build_balancer(*args, **options)
        backward = balancer.backward

        def noted(*args, **settings):
            value = backward(*args, **settings)
            directions.append(balancer.objective.direction.clone())
            return value

        monkeypatch.setattr(balancer, "backward", noted)
        return balancer

    monkeypatch.setattr(toy, "build_balancer", build)
    ours = toy.descend(toy.METHODS["marigold"], [start], num_steps=300, record_every=1)
    drawn = torch.stack(directions)
    assert torch.linalg.vector_norm(drawn, dim=1).sub(1).abs().max() < 1e-12 and len(drawn.unique(dim=0)) == 300
    assert np.abs(ours.points[:300, 0] - marigold_by_hand(start, drawn)).max() <= 1e-9


def test_lagged_marigold_is_commit_where_all_batches_are_one():
    method = toy.METHODS["marigold"]
    commit = dataclasses.replace(method, options={**method.options, "mode": "commit"})
    lagged, again = (toy.descend(m, toy.STARTS, num_steps=100) for m in (method, commit))
    assert np.abs(lagged.points - again.points).max() <= 1e-9


# ------------------------------------------------------------------------- gradient methods, for two tasks on paper


def mgda_of_two(g, h):
    """The shortest a g + (1 - a) h with a in [0, 1], times 2."""
    a = np.clip((h - g) @ h / ((g - h) @ (g - h)), 0, 1)
    return 2 * (a * g + (1 - a) * h)


def pcgrad_of_two(g, h):
    inner = min(g @ h, 0.0)
    return clipped((g - inner / (h @ h) * h) + (h - inner / (g @ g) * g))


def cagrad_of_two(g, h, c=0.4):
    """The a in [0, 1] with the least g_a . g_0 + c |g_0| |g_a|: its derivative grows with a, so it is halved in."""
    mean = (g + h) / 2
    radius = c * np.linalg.norm(mean)

    def slope(a):
        mixed = a * g + (1 - a) * h
        return (g - h) @ mean + radius * ((g - h) @ mixed) / np.linalg.norm(mixed)

    low, high = 0.0, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    mixed = low * g + (1 - low) * h
    return clipped(2 * (mean + radius * mixed / np.linalg.norm(mixed)) / (1 + c**2))


def nash_of_two(g, h):
    """G a = 1 / a: a_1^2 |g|^2 = a_2^2 |h|^2, so that both are 1 / sqrt(1 + cos) of their own unit."""
    norms = np.linalg.norm(g), np.linalg.norm(h)
    return (g / norms[0] + h / norms[1]) / np.sqrt(1 + g @ h / (norms[0] * norms[1]))


def fairgrad_of_two(g, h):
    return clipped(2 * nash_of_two(g, h))


def imtl_g_of_two(g, h):
    """Equal projections: the same multiple of both units."""
    norms = np.linalg.norm(g), np.linalg.norm(h)
    return (g / norms[0] + h / norms[1]) / (1 / norms[0] + 1 / norms[1])


def clipped(direction):
    return direction * min(1.0, 1 / (np.linalg.norm(direction) + 1e-6))


OF_TWO = {
    "mgda": mgda_of_two,
    "pcgrad": pcgrad_of_two,
    "cagrad": cagrad_of_two,
    "nash_mtl": nash_of_two,
    "fairgrad": fairgrad_of_two,
    "imtl_g": imtl_g_of_two,
}


def walked(direction_of, start, num_steps):
    """The points that Adam with 1e-3 visits along the directions, in plain numpy."""
    point, first, second, visited = np.array(start), np.zeros(2), np.zeros(2), []
    for step in range(1, num_steps + 1):
        visited.append(point.copy())
        jacobian = torch.autograd.functional.jacobian(toy.task_losses, torch.from_numpy(point)).numpy()
        direction = direction_of(*jacobian)
        first = 0.9 * first + 0.1 * direction
        second = 0.999 * second + 0.001 * direction**2
        scale = np.sqrt(second / (1 - 0.999**step)) + 1e-8
        point = point - 1e-3 * first / (1 - 0.9**step) / scale
    return np.stack(visited)


@pytest.mark.parametrize("name", OF_TWO)
def test_first_steps_of_a_gradient_method_are_those_of_two_gradients_on_paper(name):
    ours = toy.descend(toy.METHODS[name], toy.STARTS, num_steps=20, record_every=1)
    for k, start in enumerate(toy.STARTS):
        off = np.abs(ours.points[:20, k] - walked(OF_TWO[name], start, 20)).max(axis=0)
        if start == (0.0, 0.0) and name in ("nash_mtl", "imtl_g"):
            # Of two gradients of one length what is across them cancels, and Adam makes steps of the rounding errors.
            assert off[0] <= 1e-3 and off[1] <= 1e-8
        else:
            assert off.max() <= 1e-12, start


def test_the_gradient_methods_differ_and_clipping_acts():
    ends = {name: toy.descend(toy.METHODS[name], toy.STARTS, num_steps=20).points[-1] for name in ("ls", *OF_TWO)}
    for one, other in itertools.combinations(ends, 2):
        # With alpha = 1 FairGrad has Nash-MTL's direction, and Adam does not see the length.
        assert (np.abs(ends[one] - ends[other]).max() > 1e-5) == ({one, other} != {"nash_mtl", "fairgrad"}), (
            one,
            other,
        )
    for name in ("pcgrad", "cagrad"):
        method = toy.METHODS[name]
        free = dataclasses.replace(method, options={**method.options, "max_norm": None})
        assert np.abs(toy.descend(free, toy.STARTS, num_steps=20).points[-1] - ends[name]).max() > 1e-5, name


@pytest.mark.parametrize("name", ["bilb", "famo", "marigold", "pcgrad", "nash_mtl"])
def test_each_start_goes_its_own_way(name):
    together = toy.descend(toy.METHODS[name], toy.STARTS, num_steps=60)
    for k, start in enumerate(toy.STARTS):
        alone = toy.descend(toy.METHODS[name], [start], num_steps=60)
        assert np.abs(alone.points[:, 0] - together.points[:, k]).max() < 1e-12


@pytest.mark.slow
def test_bilb_ends_at_the_star_of_the_figure():
    # 15,000 steps: the slowest start, (0, 0), has then come to 2e-4 and 2e-3, Adam's jitter about the kink included.
    starts = [(0.0, 0.0), (-7.5, -0.5), (9.0, -1.0)]
    ends = toy.descend(toy.METHODS["bilb"], starts, num_steps=15_000, record_every=15_000).losses[-1]
    expected = balanced_point()
    assert [round(loss, 3) for loss in expected] == [-1.509, -15.092]
    for start, end in zip(starts, ends, strict=True):
        assert np.abs(end - expected) == pytest.approx([0, 0], abs=5e-3), start
        assert abs(end[0] - expected[0]) < 5e-4, start


def test_the_command_prints_the_ends_and_draws_them(tmp_path):
    output = tmp_path / "toy.png"
    done = CliRunner().invoke(toy.main, ["--steps", "3", "--output", str(output)])
    assert done.exit_code == 0, done.output
    rows = [line.split() for line in done.output.splitlines() if line.startswith(TITLES) and "(" in line]
    assert [row[0] for row in rows] == [title.strip() for title in TITLES for _ in range(5)]
    assert rows[0][1:5] == ["(-8.5,", "7.5)", "-8.497", "7.497"]
    assert output.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "bilbo"], "'bilbo' is not one of 'ls', 'bilb', 'famo', 'marigold', 'mgda', "),
        (["--steps", "0"], "0 is not in the range x>=1"),
        (["--output", "nowhere/toy.png"], "nowhere/toy.png: there is no folder nowhere"),
    ],
)
def test_a_mistake_is_said_before_anything_runs(arguments, message, monkeypatch):
    monkeypatch.setattr(toy, "descend", lambda *_: pytest.fail("ran"))
    done = CliRunner().invoke(toy.main, arguments)
    assert done.exit_code == 2
    assert message in done.output
