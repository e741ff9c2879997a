"""The auxiliary learning example on a made-up file: its table is what the runs measured; finished runs are kept."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
from click.testing import CliRunner

from examples import auxiliary_learning as example
from hf_bilb.data.tables import census
from tests.data.test_tabular import census_lines, write

ROOT = Path(__file__).parents[2]
SHORT = [
    "trainer.num_train_epochs=2", "trainer.per_device_train_batch_size=64", "trainer.use_cpu=true",
    "trainer.disable_tqdm=true", "trainer.logging_steps=1", "trainer.warmup_steps=0",
]  # fmt: skip


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(ROOT)
    return write(tmp_path / "census.csv", census_lines(400), census.LAYOUT.columns, separator=",")


def test_the_table_says_what_the_runs_measured(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [*SHORT, f"data.file={file}", "--seeds", "0,1", "--output", str(tmp_path / "runs")]
    done = CliRunner().invoke(example.main, arguments)
    assert done.exit_code == 0, done.output
    rows = {line[:22].strip(): line[22:] for line in (tmp_path / "runs" / "table.txt").read_text("utf-8").splitlines()}
    assert list(rows)[1:] == ["plain sum", "no helpers", "MARIGOLD", "MARIGOLD, two-point"]

    def measured(name: str, task: str = "income") -> list[float]:
        files = [tmp_path / "runs" / name / f"seed-{seed}" / "results.json" for seed in (0, 1)]
        metrics = [json.loads(path.read_text("utf-8"))["metrics"] for path in files]
        return [next(m["value"] for m in each if m["key"] == f"{task}_normalized_entropy") for each in metrics]

    base, ours = measured("plain_sum"), measured("MARIGOLD")
    assert float(rows["MARIGOLD"].split()[0]) == pytest.approx(statistics.mean(ours), abs=1e-4)
    gain = statistics.mean(100 * (b - o) / b for b, o in zip(base, ours, strict=True))
    assert float(rows["MARIGOLD"].split()[3]) == pytest.approx(gain, abs=0.01)
    pairs = zip(measured("plain_sum", "college"), measured("MARIGOLD", "college"), strict=True)
    of_helper = statistics.mean(100 * (b - o) / b for b, o in pairs)
    assert float(rows["MARIGOLD"].split()[9]) == pytest.approx(of_helper, abs=0.01)
    assert "never_married" not in rows["plain sum"] and "never_married 0." in rows["MARIGOLD, two-point"]
    # The weights have moved, each its own way; the main task's is the one that stays.
    folder = tmp_path / "runs" / "MARIGOLD" / "seed-0"
    history = json.loads((folder / "trainer_state.json").read_text("utf-8"))["log_history"]
    logged = [entry for entry in history if "weight/income" in entry]
    assert {entry["weight/income"] for entry in logged} == {1.0}
    assert logged[-1]["weight/college"] != logged[-1]["weight/never_married"] != 1.0

    monkeypatch.setattr("hf_bilb.experiments.train.run_recipe", lambda *_: pytest.fail("trained again"))
    again = CliRunner().invoke(example.main, arguments)
    assert again.exit_code == 0 and "seed 0" not in again.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "a"], "'a' is not valid, expected numbers such as 0,1,2"),
        (["trainer.optimm=sgd"], "Error: trainer.optimm: unknown option, value 'sgd' (did you mean \"optim\"?)"),
        (["data.file=nowhere.csv"], "nowhere.csv"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(example.main, [*arguments, "--output", str(tmp_path)])
    assert done.exit_code != 0 and message in done.output and "Traceback" not in done.output
