"""Tasks of pixels and of whole images from one recipe, each image with some of the labels, under BiLB.

The run is compared with a loop of one's own: files read by numpy and csv, losses image by image, plain SGD.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import set_seed

from hf_bilb import build_balancer
from hf_bilb.data import DATA_SETS
from hf_bilb.data.dense.rows import DenseRows
from hf_bilb.experiments.build import build_model, resolve_data_options
from hf_bilb.experiments.recipe import Recipe, read_recipe
from hf_bilb.experiments.train import run_recipe
from hf_bilb.models import DenseBackboneModel
from hf_bilb.reporting.results import read_results
from tests.data.dense_scenes import write_mtan

ROOT = Path(__file__).parents[2]
ENCODER = "{model_type: resnet, embedding_size: 8, hidden_sizes: [8, 12], depths: [1, 1], layer_type: basic}"
NAMES = ("scene", "segmentation", "depth", "normals", "lamp")
CLASSES = {"scene": ["attic", "bath", "cellar"], "lamp": ["no", "yes"]}
NUM_TRAIN, NUM_TEST, STEPS, RATE = 9, 3, 7, 0.02
#: What each training image has labels of.
KEPT = (
    {"segmentation"}, {"depth"}, {"normals"}, {"segmentation", "scene"}, {"depth", "lamp"},
    {"normals", "scene", "lamp"}, {"scene"}, {"lamp"}, set(NAMES),
)  # fmt: skip


def write_partial(folder: Path) -> None:
    write_mtan(folder, (NUM_TRAIN, NUM_TEST), size=(24, 32))
    for number, kept in enumerate(KEPT):
        for task, name in (("segmentation", "label"), ("depth", "depth"), ("normals", "normal")):
            if task not in kept:
                (folder / "train" / name / f"{number}.npy").unlink()
    with (folder / "labels.csv").open("w", encoding="utf-8", newline="") as stream:
        lines = csv.writer(stream)
        lines.writerow(["part", "image", *CLASSES])
        for part, count in (("train", NUM_TRAIN), ("val", NUM_TEST)):
            for number in range(count):
                kept = KEPT[number] if part == "train" else set(NAMES)
                cells = [names[number % len(names)] if task in kept else "" for task, names in CLASSES.items()]
                if any(cells):  # else: an image without a line
                    lines.writerow([part, number, *cells])


def recipe_of(folder: Path, *changes: str) -> Recipe:
    settings = [
        f"data.folder={folder / 'nyuv2'}", f"data.image_labels={folder / 'nyuv2' / 'labels.csv'}",
        f"data.cache_dir={folder / 'cache'}", f"data.tasks=[{', '.join(NAMES)}]", "data.allow_missing=true",
        "data.augment=false", "data.num_validation=null", f"model.encoder={ENCODER}", "model.decoder_size=8",
        f"trainer.max_steps={STEPS}", "trainer.per_device_train_batch_size=2", f"trainer.output_dir={folder / 'run'}",
        "trainer.logging_steps=1", "trainer.optim=sgd", f"trainer.learning_rate={RATE}", "trainer.weight_decay=0",
        "trainer.lr_scheduler_type=constant", "trainer.warmup_steps=0", "trainer.max_grad_norm=0",
        "trainer.dataloader_num_workers=0", "trainer.dataloader_persistent_workers=false", "trainer.report_to=none",
        "trainer.use_cpu=true", "trainer.disable_tqdm=true",
    ]  # fmt: skip
    return read_recipe(ROOT / "recipes" / "nyuv2" / "scenes_bilb.yaml", [*settings, *changes])


def initial_model(recipe: Recipe) -> DenseBackboneModel:
    set_seed(recipe.trainer["seed"])
    model = build_model(recipe, DATA_SETS["nyuv2"].load(resolve_data_options(recipe)))
    assert isinstance(model, DenseBackboneModel)
    return model.train()


class Files:
    """The training files, read without the project's data sets."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "train"
        with (folder / "labels.csv").open(encoding="utf-8", newline="") as stream:
            self.lines = {int(line["image"]): line for line in csv.DictReader(stream) if line["part"] == "train"}

    def load(self, kind: str, number: int) -> Tensor | None:
        file = self.folder / kind / f"{number}.npy"
        return torch.from_numpy(np.load(file)) if file.is_file() else None

    def image_class(self, task: str, number: int) -> int | None:
        name = self.lines.get(number, {}).get(task, "")
        return CLASSES[task].index(name) if name else None

    def losses(self, model: nn.Module, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Losses and numbers of items, in the order of NAMES, added up image by image and label by label."""
        images = [self.load("image", number) for number in numbers]
        found = model(torch.stack([image.permute(2, 0, 1) for image in images if image is not None])).logits
        sums, counts = [found[0].sum() * 0] * len(NAMES), [0] * len(NAMES)
        for place, number in enumerate(numbers):
            for k, task in enumerate(NAMES):
                for value in self._errors(task, number, found[k][place]):
                    sums[k], counts[k] = sums[k] + value.sum(), counts[k] + value.numel()
        return torch.stack([s / max(n, 1) for s, n in zip(sums, counts, strict=True)]), torch.tensor(counts)

    def _errors(self, task: str, number: int, guess: Tensor) -> list[Tensor]:
        """One tensor with an error for each label; none without labels."""
        if task in CLASSES:
            label = self.image_class(task, number)
            return [] if label is None else [-guess.log_softmax(dim=0)[label]]
        values = self.load({"segmentation": "label", "normals": "normal"}.get(task, task), number)
        if values is None:
            return []
        if task == "segmentation":
            known = values >= 0
            pixels = guess.permute(1, 2, 0)[known].log_softmax(dim=1)
            return [-pixels.gather(1, values[known].long()[:, None])]
        if task == "depth":
            depth = values[..., 0]
            return [(guess - depth)[depth > 0].abs()]
        known = (values != 0).any(dim=-1)
        return [1 - functional.cosine_similarity(guess.permute(1, 2, 0)[known], values[known], dim=1)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    """A finished run, and the images of each of its training batches."""
    folder = tmp_path_factory.mktemp("partial")
    write_partial(folder / "nyuv2")
    batches: list[list[int]] = []
    original = DenseRows.__getitems__

    def recorded(rows: DenseRows, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        if len(rows) == NUM_TRAIN:
            batches.append(rows.rows[np.asarray(indices)].tolist())
        return original(rows, indices)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DenseRows, "__getitems__", recorded)
        run_recipe(recipe_of(folder))
    return folder, batches[:STEPS]


def logged(folder: Path) -> list[dict[str, Any]]:
    history = json.loads((folder / "run" / "trainer_state.json").read_text("utf-8"))["log_history"]
    return [entry for entry in history if "loss" in entry]


def test_it_trains_as_a_loop_of_one_s_own(run: tuple[Path, list[list[int]]]) -> None:
    folder, batches = run
    recipe, files = recipe_of(folder), Files(folder / "nyuv2")
    model = initial_model(recipe)
    balancer = build_balancer("bilb", task_names=NAMES)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    absent = set()
    for entry, numbers in zip(logged(folder), batches, strict=True):
        losses, counts = files.losses(model, numbers)
        for task, loss, count in zip(NAMES, losses.tolist(), counts.tolist(), strict=True):
            if count:
                assert entry[f"loss/{task}"] == pytest.approx(loss, rel=1e-4)
            else:
                absent.add(task)
        optimizer.zero_grad()
        balancer.backward(losses, counts)
        optimizer.step()
        balancer.step()
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    assert len(absent) >= 3  # the test is about batches that lack tasks
    expected = nn.utils.parameters_to_vector(model.parameters()).detach()
    trained = DenseBackboneModel.from_pretrained(folder / "run")
    found = nn.utils.parameters_to_vector(trained.parameters()).detach()
    assert found.isfinite().all() and (found - expected).norm() <= 1e-5 * expected.norm()
    start = nn.utils.parameters_to_vector(initial_model(recipe).parameters()).detach()
    assert (found - expected).norm() <= 1e-3 * (expected - start).norm()


def test_every_head_moves(run: tuple[Path, list[list[int]]]) -> None:
    folder, _ = run
    before, after = initial_model(recipe_of(folder)), DenseBackboneModel.from_pretrained(folder / "run")
    for heads, sizes in (("heads", (13, 1, 3)), ("image_heads", (3, 2))):
        rows = [getattr(model, heads).weight.detach().split(sizes) for model in (before, after)]
        assert all(not torch.equal(one, other) for one, other in zip(*rows, strict=True))


def test_a_batch_without_a_task_s_labels_gives_it_no_loss_and_no_gradient(run: tuple[Path, list[list[int]]]) -> None:
    folder, _ = run
    recipe = recipe_of(folder)
    model, data = initial_model(recipe), DATA_SETS["nyuv2"].load(resolve_data_options(recipe))
    (batch,) = data.train.__getitems__([3, 6])  # segmentation of one image, the scenes of both
    output = model(**batch)
    assert output.num_items.tolist()[2:] == output.losses.tolist()[2:] == [0, 0, 0]
    assert output.num_items[0] == 2 and (output.losses[:2] > 0).all()
    build_balancer("bilb", task_names=NAMES).backward(output.losses, output.num_items)
    assert all(parameter.grad is not None for parameter in model.parameters())  # reached, as on ranks that have labels
    assert model.heads.weight.grad.split((13, 1, 3))[0].abs().sum() > 0
    for gradient in (*model.heads.weight.grad.split((13, 1, 3))[1:], model.image_heads.weight.grad[3:]):
        assert gradient.abs().sum() == 0
    assert model.branches.weight.grad[8:].abs().sum() == 0 and model.image_branches.weight.grad[8:].abs().sum() == 0


def test_the_folder_has_every_metric_and_the_gallery(run: tuple[Path, list[list[int]]]) -> None:
    folder, _ = run
    results = read_results(folder / "run")
    assert {metric.task for metric in results.metrics} == {*NAMES, ""}
    assert all(metric.value is not None and metric.trivial is not None for metric in results.metrics)
    assert set(results.losses["test"]) == {"mean", *NAMES}
    assert (folder / "run" / "gallery.png").is_file()
    assert "macro F1" in (folder / "run" / "table.md").read_text("utf-8")


@pytest.mark.parametrize("task", ["scene", "depth"])
def test_each_task_alone_trains_too(run: tuple[Path, list[list[int]]], tmp_path: Path, task: str) -> None:
    """What `hf-bilb compare --stl` asks for."""
    folder, _ = run
    changes = [f"data.tasks=[{task}]", "balancer={name: ls}", f"trainer.output_dir={tmp_path}", "trainer.max_steps=2"]
    results = run_recipe(recipe_of(folder, *changes, "evaluation.plots=false"))
    assert {metric.task for metric in results.metrics} <= {task, ""}
    assert all(np.isfinite(metric.value) for metric in results.metrics)
