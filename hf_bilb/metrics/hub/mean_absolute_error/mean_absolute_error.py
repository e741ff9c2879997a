"""Mean absolute error, as a module of the library `evaluate`."""

import numpy as np

from hf_bilb.metrics.hub.factory import metric_class
from hf_bilb.metrics.hub.info import SCIKIT_LEARN
from hf_bilb.metrics.regression import mean_absolute_error


def _of_one_task(predictions: list[float], references: list[float]) -> float:
    errors = mean_absolute_error(np.array([predictions]).T, np.array([references]).T)
    return float(errors[0])


MeanAbsoluteError = metric_class(
    "mean_absolute_error",
    _of_one_task,
    module=__name__,
    description="Mean of |prediction - reference|; NaN without any label.",
    citation=SCIKIT_LEARN,
    inputs="""
Args:
    predictions: predicted values.
    references: values, NaN where missing.

Returns:
    mean_absolute_error: a number from 0, in the units of the predictions; lower is better.

Example:
    >>> hf_bilb.metrics.load("mean_absolute_error").compute(predictions=[1.0, 2.0, 4.0], references=[1.0, 2.5, 3.0])
    {'mean_absolute_error': 0.5}
""",
    urls=["https://scikit-learn.org/stable/modules/generated/sklearn.metrics.mean_absolute_error.html"],
)
