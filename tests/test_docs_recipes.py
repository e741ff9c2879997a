"""docs/recipes.md: the commands, and the recipes, keys and options in them, exist; its mistake is as printed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from hf_bilb.cli import main

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^hf-bilb .+$", PAGE, flags=re.M)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_and_what_it_names_exist(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    _, name, *arguments = shlex.split(command, comments=True)
    said = CliRunner().invoke(main, [name, "--help"])
    assert said.exit_code == 0
    assert all(word in said.output for word in arguments if word.startswith("--"))
    for recipe in (word for word in arguments if word.endswith(".yaml") and name != "recipes"):
        overrides = [word for word in arguments if "=" in word and not word.startswith("-") and ":" not in word]
        shown = CliRunner().invoke(main, ["show", recipe, *overrides])
        assert shown.exit_code == 0, shown.output


def test_the_mistake_is_as_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    ((command, printed),) = re.findall(r"^```text\n\$ (.+)\n(.+)\n```$", PAGE, flags=re.M)
    done = CliRunner().invoke(main, shlex.split(command)[1:])
    assert (done.exit_code, done.stderr.strip()) == (2, printed)
