"""`hf-bilb predict` and `hf-bilb evaluate` of models with tasks of pixels: a folder of files and a table of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import hf_bilb
from hf_bilb.hub.snippet import snippet
from hf_bilb.inference.image_folder import _save_classes, map_files
from hf_bilb.inference.image_predictions import ImagePrediction
from hf_bilb.inference.pixels import LoadedPixelModel
from hf_bilb.losses.task_types import TaskType
from hf_bilb.storage import writing
from tests.cli.test_predict import call
from tests.inference import pixel_runs
from tests.inference.pixel_runs import TASKS
from tests.inference.runs import Run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return pixel_runs.shapes_run(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def model(run: Run) -> LoadedPixelModel:
    found = hf_bilb.load(run.folder, device="cpu")
    assert isinstance(found, LoadedPixelModel)
    return found


def predict(run: Run, source: Path, output: Path, *options: str) -> pd.DataFrame:
    done = call("predict", run.folder, source, "--output", output, "--device", "cpu", *options)
    assert done.exit_code == 0, done.output
    return pd.read_csv(output / "predictions.csv")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_table_of_images_becomes_a_folder(run: Run, model: LoadedPixelModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    index = predict(run, run.test, out)
    given = pd.read_csv(run.test)
    pd.testing.assert_frame_equal(index[given.columns], given)
    assert list(index.columns) == [*given.columns, *(f"predicted_{name}" for name in (
        "shape", "height (m)", "flow", "scene", "scene_probability", "brightness"))]  # fmt: skip
    listed = [index[f"predicted_{task}"] for task in ("shape", "height (m)", "flow")]
    assert names(out) == {"predictions.csv", "classes.json"}.union(*map(set, listed)) and len(names(out)) == 2 + 3 * 10
    assert json.loads((out / "classes.json").read_text()) == {"shape": TASKS["shape"]["classes"]}
    assert index.loc[0, "predicted_shape"] == "01_shape.png" and index.loc[9, "predicted_flow"] == "10_flow.npy"
    assert index.loc[3, "predicted_height (m)"] == "04_height_m.npy" and names(tmp_path) == {"out"}
    for (_, row), one in zip(index.iterrows(), model.predict(run.test), strict=True):
        picture = Image.open(out / row["predicted_shape"])
        assert picture.mode == "P" and picture.size == one.size[::-1]
        assert np.array_equal(np.asarray(picture), one["shape"])
        for task in ("height (m)", "flow"):
            values = np.load(out / row[f"predicted_{task}"])
            assert values.dtype == np.float32 and np.array_equal(values, one[task])
        assert row["predicted_scene"] == one["scene"]
        assert row["predicted_brightness"] == pytest.approx(float(one["brightness"]), rel=1e-12)
    colours = np.array(picture.getpalette()).reshape(-1, 3)
    assert len(np.unique(colours[: len(TASKS["shape"]["classes"])], axis=0)) == len(TASKS["shape"]["classes"])


def test_a_folder_of_images(run: Run, model: LoadedPixelModel, tmp_path: Path) -> None:
    index = predict(run, run.test.parent / "images", tmp_path / "out", "--prefix", "", "--all-classes", "--preview")
    files = sorted(path.name for path in (run.test.parent / "images").iterdir())
    assert index["image"].tolist() == files and index["shape"].tolist() == [f"{Path(f).stem}_shape.png" for f in files]
    assert index["scene_probability_wide"].between(0, 1).all()
    first = index.iloc[0]
    [one] = model.predict([run.test.parent / "images" / first["image"]])
    shares = np.load(tmp_path / "out" / first["shape_probabilities"])
    assert shares.dtype == np.float32 and shares.shape == (11, *one.size)
    np.testing.assert_allclose(shares.sum(axis=0), 1, rtol=1e-5)
    assert (shares.argmax(axis=0) == np.asarray(Image.open(tmp_path / "out" / first["shape"]))).mean() > 0.999
    preview = Image.open(tmp_path / "out" / first["height (m)_preview"])
    assert preview.mode == "RGB" and preview.size == one.size[::-1]
    assert "flow_preview" not in index  # two numbers are no colour
    single = predict(run, run.test.parent / "images" / first["image"], tmp_path / "single")
    assert len(single) == 1 and (tmp_path / "single" / f"{Path(first['image']).stem}_shape.png").is_file()


def test_predictions_are_labels_again(run: Run, model: LoadedPixelModel, tmp_path: Path) -> None:
    """Of images of the model's size, a model agrees with itself."""
    for number in range(3):
        image = pixel_runs.shapes(number)[0]
        Image.fromarray(image).resize((32, 32)).save(tmp_path / f"{number}.png")
    predict(run, tmp_path, tmp_path / "out", "--prefix", "")
    index = pd.read_csv(tmp_path / "out" / "predictions.csv").rename(columns={"shape": "mask", "height (m)": "heights"})
    index["image"] = [f"../{name}" for name in index["image"]]
    index.to_csv(tmp_path / "out" / "labels.csv", index=False)
    found = model.evaluate(tmp_path / "out" / "labels.csv")
    assert found["shape_miou"] == found["shape_pixel_accuracy"] == found["scene_accuracy"] == 1
    assert found["height (m)_mae"] < 1e-5 and found["flow_rmse"] < 1e-5


