"""The toy example: the reference's problem and first steps, and the end that the paper's figure shows."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from examples import toy
from hf_bilb import build_balancer

TITLES = ("LS  ", "BiLB  ", "FAMO  ", "MARIGOLD  ")
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


@pytest.mark.parametrize("name", ["bilb", "famo", "marigold"])
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
        (["--method", "bilbo"], "'bilbo' is not one of 'ls', 'bilb', 'famo', 'marigold'"),
        (["--steps", "0"], "0 is not in the range x>=1"),
        (["--output", "nowhere/toy.png"], "nowhere/toy.png: there is no folder nowhere"),
    ],
)
def test_a_mistake_is_said_before_anything_runs(arguments, message, monkeypatch):
    monkeypatch.setattr(toy, "descend", lambda *_: pytest.fail("ran"))
    done = CliRunner().invoke(toy.main, arguments)
    assert done.exit_code == 2
    assert message in done.output
