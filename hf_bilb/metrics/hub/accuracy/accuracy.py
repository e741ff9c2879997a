"""Accuracy, as a module of the library `evaluate`."""

import evaluate

from hf_bilb.metrics.classification import accuracy
from hf_bilb.metrics.hub_info import info_of_pairs

_DESCRIPTION = "Share of examples whose class was predicted; NaN without any label."

_CITATION = r"""
@article{scikit-learn,
  title={Scikit-learn: Machine Learning in {P}ython},
  author={Pedregosa, F. and Varoquaux, G. and Gramfort, A. and Michel, V. and Thirion, B. and Grisel, O. and
          Blondel, M. and Prettenhofer, P. and Weiss, R. and Dubourg, V. and Vanderplas, J. and Passos, A. and
          Cournapeau, D. and Brucher, M. and Perrot, M. and Duchesnay, E.},
  journal={Journal of Machine Learning Research},
  volume={12},
  pages={2825--2830},
  year={2011}
}
"""

_INPUTS = """
Args:
    predictions: predicted class indices.
    references: class indices, NaN or -100 where missing.

Returns:
    accuracy: a number in [0, 1].

Example:
    >>> hf_bilb.metrics.load("accuracy").compute(predictions=[0, 1, 1, 0], references=[0, 1, 0, 0])
    {'accuracy': 0.75}
"""


class Accuracy(evaluate.Metric):
    """`hf_bilb.metrics.classification.accuracy` on what was added."""

    def _info(self) -> evaluate.MetricInfo:
        return info_of_pairs(
            _DESCRIPTION,
            _CITATION,
            _INPUTS,
            ["https://scikit-learn.org/stable/modules/generated/sklearn.metrics.accuracy_score.html"],
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        return {"accuracy": accuracy(predictions, references)}
