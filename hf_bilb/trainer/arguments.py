"""The Trainer's arguments, with what balancing adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Literal, get_args

from transformers import IntervalStrategy, SchedulerType, TrainingArguments

from hf_bilb.balancers.registry import resolve_options
from hf_bilb.config.options import check_value, nearest, parse_options
from hf_bilb.engine.records import AbsentTasks
from hf_bilb.errors import OptionError
from hf_bilb.losses.contract import check_task_names
from hf_bilb.trainer.diagnostics import DiagnosticsOptions, parse_diagnostics
from hf_bilb.trainer.early_stopping import EarlyStoppingOptions
from hf_bilb.trainer.sampling import TaskSamplingOptions
from hf_bilb.trainer.schedules import StepLROptions

BalanceOver = Literal["micro_batch", "window"]
NonfiniteLoss = Literal["raise", "skip"]


@dataclass
class BilevelMTLTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` plus:

    Args:
        balancer: a name (`"bilb"`), or a mapping with `name` and the method's options
            (`{"name": "bilb", "preset": "celeba"}`); on a command line as JSON.
        task_names: K names, in the order of the loss vector; default `model.config.task_names`, else one task.
        balance_over: over what F is evaluated under gradient accumulation. `micro_batch`: once per micro-batch, at no
            cost; exact for methods that are linear in the losses. `window`: once per update, exact for all, at the cost
            of one more forward pass (without gradients) of each micro-batch.
        absent_tasks: what F does with tasks that have no items in a step: `skip` them, or `hold` their last known loss;
            `auto` holds in the whole run where `task_sampling` draws batches of one task each, else in those steps
            whose global batch (all ranks, and all micro-batches of a window) has a single task; it skips otherwise.
        nonfinite_loss: `raise` an error that names task, step and value, or `skip` the whole step (model, optimizer
            and balancer stay as they were; it is counted and logged). A gradient that is not finite behind losses that
            are is treated alike (under a GradScaler the scaler does it).
        max_dropped_steps: raise after so many steps in a row were dropped: nothing is learned any more.
        ignore_index: an integer label that stands for a missing one, in addition to -100 (255 in many masks), where
            items are counted from the label columns, as losses come without `num_items`; null = there is no other.
        task_priors: K fixed factors of the tasks' coefficients, whatever the method.
        balancer_warmup_steps: updates on the plain sum of the losses before balancing begins; the balancer's references
            are taken when it begins.
        balancer_freeze_after: number of the update after which the balancer's own parameters and references stay as
            they are (it goes on weighting with them); null = never.
        balancer_init_from: a checkpoint, or a run's folder, whose balancer's parameters, moments, references and last
            losses this run begins with; same method, same tasks. A resumed run goes on with its own.
        diagnostics: what is measured every n updates; training goes on as without it; null = nothing.
            `{gradients: {every_n_steps, parameters}}`: norms and cosines of the tasks' gradients, with any balancer
            (`hf_bilb.trainer.gradient_diagnostics`). `{lower_level: {every_n_steps, inner_steps,
            inner_learning_rate}}`, or these keys without `lower_level`: the term that the single loop of a bilevel
            method leaves out (`hf_bilb.trainer.diagnostics`).
        task_sampling: `{strategy, temperature, batches, ranks, ...}`: which task a batch shows
            (`hf_bilb.trainer.sampling.TaskSamplingOptions`); null leaves it to `train_sampling_strategy`.
        step_lr: `{epochs, factor}`: multiply the learning rate by `factor` after every `epochs` epochs, in place of
            `lr_scheduler_type` (which stays at its default, or `constant`); null = `lr_scheduler_type` decides.
        learning_rates: `{pattern: rate}` for parts of the model (`{"head_*": 1e-3, encoder: 2e-5}`); the first pattern
            that means a parameter counts, `learning_rate` is that of all others; schedules hold for all. A pattern is
            the name of a parameter or of a module that it is in, with `*` (`hf_bilb.config.patterns`).
        freeze: patterns of the parameters that are not trained.
        early_stopping: `{patience, threshold}` (in Python also a number, the patience): stop after so many evaluations
            in which `metric_for_best_model` was not better than before by more than `threshold`; null = train to the
            end.

    Raises:
        OptionError: one line with the key, the value and what was expected.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *TrainingArguments._VALID_DICT_FIELDS, "balancer", "diagnostics", "task_sampling", "step_lr", "learning_rates",
        "early_stopping",
    ]  # fmt: skip

    #: Whether nobody has said `greater_is_better`, so that it may still follow from the metric's name.
    _better_is_undecided = False

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
    absent_tasks: AbsentTasks = field(
        default="auto", metadata={"help": "Tasks without items in a step: auto, skip or hold."}
    )
    nonfinite_loss: NonfiniteLoss = field(
        default="raise", metadata={"help": "A NaN or infinite loss: raise or skip the step."}
    )
    max_dropped_steps: int = field(
        default=100, metadata={"help": "Stop after so many steps in a row were dropped as not finite."}
    )
    ignore_index: int | None = field(
        default=None, metadata={"help": "Integer label that stands for a missing one, in addition to -100."}
    )
    task_priors: list[float] | None = field(default=None, metadata={"help": "K fixed factors of the tasks."})
    balancer_warmup_steps: int = field(default=0, metadata={"help": "Updates on the plain sum before balancing."})
    balancer_freeze_after: int | None = field(
        default=None, metadata={"help": "Update after which the balancer's own parameters stay."}
    )
    balancer_init_from: str | None = field(
        default=None, metadata={"help": "Checkpoint or run folder whose balancer this run begins with."}
    )
    diagnostics: dict | str | None = field(default=None, metadata={"help": "Look at gradients or lower level."})
    task_sampling: dict | str | None = field(default=None, metadata={"help": "Which task a training batch shows."})
    step_lr: dict | str | None = field(default=None, metadata={"help": "Learning rate times factor every n epochs."})
    learning_rates: dict | str | None = field(default=None, metadata={"help": "Rates for parts of the model."})
    freeze: list[str] | None = field(default=None, metadata={"help": "Parts of the model that are not trained."})
    early_stopping: dict | str | None = field(
        default=None, metadata={"help": "Stop when metric_for_best_model has stopped getting better."}
    )

    def __post_init__(self) -> None:
        # Trainer's rule looks at the end of the name alone; ours is applied where the tasks are known, too.
        undecided = self.greater_is_better is None
        super().__post_init__()
        self._better_is_undecided = undecided
        self.check_settings()
        self.settle_best_metric(self.task_names or ())

    def check_settings(self) -> None:
        """Check the fields that this class adds; called again when a training begins, since they may have been set.

        Raises:
            OptionError: one line with the key, the value and what was expected.
        """
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
        self.ignore_index = check_value(self.ignore_index, int | None, "ignore_index")
        self._check_steps()
        self.diagnostics_options()
        self.task_sampling_options()
        self.step_lr_options()
        self.learning_rates_options()
        self.freeze = check_value(self.freeze, list[str] | None, "freeze")
        self.early_stopping_options()
        name, options = self.balancer_name_and_options()
        resolve_options(name, options)
        for key, value in options.items():
            if callable(value):
                # Settings are written into every run's folder and compared when it is resumed.
                raise OptionError(
                    f"balancer.{key}: {value!r} is an object in memory, expected its name: path/to/file.py:function or "
                    "package.module:function"
                )

    def settle_best_metric(self, task_names: Sequence[str], data_sets: Sequence[str] = ()) -> None:
        """Let a lower `metric_for_best_model` be better where it is a task's loss and nobody has said otherwise.

        Args:
            task_names: the K tasks; a loss is `[eval_][<data set>_]loss[_<task>]` of one of them, or of all.
            data_sets: names of the evaluation sets, where there are several.
        """
        metric = self.metric_for_best_model
        if self._better_is_undecided and metric is not None:
            # Again from the name: it may have been set since.
            self.greater_is_better = not (metric.endswith("loss") or is_task_loss(metric, task_names, data_sets))

    def _check_steps(self) -> None:
        self.max_dropped_steps = check_value(self.max_dropped_steps, int, "max_dropped_steps")
        if self.max_dropped_steps < 1:
            raise OptionError(f"max_dropped_steps: {self.max_dropped_steps} is not valid, expected an integer >= 1")
        self.balancer_warmup_steps = check_value(self.balancer_warmup_steps, int, "balancer_warmup_steps")
        self.balancer_freeze_after = check_value(self.balancer_freeze_after, int | None, "balancer_freeze_after")
        first, last = self.balancer_warmup_steps, self.balancer_freeze_after
        if first < 0:
            raise OptionError(f"balancer_warmup_steps: {first} is not valid, expected an integer >= 0")
        if last is not None and last < first:
            raise OptionError(
                f"balancer_freeze_after: {last} is not valid, expected null or at least balancer_warmup_steps ({first})"
            )

    def diagnostics_options(self) -> DiagnosticsOptions | None:
        """`diagnostics`, checked; None when it is off."""
        given: Any = self.diagnostics
        return None if given is None else parse_diagnostics(given, "diagnostics")

    def task_sampling_options(self) -> TaskSamplingOptions | None:
        """`task_sampling`, checked; None when it is off."""
        given: Any = self.task_sampling
        return None if given is None else parse_options(TaskSamplingOptions, given, "task_sampling")

    def step_lr_options(self) -> StepLROptions | None:
        """`step_lr`, checked; None when it is off."""
        given: Any = self.step_lr
        if given is None:
            return None
        schedule = SchedulerType(self.lr_scheduler_type).value
        if schedule not in ("linear", "constant") or self.warmup_steps > 0:
            raise OptionError(
                f"step_lr: does not go with lr_scheduler_type {schedule!r} and warmup_steps {self.warmup_steps}, "
                "expected neither to be set"
            )
        return parse_options(StepLROptions, given, "step_lr")

    def early_stopping_options(self) -> EarlyStoppingOptions | None:
        """`early_stopping`, checked; None when it is off."""
        given: Any = self.early_stopping
        if given is None:
            return None
        if not isinstance(given, Mapping):  # the patience alone, also as text on a command line
            given = {"patience": given}
        options = parse_options(EarlyStoppingOptions, given, "early_stopping")
        if IntervalStrategy(self.eval_strategy) == IntervalStrategy.NO:
            raise OptionError("early_stopping: needs evaluations, expected eval_strategy: epoch or steps")
        if self.metric_for_best_model is None:
            raise OptionError(
                "early_stopping: needs metric_for_best_model, or load_best_model_at_end: true, whose metric is the loss"
            )
        return options

    def learning_rates_options(self) -> dict[str, float] | None:
        """`learning_rates`, checked; None when there are none."""
        given: Any = self.learning_rates
        if given is None:
            return None
        rates: dict[str, float] = check_value(given, dict[str, float], "learning_rates")
        for pattern, rate in rates.items():
            if not rate >= 0:
                raise OptionError(f"learning_rates.{pattern}: {rate} is not valid, expected a number >= 0")
        return rates

    def balancer_name_and_options(self) -> tuple[str, dict[str, Any]]:
        """The balancer's name and its options, from either form of `balancer`."""
        if isinstance(self.balancer, str):
            return self.balancer, {}
        if not isinstance(self.balancer, dict) or "name" not in self.balancer:
            raise OptionError(f"balancer: {self.balancer!r} is not valid, expected a name or a mapping with `name`")
        return self.balancer["name"], {key: value for key, value in self.balancer.items() if key != "name"}


