"""`data.image_labels`: classes of whole images in the rows, tasks, counts and trivial figures of dense data sets."""

from __future__ import annotations

import csv
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics
import torch
from PIL import Image
from torch.utils.data import DataLoader

from hf_bilb.data.dense.cityscapes import CityscapesOptions, load_cityscapes
from hf_bilb.data.dense.nyuv2 import Nyuv2Options, load_nyuv2
from hf_bilb.data.dense.options import DenseOptions
from hf_bilb.data.dense.prepare_nyuv2 import prepare_nyuv2
from hf_bilb.data.rows import collate_images
from hf_bilb.errors import OptionError
from hf_bilb.experiments.build import build_model
from hf_bilb.experiments.recipe import read_recipe
from hf_bilb.experiments.train import run_recipe
from tests.data.dense_scenes import write_mtan
from tests.data.test_prepare_nyuv2 import write_scenes

ROOT = Path(__file__).parents[2]
CLASSES = {"scene": ("bath", "kitchen", "office"), "window": ("no", "yes")}
COUNTS = {"train": 9, "val": 5}


def write_labels(file: Path, counts: dict[str, int] = COUNTS, seed: int = 0) -> dict[str, list[dict[str, str]]]:
    """A line for each image, the last ones first, a quarter of the cells empty; returns them in the images' order."""
    generator = np.random.default_rng(seed)
    written: dict[str, list[dict[str, str]]] = {part: [] for part in counts}
    for part, count in counts.items():
        for number in range(count):
            cells = {task: str(generator.choice([*names, ""])) for task, names in CLASSES.items()}
            written[part].append({"part": part, "image": str(number), **cells})
    for task, names in CLASSES.items():  # each class once at least
        for line, name in zip(written["train"], names, strict=False):
            line[task] = name
    with file.open("w", encoding="utf-8", newline="") as stream:
        lines = csv.DictWriter(stream, ["part", "image", *CLASSES])
        lines.writeheader()
        lines.writerows(reversed([line for part in written.values() for line in part]))
    return written


def number(task: str, name: str) -> int:
    return CLASSES[task].index(name) if name else -1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_mtan(tmp_path / "nyuv2", (COUNTS["train"], COUNTS["val"]))
    return tmp_path / "nyuv2"


def options(folder: Path, **changes: object) -> Nyuv2Options:
    given = {"image_labels": str(folder / "labels.csv"), "cache_dir": str(folder.parent / "cache"), **changes}
    return Nyuv2Options(folder=str(folder), **given)


def test_rows_have_the_classes_of_their_lines(folder: Path) -> None:
    written = write_labels(folder / "labels.csv")
    data = load_nyuv2(options(folder, num_validation=3))
    bare = load_nyuv2(options(folder, num_validation=3, image_labels=None))
    assert data.task_names == ("segmentation", "depth", "normals", "scene", "window")
    assert data.label_names == ("segmentation", "depth", "normals", "image_labels")
    seen = 0
    for part, rows, without in (("train", data.train, bare.train), ("train", data.validation, bare.validation),
                                ("val", data.test, bare.test)):  # fmt: skip
        rows.set_epoch(2)
        without.set_epoch(2)
        for place, image in enumerate(rows.rows.tolist()):
            row = rows[place]
            assert list(row) == ["pixel_values", *data.label_names]
            labels = row.pop("image_labels")
            assert labels.dtype == torch.int64
            assert labels.tolist() == [number(task, written[part][image][task]) for task in CLASSES]
            # The augmentation, and all else, is what it is without them.
            assert all(torch.equal(value, without[place][name]) for name, value in row.items())
            seen += 1
    assert seen == sum(COUNTS.values())


