"""`callbacks` of a recipe: a user's own classes take part in the run; what cannot work is one line before it begins."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hf_bilb.cli import main
from hf_bilb.data import DATA_SETS
from hf_bilb.experiments.recipe import read_recipe
from tests.cli.made_up import MADE_UP, RECIPE

OWN = """
import json
from transformers import TrainerCallback

class Watch(TrainerCallback):
    def on_train_end(self, args, state, control, balancer=None, **kwargs):
        with open("seen.json", "w") as file:
            json.dump([state.global_step, balancer.name], file)

class Needs(TrainerCallback):
    def __init__(self, path):
        self.path = path

class Other:
    pass
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(DATA_SETS, "made_up", MADE_UP)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(RECIPE)
    (tmp_path / "mine.py").write_text(OWN)
    return tmp_path


def hf_bilb(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def test_a_callback_takes_part_and_stands_in_the_run_s_recipe(folder: Path) -> None:
    result = hf_bilb("train", "small.yaml", "callbacks=[mine.py:Watch]")
    assert result.exit_code == 0, result.output
    steps, name = json.loads((folder / "seen.json").read_text())
    assert steps > 0 and name == read_recipe("small.yaml").balancer["name"]
    written = read_recipe(read_recipe("small.yaml").output_dir / "recipe.yaml")
    assert written.callbacks == ("mine.py:Watch",)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("[mine.py:Wach]", r"callbacks\[0\]: mine\.py has no 'Wach' \(did you mean \"Watch\"\?\)"),
        ("[mine.py:Needs]", r"callbacks\[0\]: mine\.py:Needs cannot be made without arguments: .*'path'"),
        ("[mine.py:Other]", r"callbacks\[0\]: mine\.py:Other makes a Other, expected a transformers\.TrainerCallback"),
        ("[mine.py]", r"callbacks\[0\]: 'mine\.py' is not valid, expected path/to/file\.py:function"),
        ("mine.py:Watch", r"callbacks: .*expected"),
        ("[none.py:Watch]", r"callbacks\[0\]: .*none\.py"),
    ],
)
def test_what_is_refused(folder: Path, given: str, line: str) -> None:
    result = hf_bilb("train", "small.yaml", f"callbacks={given}")
    assert result.exit_code == 2
    assert re.match(f"hf-bilb: error: {line}", result.stderr), result.stderr
    assert result.stderr.count("\n") == 1
