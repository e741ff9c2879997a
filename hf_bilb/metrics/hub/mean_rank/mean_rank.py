"""Mean rank among methods, as a module of the library `evaluate`."""

from collections.abc import Sequence

from hf_bilb.metrics.delta_m import mean_rank
from hf_bilb.metrics.hub.factory import metric_class
from hf_bilb.metrics.hub.info import FAMO, LISTS


def _ranks(predictions: list[list[float]], higher_is_better: Sequence[bool]) -> list[float]:
    return mean_rank(predictions, higher_is_better).tolist()


MeanRank = metric_class(
    "mean_rank",
    _ranks,
    module=__name__,
    description=(
        "Each method's rank in each metric (1 + the number of methods that are strictly better), averaged over the "
        "metrics; 1 is best."
    ),
    citation=FAMO,
    inputs="""
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
""",
    urls=["https://arxiv.org/abs/2306.03792"],
    features=LISTS,
)
