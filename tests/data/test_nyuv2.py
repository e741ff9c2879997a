"""NYU Depth V2: the tables of classes and the split, normals from depth, the layout, the real images."""

from __future__ import annotations

import importlib.util
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_bilb.data.dense.nyuv2 import Nyuv2Options, load_nyuv2
from hf_bilb.data.dense.nyuv2_labels import CLASSES_13, classes_13, classes_40, official_split
from hf_bilb.data.dense.surface_normals import NYUV2_CAMERA, Intrinsics, normals_from_depth
from hf_bilb.errors import OptionError
from tests.data.dense_scenes import plane

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"


# --- tables -------------------------------------------------------------------------------------------------------


def test_classes_with_a_name_of_their_own_keep_it() -> None:
    # Names of the official file's classes, from its `names`, of those that are among the 40 too.
    named = {3: "cabinet", 4: "ceiling", 5: "chair", 7: "counter", 11: "floor", 15: "paper", 17: "refridgerator",
             19: "table", 21: "wall", 24: "sink", 26: "box", 28: "door", 36: "desk", 42: "shelves", 45: "whiteboard",
             55: "bag", 59: "window", 64: "picture", 80: "blinds", 83: "sofa", 85: "books", 88: "bookshelf",
             89: "curtain"}  # fmt: skip
    names_40 = (
        "wall floor cabinet bed chair sofa table door window bookshelf picture counter blinds desk shelves curtain "
        "dresser pillow mirror floor_mat clothes ceiling books refridgerator television paper towel shower_curtain "
        "box whiteboard person night_stand toilet sink lamp bathtub bag otherstructure otherfurniture otherprop"
    ).split()
    assert len(classes_40()) == 895 and classes_40()[0] == classes_13()[0] == -1
    assert {label: names_40[classes_40()[label]] for label in named} == named
    assert set(classes_40()[1:].tolist()) == set(range(40)) and set(classes_13()[1:].tolist()) == set(range(13))
    same = {"bed": 157, "books": 85, "ceiling": 4, "chair": 5, "floor": 11, "picture": 64, "sofa": 83, "table": 19,
            "wall": 21, "window": 59}  # fmt: skip
    assert {name: CLASSES_13[classes_13()[label]] for name, label in same.items()} == {name: name for name in same}
    assert [CLASSES_13[classes_13()[label]] for label in (3, 36, 28, 26, 55)] == [
        "furniture", "table", "wall", "objects", "objects",
    ]  # fmt: skip


def test_the_split_is_the_official_one() -> None:
    train, test = official_split()
    assert len(train) == 795 and len(test) == 654 and sorted([*train, *test]) == list(range(1449))
    # The beginning of the widely used list of its test images, and the last one.
    assert test[:16].tolist() == [0, 1, 8, 13, 14, 15, 16, 17, 20, 27, 28, 29, 30, 31, 32, 33]
    assert test[-1] == 1448


# --- normals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normal", [(0.0, 0.0, -1.0), (0.5, 0.1, -1.0), (-0.2, -0.9, -0.7)])
def test_normals_of_a_plane_are_its_normal(normal: tuple[float, float, float]) -> None:
    size = (60, 80)
    camera = Intrinsics(70.0, 71.0, 41.0, 28.5)
    depth, unit = plane(normal, 1.5, size, camera)
    depth[depth <= 0] = 0
    found = normals_from_depth(depth, camera, radius=3)
    known = (found != 0).any(axis=-1)
    assert known[3:-3, 3:-3].mean() > 0.3 and not known[:3].any() and not known[:, -3:].any()
    np.testing.assert_allclose(found[known], np.broadcast_to(unit, found[known].shape), atol=2e-5)


def test_normals_of_a_sphere_point_away_from_its_centre() -> None:
    camera, centre, radius = Intrinsics(400.0, 400.0, 60.0, 60.0), np.array([0.0, 0.0, 3.0]), 1.0
    rows, columns = np.mgrid[:120, :120]
    ray = np.stack([(columns - 60) / 400, (rows - 60) / 400, np.ones((120, 120))], axis=-1)
    squared, along = (ray**2).sum(axis=-1), ray @ centre
    depth = (along - np.sqrt(along**2 - squared * (centre @ centre - radius**2))) / squared
    found = normals_from_depth(depth, camera)
    inner = (slice(10, -10), slice(10, -10))
    expected = (ray * depth[..., None] - centre)[inner]
    angles = np.degrees(np.arccos(np.clip((found[inner] * expected).sum(axis=-1), -1, 1)))
    assert angles.max() < 1.5 and angles.mean() < 0.6


