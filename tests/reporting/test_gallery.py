"""The gallery shows what it was given: checked pixel by pixel, and its colours for colour-blind readers."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from PIL import Image
from torch.utils.data import DataLoader

from hf_bilb.data.task_data import GalleryInfo
from hf_bilb.errors import OptionError
from hf_bilb.experiments.gallery import gallery_rows
from hf_bilb.reporting.gallery import (
    CLASS_COLOURS,
    DEPTH_COLOURS,
    UNLABELLED_COLOUR,
    GalleryRow,
    depth_scale,
    gallery_figure,
    normal_colours,
    segmentation_colours,
    write_gallery,
)
from tests.metrics.dense_images import MIXED, TASKS, Images, MixedImages, MixedModel, Model

NAMES = ("wall", "floor", "chair")


def row(seed: int = 0, name: str = "first") -> GalleryRow:
    generator = np.random.default_rng(seed)
    truth = {
        "segmentation": generator.integers(-1, 3, (12, 16)),
        "depth": np.where(generator.random((12, 16)) < 0.1, 0, generator.uniform(1, 4, (12, 16))),
        "normals": generator.normal(size=(3, 12, 16)),
    }
    truth["normals"][:, 0] = 0
    prediction = {
        "segmentation": generator.integers(0, 3, (12, 16)),
        "depth": generator.uniform(0.5, 8, (12, 16)),
        "normals": generator.normal(size=(3, 12, 16)),
    }
    return GalleryRow(name, generator.random((3, 12, 16)), truth, prediction)


def pictures(figure: Figure) -> list[list[np.ndarray | None]]:
    """What each panel shows, row by row; the colour bar left out."""
    panels = [axis for axis in figure.axes if axis.get_label() != "<colorbar>"]
    columns = panels[0].get_subplotspec().get_gridspec().ncols
    shown = [np.asarray(axis.images[0].get_array()) if axis.images else None for axis in panels]
    return [shown[start : start + columns] for start in range(0, len(shown), columns)]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def below(figure: Figure, columns: int = 7) -> list[str]:
    """The text below each image."""
    return [
        axis.get_xlabel() for axis in figure.axes[: 2 * columns] if axis.get_title() == "image" or axis.get_ylabel()
    ]


def test_classes_of_an_image_stand_below_it() -> None:
    classes = {"scene": ("kitchen", "bedroom"), "window": (None, "yes"), "size": ("large", "large")}
    rows = [dataclasses.replace(row(0), classes=classes), row(1, "second")]
    figure, without = (gallery_figure(given, TASKS, "a run", NAMES) for given in (rows, [row(0), row(1, "second")]))
    lines = ["scene: kitchen (predicted bedroom)", "window: predicted yes", "size: large (predicted large)"]
    assert below(figure) == ["\n".join(lines), ""] and below(without) == ["", ""]
    assert figure.get_size_inches()[1] > without.get_size_inches()[1]  # the text has room of its own
    assert all(axis.get_xlabel() == "" for axis in figure.axes[1:7])
    long = dataclasses.replace(row(0), classes={"scene": ("a room for studying and for reading", "printer room " * 3)})
    (text,) = below(gallery_figure([long], TASKS, "a run", NAMES))
    assert all(len(line) <= 42 for line in text.split("\n"))
    assert " ".join(text.split()) == "scene: a room for studying and for reading (predicted " + "printer room " * 2 + (
        "printer room )"
    )


def test_every_panel_shows_its_array() -> None:
    rows = [row(0), row(1, "second")]
    figure = gallery_figure(rows, TASKS, "a run", NAMES, "m")
    scale = depth_scale(rows)
    titles = [axis.get_title() for axis in figure.axes[:7]]
    assert titles == [
        "image", "classes: truth", "classes: prediction", "depth: truth", "depth: prediction", "normals: truth",
        "normals: prediction",
    ]  # fmt: skip
    assert [figure.axes[0].get_ylabel(), figure.axes[7].get_ylabel()] == ["first", "second"]
    for given, shown in zip(rows, pictures(figure), strict=True):
        image, *of_tasks = shown
        np.testing.assert_array_equal(image, np.moveaxis(given.image, 0, -1))
        for values, panels in zip((given.truth, given.prediction), (of_tasks[::2], of_tasks[1::2]), strict=True):
            classes, depth, normals = panels
            for (y, x), number in np.ndenumerate(values["segmentation"]):
                colour = UNLABELLED_COLOUR if number < 0 else CLASS_COLOURS[number]
                assert to_hex(classes[y, x]).upper() == colour
            expected = colormaps[DEPTH_COLOURS](scale(values["depth"]))[..., :3]
            expected[values["depth"] == 0] = 1
            np.testing.assert_allclose(depth, expected)
            lengths = np.sqrt((values["normals"] ** 2).sum(axis=0))
            known = lengths > 0
            assert (normals[~known] == 1).all()
            expected = (values["normals"] / np.where(known, lengths, 1) + 1) / 2
            np.testing.assert_allclose(normals[known], np.moveaxis(expected, 0, -1)[known], rtol=1e-12)
    assert texts(figure) == [*NAMES, "not labelled"]
    (bar,) = [axis for axis in figure.axes if axis.get_label() == "<colorbar>"]
    assert bar.get_xlabel() == "depth in m; white: not measured"


@pytest.mark.parametrize("tasks", [("depth",), ("segmentation", "depth", "normals"), ("normals", "depth")])
def test_panels_are_in_line_and_the_depths_bar_is_below_its_columns(tasks: tuple[str, ...]) -> None:
    rows = [dataclasses.replace(row(k), classes={"scene": ("kitchen", "bath"), "lamp": (None, "on")}) for k in (0, 1)]
    figure = gallery_figure(rows, tasks, "title")
    FigureCanvasAgg(figure).draw()
    panels = [axis.get_position() for axis in figure.axes if axis.get_label() != "<colorbar>"]
    columns = 1 + 2 * len(tasks)
    for line in (panels[:columns], panels[columns:]):
        assert max(box.y1 for box in line) - min(box.y1 for box in line) < 1e-9
    (bar,) = [axis.get_position() for axis in figure.axes if axis.get_label() == "<colorbar>"]
    truth, prediction = (panels[1 + 2 * tasks.index("depth") + k] for k in (0, 1))
    assert abs((bar.x0 + bar.x1) - (truth.x0 + prediction.x1)) < 0.05 and bar.y1 < panels[-1].y0


def test_all_depths_are_on_the_scale_of_the_measured_ones() -> None:
    first, second = row(0), row(1)
    second.truth["depth"][...] = np.where(second.truth["depth"] > 0, second.truth["depth"] + 10, 0)
    scale = depth_scale([first, second])
    measured = np.concatenate([r.truth["depth"][r.truth["depth"] > 0] for r in (first, second)])
    assert scale.vmin == pytest.approx(np.quantile(measured, 0.01))
    assert scale.vmax == pytest.approx(np.quantile(measured, 0.99))
    unmeasured = dataclasses.replace(first, truth={})
    assert depth_scale([unmeasured]).vmax == pytest.approx(np.quantile(first.prediction["depth"], 0.99))
    flat = dataclasses.replace(first, truth={"depth": np.full((12, 16), 2.0)})
    assert (depth_scale([flat]).vmin, depth_scale([flat]).vmax) == (2.0, 3.0)


def test_an_image_without_labels_of_a_task_says_so() -> None:
    given = row()
    bare = dataclasses.replace(row(1), truth={"depth": given.truth["depth"]})
    (_, *full), (_, *partial) = pictures(gallery_figure([given, bare], TASKS, "a run", NAMES))
    assert all(panel is not None for panel in full)
    assert [panel is None for panel in partial] == [True, False, False, False, True, False]


@pytest.mark.parametrize("tasks", [TASKS[:2], ("normals",), ("depth", "segmentation")])
def test_some_tasks_in_an_order_of_their_own(tasks: tuple[str, ...], tmp_path: Path) -> None:
    path = write_gallery([row()], tasks, tmp_path, "a run", NAMES)
    assert path == tmp_path / "gallery.png"
    with Image.open(path) as image:
        assert image.size[0] > 600 and image.size[1] > 200
        assert len(image.convert("RGB").getcolors(maxcolors=1_000_000)) > 50
    figure = gallery_figure([row()], tasks, "a run", NAMES)
    assert len(pictures(figure)[0]) == 1 + 2 * len(tasks)
    assert texts(figure) == ([*NAMES, "not labelled"] if "segmentation" in tasks else [])


def test_broken_predictions_are_drawn_too() -> None:
    given = row()
    given.prediction["depth"][0, 0] = np.nan
    given.prediction["normals"][0, 0, 0] = np.nan
    *_, depth, _, normals = pictures(gallery_figure([given], TASKS, "a run", NAMES))[0]
    assert (depth[0, 0] == 1).all() and (normals[0, 0] == 1).all()
    assert normal_colours(np.zeros((3, 1, 1))).tolist() == [[[1, 1, 1]]]
    many = segmentation_colours(np.array([[0, len(CLASS_COLOURS)]]))
    assert (many[0, 0] == many[0, 1]).all()  # more classes than colours: they repeat


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": np.zeros((12, 16, 3))}, r"image 'first' is \(12, 16, 3\), expected \[3, H, W\]"),
        ({"prediction": {"depth": np.zeros((12, 16))}}, "image 'first' has no prediction of 'segmentation'"),
        ({"truth": {"depth": np.zeros((1, 12, 16))}}, r"truth of 'depth', image 'first', is \(1, 12, 16\), expected"),
    ],
)
def test_what_does_not_fit_is_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        gallery_figure([dataclasses.replace(row(), **change)], TASKS, "a run", NAMES)


def test_a_task_that_cannot_be_drawn_and_no_images() -> None:
    with pytest.raises(
        OptionError, match="task 'edges' cannot be drawn, expected some of segmentation, depth, normals"
    ):
        gallery_figure([row()], ["edges"], "a run")
    with pytest.raises(OptionError, match="got no image"):
        gallery_figure([], TASKS, "a run")


# --- colours ------------------------------------------------------------------------------------------------------

#: Machado, Oliveira and Fernandes, A physiologically-based model for simulation of color vision deficiency (IEEE TVCG
#: 2009), severity 1, for linear RGB.
SIGHTS = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def cielab(colour: str, sight: Any) -> np.ndarray:
    """CIE 1976 L*a*b* (D65) of an sRGB colour as somebody with that sight sees it."""
    encoded = np.array(to_rgb(colour))
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(sight) @ linear, 0, 1)
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    x, y, z = (
        value ** (1 / 3) if value > 0.008856 else 7.787 * value + 16 / 116
        for value in np.array(to_xyz) @ seen / [0.95047, 1, 1.08883]
    )
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize(("number", "least"), [(13, 23), (19, 17)])
def test_class_colours_are_told_apart_by_everybody(sight: str, number: int, least: float) -> None:
    colours = [*CLASS_COLOURS[:number], UNLABELLED_COLOUR, "#FFFFFF"]
    assert len(CLASS_COLOURS) == 19
    seen = [cielab(colour, SIGHTS[sight]) for colour in colours]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > least


# --- of a model ---------------------------------------------------------------------------------------------------


class Predictor:
    """What `gallery_rows` needs of a Trainer."""

    def predict(self, images: Any) -> Any:
        (batch,) = DataLoader(images, batch_size=len(images))
        predictions = tuple(values.detach().numpy() for values in Model()(batch["pixel_values"])["logits"])
        return SimpleNamespace(predictions=predictions, label_ids=tuple(batch[task].numpy() for task in TASKS))


@pytest.mark.parametrize(("count", "chosen"), [(4, [0, 3, 7, 10]), (1, [0]), (20, list(range(11)))])
def test_rows_of_a_model_are_spread_over_the_part(count: int, chosen: list[int]) -> None:
    images = Images(11)
    data: Any = SimpleNamespace(task_names=TASKS, label_names=TASKS, gallery=GalleryInfo(NAMES, "m"))
    rows = gallery_rows(Predictor(), images, data, count)  # type: ignore[arg-type]
    assert [row.name for row in rows] == [f"image {index}" for index in chosen]
    expected = Model()(images.pixel_values)["logits"]
    for index, found in zip(chosen, rows, strict=True):
        np.testing.assert_array_equal(found.image, images.pixel_values[index])
        for task, labels, predictions in zip(TASKS, images.labels(), expected, strict=True):
            np.testing.assert_array_equal(found.truth[task], labels[index])
            predictions = predictions[index].detach().numpy()
            predictions = predictions.argmax(axis=0) if task == "segmentation" else predictions
            np.testing.assert_allclose(found.prediction[task], predictions, rtol=1e-12)
        assert found.classes == {}
    data.gallery = None
    assert gallery_rows(Predictor(), images, data) == []  # type: ignore[arg-type]


class MixedPredictor:
    """The same for a model with image-level tasks."""

    def predict(self, images: Any) -> Any:
        (batch,) = DataLoader(images, batch_size=len(images))
        predictions = tuple(values.detach().numpy() for values in MixedModel()(batch["pixel_values"])["logits"])
        columns = ("segmentation", "depth", "image_labels")
        return SimpleNamespace(predictions=predictions, label_ids=tuple(batch[name].numpy() for name in columns))


def test_rows_of_a_model_with_image_level_tasks_name_their_classes() -> None:
    images = MixedImages(11)
    names = {"scene": ("attic", "bath", "cellar", "den"), "room": ("no", "yes")}
    data: Any = SimpleNamespace(
        task_names=MIXED, label_names=("segmentation", "depth", "image_labels"), gallery=GalleryInfo(NAMES, "m", names)
    )
    rows = gallery_rows(MixedPredictor(), images, data, 11)  # type: ignore[arg-type]
    scene, _, depth, room = MixedModel()(images.pixel_values)["logits"]
    missing = 0
    for index, found in enumerate(rows):
        assert list(found.prediction) == list(found.truth) == ["segmentation", "depth"]
        np.testing.assert_allclose(found.prediction["depth"], depth[index].detach().numpy(), rtol=1e-12)
        assert list(found.classes) == ["scene", "room"]
        for (task, (truth, guess)), logits, label in zip(
            found.classes.items(), (scene[index], room[index]), images.image_labels[index].tolist(), strict=True
        ):
            assert guess == names[task][int(logits.argmax())]
            assert truth == (names[task][label] if label >= 0 else None)
            missing += truth is None
    assert 0 < missing < 22
    gallery_figure(rows, ["segmentation", "depth"], "a run", NAMES)
