"""QM9's tasks: the eleven targets of the multi-task papers, their units, errors and single-task base.

Shared by the data sets `qm9` (descriptors) and `qm9_graphs`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from hf_bilb.data.inputs.format import DataFormat
from hf_bilb.data.inputs.kinds import NoInputs
from hf_bilb.data.task_data import DELTA_M_INFO, MetricInfo, Standardizer
from hf_bilb.losses.task_types import TaskType
from hf_bilb.metrics.delta_m import DELTA_M, delta_m
from hf_bilb.metrics.regression import mean_absolute_error

if TYPE_CHECKING:
    from transformers import EvalPrediction

MILLIELECTRONVOLT = 27.211386246 * 1000  # per Hartree, CODATA 2018
SINGLE_TASK_SOURCE = "published single-task models (Nash-MTL, ICML 2022; also of FAMO and LDC-MTL), 300 epochs of MPNN"
_NEEDS_COORDINATES = "the model reads molecules with the coordinates of their atoms, which no SMILES has"


@dataclass(frozen=True)
class Target:
    """A task: its name, its unit, the column of the files that holds it and the factor from there to the unit.

    Attributes:
        base: mean absolute error of the papers' single-task model, in the unit.
        atoms: energies of the free atoms H, C, N, O, F in Hartree (the release's `atomref.txt`) that are subtracted.
        group: targets of one group are nearly equivalent; empty for a target that stands alone.
    """

    name: str
    unit: str
    column: str
    base: float
    factor: float = 1.0
    atoms: tuple[float, float, float, float, float] = (0.0, 0.0, 0.0, 0.0, 0.0)
    group: str = ""

    @property
    def metric(self) -> MetricInfo:
        """Its mean absolute error."""
        return MetricInfo(f"mae_{self.name}", self.name, "MAE", self.unit, higher_is_better=False)


TARGETS = (
    Target("mu", "D", "Dipole_debye", 0.0671),
    Target("alpha", "bohr^3", "Polarizability_bohr3", 0.1814),
    Target("homo", "meV", "HOMO_au", 60.576, MILLIELECTRONVOLT),
    Target("lumo", "meV", "LUMO_au", 53.915, MILLIELECTRONVOLT),
    Target("r2", "bohr^2", "R2_bohr2", 0.5027),
    Target("zpve", "meV", "ZPVE_au", 4.539, MILLIELECTRONVOLT),
    Target(
        "U0", "meV", "InternalEnergy_0K_au", 58.838, MILLIELECTRONVOLT,
        (-0.500273, -37.846772, -54.583861, -75.064579, -99.718730), "energy",
    ),
    Target(
        "U", "meV", "InternalEnergy_298K_au", 64.244, MILLIELECTRONVOLT,
        (-0.498857, -37.845355, -54.582445, -75.063163, -99.717314), "energy",
    ),
    Target(
        "H", "meV", "Enthalphy_298K_au", 63.852, MILLIELECTRONVOLT,
        (-0.497912, -37.844411, -54.581501, -75.062219, -99.716370), "energy",
    ),
    Target(
        "G", "meV", "GibbsFreeEnergy_298K_au", 66.223, MILLIELECTRONVOLT,
        (-0.510927, -37.861317, -54.598897, -75.079532, -99.733544), "energy",
    ),
    Target("Cv", "cal/(mol K)", "Heatcapacity_Cv_cal_mol_K", 0.07212),
)  # fmt: skip
TARGET_NAMES = tuple(target.name for target in TARGETS)


@dataclass(frozen=True)
class Tasks:
    """The chosen targets, with their statistics over the training molecules.

    Attributes:
        targets: K of `TARGETS`, in the order of the loss vector.
        values: `[N, K]` of all molecules, in the targets' units.
        scale: means and deviations over the training molecules.
    """

    targets: tuple[Target, ...]
    values: NDArray[np.float64]
    scale: Standardizer

    @classmethod
    def choose(cls, names: Sequence[str] | None, values: NDArray[np.float64], train: NDArray[np.int64]) -> Tasks:
        """The targets of these names (None: all), of `values [N, 11]`, with the statistics of the rows `train`."""
        of_name = {target.name: (target, column) for column, target in enumerate(TARGETS)}
        chosen = [of_name[name] for name in (of_name if names is None else names)]
        columns = values[:, [column for _, column in chosen]]
        return cls(tuple(target for target, _ in chosen), columns, Standardizer.fit(columns[train]))

    def labels(self, rows: NDArray[np.int64]) -> torch.Tensor:
        """`[N, K]` float32: mean 0 and deviation 1 over the training molecules."""
        return self.scale.tensor(self.values[rows])

    def errors(self, predictions: NDArray[np.floating], labels: NDArray[np.floating]) -> dict[str, float]:
        """Standardised `[N, K]` -> mean absolute errors in the papers' units, and Delta_m of them."""
        # |a s - b s| = |a - b| s: no need to bring predictions and labels back to their units first.
        values = mean_absolute_error(predictions, labels) * self.scale.stds
        found = {target.metric.key: float(value) for target, value in zip(self.targets, values, strict=True)}
        base = [target.base for target in self.targets]
        return {**found, DELTA_M: delta_m(values.tolist(), base, [False] * len(base))}

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """For the Trainer."""
        return self.errors(prediction.predictions, prediction.label_ids)

    def task_data(self, test_labels: torch.Tensor) -> Mapping[str, Any]:
        """What `TaskData` says about tasks, labels and metrics."""
        labels = test_labels.numpy()
        return {
            "task_names": tuple(target.name for target in self.targets),
            "label_names": ("labels",),
            "compute_metrics": self.compute_metrics,
            "metrics": (*(target.metric for target in self.targets), DELTA_M_INFO),
            # the training mean is 0 after standardising
            "trivial_metrics": self.errors(np.zeros_like(labels), labels),
            "single_task_base": {target.metric.key: target.base for target in self.targets},
            "single_task_source": SINGLE_TASK_SOURCE,
            "format": DataFormat(NoInputs(_NEEDS_COORDINATES), self.task_types()),
            "task_groups": {target.name: target.group for target in self.targets if target.group},
        }

    def task_types(self) -> dict[str, TaskType]:
        """Target -> its unit and scale."""
        scales = zip(self.targets, self.scale.means.tolist(), self.scale.stds.tolist(), strict=True)
        return {t.name: TaskType("regression", unit=t.unit, means=(mean,), stds=(std,)) for t, mean, std in scales}

    def model_arguments(self) -> dict[str, Any]:
        """Names and scales of the labels."""
        return {
            "task_names": [target.name for target in self.targets],
            "label_means": self.scale.means.tolist(),
            "label_stds": self.scale.stds.tolist(),
        }
