"""A table of images, masks and arrays, from its recipe to the table of results."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from hf_bilb.errors import OptionError
from hf_bilb.experiments.recipe import read_recipe
from hf_bilb.experiments.train import run_recipe
from hf_bilb.models import DenseBackboneModel
from hf_bilb.reporting.results import read_results
from tests.data.own.masks import write_scenes

RECIPE = """
data:
  name: table
  files: {folder}/scenes.csv
  cache_dir: {folder}/cache
  split: {{validation: 0.2, test: 0.2}}
  inputs: {{image: image}}
  image_size: 24
  tasks:
    road: {{type: segmentation, column: mask, classes: [sky, road, tree]}}
    height: {{type: dense_regression, column: array, unit: m, missing: 0}}
    scene: {{type: classification}}
    sunny: {{type: multi_label, column: scene_is_1}}
    brightness: {{type: regression}}
model:
  name: dense_backbone
  encoder: {{model_type: resnet, embedding_size: 8, hidden_sizes: [8, 12], depths: [1, 1], layer_type: basic}}
  decoder_size: 8
balancer: bilb
trainer:
  output_dir: {folder}/run
  num_train_epochs: 2
  per_device_train_batch_size: 3
  learning_rate: 0.01
  eval_strategy: epoch
  logging_steps: 1
  report_to: none
evaluation: {{plots: false}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = Path(write_scenes(tmp_path, count=20))
    rows = file.read_text(encoding="utf-8").splitlines()
    rows = [f"{rows[0]},scene_is_1", *(f"{row},{number % 2}" for number, row in enumerate(rows[1:]))]
    file.write_text("\n".join(rows), encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path), encoding="utf-8")
    return tmp_path / "recipe.yaml"


def test_masks_and_arrays_with_tasks_of_the_same_images(recipe: Path, tmp_path: Path) -> None:
    results = run_recipe(read_recipe(recipe, ()))
    assert results.training["steps"] == 8  # of 12 training images
    metrics = {metric.key: metric for metric in read_results(tmp_path / "run").metrics}
    keys = ["road_miou", "road_pixel_accuracy", "height_mae", "height_rmse", "scene_accuracy", "scene_f1",
            "sunny_f1", "brightness_mae", "brightness_rmse"]  # fmt: skip
    assert set(keys) <= set(metrics) and metrics["height_mae"].unit == "m"
    for key in keys:
        assert math.isfinite(metrics[key].value) and math.isfinite(metrics[key].trivial), key
    # Heights are 1 to 20 m: the mean is 5 m off.
    assert 4 < metrics["height_mae"].trivial < 6 and 2 < metrics["height_mae"].value < 12
    model = DenseBackboneModel.from_pretrained(tmp_path / "run")
    assert model.config.task_types["road"].names == ("sky", "road", "tree")
    assert model.config.task_types["height"].means[0] == pytest.approx(10.5, abs=0.5)


def test_pixels_alone(recipe: Path, tmp_path: Path) -> None:
    tasks = "data.tasks={road: {type: segmentation, column: mask, num_classes: 3}}"
    results = run_recipe(read_recipe(recipe, [tasks, "balancer={name: ls}"]))
    assert {metric.key for metric in results.metrics} >= {"road_miou", "road_pixel_accuracy"}


def test_another_model_says_that_it_has_no_such_task(recipe: Path) -> None:
    model = "model={name: image_encoder, encoder: package:nothing}"
    message = (
        r"^data\.tasks\.road\.type: the model 'image_encoder' has no segmentation \(it has regression, "
        r"classification, multi_label\), expected the model dense_backbone$"
    )
    with pytest.raises(OptionError, match=message):
        run_recipe(read_recipe(recipe, [model]))


NETWORK = """
from torch import nn

class Network(nn.Module):
    def __init__(self, tasks):
        super().__init__()
        self.heads = nn.ModuleList(nn.Conv2d(3, task.size, 1) for task in tasks.values())
        self.items = [task.items for task in tasks.values()]

    def forward(self, pixel_values):
        maps = [head(pixel_values) for head in self.heads]
        return tuple(m if item == "pixels" else m.mean((2, 3)) for m, item in zip(maps, self.items))

def build(tasks):
    return Network(tasks)
"""


def test_a_network_of_one_s_own(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "network.py").write_text(NETWORK, encoding="utf-8")
    model = f"model={{name: torch_module, factory: '{tmp_path}/network.py:build'}}"
    results = run_recipe(read_recipe(recipe, [model, "balancer={name: ls}"]))
    measured = {metric.key: metric.value for metric in results.metrics}
    # Height is a tenth of the image's blue, road its red: a pixel's colour says both.
    assert measured["height_mae"] < 12 and measured["road_miou"] > 0
    only = "data.tasks={height: {type: dense_regression, column: array, missing: 0}}"
    run_recipe(read_recipe(recipe, [model, "balancer={name: ls}", only, f"trainer.output_dir={tmp_path}/only"]))
