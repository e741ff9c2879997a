"""The README's Python examples run as they are printed, and the files and commands it names exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", README, flags=re.M | re.S)


def test_there_is_an_example_for_a_plain_loop_and_one_for_the_trainer():
    assert len(EXAMPLES) == 2
    assert "balancer.backward(losses)" in EXAMPLES[0]
    assert "BilevelMTLTrainer(" in EXAMPLES[1]


@pytest.mark.parametrize(
    ("number", "printed"),
    [(0, ["'sum': ", "'square': ", "'noise': "]), (1, ["'eval_loss': ", "'eval_loss_sum': ", "'eval_loss_first': "])],
)
def test_example_runs_as_printed(tmp_path, number, printed):
    (tmp_path / "example.py").write_text(EXAMPLES[number], encoding="utf-8")
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for text in printed:
        assert text in done.stdout
    assert "nan" not in done.stdout


def test_linked_files_and_recipes_exist():
    linked = re.findall(r"\]\((?!http)([^)#]+)", README) + re.findall(r"recipes/\S+\.yaml", README)
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
