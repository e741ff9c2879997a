"""docs/coming_from.md: its examples run, those with the same result have it, and its tables hold against torchjd."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from hf_bilb import build_balancer, list_balancers
from tests.balancers.gradient.reference import build, direction_of, error, gradients

PAGE = (Path(__file__).parents[1] / "docs" / "coming_from.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+)\n((?:(?!^## ).*\n)*)", PAGE, flags=re.M))
K = 3


def blocks(section: str) -> tuple[str, str]:
    before, after = re.findall(r"^```python\n(.*?)^```$", SECTIONS[section], flags=re.M | re.S)
    return before, after


def run(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def tables(section: str) -> list[list[list[str]]]:
    found = re.findall(r"^(?:\|.*\n)+", SECTIONS[section], flags=re.M)
    return [[[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]] for table in found]


def flat(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def test_from_libmtl() -> None:
    before, after = blocks("From LibMTL")
    compile(before, "libmtl", "exec")
    trainer = run(after)["trainer"]
    first, *_, last = (entry for entry in trainer.state.log_history if "eval_loss" in entry or "train_loss" in entry)
    assert trainer.balancer.name == "uw" and last["eval_loss"] < 1.0 and first is not None


def test_from_torchjd_with_the_same_result() -> None:
    pytest.importorskip("torchjd", reason="compares with torchjd (extra gradient)")
    before, after = map(run, blocks("From torchjd"))
    for name in ("trunk", "heads"):
        torch.testing.assert_close(flat(before[name]), flat(after[name]), rtol=1e-5, atol=1e-6)
    start = run(blocks("From torchjd")[1].replace("range(20)", "range(0)"))
    assert error(flat(after["trunk"]), flat(start["trunk"])) > 0.1  # it has moved, too


def test_from_ldc_mtl_with_the_same_result() -> None:
    before, after = map(run, blocks("From the code of LDC-MTL (BiLB4MTL)"))
    torch.testing.assert_close(flat(before["model"]), flat(after["model"]), rtol=1e-5, atol=1e-6)
    (router,) = after["balancer"].objective.parameters()
    torch.testing.assert_close(before["router"], router, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(router, torch.ones(40), atol=1e-3)


def of_cell(cell: str) -> tuple[str, dict[str, Any]] | None:
    """A balancer's name and options in a cell; None where the method is not here."""
    found = re.match(r"`([^`]+)`", cell)
    if found is None:
        return None
    section = yaml.safe_load(found[1])
    section = {"name": section} if isinstance(section, str) else section
    return section.pop("name"), section


@pytest.mark.parametrize("section", ["From LibMTL", "From torchjd"])
def test_balancers_of_the_tables_can_be_built(section: str) -> None:
    for table in tables(section)[1:]:
        for row in table:
            entry = of_cell(row[1])
            if entry is None:
                assert row[1] == "not here", row
                continue
            assert entry[0] in list_balancers()
            build_balancer(entry[0], num_tasks=K, **entry[1])


@pytest.mark.parametrize("row", [row for row in tables("From torchjd")[1] if "every other" not in row[0]], ids=str)
def test_scales_against_torchjd(row: list[str]) -> None:
    jd = pytest.importorskip("torchjd.aggregation", reason="compares with torchjd (extra gradient)")
    jacobian = gradients(K, 20, spread=0.3)
    call = row[0].strip("`")
    try:
        aggregator = eval(f"jd.{call}", {"jd": jd, "K": K})
    except ImportError as missing:
        pytest.skip(f"{call} needs more packages: {missing}")
    entry = of_cell(row[1])
    assert entry is not None
    times = {"K": K, "1": 1}[row[2]]
    # What draws an order, or signs, is compared by its mean length over many draws.
    draws = 200 if entry[0] in ("pcgrad", "gradvac", "graddrop") else 1
    torch.manual_seed(0)
    theirs = [aggregator(jacobian) for _ in range(draws)]
    ours = [direction_of(build(entry[0], K, **entry[1], **seeds(entry[0], draw)), jacobian) for draw in range(draws)]
    if draws == 1:
        assert error(ours[0], times * theirs[0]) < 2e-2
    else:
        lengths = [torch.stack(found).norm(dim=1).mean() for found in (ours, theirs)]
        assert float(lengths[0] / lengths[1]) == pytest.approx(times, rel=0.1)


def seeds(name: str, draw: int) -> dict[str, Any]:
    return {"seed": draw} if name in ("pcgrad", "graddrop") else {}


def test_every_aggregator_and_scalarizer_of_torchjd_has_a_row() -> None:
    pytest.importorskip("torchjd", reason="compares with torchjd (extra gradient)")
    import torchjd.scalarization as scalarization

    named = set(re.findall(r"`(\w+)", " ".join(row[0] for row in tables("From torchjd")[2])))
    assert named == {name for name in dir(scalarization) if name[0].isupper()} - {"Scalarizer"}


def test_methods_of_ldc_mtl_s_command_line() -> None:
    (row,) = (row for row in tables("From the code of LDC-MTL (BiLB4MTL)")[0] if "`--method ls`" in row[0])
    theirs, ours = (re.findall(r"`(?:--method )?(\w+)`", cell) for cell in row)
    assert len(theirs) == len(ours) and set(ours) <= set(list_balancers())
