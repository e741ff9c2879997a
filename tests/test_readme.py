"""The README's Python examples run as they are printed, and the files and commands it names exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from hf_bilb import list_balancers
from hf_bilb.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", README, flags=re.M | re.S)


def test_there_is_an_example_for_the_trainer_and_one_for_a_plain_loop():
    assert len(EXAMPLES) == 2
    assert "BilevelMTLTrainer(" in EXAMPLES[0]
    assert "balancer.backward(losses)" in EXAMPLES[1]


@pytest.mark.parametrize(
    ("number", "printed"),
    [(0, ["'eval_loss': ", "'eval_loss_sum': ", "'eval_loss_first': "]), (1, ["'sum': ", "'square': ", "'noise': "])],
)
def test_example_runs_as_printed(tmp_path, number, printed):
    (tmp_path / "example.py").write_text(EXAMPLES[number], encoding="utf-8")
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for text in printed:
        assert text in done.stdout
    assert "nan" not in done.stdout


def test_linked_files_and_recipes_exist():
    linked = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert len(linked) >= 8
    assert [name for name in linked if not (ROOT / name).exists()] == []


def test_linked_sections_exist():
    linked = re.findall(r"\]\(([\w/]+\.md)#([\w-]+)\)", README)
    assert linked
    for page, section in linked:
        headings = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(encoding="utf-8"), flags=re.M)
        assert section in [heading.lower().replace(" ", "-") for heading in headings], f"{page}#{section}"


def test_the_two_commands_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\S+)$", README, flags=re.M):
        assert re.search(rf"^{target}:", makefile, flags=re.M)
    assert "make quickstart\nmake test\n" in README


def test_the_methods_are_those_of_the_library_and_as_many_as_is_said():
    table = README.partition("| kind | methods |")[2].partition("\n\n")[0]
    rows = [line.split("|")[2] for line in table.splitlines() if line.startswith("| [")]
    names = [re.findall(r"`(\w+)`", row) for row in rows]
    assert sorted(name for row in names for name in row) == list_balancers()
    assert "eleven other loss balancers and fifteen gradient methods" in README
    assert (sum(map(len, names[:-1])), len(names[-1])) == (12, 15)


def test_the_commands_and_their_options_exist():
    commands = [shlex.split(line, comments=True) for line in re.findall(r"^hf-bilb .+$", README, flags=re.M)]
    assert [command[1] for command in commands] == ["init", "train", "compare", "predict"]
    for command in commands:
        said = CliRunner().invoke(main, [command[1], "--help"]).output
        assert all(word in said for word in command if word.startswith("--"))


def test_the_figures_are_those_of_which_balancer():
    page = (ROOT / "docs" / "which_balancer.md").read_text(encoding="utf-8")
    figures = {}
    for method, error in re.findall(r"\| `(\w+)`[^|]*\| (0\.\d+) \|", page):
        figures.setdefault(method, []).append(f"{float(error):.2f}")
    said = re.search(
        r"`bilb` (\S+) to (\S+), `ls` with `power` (\S+), `famo` (\S+),\s+`nash_mtl` (\S+) in", README
    ).groups()
    bilb, (power,), (famo,), (nash,) = (figures[name] for name in ("bilb", "ls", "famo", "nash_mtl"))
    assert said == (*sorted(bilb), power, famo, nash)
