"""Area under the ROC curve, as a module of the library `evaluate`."""

from hf_bilb.metrics.hub.factory import metric_class
from hf_bilb.metrics.roc_auc import roc_auc

_CITATION = r"""
@article{hanley1982meaning,
  title={The meaning and use of the area under a receiver operating characteristic ({ROC}) curve},
  author={Hanley, James A. and McNeil, Barbara J.},
  journal={Radiology},
  volume={143},
  number={1},
  pages={29--36},
  year={1982}
}
"""

RocAuc = metric_class(
    "roc_auc",
    roc_auc,
    module=__name__,
    description=(
        "Share of the pairs of a positive and a negative example that the scores put in order, ties counting half; NaN "
        "where there are not both classes."
    ),
    citation=_CITATION,
    inputs="""
Args:
    predictions: scores that rise with the positive class: logits, probabilities.
    references: 0 or 1, NaN or -100 where missing.

Returns:
    roc_auc: a number in [0, 1].

Example:
    >>> hf_bilb.metrics.load("roc_auc").compute(predictions=[0.1, 0.4, 0.35, 0.8], references=[0, 0, 1, 1])
    {'roc_auc': 0.75}
""",
    urls=["https://scikit-learn.org/stable/modules/generated/sklearn.metrics.roc_auc_score.html"],
)
