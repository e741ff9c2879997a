"""How the gradients of the tasks go together, measured while any method trains.

Every n updates the update's micro-batches are run once more, with the same dropout masks, before the parameters move.
The gradients of the K losses, of the whole accumulation window and of all ranks, with respect to the shared parameters
are compared. Training goes on as without it, bit for bit.
"""

from __future__ import annotations

import json
import math
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_bilb.config.options import bounded, check_bounds
from hf_bilb.engine.gradient_look import GradientLook, GradientReport
from hf_bilb.errors import OptionError
from hf_bilb.trainer.running_log import MAX_TASKS_IN_LOG, truncate_vectors

if TYPE_CHECKING:
    from hf_bilb.trainer.trainer import BilevelMTLTrainer

#: In the run's folder: one line for each look.
GRADIENTS_FILE = "gradients.jsonl"
#: Above this many tasks the log holds no single pairs.
MAX_TASKS_IN_PAIRS = 8


@dataclass(frozen=True, kw_only=True)
class GradientLookOptions:
    """`diagnostics.gradients` of the training arguments.

    Attributes:
        every_n_steps: updates between two looks; the first one is at the first update.
        parameters: names of the parameters whose gradients are compared, or patterns with `*`; null: all that more than
            one task's loss reaches.
    """

    every_n_steps: int = bounded(100, at_least=1)
    parameters: list[str] | None = None

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.parameters is not None and not self.parameters:
            raise OptionError("parameters: [] is not valid, expected names or patterns, or null")


class GradientDiagnostics(TrainerCallback):
    """Logs norms and cosines of the tasks' gradients every n updates, and keeps the matrices in `gradients.jsonl`.

    Logged: `gradient_norm/<task>` (with more than 32 tasks `gradient_norm/min`, `/mean`, `/max`), of up to 8 tasks
    `gradient_cosine/<a>/<b>` for each pair, `gradient_cosine_mean`, `gradient_cosine_min`, and `gradient_conflicts`,
    the share of pairs whose cosine is negative. What is not known has no key: a task without items in the update, the
    cosine of a gradient that is zero or not finite. The losses are those of the tasks, without normalization or
    coefficients.

    A line of the file, written by the first process: `step`, `epoch`, `tasks [K]`, `norms [K]` and `cosines [K, K]`,
    null where not known. A resumed run drops the lines after its step.

    Cost of a look: one forward pass of each micro-batch and K backward passes to the shared parameters; with d of them
    K d numbers of memory and, on several ranks, an all-reduce of as many; one host read. A task that is seen for the
    first time costs one more pass of each kind. Between two looks nothing is read from the device.

    Which parameters are shared is found from the batches that are looked at, anew in a resumed run.

    Raises:
        OptionError: `diagnostics.gradients.parameters` with a pattern that fits no trainable parameter, when built.
    """

    def __init__(self, trainer: BilevelMTLTrainer, options: GradientLookOptions) -> None:
        self._trainer = weakref.proxy(trainer)
        self._options = options
        self._report: GradientReport | None = None
        self._look = self._new_look()

    def _new_look(self) -> GradientLook:
        look = GradientLook(len(self._trainer.task_names), self._options.parameters)
        look.bind(self._model)
        return look

    @property
    def _model(self) -> nn.Module:
        """Inside `torch.compile`, whose names of parameters have a prefix."""
        return getattr(self._trainer.model, "_orig_mod", self._trainer.model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._report, self._look = None, self._new_look()
        if state.is_world_process_zero:
            truncate_vectors(args.output_dir, state.global_step, GRADIENTS_FILE)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._report = None
        if state.global_step % self._options.every_n_steps:
            return
        runs = self._trainer.reevaluations()
        if runs:
            self._report = self._look.measure(self._model, runs)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        report, self._report = self._report, None
        if report is None:
            return
        tasks = self._trainer.task_names
        logs = _log_entries(report, tasks)
        if not logs:  # no task has a label
            return
        due = control.should_log
        self._trainer.log(logs)
        # `log` has marked the step's own log as written, which is still to come.
        control.should_log = due
        if state.is_world_process_zero:
            _append(args.output_dir, {"step": state.global_step, "epoch": state.epoch, "tasks": list(tasks)}, report)


def _log_entries(report: GradientReport, tasks: tuple[str, ...]) -> dict[str, float]:
    norms = {task: norm for task, norm in zip(tasks, report.norms.tolist(), strict=True) if math.isfinite(norm)}
    pairs = report.pairs.tolist()
    if not norms:
        return {}
    if len(tasks) <= MAX_TASKS_IN_LOG:
        logs = {f"gradient_norm/{task}": norm for task, norm in norms.items()}
    else:
        values = norms.values()
        mean = sum(values) / len(values)
        logs = {"gradient_norm/min": min(values), "gradient_norm/mean": mean, "gradient_norm/max": max(values)}
    if len(tasks) <= MAX_TASKS_IN_PAIRS:
        cosines = report.cosines.tolist()
        found = {f"{tasks[a]}/{tasks[b]}": cosines[a][b] for a in range(len(tasks)) for b in range(a + 1, len(tasks))}
        logs.update({f"gradient_cosine/{pair}": cosine for pair, cosine in found.items() if math.isfinite(cosine)})
    if pairs:
        logs["gradient_cosine_mean"] = sum(pairs) / len(pairs)
        logs["gradient_cosine_min"] = min(pairs)
        logs["gradient_conflicts"] = sum(cosine < 0 for cosine in pairs) / len(pairs)
    return logs


def _append(folder: str, head: dict[str, Any], report: GradientReport) -> None:
    line = {**head, "norms": _or_null(report.norms), "cosines": [_or_null(row) for row in report.cosines]}
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder) / GRADIENTS_FILE, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _or_null(values: Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]
