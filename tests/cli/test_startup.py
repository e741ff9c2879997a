"""Help and the errors of a recipe come at once: neither torch nor transformers is imported for them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPE = "recipes/qm9/bilb_small.yaml"

COMMAND = """
import sys
from hf_bilb.cli import main
try:
    main(sys.argv[1:])
except SystemExit as exit:
    code = exit.code
heavy = {"torch", "transformers", "accelerate", "datasets", "peft", "numpy", "pandas", "matplotlib"}
print("HEAVY", code, sorted(heavy & sys.modules.keys()))
"""


def run(*arguments: str) -> tuple[str, str]:
    """The last line about modules, and what was said on stderr."""
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return done.stdout.splitlines()[-1], done.stderr


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["compare", "-h"], ["export", "-h"], ["--version"]]
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    assert run(*arguments)[0] == "HEAVY 0 []"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("trainer.learning_rat=1", 'trainer.learning_rat: unknown option, value 1 (did you mean "learning_rate"?)'),
        ("learning_rate=1", 'learning_rate: unknown section, value 1 (did you mean "trainer.learning_rate"?)'),
        ("trainer.task_names=[a]", "trainer.task_names: comes from the data set, value ['a']"),
        ("trainer.num_train_epochs=-1", "trainer.num_train_epochs: -1.0 is not valid, expected a number above 0"),
        ("trainer.output_dir=null", "trainer.output_dir: is required"),
        ("balancer.name=blib", "balancer.name: 'blib' is not known (did you mean \"bilb\"?)"),
        ("balancer.pairs=adjacen", "balancer.pairs: 'adjacen' is not valid, expected one of \"adjacent\", \"all\""),
        ("data.num_train=x", "data.num_train: 'x' is not valid, expected an integer or null"),
        ("data.name=qm8", "data.name: 'qm8' is not known (did you mean \"qm9\"?)"),
        ("model.hidden=3", 'model.hidden: unknown option, value 3 (did you mean "hidden_size"?)'),
        ("evaluation.splt=test", 'evaluation.splt: unknown option'),
        ("model=[1", "override model"),
    ],
)  # fmt: skip
def test_a_recipe_s_error_imports_nothing_heavy(change: str, said: str) -> None:
    modules, stderr = run("train", RECIPE, change)
    assert modules == "HEAVY 2 []"
    assert stderr.startswith(f"hf-bilb: error: {said}") and stderr.count("\n") == 1


def test_a_file_that_is_not_there() -> None:
    modules, stderr = run("show", "recipes/qm9/bilb_smal.yaml")
    assert modules == "HEAVY 2 []" and 'did you mean "bilb_small.yaml"?' in stderr


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["recipes"], 0),
        (["recipes", "copy", "qm9/bilb_smal.yaml"], 2),
        (["init", "--help"], 0),
        (["init", "READM.md"], 2),
        (["init", "README.md", "--text", "a", "--image", "b"], 2),
        (["init", "README.md", "--output", "pyproject.toml/my.yaml"], 2),
    ],
)
def test_what_needs_no_data_imports_nothing_heavy(arguments: list[str], code: int) -> None:
    assert run(*arguments)[0] == f"HEAVY {code} []"


@pytest.mark.parametrize(
    ("statement", "heavy", "most"),
    [
        ("import hf_bilb", [], 8),
        ("import hf_bilb.data, hf_bilb.models, hf_bilb.balancers", [], 14),
        ("import hf_bilb.models.heads", ["torch"], 12),
        ("import hf_bilb.engine.balancer", ["torch"], 35),
        ("import hf_bilb.data.images.celeba", ["torch"], 43),
    ],
)
def test_importing_a_part_imports_what_it_needs(statement: str, heavy: list[str], most: int) -> None:
    code = f"""
import sys
{statement}
heavy = {{"torch", "transformers", "peft", "torch.distributed.fsdp", "matplotlib", "datasets"}}
print(sorted(heavy & sys.modules.keys()), sum(name.startswith("hf_bilb") for name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    names, number = done.stdout.rsplit(maxsplit=1)
    assert names.strip() == str(heavy) and int(number) <= most
