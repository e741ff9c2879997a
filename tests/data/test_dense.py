"""Dense data sets: what rows and batches hold, in which process, epoch and order; the cache; parts and options."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Mapping
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from hf_bilb.config.options import parse_options
from hf_bilb.data.dense import files as dense_files
from hf_bilb.data.dense.augmentation import View, draw_view
from hf_bilb.data.dense.files import resize_image, resize_nearest
from hf_bilb.data.dense.nyuv2 import Nyuv2Options, load_nyuv2
from hf_bilb.data.dense.rows import DenseRows
from hf_bilb.data.rows import collate_images
from hf_bilb.errors import OptionError
from hf_bilb.losses.dense import dense_item_counts
from hf_bilb.trainer.epochs import EpochDataset
from tests.data.dense_scenes import SIZE, seen_depth, seen_image, seen_labels, seen_normals, write_mtan

TASKS = ("segmentation", "depth", "normals")


def options(folder: Path, **changes: object) -> Nyuv2Options:
    return Nyuv2Options(folder=str(folder), cache_dir=str(folder.parent / "cache"), **changes)


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_mtan(tmp_path / "nyuv2")
    return tmp_path / "nyuv2"


def expected_row(scene: Mapping[str, np.ndarray], view: View | None = None) -> dict[str, torch.Tensor]:
    """The row of a scene, array by array; the views themselves are tested in test_augmentation."""
    view = view or View(SIZE, 1.0, 0, 0, *SIZE, mirrored=False)
    return {
        "pixel_values": torch.from_numpy(seen_image(view, scene["image"].transpose(2, 0, 1))),
        "segmentation": torch.from_numpy(seen_labels(view, scene["segmentation"])).long(),
        "depth": torch.from_numpy(seen_depth(view, scene["depth"][:, :, 0])),
        "normals": torch.from_numpy(seen_normals(view, scene["normals"].transpose(2, 0, 1))),
    }


# --- rows and batches ---------------------------------------------------------------------------------------------


def test_rows_are_those_of_the_files(tmp_path: Path) -> None:
    written = write_mtan(tmp_path / "nyuv2")
    data = load_nyuv2(options(tmp_path / "nyuv2", augment=False))
    for rows, scenes in (
        (data.train, written["train"]),
        (data.validation, written["val"]),
        (data.test, written["val"]),
    ):
        assert len(rows) == len(scenes)
        for index, scene in enumerate(scenes):
            assert same(rows[index], expected_row(scene))
    row = data.train[0]
    assert [(value.dtype, tuple(value.shape)) for value in row.values()] == [
        (torch.float32, (3, *SIZE)), (torch.int64, SIZE), (torch.float32, SIZE), (torch.float32, (3, *SIZE)),
    ]  # fmt: skip
    assert same(data.train[-1], data.train[5])
    with pytest.raises(IndexError):
        data.train[6]


def test_training_rows_are_augmented_and_others_are_not(tmp_path: Path) -> None:
    written = write_mtan(tmp_path / "nyuv2")
    data = load_nyuv2(options(tmp_path / "nyuv2", seed=3))
    for epoch in (0, 1):
        for rows in (data.train, data.test):
            rows.set_epoch(epoch)
        for index in range(6):
            view = draw_view(3, epoch, index, SIZE)
            assert same(data.train[index], expected_row(written["train"][index], view))
        assert all(same(data.test[index], expected_row(written["val"][index])) for index in range(4))


def test_a_batch_is_its_rows(folder: Path) -> None:
    rows = load_nyuv2(options(folder)).train
    (batch,) = rows.__getitems__([4, 1, 1])
    stacked = {name: torch.stack([rows[index][name] for index in (4, 1, 1)]) for name in batch}
    assert same(batch, stacked)
    assert same(collate_images([rows[4], rows[1], rows[1]]), stacked) and same(collate_images([batch]), stacked)


def test_images_of_bytes_become_numbers_from_0_to_1(tmp_path: Path) -> None:
    written = write_mtan(tmp_path / "nyuv2")
    for part, scenes in written.items():
        for number, scene in enumerate(scenes):
            coded = np.rint(scene["image"] * 255).astype(np.uint8)
            np.save(tmp_path / "nyuv2" / part / "image" / f"{number}.npy", coded)
    data = load_nyuv2(options(tmp_path / "nyuv2", augment=False))
    for index, scene in enumerate(written["train"]):
        wanted = np.rint(scene["image"] * 255).transpose(2, 0, 1) / 255
        np.testing.assert_allclose(data.train[index]["pixel_values"].numpy(), wanted, atol=1e-7)


# --- epochs, workers, resuming ------------------------------------------------------------------------------------


def loader(rows: DenseRows, workers: int, order: list[int], **settings: object) -> DataLoader:
    return DataLoader(rows, 2, sampler=order, collate_fn=collate_images, num_workers=workers, **settings)


def test_workers_see_every_epoch_even_when_they_outlive_it(folder: Path) -> None:
    rows = load_nyuv2(options(folder)).train
    order = [3, 0, 5, 1, 2, 4]
    with_workers, without = loader(rows, 2, order, persistent_workers=True), loader(rows, 0, order)
    seen = []
    for epoch in (0, 1, 5):
        rows.set_epoch(epoch)
        ours = list(with_workers)
        seen.append(ours)
        assert all(same(one, other) for one, other in zip(ours, without, strict=True))
    assert not same(seen[0][0], seen[1][0])


def test_workers_that_are_spawned_share_the_epoch(folder: Path) -> None:
    rows = load_nyuv2(options(folder)).train
    sent = ForkingPickler.dumps(rows)  # what multiprocessing sends to a spawned worker
    twin = pickle.loads(sent)
    rows.set_epoch(4)
    assert same(twin[2], rows[2])
    rows.set_epoch(5)
    assert same(twin[2], rows[2])


def test_going_on_in_the_middle_of_an_epoch_gives_the_same_rows(folder: Path) -> None:
    order = [3, 0, 5, 1, 2, 4]
    accelerator = Accelerator(cpu=True)

    def prepared(rows: DenseRows) -> DataLoader:
        return accelerator.prepare(loader(rows, 0, order))

    rows = load_nyuv2(options(folder)).train
    whole = prepared(rows)
    epochs = []
    for epoch in range(3):  # as the Trainer does: both the hook and accelerate set it
        rows.set_epoch(epoch)
        whole.set_epoch(epoch)
        epochs.append(list(whole))
    fresh = load_nyuv2(options(folder)).train
    rest = accelerator.skip_first_batches(prepared(fresh), 2)
    fresh.set_epoch(2)
    rest.set_epoch(2)
    (last,) = list(rest)
    assert same(last, epochs[2][2]) and not same(last, epochs[0][2])


def test_the_rows_that_are_chosen_play_no_role(folder: Path) -> None:
    everything = load_nyuv2(options(folder, seed=1)).train
    some = load_nyuv2(options(folder, seed=1, num_train=3, num_validation=2)).train
    assert len(some) == 3
    for index, row in enumerate(some.rows.tolist()):
        assert same(some[index], everything[row])


def test_a_copy_opens_the_files_again_and_keeps_the_epoch(folder: Path) -> None:
    rows = load_nyuv2(options(folder)).train
    assert isinstance(rows, EpochDataset)
    rows.set_epoch(7)
    for twin in (pickle.loads(pickle.dumps(rows)), copy.deepcopy(rows)):
        assert same(twin[2], rows[2])
    assert len(pickle.dumps(rows)) < 3000  # no image travels along


# --- parts and tasks ----------------------------------------------------------------------------------------------


def test_validation_images_are_held_out_of_the_training_images(folder: Path) -> None:
    data = load_nyuv2(options(folder, num_validation=2, num_test=3, augment=False))
    chosen = sorted(data.train.rows.tolist() + data.validation.rows.tolist())
    assert chosen == list(range(6)) and len(data.validation) == 2 and len(data.test) == 3
    fewer = load_nyuv2(options(folder, num_validation=2, num_train=1, augment=False))
    assert fewer.validation.rows.tolist() == data.validation.rows.tolist()
    assert set(fewer.train.rows) < set(data.train.rows)
    other = load_nyuv2(options(folder, num_validation=2, seed=5, augment=False))
    assert other.validation.rows.tolist() != data.validation.rows.tolist()


@pytest.mark.parametrize("tasks", [("depth",), ("normals", "segmentation")])
def test_some_tasks_in_an_order_of_one_s_own(folder: Path, tasks: tuple[str, ...]) -> None:
    data = load_nyuv2(options(folder, tasks=tasks))
    assert data.task_names == data.label_names == tasks and list(data.train[0]) == ["pixel_values", *tasks]
    assert data.model_arguments == {"task_names": list(tasks), "num_classes": 13}
    assert {metric.task for metric in data.metrics} == {*tasks, ""}
    assert {metric.key for metric in data.metrics} == set(data.trivial_metrics)
    assert not list((folder.parent / "cache").glob("*depth*")) or "depth" in tasks  # others are not even read


def test_images_may_lack_the_labels_of_a_task(folder: Path) -> None:
    for number in (1, 4):
        (folder / "train" / "depth" / f"{number}.npy").unlink()
    (folder / "train" / "normal" / "4.npy").unlink()
    with pytest.raises(OptionError) as error:
        load_nyuv2(options(folder))
    assert str(error.value) == (
        f"{folder}/train/depth: 2 of the 6 images have no label of task depth, first 1.npy; data.allow_missing=true "
        "takes them without"
    )
    data = load_nyuv2(options(folder, allow_missing=True))
    (batch,) = data.train.__getitems__([0, 1, 4])
    assert [(batch["depth"][row] != 0).any().item() for row in range(3)] == [True, False, False]
    assert [(batch["normals"][row] != 0).any().item() for row in range(3)] == [True, True, False]
    assert all((batch["segmentation"][row] >= 0).any() for row in range(3))


def test_items_are_labelled_pixels(folder: Path) -> None:
    data = load_nyuv2(options(folder))
    (batch,) = data.train.__getitems__([0, 3, 2])
    expected = [
        sum(int(label >= 0) for label in batch["segmentation"].flatten().tolist()),
        np.count_nonzero(batch["depth"].numpy()),
        np.count_nonzero(np.linalg.norm(batch["normals"].numpy(), axis=1)),
    ]
    assert data.task_item_counts is not None
    assert data.task_item_counts(batch).tolist() == expected
    assert dense_item_counts(batch, ("normals", "depth")).tolist() == expected[:0:-1]


def test_the_trivial_metrics_are_those_of_constant_answers(tmp_path: Path) -> None:
    written = write_mtan(tmp_path / "nyuv2", (12, 5))
    found = load_nyuv2(options(tmp_path / "nyuv2")).trivial_metrics
    train, test = ({kind: np.stack([s[kind] for s in written[part]]) for kind in TASKS} for part in ("train", "val"))
    counts = np.bincount(train["segmentation"][train["segmentation"] >= 0].astype(int))
    labelled = test["segmentation"] >= 0
    accuracy = (test["segmentation"][labelled] == counts.argmax()).mean()
    assert found["segmentation_pixel_accuracy"] == pytest.approx(accuracy, rel=1e-9)
    depth, there = train["depth"].astype(np.float64), test["depth"] > 0
    constant = depth.sum() / (depth > 0).sum()
    assert found["depth_abs_error"] == pytest.approx(np.abs(test["depth"][there] - constant).mean(), rel=1e-5)
    direction = train["normals"].astype(np.float64).sum(axis=(0, 1, 2))
    known = test["normals"][(test["normals"] != 0).any(axis=-1)].astype(np.float64)
    angles = np.degrees(np.arccos(known @ direction / np.linalg.norm(direction)))
    assert found["normals_mean_angle"] == pytest.approx(angles.mean(), rel=1e-4)


# --- the cache ----------------------------------------------------------------------------------------------------


def test_files_are_read_once_and_again_when_one_changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_nyuv2(options(folder, augment=False))
    reads: list[Path] = []

    def counted(path: Path) -> np.ndarray:
        reads.append(path)
        return np.load(path)

    monkeypatch.setattr(dense_files, "_load", counted)
    monkeypatch.setattr("hf_bilb.data.cache.available_cores", lambda: 1)  # reads are counted in this process
    again = load_nyuv2(options(folder, augment=False))
    assert len(reads) == 2  # the first image of each part, for the size
    assert all(same(one, other) for one, other in zip(first.train, again.train, strict=True))
    np.save(folder / "train" / "depth" / "3.npy", np.full((*SIZE, 1), 2.5))
    changed = load_nyuv2(options(folder, augment=False))
    assert {path.parent.name for path in reads[4:]} == {"depth"}
    assert (changed.train[3]["depth"] == 2.5).all() and same(changed.train[2], first.train[2])


def test_an_interrupted_preparation_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_files, "_AT_ONCE", 2)
    monkeypatch.setattr("hf_bilb.data.cache.available_cores", lambda: 1)
    reads: list[Path] = []
    load = dense_files._load

    def interrupted(path: Path) -> np.ndarray:
        reads.append(path)
        if path.parent.name == "depth" and path.stem == "5" and len(reads) < 40:
            raise KeyboardInterrupt
        return load(path)

    monkeypatch.setattr(dense_files, "_load", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_nyuv2(options(folder))
    assert not list((folder.parent / "cache").glob("*depth*/values.npy"))
    reads[:] = [Path("x")] * 40
    load_nyuv2(options(folder))
    again = [path.stem for path in reads[40:] if path.parts[-3:-1] == ("train", "depth")]
    assert again == ["4", "5"]


def test_images_are_resized_as_torch_does_and_labels_by_nearest_pixel(tmp_path: Path) -> None:
    written = write_mtan(tmp_path / "nyuv2", (2, 1))
    rows = load_nyuv2(options(tmp_path / "nyuv2", size=(12, 16), augment=False)).train
    scene = written["train"][1]
    image = torch.from_numpy(scene["image"].transpose(2, 0, 1).copy())[None]
    wanted = torch.nn.functional.interpolate(image, (12, 16), mode="bilinear", antialias=True)[0]
    torch.testing.assert_close(rows[1]["pixel_values"], wanted, rtol=0, atol=1e-5)
    assert np.array_equal(rows[1]["segmentation"].numpy(), scene["segmentation"][1::2, 1::2])


@pytest.mark.parametrize(("old", "new"), [((24, 32), (10, 17)), ((9, 12), (18, 25)), ((8, 9), (8, 9))])
def test_sizes_are_changed_as_torch_does(old: tuple[int, int], new: tuple[int, int]) -> None:
    values = torch.rand(3, *old, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(values[None], new, mode="bilinear", antialias=True)[0]
    torch.testing.assert_close(torch.from_numpy(resize_image(values.numpy(), new)), smooth, rtol=0, atol=1e-5)
    sharp = torch.nn.functional.interpolate(values[None], new, mode="nearest-exact")[0]
    assert np.array_equal(resize_nearest(values.numpy(), new), sharp.numpy())


# --- what is wrong ------------------------------------------------------------------------------------------------


def save(folder: Path, name: str, values: object) -> None:
    np.save(folder / name, np.asarray(values))


BROKEN = {
    "class": ("label/2.npy", np.full(SIZE, 13.0), "label/2.npy: 13 is no class of task segmentation, expected 0 to 12"),
    "fraction": ("label/2.npy", np.full(SIZE, 0.5), "label/2.npy: 0.5 is no class of task segmentation"),
    "nan": ("label/0.npy", np.full(SIZE, np.nan), "label/0.npy: nan is no class of task segmentation"),
    "shape": ("depth/1.npy", np.zeros((5, 6, 1)), "depth/1.npy: float64 [5, 6, 1], expected numbers [24, 32]"),
    "pixels": ("image/3.npy", np.full((*SIZE, 3), 200.0), "image/3.npy: values from 200 to 200, expected 0 to 1"),
    "bytes": ("image/3.npy", np.zeros((*SIZE, 3), np.uint8), "image/3.npy: uint8, expected floats, as the first image"),
    "length": ("normal/1.npy", np.full((*SIZE, 3), 1.0), "normal/1.npy: a vector of length 1.73205, expected unit"),
    "text": ("depth/1.npy", np.full((*SIZE, 1), "x"), "depth/1.npy: <U1 [24, 32, 1], expected numbers [24, 32]"),
    "first": ("image/0.npy", np.zeros(SIZE), "0.npy has shape (24, 32), expected [H, W, 3]"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_wrong_with_a_file_is_one_line(folder: Path, what: str) -> None:
    name, values, message = BROKEN[what]
    np.save(folder / "train" / name, values)
    with pytest.raises(OptionError) as error:
        load_nyuv2(options(folder))
    assert message in str(error.value) and "\n" not in str(error.value) and str(folder / "train") in str(error.value)


def test_a_file_that_is_cut_off_or_missing_or_misnamed_is_one_line(folder: Path) -> None:
    file = folder / "val" / "depth" / "2.npy"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(OptionError, match=r"val/depth/2\.npy: cannot be read as an array: "):
        load_nyuv2(options(folder))
    file.rename(file.with_name("two.npy"))
    with pytest.raises(OptionError, match=r"two\.npy: is not named by a number, expected 0\.npy, 1\.npy"):
        load_nyuv2(options(folder))
    for left in (folder / "val" / "depth").iterdir():
        left.unlink()
    with pytest.raises(OptionError, match=r"val/depth' holds no \.npy file, expected 0\.npy"):
        load_nyuv2(options(folder))
    (folder / "val" / "depth").rmdir()
    with pytest.raises(OptionError, match=r"data\.folder: .*val/depth' is no folder, expected one with 0\.npy"):
        load_nyuv2(options(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tasks": ["segmentaton"]},
            "tasks: 'segmentaton' is not valid, expected of segmentation, depth, normals (did",
        ),
        ({"size": [4, 32]}, "size: [4, 32] is not valid, expected [height, width], 8 to 4096 each"),
        ({"seed": -1}, "seed: -1 is not valid, expected 0 or more"),
        ({"num_train": 0}, "num_train: 0 is not valid, expected 1 or more, or null"),
        ({"augmentation": True}, "data.augmentation: unknown option, value True"),
        ({"delta_m_average": "mean"}, "data.delta_m_average: 'mean' is not valid"),
    ],
)
def test_options_out_of_range_are_one_line(changes: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError) as error:
        parse_options(Nyuv2Options, {"folder": "x", **changes}, "data")
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_validation": 6}, "data.num_validation: 6 is not valid, expected at most 5, or null"),
        ({"num_validation": 2, "num_train": 5}, "data.num_train: 5 is not valid, expected at most 4, or null"),
        ({"num_test": 5}, "data.num_test: 5 is not valid, expected at most 4, or null"),
    ],
)
def test_more_images_than_there_are(folder: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError) as error:
        load_nyuv2(dataclasses.replace(options(folder), **changes))
    assert str(error.value) == message


def test_parts_of_different_size(tmp_path: Path) -> None:
    write_mtan(tmp_path / "nyuv2", size=(16, 20))
    for part in ("image", "label", "depth", "normal"):
        (tmp_path / "nyuv2" / "val" / part).rename(tmp_path / f"away_{part}")
    write_mtan(tmp_path / "other", size=SIZE)
    (tmp_path / "nyuv2" / "val").rmdir()
    (tmp_path / "other" / "val").rename(tmp_path / "nyuv2" / "val")
    with pytest.raises(
        OptionError, match=r"data\.size: training and test images differ in size \(16 x 20 and 24 x 32\)"
    ):
        load_nyuv2(options(tmp_path / "nyuv2"))
    data = load_nyuv2(options(tmp_path / "nyuv2", size=SIZE))
    assert data.train[0]["depth"].shape == data.test[0]["depth"].shape == SIZE