#: The fields that this package adds to `TrainingArguments`.
OWN_FIELDS = frozenset(
    {one.name for one in fields(BilevelMTLTrainingArguments)} - {one.name for one in fields(TrainingArguments)}
)


class _AsItIs:
    """Stands for a value whose replacement is taken as it is: `type(old)(new)` gives `new`."""

    def __new__(cls, value: Any) -> Any:
        return value


#: In place of each of `OWN_FIELDS` while a trial of `hyperparameter_search` sets its values.
AS_IT_IS: Any = object.__new__(_AsItIs)


def is_task_loss(metric: str, task_names: Sequence[str], data_sets: Sequence[str] = ()) -> bool:
    """Whether `metric` is `[eval_][<data set>_]loss[_<task>]`, and no metric of the user's with `loss` in its name."""
    name = metric.removeprefix("eval_")
    losses = {"loss", *(f"loss_{task}" for task in task_names)}
    return name in losses or any(name.removeprefix(f"{data_set}_") in losses for data_set in data_sets)


def as_bilevel_arguments(args: TrainingArguments | None) -> BilevelMTLTrainingArguments:
    """`args` as `BilevelMTLTrainingArguments`: as they are, or a copy with our fields at their defaults.

    Every field and whatever else is set on `args` is kept; arguments of a subclass (`Seq2SeqTrainingArguments`) become
    a subclass of both classes. None gives Trainer's own default, the output folder `tmp_trainer`.
    """
    if args is None:
        return BilevelMTLTrainingArguments(output_dir="tmp_trainer")
    if isinstance(args, BilevelMTLTrainingArguments):
        return args
    upgraded = object.__new__(_joined_class(type(args)))
    for added in fields(BilevelMTLTrainingArguments):
        if added.name in OWN_FIELDS:
            value = added.default if added.default_factory is MISSING else added.default_factory()
            setattr(upgraded, added.name, value)
    upgraded.__dict__.update(vars(args))
    # What Trainer has made of the name of the metric may be its guess.
    guess = not (upgraded.metric_for_best_model or "").endswith("loss")
    upgraded._better_is_undecided = upgraded.greater_is_better in (None, guess)
    upgraded.check_settings()
    return upgraded


_JOINED: dict[Any, Any] = {TrainingArguments: BilevelMTLTrainingArguments}


def _joined_class(kind: Any) -> Any:
    """A class of arguments that is both `BilevelMTLTrainingArguments` and `kind`."""
    if kind in _JOINED:
        return _JOINED[kind]
    # It has no module to be found in: a pickle (training_args.bin) makes it again from `kind`.
    body = {
        "__doc__": f"{kind.__name__} with the fields of BilevelMTLTrainingArguments.",
        "__module__": __name__,
        "__reduce__": lambda self: (_restore_joined, (kind, vars(self))),
    }
    _JOINED[kind] = dataclass(type(f"BilevelMTL{kind.__name__}", (BilevelMTLTrainingArguments, kind), body))
    return _JOINED[kind]


def _restore_joined(kind: type[TrainingArguments], state: dict[str, Any]) -> BilevelMTLTrainingArguments:
    restored = object.__new__(_joined_class(kind))
    restored.__dict__.update(state)
    return restored
