"""Mean absolute error, as a module of the library `evaluate`."""

import evaluate
import numpy as np

from hf_bilb.metrics.hub_info import info_of_pairs
from hf_bilb.metrics.regression import mean_absolute_error

_DESCRIPTION = "Mean of |prediction - reference|; NaN without any label."

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
    predictions: predicted values.
    references: values, NaN where missing.

Returns:
    mean_absolute_error: a number from 0, in the units of the predictions; lower is better.

Example:
    >>> hf_bilb.metrics.load("mean_absolute_error").compute(predictions=[1.0, 2.0, 4.0], references=[1.0, 2.5, 3.0])
    {'mean_absolute_error': 0.5}
"""


class MeanAbsoluteError(evaluate.Metric):
    """`hf_bilb.metrics.regression.mean_absolute_error` on what was added."""

    def _info(self) -> evaluate.MetricInfo:
        return info_of_pairs(
            _DESCRIPTION,
            _CITATION,
            _INPUTS,
            ["https://scikit-learn.org/stable/modules/generated/sklearn.metrics.mean_absolute_error.html"],
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        errors = mean_absolute_error(np.array([predictions]).T, np.array([references]).T)
        return {"mean_absolute_error": float(errors[0])}
