"""What is known about NYU Depth V2's labels and its split, as data.

894 -> 40 classes: Gupta, Arbelaez, Malik, CVPR 2013 (`classMapping40.mat`); 40 -> 13: Couprie, Farabet, Najman, LeCun,
ICLR 2013 (`class13Mapping.mat`); the split: Silberman et al., ECCV 2012 (`splits.mat` of the official page).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NUM_IMAGES, NUM_RAW_CLASSES = 1449, 894

CLASSES_13 = (
    "bed", "books", "ceiling", "chair", "floor", "furniture", "objects", "picture", "sofa", "table", "tv", "wall",
    "window",
)  # fmt: skip

# Official class 1 to 894 -> one of the 40, a digit each: 1 to 9, then a to z, A (36) to E (40).
_OF_40 = (
    "EE3m5EcCEE2DEEqEoE7E1EEyCtE8EEEECEEeECEEEfDEuEEDEDCECEBECC9EECEbCEEEEEEEEEEEEECdEE6EnEDagEEEECEEEEEEEEECEDEEEE"
    "DCEEEEEEiEEjsxEEEEEEEEECrAEEEElEkzEEEEEEEECEEE4wEEDEDEEEEEhEEpEDEEEEEEEEDEEEEEEEEEEEEEEEEEEEEDEEEEEEEEEDCCEEDE"
    "DECDCEEEEEEEEEEDECEECCEEEEEEEEEEEEECEEEEEDEEEEEEEEEEEEEEEDEEEEEEEEEEEEDEEECEEDEECEEEEEEEEEEEDEEEEEEEEEEEEEEEEE"
    "vEEEEEEECEECDDEEEEEEEEECEDEEDEEECEEEEEEEECDEEEEEECEEEEEEEEEEECDEEEEEEEDEEEEEECEEECEDEEEDDEEEEEEEEEEDEEEEEEEEEE"
    "EEDDEEDDEEEECEECDDEDEDCEEEEEEEEEEEDECEDEEEEEDDEEEEEEDDEECDDEEEEEEEEEDDEEEEDEEEEEDEEDEEEEEEEEEEEEEEEDCEEEEEEEDC"
    "DECDEDEDEEEEEEEECEEEEECEEDEEEDECEEEEEEEECEEEEEEEEEEEEEEEEDCEECEECEEEEEEEEEDEEEEEEEEEEEEEEEECEECEEEEEEEEEEECCCE"
    "EECEEECCEEEEEEEEEEEEEEEEECEEEEEEEEEEEEECECDEEEEEEEEEEEEEEEEEEEEEEEEEEEEEEDEEEEEEEEEEEEEEEEEEEEEEEEEEEEEEEEEEED"
    "EDEEEECCEEECEEEEEEEEEEEEEEDEEDEEDDEEEEEEEEDDDEEEEDEEEEEEEEDEEEEEDEEEEEEEEEEEEEECEEEEEEEDEECEDEEEECEEEEECEEEEEE"
    "EDEEEEEEEEEDEE"
)
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyzABCDE"

# One of the 40, from 1 -> one of the 13, from 1.
_OF_13 = (
    12, 5, 6, 1, 4, 9, 10, 12, 13, 6, 8, 6, 13, 10, 6, 13, 6, 7, 7, 5,
    7, 3, 2, 6, 11, 7, 7, 7, 7, 7, 7, 6, 7, 7, 7, 7, 7, 7, 6, 7,
)  # fmt: skip

# A bit for each image in the official order, 1 where it is a test image; three bits more at the end.
_TEST_IMAGES = (
    "c087c81fffe601be001e1fe000000e0fbc8000e003bf1fffffc3f01c00000040010383f801fc07380ffe00033ff00001fc38003c0007e0"
    "ff0007cff80000001fbffc38e00e3fffe03e03c03e18f800fc1861c31f9f87cce07f8c1f3c030003ffffffe001f07c0e00fffc70fc0e00"
    "000000700e071e00e003ce7f8003e0f0700e01c60198c0003ff1ff7f780e3fe301fffc7e673f01f0fff1f07ce003c7ff803f0ffee7f060"
    "00f3f038f0198001fe7f83fc0f0780ff8"
)


def classes_40() -> NDArray[np.int8]:
    """`[895]`: official label (0: not labelled) -> 0 to 39, or -1."""
    return np.array([0, *(_DIGITS.index(digit) for digit in _OF_40)], np.int8) - np.int8(1)


def classes_13() -> NDArray[np.int8]:
    """`[895]`: official label (0: not labelled) -> position in `CLASSES_13`, or -1."""
    of_40 = np.array([0, *_OF_13], np.int8)
    return (of_40[classes_40() + 1] - 1).astype(np.int8)


def official_split() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions, from 0, of the 795 training and the 654 test images."""
    is_test = np.unpackbits(np.frombuffer(bytes.fromhex(_TEST_IMAGES + "0"), np.uint8))[:NUM_IMAGES]
    return np.flatnonzero(is_test == 0), np.flatnonzero(is_test == 1)
