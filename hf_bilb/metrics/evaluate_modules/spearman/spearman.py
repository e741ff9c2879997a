"""Spearman's rank correlation, as a module of the library `evaluate`."""

import datasets
import evaluate

from hf_bilb.metrics.correlation import spearman

_DESCRIPTION = (
    "Pearson's correlation of the ranks, ties sharing their mean; 0.0 where either is constant, NaN without any label."
)

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

_INPUTS = """
Args:
    predictions: predicted values.
    references: values, NaN where missing.

Returns:
    spearman: a number in [-1, 1].

Example:
    >>> hf_bilb.metrics.load("spearman").compute(predictions=[1.0, 2.0, 4.0], references=[1.0, 2.5, 2.5])
    {'spearman': 0.8660254037844387}
"""


class Spearman(evaluate.Metric):
    """`hf_bilb.metrics.correlation.spearman` on what was added."""

    def _info(self) -> evaluate.MetricInfo:
        # One type for both: integers would cut 0.7 down to class 0, and have no NaN. And no format="numpy": that hands
        # over float32.
        number = datasets.Value("float64")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": number, "references": number}),
            reference_urls=["https://docs.scipy.org/doc/scipy/reference/generated/scipy.stats.spearmanr.html"],
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        return {"spearman": spearman(predictions, references)}
