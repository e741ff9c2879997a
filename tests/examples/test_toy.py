"""The toy example: the reference's problem and first steps, and the end that the paper's figure shows."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from examples import toy

FILE = Path(__file__).parents[1] / "parity_data" / "toy_ls.npz"


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    with np.load(FILE, allow_pickle=False) as file:
        return {key: file[key] for key in ("inits", "x", "losses", "x_first20")}


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


def test_each_start_goes_its_own_way():
    together = toy.descend(toy.METHODS["bilb"], toy.STARTS, num_steps=60)
    for k, start in enumerate(toy.STARTS):
        alone = toy.descend(toy.METHODS["bilb"], [start], num_steps=60)
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
    rows = [line.split() for line in done.output.splitlines() if line.startswith(("LS  ", "BiLB  ")) and "(" in line]
    assert [row[0] for row in rows] == ["LS"] * 5 + ["BiLB"] * 5
    assert rows[0][1:5] == ["(-8.5,", "7.5)", "-8.497", "7.497"]
    assert output.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "bilbo"], "'bilbo' is not one of 'ls', 'bilb'"),
        (["--steps", "0"], "0 is not in the range x>=1"),
        (["--output", "nowhere/toy.png"], "nowhere/toy.png: there is no folder nowhere"),
    ],
)
def test_a_mistake_is_said_before_anything_runs(arguments, message, monkeypatch):
    monkeypatch.setattr(toy, "descend", lambda *_: pytest.fail("ran"))
    done = CliRunner().invoke(toy.main, arguments)
    assert done.exit_code == 2
    assert message in done.output
