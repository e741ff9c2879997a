"""A gallery of pixel-wise tasks: image, truth and prediction of every task for a few images, as one picture.

Plain numpy arrays in, a matplotlib `Figure` or a PNG out. Every task is drawn the same way in every gallery of a data
set: classes in a fixed palette, depths on one scale for all panels of the figure, normals as colours.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from hf_bilb.errors import OptionError
from hf_bilb.reporting.files import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = NDArray[Any]

#: Name of the file in a run's folder.
FILE_NAME = "gallery.png"
#: Colours of classes 0, 1, ...; chosen so that any two of them, grey and white differ for normal sight and for each
#: kind of dichromacy: by 23 units of CIELAB among the first 13, by 17 among all 19 (Okabe and Ito's eight: 16).
CLASS_COLOURS = (
    "#B13BB1", "#B11400", "#62FF00", "#3B00EB", "#4E273B", "#EBB176", "#4E7662", "#620000", "#B14EFF", "#9DC4FF",
    "#FF6227", "#272762", "#6200B1", "#764E76", "#8989EB", "#B1764E", "#B1FF76", "#FFD8B1", "#B189B1",
)  # fmt: skip
UNLABELLED_COLOUR = "#B8B8B8"
#: Of depths: perceptually uniform, and readable to colour-blind readers.
DEPTH_COLOURS = "viridis"
# Share of the measured depths beyond either end of the scale: a few far pixels would flatten all others.
_BEYOND = 0.01
_PANEL_WIDTH = 2.1  # inches
_LINE_HEIGHT = 0.13  # of the text below an image, in inches
_LETTERS = 42  # that fit below an image

_TITLES = {"segmentation": "classes", "depth": "depth", "normals": "normals"}
#: The tasks that can be drawn.
DRAWN_TASKS = tuple(_TITLES)


@dataclass(frozen=True)
class GalleryRow:
    """One image with what is known and predicted of it.

    Attributes:
        name: stands next to it.
        image: `[3, H, W]` in [0, 1].
        truth, prediction: task -> `segmentation [H, W]` classes, -1 where not labelled; `depth [H, W]`, 0 where not
            measured; `normals [3, H, W]`, zero where not known, of any length. A task that an image has no labels of
            may be left out of `truth`.
        classes: task with one class for the whole image -> true class (None: no label) and predicted one; they stand
            below the image.
    """

    name: str
    image: Array
    truth: Mapping[str, Array]
    prediction: Mapping[str, Array]
    classes: Mapping[str, tuple[str | None, str]] = field(default_factory=dict)


def gallery_figure(
    rows: Sequence[GalleryRow],
    task_names: Sequence[str],
    title: str,
    class_names: Sequence[str] = (),
    depth_unit: str = "",
) -> Figure:
    """A row for each image: the image, its classes below it, then truth and prediction of each task.

    Pixels without a class are grey, without a depth or normal white; predictions are shown everywhere. The scale of
    depths runs over the measured ones of all images, but for the hundredth at either end. Normals are colours: red,
    green and blue are (n + 1) / 2.

    Args:
        rows: the images, of one size or of several.
        task_names: some of segmentation, depth, normals, in the order of the columns.
        title: stands above.
        class_names: C names, for the legend; with more classes than `CLASS_COLOURS` colours repeat.
        depth_unit: `"m"`.

    Raises:
        OptionError: no image, a task that is none of the three, a prediction that is missing, or a shape that does not
            fit the image's; names image and task.
    """
    _check(rows, task_names)
    columns = 1 + 2 * len(task_names)
    height, width = rows[0].image.shape[1:]
    legend_height = 0.3 * -(-(len(class_names) + 1) // 10) if "segmentation" in task_names else 0.0
    below = [_classes_below(row) for row in rows]
    text_height = _LINE_HEIGHT * sum(map(len, below))
    size = (_PANEL_WIDTH * columns, _PANEL_WIDTH * height / width * len(rows) + 0.9 + legend_height + text_height)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(len(rows), columns, squeeze=False)
    scale = depth_scale(rows) if "depth" in task_names else None
    for row, lines, axes in zip(rows, below, panels, strict=True):
        _draw(axes[0], np.moveaxis(np.clip(row.image, 0, 1), 0, -1))
        axes[0].set_ylabel(row.name, fontsize=8)
        axes[0].set_xlabel("\n".join(lines), fontsize=7)
        for k, task in enumerate(task_names):
            for axis, values in zip(axes[1 + 2 * k :], (row.truth.get(task), row.prediction[task]), strict=False):
                _draw(axis, None if values is None else _coloured(task, values, scale))
    _head(panels[0], task_names)
    if scale is not None:
        _depth_bar(figure, panels, scale, 1 + 2 * list(task_names).index("depth"), depth_unit)
    if "segmentation" in task_names and class_names:
        _legend(figure, class_names)
    return figure


def write_gallery(
    rows: Sequence[GalleryRow],
    task_names: Sequence[str],
    folder: Path,
    title: str,
    class_names: Sequence[str] = (),
    depth_unit: str = "",
) -> Path:
    """`gallery_figure` as `gallery.png` in `folder`; returns the file."""
    return save_figure(gallery_figure(rows, task_names, title, class_names, depth_unit), folder / FILE_NAME)


def segmentation_colours(classes: Array) -> NDArray[np.float64]:
    """`[H, W]` classes -> `[H, W, 3]` colours in [0, 1]; grey where below 0."""
    palette = np.array([to_rgb(colour) for colour in (*CLASS_COLOURS, UNLABELLED_COLOUR)])
    index = np.where(classes < 0, len(CLASS_COLOURS), classes % len(CLASS_COLOURS)).astype(np.int64)
    return np.asarray(palette[index])


def normal_colours(normals: Array) -> NDArray[np.float64]:
    """`[3, H, W]` vectors -> `[H, W, 3]` colours in [0, 1]; white where the vector is zero or has a NaN."""
    lengths = np.linalg.norm(normals, axis=0)
    known = np.isfinite(lengths) & (lengths > 0)
    unit = np.where(known, normals, 0.0) / np.where(known, lengths, 1.0)
    return np.asarray(np.moveaxis(np.where(known, (unit + 1) / 2, 1.0), 0, -1))


def depth_colours(depth: Array, scale: Normalize) -> NDArray[np.float64]:
    """`[H, W]` depths -> `[H, W, 3]` colours in [0, 1]; white where 0 or NaN."""
    colours = colormaps[DEPTH_COLOURS](scale(np.nan_to_num(depth)))[..., :3]
    return np.asarray(np.where(((depth == 0) | np.isnan(depth))[..., None], 1.0, colours))


def depth_scale(rows: Sequence[GalleryRow]) -> Normalize:
    """The common scale of all depths: that of the measured ones, without the hundredth at either end."""
    measured = [row.truth["depth"][row.truth["depth"] > 0] for row in rows if "depth" in row.truth]
    values = np.concatenate(measured) if measured else np.array([])
    if not values.size:  # nothing is measured in these images: the predictions have to do
        values = np.concatenate([row.prediction["depth"].ravel() for row in rows])
    low, high = np.nanquantile(values, (_BEYOND, 1 - _BEYOND))
    return Normalize(float(low), float(high) if high > low else float(low) + 1.0)


def _coloured(task: str, values: Array, scale: Normalize | None) -> NDArray[np.float64]:
    if task == "segmentation":
        return segmentation_colours(values)
    if task == "normals":
        return normal_colours(values)
    assert scale is not None
    return depth_colours(values, scale)


def _draw(axis: Axes, picture: Array | None) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)
    if picture is None:
        axis.text(0.5, 0.5, "no labels", ha="center", va="center", fontsize=8, transform=axis.transAxes)
    else:
        axis.imshow(picture, interpolation="nearest")


def _head(axes: Sequence[Axes], task_names: Sequence[str]) -> None:
    axes[0].set_title("image", fontsize=10)
    for k, task in enumerate(task_names):
        axes[1 + 2 * k].set_title(f"{_TITLES[task]}: truth", fontsize=10)
        axes[2 + 2 * k].set_title(f"{_TITLES[task]}: prediction", fontsize=10)


def _classes_below(row: GalleryRow) -> list[str]:
    """Lines `scene: kitchen (predicted bedroom)`, or `scene: predicted bedroom` where the truth is not known."""
    lines = []
    for task, (truth, predicted) in row.classes.items():
        known = f"predicted {predicted}" if truth is None else f"{truth} (predicted {predicted})"
        lines += textwrap.wrap(f"{task}: {known}", _LETTERS, subsequent_indent="  ")
    return lines


def _depth_bar(figure: Figure, panels: NDArray[Any], scale: Normalize, before: int, unit: str) -> None:
    """The scale of depths, below their two columns; `before`: how many stand before those."""
    columns = panels.shape[1]
    bar = figure.colorbar(
        ScalarMappable(scale, colormaps[DEPTH_COLOURS]),
        ax=panels,  # out of the room of all: the depth's columns alone would be shifted
        location="bottom",
        extend="both",
        aspect=40,
        shrink=2 / columns,
        anchor=(before / (columns - 2), 0.5),
    )
    bar.set_label(f"depth{f' in {unit}' if unit else ''}; white: not measured", fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _legend(figure: Figure, class_names: Sequence[str]) -> None:
    colours = [CLASS_COLOURS[number % len(CLASS_COLOURS)] for number in range(len(class_names))]
    entries = [*zip(colours, class_names, strict=True), (UNLABELLED_COLOUR, "not labelled")]
    handles = [Patch(facecolor=colour, label=name) for colour, name in entries]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(10, len(handles)), frameon=False, fontsize=8)


def _check(rows: Sequence[GalleryRow], task_names: Sequence[str]) -> None:
    if not rows:
        raise OptionError("gallery: got no image, expected one or more")
    for task in task_names:
        if task not in _TITLES:
            raise OptionError(f"gallery: task {task!r} cannot be drawn, expected some of {', '.join(_TITLES)}")
    for row in rows:
        if row.image.ndim != 3 or row.image.shape[0] != 3:
            raise OptionError(f"gallery: image {row.name!r} is {row.image.shape}, expected [3, H, W]")
        for task in task_names:
            shape = row.image.shape if task == "normals" else row.image.shape[1:]
            for what, arrays in (("truth", row.truth), ("prediction", row.prediction)):
                if task not in arrays:
                    if what == "truth":
                        continue
                    raise OptionError(f"gallery: image {row.name!r} has no prediction of {task!r}")
                if arrays[task].shape != shape:
                    found = arrays[task].shape
                    raise OptionError(f"gallery: {what} of {task!r}, image {row.name!r}, is {found}, expected {shape}")
