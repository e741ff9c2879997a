"""NYU Depth V2: 13 classes, depth and surface normals of 1,449 images of rooms.

Silberman, Hoiem, Kohli, Fergus: Indoor Segmentation and Support Inference from RGBD Images, ECCV 2012. Read in the
layout of the multi-task papers (Liu, Johns, Davison: End-to-End Multi-Task Learning with Attention, CVPR 2019, "MTAN"),
795 training images in `train`, 654 test images in `val`, 288 x 384:

    {train,val}/image/<i>.npy   [H, W, 3] in [0, 1]
    {train,val}/label/<i>.npy   [H, W], class 0 to 12, -1: not labelled
    {train,val}/depth/<i>.npy   [H, W, 1], metres, 0: not measured
    {train,val}/normal/<i>.npy  [H, W, 3], unit vectors, zero vector: not known

Their files are at github.com/lorenmt/mtan; `hf-bilb prepare nyuv2` writes the layout from the official file (with
normals of its own, so figures for them do not compare with published ones).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from hf_bilb.data.dense.data_set import DenseFacts, dense_task_data, mtan_part
from hf_bilb.data.dense.files import MTAN_FOLDERS
from hf_bilb.data.dense.nyuv2_labels import CLASSES_13
from hf_bilb.data.dense.options import DenseOptions
from hf_bilb.data.task_data import DataSetSpec, TaskData
from hf_bilb.errors import OptionError

logger = logging.getLogger(__name__)

TASKS = ("segmentation", "depth", "normals")
NUM_TRAIN, NUM_TEST = 795, 654


@dataclass(frozen=True)
class Nyuv2Options(DenseOptions):
    """Options of `nyuv2`: those of every dense data set."""

    def __post_init__(self) -> None:
        self.check(TASKS)


def load_nyuv2(options: Nyuv2Options) -> TaskData:
    """NYUv2, or a part of it, from memory-mapped files (see `hf_bilb.data.dense.rows`).

    A part of the set is reported with a warning that says how many images each part has.

    Raises:
        OptionError: a folder or a file that is missing, or one that holds something else; names it.

    Cost: the first call reads every file, writes 4.6 GB of cache for the whole set at 288 x 384 (35 s on two cores with
    the files in the page cache) and computes the best constant answer's figures; later ones list the files (0.1 s).
    """
    folder = Path(options.folder)
    if not (folder / "train" / "image").is_dir():
        hint = "; `hf-bilb prepare nyuv2` writes one from nyu_depth_v2_labeled.mat"
        raise OptionError(f"data.folder: {str(folder)!r} has no folder train/image, expected MTAN's layout{hint}")
    folders = {task: MTAN_FOLDERS[task] for task in options.dense_tasks(TASKS)}
    train, test = (
        mtan_part(folder / part, folders, len(CLASSES_13), options.size, options.allow_missing)
        for part in ("train", "val")
    )
    counts = len(train.names), len(test.names)
    if counts != (NUM_TRAIN, NUM_TEST):
        logger.warning(
            "%s: %d training and %d test images of NYUv2's %d and %d: results do not compare with those of the whole "
            "set", folder, *counts, NUM_TRAIN, NUM_TEST,
        )  # fmt: skip
    facts = DenseFacts("nyuv2", TASKS, CLASSES_13, published=True, batch_size=2, depth_unit="m")
    return dense_task_data(options, facts, train, test)


SPEC = DataSetSpec(options=Nyuv2Options, load=load_nyuv2, model_needs={"image_labels": "image_tasks"})
