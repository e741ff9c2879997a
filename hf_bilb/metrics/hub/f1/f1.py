"""F1, as a module of the library `evaluate`."""

from hf_bilb.metrics.classification import f1_score
from hf_bilb.metrics.hub.factory import metric_class
from hf_bilb.metrics.hub.info import SCIKIT_LEARN

F1 = metric_class(
    "f1",
    f1_score,
    module=__name__,
    description=(
        "Harmonic mean of precision and recall; 0.0 for a class neither there nor predicted, NaN without any label."
    ),
    citation=SCIKIT_LEARN,
    inputs="""
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
""",
    urls=["https://scikit-learn.org/stable/modules/generated/sklearn.metrics.f1_score.html"],
)
