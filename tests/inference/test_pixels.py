"""Models with tasks of pixels: what a loaded folder predicts, and measures, is what its run does."""

from __future__ import annotations

import csv
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

import hf_bilb
from hf_bilb.errors import OptionError
from hf_bilb.inference.image_predictions import ImagePrediction, best_classes
from hf_bilb.inference.pixels import LoadedPixelModel
from hf_bilb.losses.task_types import TaskType
from tests.inference import pixel_runs, runs
from tests.inference.pixel_runs import RESNET, SIZES, TASKS
from tests.inference.runs import Run

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "nyuv2" / "nyuv2_144x192_val.zip"
SCENES = [("segnet", "nyuv2"), ("mtan", "cityscapes"), ("dense_backbone", "nyuv2")]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return pixel_runs.shapes_run(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def scenes_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Run]:
    """A run on a packaged set by its model and its name; each is trained once."""
    known: dict[tuple[str, str], Run] = {}

    def get(model: str, name: str) -> Run:
        if (model, name) not in known:
            root = tmp_path_factory.mktemp(model)
            labels = write_image_labels(root) if model == "dense_backbone" else {}
            known[model, name] = pixel_runs.scenes_run(root, model, name, **labels)
        return known[model, name]

    return get


def write_image_labels(root: Path) -> dict[str, Any]:
    rows = [f"{part},{n},{'kitchen' if n % 2 else 'bedroom'}" for part, count in (("train", 6), ("val", 5))
            for n in range(count)]  # fmt: skip
    (root / "rooms.csv").write_text("\n".join(["part,image,room", *rows]))
    return {"image_labels": str(root / "rooms.csv"), "tasks": ["depth", "room", "segmentation", "normals"]}


def loaded(run: Run, checkpoint: str = "") -> LoadedPixelModel:
    model = hf_bilb.load(run.folder / checkpoint, device="cpu")
    assert isinstance(model, LoadedPixelModel)
    return model


def rows_of(table: Path) -> list[dict[str, str]]:
    with table.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def measured(run: Run) -> dict[str, float]:
    found = run.trainer.evaluate(run.data.test, metric_key_prefix="test")
    return {info.key: found[f"test_{info.key}"] for info in run.data.metrics if f"test_{info.key}" in found}


# --- predictions, by hand -----------------------------------------------------------------------------------------


def by_hand(run: Run, batch_size: int = 8) -> Iterator[tuple[tuple[int, int], dict[str, Tensor]]]:
    """Of each image in the test table its size, and the outputs of the run's network for it, in a loop of its own."""
    images = [Image.open(run.test.parent / row["image"]) for row in rows_of(run.test)]
    network = run.trainer.model.eval()
    for start in range(0, len(images), batch_size):
        chosen = images[start : start + batch_size]
        resized = [np.asarray(image.convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)) for image in chosen]
        batch = torch.stack([torch.tensor(pixels).permute(2, 0, 1).float() / 255 for pixels in resized])
        with torch.no_grad():
            logits = network(pixel_values=batch).logits
        for number, image in enumerate(chosen):
            yield image.size[::-1], {task: out[number] for task, out in zip(TASKS, logits, strict=True)}


