"""`hf-bilb train --accelerate`: which command it becomes, and what it refuses."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from click.testing import CliRunner

from hf_bilb.cli import main
from hf_bilb.errors import OptionError
from hf_bilb.experiments import launch
from tests.test_wheel import ROOT

RECIPE = str(ROOT / "recipes" / "qm9" / "bilb_small.yaml")
NAMES = ["ddp", "fsdp2", "multi_node", "zero2", "zero3"]


def test_the_configurations() -> None:
    assert sorted(launch.configurations()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_reads_each_of_them(name: str) -> None:
    kind = {"fsdp2": DistributedType.FSDP, "zero2": DistributedType.DEEPSPEED, "zero3": DistributedType.DEEPSPEED}
    read = load_config_from_file(str(launch.configurations()[name]))
    assert read.distributed_type == kind.get(name, DistributedType.MULTI_GPU)
    if name == "fsdp2":
        assert read.fsdp_config["fsdp_version"] == 2
    if name.startswith("zero"):
        assert read.deepspeed_config["zero_stage"] == int(name[-1])


@pytest.mark.parametrize(("name", "number"), [("ddp", "8"), ("zero2", "8"), ("fsdp2", "8"), ("multi_node", None)])
def test_one_process_for_each_device(monkeypatch: pytest.MonkeyPatch, name: str, number: str | None) -> None:
    monkeypatch.setattr(launch, "_devices", lambda: 8)
    command = launch.launch_command(name, ["recipe.yaml", "trainer.seed=3"], None)
    assert command[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    assert command[-5:] == ["-m", "hf_bilb", "train", "recipe.yaml", "trainer.seed=3"]
    given = launch_command_parser().parse_args(command[3:])
    assert given.num_processes == (None if number is None else int(number))
    assert Path(given.config_file).stem == name


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_deepspeed_takes_the_recipes_accumulation(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(launch, "_devices", lambda: 2)
    given = launch_command_parser().parse_args(launch.launch_command(name, ["recipe.yaml"], 1)[3:])
    pytest.importorskip("deepspeed", reason="accelerate reads DeepSpeed's settings where it is installed")
    args, _, _ = _validate_launch_command(given)
    assert args.use_deepspeed and args.gradient_accumulation_steps == "auto"


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("distributed_type: 'NO'\n")
    assert launch.launch_command(str(file), ["recipe.yaml"], 2)[4:7] == [str(file), "--num_processes", "2"]


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_devices", lambda: 0)
    with pytest.raises(OptionError, match=r"--accelerate: 'zero4'.*zero"):
        launch.launch_command("zero4", [], None)
    with pytest.raises(OptionError, match="'zero2' needs GPUs, and this machine has none"):
        launch.launch_command("zero2", [], None)
    refused = CliRunner().invoke(main, ["train", RECIPE, "--processes", "2"])
    assert refused.exit_code != 0 and "--processes: says how many" in refused.output
