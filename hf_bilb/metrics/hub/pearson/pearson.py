"""Pearson's correlation coefficient, as a module of the library `evaluate`."""

from hf_bilb.metrics.correlation import pearson
from hf_bilb.metrics.hub.factory import metric_class

_CITATION = r"""
@article{pearson1895note,
  title={Note on regression and inheritance in the case of two parents},
  author={Pearson, Karl},
  journal={Proceedings of the Royal Society of London},
  volume={58},
  pages={240--242},
  year={1895}
}
"""

Pearson = metric_class(
    "pearson",
    pearson,
    module=__name__,
    description=(
        "Pearson's correlation of predictions and references; 0.0 where either is constant, NaN without any label."
    ),
    citation=_CITATION,
    inputs="""
Args:
    predictions: predicted values.
    references: values, NaN where missing.

Returns:
    pearson: a number in [-1, 1].

Example:
    >>> hf_bilb.metrics.load("pearson").compute(predictions=[1.0, 2.0, 4.0], references=[1.0, 2.5, 3.0])
    {'pearson': 0.8910421112136306}
""",
    urls=["https://docs.scipy.org/doc/scipy/reference/generated/scipy.stats.pearsonr.html"],
)
