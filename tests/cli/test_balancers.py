"""`hf-bilb balancers`: what it prints is what the methods are."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from hf_bilb import build_balancer, list_balancers
from hf_bilb.balancers import get_balancer_spec, resolve_options
from hf_bilb.balancers.registry import GRADIENT_METHODS
from hf_bilb.cli import main
from hf_bilb.config.yaml import load_yaml
from hf_bilb.experiments.describe import _in_terms_of_k
from tests.registration import registration_undone

ROOT = Path(__file__).parents[2]
NAMES = list_balancers()
#: As the tables have them: the loss balancers first.
BY_FAMILY = sorted(NAMES, key=lambda name: (name in GRADIENT_METHODS, name))


@pytest.fixture(autouse=True)
def undone() -> Iterator[None]:
    with registration_undone():
        yield


def printed(*arguments: str) -> str:
    narrow = {"COLUMNS": "80"}  # whatever the terminal is that the tests run in
    result = CliRunner(env=narrow).invoke(main, ["balancers", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(main, ["balancers", *arguments], catch_exceptions=False)
    assert result.exit_code == 2 and result.stdout == ""
    assert re.fullmatch(r"hf-bilb: error: [^\n]+\n", result.stderr)
    return result.stderr.removeprefix("hf-bilb: error: ").rstrip("\n")


@pytest.fixture(scope="module")
def entries() -> dict[str, Any]:
    return {entry["name"]: entry for entry in json.loads(printed("--format", "json"))["balancers"]}


def test_all_are_there(entries: dict[str, Any]) -> None:
    assert list(entries) == NAMES
    assert all(entry["paper"] == get_balancer_spec(name).paper for name, entry in entries.items())


@pytest.mark.parametrize("name", NAMES)
def test_defaults_are_those_of_the_options(name: str, entries: dict[str, Any]) -> None:
    common = json.loads(printed("--format", "json"))["common_options"]
    written = {option["name"]: option["default"] for option in [*common, *entries[name]["options"]]}
    assert "required" not in written.values()
    assert resolve_options(name, {key: load_yaml(text, key) for key, text in written.items()}) == resolve_options(
        name, {}
    )
    fields = set(resolve_options(name, {}).__dict__)
    assert written.keys() == fields


@pytest.mark.parametrize("name", NAMES)
def test_every_option_says_what_it_means(name: str, entries: dict[str, Any]) -> None:
    for option in entries[name]["options"]:
        assert len(option["meaning"]) > 15, option
        assert len(option["accepts"]) > 3, option


@pytest.mark.parametrize("name", NAMES)
def test_state_is_the_balancer_s(name: str, entries: dict[str, Any]) -> None:
    num_tasks = 4  # none of the sizes that the table was made from
    balancer = build_balancer(name, num_tasks)
    state = {
        key.removeprefix("objective."): tensor
        for key, tensor in balancer.state_dict().items()
        if key.startswith(("objective.", "progress."))
    }
    found = {}
    for line in entries[name]["state"]:
        key, shape, trained = re.fullmatch(r"(\S+?)(?: \(on the host\))?(?: \[(.*)\])?( \(trained\))?", line).groups()
        key = key if key in state else f"{key}._extra_state"
        found[key] = tuple(eval(size, {"K": num_tasks}) for size in shape.split(", ")) if shape else ()
        assert bool(trained) == (key in dict(balancer.objective.named_parameters()))
    assert found == {key: tuple(tensor.shape) for key, tensor in state.items()}


@pytest.mark.parametrize(
    ("sizes", "written"),
    [((3, 5, 8), "K"), ((4, 6, 9), "K + 1"), ((6, 10, 16), "2K"), ((7, 7, 7), "7"), ((9, 25, 64), "...")],
)
def test_sizes_in_terms_of_k(sizes: tuple[int, ...], written: str) -> None:
    assert _in_terms_of_k(sizes) == written


def test_costs_of_famo_and_bilb(entries: dict[str, Any]) -> None:
    # tests/balancers/test_costs.py counts the passes
    assert entries["famo"]["costs"] == [
        {"passes": "2F + 1B", "memory": "none", "when": "reevaluate: same_batch"},
        {"passes": "1F + 1B", "memory": "none", "when": "reevaluate: next_batch"},
    ]
    assert [cost["passes"] for cost in entries["bilb"]["costs"]] == ["1F + 1B", "(N + 2)F + (N + 1)B"]


def test_the_table_fits_a_wide_terminal() -> None:
    text = printed()
    assert max(map(len, text.splitlines())) <= 120
    first = [line.split()[0] for line in text.split("\n\nOptions that")[0].splitlines() if line[:1].strip()]
    assert [name for name in first if name in NAMES] == BY_FAMILY
    losses, gradients = text.split("\nGradient methods: ")
    assert losses.startswith("Loss balancers: ") and "\nuw " in losses and "\naligned_mtl " in gradients
    for option in ("coefficient_floor", "tasks_per_pass"):  # those of all balancers, or gradient methods, stand once
        assert text.count(f"{option}: ") == 1 and text.count(f"{option}=") == 0
    assert "options: weight_decay=0.001, min_losses=0.0, reevaluate=same_batch, learning_rate=0.025\n" in text


def test_the_markdown_tables_have_a_row_for_each() -> None:
    losses, gradients = printed("--format", "markdown").split("\nGradient methods: ")
    named = []
    for page in (losses, gradients):
        title, table = page.split("\n\n")[:2]
        rows = [line.split(" | ") for line in table.splitlines()]
        assert "\n" not in title and {len(row) for row in rows} == {6}
        named += [row[0].strip("| `") for row in rows[2:]]
    assert named == BY_FAMILY
    assert "| `coefficient_floor` | `null` |" in gradients and "| `tasks_per_pass` | `null` |" in gradients


def test_one_gradient_method_shows_what_all_have(entries: dict[str, Any]) -> None:
    assert {entry["family"] for name, entry in entries.items() if name in GRADIENT_METHODS} == {"gradient"}
    assert {entry["family"] for name, entry in entries.items() if name not in GRADIENT_METHODS} == {"loss"}
    page = printed("pcgrad")
    own, of_family, of_all = page[page.index("\nOptions:") :].split("\nOptions that every ")
    assert {line.split(":")[0].strip() for line in own.splitlines() if line[:3].strip()} == {
        "Options", "order", "seed", "heads",
    }  # fmt: skip
    assert of_family.startswith("gradient method has:\n  gradients: parameters (") and "\n  heads:" not in of_family
    assert of_all.startswith("balancer has:\n  learning_rate: ")
    state = page.split("\nState:\n")[1].split("\n\n")[0]
    built = build_balancer("pcgrad", 4).state_dict().keys() - build_balancer("ls", 4).state_dict().keys()
    for key in built:
        shown = key.removeprefix("objective.").removesuffix("._extra_state")
        assert shown in state, key


@pytest.mark.parametrize("form", ["text", "markdown", "json"])
@pytest.mark.parametrize("name", NAMES)
def test_one_in_full(name: str, form: str) -> None:
    page = printed(name, "--format", form)
    spec = get_balancer_spec(name)
    equation = ast.get_docstring(ast.parse(Path(inspect.getfile(spec.objective)).read_text(encoding="utf-8")))
    if form == "json":
        (entry,) = json.loads(page)["balancers"]
        assert entry["equation"] == equation and entry["presets"].keys() == spec.options.presets.keys()
        return
    assert equation in page
    assert all(preset in page for preset in spec.options.presets)
    for option in resolve_options(name, {}).__dict__:
        assert (f"\n  {option}: " if form == "text" else f"\n| `{option}` | ") in page, option
        assert page.count(f"\n  {option}: ") <= 1


def test_a_wrong_name_is_one_line() -> None:
    begin = "NAME: 'famos' is not known (did you mean \"famo\"?); known: aligned_mtl, bilb, cagrad, dwa, "
    assert refused("famos").startswith(begin)


def test_a_method_of_one_s_own_is_listed_where_its_file_is_imported(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(OWN, encoding="utf-8")
    (entry,) = (
        e for e in json.loads(printed("--import", str(own), "--format", "json"))["balancers"] if e["name"] == "own"
    )
    assert entry["costs"] == [{"passes": "1F + 1B", "memory": "none", "when": ""}]
    assert entry["state"] is None  # it cannot be built without its option
    assert [(option["name"], option["default"]) for option in entry["options"]] == [("slope", "required")]
    page = printed("--import", str(own), "own")
    assert "My own method: F = slope sum_k l_k." in page and "depends on its options" in page
    assert "slope: required (a number)\n      of the line.\n" in page
    assert refused("--import", str(tmp_path / "owm.py")).startswith("--import[0]: there is no file ")


OWN = '''"""My own method: F = slope sum_k l_k."""
from dataclasses import dataclass
from hf_bilb import register_balancer
from hf_bilb.balancers import BalancerOptions
from hf_bilb.engine.objective import Objective


@dataclass(frozen=True, kw_only=True)
class Options(BalancerOptions):
    """Mine.

    Attributes:
        slope: of the
            line.
    """

    slope: float


@register_balancer("own", options=Options, paper="mine")
class Own(Objective):
    def forward(self, losses, active, features):
        raise NotImplementedError
'''

LIGHT = """
import sys
from click.testing import CliRunner
from hf_bilb.cli import main
assert CliRunner().invoke(main, ["balancers"]).exit_code == 0
print(sorted({"transformers", "accelerate", "datasets", "matplotlib"} & sys.modules.keys()))
"""


def test_nothing_heavy_is_imported() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
