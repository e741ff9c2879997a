"""The worked example of a method of one's own: in a loop, in the Trainer, in recipes and comparisons."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_bilb import OptionError, build_balancer
from hf_bilb.balancers import LossBalancer
from hf_bilb.cli import main
from hf_bilb.config.user_code import import_source
from hf_bilb.config.yaml import load_yaml
from hf_bilb.data import DATA_SETS
from hf_bilb.engine.objective import differentiate
from hf_bilb.experiments.recipe import read_recipe
from hf_bilb.reporting.results import read_results
from tests.cli.made_up import MADE_UP, RECIPE
from tests.contract.cases import advance, random_losses
from tests.contract.frozen import central_differences
from tests.registration import registration_undone
from tests.trainer.harness import BATCH, FLOAT, build_data, build_model, by_hand, close, flat_parameters, run

ROOT = Path(__file__).parents[2]
FILE = ROOT / "examples" / "own_method.py"
FOCUS = 1.5


@pytest.fixture
def own() -> Iterator[ModuleType]:
    """The example, imported and registered."""
    with registration_undone():
        yield import_source(str(FILE), "imports")


@pytest.fixture
def unknown() -> Iterator[None]:
    """The example is not registered yet; what registers it is forgotten afterwards."""
    with registration_undone():
        yield


class ByHand:
    """The equations of the file, in plain torch."""

    def __init__(self, focus: float = FOCUS) -> None:
        self.focus, self.first, self.mean = focus, None, None

    def __call__(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """F and the weights."""
        with torch.no_grad():
            self.first = losses.clone() if self.first is None else self.first
            ratio = losses / self.first
            self.mean = ratio if self.mean is None else 0.9 * self.mean + 0.1 * ratio
            weights = self.mean**self.focus
            weights = len(losses) * weights / weights.sum()
        return (weights * losses / self.first).sum(), weights


def advanced(steps: int = 4, **options: Any) -> tuple[LossBalancer, Tensor]:
    """A balancer after some steps, and the losses of the next one."""
    balancer = build_balancer("catch_up", 6, dtype=FLOAT, **options)
    losses = random_losses(6, steps + 1)
    for row in losses[:steps]:
        advance(balancer, row)
    return balancer, losses[steps].clone()


def test_the_equation(own: ModuleType) -> None:
    balancer, by_hand = build_balancer("catch_up", 6, dtype=FLOAT, focus=FOCUS), ByHand()
    for row in random_losses(6, 6):
        leaf = row.clone().requires_grad_()
        value, weights = by_hand(leaf)
        expected = torch.autograd.grad(value, leaf)[0]
        torch.testing.assert_close(advance(balancer, row), expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(balancer.weights, weights, rtol=1e-12, atol=0)
    assert weights.max() > 1.5 * weights.min()


def test_coefficients_are_the_derivatives(own: ModuleType) -> None:
    balancer, point = advanced(focus=FOCUS)
    active = torch.tensor([True, True, False, True, True, True])

    def value() -> Tensor:
        with torch.no_grad():
            return balancer.objective(balancer.normalization(point), active, None).value

    found = differentiate(balancer.objective, balancer.normalization, point, active).coefficients
    expected = central_differences(value, point, 1e-6)
    assert (found - expected).abs().max() <= 2e-7 * expected.abs().max()
    assert found[2] == 0 and found.sum() > 0


def test_the_state_makes_a_round_trip_through_a_file(own: ModuleType, tmp_path: Path) -> None:
    through, _ = advanced()
    save_file(through.state_dict(), tmp_path / "state.safetensors")
    resumed = build_balancer("catch_up", 6, dtype=FLOAT)
    resumed.load_state_dict(load_file(tmp_path / "state.safetensors"))
    for row in random_losses(6, 3, seed=1):
        assert torch.equal(advance(resumed, row), advance(through, row))
    assert "objective.averages" in through.state_dict()


def test_focus_zero_is_the_plain_sum_of_normalised_losses(own: ModuleType) -> None:
    balancer, plain = (
        build_balancer(name, 5, dtype=FLOAT, normalization="initial", **options)
        for name, options in (("catch_up", {"focus": 0.0}), ("ls", {}))
    )
    for row in random_losses(5, 4):
        torch.testing.assert_close(advance(balancer, row), advance(plain, row), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("focus", float("inf"), "balancer.focus: inf is not valid, expected a finite number"),
        ("fokus", 1, 'balancer.fokus: unknown option, value 1 (did you mean "focus"?)'),
        ("normalization", "log", "balancer.normalization: 'log' is not valid, expected another one"),
    ],
)
def test_a_wrong_option_is_one_line(own: ModuleType, option: str, value: Any, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        build_balancer("catch_up", 3, **{option: value})
    assert str(caught.value).startswith(message)


def test_in_the_trainer_as_by_hand(own: ModuleType, tmp_path: Path) -> None:
    data, formula = build_data(8 * BATCH, dtype=FLOAT), ByHand()
    found = run(tmp_path, data=data, balancer={"name": "catch_up", "focus": FOCUS})
    model = build_model(FLOAT)
    values = by_hand(model, data, lambda losses, items, step: formula(losses)[0])
    assert close(found.parameters, flat_parameters(model))
    assert found.logged("loss") == pytest.approx(values, rel=1e-6)
    assert found.logged("weight/alpha")[0] == 1


def test_what_it_prints(own: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    own.main()
    rows = {
        line.split()[0]: [float(word) for word in line.split()[1:]] for line in capsys.readouterr().out.splitlines()[1:]
    }
    assert list(rows) == ["ls", "si", "catch_up", "(mean)"]
    # ls leaves the digits behind, si the ink; the example learns both
    accuracy, error = zip(*(rows[name] for name in ("ls", "si", "catch_up")), strict=True)
    assert accuracy[0] < accuracy[2] and accuracy[2] > 0.9
    assert error[2] < 0.5 * error[1] and error[1] < rows["(mean)"][0]


# ---------------------------------------------------------------------------------------------------- recipes


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unknown: None) -> Path:
    """An empty current folder with a recipe for the made-up data that imports a copy of the example."""
    monkeypatch.setitem(DATA_SETS, "made_up", MADE_UP)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "own_method.py").write_text(FILE.read_text(encoding="utf-8"), encoding="utf-8")
    head = "imports: [mine/own_method.py]\n"
    balancer = "balancer: {name: catch_up, focus: 0.5}"
    (tmp_path / "small.yaml").write_text(head + RECIPE.replace("balancer: {name: bilb}", balancer))
    return tmp_path


def hf_bilb(*arguments: str) -> Any:
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


def test_a_recipe_imports_it_and_trains(folder: Path) -> None:
    fixed = ("trainer.lr_scheduler_type=constant", "evaluation.plots=false")  # a schedule depends on the epochs
    result = hf_bilb("train", "small.yaml", "trainer.num_train_epochs=2", *fixed)
    assert result.exit_code == 0, result.output
    resolved = load_yaml((folder / "run" / "recipe.yaml").read_text(), "recipe.yaml")
    assert resolved["imports"] == ["mine/own_method.py"]
    assert resolved["balancer"]["focus"] == 0.5 and resolved["balancer"]["normalization"] == "initial"
    results = read_results("run")
    assert results.balancer == "catch_up" and results.settings == resolved
    # The resolved recipe runs, and a resumed run ends as one that was never stopped.
    through = hf_bilb("train", "run/recipe.yaml", "trainer.output_dir=through", "trainer.num_train_epochs=4")
    assert through.exit_code == 0, through.output
    assert hf_bilb("train", "small.yaml", "--resume", *fixed).exit_code == 0
    assert read_results("run").training["resumed_from"] == "checkpoint-24"
    assert read_results("run").metrics == read_results("through").metrics != results.metrics


def test_the_command_line_imports_it_too(folder: Path) -> None:
    (folder / "plain.yaml").write_text(RECIPE)
    mine = ["imports=[mine/own_method.py]", "balancer=catch_up", "balancer.focus=2"]
    recipe = read_recipe("plain.yaml", mine)
    assert recipe.imports == ("mine/own_method.py",) and recipe.balancer["focus"] == 2
    shown = hf_bilb("show", "plain.yaml", *mine)
    (folder / "shown.yaml").write_text(shown.stdout)
    assert read_recipe("shown.yaml") == read_recipe("shown.yaml", mine)
    assert "imports" not in read_recipe("plain.yaml").to_dict()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "mine/own_method.py",
            "imports: 'mine/own_method.py' is not valid, expected a list of files (path/to/file.py) ",
        ),
        ("[3]", "imports: [3] is not valid, expected a list of files"),
        ("[mine/own_methd.py]", "imports[0]: there is no file 'mine/own_methd.py' (did you mean \"own_method.py\"?), "),
        (
            "[json, no.such.module]",
            "imports[1]: no.such.module cannot be imported: ModuleNotFoundError: No module named ",
        ),
        ("[mine/wrong.py]", "imports[0]: mine/wrong.py cannot be imported: SyntaxError: "),
        ("[mine/twice.py]", "imports[0]: mine/twice.py cannot be imported: ValueError: balancer 'ls' is already "),
    ],
)
def test_what_cannot_be_imported_is_one_line(folder: Path, value: str, message: str) -> None:
    (folder / "mine" / "wrong.py").write_text("def half(:\n")
    text = FILE.read_text(encoding="utf-8").replace('register_balancer("catch_up"', 'register_balancer("ls"')
    (folder / "mine" / "twice.py").write_text(text, encoding="utf-8")
    for command in ("train", "show"):
        result = hf_bilb(command, "small.yaml", f"imports={value}")
        assert result.exit_code == 2 and result.stdout == ""
        (line,) = result.stderr.splitlines()
        assert line.startswith(f"hf-bilb: error: {message}")
    assert not (folder / "run").exists()


def test_without_its_import_the_name_is_unknown(folder: Path) -> None:
    result = hf_bilb("show", "small.yaml", "imports=[]")
    assert result.exit_code == 2
    assert result.stderr.startswith("hf-bilb: error: balancer.name: 'catch_up' is not known")
    assert (
        'import: unknown section, value [] (did you mean "imports"?)'
        in hf_bilb("show", "small.yaml", "import=[]").stderr
    )


def test_two_files_of_one_name_and_one_file_of_two_names(folder: Path) -> None:
    other = folder / "other" / "own_method.py"
    other.parent.mkdir()
    other.write_text(FILE.read_text(encoding="utf-8").replace('"catch_up"', '"other"'), encoding="utf-8")
    sources = ["mine/own_method.py", str(other), "other/../mine/own_method.py", str(folder / "mine/own_method.py")]
    recipe = read_recipe("small.yaml", [f"imports={json.dumps(sources)}", "balancer=other"])
    assert recipe.balancer["name"] == "other" and recipe.imports == tuple(sources)
    assert read_recipe("small.yaml").balancer["name"] == "catch_up"


DATA = """
from hf_bilb.data import DATA_SETS
from tests.cli.made_up import MADE_UP
DATA_SETS["made_up"] = MADE_UP
"""


@pytest.mark.slow
def test_a_comparison_in_processes_of_its_own(folder: Path) -> None:
    (folder / "data.py").write_text(DATA)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    overrides = ["imports=[data.py, mine/own_method.py]", "trainer.num_train_epochs=1", "evaluation.plots=false"]
    asked = ["--balancers", "ls,catch_up,catch_up:focus=2", "--output", "compared"]
    command = [sys.executable, "-m", "hf_bilb", "compare", "small.yaml", *overrides, *asked]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    cells = sorted(path.parent.parent.name for path in (folder / "compared").glob("*/seed-0/results.json"))
    assert cells == ["catch_up", "catch_up-focus=2", "ls"]
    assert read_results(folder / "compared/catch_up/seed-0").settings["balancer"]["focus"] == 0.5
    again = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0 and again.stdout.count("is finished") == 3, again.stdout + again.stderr


def test_the_contract_suite_takes_it() -> None:
    command = [sys.executable, "-m", "pytest", "tests/contract", "-p", "examples.own_method", "-k", "catch_up"]
    few = ["-q", "-x", "-p", "no:cacheprovider", "--deselect", "tests/contract/test_every_balancer.py::test_finite"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_BILB_ALL_CASES": "1"}
    done = subprocess.run([*command, *few], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout
    assert int(done.stdout.splitlines()[-1].split(" passed")[0].split()[-1]) > 60
