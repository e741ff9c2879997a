"""Dense prediction: images with pixelwise labels of up to three tasks, and classes of whole images, in batches.

A batch has the columns `pixel_values [B, 3, H, W]` (float32 in [0, 1], RGB) and those of the tasks, in their order:
`segmentation [B, H, W]` (int64, -1: not labelled), `depth [B, H, W]` (float32, 0: not measured), `normals [B, 3, H, W]`
(float32, zero vector: not known). An image without labels of a task has such pixels alone there. With image-level
tasks (`hf_bilb.data.dense.image_labels`) `image_labels [B, M]` comes last: int64, a column for each of them in their
order, -1 where missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_bilb.data.dense.augmentation import View, draw_view
from hf_bilb.data.dense.files import IMAGE
from hf_bilb.data.rows import MappedRows
from hf_bilb.losses.dense import IMAGE_LABELS


class DenseRows(MappedRows):
    """Images and pixelwise labels in memory-mapped files.

    `rows[i]` is a dict of the columns above without B. Use `collate_images` with it.

    Augmented, a row is a pure function of (seed, epoch, number of the image in the files): it depends neither on the
    order of the rows, nor on workers, nor on which rows are chosen, nor on where a run was resumed.

    The epoch lies in shared memory, so that workers that live through several epochs see each new one.

    Args:
        files: `image` and the tasks -> `.npy` file with all images of the part (`hf_bilb.data.dense.files`); the order
            of the tasks is that of the columns.
        rows: `[N]`, which of the images, in the order of this set.
        augmentation_seed: None for no augmentation.
        inverse_depth: the augmentation multiplies `depth` by the scale, as 1 / depth or a disparity wants it, instead
            of dividing.
        image_labels: `[.., M]`, the classes of whole images, for each image in the files; None: no such column.

    Cost of an image of 288 x 384 with three labels, in a batch of 8 and on one core: 0.2 ms, augmented 1.4 ms; loading
    its four files with `np.load` 1.0 ms, and 2.6 ms (`benchmarks/dense_loading.py` measures it).
    """

    def __init__(
        self,
        files: Mapping[str, Path],
        rows: NDArray[np.int64],
        augmentation_seed: int | None = None,
        inverse_depth: bool = False,
        image_labels: NDArray[np.int64] | None = None,
    ) -> None:
        super().__init__(files, rows)
        self.augmentation_seed = augmentation_seed
        self.inverse_depth = inverse_depth
        self.image_labels = image_labels
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self.size: tuple[int, int] = self._arrays[IMAGE].shape[-2:]

    def set_epoch(self, epoch: int) -> None:
        """Rows that are asked for from now on, in whichever process, are those of this epoch."""
        self._epoch.fill_(epoch)

    def _batch(self, places: Sequence[int] | NDArray[np.int64]) -> dict[str, Tensor]:
        rows = self.rows[np.asarray(places)]
        if self.augmentation_seed is None:
            found = {name: torch.from_numpy(array[rows]) for name, array in self._arrays.items()}
        else:
            epoch, seed = int(self._epoch), self.augmentation_seed
            views = [draw_view(seed, epoch, row, self.size) for row in rows.tolist()]
            found = {name: self._seen(name, rows, views) for name in self._arrays}
        pixels = found.pop(IMAGE)
        as_bytes = self._arrays[IMAGE].dtype == np.uint8
        batch = {"pixel_values": pixels.float().div_(255) if as_bytes else pixels}
        batch.update({name: column.long() if name == "segmentation" else column for name, column in found.items()})
        if self.image_labels is not None:
            batch[IMAGE_LABELS] = torch.from_numpy(self.image_labels[rows])
        return batch

    def _seen(self, name: str, rows: NDArray[np.int64], views: Sequence[View]) -> Tensor:
        """A column `[B, ...]` of the images as the views show them."""
        array = self._arrays[name]
        batch = np.empty((len(rows), *array.shape[1:]), np.float32 if name == IMAGE else array.dtype)
        for place, row, view in zip(batch, rows, views, strict=True):
            if name == IMAGE:
                view.image(array[row], place)
            elif name == "depth":
                view.depth(array[row], place, self.inverse_depth)
            else:
                (view.normals if name == "normals" else view.nearest)(array[row], place)
        return torch.from_numpy(batch)
