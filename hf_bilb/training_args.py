"""The Trainer's arguments, with what balancing adds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

from transformers import TrainingArguments

from hf_bilb.balancers.base import AbsentTasks
from hf_bilb.balancers.registry import resolve_options
from hf_bilb.options import OptionError, nearest
from hf_bilb.task_losses import check_task_names

BalanceOver = Literal["micro_batch"]
NonfiniteLoss = Literal["raise", "skip"]


@dataclass
class BilevelMTLTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` plus:

    Args:
        balancer: a name (`"bilb"`), or a mapping with `name` and the method's options
            (`{"name": "bilb", "preset": "celeba"}`); on a command line as JSON.
        task_names: K names, in the order of the loss vector; default `model.config.task_names`, else one task.
        balance_over: over what F is evaluated under gradient accumulation; `micro_batch`: once per micro-batch.
        absent_tasks: what F does with tasks that have no items in a step: `skip` them, or `hold` their last known loss.
        nonfinite_loss: `raise` an error that names task, step and value, or `skip` the whole step (model, optimizer
            and balancer stay as they were; it is counted and logged).
        task_priors: K fixed factors of the tasks' coefficients, whatever the method.

    Raises:
        OptionError: one line with the key, the value and what was expected.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*TrainingArguments._VALID_DICT_FIELDS, "balancer"]

    # `| None` because transformers' argument parser takes the first type of a union of two, which would be dict.
    balancer: dict | str | None = field(
        default="bilb", metadata={"help": "Balancer: a name, or a mapping with name and options."}
    )
    task_names: list[str] | None = field(
        default=None, metadata={"help": "Names of the K tasks, in the order of the losses."}
    )
    balance_over: BalanceOver = field(
        default="micro_batch", metadata={"help": "Over what F is evaluated under accumulation."}
    )
    absent_tasks: AbsentTasks = field(default="skip", metadata={"help": "Tasks without items in a step: skip or hold."})
    nonfinite_loss: NonfiniteLoss = field(
        default="raise", metadata={"help": "A NaN or infinite loss: raise or skip the step."}
    )
    task_priors: list[float] | None = field(default=None, metadata={"help": "K fixed factors of the tasks."})

    def __post_init__(self) -> None:
        undecided = self.greater_is_better is None  # type: ignore[has-type]
        metric = self.metric_for_best_model or ""
        super().__post_init__()
        if undecided and "loss" in metric.split("_"):
            # `eval_loss_<task>` too: TrainingArguments takes for a loss only what ends with the word.
            self.greater_is_better = False
        for key, kind in (
            ("balance_over", BalanceOver),
            ("absent_tasks", AbsentTasks),
            ("nonfinite_loss", NonfiniteLoss),
        ):
            value, known = getattr(self, key), get_args(kind)
            if value not in known:
                expected = ", ".join(f'"{name}"' for name in known)
                raise OptionError(
                    f"{key}: {value!r} is not valid, expected one of {expected}{nearest(str(value), known)}"
                )
        if self.task_names is not None:
            self.task_names = list(check_task_names(self.task_names))
        name, options = self.balancer_name_and_options()
        resolve_options(name, options)

    def balancer_name_and_options(self) -> tuple[str, dict[str, Any]]:
        """The balancer's name and its options, from either form of `balancer`."""
        if isinstance(self.balancer, str):
            return self.balancer, {}
        if not isinstance(self.balancer, dict) or "name" not in self.balancer:
            raise OptionError(f"balancer: {self.balancer!r} is not valid, expected a name or a mapping with `name`")
        return self.balancer["name"], {key: value for key, value in self.balancer.items() if key != "name"}
