"""Every recipe of pixel-wise tasks trains for two steps on made-up files and leaves its table, and its gallery."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from PIL import Image

from hf_bilb.experiments.recipe import read_recipe
from hf_bilb.experiments.train import run_recipe
from hf_bilb.reporting.results import read_results
from tests.data.dense_scenes import write_mtan

ROOT = Path(__file__).parents[2]
RECIPES = sorted([*(ROOT / "recipes" / "nyuv2").glob("*.yaml"), *(ROOT / "recipes" / "cityscapes").glob("*.yaml")])
#: The others go without pictures, which take most of the time.
WITH_GALLERY = ("cityscapes-bilb", "nyuv2-ls_small", "nyuv2-scenes_bilb")
NUM_METRICS = {"nyuv2": 2 + 2 * 2 + 2 * 5 + 2, "cityscapes": 2 + 2 * 2 + 2}
#: Instead of a pretrained one.
SMALL_ENCODER = "{model_type: resnet, embedding_size: 8, hidden_sizes: [8, 12], depths: [1, 1], layer_type: basic}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    write_mtan(folder / "nyuv2", counts=(8, 3), size=(32, 40))
    write_mtan(
        folder / "cityscapes", counts=(8, 3), size=(32, 40), tasks=("segmentation", "depth"), num_classes=7,
        classes_folder="label_7",
    )  # fmt: skip
    scenes = ["train,0,kitchen", *(f"train,{number},bedroom" for number in range(1, 7)), "train,7,"]
    lines = ["part,image,scene", *scenes, "val,0,kitchen", "val,1,bedroom", "val,2,bedroom"]
    (folder / "nyuv2" / "image_labels.csv").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
@pytest.mark.slow
def test_two_steps(path: Path, folder: Path, tmp_path: Path) -> None:
    data = path.parent.name
    changes = [
        f"data.folder={folder / data}", f"data.cache_dir={folder / 'cache'}", "trainer.max_steps=2",
        "trainer.per_device_train_batch_size=2", "trainer.logging_steps=1", f"trainer.output_dir={tmp_path / 'run'}",
        "trainer.dataloader_num_workers=0", "trainer.dataloader_persistent_workers=false", "trainer.report_to=none",
    ]  # fmt: skip
    drawn = f"{data}-{path.stem}" in WITH_GALLERY
    changes.append(f"evaluation.plots={str(drawn).lower()}")
    if path.stem.endswith("_small"):
        changes += ["data.num_validation=2", "trainer.warmup_steps=0"]
    scenes = path.stem.startswith("scenes_")
    if scenes:
        images = f"data.image_labels={folder / data / 'image_labels.csv'}"
        changes += [images, "data.num_validation=2", f"model.encoder={SMALL_ENCODER}", "model.decoder_size=8"]
    else:
        changes.append("model.width=2")
    results = run_recipe(read_recipe(path, changes))
    assert results.training["steps"] == 2
    measured = {metric.key: metric.value for metric in read_results(tmp_path / "run").metrics}
    assert len(measured) == NUM_METRICS[data] + 2 * scenes
    assert {key for key in measured if key.startswith("scene")} == (
        {"scene_accuracy", "scene_macro_f1"} if scenes else set()
    )
    assert all(value is not None and math.isfinite(value) for value in measured.values())
    # Delta_m relates to batch means, where there are any.
    related = [metric.key for metric in results.metrics if metric.base is not None]
    assert [key for key in related if not key.startswith("segmentation")] == [
        key for key in measured if key.endswith("_batch_mean")
    ]
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert any("eval_delta_m" in entry for entry in state["log_history"])
    assert (tmp_path / "run" / "gallery.png").is_file() == drawn
    if drawn:
        with Image.open(tmp_path / "run" / "gallery.png") as gallery:
            assert gallery.size[0] > 1000


def test_papers_settings() -> None:
    """Model, optimizer, schedule, epochs and batch of both data sets, and what each method adds."""
    for data, batch, preset_rate in (("nyuv2", 2, 8e-5), ("cityscapes", 8, 3e-4)):
        for name in ("ls", "bilb", "famo", "marigold"):
            recipe = read_recipe(ROOT / "recipes" / data / f"{name}.yaml")
            trainer = recipe.trainer
            assert recipe.model == {"name": "mtan", "width": 64, "sync_batch_norm": False}
            assert (trainer["num_train_epochs"], trainer["per_device_train_batch_size"]) == (200, batch)
            assert trainer["step_lr"] == {"epochs": 100, "factor": 0.5}
            assert (trainer["optim"], trainer["weight_decay"], trainer["max_grad_norm"]) == ("adamw_torch", 0, 0)
            assert trainer["learning_rate"] == (preset_rate if name in ("ls", "bilb") else 1e-4)
            assert recipe.data["augment"] and recipe.data["num_validation"] is None
    famo = [read_recipe(ROOT / "recipes" / data / "famo.yaml").balancer for data in ("nyuv2", "cityscapes")]
    assert [options["weight_decay"] for options in famo] == [1e-3, 1e-2]
    assert [options["learning_rate"] for options in famo] == [0.025, 0.025]
    marigold = [read_recipe(ROOT / "recipes" / data / "marigold.yaml").balancer for data in ("nyuv2", "cityscapes")]
    assert [options["beta"] for options in marigold] == [1.0, 0.03]
    assert [(options["perturbation"], options["learning_rate"]) for options in marigold] == [(1e-3, 1e-4)] * 2