def test_tasks_in_an_order_of_one_s_own(folder: Path) -> None:
    written = write_labels(folder / "labels.csv")
    names = ("window", "depth", "scene", "segmentation")
    data = load_nyuv2(options(folder, tasks=names))
    assert data.task_names == names and data.label_names == ("depth", "segmentation", "image_labels")
    assert data.model_arguments == {
        "task_names": list(names), "num_classes": 13, "image_tasks": {"window": 2, "scene": 3},
    }  # fmt: skip
    assert list(data.model_arguments["image_tasks"]) == ["window", "scene"]
    (batch,) = data.train.__getitems__([4, 0])
    assert list(batch) == ["pixel_values", "depth", "segmentation", "image_labels"]
    lines = [written["train"][image] for image in data.train.rows[[4, 0]]]
    assert batch["image_labels"].tolist() == [
        [number(task, line[task]) for task in ("window", "scene")] for line in lines
    ]
    assert [metric.task for metric in data.metrics][:2] == ["window"] * 2
    assert data.gallery is not None and dict(data.gallery.image_classes) == CLASSES


def test_without_them_nothing_changes_and_some_may_be_left_out(folder: Path) -> None:
    write_labels(folder / "labels.csv")
    bare = load_nyuv2(options(folder, image_labels=None))
    unused = load_nyuv2(options(folder, tasks=("depth", "normals")))
    for data, tasks in ((bare, ("segmentation", "depth", "normals")), (unused, ("depth", "normals"))):
        assert data.task_names == data.label_names == tasks
        assert data.model_arguments == {"task_names": list(tasks), "num_classes": 13}
        assert list(data.train[0]) == ["pixel_values", *tasks]


def test_image_tasks_alone_read_no_pixel_labels(folder: Path) -> None:
    write_labels(folder / "labels.csv")
    data = load_nyuv2(options(folder, tasks=("scene",)))
    assert data.task_names == ("scene",) and data.label_names == ("image_labels",)
    assert list(data.train[0]) == ["pixel_values", "image_labels"]
    assert [metric.key for metric in data.metrics] == list(data.trivial_metrics) == ["scene_accuracy", "scene_macro_f1"]
    assert {path.name.split("-")[3] for path in (folder.parent / "cache").glob("nyuv2-*-image-*")} == {"image"}
    assert not list((folder.parent / "cache").glob("nyuv2-*-depth-*"))


def test_items_are_labelled_pixels_and_images_with_a_label(folder: Path) -> None:
    write_labels(folder / "labels.csv")
    data = load_nyuv2(options(folder, tasks=("window", "depth", "scene")))
    (batch,) = data.train.__getitems__(list(range(9)))
    expected = [
        sum(label >= 0 for label in batch["image_labels"][:, 0].tolist()),
        np.count_nonzero(batch["depth"].numpy()),
        sum(label >= 0 for label in batch["image_labels"][:, 1].tolist()),
    ]
    assert data.task_item_counts is not None and data.task_item_counts(batch).tolist() == expected
    assert 0 < expected[0] < 9 and 0 < expected[2] < 9 and expected[0] != expected[2]


def test_trivial_figures_are_those_of_the_most_frequent_class(folder: Path) -> None:
    written = write_labels(folder / "labels.csv")
    data = load_nyuv2(options(folder, num_validation=2))
    for task, names in CLASSES.items():
        words = [written["train"][image][task] for image in data.train.rows.tolist()]
        counts = Counter(word for word in words if word)
        answer = max(names, key=lambda name: counts[name])
        truth = [line[task] for line in written["val"] if line[task]]
        guesses = [answer] * len(truth)
        found = data.trivial_metrics[f"{task}_accuracy"], data.trivial_metrics[f"{task}_macro_f1"]
        accuracy = sklearn.metrics.accuracy_score(truth, guesses)
        assert found == pytest.approx((accuracy, sklearn.metrics.f1_score(truth, guesses, average="macro")))
    # Other labels: computed again, not taken from the cache; the pixels' figures stay.
    other = write_labels(folder / "labels.csv", seed=4)
    again = load_nyuv2(options(folder, num_validation=2))
    assert other != written and again.trivial_metrics != data.trivial_metrics
    assert again.trivial_metrics["depth_abs_error"] == data.trivial_metrics["depth_abs_error"]