def test_the_camera_counts_pixels_from_0() -> None:
    # The toolbox's camera_params.m counts from 1.
    found = (NYUV2_CAMERA.fx, NYUV2_CAMERA.fy, NYUV2_CAMERA.cx + 1, NYUV2_CAMERA.cy + 1)
    np.testing.assert_allclose(found, (518.8579, 519.4696, 325.5824, 253.7362), atol=1e-4)


def test_normals_are_not_known_across_edges_and_holes() -> None:
    depth = np.full((40, 60), 2.0)
    depth[:, 30:] = 3.0
    depth[10, 10] = 0
    depth[30, 50] = np.nan
    known = (normals_from_depth(depth, NYUV2_CAMERA, radius=2) != 0).any(axis=-1)
    expected = np.zeros((40, 60), bool)
    expected[2:-2, 2:-2] = True
    expected[:, 28:32] = False
    expected[8:13, 8:13] = expected[28:33, 48:53] = False
    assert np.array_equal(known, expected)
    expected[2:-2, 28:32] = True  # with a fit that always does, only the holes are left
    loose = normals_from_depth(depth, NYUV2_CAMERA, radius=2, tolerance=10)
    assert np.array_equal((loose != 0).any(axis=-1), expected)
    assert not normals_from_depth(depth[:4], NYUV2_CAMERA, radius=2).any()


# --- the layout ---------------------------------------------------------------------------------------------------


def test_a_folder_in_another_layout_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(OptionError) as error:
        load_nyuv2(Nyuv2Options(str(tmp_path)))
    assert str(error.value) == (
        f"data.folder: {str(tmp_path)!r} has no folder train/image, expected MTAN's layout; `hf-bilb prepare nyuv2` "
        "writes one from nyu_depth_v2_labeled.mat"
    )


# --- the real images ----------------------------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.skipif(not (REAL / "nyuv2").is_dir(), reason="needs the images in ../shared/data/nyuv2")
def test_real_rooms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("unpack", REAL / "unpack.py")
    assert spec is not None and spec.loader is not None
    unpack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(unpack)
    names = zipfile.ZipFile.namelist

    def some_names(archive: zipfile.ZipFile) -> list[str]:
        last = 30 if "train" in str(archive.filename) else 42  # images up to this number are enough
        return [name for name in names(archive) if int(Path(name).stem) <= last]

    with monkeypatch.context() as patched:
        patched.setattr(zipfile.ZipFile, "namelist", some_names)
        unpack.unpack_nyuv2(tmp_path)
    data = load_nyuv2(Nyuv2Options(str(tmp_path / "nyuv2"), augment=False, cache_dir=str(tmp_path / "cache")))
    train, test = official_split()
    assert len(data.train) == (train < 30).sum() and 5 < len(data.test) <= (test < 42).sum()
    (batch,) = data.train.__getitems__(range(len(data.train)))
    assert batch["pixel_values"].shape[1:] == (3, 144, 192) and 0.2 < batch["pixel_values"].mean() < 0.6
    assert set(batch["segmentation"].unique().tolist()) <= {-1, *range(13)}
    depth = batch["depth"][batch["depth"] > 0]
    assert depth.max() < 10 and 1.5 < depth.mean() < 4
    assert data.trivial_metrics["segmentation_miou"] < 0.05 and data.trivial_metrics["depth_rel_error"] > 0.2
    # The normals of these files come from the same depth, by other code and at a higher resolution; here depth has
    # steps of 4 cm. Within a large window the two agree on walls and floors.
    camera = Intrinsics(*(0.3 * value for value in (518.86, 519.47, 325.58, 253.74)))
    angles = []
    for row in range(8):
        found = torch.from_numpy(normals_from_depth(batch["depth"][row].numpy(), camera, radius=5)).permute(2, 0, 1)
        known = (found != 0).any(dim=0) & (batch["normals"][row] != 0).any(dim=0)
        dots = (found * batch["normals"][row]).sum(dim=0)[known]
        angles.append(torch.rad2deg(torch.arccos(dots.clamp(-1, 1))))
    assert torch.cat(angles).median() < 6
