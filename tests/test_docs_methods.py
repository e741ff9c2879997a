"""The pages under docs/methods: what is printed of the library is what it says, examples run, links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from hf_bilb import build_balancer, list_balancers
from hf_bilb.cli import main
from hf_bilb.config.yaml import load_yaml
from hf_bilb.experiments.recipe import parse_recipe

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "methods"
PAGES = {page.name: page.read_text(encoding="utf-8") for page in sorted(FOLDER.glob("*.md"))}
INDEX = PAGES["README.md"]
OWN = (ROOT / "docs" / "own_method.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[Any]:
    found = re.compile(rf"^```{language}\n(.*?)^```$", flags=re.M | re.S)
    return [
        pytest.param(block, id=f"{name}-{number}")
        for name, page in PAGES.items()
        for number, block in enumerate(found.findall(page))
    ]


def test_the_index_ends_with_what_the_command_prints() -> None:
    printed = CliRunner().invoke(main, ["balancers", "--format", "markdown"], catch_exceptions=False)
    assert INDEX.endswith(f"`hf-bilb balancers --format markdown` prints:\n\n{printed.stdout}")


def test_every_method_is_on_the_page_of_its_family() -> None:
    rows = re.findall(r"^\| \[[^\]]+\]\((\w+\.md)\) \| ([^|]+) \|", INDEX, flags=re.M)
    families = {page: re.findall(r"`(\w+)`", names) for page, names in rows}
    assert families.keys() == PAGES.keys() - {"README.md"}
    assert sorted(name for names in families.values() for name in names) == list_balancers()
    for page, names in families.items():
        for name in names:
            assert re.search(rf"^## {name}:|^# .*\b{name}\b", PAGES[page], flags=re.M), name


@pytest.mark.parametrize("num_tasks", [2, 5])
def test_scales_of_the_index(num_tasks: int) -> None:
    table = INDEX.split("| at l = 1 | at l = 10 |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| `([^`]+)` \| ([-K0-9./* ]+) \| ([-K0-9./* ]+) \|$", table, flags=re.M)
    assert {load_yaml(row[0], "index") if ":" not in row[0] else row[0].split(":")[0] for row in rows} == set(
        list_balancers()
    )
    for given, *sums in rows:
        section = load_yaml(given, "index")
        (name, options) = (section, {}) if isinstance(section, str) else next(iter(section.items()))
        for size, written in zip((1.0, 10.0), sums, strict=True):
            balancer = build_balancer(name, num_tasks, dtype=torch.float64, **options)
            # Each loss is a parameter of its own: gradients of length 1 at right angles.
            model = torch.nn.ParameterList([torch.full((num_tasks,), size, dtype=torch.float64)])
            balancer.bind(model)
            balancer.on_epoch_begin(0)
            balancer.backward(model[0].clone())
            # MARIGOLD's weights are moved by 1e-3.
            expected = pytest.approx(eval(written, {"K": num_tasks}), rel=5e-3 if name == "marigold" else 1e-9)
            assert float(balancer.coefficients.sum()) == expected, given


@pytest.mark.parametrize("block", blocks("yaml"))
def test_yaml_is_valid_and_builds(block: str, tmp_path: Path) -> None:
    printed = load_yaml(block, "page")
    sections = {"model": "qm9_mlp", "data": "qm9", "balancer": "ls", **printed}
    trainer = {"output_dir": str(tmp_path), **printed.get("trainer", {})}
    recipe = parse_recipe({**sections, "trainer": trainer}, "page")
    tasks = recipe.data["tasks"] or ["mu", "alpha", "homo"]
    balancer = build_balancer(recipe.balancer, task_names=list(tasks))
    for key, value in printed.get("balancer", {}).items():
        assert key == "name" or recipe.balancer[key] == value
    assert balancer.name == recipe.balancer["name"]


@pytest.mark.parametrize("block", blocks("python"))
def test_python_runs_as_printed(block: str, tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(block, encoding="utf-8")
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "nan" not in done.stdout


@pytest.mark.parametrize("name", PAGES)
def test_links_and_files_exist(name: str) -> None:
    for link in re.findall(r"\]\((?!http)([^)]+)\)", PAGES[name]):
        page, _, section = link.partition("#")
        target = FOLDER / page if page else FOLDER / name
        assert target.exists(), link
        titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), flags=re.M) if section else []
        assert not section or section in [title.lower().replace(" ", "-") for title in titles], link
    named = re.findall(r"`((?:\w+/)+\w+\.(?:py|md|yaml))`", PAGES[name])
    assert [path for path in named if path != "path/to/file.py" and not (ROOT / path).exists()] == []


def test_the_worked_example_prints_the_table_of_its_page() -> None:
    done = subprocess.run(
        [sys.executable, "examples/own_method.py"], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True
    )
    printed = {line.split()[0]: [float(word) for word in line.split()[1:]] for line in done.stdout.splitlines()[1:]}
    for name in ("ls", "si", "catch_up"):
        written = [float(word) for word in re.search(rf"^\| `{name}` \| (.+) \| (.+) \|$", OWN, flags=re.M).groups()]
        # Rounding differs from machine to machine, and training carries it on.
        assert printed[name] == pytest.approx(written, rel=0.1)