def test_images_may_lack_their_line_when_that_is_allowed(folder: Path) -> None:
    write_labels(folder / "labels.csv", {"train": 9, "val": 4})
    with pytest.raises(
        OptionError, match=r"labels\.csv: 1 of the 5 images of part val have no line, first '4'; data\."
    ):
        load_nyuv2(options(folder))
    data = load_nyuv2(options(folder, allow_missing=True))
    assert data.test[4]["image_labels"].tolist() == [-1, -1]


def test_a_task_that_no_training_image_has_labels_of_is_one_line(folder: Path) -> None:
    for number in range(9):
        if number != 4:
            (folder / "train" / "depth" / f"{number}.npy").unlink()
    write_labels(folder / "labels.csv")
    assert load_nyuv2(options(folder, allow_missing=True)).task_names[1] == "depth"
    # With the one image that has it held out, or not chosen, nothing is left to train on.
    seed = next(seed for seed in range(50) if 4 in np.random.default_rng(seed).permutation(9)[:3])
    with pytest.raises(OptionError) as error:
        load_nyuv2(options(folder, allow_missing=True, num_validation=3, seed=seed))
    assert str(error.value) == "data.tasks: none of the 6 training images has a label of task 'depth'"
    lines = ["part,image,scene", "train,0,", "train,3,", "val,0,attic", "val,1,bath"]
    (folder / "labels.csv").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(OptionError, match="none of the 9 training images has a label of task 'scene'"):
        load_nyuv2(options(folder, allow_missing=True))


def test_workers_and_copies_have_the_same_rows(folder: Path) -> None:
    write_labels(folder / "labels.csv")
    rows = load_nyuv2(options(folder)).train
    twin = pickle.loads(pickle.dumps(rows))
    loader = DataLoader(rows, 4, collate_fn=collate_images, num_workers=1)
    found = torch.cat([batch["image_labels"] for batch in loader])
    assert torch.equal(found, torch.stack([twin[index]["image_labels"] for index in range(9)]))


def test_images_of_the_official_layout_are_named_by_city_sequence_and_frame(tmp_path: Path) -> None:
    names = {
        "train": ("ulm_000002_000019", "aachen_000000_000019", "ulm_000001_000019"),
        "val": ("bonn_000000_000019",),
    }
    for part, images in names.items():
        for name in images:
            top = tmp_path / "city" / "leftImg8bit" / part / name.split("_")[0]
            top.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 32)).save(top / f"{name}_leftImg8bit.png")
    lines = [f"train,{name},{number}" for number, name in enumerate(names["train"])] + ["val,bonn_000000_000019,1"]
    file = tmp_path / "labels.csv"
    file.write_text("\n".join(["part,image,time", *lines]), encoding="utf-8")
    settings = {"folder": str(tmp_path / "city"), "cache_dir": str(tmp_path / "cache"), "image_labels": str(file)}
    data = load_cityscapes(CityscapesOptions(**settings, tasks=("time",), augment=False, size=(16, 32)))
    in_order = sorted(names["train"])
    assert [row["image_labels"].item() for row in data.train] == [names["train"].index(name) for name in in_order]
    assert data.test[0]["image_labels"].item() == 1
    file.write_text("part,image,time\ntrain,ulm_000002_00001,1", encoding="utf-8")
    with pytest.raises(
        OptionError, match=r"line 2: part train has no image .* \(did you mean \"ulm_000002_000019\"\?\)"
    ):
        load_cityscapes(CityscapesOptions(**settings, tasks=("time",), size=(16, 32)))


