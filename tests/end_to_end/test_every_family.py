"""One recipe of every family, as it stands but for its size, trains a few updates and leaves results.

GLUE, whose files are made up by the tests, stands in `tests/cli/test_glue.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_bilb.experiments.recipe import read_recipe
from hf_bilb.experiments.train import run_recipe
from hf_bilb.reporting.results import read_results

ROOT = Path(__file__).parents[2]
REAL = ROOT.parent / "shared" / "data"
FEW = ["data.num_train=600", "data.num_validation=60", "data.num_test=60"]
SHORT = [
    "trainer.max_steps=4", "trainer.eval_strategy=steps", "trainer.eval_steps=2", "trainer.save_strategy=steps",
    "trainer.save_steps=2", "trainer.logging_steps=1", "trainer.use_cpu=true", "trainer.disable_tqdm=true",
    "trainer.dataloader_num_workers=0",
]  # fmt: skip


def train(recipe: str, folder: Path, *overrides: str):
    path = ROOT / "recipes" / recipe
    run_recipe(read_recipe(path, [*SHORT, *overrides, f"trainer.output_dir={folder}"]))
    results = read_results(folder)
    assert results.training["steps"] == 4
    assert results.training["step_seconds"] is None  # fewer updates than the clock's warm-up
    assert all(metric.value is not None for metric in results.metrics)
    assert {"table.md", "losses.png", "weights.png", "model.safetensors", "recipe.yaml"} <= {
        path.name for path in folder.iterdir()
    }
    return results


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["bilb_small.yaml", "bilb.yaml", "si.yaml"])
def test_qm9_graphs(recipe: str, tmp_path: Path) -> None:
    results = train(f"qm9/{recipe}", tmp_path / "run", *FEW)
    assert len({metric.task for metric in results.metrics if metric.task}) == 11
    assert [metric.key for metric in results.metrics if metric.base is None] == ["delta_m"]
    assert "300 epochs" in results.base_source


@pytest.mark.slow
def test_qm9_single_task(tmp_path: Path) -> None:
    results = train("qm9/ls_small.yaml", tmp_path / "run", *FEW, "data.tasks=[homo]")
    assert [metric.key for metric in results.metrics] == ["mae_homo", "delta_m"]


@pytest.mark.distributed
def test_two_processes_measure_graphs_as_one_does(tmp_path: Path) -> None:
    """61 validation molecules in batches of 20 on two ranks: the last batch is filled up with repetitions."""
    sizes = [
        "data.num_train=480",
        "data.num_validation=61",
        "data.num_test=61",
        "trainer.per_device_eval_batch_size=20",
    ]
    settings = [
        *SHORT,
        *sizes,
        "trainer.learning_rate=0",
        "trainer.load_best_model_at_end=false",
        "evaluation.plots=false",
    ]
    measured = []
    for processes in (1, 2):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        folder = tmp_path / str(processes)
        command = [*launch, "-m", "hf_bilb", "train", "recipes/qm9/bilb_small.yaml", *settings]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, f"trainer.output_dir={folder}"], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        results = read_results(folder)
        assert results.training["processes"] == processes
        measured.append([metric.value for metric in results.metrics] + [*results.losses["test"].values()])
    assert measured[1] == pytest.approx(measured[0], rel=1e-5)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    command = [sys.executable, str(REAL / "unpack.py"), str(folder), "--only", "celeba", "nyuv2"]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.mark.data
@pytest.mark.skipif(not REAL.is_dir(), reason="needs the real files in ../shared/data")
class TestOnRealFiles:
    @pytest.mark.parametrize("recipe", ["bilb_small.yaml", "bilb.yaml"])
    def test_celeba(self, recipe: str, unpacked: Path, tmp_path: Path) -> None:
        settings = [f"data.folder={unpacked / 'celeba'}", f"data.cache_dir={unpacked / 'cache'}", "model.width=8"]
        settings += ["trainer.per_device_train_batch_size=16", "evaluation.split=validation"]
        results = train(f"celeba/{recipe}", tmp_path / "run", *settings)
        assert len({metric.task for metric in results.metrics if metric.task}) == 40

    def test_nyuv2(self, unpacked: Path, tmp_path: Path) -> None:
        settings = [f"data.folder={unpacked / 'nyuv2'}", f"data.cache_dir={unpacked / 'cache'}", "model.width=4"]
        settings += ["data.num_validation=4", "data.num_test=4", "trainer.warmup_steps=0"]
        results = train("nyuv2/bilb_small.yaml", tmp_path / "run", *settings)
        assert len({metric.task for metric in results.metrics if metric.task}) == 3
        assert (tmp_path / "run" / "gallery.png").is_file()

    @pytest.mark.parametrize(
        ("recipe", "num_tasks"),
        [
            ("instructions/bilb_small.yaml", 6),
            ("tox21/bilb.yaml", 12),
            ("sider/ls.yaml", 27),
            ("adult/bilb.yaml", 2),
            ("census/ls.yaml", 2),
            ("census/auxiliary_marigold.yaml", 3),
            ("sarcos/bilb.yaml", 7),
        ],
    )
    def test_tables_and_molecules(
        self, recipe: str, num_tasks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(ROOT)  # the recipes name their files from here
        results = train(recipe, tmp_path / "run")
        assert len({metric.task for metric in results.metrics if metric.task}) == num_tasks
