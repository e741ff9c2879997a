"""`diagnostics` of the training arguments, and the first of them: what the single loop of a bilevel method leaves out,
measured while it trains, and warnings about its router. (The other one: `hf_bilb/trainer/gradient_diagnostics.py`.)

BiLB4MTL drops grad_W g(W, z_N) from the router's gradient because it was observed to be small (arXiv 2502.08585,
Algorithm 1; shown for two tasks). Every n updates this callback measures it, at the update's own batch, W and x, before
the optimizer's step. Training goes on as without it, bit for bit. While the router learns nothing (warm-up, frozen,
dropped updates) there is nothing to measure.
"""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_bilb.config.options import bounded, check_bounds, parse_options
from hf_bilb.engine.double_loop import LowerLevelReport
from hf_bilb.errors import NonFiniteLossError, OptionError
from hf_bilb.trainer.gradient_diagnostics import GradientLookOptions

if TYPE_CHECKING:
    from hf_bilb.trainer.trainer import BilevelMTLTrainer

logger = logging.getLogger(__name__)

#: Entropy (1 = equal weights) below which the router has collapsed; share of clamped weights from which it saturates;
#: change of its parameters below which it has not moved after so many looks.
COLLAPSED, SATURATED, STILL, LOOKS = 0.1, 0.5, 1e-3, 10


@dataclass(frozen=True, kw_only=True)
class LowerLevelOptions:
    """`diagnostics.lower_level` of the training arguments.

    Attributes:
        every_n_steps: updates between two looks.
        inner_steps: N, steps of gradient descent from x to z_N.
        inner_learning_rate: their step size beta; as large as plain gradient descent on the model allows.
    """

    every_n_steps: int = bounded(100, at_least=1)
    inner_steps: int = bounded(10, at_least=1)
    inner_learning_rate: float = bounded(1e-3, above=0)

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, kw_only=True)
class DiagnosticsOptions:
    """`diagnostics` of the training arguments: what is looked at while training; None: it is not.

    Attributes:
        lower_level: what the single loop of `bilb` leaves out.
        gradients: norms and cosines of the tasks' gradients, with any balancer.
    """

    lower_level: LowerLevelOptions | None = None
    gradients: GradientLookOptions | None = None


@dataclass(frozen=True, kw_only=True)
class _Written(LowerLevelOptions):
    """What `diagnostics` may hold: its two sections, or the lower level's keys without a section of their own."""

    lower_level: LowerLevelOptions | None = None
    gradients: GradientLookOptions | None = None


def parse_diagnostics(values: Any, path: str) -> DiagnosticsOptions:
    """`{lower_level: {...}, gradients: {...}}`, either or both, checked.

    The keys of the lower level may also stand without a section, alone or with `gradients`; `{}` is the lower level
    with its defaults.

    Args:
        values: as given.
        path: what they stand under, for messages.

    Raises:
        OptionError: an unknown key, a value that does not fit, the lower level's keys in both places.
    """
    written = parse_options(_Written, values, path)
    sections = [field.name for field in fields(DiagnosticsOptions)]
    flat = {key: getattr(written, key) for key in values if key not in sections}
    if flat and "lower_level" in values:
        key = next(iter(flat))
        raise OptionError(f"{path}.{key}: stands next to {path}.lower_level, expected in it")
    lower_level = written.lower_level
    if flat or not values:
        lower_level = LowerLevelOptions(**flat)
    return DiagnosticsOptions(lower_level=lower_level, gradients=written.gradients)


