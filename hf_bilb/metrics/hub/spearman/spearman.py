"""Spearman's rank correlation, as a module of the library `evaluate`."""

from hf_bilb.metrics.correlation import spearman
from hf_bilb.metrics.hub.factory import metric_class

_CITATION = r"""
@article{spearman1904proof,
  title={The proof and measurement of association between two things},
  author={Spearman, Charles},
  journal={The American Journal of Psychology},
  volume={15},
  number={1},
  pages={72--101},
  year={1904}
}
"""

Spearman = metric_class(
    "spearman",
    spearman,
    module=__name__,
    description=(
        "Pearson's correlation of the ranks, ties sharing their mean; 0.0 where either is constant, NaN "
        "without any label."
    ),
    citation=_CITATION,
    inputs="""
Args:
    predictions: predicted values.
    references: values, NaN where missing.

Returns:
    spearman: a number in [-1, 1].

Example:
    >>> hf_bilb.metrics.load("spearman").compute(predictions=[1.0, 2.0, 4.0], references=[1.0, 2.5, 2.5])
    {'spearman': 0.8660254037844387}
""",
    urls=["https://docs.scipy.org/doc/scipy/reference/generated/scipy.stats.spearmanr.html"],
)
