"""`hf-bilb recipes`: what is listed, and that a copy runs from where it lies, with nothing written over."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from hf_bilb.cli import main
from hf_bilb.config.user_code import load_reference
from hf_bilb.config.yaml import load_yaml
from hf_bilb.experiments.packaged import packaged_names
from hf_bilb.experiments.recipe import read_recipe

ROOT = Path(__file__).parents[2]
RECIPES = sorted(
    path.relative_to(ROOT / "recipes").as_posix()
    for path in ROOT.glob("recipes/*/*.yaml")
    if path.parent.name != "accelerate"
)


def hf_bilb(*arguments: str, columns: int = 100):
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(main, ["recipes", *arguments], catch_exceptions=False)


def done(*arguments: str, **kwargs: int) -> str:
    result = hf_bilb(*arguments, **kwargs)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: str) -> str:
    result = hf_bilb(*arguments)
    assert result.exit_code == 2 and result.stdout == ""
    assert re.fullmatch(r"hf-bilb: error: [^\n]+\n", result.stderr)
    return result.stderr.removeprefix("hf-bilb: error: ").rstrip("\n")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- the list --------------------------------------------------------------------------------------------------------


def test_every_recipe_is_listed_with_what_it_names() -> None:
    listed = json.loads(done("--format", "json"))["recipes"]
    assert [entry["name"] for entry in listed] == RECIPES
    for entry in listed:
        raw = load_yaml((ROOT / "recipes" / entry["name"]).read_text(), "")
        named = [raw[key] if isinstance(raw[key], str) else raw[key]["name"] for key in ("data", "model", "balancer")]
        assert [entry["data"], entry["model"], entry["balancer"]] == named
        assert entry["summary"].endswith(".") and "#" not in entry["summary"]


def test_a_summary_is_the_first_sentence_over_all_its_lines() -> None:
    listed = {entry["name"]: entry["summary"] for entry in json.loads(done("--format", "json"))["recipes"]}
    assert listed["nyuv2/bilb_small.yaml"] == (
        "NYUv2 in minutes on a CPU: 3 tasks at 144 x 192, a quarter of the width of a SegNet, tasks balanced by BiLB "
        "(single loop, one backward pass)."
    )
    assert listed["adult/ls.yaml"].endswith("never married, a small shared-bottom network.")


def test_in_a_terminal_no_line_is_longer_than_it() -> None:
    lines = done(columns=72).splitlines()
    assert max(map(len, lines)) <= 72 and lines[2].startswith("adult/bilb.yaml ")
    assert lines[-1] == "hf-bilb recipes copy adult/bilb.yaml puts one into the current folder."


# --- a copy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_a_copy_says_what_the_original_says(name: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert done("copy", name).startswith(f"wrote {Path(name).name}")
    copied = read_recipe(Path(name).name)
    monkeypatch.chdir(ROOT)
    original = read_recipe(f"recipes/{name}")
    factory = original.model.get("factory")
    if factory is not None:
        original.model["factory"] = factory.removeprefix(f"recipes/{Path(name).parent}/")
        assert copied.model["factory"] != factory
    assert copied == original


@pytest.mark.parametrize(
    ("output", "recipe", "reference"),
    [
        (None, "bilb.yaml", "network.py:build"),
        ("my.yaml", "my.yaml", "network.py:build"),
        ("new/folder", "new/folder/bilb.yaml", "new/folder/network.py:build"),
        ("a: #b/my.yml", "a: #b/my.yml", "a: #b/network.py:build"),
    ],
)
def test_a_copy_finds_its_code_from_the_current_folder(
    output: str | None, recipe: str, reference: str, here: Path
) -> None:
    done("copy", "census/bilb.yaml", *([] if output is None else ["--output", output]))
    copied = read_recipe(recipe)
    assert copied.model["factory"] == reference
    network = load_reference(reference, "model.factory")(num_features=3, num_tasks=2)
    assert sum(parameter.numel() for parameter in network.parameters()) > 0
    text = Path(recipe).read_text()
    assert f"train {recipe}" in text and "recipes/census/bilb.yaml" not in text and "recipes/census/network" not in text


def test_a_copy_outside_of_the_current_folder_has_an_absolute_reference(here: Path, tmp_path_factory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    done("copy", "census/bilb.yaml", "--output", str(elsewhere))
    assert read_recipe(elsewhere / "bilb.yaml").model["factory"] == f"{(elsewhere / 'network.py').resolve()}:build"


def test_it_says_what_was_written_what_is_missing_and_what_comes_next(here: Path) -> None:
    wrote, missing, following = done("copy", "adult/ls.yaml", "--output", "my own.yaml").splitlines()
    assert wrote == "wrote my own.yaml, network.py"
    assert missing == (
        "data.folder: there is no '../shared/data/adult' here; set it to where your data lie, which the recipe "
        "describes"
    )
    assert following == "next: hf-bilb train 'my own.yaml'"


def test_nothing_is_said_of_data_that_are_there(here: Path) -> None:
    (here / "data/nyuv2").mkdir(parents=True)
    assert done("copy", "nyuv2/ls.yaml") == "wrote ls.yaml\nnext: hf-bilb train ls.yaml\n"


def test_names_may_be_short_or_as_in_the_repository(here: Path) -> None:
    for i, name in enumerate(["qm9/uw", "recipes/qm9/uw.yaml", "qm9/uw.yaml"]):
        done("copy", name, "--output", f"{i}.yaml")
        assert read_recipe(f"{i}.yaml").balancer["name"] == "uw"


# --- nothing is lost -------------------------------------------------------------------------------------------------


def test_nothing_is_written_over_without_force(here: Path) -> None:
    (here / "network.py").write_text("mine")
    said = "--output: 'network.py' is already there: --force writes over it, another --output leaves it"
    assert refused("copy", "census/bilb.yaml") == said
    assert [path.name for path in here.iterdir()] == ["network.py"] and (here / "network.py").read_text() == "mine"
    done("copy", "census/bilb.yaml", "--force")
    assert "MixtureOfExperts" in (here / "network.py").read_text()


def test_recipes_of_one_network_share_its_file(here: Path) -> None:
    done("copy", "census/bilb.yaml")
    done("copy", "census/ls.yaml")
    assert sorted(path.name for path in here.iterdir()) == ["bilb.yaml", "ls.yaml", "network.py"]
    assert "'network.py' is already there" in refused("copy", "adult/bilb.yaml", "--output", "adult.yaml")


def test_mistakes_are_one_line(here: Path) -> None:
    assert refused("copy", "qm9/bilb_smal.yaml") == (
        "recipe: 'qm9/bilb_smal.yaml' is not known (did you mean \"qm9/bilb_small.yaml\"?); `hf-bilb recipes` lists "
        "all of them"
    )
    (here / "file").write_text("")
    assert "is a file, expected a folder" in refused("copy", "qm9/uw.yaml", "--output", "file/x.yaml")
    (here / "uw.yaml").mkdir()
    assert refused("copy", "qm9/uw.yaml", "--output", ".") == "--output: 'uw.yaml' is a folder"


@pytest.mark.parametrize("command", ["train", "show"])
@pytest.mark.parametrize("name", ["qm9/uw.yaml", "qm9/uw", "recipes/qm9/uw.yaml"])
def test_a_recipe_of_the_package_that_is_not_here_says_how_to_get_it(command: str, name: str, here: Path) -> None:
    result = CliRunner().invoke(main, [command, name])
    assert result.exit_code == 2 and result.stderr == (
        f"hf-bilb: error: {name}: there is no such recipe here; `hf-bilb recipes copy qm9/uw.yaml` puts the one of the "
        "package into your folder\n"
    )


def test_the_names_are_those_of_the_folder() -> None:
    assert packaged_names() == RECIPES and len(RECIPES) > 40
