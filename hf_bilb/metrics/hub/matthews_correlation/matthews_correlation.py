"""Matthews' correlation coefficient, as a module of the library `evaluate`."""

from hf_bilb.metrics.classification import matthews_correlation
from hf_bilb.metrics.hub.factory import metric_class

_CITATION = r"""
@article{gorodkin2004comparing,
  title={Comparing two {K}-category assignments by a {K}-category correlation coefficient},
  author={Gorodkin, Jan},
  journal={Computational Biology and Chemistry},
  volume={28},
  number={5--6},
  pages={367--374},
  year={2004}
}
"""

MatthewsCorrelation = metric_class(
    "matthews_correlation",
    matthews_correlation,
    module=__name__,
    description=(
        "Correlation of predicted and actual classes, two or more; 0.0 where either is one class, NaN without labels."
    ),
    citation=_CITATION,
    inputs="""
Args:
    predictions: predicted class indices.
    references: class indices, NaN or -100 where missing.

Returns:
    matthews_correlation: a number in [-1, 1].

Example:
    >>> hf_bilb.metrics.load("matthews_correlation").compute(predictions=[0, 1, 1, 0], references=[0, 1, 0, 0])
    {'matthews_correlation': 0.5773502691896258}
""",
    urls=["https://scikit-learn.org/stable/modules/generated/sklearn.metrics.matthews_corrcoef.html"],
)
