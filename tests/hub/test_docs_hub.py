"""docs/hub.md: every block, against the test's Hub; `me` is somebody there."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from hf_bilb.cli import main
from tests.hub.runs import run, write_recipe
from tests.hub.server import Hub
from tests.hub.test_trainer_card import trained

PAGE = (
    (Path(__file__).parents[2] / "docs" / "hub.md")
    .read_text(encoding="utf-8")
    .replace("me/reviews", "somebody/reviews")
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.M | re.S)


def test_the_commands(hub: Hub, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path / "runs" / "reviews")
    for name in ("rows.csv", "reviews.csv"):
        shutil.copy(finished.parent / "people.csv", tmp_path / name)
    push, again = (block.strip().splitlines() for block in blocks("sh"))
    assert len(push) == 1 and run(*shlex.split(push[0])[1:], "--with-checkpoints").exit_code == 0
    use, bare, _ = blocks("python")
    bare = f"import sys\nsys.modules['hf_bilb'] = None\n{bare}"  # it is not installed
    download, resume = map(shlex.split, again)
    python = [sys.executable, "-c"]
    for command in ([*python, use], [*python, bare], [str(Path(sys.executable).parent / download[0]), *download[1:]]):
        done = subprocess.run(command, env=hub.environment(tmp_path), cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    done = run(*resume[1:], "trainer.max_steps=35")
    assert done.exit_code == 0, done.output
    training = json.loads((tmp_path / "reviews" / "results.json").read_text())["training"]
    assert (training["resumed_from"], training["steps"]) == ("checkpoint-30", 35)


def test_the_recipe(hub: Hub, tmp_path: Path) -> None:
    (block,) = blocks("yaml")
    recipe = yaml.safe_load(write_recipe(tmp_path).read_text())
    recipe["trainer"].update(yaml.safe_load(block)["trainer"])
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    assert run("train", tmp_path / "mine.yaml").exit_code == 0
    assert "README.md" in hub.repos["somebody/reviews"] and hub.private == {"somebody/reviews"}


def test_the_trainer(tmp_path: Path) -> None:
    *_, code = blocks("python")
    exec(code, {"trainer": trained(tmp_path / "net")})
    assert "license: apache-2.0" in (tmp_path / "net" / "README.md").read_text()


def test_the_table_of_options_is_that_of_the_command() -> None:
    said = CliRunner().invoke(main, ["push", "--help"]).output
    options = set(re.findall(r"^ +(--[a-z-]+)", said, re.M))
    assert set(re.findall(r"^\| `(--[a-z-]+)", PAGE, re.M)) == options
