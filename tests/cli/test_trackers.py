"""A recipe's run has its pictures in the tracker that it reports to."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from hf_bilb.cli import main
from hf_bilb.data import DATA_SETS
from tests.cli.made_up import MADE_UP, RECIPE


def test_the_pictures_of_a_run_are_in_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setitem(DATA_SETS, "made_up", MADE_UP)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(RECIPE)
    settings = ["trainer.report_to=tensorboard", "trainer.diagnostics={gradients: {every_n_steps: 10}}"]
    assert CliRunner().invoke(main, ["train", "small.yaml", *settings], catch_exceptions=False).exit_code == 0
    (folder,) = (tmp_path / "run").rglob("runs/*")
    events = EventAccumulator(str(folder)).Reload()
    assert events.Tags()["images"] == [f"plots/{name}" for name in ("losses", "weights", "gradient_conflicts")]
    assert events.Images("plots/losses")[0].step == 4 * 12
