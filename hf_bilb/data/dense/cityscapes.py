"""Cityscapes: 7 or 19 classes and inverse depth of 3,475 street scenes.

Cordts et al.: The Cityscapes Dataset for Semantic Urban Scene Understanding, CVPR 2016. 2,975 training images; the 500
validation images are the test part, as in the multi-task papers (the official test labels are not public). Two layouts:

* MTAN's (Liu, Johns, Davison, CVPR 2019; files of 128 x 256 at github.com/lorenmt/mtan): `{train,val}/image/<i>.npy`
  [H, W, 3] in [0, 1]; `label_7` and `label_19` (or one folder `label`) [H, W], -1: not labelled; `depth` [H, W, 1],
  inverse depth, 0: not measured.
* the official one: `leftImg8bit`, `gtFine` (`*_gtFine_labelIds.png`) and `disparity`, as folders or as the archives
  `leftImg8bit_trainvaltest.zip`, `gtFine_trainvaltest.zip`, `disparity_trainvaltest.zip`, which need not be unpacked.
  `depth` is then the disparity in pixels of the full width, d = (p - 1) / 256 of a pixel p (0: not measured), times
  `depth_scale`; inverse depth is proportional to it: d / (baseline * focal length), about d / 473.6 in 1/m.

The 19 classes are those of the official evaluation; the 7 are their groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hf_bilb.config.options import bounded, check_bounds
from hf_bilb.data.dense.cityscapes_files import IMAGES, is_official, official_columns
from hf_bilb.data.dense.data_set import DenseFacts, DensePart, dense_task_data, mtan_part
from hf_bilb.data.dense.files import MTAN_FOLDERS
from hf_bilb.data.dense.options import DenseOptions
from hf_bilb.data.task_data import DataSetSpec, TaskData
from hf_bilb.errors import OptionError

TASKS = ("segmentation", "depth")
#: Number of classes -> their names: the 7 groups, or the 19 of the official evaluation.
CLASS_NAMES = {
    7: ("flat", "construction", "object", "nature", "sky", "human", "vehicle"),
    19: (
        "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation",
        "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
    ),
}  # fmt: skip
#: Size of the papers' images, to which official ones are resized where no size is given.
PAPER_SIZE = (128, 256)


@dataclass(frozen=True)
class CityscapesOptions(DenseOptions):
    """Options of `cityscapes`: those of every dense data set, and

    Attributes:
        num_classes: 7 (the papers') or 19.
        depth_scale: official layout: factor of the disparity in pixels.
        depth_under_zoom: what blowing an image up by s does to its inverse depth: `divide` by s, as the papers' code
            does (it was written for depth), or `multiply`, which is right for what comes nearer.
    """

    num_classes: Literal[7, 19] = 7
    depth_scale: float = bounded(1.0, above=0, expected="a number above 0")
    depth_under_zoom: Literal["divide", "multiply"] = "divide"

    def __post_init__(self) -> None:
        self.check(TASKS)
        check_bounds(self)


def load_cityscapes(options: CityscapesOptions) -> TaskData:
    """Cityscapes, from memory-mapped files (see `hf_bilb.data.dense.rows`).

    Without `size`, images of the official layout are resized to 128 x 256. Delta_m has its published base with 7
    classes alone.

    Raises:
        OptionError: a folder or a file that is missing, or one that holds something else; names it.
        MissingPackageError: Pillow is not installed, which the official layout needs.

    Cost: the first call reads every file (official: about 0.1 s an image and core); later ones list them.
    """
    folder = Path(options.folder)
    tasks = options.dense_tasks(TASKS)
    if (folder / "train" / "image").is_dir():
        train, test = (
            mtan_part(folder / part, folders, options.num_classes, options.size, options.allow_missing)
            for part, folders in ((part, _mtan_folders(folder / part, options)) for part in ("train", "val"))
        )
    elif is_official(folder):
        train, test = (_official_part(options, part, tasks) for part in ("train", "val"))
    else:
        raise OptionError(
            f"data.folder: {str(folder)!r} has neither train/image (MTAN's layout) nor {IMAGES} or "
            f"{IMAGES}_trainvaltest.zip (the official one)"
        )
    facts = DenseFacts(
        "cityscapes",
        TASKS,
        CLASS_NAMES[options.num_classes],
        published=options.num_classes == 7,
        batch_size=8,
        depth_unit="",
        inverse_depth=options.depth_under_zoom == "multiply",
    )
    return dense_task_data(options, facts, train, test)


def _official_part(options: CityscapesOptions, part: str, tasks: Sequence[str]) -> DensePart:
    size = options.size or PAPER_SIZE
    folder, scale = Path(options.folder), options.depth_scale
    columns = official_columns(folder, part, tasks, options.num_classes, size, scale, options.allow_missing)
    ending = f"_{IMAGES}.png"
    return DensePart(columns, size, [Path(path).name.removesuffix(ending) for _, path in columns[0].items])


def _mtan_folders(part: Path, options: CityscapesOptions) -> dict[str, str]:
    """Task -> its folder; classes lie in `label_7` and `label_19`, or one of them in `label`."""
    named = f"label_{options.num_classes}"
    classes = named if (part / named).is_dir() else MTAN_FOLDERS["segmentation"]
    tasks = options.dense_tasks(TASKS)
    if "segmentation" in tasks and not (part / classes).is_dir():
        raise OptionError(
            f"data.folder: {str(part)!r} has neither {named} nor {classes}, expected one with the classes"
        )
    folders = {**MTAN_FOLDERS, "segmentation": classes}
    return {task: folders[task] for task in tasks}


SPEC = DataSetSpec(options=CityscapesOptions, load=load_cityscapes, model_needs={"image_labels": "image_tasks"})
