"""Balanced weights of classes are scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_bilb.errors import OptionError
from hf_bilb.losses.class_weights import balanced_class_weights

sklearn = pytest.importorskip("sklearn.utils.class_weight", reason="the reference is scikit-learn")


def test_weights_are_those_of_scikit_learn() -> None:
    labels = np.array([0, 1, 1, 2, 2, 2, 2, 1])
    expected = sklearn.compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert balanced_class_weights(labels, 3) == pytest.approx(expected.tolist(), rel=1e-15)
    with_gaps = [0.0, 1, float("nan"), 1, 2, 2, -100, 2, 2, 1]
    assert balanced_class_weights(torch.tensor(with_gaps), 3) == balanced_class_weights(labels, 3)
    assert balanced_class_weights(labels.reshape(2, 4).tolist(), 3) == balanced_class_weights(labels, 3)


def test_what_has_no_weight() -> None:
    with pytest.raises(OptionError, match=r"^class_weights: class 1 has no label"):
        balanced_class_weights([0, 0, 2], 3)
    with pytest.raises(OptionError, match=r"^class_weights: class 'sport' has no label"):
        balanced_class_weights([0, 0, 2], 3, names=("news", "sport", "arts"))
    with pytest.raises(OptionError, match=r"^class_weights: label 3 is no class, expected 0 to 2$"):
        balanced_class_weights([0, 1, 2, 3], 3)
    with pytest.raises(OptionError, match=r"^class_weights: label 0\.5 is no class, expected 0 to 1$"):
        balanced_class_weights([0, 1, 0.5], 2)
