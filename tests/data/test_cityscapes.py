"""Cityscapes: made-up files in MTAN's layout and in the official one, unpacked and in archives; their errors."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_bilb.config.options import parse_options
from hf_bilb.data import cache as array_cache
from hf_bilb.data.dense import files as dense_files
from hf_bilb.data.dense.augmentation import draw_view
from hf_bilb.data.dense.cityscapes import CLASS_NAMES, CityscapesOptions, load_cityscapes
from hf_bilb.data.dense.cityscapes_files import class_table
from hf_bilb.errors import MissingPackageError, OptionError
from tests.data.dense_scenes import SIZE, seen_labels, write_mtan

# Label id -> name and group of cityscapesScripts' labels.py, for the 19 classes of the evaluation, in its order.
EVALUATED = {
    7: ("road", "flat"), 8: ("sidewalk", "flat"), 11: ("building", "construction"), 12: ("wall", "construction"),
    13: ("fence", "construction"), 17: ("pole", "object"), 19: ("traffic light", "object"),
    20: ("traffic sign", "object"), 21: ("vegetation", "nature"), 22: ("terrain", "nature"), 23: ("sky", "sky"),
    24: ("person", "human"), 25: ("rider", "human"), 26: ("car", "vehicle"), 27: ("truck", "vehicle"),
    28: ("bus", "vehicle"), 31: ("train", "vehicle"), 32: ("motorcycle", "vehicle"), 33: ("bicycle", "vehicle"),
}  # fmt: skip
GROUPS = ("flat", "construction", "object", "nature", "sky", "human", "vehicle")
PARTS = {"train": ("aachen", "bochum", 3), "val": ("lindau", "munster", 2)}


def options(folder: Path, **changes: object) -> CityscapesOptions:
    given = {"augment": False, "cache_dir": str(folder.parent / "cache"), **changes}
    return CityscapesOptions(folder=str(folder), **given)


def write_official(root: Path, size: tuple[int, int] = (32, 64)) -> dict[str, list[dict[str, np.ndarray]]]:
    """Write the official folders; returns what is in the files, in the order of their names."""
    generator = np.random.default_rng(0)
    written: dict[str, list[dict[str, np.ndarray]]] = {}
    for part, (first, second, count) in PARTS.items():
        written[part] = []
        for city in (first, second):
            for number in range(count):
                arrays = {
                    "leftImg8bit": generator.integers(0, 256, (*size, 3), dtype=np.uint8),
                    "gtFine_labelIds": generator.integers(0, 34, size, dtype=np.uint8),
                    "disparity": generator.integers(0, 32258, size).astype(np.uint16),
                }
                arrays["disparity"][:, :5] = 0
                for kind, values in arrays.items():
                    folder = root / kind.split("_")[0] / part / city
                    folder.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(values).save(folder / f"{city}_{number:06d}_000019_{kind}.png")
                (root / "gtFine" / part / city / f"{city}_{number:06d}_000019_gtFine_color.png").touch()
                written[part].append(arrays)
    return written


def into_archives(root: Path, target: Path, compression: int = zipfile.ZIP_STORED) -> None:
    target.mkdir()
    for top in ("leftImg8bit", "gtFine", "disparity"):
        with zipfile.ZipFile(target / f"{top}_trainvaltest.zip", "w", compression) as archive:
            for path in sorted((root / top).rglob("*.png"), reverse=True):
                archive.write(path, path.relative_to(root))
            archive.writestr("README", "not an image")


# --- classes ------------------------------------------------------------------------------------------------------


def test_classes_are_those_of_the_evaluation_and_their_groups() -> None:
    ids = list(EVALUATED)
    assert class_table(19)[ids].tolist() == list(range(19))
    assert class_table(7)[ids].tolist() == [GROUPS.index(group) for _, group in EVALUATED.values()]
    assert {7: GROUPS, 19: tuple(name for name, _ in EVALUATED.values())} == CLASS_NAMES
    others = [label for label in range(256) if label not in EVALUATED]
    assert set(class_table(19)[others].tolist()) == set(class_table(7)[others].tolist()) == {-1}


# --- the official layout ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [7, 19])
def test_rows_are_those_of_the_official_files(tmp_path: Path, num_classes: int) -> None:
    written = write_official(tmp_path / "city")
    data = load_cityscapes(options(tmp_path / "city", num_classes=num_classes, size=(16, 32)))
    assert data.task_names == ("segmentation", "depth")
    assert data.model_arguments == {"task_names": ["segmentation", "depth"], "num_classes": num_classes}
    for rows, part in ((data.train, "train"), (data.validation, "val"), (data.test, "val")):
        assert len(rows) == len(written[part])
        for row, files in zip(rows, written[part], strict=True):
            pixels = torch.from_numpy(files["leftImg8bit"]).permute(2, 0, 1).float()[None]
            small = torch.nn.functional.interpolate(pixels, (16, 32), mode="bilinear", antialias=True)[0]
            assert (row["pixel_values"] * 255 - small).abs().max() < 0.502  # cached as bytes, rounded
            ids, coded = files["gtFine_labelIds"][1::2, 1::2], files["disparity"][1::2, 1::2].astype(float)
            names = [name for name, _ in EVALUATED.values()] if num_classes == 19 else GROUPS
            for label, found in zip(ids.ravel().tolist(), row["segmentation"].ravel().tolist(), strict=True):
                name = EVALUATED.get(label, ("", ""))[0 if num_classes == 19 else 1]
                assert found == (names.index(name) if name else -1)
            expected = np.where(coded > 0, (coded - 1) / 256, 0)
            np.testing.assert_allclose(row["depth"].numpy(), expected, rtol=1e-6)


def test_archives_need_not_be_unpacked(tmp_path: Path) -> None:
    write_official(tmp_path / "city")
    into_archives(tmp_path / "city", tmp_path / "archives")
    unpacked, packed = (load_cityscapes(options(tmp_path / name, size=(16, 32))) for name in ("city", "archives"))
    for one, other in zip([*unpacked.train, *unpacked.test], [*packed.train, *packed.test], strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_processes_that_read_one_archive_do_not_disturb_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_official(tmp_path / "city", (192, 384))
    into_archives(tmp_path / "city", tmp_path / "archives")
    tasks = ("segmentation",)
    alone = load_cityscapes(options(tmp_path / "city", tasks=tasks))
    monkeypatch.setattr(dense_files, "_AT_ONCE", 1)
    monkeypatch.setattr(array_cache, "available_cores", lambda: 6)
    for attempt in range(4):
        shared = load_cityscapes(options(tmp_path / "archives", tasks=tasks, cache_dir=str(tmp_path / f"{attempt}")))
        for one, other in zip([*alone.train, *alone.test], [*shared.train, *shared.test], strict=True):
            assert all(torch.equal(one[name], other[name]) for name in one)


def test_official_images_get_the_papers_size(tmp_path: Path) -> None:
    write_official(tmp_path / "city")
    row = load_cityscapes(options(tmp_path / "city")).train[0]
    assert row["pixel_values"].shape == (3, 128, 256) and row["depth"].shape == (128, 256)


def test_disparities_in_another_unit(tmp_path: Path) -> None:
    write_official(tmp_path / "city")
    pixels, metres = (
        load_cityscapes(options(tmp_path / "city", depth_scale=scale)).test[0]["depth"] for scale in (1, 1 / 473.6)
    )
    torch.testing.assert_close(metres, pixels / 473.6)


def test_official_images_without_a_label(tmp_path: Path) -> None:
    write_official(tmp_path / "city")
    gone = tmp_path / "city" / "disparity" / "train" / "aachen" / "aachen_000001_000019_disparity.png"
    gone.unlink()
    with pytest.raises(OptionError) as error:
        load_cityscapes(options(tmp_path / "city"))
    assert str(error.value) == (
        f"{tmp_path}/city/disparity/train: 1 of the 6 images have no label of task depth, first "
        "aachen_000001_000019_disparity.png; data.allow_missing=true takes them without"
    )
    data = load_cityscapes(options(tmp_path / "city", allow_missing=True))
    assert [(row["depth"] != 0).any().item() for row in data.train] == [True, False, True, True, True, True]


# --- MTAN's layout ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_classes", "folder"), [(7, "label_7"), (19, "label_19"), (7, "label"), (19, "label")])
def test_rows_are_those_of_mtan_s_files(tmp_path: Path, num_classes: int, folder: str) -> None:
    other = "label_19" if folder == "label_7" else "label_7"
    tasks = ("segmentation", "depth")
    if folder != "label":
        write_mtan(tmp_path / "city", tasks=tasks, classes_folder=other)
    written = write_mtan(tmp_path / "city", tasks=tasks, num_classes=num_classes, classes_folder=folder)
    data = load_cityscapes(options(tmp_path / "city", num_classes=num_classes))
    for row, scene in zip(data.train, written["train"], strict=True):
        assert list(row) == ["pixel_values", "segmentation", "depth"]
        assert np.array_equal(row["segmentation"].numpy(), scene["segmentation"])
        assert np.array_equal(row["depth"].numpy(), scene["depth"][:, :, 0])
        assert np.array_equal(row["pixel_values"].numpy(), scene["image"].transpose(2, 0, 1))


def test_delta_m_has_its_base_with_7_classes_alone(tmp_path: Path) -> None:
    write_mtan(tmp_path / "city", tasks=("segmentation", "depth"), num_classes=7)
    base = load_cityscapes(options(tmp_path / "city")).single_task_base
    assert base == {
        "segmentation_miou": 0.7401, "segmentation_pixel_accuracy": 0.9316,
        "depth_abs_error_batch_mean": 0.0125, "depth_rel_error_batch_mean": 27.77,
    }  # fmt: skip
    exact = load_cityscapes(options(tmp_path / "city", delta_m_average="exact")).single_task_base
    assert exact["depth_abs_error"] == 0.0125
    data = load_cityscapes(options(tmp_path / "city", num_classes=19))
    assert data.single_task_base == {} and "delta_m" not in [metric.key for metric in data.metrics]


@pytest.mark.parametrize("under_zoom", ["divide", "multiply"])
def test_inverse_depth_under_zoom(tmp_path: Path, under_zoom: str) -> None:
    written = write_mtan(tmp_path / "city", tasks=("segmentation", "depth"), num_classes=7)
    data = load_cityscapes(options(tmp_path / "city", augment=True, depth_under_zoom=under_zoom))
    for index, scene in enumerate(written["train"]):
        view = draw_view(0, 0, index, SIZE)
        factor = view.scale if under_zoom == "multiply" else 1 / view.scale
        seen = seen_labels(view, scene["depth"][:, :, 0])
        np.testing.assert_allclose(data.train[index]["depth"].numpy(), seen * factor, rtol=1e-6)


# --- what is wrong ------------------------------------------------------------------------------------------------


def test_a_folder_in_neither_layout(tmp_path: Path) -> None:
    with pytest.raises(OptionError) as error:
        load_cityscapes(options(tmp_path))
    assert str(error.value) == (
        f"data.folder: {str(tmp_path)!r} has neither train/image (MTAN's layout) nor leftImg8bit or "
        "leftImg8bit_trainvaltest.zip (the official one)"
    )
    write_mtan(tmp_path, tasks=("depth",))
    with pytest.raises(OptionError, match="train' has neither label_7 nor label, expected one with the classes"):
        load_cityscapes(options(tmp_path))
    assert load_cityscapes(options(tmp_path, tasks=("depth",))).task_names == ("depth",)


def test_official_files_that_are_missing_or_broken(tmp_path: Path) -> None:
    root = tmp_path / "city"
    write_official(root)
    image = root / "leftImg8bit" / "val" / "lindau" / "lindau_000000_000019_leftImg8bit.png"
    data = image.read_bytes()
    for content, reason in ((b"nothing", "is no image"), (data[: len(data) // 2], "")):
        image.write_bytes(content)
        with pytest.raises(OptionError) as error:
            load_cityscapes(options(root))
        assert f"{image}: cannot be read: {reason}" in str(error.value) and "\n" not in str(error.value)
    image.write_bytes(data)
    disparity = root / "disparity" / "val" / "lindau" / "lindau_000000_000019_disparity.png"
    Image.fromarray(np.zeros((32, 64), np.uint8)).save(disparity)
    with pytest.raises(OptionError, match=r"disparity\.png: uint8 \[32, 64\], expected disparities of 16 bits"):
        load_cityscapes(options(root))
    for top in ("disparity", "gtFine"):
        (root / top).rename(root / f"no_{top}")
        with pytest.raises(OptionError, match=f"has neither {top}/train nor {top}_trainvaltest.zip"):
            load_cityscapes(options(root))
    (root / "gtFine_trainvaltest.zip").write_bytes(b"nothing")
    with pytest.raises(OptionError, match=r"gtFine_trainvaltest\.zip: cannot be read as an archive"):
        load_cityscapes(options(root))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("damage", ["first bytes", "half a file", "another kind"])
def test_a_damaged_file_in_an_archive_is_one_line_that_names_both(
    tmp_path: Path, compression: int, damage: str
) -> None:
    write_official(tmp_path / "city", (64, 128))
    name = "disparity/val/lindau/lindau_000001_000019_disparity.png"
    file = tmp_path / "city" / name
    if damage == "half a file":
        file.write_bytes(file.read_bytes()[:4000])
    elif damage == "another kind":
        Image.fromarray(np.zeros((64, 128), np.uint8)).save(file)
    into_archives(tmp_path / "city", tmp_path / "archives", compression)
    archive = tmp_path / "archives" / "disparity_trainvaltest.zip"
    if damage == "first bytes":
        with zipfile.ZipFile(archive) as content:
            start = content.getinfo(name).header_offset + 30 + len(name)
        data = bytearray(archive.read_bytes())
        data[start : start + 64] = b"\xff" * 64
        archive.write_bytes(data)
    with pytest.raises(OptionError) as error:
        load_cityscapes(options(tmp_path / "archives", size=(16, 32)))
    assert str(error.value).startswith(f"{archive}: {name}: ") and "\n" not in str(error.value)
    reason = "uint8 [64, 128], expected disparities of 16 bits" if damage == "another kind" else "cannot be read: "
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 13}, "data.num_classes: 13 is not valid, expected one of 7, 19"),
        ({"tasks": ["normals"]}, "tasks: 'normals' is not valid, expected of segmentation, depth"),
        ({"depth_scale": 0}, "depth_scale: 0.0 is not valid, expected a number above 0"),
    ],
)
def test_options_out_of_range_are_one_line(changes: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError) as error:
        parse_options(CityscapesOptions, {"folder": "x", **changes}, "data")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_without_pillow_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_official(tmp_path / "city")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingPackageError, match=r"needs Pillow: pip install hf-bilb\[vision\]"):
        load_cityscapes(options(tmp_path / "city"))
