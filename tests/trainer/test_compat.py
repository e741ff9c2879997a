"""The list of private names of transformers and accelerate is complete, true, and looked at where it is due."""

from __future__ import annotations

import ast
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from packaging.requirements import Requirement
from packaging.version import Version
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_bilb import BilevelMTLTrainer, HfBilbError
from hf_bilb.trainer import compat
from tests.synthetic import build_data, build_model
from tests.trainer.harness import arguments

ROOT = Path(__file__).parents[2]
#: Folders whose classes extend those of transformers, or are handed their objects.
FOLDERS = ("trainer", "storage", "models")


def private_names_in_use() -> set[str]:
    """Names with an underscore that our code defines, calls, sets or reads, in the folders above."""
    found = set()
    for folder in FOLDERS:
        for path in (ROOT / "hf_bilb" / folder).rglob("*.py"):
            if path.name == "compat.py":
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute):
                    found.add(node.attr)
                elif isinstance(node, ast.FunctionDef):
                    found.add(node.name)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.add(node.value)
    return {name for name in found if name.startswith("_") and not name.startswith("__")}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The private attributes of real objects of theirs, none of ours among them."""
    model = build_model()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(str(tmp_path_factory.mktemp("plain")), use_cpu=True, report_to="none"),
        train_dataset=build_data(8),
    )
    optimizer = Accelerator(cpu=True).prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    assert isinstance(optimizer, AcceleratedOptimizer)
    # `_inner_training_loop` sets this one; the Trainer above has not trained.
    return {
        "Trainer": {*dir(trainer), "_train_batch_size"},
        "PreTrainedModel": set(dir(PreTrainedModel)),
        "AcceleratedOptimizer": set(dir(optimizer)),
        "GradientState": set(dir(optimizer.gradient_state)),
    }


def test_the_list_has_every_private_name_in_use(theirs: dict[str, set[str]]) -> None:
    listed = {name for names in compat.PRIVATE_NAMES.values() for name in names}
    of_torch = {name for cls in (torch.nn.Module, torch.optim.Optimizer) for name in dir(cls)}
    used = private_names_in_use() & set().union(*theirs.values()) - of_torch
    assert used - listed == set(), "add them to hf_bilb/trainer/compat.py"


def test_every_listed_name_is_there_and_in_use(theirs: dict[str, set[str]]) -> None:
    assert compat.missing_names(list(compat.READ_IN)) == []
    used = private_names_in_use()
    for owner, names in compat.PRIVATE_NAMES.items():
        own = theirs.get(owner.rpartition(".")[2])
        if own is not None:
            assert set(names) <= own, owner
            assert set(names) <= used, "taken off our code: take them off hf_bilb/trainer/compat.py"


def test_versions_are_those_of_the_project() -> None:
    constraints = dict(
        line.partition(";")[0].strip().split("==")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line.partition(";")[0]
    )
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    for package in compat.READ_IN:
        assert compat.READ_IN[package] == constraints[package]
        bound = next(
            Requirement(line.strip().strip('",')) for line in lines if line.strip().startswith(f'"{package}>=')
        )
        assert bound.specifier.contains(compat.LOWEST[package])
        lowest = next(iter(bound.specifier))
        assert lowest.operator == ">="
        assert Version(lowest.version) == Version(compat.LOWEST[package])


@pytest.mark.parametrize("installed", ["5.21.0", "5.23.0", "5.23.7", "5.22.3.dev0"])
def test_tested_versions_are_not_looked_at(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compat.PRIVATE_NAMES, "transformers.trainer.Trainer", ("_is_no_longer_there",))
    compat.check_versions({"transformers": installed, "accelerate": "1.15.0"})


@pytest.mark.parametrize("installed", ["5.24.0", "6.0.0", "5.20.4", "5.24.0.dev0"])
def test_an_untested_version_without_a_name_is_refused_in_one_line(
    installed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = {"transformers": installed, "accelerate": "1.15.0"}
    compat.check_versions(versions)  # everything is there: nothing is said
    monkeypatch.setitem(compat.PRIVATE_NAMES, "transformers.trainer.Trainer", ("_run_epoch", "_is_no_longer_there"))
    monkeypatch.setitem(compat.PRIVATE_NAMES, "transformers.no_such_module.Loader", ("_load",))
    monkeypatch.setitem(compat.PRIVATE_NAMES, "accelerate.state.GradientState", ("_is_not_looked_for",))
    with pytest.raises(HfBilbError) as raised:
        compat.check_versions(versions)
    assert str(raised.value) == (
        f"hf_bilb does not know this version of transformers {installed}: Trainer._is_no_longer_there, "
        "transformers.no_such_module.Loader is not there any more; install a tested one "
        "(transformers 5.21.0 to 5.23.0) or a newer hf_bilb"
    )


def test_building_a_trainer_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> BilevelMTLTrainer:
        return BilevelMTLTrainer(build_model(), arguments(tmp_path), train_dataset=build_data(8))

    future = {**{package: version(package) for package in compat.READ_IN}, "accelerate": "2.0.0"}
    monkeypatch.setattr(compat, "_installed", lambda: future)
    assert build().balancer.num_tasks == 4
    monkeypatch.setitem(compat.PRIVATE_NAMES, "accelerate.optimizer.AcceleratedOptimizer", ("_is_no_longer_there",))
    with pytest.raises(HfBilbError, match=r"accelerate 2\.0\.0: AcceleratedOptimizer\._is_no_longer_there"):
        build()
