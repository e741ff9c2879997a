"""No space left while saving: one line that names file and bytes, and the checkpoints before are whole."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import TrainerCallback

from hf_bilb.errors import CheckpointError
from hf_bilb.trainer.checkpointing import verify
from tests.checkpoints.conftest import ROOT
from tests.checkpoints.runs import RUNS, build_trainer
from tests.synthetic import flat_parameters

RUN = RUNS["bilb"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB; skipped where none may be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    if (
        sys.platform == "win32"
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True
        ).returncode
    ):
        pytest.skip("no file system can be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


class Fill(TrainerCallback):
    """Leaves `left` bytes of the disk after `step`."""

    def __init__(self, place: Path, step: int, left: int) -> None:
        self.place, self.step, self.left = place, step, left

    def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        import shutil

        if state.global_step == self.step:  # type: ignore[attr-defined]
            (self.place / "ballast").write_bytes(b"x" * (shutil.disk_usage(self.place).free - self.left))


@pytest.mark.parametrize("left", [0, 4096, 8192, 12288, 20480, 24576])
def test_a_full_disk_is_one_line_and_costs_no_checkpoint(small_disk: Path, left: int) -> None:
    trainer = build_trainer(RUN, small_disk / "run")
    trainer.add_callback(Fill(small_disk, 7, left))
    with pytest.raises(CheckpointError, match="cannot be written to its end") as caught:
        trainer.train()
    line = str(caught.value)
    assert "\n" not in line
    found = re.search(r"checkpoint-10.*: about ([\d,]+) bytes are needed, ([\d,]+) bytes are free", line)
    assert found is not None, line
    before = small_disk / "run" / "checkpoint-5"
    assert int(found.group(1).replace(",", "")) == sum(path.stat().st_size for path in before.iterdir())
    assert abs(int(found.group(2).replace(",", "")) - left) <= 8192
    verify(before)
    assert [path.name for path in (small_disk / "run").iterdir()] == ["checkpoint-5"], "cleaned up, and let go"
    (small_disk / "ballast").unlink()
    again = build_trainer(RUN, small_disk / "run")
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 33


def test_saving_the_model_on_a_full_disk_is_one_line(small_disk: Path) -> None:
    trainer = build_trainer(RUN, small_disk / "run")
    (small_disk / "ballast").write_bytes(b"x" * 1_030_000)

    def as_long_as_it_takes() -> None:
        for i in range(20):
            trainer.save_model(str(small_disk / "run" / f"model-{i}"))

    with pytest.raises(CheckpointError, match=r"run/\S+: cannot be written .*bytes are needed, [\d,]+ bytes are free$"):
        as_long_as_it_takes()


LIMITED = """
import resource, sys
from tests.checkpoints.runs import RUNS, build_trainer
trainer = build_trainer(RUNS["bilb"], sys.argv[1])
for limit in (100, 2000, 4000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        trainer.train()
    except Exception as error:
        print(f"{limit}|{type(error).__name__}|{error}")
"""


def test_a_file_that_may_not_grow_is_one_line(tmp_path: Path) -> None:
    if sys.platform == "win32":
        pytest.skip("no such limit")
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**_environment()})
    lines = [line.split("|") for line in done.stdout.splitlines() if "|" in line]
    assert [(line[0], line[1]) for line in lines] == [(n, "CheckpointError") for n in ("100", "2000", "4000")], (
        done.stdout + done.stderr
    )
    # The weights, and Adam's two moments and step of each parameter.
    model = build_trainer(RUN, tmp_path / "other").model
    numbers, tensors = flat_parameters(model).numel(), len(list(model.parameters()))
    for _, _, message in lines:
        assert "cannot be written to its end (" in message and str(tmp_path / "run" / "checkpoint-5") in message
        assert f"about {4 * (3 * numbers + tensors):,} bytes are needed" in message
    assert list((tmp_path / "run").iterdir()) == []


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
