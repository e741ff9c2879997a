"""Maps of one image as colours: what a viewer of pictures shows of predictions."""

from __future__ import annotations

import colorsys
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from numpy.typing import NDArray

from hf_bilb.reporting.gallery import CLASS_COLOURS, DEPTH_COLOURS, normal_colours

_PALETTE = 256  # colours of a PNG
_BEYOND = 0.01  # share of the numbers beyond either end of the scale
_LOOKED_AT = 1000  # rows and columns of the pixels that the scale is taken from
_GOLDEN = 0.618034  # of a turn: hues that follow each other differ


def class_palette() -> list[int]:
    """Red, green and blue of 256 classes, one after the other: those of the gallery, then hues of one saturation."""
    more = [colorsys.hsv_to_rgb(number * _GOLDEN % 1, 0.55, 0.9) for number in range(_PALETTE - len(CLASS_COLOURS))]
    return [round(255 * part) for colour in (*map(to_rgb, CLASS_COLOURS), *more) for part in colour]


def number_picture(values: NDArray[Any]) -> NDArray[np.uint8]:
    """`[H, W]` numbers -> `[H, W, 3]` colours, from the least to the largest but for a hundredth at either end."""
    steps = [max(1, -(-length // _LOOKED_AT)) for length in values.shape]
    looked_at = values[:: steps[0], :: steps[1]]
    known = looked_at[np.isfinite(looked_at)]
    low, high = np.quantile(known, (_BEYOND, 1 - _BEYOND)) if known.size else (0.0, 0.0)
    scaled = (np.nan_to_num(values) - low) / (high - low if high > low else 1.0)
    return _bytes(colormaps[DEPTH_COLOURS](np.clip(scaled, 0, 1))[..., :3])


def direction_picture(vectors: NDArray[Any]) -> NDArray[np.uint8]:
    """`[3, H, W]` vectors -> `[H, W, 3]` colours, as in the gallery."""
    return _bytes(normal_colours(vectors))


def _bytes(colours: NDArray[np.float64]) -> NDArray[np.uint8]:
    return np.round(255 * colours).astype(np.uint8)
