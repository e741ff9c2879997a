"""Random scale-crop and mirroring of an image and its pixelwise labels, as a pure function of (seed, epoch, index).

What the multi-task papers do on NYUv2 and Cityscapes (MTAN's issue 34, then CAGrad, Nash-MTL, FAMO, LDC-MTL; the MTAN
paper itself had none): one of the scales 1, 1.2, 1.5, a crop of 1 / scale of height and width at a random place, blown
up to the full size; then mirrored left-right with probability 1/2.

* image: bilinear, corners aligned; classes, depth: nearest (source row = floor(row * crop height / height)).
* depth is divided by the scale: the image is that of a camera with `scale` times the focal length, and the scene is
  made smaller by it, so that objects have about the size that their depth suggests. Shrinking all of a scene keeps its
  normals: the three labels still describe one scene.
* normals: from the same pixel as the depth; x is negated when mirrored. The official code interpolates them bilinearly,
  which shortens them at edges and draws them towards the zero vectors of pixels that have none; ours stay unit vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

#: Of the papers.
SCALES = (1.0, 1.2, 1.5)


@dataclass(frozen=True)
class View:
    """What is seen of an image `[H, W]`: a part of it, blown up to its size, and perhaps mirrored.

    Its methods write what is seen into an array of the caller's (a place in a batch), and leave the input alone.

    Attributes:
        size: H and W.
        scale: how much it is blown up.
        top, left: first row and column of the part.
        height, width: of the part: H and W over the scale, rounded down.
        mirrored: left and right are exchanged.
    """

    size: tuple[int, int]
    scale: float
    top: int
    left: int
    height: int
    width: int
    mirrored: bool

    @property
    def whole(self) -> bool:
        """Nothing is cut off."""
        return (self.height, self.width) == self.size

    def image(self, pixels: NDArray[np.generic], out: NDArray[np.float32]) -> None:
        """`[C, H, W]`, uint8 or float32 -> `out [C, H, W]` in the units of the input, bilinear."""
        if self.whole:
            out[...] = pixels[:, :, ::-1] if self.mirrored else pixels
            return
        rows, between_rows = _smooth(self.height, self.size[0])
        columns, between_columns = _smooth(self.width, self.size[1])
        if self.mirrored:
            columns, between_columns = columns[::-1], between_columns[::-1].copy()
        columns = columns + self.left
        upper, lower = torch.from_numpy(rows), torch.from_numpy(rows + 1)
        down, across = torch.from_numpy(between_rows)[:, None], torch.from_numpy(between_columns)
        # First along the rows, of which there are fewer in the part. Half the time of torch's `interpolate`.
        for source, target in zip(pixels, out, strict=True):
            part = source[self.top : self.top + self.height].astype(np.float32, copy=False)
            left, right = (torch.from_numpy(part.take(places, axis=1)) for places in (columns, columns + 1))
            wide = torch.lerp(left, right, across)
            torch.lerp(wide.index_select(0, upper), wide.index_select(0, lower), down, out=torch.from_numpy(target))

    def nearest(self, values: NDArray[np.generic], out: NDArray[np.generic]) -> None:
        """`[..., H, W]` -> `out` of the same shape and type (contiguous), each pixel that of the input it falls on."""
        if self.whole:
            out[...] = values[..., ::-1] if self.mirrored else values
            return
        rows = np.arange(self.size[0]) * self.height // self.size[0]
        # In whole numbers: exact, where a product of floats may fall short of one.
        columns = self.left + np.arange(self.size[1]) * self.width // self.size[1]
        columns = columns[::-1] if self.mirrored else columns
        planes = (array.reshape(-1, *self.size) for array in (values, out))
        for source, target in zip(*planes, strict=True):
            wide = source[self.top : self.top + self.height].take(columns, axis=1)
            wide.take(rows, axis=0, out=target, mode="clip")  # the other modes go through a buffer

    def depth(self, values: NDArray[np.float32], out: NDArray[np.float32], inverse: bool = False) -> None:
        """Depths `[H, W]`, 0 where there is none, of the scene that is smaller by the scale; `inverse`: 1 / depth."""
        self.nearest(values, out)
        if self.scale != 1:
            (np.multiply if inverse else np.divide)(out, np.float32(self.scale), out=out)

    def normals(self, values: NDArray[np.float32], out: NDArray[np.float32]) -> None:
        """Unit vectors `[3, H, W]` (x to the right), the zero vector where there is none."""
        self.nearest(values, out)
        if self.mirrored:
            np.negative(out[0], out=out[0])


def _smooth(part: int, whole: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """For each of `whole` pixels the pixel of the part before it, and how far it is from there to the next one."""
    places = np.arange(whole) * ((part - 1) / (whole - 1))
    before = np.minimum(places.astype(np.int64), part - 2)
    return before, (places - before).astype(np.float32)


def draw_view(
    seed: int, epoch: int, index: int, size: tuple[int, int], scales: tuple[float, ...] = SCALES, mirror: bool = True
) -> View:
    """The view of image `index` in `epoch`: the same for the same arguments, on every machine and in every process.

    Counter-based (Philox-4x64 with key (seed, epoch), counter index), so there is no generator to advance: neither
    the order of the rows, nor workers, nor where a run was resumed play a role. 8 microseconds.

    Args:
        seed, epoch, index: not negative.
        size: height and width of the image.
        scales: equally likely, each at least 1.
        mirror: whether half of the images are mirrored.
    """
    key, counter = np.array([seed, epoch], np.uint64), np.array([0, index, 0, 0], np.uint64)
    words = np.random.Philox(key=key, counter=counter).random_raw(4).tolist()
    scale = scales[words[0] % len(scales)]
    height, width = int(size[0] / scale), int(size[1] / scale)
    return View(
        size=size,
        scale=scale,
        top=words[1] % (size[0] - height + 1),
        left=words[2] % (size[1] - width + 1),
        height=height,
        width=width,
        mirrored=mirror and words[3] % 2 == 1,
    )
