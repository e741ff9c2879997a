"""Mean rank among methods, as a module of the library `evaluate`."""

from collections.abc import Sequence

import datasets
import evaluate

from hf_bilb.metrics.multi_task import mean_rank

_DESCRIPTION = (
    "Each method's rank in each metric (1 + the number of methods that are strictly better), averaged over the "
    "metrics; 1 is best."
)

_CITATION = r"""
@article{liu2023famo,
  title={{FAMO}: Fast adaptive multitask optimization},
  author={Liu, Bo and Feng, Yihao and Stone, Peter and Liu, Qiang},
  journal={Advances in Neural Information Processing Systems},
  volume={36},
  year={2023}
}
"""

_INPUTS = """
Args:
    predictions: for each of R methods a list of its M metrics.
    higher_is_better: M of True or False.

Returns:
    mean_rank: R numbers from 1 to R, in the order of the methods.

Example:
    >>> hf_bilb.metrics.load("mean_rank").compute(
    ...     predictions=[[0.5, 30.0], [0.6, 30.0], [0.4, 20.0]], higher_is_better=[True, False]
    ... )
    {'mean_rank': [2.0, 1.5, 2.0]}
"""


class MeanRank(evaluate.Metric):
    """`hf_bilb.metrics.multi_task.mean_rank` on what was added."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("float64"))}),
            reference_urls=["https://arxiv.org/abs/2306.03792"],
        )

    def _compute(self, predictions: list[list[float]], higher_is_better: Sequence[bool]) -> dict[str, list[float]]:
        return {"mean_rank": mean_rank(predictions, higher_is_better).tolist()}
