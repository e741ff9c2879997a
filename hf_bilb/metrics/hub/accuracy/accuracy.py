"""Accuracy, as a module of the library `evaluate`."""

from hf_bilb.metrics.classification import accuracy
from hf_bilb.metrics.hub.factory import metric_class
from hf_bilb.metrics.hub.info import SCIKIT_LEARN

Accuracy = metric_class(
    "accuracy",
    accuracy,
    module=__name__,
    description="Share of examples whose class was predicted; NaN without any label.",
    citation=SCIKIT_LEARN,
    inputs="""
Args:
    predictions: predicted class indices.
    references: class indices, NaN or -100 where missing.

Returns:
    accuracy: a number in [0, 1].

Example:
    >>> hf_bilb.metrics.load("accuracy").compute(predictions=[0, 1, 1, 0], references=[0, 1, 0, 0])
    {'accuracy': 0.75}
""",
    urls=["https://scikit-learn.org/stable/modules/generated/sklearn.metrics.accuracy_score.html"],
)
