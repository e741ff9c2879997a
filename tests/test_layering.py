"""Imports point one way: a folder of the package is a layer, and knows only the layers below it."""

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

#: Folder, or file of the package itself -> those that it may import from, besides itself. Everything knows `errors`.
BELOW = {
    "errors": set(),
    "_version": set(),
    "config": set(),
    "storage": {"config"},
    "losses": {"config"},
    "engine": {"config", "losses"},
    "balancers": {"config", "losses", "engine"},
    "metrics": {"config", "losses"},
    "models": {"config", "storage", "losses"},
    "data": {"config", "losses", "metrics"},
    "trainer": {"_version", "config", "storage", "losses", "engine", "balancers", "metrics", "hub", "reporting"},
    "reporting": {"config", "storage", "metrics"},
    "hub": {"_version", "config", "storage", "metrics", "reporting"},
    "inference": {"_version", "config", "storage", "losses", "metrics", "models", "data", "reporting"},
    "experiments": {
        "config", "storage", "losses", "engine", "balancers", "metrics", "models", "data", "trainer", "reporting",
        "inference", "hub",
    },
    "cli": {"config", "storage", "data", "reporting", "hub", "inference", "experiments"},
    "__main__": {"cli"},
    "hf_bilb": {"_version", "config", "losses", "engine", "balancers", "models", "trainer", "inference"},
    "task_losses": {"losses"},  # the former place
    "checkpointing": set(),  # likewise
}  # fmt: skip
#: Packages that a folder may import at all, besides the standard library.
PACKAGES = {
    "errors": set(),
    "_version": set(),
    "config": {"yaml"},
    "losses": {"torch"},
    "engine": {"torch"},
    "balancers": {"torch", "numpy"},  # for problems of K numbers, in which calling an operation is all the work
    "reporting": {"matplotlib", "numpy"},
    "hub": {"huggingface_hub"},
    "cli": {"click"},
    "__main__": set(),
    "hf_bilb": set(),
}


def folder(module: str) -> str:
    """`engine` for `hf_bilb.engine.balancer`, `hf_bilb` for the package itself."""
    return module.split(".")[1] if "." in module else module


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


def ours(names: set[str]) -> set[str]:
    return {name for name in names if name == "hf_bilb" or name.startswith("hf_bilb.")}


def outside(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names} - {"hf_bilb"} - sys.stdlib_module_names


def test_every_folder_has_its_place():
    assert {folder(module) for module in MODULES} == BELOW.keys()
    for name, below in BELOW.items():
        for lower in below:
            assert name not in BELOW[lower], f"{name} and {lower} know each other"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_arrows_point_down(module):
    own = folder(module)
    found = {folder(name) for name in ours(imported(module))} - {own, "errors"}
    assert found <= BELOW[own], f"{module} imports from {sorted(found - BELOW[own])}"


@pytest.mark.parametrize("module", sorted(module for module in MODULES if folder(module) in PACKAGES))
def test_a_folder_needs_only_its_packages(module):
    assert outside(imported(module)) <= PACKAGES[folder(module)]


@pytest.mark.parametrize("module", sorted(m for m in MODULES if folder(m) in ("engine", "balancers")))
def test_methods_need_nothing_but_torch(module):
    of_gradients = module.startswith("hf_bilb.balancers.gradient.")
    assert outside(reachable(module)) <= ({"torch", "numpy"} if of_gradients else {"torch"})


ONE_STEP = """
import sys
import hf_bilb, torch
for name in set(hf_bilb.list_balancers()) - {"torchjd"}:  # which imports that package, and scipy with it
    balancer = hf_bilb.build_balancer(name, num_tasks=3)
    model = torch.nn.Linear(1, 3)
    inputs = torch.ones(2, 1)
    balancer.bind(model)
    balancer.backward(model(inputs).square().mean(0))
    balancer.step(reevaluate=lambda: model(inputs).square().mean(0))
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
    assert "hf_bilb.engine.balancer" in reachable("hf_bilb.trainer.trainer")
    assert outside(reachable("hf_bilb.experiments.train")) >= {"torch", "transformers", "click", "yaml", "matplotlib"}


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


def test_former_places_say_where_their_names_are():
    for module, name in (("task_losses", "masked_mse"), ("checkpointing", "CheckpointError")):
        code = f"import warnings; warnings.simplefilter('error'); from hf_bilb.{module} import {name}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
        assert "DeprecationWarning" in done.stderr and "from hf_bilb" in done.stderr
        quiet = subprocess.run([sys.executable, "-c", code.replace("'error'", "'ignore'")], cwd=ROOT, check=False)
        assert quiet.returncode == 0


def test_errors_are_defined_in_one_place():
    defined = {
        node.name
        for module, path in MODULES.items()
        if module not in ("hf_bilb.errors", "hf_bilb.cli.errors")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and any("Error" in ast.unparse(base) for base in node.bases)
    }
    assert defined <= {"_NoSuchFile"}
