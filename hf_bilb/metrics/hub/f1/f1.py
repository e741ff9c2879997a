"""F1, as a module of the library `evaluate`."""

import evaluate

from hf_bilb.metrics.classification import Average, f1_score
from hf_bilb.metrics.hub_info import info_of_pairs

_DESCRIPTION = (
    "Harmonic mean of precision and recall; 0.0 for a class neither there nor predicted, NaN without any label."
)

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
    average: "binary" (the default), of the class `pos_label` against all others, or "macro", the mean over the classes.
    pos_label: the class that "binary" is about, by default 1.

Returns:
    f1: a number in [0, 1].

Example:
    >>> hf_bilb.metrics.load("f1").compute(predictions=[0, 1, 1, 0], references=[0, 1, 0, 0])
    {'f1': 0.6666666666666666}
"""


class F1(evaluate.Metric):
    """`hf_bilb.metrics.classification.f1_score` on what was added."""

    def _info(self) -> evaluate.MetricInfo:
        return info_of_pairs(
            _DESCRIPTION,
            _CITATION,
            _INPUTS,
            ["https://scikit-learn.org/stable/modules/generated/sklearn.metrics.f1_score.html"],
        )

    def _compute(
        self,
        predictions: list[float],
        references: list[float],
        average: Average = "binary",
        pos_label: int = 1,
    ) -> dict[str, float]:
        return {"f1": f1_score(predictions, references, average, pos_label)}
