"""Masks and arrays that a table names."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from hf_bilb.data import TaskData
from hf_bilb.data.own import pixels
from hf_bilb.errors import OptionError
from tests.data.own.masks import HEIGHTS, ROAD, save, write_scenes
from tests.data.own.tables import load

SCENE: dict[str, Any] = {"type": "classification"}


def load_scenes(folder: Path, tasks: dict[str, Any] | None = None, **changes: Any) -> TaskData:
    options = {"files": str(folder / "scenes.csv"), "inputs": {"image": "image"}, "image_size": 24,
               "tasks": {"road": ROAD, "scene": SCENE, "height": HEIGHTS} if tasks is None else tasks,
               "cache_dir": str(folder / "cache")}  # fmt: skip
    return load(**{**options, **changes})


def whole(data: TaskData, part: str) -> dict[str, Tensor]:
    rows = getattr(data, part)
    return rows[list(range(len(rows)))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_scenes(tmp_path, height=24, width=24)
    return tmp_path


def test_labels_belong_to_the_pixels_of_their_images(folder: Path) -> None:
    data = load_scenes(folder, {"road": ROAD, "scene": SCENE, "height": {**HEIGHTS, "standardize": False}})
    assert data.label_names == ("labels", "road", "height")
    seen = 0
    for part in ("train", "validation", "test"):
        batch = whole(data, part)
        shown = (batch["pixel_values"] * 255).round().numpy()
        numbers = (shown[:, 1, 0, 0] / 7).round().astype(int)  # of the images
        for number, image, classes, heights in zip(
            numbers, shown, batch["road"].numpy(), batch["height"].numpy(), strict=True
        ):
            expected = image[0] / 100
            expected[:, 0] = -100
            assert np.array_equal(classes, expected if number != 2 else np.full((24, 24), -100))
            measured = image[2:] / 10
            measured[:, -1] = np.nan
            assert np.array_equal(heights, measured if number != 3 else np.full((1, 24, 24), np.nan), equal_nan=True)
        assert batch["road"].dtype.is_floating_point is False and str(batch["height"].dtype) == "torch.float32"
        known = dict(zip(numbers, batch["labels"][:, 0].tolist(), strict=True))
        assert all(known[number] == number % 2 for number in known if number != 5)
        seen += len(numbers)
    assert seen == 12
    assert [task.to_dict() for task in data.model_arguments["tasks"].values()] == [
        {"type": "segmentation", "size": 3, "names": ["sky", "road", "tree"]},
        {"type": "classification", "size": 2, "names": ["indoor", "outdoor"]},
        {"type": "dense_regression", "unit": "m"},
    ]
    counts = [int((whole(data, part)["road"] >= 0).any(2).any(1).sum()) for part in ("train", "validation", "test")]
    assert sum(counts) == 11
    assert re.search(r"^road +{} +{} +{}  segmentation, 3 classes$".format(*counts), data.summary, flags=re.M)


def test_labels_are_resized_to_the_nearest_pixel(tmp_path: Path) -> None:
    write_scenes(tmp_path, height=24, width=32)
    data = load_scenes(tmp_path, image_size=8)
    whole_size = load_scenes(tmp_path, image_size=8, cache_dir=str(tmp_path / "other"))
    row = data.train.pixels["road"].rows[0]
    file = np.load(data.train.pixels["road"].file)
    found = {tuple(one.reshape(-1)) for one in file}
    # Of 24 rows the centres of 8 are in 1, 4, ..., 22; of 32 columns in 2, 6, ..., 30.
    masks = [np.asarray(Image.open(tmp_path / f"masks/{n}.png")).astype(int) for n in range(12) if n != 2]
    assert found == {tuple(mask[1::3, 2::4].reshape(-1)) for mask in masks} and row >= 0
    assert np.array_equal(file, np.load(whole_size.train.pixels["road"].file))


def test_numbers_are_standardised_by_the_training_part_and_missing_ones_left_out(folder: Path) -> None:
    data, plain = load_scenes(folder), load_scenes(folder, {"road": ROAD, "height": {**HEIGHTS, "standardize": False}})
    heights = np.concatenate([np.load(plain.train.pixels["height"].file)[row].reshape(-1)
                              for row in load_scenes(folder).train.pixels["height"].rows if row >= 0])  # fmt: skip
    task = data.model_arguments["tasks"]["height"]
    assert task.means == pytest.approx([np.nanmean(heights.astype(np.float64))], rel=1e-12)
    assert task.stds == pytest.approx([np.nanstd(heights.astype(np.float64))], rel=1e-12)
    values = whole(data, "train")["height"].double().numpy()
    assert np.nanmean(values) == pytest.approx(0, abs=1e-7) and np.nanstd(values) == pytest.approx(1, rel=1e-6)
    measured = data.test[0]["height"].numpy() * task.stds[0] + task.means[0]
    np.testing.assert_allclose(measured, np.load(data.test.pixels["height"].file)[data.test.pixels["height"].rows[0]],
                               rtol=1e-5)  # fmt: skip


def test_arrays_of_several_channels_as_npy(folder: Path) -> None:
    rng = np.random.default_rng(1)
    arrays = rng.normal([[[3.0]], [[-5.0]]], [[[2.0]], [[0.5]]], (12, 2, 24, 24)).astype(np.float32)
    arrays[:, 1, 3] = np.nan
    lines = ["image,flow"]
    for number, array in enumerate(arrays):
        save(folder / f"flow/{number}.npy", array)
        lines.append(f"images/{number}.png,flow/{number}.npy")
    (folder / "flow.csv").write_text("\n".join(lines), encoding="utf-8")
    files = {part: str(folder / "flow.csv") for part in ("train",)}
    data = load_scenes(folder, {"flow": {"type": "dense_regression"}}, files=files)
    task = data.model_arguments["tasks"]["flow"]
    train = (whole(data, "train")["pixel_values"][:, 1, 0, 0] * 255 / 7).round().int().tolist()
    expected = arrays[train].transpose(1, 0, 2, 3).reshape(2, -1).astype(np.float64)
    assert task.size == 2 and data.label_names == ("flow",)
    np.testing.assert_allclose(task.means, np.nanmean(expected, axis=1), rtol=1e-6)
    np.testing.assert_allclose(task.stds, np.nanstd(expected, axis=1), rtol=1e-6)
    values = whole(data, "test")["flow"].numpy()
    assert values.shape == (1, 2, 24, 24) and np.isnan(values[:, 1, 3]).all() and "labels" not in data.test[0]


def test_masks_and_images_in_the_table_itself(folder: Path) -> None:
    def image(path: Path) -> dict[str, Any]:
        return {"bytes": path.read_bytes(), "path": None}

    rows = [{"image": image(folder / f"images/{n}.png"), "mask": image(folder / f"masks/{n}.png") if n != 2 else None}
            for n in range(12)]  # fmt: skip
    table = datasets.Dataset.from_list(rows)
    table = table.cast_column("image", datasets.Image()).cast_column("mask", datasets.Image())
    table.to_parquet(str(folder / "held.parquet"))
    paths, held = (load_scenes(folder, {"road": ROAD}, files=str(folder / name))
                   for name in ("scenes.csv", "held.parquet"))  # fmt: skip
    for part in ("validation", "test", "train"):
        one, other = whole(paths, part), whole(held, part)
        assert np.array_equal(one["road"], other["road"]) and np.array_equal(one["pixel_values"], other["pixel_values"])


def test_tasks_with_files_of_their_own(folder: Path) -> None:
    tables = (folder / "scenes.csv").read_text(encoding="utf-8").splitlines()
    for name, rows in (("a.csv", tables[1:7]), ("b.csv", tables[7:])):
        (folder / name).write_text("\n".join([tables[0], *rows]), encoding="utf-8")
    tasks = {"road": {**ROAD, "files": str(folder / "a.csv")}, "height": {**HEIGHTS, "files": str(folder / "b.csv")}}
    data = load_scenes(folder, tasks, files=None)
    batch, ids = whole(data, "train"), data.train.task_ids
    has_road, has_height = (batch["road"] >= 0).any((1, 2)).numpy(), (~batch["height"].isnan()).any((1, 2, 3)).numpy()
    assert np.array_equal(has_road, ids == 0) and np.array_equal(has_height, ids == 1) and 0 < ids.sum() < len(ids)


def test_files_are_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    decode = pixels.decode_label
    monkeypatch.setattr(pixels, "decode_label", lambda data, where: read.append(where) or decode(data, where))
    load_scenes(folder, {"road": ROAD})
    assert len(read) == 11
    load_scenes(folder, {"road": ROAD})
    assert len(read) == 11
    other = np.full((24, 24), 1, np.uint8)
    save(folder / "masks/0.png", other)
    data = load_scenes(folder, {"road": ROAD})
    assert len(read) == 22 and (np.load(data.train.pixels["road"].file) == other).all(axis=(1, 2)).sum() == 1


def test_balanced_weights_are_those_of_the_pixels(folder: Path) -> None:
    data = load_scenes(folder, {"road": {**ROAD, "class_weights": "balanced"}})
    counts = np.bincount(whole(data, "train")["road"][whole(data, "train")["road"] >= 0].numpy())
    np.testing.assert_allclose(data.model_arguments["tasks"]["road"].class_weights, counts.sum() / (3 * counts))


def test_the_constant_predictor_of_pixels(folder: Path) -> None:
    data = load_scenes(folder)
    train, test = whole(data, "train"), whole(data, "test")
    best = np.bincount(train["road"][train["road"] >= 0].numpy()).argmax()
    classes = test["road"][test["road"] >= 0].numpy()
    task = data.model_arguments["tasks"]["height"]
    errors = test["height"].double().numpy() * task.stds[0]
    found = data.trivial_metrics
    assert found["road_pixel_accuracy"] == pytest.approx((classes == best).mean())
    assert found["road_miou"] == pytest.approx((classes == best).mean() / 3)
    assert found["height_mae"] == pytest.approx(np.nanmean(np.abs(errors)), rel=1e-6)
    assert found["height_rmse"] == pytest.approx(np.sqrt(np.nanmean(errors**2)), rel=1e-6)


def png(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG")
    return stream.getvalue()


def npy(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


HELD = "{dir}/scenes.csv, row 1: column 'mask': mask '{dir}/masks/0.png'"
ARRAY = "{dir}/scenes.csv, row 1: column 'array': array '{dir}/arrays/0.png'"
SEVEN = np.zeros((24, 24), np.uint8)
SEVEN[2, 5] = 7


@pytest.mark.parametrize(
    ("file", "content", "line"),
    [
        ("masks", png(SEVEN), f"{HELD} has 7 at pixel [2, 5], expected a class from 0 to 2, or 255 (not labelled)"),
        ("masks", npy(SEVEN * 0 + 0.5), f"{HELD} has 0.5 at pixel [0, 0], expected a class from 0 to 2, or 255 (not "
                                        "labelled)"),
        ("masks", png(np.zeros((24, 16), np.uint8)), f"{HELD} is 24 x 16 pixels (height x width), its image 24 x 24"),
        ("masks", png(np.zeros((24, 24, 3), np.uint8)), f"{HELD} has 3 channels, expected class numbers in one"),
        ("masks", b"nothing", f"{HELD}: does not decode: 7 bytes that are no image"),
        ("masks", png(SEVEN)[:50], f"{HELD}: does not decode: "),
        ("masks", None, f"{HELD}: No such file or directory"),
        ("arrays", npy(np.zeros((2, 24, 24))), f"{ARRAY} has 2 channels, expected 1 as the first one"),
        ("arrays", npy(np.zeros((24, 23))), f"{ARRAY} is 24 x 23 pixels (height x width), its image 24 x 24"),
        ("arrays", npy(np.full((24, 24), np.inf)), f"{ARRAY} is infinite at [0, 0, 0], expected finite numbers or NaN"),
        ("arrays", npy(np.zeros(24)), f"{ARRAY} is float64 [24], expected numbers [height, width] or"),
        ("arrays", npy(np.zeros((24, 24), "c8")), f"{ARRAY} is complex64 [24, 24], expected numbers"),
        ("arrays", npy(np.zeros((24, 24)))[:200], f"{ARRAY} cannot be read as an array: "),
        ("images", b"nothing", "{dir}/scenes.csv, row 1: image '{dir}/images/0.png': does not decode: 7 bytes"),
    ],
    ids=range(14),
)  # fmt: skip
def test_a_wrong_file_is_named_with_its_row_and_column(
    folder: Path, file: str, content: bytes | None, line: str
) -> None:
    # In a file of the test part: the first array of the training part says how many channels there are.
    files = {"train": str(folder / "train.csv"), "test": str(folder / "scenes.csv")}
    rows = (folder / "scenes.csv").read_text(encoding="utf-8").splitlines()
    (folder / "train.csv").write_text("\n".join([rows[0], *rows[5:]]), encoding="utf-8")
    path = folder / file / "0.png"
    path.write_bytes(content) if content is not None else path.unlink()
    with pytest.raises(OptionError) as error:
        load_scenes(folder, files=files)
    said = str(error.value).replace(str(folder), "{dir}")
    assert said.startswith(f"data: {line}") and "\n" not in said


@pytest.mark.parametrize(
    ("tasks", "line"),
    [
        ({"road": {"type": "segmentation", "column": "mask"}},
         "data.tasks.road.num_classes: segmentation needs it, or the names of the classes, none is set"),
        ({"road": {**ROAD, "num_classes": 3}},
         "data.tasks.road.num_classes: segmentation needs it, or the names of the classes, both are set"),
        ({"road": {"type": "segmentation", "num_classes": 1}}, "data.tasks.road.num_classes: 1 is not valid"),
        ({"road": {"type": "segmentation", "num_classes": 300}},
         "data.tasks.road.ignore_index: 255 is one of the 300 classes; set another, or null"),
        ({"road": {**ROAD, "missing": 0}}, "data.tasks.road.missing: says nothing for segmentation, only for"),
        ({"h": {**HEIGHTS, "ignore_index": 0}}, "data.tasks.h.ignore_index: says nothing for dense_regression, only"),
        ({"scene": {"type": "classification", "num_classes": 2}},
         "data.tasks.scene.num_classes: says nothing for classification, only for segmentation"),
        ({"labels": ROAD}, "data.tasks: 'labels' is the name of another column of a batch, expected another one"),
        ({"road": {**ROAD, "metrics": ["mae"]}}, "data.tasks.road.metrics: 'mae' is not known; known: miou, pixel_acc"),
        ({"road": {**ROAD, "column": "msk"}}, "data.tasks.road.column: {dir}/scenes.csv has no column 'msk' (did you"),
        ({"road": {**ROAD, "column": "blank"}}, "data.tasks.road: column 'blank' has no label in the training part"),
        ({"h": {**HEIGHTS, "column": "blank"}}, "data.tasks.h: column 'blank' has no label in the training part"),
        ({"road": {**ROAD, "column": "ignored"}},
         "data.tasks.road: column 'ignored' has no label in the training part"),
        ({"h": {**HEIGHTS, "column": "zeros"}}, "data.tasks.h: column 'zeros' has no label in the training part"),
        ({"road": {**ROAD, "classes": ["a", "b", "c", "d"], "class_weights": "balanced"}},
         "data.tasks.road.class_weights: class 'd' has no label, so there is no balanced weight for it"),
    ],
)  # fmt: skip
def test_what_is_refused_is_said_in_one_line(folder: Path, tasks: dict[str, Any], line: str) -> None:
    save(folder / "ignored.png", np.full((24, 24), 255, np.uint8))
    save(folder / "zeros.npy", np.zeros((24, 24)))
    rows = (folder / "scenes.csv").read_text(encoding="utf-8").splitlines()
    rows = [f"{rows[0]},blank,ignored,zeros", *(f"{row},,ignored.png,zeros.npy" for row in rows[1:])]
    (folder / "scenes.csv").write_text("\n".join(rows), encoding="utf-8")
    with pytest.raises(OptionError) as error:
        load_scenes(folder, tasks)
    said = str(error.value).replace(str(folder), "{dir}")
    assert said.startswith(line) and "\n" not in said


def test_pixels_need_images(folder: Path) -> None:
    line = r"^data\.inputs\.image: the task 'road' \(segmentation\) needs a column of images$"
    with pytest.raises(OptionError, match=line):
        load_scenes(folder, inputs={"numeric": ["brightness"]})
