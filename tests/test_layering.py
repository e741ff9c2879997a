"""Imports point one way: methods know torch alone, the Trainer knows methods, recipes know everything."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "hf_bilb").rglob("*.py"))
}
TOP = {f"hf_bilb.{name}" for name in ("recipe", "run", "cells", "compare", "cli", "__main__")}
TRAINING = {"hf_bilb.trainer", "hf_bilb.training_args", "hf_bilb.data", "hf_bilb.models", "hf_bilb.reporting"}


def imported(module: str) -> set[str]:
    """Every module that `module` names in an import, at the top or in a function; the package's own as modules."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= (inner & MODULES.keys()) or {node.module or ""}
    return names


def reachable(module: str) -> set[str]:
    """What `module` imports, and what those of the package import in turn."""
    seen: set[str] = set()
    queue = [module]
    while queue:
        fresh = imported(queue.pop()) - seen
        seen |= fresh
        queue += sorted(fresh & MODULES.keys())
    return seen


def within(names: set[str], packages: set[str]) -> set[str]:
    return {name for name in names if any(name == p or name.startswith(f"{p}.") for p in packages)}


def outside(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names} - {"hf_bilb"} - sys.stdlib_module_names


#: What a loop of one's own needs beside the methods: none of it knows the Trainer.
ENGINE = {
    f"hf_bilb.{name}"
    for name in (
        "coefficients",
        "decision",
        "discrepancy",
        "distributed",
        "errors",
        "guards",
        "look_ahead",
        "lower_level",
        "normalization",
        "objective",
        "options",
        "passes",
        "references",
        "router",
        "task_losses",
        "token_losses",
        "validity",
    )
}
METHODS = sorted(ENGINE | {name for name in MODULES if name.startswith("hf_bilb.balancers")})


@pytest.mark.parametrize("module", METHODS)
def test_methods_need_nothing_but_torch(module):
    # hf_bilb itself is where the version stands; its imports of the Trainer are lazy
    names = reachable(module) - reachable("hf_bilb") if "hf_bilb" in imported(module) else reachable(module)
    assert outside(names) <= {"torch"}
    assert within(names, TOP | TRAINING) == set()


@pytest.mark.parametrize("module", sorted(MODULES.keys() - TOP))
def test_nothing_imports_recipes_or_the_command_line(module):
    assert within(imported(module), TOP) == set()


@pytest.mark.parametrize("module", sorted(name for name in MODULES if name.startswith("hf_bilb.reporting")))
def test_reports_need_neither_torch_nor_transformers(module):
    assert outside(reachable(module)) <= {"matplotlib", "numpy"}


def test_the_trainer_knows_no_data_set_model_or_report():
    assert within(reachable("hf_bilb.trainer"), {"hf_bilb.data", "hf_bilb.models", "hf_bilb.reporting"}) == set()


ONE_STEP = """
import sys
import hf_bilb, torch
for name in hf_bilb.list_balancers():
    balancer = hf_bilb.build_balancer(name, num_tasks=3)
    parameters = torch.ones(3, requires_grad=True)
    balancer.backward(parameters.square())
    balancer.step(reevaluate=lambda: parameters.square())
    balancer.load_state_dict(balancer.state_dict())
heavy = {"transformers", "accelerate", "datasets", "safetensors", "numpy.testing", "yaml", "click", "matplotlib"}
print(sorted(heavy & sys.modules.keys()))
"""


def test_a_loop_of_ones_own_imports_neither_transformers_nor_recipes():
    done = subprocess.run([sys.executable, "-c", ONE_STEP], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    import hf_bilb

    with pytest.raises(AttributeError, match="module 'hf_bilb' has no attribute 'BilevelTrainer'"):
        hf_bilb.BilevelTrainer  # noqa: B018


def test_the_walk_sees_what_is_imported():
    assert "hf_bilb.balancers.base" in reachable("hf_bilb.trainer")
    assert outside(reachable("hf_bilb.run")) >= {"torch", "transformers", "click", "yaml", "matplotlib"}


def test_every_error_of_the_package_has_one_base_and_is_a_builtin_too():
    import hf_bilb
    from hf_bilb import errors

    found = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type)}
    children = {name for name, kind in found.items() if kind.__mro__[1] is errors.HfBilbError}
    assert children == found.keys() - {"HfBilbError"} and len(children) >= 6
    for name in found:
        assert getattr(hf_bilb, name) is found[name] and name in hf_bilb.__all__
    builtin = (ValueError, KeyError, ArithmeticError, ImportError, RuntimeError, OSError)
    assert all(issubclass(found[name], builtin) for name in children)


def test_errors_are_defined_in_one_place():
    defined = {
        node.name
        for module, path in MODULES.items()
        if module not in ("hf_bilb.errors", "hf_bilb.cli")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and any("Error" in ast.unparse(base) for base in node.bases)
    }
    assert defined <= {"_NoSuchFile"}
