"""`report_to` whose package is not installed, or that nobody knows: one line, before anything is trained."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from hf_bilb import BilevelMTLTrainer, BilevelMTLTrainingArguments, OptionError
from hf_bilb.errors import MissingPackageError
from hf_bilb.experiments.build import training_arguments
from hf_bilb.experiments.recipe import parse_recipe
from hf_bilb.trainer import checks
from hf_bilb.trainer.checks import check_reporting
from tests.trainer.harness import FLOAT, build_model, plain_settings


@pytest.fixture
def no_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)


WANDB = "'wandb' needs the package wandb, which is not installed; `pip install wandb`, or set report_to: \"none\""


@pytest.mark.parametrize("report_to", ["wandb", ["tensorboard", "wandb"]])
@pytest.mark.usefixtures("no_wandb")
def test_a_package_that_is_not_installed(report_to: str | list[str], tmp_path: Path) -> None:
    args = BilevelMTLTrainingArguments(**plain_settings(tmp_path, report_to=report_to))
    with pytest.raises(MissingPackageError) as caught:
        BilevelMTLTrainer(model=build_model(FLOAT), args=args)
    assert str(caught.value) == f"report_to: {WANDB}"


@pytest.mark.usefixtures("no_wandb")
def test_of_a_recipe_before_its_data_are_read() -> None:
    sections = {
        "data": "qm9",
        "model": "qm9_mlp",
        "balancer": "ls",
        "trainer": {"output_dir": "x", "report_to": ["wandb"]},
    }
    with pytest.raises(MissingPackageError) as caught:
        training_arguments(parse_recipe(sections, "x"))
    assert str(caught.value) == f"trainer.report_to: {WANDB}"


def test_a_reporter_that_nobody_knows(tmp_path: Path) -> None:
    args = BilevelMTLTrainingArguments(**plain_settings(tmp_path, report_to="wandbb"))
    with pytest.raises(OptionError, match=r"^report_to: 'wandbb' is not known \(did you mean \"wandb\"\?\); known: "):
        BilevelMTLTrainer(model=build_model(FLOAT), args=args)


def test_every_reporter_of_trainer_is_known() -> None:
    able = set(get_available_reporting_integrations())
    assert "tensorboard" in able
    for name in [*INTEGRATION_TO_CALLBACK, "none", "all"]:
        if name in able or name in ("none", "all", "kubeflow"):
            check_reporting(name)
        else:
            with pytest.raises(MissingPackageError, match=f"^report_to: '{name}' needs the package "):
                check_reporting(name)


def test_a_reporter_that_needs_two_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(name: str) -> ModuleSpec | None:
        return ModuleSpec(name, None, origin="made up") if name == "dagshub" else None

    monkeypatch.setattr(checks, "find_spec", found)
    with pytest.raises(MissingPackageError, match="needs the package mlflow, which is not"):
        check_reporting("dagshub")


def test_a_folder_of_a_former_run_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "swanlab").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "swanlab", raising=False)
    with pytest.raises(MissingPackageError, match="needs the package swanlab"):
        check_reporting("swanlab")
