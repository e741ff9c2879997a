"""Delta_m, as a module of the library `evaluate`."""

from collections.abc import Sequence

from hf_bilb.metrics.delta_m import delta_m, grouped_delta_m
from hf_bilb.metrics.hub.factory import metric_class
from hf_bilb.metrics.hub.info import FAMO

_MANINIS = r"""
@inproceedings{maninis2019attentive,
  title={Attentive single-tasking of multiple tasks},
  author={Maninis, Kevis-Kokitsi and Radosavovic, Ilija and Kokkinos, Iasonas},
  booktitle={IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  pages={1851--1860},
  year={2019}
}
"""


def _flat_or_grouped(
    predictions: list[float],
    references: list[float],
    higher_is_better: Sequence[bool],
    groups: Sequence[str] | None = None,
) -> float:
    if groups is None:
        return delta_m(predictions, references, higher_is_better)
    return grouped_delta_m(predictions, references, higher_is_better, groups)


DeltaM = metric_class(
    "delta_m",
    _flat_or_grouped,
    module=__name__,
    description=(
        "Mean relative change of a multi-task model's metrics against models trained on one task each, in percent; "
        "lower is better, below 0 is better than they are."
    ),
    citation=_MANINIS + FAMO.lstrip(),
    inputs="""
Args:
    predictions: the multi-task model's M metrics.
    references: the same of models trained on one task each, in the same units and above 0.
    higher_is_better: M of True or False.
    groups: M labels; metrics with equal ones are averaged first and count once. None: a flat mean over the M metrics.

Returns:
    delta_m: percent.

Example:
    >>> hf_bilb.metrics.load("delta_m").compute(
    ...     predictions=[0.5, 30.0], references=[0.4, 25.0], higher_is_better=[True, False]
    ... )
    {'delta_m': -2.5}
""",
    urls=["https://arxiv.org/abs/1904.08918", "https://arxiv.org/abs/2306.03792"],
)