class RouterWatch:
    """Warns, each kind once, when a router collapses, saturates at its clamp or never moves, or z does not descend.

    State: the router's parameters at the first look and the number of looks, which start again with each `train`.
    """

    def __init__(self) -> None:
        self._first: Tensor | None = None
        self._looks = 0
        self._said: set[str] = set()

    def look(self, report: LowerLevelReport, parameters: Tensor, from_x: bool) -> list[str]:
        """Messages due for this look; `parameters` are the router's, flat. Reads a few numbers on the host.

        Args:
            from_x: whether z has started at x; that of a double loop comes from other batches, and may lag behind x.
        """
        self._looks += 1
        if self._first is None:
            self._first = parameters.detach().clone()
        entropy, clamped = float(report.entropy), float(report.clamped_share)
        moved = float((parameters.detach() - self._first).abs().max())
        found = {}
        at_x, at_z = float(report.lower_at_x), float(report.lower_at_z)
        if from_x and at_z > at_x:
            found["ascends"] = (
                f"the inner loop ascends: g is {at_x:.4g} at x and {at_z:.4g} at z; a smaller inner_learning_rate is "
                "needed for the ratio to mean something"
            )
        if entropy < COLLAPSED and len(report.weights) > 1:
            found["collapsed"] = (
                f"the router has collapsed: one task has nearly all the weight (entropy {entropy:.3f} of log K)"
            )
        if clamped >= SATURATED:
            found["saturated"] = (
                f"the router is saturated: {clamped:.0%} of its weights lie at their clamp, where they have no gradient"
            )
        if self._looks > LOOKS and moved < STILL:
            found["still"] = (
                f"the router does not move: after {self._looks} looks its parameters have changed by {moved:.1e} at "
                "most; a larger balancer learning_rate may help"
            )
        due = [text for kind, text in found.items() if kind not in self._said]
        self._said.update(found)
        return due


class LowerLevelDiagnostics(TrainerCallback):
    """Logs the norms of the router's gradients every n updates, and warns about the router.

    Logged: `bilevel/lower_gradient_at_z` ||grad_W g(W, z_N)||, `bilevel/lower_gradient_at_x` ||grad_W g(W, x)||,
    `bilevel/upper_gradient` ||grad_W f||, `bilevel/gradient_ratio` (the first over the second), `bilevel/lower_at_x`,
    `bilevel/lower_at_z` (g), `bilevel/discrepancy` (f), `router/entropy` (1 = equal weights), `router/clamped`.

    When z diverges a warning says so and nothing is logged. Cost, every n updates: N + 2 forward and N backward passes,
    two temporary copies of the trainable parameters (with several micro-batches 2 N + 2 forward passes of each); with a
    double loop nothing, as the loop itself has measured them.
    """

    def __init__(self, trainer: BilevelMTLTrainer, options: LowerLevelOptions) -> None:
        self._trainer = weakref.proxy(trainer)
        self._options = options
        self._watch = RouterWatch()
        self._report: LowerLevelReport | None = None
        self._due = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._watch, self._report, self._due = RouterWatch(), None, False

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        balancer, options = self._trainer.balancer, self._options
        runs = self._trainer.reevaluations()
        self._report = None
        self._due = (
            (state.global_step + 1) % options.every_n_steps == 0 and balancer.phase == "balancing" and len(runs) > 0
        )
        if not self._due or balancer.needs_model:
            return
        try:
            self._report = balancer.diagnose_lower_level(
                self._trainer.model, runs, options.inner_steps, options.inner_learning_rate
            )
        except NonFiniteLossError as error:
            # A look at training must not end it.
            logger.warning("diagnostics, step %d: %s", state.global_step + 1, error)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        balancer = self._trainer.balancer
        report = balancer.lower_level_report if self._due and balancer.needs_model else self._report
        if report is None:
            return
        self._report, self._due = None, False
        names = (
            "lower_gradient_at_z", "lower_gradient_at_x", "upper_gradient", "lower_at_x", "lower_at_z", "discrepancy",
        )  # fmt: skip
        values = [*(getattr(report, name) for name in names), report.ratio, report.entropy, report.clamped_share]
        keys = [*(f"bilevel/{name}" for name in names), "bilevel/gradient_ratio", "router/entropy", "router/clamped"]
        due = control.should_log
        self._trainer.log(dict(zip(keys, torch.stack(values).tolist(), strict=True)))
        # `log` has marked the step's own log as written, which is still to come.
        control.should_log = due
        parameters = torch.cat([p.detach().flatten() for p in balancer.objective.parameters()])
        for message in self._watch.look(report, parameters, from_x=not balancer.needs_model):
            logger.warning("balancer %s: %s", balancer.name, message)
