"""docs/pixels.md: every block in its order, in a folder of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from hf_bilb.reporting.results import read_results

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "pixels.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.M | re.S)


@pytest.mark.slow
def test_from_images_to_predictions(tmp_path: Path) -> None:
    def run(*command: str) -> str:
        of_test = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "cache")}
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, env={**os.environ, **of_test},
                              capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    make, use = blocks("python")
    (recipe,) = blocks("yaml")
    (commands,) = blocks("sh")
    run("-c", make)
    (tmp_path / "shapes.yaml").write_text(recipe, encoding="utf-8")
    train, predict, evaluate = (line.removeprefix("hf-bilb ").split() for line in commands.splitlines())
    run("-m", "hf_bilb", *train)
    metrics = {metric.key: metric for metric in read_results(tmp_path / "runs" / "shapes").metrics}
    assert metrics["shape_miou"].value > 0.8 > metrics["shape_miou"].trivial
    assert metrics["height_mae"].value < metrics["height_mae"].trivial
    assert "wrote predicted: 40 images" in run("-m", "hf_bilb", *predict)
    index = pd.read_csv(tmp_path / "predicted" / "predictions.csv").set_index("image")
    named = {name.replace("<image>", "3") for name in re.findall(r"^\| `([^`]+)` \|", PAGE, flags=re.M)}
    written = {path.name for path in (tmp_path / "predicted").iterdir()}
    assert named - {"3_shape_probabilities.npy"} <= written and len(written) == 2 + 3 * 40
    agreed = [(np.asarray(Image.open(tmp_path / "predicted" / index.loc[f"{n}.png", "predicted_shape"]))
               == np.asarray(Image.open(tmp_path / f"masks/{n}.png"))).mean() for n in range(30, 40)]  # fmt: skip
    assert np.mean(agreed) > 0.9
    assert re.search(r"^shape +mIoU", run("-m", "hf_bilb", *evaluate), flags=re.M)
    said = run("-c", use)
    assert "['ground', 'square', 'disc']" in said.replace("(", "[").replace(")", "]") and "(3, " in said