def test_what_prepare_writes_of_the_official_file_is_read(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="needs h5py")
    scenes = ["café", "bedroom", "", "living_room", "bedroom"]
    with h5py.File(tmp_path / "x.mat", "w") as stream:
        for name, shape, kind in (
            ("images", (3, 640, 480), np.uint8), ("labels", (640, 480), np.uint16), ("depths", (640, 480), np.float32),
        ):  # fmt: skip
            stream[name] = np.ones((5, *shape), kind)
        write_scenes(stream, scenes)
    split = np.array([3, 0, 1]), np.array([4, 2])
    prepare_nyuv2(tmp_path / "x.mat", tmp_path / "nyuv2", (16, 24), num_workers=1, split=split)
    file = tmp_path / "nyuv2" / "image_labels.csv"
    data = load_nyuv2(options(tmp_path / "nyuv2", image_labels=str(file), tasks=("scene", "depth")))
    names = ("bedroom", "café", "living_room")
    assert data.gallery is not None and data.gallery.image_classes == {"scene": names}
    for rows, chosen in ((data.train, split[0]), (data.test, split[1])):
        found = [row["image_labels"].item() for row in rows]
        assert [names[label] if label >= 0 else "" for label in found] == [scenes[image] for image in chosen]


# --- what does not go together ------------------------------------------------------------------------------------


def test_tasks_that_are_in_neither_are_one_line_before_the_cache_is_prepared(folder: Path) -> None:
    write_labels(folder / "labels.csv")
    with pytest.raises(OptionError) as error:
        load_nyuv2(options(folder, tasks=("depth", "scenes")))
    assert str(error.value) == (
        "data.tasks: 'scenes' is not valid, expected of segmentation, depth, normals, scene, window (did you mean "
        '"scene"?)'
    )
    with pytest.raises(OptionError, match=r"data\.tasks: 'dept' is not valid, .*did you mean \"depth\""):
        load_nyuv2(options(folder, tasks=("dept", "scene")))
    with pytest.raises(OptionError, match="tasks: 'scene' stands twice"):
        options(folder, tasks=("scene", "depth", "scene"))
    with pytest.raises(OptionError, match="tasks: 'scene' is not valid, expected of segmentation, depth, normals"):
        options(folder, tasks=("scene",), image_labels=None)
    (folder / "labels.csv").write_text("part,image,depth_abs\n", encoding="utf-8")
    with pytest.raises(OptionError, match="task 'depth_abs' has no label"):
        load_nyuv2(options(folder, allow_missing=True))
    (folder / "labels.csv").write_text("part,image,segmentation_pixel\ntrain,0,a\ntrain,1,b\n", encoding="utf-8")
    with pytest.raises(OptionError, match=r"task_names: .* would both have the metric 'segmentation_pixel_accuracy'"):
        load_nyuv2(options(folder, allow_missing=True))
    assert not (folder.parent / "cache").exists()


@pytest.mark.parametrize("model", ["mtan", "segnet"])
def test_a_model_of_pixels_alone_is_refused_before_the_cache_is_prepared(
    folder: Path, tmp_path: Path, model: str
) -> None:
    write_labels(folder / "labels.csv")
    changes = [
        f"data.folder={folder}", f"data.image_labels={folder / 'labels.csv'}", f"data.cache_dir={tmp_path / 'cache'}",
        f"model.name={model}", f"trainer.output_dir={tmp_path / 'run'}", "trainer.report_to=none",
    ]  # fmt: skip
    recipe = read_recipe(ROOT / "recipes" / "nyuv2" / "ls_small.yaml", changes)
    with pytest.raises(OptionError) as error:
        run_recipe(recipe)
    assert str(error.value) == (
        f"data.image_labels: {str(folder / 'labels.csv')!r} asks for a model that takes image_tasks, which {model!r} "
        "does not, expected dense_backbone"
    )
    assert not (tmp_path / "cache").exists() and not (tmp_path / "run").exists()
    with pytest.raises(OptionError, match="the model has no image_tasks"):
        build_model(recipe, load_nyuv2(options(folder)))


def test_every_dense_data_set_has_the_option() -> None:
    assert DenseOptions(folder="x").image_labels is None
    recipe = read_recipe(ROOT / "recipes" / "cityscapes" / "ls.yaml", ["data.image_labels=labels.csv"])
    assert recipe.data["image_labels"] == "labels.csv"
    with pytest.raises(OptionError, match=r"data\.image_label: unknown option.*did you mean \"image_labels\""):
        read_recipe(ROOT / "recipes" / "nyuv2" / "ls.yaml", ["data.image_label=labels.csv"])
