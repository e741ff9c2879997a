"""`hf-bilb compare` over recipes of pixel-wise tasks and of a language model: real cells, two updates each."""

from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.dense_scenes import write_mtan
from tests.data.language_files import TASKS, write_jsonl

ROOT = Path(__file__).parents[2]
SHORT = [
    "trainer.max_steps=2", "trainer.logging_steps=1", "trainer.per_device_train_batch_size=2", "trainer.use_cpu=true",
    "trainer.eval_strategy=no", "trainer.save_strategy=no", "trainer.dataloader_num_workers=0",
    "trainer.dataloader_persistent_workers=false",
]  # fmt: skip


def compare(recipe: str, folder: Path, *arguments: str) -> list[dict[str, str]]:
    """Run the command; the rows of comparison.csv."""
    command = [sys.executable, "-m", "hf_bilb", "compare", f"recipes/{recipe}.yaml", *SHORT, *arguments]
    command += ["--balancers", "ls,bilb", "--seeds", "0", "--output", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in folder.iterdir()} >= {"comparison.md", "comparison.tex", "tasks.png", "ls", "bilb"}
    with (folder / "comparison.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(("data", "counted", "forms"), [("nyuv2", 9, 7), ("cityscapes", 4, 2)])
def test_pixel_wise_tasks(data: str, counted: int, forms: int, tmp_path: Path) -> None:
    tasks = ("segmentation", "depth", "normals") if data == "nyuv2" else ("segmentation", "depth")
    classes = {} if data == "nyuv2" else {"num_classes": 7, "classes_folder": "label_7"}
    write_mtan(tmp_path / "data", counts=(8, 3), size=(32, 40), tasks=tasks, **classes)
    settings = [f"data.folder={tmp_path / 'data'}", f"data.cache_dir={tmp_path / 'cache'}", "model.width=2"]
    rows = compare(f"{data}/ls", tmp_path / "out", *settings)
    text = (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
    assert f"over {counted} metrics" in text and f"{forms} metrics do not count, since another" in text
    assert "CAGrad, Nash-MTL, FAMO and LDC-MTL" in text
    # The papers' Delta_m is over the metrics that have a published value, and is told once.
    assert len([row for row in rows if row["method"] == "single task" and row["mean"]]) == counted
    told = [row["metric"] for row in rows if row["method"] == "bilb" and not row["task"]]
    assert [name for name in told if name.startswith("Delta_m") and "- ls's" not in name] == [
        "Delta_m", "Delta_m grouped"
    ]  # fmt: skip


def test_a_language_model(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "train.jsonl", 20)
    data = ["data.glue=null", f"data.jsonl={{train: {file}}}", "data.tasks=null", "data.tokenizer={vocab_size: 400}"]
    sizes = ["model.config.hidden_size=16", "model.config.intermediate_size=16", "data.max_validation=null"]
    rows = compare("instructions/ls_small", tmp_path / "out", *data, *sizes, "data.max_train=null")
    measured = {(row["method"], row["task"]): float(row["mean"]) for row in rows if row["metric"] == "perplexity"}
    assert {key for key in measured if key[1]} == {(method, task) for method in ("ls", "bilb") for task in TASKS}
    assert all(math.isfinite(value) and value > 1 for value in measured.values())
