"""docs/which_balancer.md: its figures are those of the pages they come from, and its commands plan a comparison."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from hf_bilb import build_balancer
from hf_bilb.cli import main
from hf_bilb.experiments.plan import plan_comparison

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "which_balancer.md").read_text(encoding="utf-8")
#: First words of a row -> the page that has the table.
MOLECULES = (DOCS / "methods" / "gradient.md").read_text(encoding="utf-8").partition("## Measured")[2]
MEASURED = (DOCS / "measured.md").read_text(encoding="utf-8")
DENSE = (DOCS / "data_sets.md").read_text(encoding="utf-8")


def rows(page: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]


def methods_against_ls() -> dict[str, dict[str, tuple[str, str, str]]]:
    """Of the first table of figures: the data -> method -> error, worst task, whether chance explains it."""
    found: dict[str, dict[str, tuple[str, str, str]]] = {}
    data = ""
    for row in rows(PAGE.partition("## What we measured")[2].partition("\n| data | losses | score |")[0])[2:]:
        data = row[0] or data
        method = re.sub(r" \(.*", "", row[2]).replace("`", "")
        found.setdefault(data, {})[method] = (row[3], row[4], row[5])
    return found


def source(page: str, columns: tuple[int, int, int]) -> dict[str, tuple[str, str, str]]:
    """The same from the table that the figures are taken from."""
    found = {}
    for row in rows(page):
        if len(row) > columns[2] and re.fullmatch(r"0\.\d+", row[columns[0]]):
            method = row[0].replace("`", "").replace("normalization: ", "")
            verdict = {"better": "no", "within the seeds' spread": "yes"}[row[columns[2]]]
            found[method] = (row[columns[0]], re.sub(r" \(.*", "", row[columns[1]]), verdict)
    return found


def test_figures_of_the_methods() -> None:
    large, small = methods_against_ls().values()
    assert large == source(MOLECULES, (3, 4, 5))
    assert small == source(MEASURED.partition("## QM9, 50,000")[0], (3, 4, 5))


def test_figures_of_ls_and_bilb() -> None:
    found = {row[0].split(",")[0]: row[3:5] for row in rows(PAGE) if len(row) == 6 and row[0] and row[3][:1].isdigit()}
    del found["QM9"]
    taken = {row[0].split(",")[0]: [cell.split(" ")[0] for cell in row[1:3]] for row in rows(MEASURED)}
    (dense,) = (row for row in rows(DENSE) if row[0] == "Delta_m % (by task)")
    expected = {
        "CelebA": taken["CelebA"],
        "Tox21": taken["Tox21"],
        "GLUE": next(row[4:6] for row in rows(MEASURED) if row[0] == "mean score"),
        "NYUv2": [cell.split(" ")[0] for cell in dense[2:4]],
    }
    assert found == expected


@pytest.mark.parametrize("command", [line for line in PAGE.splitlines() if line.startswith("hf-bilb compare")])
def test_the_commands_plan_a_comparison(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [f"{20 * row},{row % 3},{1000 * row},{5 + row % 7},{'yes' if row % 2 else 'no'}" for row in range(1, 60)]
    Path("flats.csv").write_text("\n".join(["area,rooms,price,days_on_market,sold", *lines]) + "\n")
    CliRunner().invoke(main, ["init", "flats.csv", "--tasks", "price,days_on_market,sold"], catch_exceptions=False)
    _, _, recipe, *options = shlex.split(command)
    given = dict(zip(options[::2], options[1::2], strict=False))
    planned = plan_comparison(
        recipe, [], balancers=given["--balancers"], seeds=given["--seeds"], single_tasks="--stl" in options
    )
    assert planned.reference == "ls" and planned.seeds == (0, 1, 2)
    methods = len(given["--balancers"].split(","))
    assert len(planned.runs) == 3 * (methods + (3 if "--stl" in options else 0))


def test_methods_that_are_said_to_need_one_pass_need_one() -> None:
    (sentence,) = re.findall(r"needs one backward pass, as `ls` does: (.+?)\. Their", PAGE, flags=re.S)
    names = set(re.findall(r"`(\w+)`", sentence))
    assert names == {"bilb", "uw", "dwa", "si", "famo"}
    for name in names:
        balancer = build_balancer(name, num_tasks=2, **({"reevaluate": "next_batch"} if name == "famo" else {}))
        assert not (balancer.needs_reevaluation or balancer.needs_gradients or balancer.needs_look_ahead)
    for name in ("famo", "marigold"):
        assert build_balancer(name, num_tasks=2).needs_reevaluation
