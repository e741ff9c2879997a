"""Pearson's correlation coefficient, as a module of the library `evaluate`."""

import datasets
import evaluate

from hf_bilb.metrics.correlation import pearson

_DESCRIPTION = (
    "Pearson's correlation of predictions and references; 0.0 where either is constant, NaN without any label."
)

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

_INPUTS = """
Args:
    predictions: predicted values.
    references: values, NaN where missing.

Returns:
    pearson: a number in [-1, 1].

Example:
    >>> hf_bilb.metrics.load("pearson").compute(predictions=[1.0, 2.0, 4.0], references=[1.0, 2.5, 3.0])
    {'pearson': 0.8910421112136306}
"""


class Pearson(evaluate.Metric):
    """`hf_bilb.metrics.correlation.pearson` on what was added."""

    def _info(self) -> evaluate.MetricInfo:
        # One type for both: integers would cut 0.7 down to class 0, and have no NaN. And no format="numpy": that hands
        # over float32.
        number = datasets.Value("float64")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": number, "references": number}),
            reference_urls=["https://docs.scipy.org/doc/scipy/reference/generated/scipy.stats.pearsonr.html"],
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        return {"pearson": pearson(predictions, references)}
