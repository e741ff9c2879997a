"""docs/own_loop.md: what the page says of its blocks (tests/test_docs.py runs each of them as printed)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_bilb import build_balancer, list_balancers
from hf_bilb.engine.balancer import LossBalancer
from hf_bilb.errors import OptionError

PAGE = (Path(__file__).parents[1] / "docs" / "own_loop.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+)\n((?:(?!^## ).*\n)*)", PAGE, flags=re.M))


def block(section: str) -> str:
    (found,) = re.findall(r"^```python\n(.*?)^```$", SECTIONS[section], flags=re.M | re.S)
    return found


def run(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def test_every_block_is_python_and_so_is_run() -> None:
    assert re.findall(r"^```(\w*)$", PAGE, flags=re.M) == ["python", ""] * 5


def test_accumulation_is_one_large_batch_for_the_model_and_the_losses_are_not_divided() -> None:
    """For a method that is linear in the losses, against SGD written out; and the division that the page warns of."""
    code = block("Accumulation").replace('"uw"', '"ls"')
    torch.manual_seed(0)
    model = nn.Linear(8, 2)
    for _ in range(10):
        x = torch.cat([torch.randn(16, 8) for _ in range(4)])
        gradients = torch.autograd.grad((model(x) - x[:, :2]).square().mean(0).sum(), list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= 0.05 * gradient
    torch.testing.assert_close(run(code)["model"].weight, model.weight)

    in_losses = block("Accumulation").replace(
        "losses, backward=lambda scalar: (scalar / micro_batches).backward()", "losses / 4"
    )
    assert in_losses != block("Accumulation")
    weights = [run(code)["balancer"].weights for code in (block("Accumulation"), in_losses)]
    assert not torch.allclose(*weights, rtol=1e-2)


def test_a_skipped_step_is_discarded(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(LossBalancer, name)
        return lambda self, *args, **kwargs: (calls.append(name), original(self, *args, **kwargs))[1]

    for name in ("discard", "step"):
        monkeypatch.setattr(LossBalancer, name, counted(name))
    # So large a scale overflows until it has been halved a few times.
    code = (
        block("A GradScaler (fp16)")
        .replace("2.0**8", "2.0**127")
        .replace('"bilb"', '"uw"')
        .replace("mean(0)", "sum(0)")
    )
    balancer = run(code)["balancer"]
    assert calls[0] == "discard"
    (steps,) = (value for key, value in balancer.state_dict().items() if key.endswith("step"))
    assert int(steps) == calls.count("step") > 0


def test_accelerate_divides_and_the_balancer_steps_once_an_update() -> None:
    names = run(block("Accelerate"))
    # 256 rows in batches of 16 are 4 updates an epoch; the optimizer counts its own.
    (state, *_) = names["optimizer"].state_dict()["state"].values()
    assert int(state["step"]) == 12
    (router,) = (value for key, value in names["balancer"].state_dict().items() if key.endswith("step"))
    assert int(router) == 12


def test_lightning_resumes_as_if_it_had_not_stopped() -> None:
    names = run(block("Lightning"))
    torch.manual_seed(0)
    torch.randn(256, 8)  # as the block draws before it builds the model
    whole = names["TwoTasks"]()
    names["lightning"].Trainer(max_epochs=4, **names["options"]).fit(whole, names["loader"])
    for ours, resumed in zip(whole.parameters(), names["model"].parameters(), strict=True):
        assert torch.equal(ours, resumed)
    for key, value in whole.balancer.state_dict().items():
        assert torch.equal(value, names["model"].balancer.state_dict()[key]), key


def needs(name: str) -> str | None:
    """What a plain loop of one process lacks for the method; None: nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    options = {"aggregator": "Mean"} if name == "torchjd" else {}
    balancer = build_balancer(name, num_tasks=2, **options)
    x = torch.randn(16, 4)
    losses = lambda: (model(x) - x[:, :2]).square().mean(0)  # noqa: E731
    try:
        balancer.backward(losses())
        optimizer.step()
        balancer.step()
    except OptionError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", list_balancers())
def test_what_a_method_needs_is_on_the_page(name: str) -> None:
    table = SECTIONS["What some methods need in addition"]
    assert (needs(name) is not None) == (f"`{name}`" in table.replace("`bilb` with", "")), needs(name)