def test_images_in_the_table_do_not_go_into_the_csv(run: Run, tmp_path: Path) -> None:
    paths = [str(run.test.parent / f"images/{number}.png") for number in range(3)]
    table = datasets.Dataset.from_dict({"image": paths, "id": ["a", "b", "c"]}).cast_column("image", datasets.Image())
    table.to_parquet(str(tmp_path / "held.parquet"))
    index = predict(run, tmp_path / "held.parquet", tmp_path / "out")
    assert index["id"].tolist() == ["a", "b", "c"] and "image" not in index
    assert index["predicted_shape"].tolist() == ["1_shape.png", "2_shape.png", "3_shape.png"]


def test_files_of_one_name_do_not_write_over_each_other(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    image = Image.fromarray(pixel_runs.shapes(0)[0])
    for name in ("a.png", "a.bmp", "b.png"):
        image.save(folder / name)
    index = predict(run, folder, tmp_path / "out")
    assert index["predicted_shape"].tolist() == ["a.bmp_shape.png", "a.png_shape.png", "b.png_shape.png"]


def test_more_classes_than_a_palette_has(tmp_path: Path) -> None:
    numbers = torch.randint(0, 300, (6, 7), generator=torch.Generator().manual_seed(0))
    logits = torch.nn.functional.one_hot(numbers, 300).permute(2, 0, 1).float()
    for size, mode in ((300, "I;16"), (257, "I;16"), (256, "P")):
        one = ImagePrediction({"kind": TaskType("segmentation", size)}, {"kind": logits[:size]}, (6, 7), frozenset())
        _save_classes("kind", size, one, tmp_path / "kind.png")
        picture = Image.open(tmp_path / "kind.png")
        assert picture.mode == mode and np.array_equal(np.asarray(picture), one["kind"])


def test_names_of_tasks_become_names_of_files(model: LoadedPixelModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = {name: TaskType("dense_regression") for name in ("a/b", "a b", "../..", "ü")}
    monkeypatch.setattr(LoadedPixelModel, "tasks", tasks)
    assert [file.ending for file in map_files(model)] == ["_a_b.npy", "_a_b-2.npy", "_.._...npy", "_ü.npy"]


def test_measured(run: Run, model: LoadedPixelModel) -> None:
    done = call("evaluate", run.folder, run.test, "--device", "cpu", "--json")
    expected = run.trainer.evaluate(run.data.test, metric_key_prefix="test")
    found = json.loads(done.output)["metrics"]
    assert found == {info.key: expected[f"test_{info.key}"] for info in run.data.metrics}
    printed = call("evaluate", run.folder, run.test, "--device", "cpu").output
    assert "shape       mIoU" in printed and "height (m)  MAE             m" in printed


# --- what is there stays ------------------------------------------------------------------------------------------


def test_a_folder_that_is_there(run: Run, tmp_path: Path) -> None:
    out, images = tmp_path / "out", run.test.parent / "images"
    out.mkdir()  # an empty one does no harm
    predict(run, run.test, out)
    before = names(out)
    done = call("predict", run.folder, images, "--output", out)
    assert done.exit_code == 2 and "is already there; --force writes over it" in done.output and names(out) == before
    index = predict(run, images / "3.png", out, "--force")
    assert len(index) == 1 and "3_shape.png" in names(out)
    assert names(out) == {"predictions.csv", "classes.json", "3_shape.png", "3_height_m.npy", "3_flow.npy"}
    (out / "thesis.txt").write_text("years of work")
    done = call("predict", run.folder, images, "--output", out, "--force")
    assert done.exit_code == 2 and "holds 'thesis.txt', which is no prediction" in done.output
    assert (out / "thesis.txt").read_text() == "years of work" and "3_flow.npy" in names(out)


def test_into_the_folder_that_one_is_in(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    done = call("predict", run.folder, run.test, "--output", ".")
    monkeypatch.chdir(tmp_path)
    assert done.exit_code == 0, done.output
    assert names(tmp_path) == {"out"} and "predictions.csv" in names(tmp_path / "out")


def test_what_is_wrong_is_one_line_and_leaves_nothing(run: Run, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(12):
        Image.fromarray(pixel_runs.shapes(number)[0]).save(images / f"{number:02d}.png")
    (images / "11.png").write_bytes((images / "11.png").read_bytes()[:300])
    (tmp_path / "file").write_text("old")
    (tmp_path / "empty").mkdir()
    (tmp_path / "twice.csv").write_text(f"image,predicted_flow\n{images / '00.png'},1\n")
    for arguments, said in (
        ((images, "--output", tmp_path / "out"), "row 12: image '"),
        (
            (images, "--output", tmp_path / "out.csv"),
            "is the name of a table, but the model has tasks of pixels, whi",
        ),
        ((images, "--output", tmp_path / "file"), "is a file, expected a name that ends in .csv"),
        ((images, "--output", tmp_path / "no" / "out"), "there is no folder"),
        ((images, "--output", images, "--force"), "holds what is read"),
        ((images, "--output", tmp_path, "--force"), "holds what is read"),
        ((tmp_path / "empty", "--output", tmp_path / "out"), "empty: holds no image, expected files that end in"),
        ((tmp_path / "imgs", "--output", tmp_path / "out"), "there is no file"),
        ((tmp_path / "twice.csv", "--output", tmp_path / "out"), "has a column 'predicted_flow' already; --prefix"),
        ((images, "--output", tmp_path / "out", "--batch-size", 0), "batch_size: 0 is not valid"),
    ):
        before = names(tmp_path)
        done = call("predict", run.folder, *arguments)
        assert done.exit_code == 2 and said.replace("'out.csv'", f"'{tmp_path / 'out.csv'}'") in done.output, (
            done.output
        )
        assert done.output.count("\n") == 1 and names(tmp_path) == before


def test_a_full_disk_is_one_line(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing.os, "fsync", full)
    done = call("predict", run.folder, run.test, "--output", tmp_path / "out")
    assert done.exit_code == 2 and "No space left on device" in done.output and done.output.count("\n") == 1
    assert names(tmp_path) == set()


def test_a_folder_keeps_what_it_held_until_the_new_one_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()

    def interrupted() -> None:
        with writing.folder_written_aside(out) as aside:
            (aside / "new").touch()
            assert names(out) == {"old"}
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == {"out"} and names(out) == {"old"}
    with writing.folder_written_aside(out) as aside:
        (aside / "new").touch()
    assert names(tmp_path) == {"out"} and names(out) == {"new"}


# --- the card -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["shapes", "scenes"])
def test_the_snippet_of_the_card_runs(kind: str, run: Run, tmp_path: Path) -> None:
    chosen = run if kind == "shapes" else pixel_runs.scenes_run(tmp_path / "scenes")
    Image.fromarray(pixel_runs.shapes(0)[0]).save(tmp_path / "photo.jpg")
    code = snippet(str(chosen.folder), json.loads((chosen.folder / "hf_bilb.json").read_text()))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    shown = ["(37, 53)", "(37, 53)", "(3, 37, 53)"] if kind == "scenes" else ["(37, 53)", "(37, 53)"]
    lines = done.stdout.splitlines()
    assert lines[: len(shown)] == shown and len(lines) == (3 if kind == "scenes" else 5)


def test_the_card_says_what_stands_at_each_pixel() -> None:
    from hf_bilb.experiments.run_card import _outputs, _pipeline_tag
    from hf_bilb.hub.card import CardTask

    assert _outputs({"type": "dense_regression", "unit": "m"}) == "1 number at each pixel; in m"
    assert _outputs({"type": "dense_regression", "size": 2}) == "2 numbers at each pixel"
    assert _outputs({"type": "segmentation", "size": 2, "names": ["a", "b"]}) == "2 classes: a, b"
    tasks = (CardTask("a", "segmentation"), CardTask("b", "dense_regression"))
    assert _pipeline_tag({"inputs": {"kind": "pixels"}}, tasks) == "image-segmentation"
    assert _pipeline_tag({"inputs": {"kind": "scenes"}}, tasks[1:]) is None