def enlarged(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return interpolate(maps.unsqueeze(0), size=size, mode="bilinear", align_corners=False).squeeze(0)


@pytest.mark.parametrize("checkpoint", ["", "checkpoint-4"])
def test_predictions_are_those_of_a_loop_by_hand(checkpoint: str, shapes: Run) -> None:
    saved = {task["name"]: task for task in json.loads((shapes.folder / "hf_bilb.json").read_text())["tasks"]}
    predictions = loaded(shapes, checkpoint).predict(shapes.test, batch_size=8)
    assert len(predictions) == 10
    seen = set()
    for one, (size, outputs) in zip(predictions, by_hand(shapes), strict=True):
        assert one.size == size and list(one) == list(TASKS)
        seen.add(size)
        assert all(np.array_equal(one.outputs[task], output.numpy()) for task, output in outputs.items())
        logits = enlarged(outputs["shape"], size)
        assert one["shape"].shape == size and one["shape"].dtype == np.int64
        assert np.array_equal(one["shape"], logits.argmax(dim=0).numpy())
        np.testing.assert_allclose(one.probabilities["shape"], logits.softmax(dim=0).numpy(), rtol=1e-6)
        heights = enlarged(outputs["height (m)"], size).numpy().astype(np.float64)
        expected = heights[0] * saved["height (m)"]["stds"][0] + saved["height (m)"]["means"][0]
        assert one["height (m)"].dtype == np.float32
        assert np.array_equal(one["height (m)"], expected.astype(np.float32))
        flow = enlarged(outputs["flow"], size).numpy().astype(np.float64)
        means, stds = (np.array(saved["flow"][key])[:, None, None] for key in ("means", "stds"))
        assert np.array_equal(one["flow"], (flow * stds + means).astype(np.float32))
        shares = outputs["scene"].double().softmax(dim=0)
        assert one["scene"] == saved["scene"]["names"][int(shares.argmax())]
        assert np.array_equal(one.probabilities["scene"], shares.numpy())
        assert one.to_columns()["scene_probability"] == float(shares.max())
    assert seen == set(SIZES) and len(list(predictions)) == 10  # once more


def test_outputs_are_those_of_the_trainer(shapes: Run) -> None:
    expected = shapes.trainer.predict(shapes.data.test).predictions
    for row, one in enumerate(loaded(shapes).predict(shapes.test, batch_size=8)):
        assert all(
            np.array_equal(one.outputs[task], of_task[row]) for task, of_task in zip(TASKS, expected, strict=True)
        )


def test_units_are_those_of_the_labels(shapes: Run) -> None:
    """A network that has learned nothing answers the mean of the training labels."""
    model = loaded(shapes)
    with torch.no_grad():
        model.model.heads.weight.zero_()
        model.model.heads.bias.zero_()
    heights = [np.load(shapes.test.parent / row["heights"]) for row in rows_of(shapes.test.parent / "train.csv")]
    [one] = model.predict([Image.new("RGB", (19, 7))])
    mean = np.mean([values[values > 0].mean() for values in heights])
    assert one["height (m)"].shape == (7, 19) and np.ptp(one["height (m)"]) == 0
    assert one["height (m)"][0, 0] == pytest.approx(mean, rel=0.05)  # resized labels count other pixels
    np.testing.assert_allclose(one["flow"][1], -3 * one["flow"][0], rtol=0.1)


@pytest.mark.parametrize(("model", "name"), SCENES)
def test_scenes_by_hand(model: str, name: str, scenes_of: Callable[[str, str], Run]) -> None:
    run = scenes_of(model, name)
    network, names = run.trainer.model.eval(), run.data.task_names
    expected = run.trainer.predict(run.data.test).predictions
    for row, one in enumerate(loaded(run).predict(run.test, batch_size=2)):
        for task, of_task in zip(names, expected, strict=True):
            assert np.array_equal(one.outputs[task], of_task[row])
        assert one.size == (32, 40) and np.array_equal(one["depth"], one.outputs["depth"])
        assert np.array_equal(one["segmentation"], one.outputs["segmentation"].argmax(axis=0))
        if "room" in names:
            assert one["room"] == ("bedroom", "kitchen")[int(one.outputs["room"].argmax())]
    # An image of another size, of 8 bits: resized to that of training, and what is predicted back.
    large = np.random.default_rng(0).integers(0, 256, (65, 83, 3), np.uint8)
    pixels = interpolate(torch.tensor(large).permute(2, 0, 1)[None].float(), size=(32, 40), mode="bilinear",
                         antialias=True).round() / 255  # fmt: skip
    with torch.no_grad():
        outputs = dict(zip(names, network(pixel_values=pixels).logits, strict=True))
    [one] = loaded(run).predict([large])
    depth = enlarged(outputs["depth"], (65, 83))[0].numpy()
    np.testing.assert_allclose(one["depth"], depth, rtol=1e-3, atol=1e-3)
    assert one["depth"].shape == one["segmentation"].shape == (65, 83)
    if "normals" in names:
        normals = enlarged(outputs["normals"][0], (65, 83)).numpy()
        np.testing.assert_allclose(np.linalg.norm(one["normals"], axis=0), 1, rtol=1e-5)
        assert np.linalg.norm(normals, axis=0).min() < 0.999  # before they are made unit vectors again
        np.testing.assert_allclose(one["normals"], normals / np.linalg.norm(normals, axis=0), atol=2e-2)
    assert len(loaded(run).tasks["segmentation"].names) == (13 if name == "nyuv2" else 7)


def test_classes_are_found_some_at_a_time() -> None:
    generator = torch.Generator().manual_seed(0)
    for classes in (2, 8, 9, 16, 37):
        logits = torch.randn(classes, 5, 7, generator=generator).round(decimals=1)  # ties, too
        for size in ((5, 7), (13, 22), (3, 3)):
            whole = logits if size == (5, 7) else enlarged(logits, size)
            assert torch.equal(best_classes(logits, size), whole.argmax(dim=0)), (classes, size)
    logits[20, 2, 3] = torch.nan
    assert best_classes(logits, (5, 7))[2, 3] == 20


# --- what images come in ------------------------------------------------------------------------------------------


def test_the_same_images_whatever_they_come_in(shapes: Run, tmp_path: Path) -> None:
    model = loaded(shapes)
    paths = [shapes.test.parent / row["image"] for row in rows_of(shapes.test)]
    opened = [Image.open(path) for path in paths]
    arrays = [np.asarray(image) for image in opened]
    for number, path in enumerate(paths):
        (tmp_path / f"{number:02d}.png").write_bytes(path.read_bytes())
    (tmp_path / "notes.txt").write_text("no image")
    expected = [one.outputs for one in model.predict(shapes.test)]
    held = datasets.Dataset.from_dict({"image": [str(path) for path in paths]}).cast_column("image", datasets.Image())
    for given in (
        paths, opened, arrays, [array / 255 for array in arrays], tmp_path, str(tmp_path), held,
        pd.DataFrame({"image": paths}), [{"image": array} for array in arrays], [path.read_bytes() for path in paths],
    ):  # fmt: skip
        found = [one.outputs for one in model.predict(given)]
        assert len(found) == 10
        for one, other in zip(found, expected, strict=True):
            assert all(np.array_equal(one[task], other[task]) for task in TASKS)
    one_size = np.stack([arrays[0], arrays[0]])
    first = [one.outputs["shape"] for one in model.predict(one_size)]
    assert np.array_equal(first[0], first[1]) and len(model.predict(paths[0])) == 1


def test_image_models_read_folders_and_arrays_too(tmp_path: Path) -> None:
    run = runs.image_run(tmp_path)
    model = hf_bilb.load(run.folder, device="cpu")
    rows = [json.loads(line) for line in run.test.read_text().splitlines()]
    arrays = [np.asarray(Image.open(tmp_path / str(row["file"])).convert("RGB")) for row in rows]
    expected = model.predict(run.test).outputs["kind"]
    assert np.array_equal(model.predict(arrays).outputs["kind"], expected)
    folder = tmp_path / "folder"
    folder.mkdir()
    for number, row in enumerate(rows):
        name = str(row["file"])
        (folder / f"{number:02d}{Path(name).suffix}").write_bytes((tmp_path / name).read_bytes())
    assert np.array_equal(model.predict(folder).outputs["kind"], expected)


def test_images_are_read_when_they_are_asked_for(shapes: Run, tmp_path: Path) -> None:
    for number, row in enumerate(rows_of(shapes.test)[:6]):
        (tmp_path / f"{number}.png").write_bytes((shapes.test.parent / row["image"]).read_bytes())
    whole = (tmp_path / "5.png").read_bytes()
    (tmp_path / "5.png").write_bytes(whole[: len(whole) // 2])
    found = iter(loaded(shapes).predict(tmp_path, batch_size=2))
    assert [next(found).size for _ in range(4)] and not torch.is_inference_mode_enabled()
    with pytest.raises(OptionError, match=r"the inputs, row 6: image '.*5\.png': does not decode"):
        next(found)


def test_what_is_wrong_is_one_line(shapes: Run, scenes_of: Callable[[str, str], Run], tmp_path: Path) -> None:
    model, scenes = loaded(shapes), loaded(scenes_of("segnet", "nyuv2"))
    (tmp_path / "empty").mkdir()
    rows = rows_of(shapes.test)
    first = {key: str(shapes.test.parent / rows[0][key]) for key in ("image", "mask", "heights")}
    small = tmp_path / "small.png"
    Image.new("L", (5, 4)).save(small)
    wrong = tmp_path / "wrong.png"
    Image.fromarray(np.full(SIZES[14 % 3], 99, np.uint8)).save(wrong)
    for act, said in (
        (lambda: list(model.predict([])), "there are no rows"),
        (lambda: model.predict(tmp_path / "empty"), "empty: holds no image, expected files that end in .bmp"),
        (lambda: model.predict([3]), "row 1: got a int, expected a path or an image"),
        (lambda: model.predict([tmp_path / "no.png"]), "there is no file"),
        (lambda: list(model.predict([np.zeros((4, 4, 3), np.int64)])), "row 1: is an array of int64, expected uint8"),
        (lambda: list(model.predict([np.full((4, 4, 3), 1.5)])), "an array of float64, expected uint8, or floats from"),
        (lambda: list(model.predict([np.zeros((3, 4, 4), np.uint8)])), "is an array [3, 4, 4], expected [height, wi"),
        (lambda: list(scenes.predict([np.full((40, 40, 3), 99.0)])), "values from 99 to 99, expected 0 to 1"),
        (lambda: model.predict([first["image"]], batch_size=0), "batch_size: 0 is not valid"),
        (lambda: model.evaluate(Path(first["image"]).parent), "has no labels, expected a table with a column 'image'"),
        (lambda: model.evaluate([{"image": first["image"]}]), "has no column 'mask'"),
        (lambda: model.evaluate([{**first, "mask": str(small)}]), "is 4 x 5 pixels (height x width), its image 41 x "),
        (lambda: model.evaluate([{**first, "mask": str(wrong)}]), "has 99 at pixel [0, 0], expected a class from 0 to"),
        (lambda: model.evaluate([{**first, "mask": "nowhere.png"}]), "row 1: column 'mask': mask '"),
        (lambda: model.evaluate([{**first, "scene": "narrow"}]), "column 'scene' is 'narrow', which is no class"),
    ):  # fmt: skip
        with pytest.raises(OptionError) as raised:
            act()
        assert said in str(raised.value) and "\n" not in str(raised.value)
    with pytest.raises(KeyError, match='did you mean "shape"'):
        next(iter(model.predict([first["image"]])))["shapes"]


# --- measuring ----------------------------------------------------------------------------------------------------


def test_metrics_of_a_table_are_the_run_s(shapes: Run) -> None:
    model, expected = loaded(shapes), measured(shapes)
    assert model.evaluate(shapes.test, batch_size=8) == expected
    assert {"shape_miou", "height (m)_mae", "flow_r2", "scene_accuracy", "brightness_rmse"} <= expected.keys()
    assert model.metric_infos == shapes.data.metrics
    rows = [{key: str(shapes.test.parent / value) if "/" in value else value for key, value in row.items()}
            for row in rows_of(shapes.test)]  # fmt: skip
    assert model.evaluate(rows, batch_size=8) == expected
    without = [{key: value for key, value in row.items() if key not in ("mask", "brightness")} for row in rows]
    assert model.evaluate(without, batch_size=8) == {
        key: value for key, value in expected.items() if not key.startswith(("shape", "brightness"))
    }


@pytest.mark.parametrize(("model", "name"), SCENES)
def test_metrics_of_scenes_are_the_run_s(model: str, name: str, scenes_of: Callable[[str, str], Run]) -> None:
    run = scenes_of(model, name)
    table = pd.read_csv(run.test)
    for column in table:
        table[column] = [str(run.test.parent / file) for file in table[column]]
    if model == "dense_backbone":
        table["room"] = ["bedroom", "kitchen"] * 2 + ["bedroom"]
    expected = measured(run)
    found = loaded(run).evaluate(table, batch_size=2)
    assert found == expected and {"segmentation_miou", "depth_rel_error", "depth_abs_error_batch_mean"} <= found.keys()
    assert ("normals_median_angle" in found) is (name == "nyuv2") and ("room_accuracy" in found) is ("room" in table)
    assert "delta_m" in found and loaded(run).metric_infos == run.data.metrics
    part = loaded(run).evaluate(table[["image", "depth"]], batch_size=2)
    assert part == {key: value for key, value in expected.items() if key.startswith("depth")}


def test_masks_and_arrays_of_other_files(scenes_of: Callable[[str, str], Run], tmp_path: Path) -> None:
    """Depth and normals with channels first, and images as PNG: the same labels."""
    run = scenes_of("segnet", "nyuv2")
    rows = []
    for number, row in enumerate(rows_of(run.test)):
        arrays: dict[str, NDArray[Any]] = {key: np.load(run.test.parent / file) for key, file in row.items()}
        np.save(tmp_path / f"{number}_depth.npy", arrays["depth"][:, :, 0])
        np.save(tmp_path / f"{number}_normals.npy", arrays["normals"].transpose(2, 0, 1))
        rows.append({"image": str(run.test.parent / row["image"]), "depth": str(tmp_path / f"{number}_depth.npy"),
                     "normals": str(tmp_path / f"{number}_normals.npy")})  # fmt: skip
    expected = measured(run)
    found = loaded(run).evaluate(rows, batch_size=2)
    assert found == {key: value for key, value in expected.items() if key.startswith(("depth", "normals"))}
    # An empty cell is an image without labels of the task: the others are measured.
    emptied = [{**row, "depth": "" if number == 1 else row["depth"]} for number, row in enumerate(rows)]
    others = loaded(run).evaluate([row for row in rows if row is not rows[1]], batch_size=1)
    with_gap = loaded(run).evaluate(emptied, batch_size=1)
    assert with_gap["depth_abs_error"] == others["depth_abs_error"] != found["depth_abs_error"]
    assert with_gap["normals_mean_angle"] == loaded(run).evaluate(rows, batch_size=1)["normals_mean_angle"]


# --- one network of one's own, and real images --------------------------------------------------------------------

NETWORK = """
from torch import nn


class Network(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.map = nn.Conv2d(3, outputs, 3, padding=1)

    def forward(self, pixel_values):
        return self.map(pixel_values)


def build(tasks, image_size):
    [task] = tasks.values()
    return Network(task.size)
"""


def test_a_network_of_ones_own_with_one_task(tmp_path: Path) -> None:
    files = pixel_runs.write_shapes(tmp_path)
    (tmp_path / "network.py").write_text(NETWORK)
    data = {"name": "table", "files": files, "inputs": {"image": "image"}, "image_size": 32,
            "tasks": {"shape": TASKS["shape"]}, "cache_dir": str(tmp_path / "cache")}  # fmt: skip
    model = {"name": "torch_module", "factory": f"{tmp_path / 'network.py'}:build"}
    run = runs.finished(tmp_path, model, data, Path(files["test"]))
    found = hf_bilb.load(run.folder, device="cpu", trust_remote_code=True)
    assert isinstance(found, LoadedPixelModel)
    assert found.evaluate(run.test, batch_size=8) == measured(run)
    (expected,) = run.trainer.predict(run.data.test).predictions
    assert all(np.array_equal(one.outputs["shape"], expected[row]) for row, one in enumerate(found.predict(run.test)))


def test_a_folder_without_its_file_says_what_it_can(shapes: Run, tmp_path: Path) -> None:
    shutil.copytree(shapes.folder, tmp_path / "run", ignore=shutil.ignore_patterns("hf_bilb.json", "checkpoint-*"))
    found = hf_bilb.load(tmp_path / "run", device="cpu")
    for one, other in zip(found.predict(shapes.test), loaded(shapes).predict(shapes.test), strict=True):
        assert all(np.array_equal(one[task], other[task]) for task in TASKS)


@pytest.mark.data
@pytest.mark.skipif(not REAL.is_file(), reason="needs ../shared/data")
def test_real_images_of_nyuv2(tmp_path: Path) -> None:
    """JPEG images of 144 x 192 in a table, with masks whose 255 is no label, and depths in steps of 4 cm."""
    lines = ["image,classes,depth"]
    with zipfile.ZipFile(REAL) as archive:
        for name in sorted(archive.namelist())[:400]:
            if (stem := Path(name).stem) and name.startswith("image/") and len(lines) < 17:
                for member in (name, f"label13/{stem}.png", f"depth/{stem}.png"):
                    archive.extract(member, tmp_path)
                lines.append(f"{name},label13/{stem}.png,depth/{stem}.png")
    parts = {"train": lines[1:9], "validation": lines[9:11], "test": lines[11:]}
    for part, own in parts.items():
        (tmp_path / f"{part}.csv").write_text("\n".join([lines[0], *own]))
    files = {part: str(tmp_path / f"{part}.csv") for part in parts}
    tasks = {"classes": {"type": "segmentation", "num_classes": 13},
             "depth": {"type": "dense_regression", "unit": "4 cm", "missing": 0}}  # fmt: skip
    data = {"name": "table", "files": files, "inputs": {"image": "image"}, "image_size": 96, "tasks": tasks,
            "cache_dir": str(tmp_path / "cache")}  # fmt: skip
    run = runs.finished(tmp_path, RESNET, data, Path(files["test"]))
    model = loaded(run)
    assert model.evaluate(run.test, batch_size=8) == measured(run)
    network = run.trainer.model.eval()
    for one, row in zip(model.predict(run.test, batch_size=1), rows_of(run.test), strict=True):
        image = Image.open(tmp_path / row["image"]).resize((96, 96), Image.Resampling.BILINEAR)
        with torch.no_grad():
            logits = network(pixel_values=torch.tensor(np.array(image)).permute(2, 0, 1)[None].float() / 255).logits
        assert np.array_equal(one["classes"], enlarged(logits[0][0], (144, 192)).argmax(dim=0).numpy())
        task = model.tasks["depth"]
        depth = enlarged(logits[1][0], (144, 192))[0].double().numpy() * task.stds[0] + task.means[0]
        assert np.array_equal(one["depth"], depth.astype(np.float32)) and 10 < one["depth"].mean() < 200


def test_many_classes_keep_their_numbers() -> None:
    outputs = torch.zeros(300, 2, 2)
    outputs[299, 0, 1] = outputs[256, 1, 0] = 1.0
    tasks = {"kind": TaskType("segmentation", 300)}
    one = ImagePrediction(tasks, {"kind": outputs}, (2, 2), frozenset())
    assert one["kind"].tolist() == [[0, 299], [256, 0]]
