"""Delta_m, as a module of the library `evaluate`."""

from collections.abc import Sequence

import evaluate

from hf_bilb.metrics.hub_info import info_of_pairs
from hf_bilb.metrics.multi_task import DELTA_M, delta_m, grouped_delta_m

_DESCRIPTION = (
    "Mean relative change of a multi-task model's metrics against models trained on one task each, in percent; lower "
    "is better, below 0 is better than they are."
)

_CITATION = r"""
@inproceedings{maninis2019attentive,
  title={Attentive single-tasking of multiple tasks},
  author={Maninis, Kevis-Kokitsi and Radosavovic, Ilija and Kokkinos, Iasonas},
  booktitle={IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  pages={1851--1860},
  year={2019}
}
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
"""


class DeltaM(evaluate.Metric):
    """`hf_bilb.metrics.multi_task.delta_m`, or with groups `grouped_delta_m`, on what was added."""

    def _info(self) -> evaluate.MetricInfo:
        return info_of_pairs(
            _DESCRIPTION, _CITATION, _INPUTS, ["https://arxiv.org/abs/1904.08918", "https://arxiv.org/abs/2306.03792"]
        )

    def _compute(
        self,
        predictions: list[float],
        references: list[float],
        higher_is_better: Sequence[bool],
        groups: Sequence[str] | None = None,
    ) -> dict[str, float]:
        if groups is None:
            return {DELTA_M: delta_m(predictions, references, higher_is_better)}
        return {DELTA_M: grouped_delta_m(predictions, references, higher_is_better, groups)}
