"""Scale-crop and mirroring: against torch's resampling, and against the geometry of a plane."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional

from hf_bilb.data.dense.augmentation import SCALES, View, draw_view
from hf_bilb.data.dense.surface_normals import Intrinsics, normals_from_depth
from tests.data.dense_scenes import CAMERA, SIZE, plane, rays, seen_depth, seen_image, seen_labels, seen_normals

SIZES = [(24, 32), (144, 192), (288, 384), (128, 256), (17, 31)]


def views(size: tuple[int, int], count: int = 40) -> list[View]:
    return [draw_view(5, 2, index, size) for index in range(count)]


# --- what is drawn ------------------------------------------------------------------------------------------------


def test_a_view_depends_on_seed_epoch_and_index_alone() -> None:
    keys = [(seed, epoch, index) for seed in range(3) for epoch in range(3) for index in range(3)]
    there = {key: draw_view(*key, (288, 384), scales=(1.5,)) for key in keys}
    np.random.seed(1)
    torch.manual_seed(1)
    assert {key: draw_view(*key, (288, 384), scales=(1.5,)) for key in reversed(keys)} == there
    assert len(set(there.values())) == len(there)  # 25,000 places: the probability of a chance hit is 1 %


def test_scales_places_and_mirroring_are_uniform() -> None:
    found = [draw_view(0, 0, index, (30, 40)) for index in range(6000)]
    for scale in SCALES:
        same = [view for view in found if view.scale == scale]
        assert len(same) == pytest.approx(2000, abs=150)  # 4 standard deviations
        for place, free in (("top", 30 - same[0].height), ("left", 40 - same[0].width)):
            counts = np.bincount([getattr(view, place) for view in same], minlength=free + 1)
            assert len(counts) == free + 1
            expected = len(same) / (free + 1)
            assert ((counts - expected) ** 2 / expected).sum() < free + 6 * np.sqrt(2 * free + 1) + 6
    assert sum(view.mirrored for view in found) == pytest.approx(3000, abs=160)


def test_the_part_has_the_size_over_the_scale() -> None:
    for view in views((288, 384)):
        assert (view.height, view.width) == (int(288 / view.scale), int(384 / view.scale))
        assert 0 <= view.top <= 288 - view.height and 0 <= view.left <= 384 - view.width


# --- resampling ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_images_and_labels_are_those_of_torch(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    image, labels = torch.rand(3, *size, generator=generator), torch.rand(2, *size, generator=generator)
    for view in views(size):
        part = (slice(None), slice(view.top, view.top + view.height), slice(view.left, view.left + view.width))
        smooth = functional.interpolate(image[part][None].double(), size, mode="bilinear", align_corners=True)[
            0
        ].float()
        sharp = functional.interpolate(labels[part][None], size, mode="nearest")[0]
        if view.mirrored:
            smooth, sharp = smooth.flip(-1), sharp.flip(-1)
        torch.testing.assert_close(torch.from_numpy(seen_image(view, image.numpy())), smooth, rtol=0, atol=1e-6)
        # In floats (rows * 96 / 144) torch's own row is one too low now and then.
        assert (torch.from_numpy(seen_labels(view, labels.numpy())) != sharp).float().mean() < 0.02


def test_without_a_view_of_a_part_nothing_is_resampled() -> None:
    image = np.random.default_rng(0).random((3, *SIZE)).astype(np.float32)
    whole = View(SIZE, 1.0, 0, 0, *SIZE, mirrored=False)
    assert np.array_equal(seen_image(whole, image), image) and np.array_equal(seen_labels(whole, image), image)
    mirrored = dataclasses.replace(whole, mirrored=True)
    assert np.array_equal(seen_image(mirrored, image), image[:, :, ::-1])
    assert np.array_equal(seen_labels(mirrored, image), image[:, :, ::-1])


def test_bytes_and_floats_are_resampled_alike() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, *SIZE), dtype=np.uint8)
    for view in views(SIZE):
        assert np.array_equal(seen_image(view, pixels), seen_image(view, pixels.astype(np.float32)))


def test_the_input_is_left_alone() -> None:
    normals = np.random.default_rng(0).standard_normal((3, *SIZE)).astype(np.float32)
    for values in (normals, normals[0]):
        values.flags.writeable = False
    for view in views(SIZE):
        seen_normals(view, normals), seen_depth(view, normals[0]), seen_image(view, normals)


# --- geometry -----------------------------------------------------------------------------------------------------


def seen_rays(view: View) -> np.ndarray:
    """The rays of the source pixels that a view shows, x turned around where it is mirrored."""
    found = np.empty((*SIZE, 3))
    for row in range(SIZE[0]):
        for column in range(SIZE[1]):
            across = SIZE[1] - 1 - column if view.mirrored else column
            source = view.top + row * view.height // SIZE[0], view.left + across * view.width // SIZE[1]
            found[row, column] = rays(SIZE)[source]
            if view.mirrored:
                found[row, column, 0] *= -1
    return found


@pytest.mark.parametrize("normal", [(0.3, -0.2, -1.0), (-0.5, 0.4, -1.0), (0.0, 0.0, -1.0)])
def test_a_plane_stays_one(normal: tuple[float, float, float]) -> None:
    depth, unit = plane(normal, 2.0)
    vectors = np.broadcast_to(unit[:, None, None], (3, *SIZE)).astype(np.float32)
    for view in views(SIZE, 12):
        points = seen_rays(view) * seen_depth(view, depth.astype(np.float32))[..., None]
        turned = seen_normals(view, vectors)
        # The scene is smaller by the scale, and so is the plane's distance; all points lie in it.
        distances = -(points * np.moveaxis(turned, 0, -1)).sum(axis=-1)
        np.testing.assert_allclose(distances, 2.0 / view.scale, rtol=3e-6)
        np.testing.assert_allclose(np.linalg.norm(turned, axis=0), 1, rtol=1e-6)


def test_mirrored_depth_has_the_mirrored_normals() -> None:
    depth, _ = plane((0.3, -0.2, -1.0), 2.0)
    mirrored = View(SIZE, 1.0, 0, 0, *SIZE, mirrored=True)
    other_side = Intrinsics(CAMERA.fx, CAMERA.fy, SIZE[1] - 1 - CAMERA.cx, CAMERA.cy)
    before = np.moveaxis(normals_from_depth(depth, CAMERA), -1, 0)
    after = np.moveaxis(normals_from_depth(seen_depth(mirrored, depth.astype(np.float32)), other_side), -1, 0)
    assert (after != 0).any()
    np.testing.assert_allclose(seen_normals(mirrored, before), after, atol=1e-4)


def test_what_has_no_label_has_none_afterwards() -> None:
    generator = np.random.default_rng(0)
    hole = generator.random(SIZE) < 0.3
    depth = np.where(hole, 0, generator.uniform(1, 2, SIZE)).astype(np.float32)
    normals = np.where(hole, 0, np.array([0.6, 0.0, -0.8])[:, None, None]).astype(np.float32)
    classes = np.where(hole, -1, 3).astype(np.int8)
    for view in views(SIZE):
        gone = seen_labels(view, hole)
        assert np.array_equal(seen_depth(view, depth) == 0, gone) and np.array_equal(
            seen_labels(view, classes) == -1, gone
        )
        assert np.array_equal((seen_normals(view, normals) == 0).all(axis=0), gone)


def test_depth_is_divided_and_inverse_depth_multiplied() -> None:
    depth = np.random.default_rng(0).uniform(1, 2, SIZE).astype(np.float32)
    for view in views(SIZE):
        nearest = seen_labels(view, depth)
        np.testing.assert_array_equal(seen_depth(view, depth), nearest / np.float32(view.scale))
        np.testing.assert_allclose(seen_depth(view, 1 / depth, inverse=True), 1 / seen_depth(view, depth), rtol=1e-6)
