"""What the Trainer refuses before it starts, and what it finds out about model and columns once."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from transformers import Trainer
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import unwrap_peft_model
from transformers.training_args import OptimizerNames
from transformers.utils.generic import can_return_loss, find_labels

from hf_bilb.balancers.bilb import BilbOptions
from hf_bilb.balancers.registry import resolve_options
from hf_bilb.config.options import nearest, unknown_name
from hf_bilb.engine.gradient_balancer import GradientBalancer
from hf_bilb.engine.objective import ProgressObjective
from hf_bilb.engine.records import AbsentTasks
from hf_bilb.errors import MissingPackageError, OptionError
from hf_bilb.losses.contract import check_task_names
from hf_bilb.trainer.arguments import BilevelMTLTrainingArguments
from hf_bilb.trainer.columns import COLLATED_LABELS, config_of, innermost, takes_any
from hf_bilb.trainer.diagnostics import DiagnosticsOptions
from hf_bilb.trainer.sampling import TaskSamplingOptions, example_tasks, refuse_other_sampling
from hf_bilb.trainer.task_datasets import TASK_IDS, TaskDatasets, check_alike, check_names, sets_of

if TYPE_CHECKING:
    from hf_bilb.trainer.losses_trainer import TaskLossTrainer
    from hf_bilb.trainer.trainer import BilevelMTLTrainer


logger = logging.getLogger(__name__)

#: What a reporter of `report_to` needs: packages, and the modules of each, of which one is enough; by default the
#: package of its own name.
_REPORTERS: dict[str, dict[str, tuple[str, ...]]] = {
    "azure_ml": {"azureml-sdk": ("azureml.core",)},
    "comet_ml": {"comet-ml": ("comet_ml",)},
    "dagshub": {"dagshub": ("dagshub",), "mlflow": ("mlflow",)},
    "flyte": {"flytekit": ("flytekit",)},
    "kubeflow": {},  # what it needs is the cluster's
    "tensorboard": {"tensorboard": ("tensorboard", "tensorboardX")},
}


def check_reporting(report_to: str | list[str] | None, key: str = "report_to") -> None:
    """Look whether `report_to` can be done.

    Raises:
        MissingPackageError: the package that a reporter needs is not installed.
        OptionError: Trainer knows no reporter of that name.
    """
    named = [report_to] if isinstance(report_to, str) else report_to or []
    for name in (name for name in named if name not in ("none", "all")):
        if name not in INTEGRATION_TO_CALLBACK:
            raise unknown_name(key, name, [*INTEGRATION_TO_CALLBACK, "none", "all"])
        for package, modules in _REPORTERS.get(name, {name: (name,)}).items():
            if not any(_is_installed(module) for module in modules):
                raise MissingPackageError(
                    f"{key}: {name!r} needs the package {package}, which is not installed; `pip install {package}`, or "
                    'set report_to: "none"'
                )


def _is_installed(module: str) -> bool:
    """Whether there is such a module; a folder without code is none, such as the `wandb/` that a run leaves."""
    try:
        found = find_spec(module)
    except ModuleNotFoundError:  # what it would lie in
        return False
    return found is not None and found.origin is not None


def look_inside(trainer: Trainer) -> None:
    """Let `trainer` take from the model inside a wrapper (`torch.compile`, DataParallel) what it takes from signatures:
    the wrapper's own forward takes anything, which would hide label columns."""
    inner = innermost(trainer.model)
    if inner is unwrap_peft_model(trainer.model):
        return
    if trainer.args.label_names is None:
        trainer.label_names = find_labels(type(inner))
    trainer.can_return_loss = can_return_loss(type(inner))
    if not hasattr(inner, "accepts_loss_kwargs"):  # as Trainer asks
        trainer.model_accepts_loss_kwargs = takes_any(inner)


def check_settings(trainer: Trainer) -> None:
    """Raise `OptionError` for settings under which the balancing would be wrong or silently ignored."""
    args = trainer.args
    if not isinstance(args, BilevelMTLTrainingArguments):
        raise OptionError(f"args: got {type(args).__name__}, expected BilevelMTLTrainingArguments")
    if args.n_gpu > 1:
        raise OptionError(
            f"n_gpu: {args.n_gpu} GPUs in one process mean DataParallel, which averages F over shards; "
            "start one process per GPU with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one"
        )
    sizes = {"tensor": trainer.get_tp_size(), "context": trainer.get_cp_size(), "sequence": trainer.get_sp_size()}
    for kind, size in sizes.items():
        if size > 1:
            raise OptionError(
                f"parallelism_config: {kind} parallelism ({size}) is not supported: losses would count {size} times"
            )
    if args.nonfinite_loss == "skip" and trainer.is_deepspeed_enabled:
        raise OptionError(
            "nonfinite_loss: 'skip' is not valid with DeepSpeed, which steps inside its backward pass; use 'raise'"
        )


def check_losses(trainer: TaskLossTrainer) -> None:
    """Raise `OptionError` for what Trainer's own loss would be made of, where the tasks' losses take its place, and for
    a `task_loss_func` that cannot be called; say what may have been forgotten."""
    where = "with several tasks" if len(trainer.task_names) > 1 else "with a task_loss_func"
    if len(trainer.task_names) == 1 and trainer.task_loss_func is None:
        _say_one_task(trainer)
        return
    if trainer.task_loss_func is not None and not _takes_two(trainer.task_loss_func):
        raise OptionError(
            "task_loss_func: is called as task_loss_func(outputs, batch), which it does not take: "
            f"{inspect.signature(trainer.task_loss_func)}"
        )
    _say_unknown_labels(trainer)
    if trainer.compute_loss_func is not None:
        raise OptionError(f"compute_loss_func: would be ignored {where}; use task_loss_func")
    if trainer.args.label_smoothing_factor != 0:
        raise OptionError(
            f"label_smoothing_factor: {trainer.args.label_smoothing_factor} would be ignored {where}; "
            "smooth in the model's or the task_loss_func's own losses"
        )


def _say_one_task(trainer: TaskLossTrainer) -> None:
    """One task is nothing to balance; with several label columns, or a balancer asked for, more were perhaps meant."""
    labels, name = trainer.args.label_names or [], trainer.args.balancer_name_and_options()[0]
    if not has_task_names(trainer) and (len(labels) > 1 or name != "bilb"):
        logger.warning(
            "task_names: not given, so that there is one task, the model's own loss is trained as Trainer does, and "
            "nothing is balanced; for several tasks set task_names in BilevelMTLTrainingArguments, and let the model "
            "return `losses` or give the Trainer a task_loss_func"
        )


def _takes_two(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind(None, None)
    except TypeError:
        return False
    except ValueError:  # no signature to look at
        return True
    return True


def _say_unknown_labels(trainer: TaskLossTrainer) -> None:
    data = trainer.train_dataset
    sets = data.datasets if isinstance(data, TaskDatasets) else {"": data}
    for task, dataset in sets.items():
        columns = getattr(dataset, "column_names", None)
        if not isinstance(columns, list):
            continue
        if task:  # what the collators make of the rows
            columns = [*columns, TASK_IDS, *(["labels"] if {*COLLATED_LABELS} & {*columns} else [])]
        for name in trainer.args.label_names or []:
            if name not in columns:
                logger.warning(
                    "label_names: %r is no column of train_dataset%s%s; there is no evaluation loss of batches without "
                    "it",
                    *(name, f"[{task!r}]" if task else "", nearest(name, columns)),
                )


def check_balancer(trainer: BilevelMTLTrainer) -> None:
    """Raise `OptionError` for settings under which a double loop, its diagnostics or a second look at a batch cannot
    work."""
    args, balancer = trainer.args, trainer.balancer
    looks = args.diagnostics_options() or DiagnosticsOptions()
    section = "diagnostics.lower_level" if "lower_level" in (args.diagnostics or ()) else "diagnostics"
    if looks.lower_level is not None and not balancer.has_levels:
        raise OptionError(f"{section}: balancer {balancer.name!r} has no lower level to look at, expected bilb")
    used = {"balancer.lower_level": balancer.needs_model, section: looks.lower_level is not None}
    sharded = {"FSDP": trainer.is_fsdp_enabled, "DeepSpeed": trainer.is_deepspeed_enabled}
    kind = next((kind for kind, enabled in sharded.items() if enabled), None)
    for key in [key for key, is_used in used.items() if is_used]:
        if kind is not None:
            raise OptionError(f"{key}: an inner loop over z is not valid with {kind}, which shards the parameters")
        if args.fp16:
            raise OptionError(f"{key}: the gradients of the inner loop are not scaled for fp16, use bf16 or float32")
        if args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise OptionError(f"{key}: an inner loop over z is not valid with use_reentrant: true, expected false")
    if balancer.needs_reevaluation or balancer.needs_look_ahead:
        _check_second_look(trainer, kind)
    if isinstance(balancer, GradientBalancer):
        who = f"balancer: {balancer.name!r} looks at the gradients of the tasks; it"
        _check_gradients(
            who,
            {
                **_without_gradients(trainer, kind),
                "torch_compile: true, whose graphs can be walked back only once; expected false": args.torch_compile,
                "ddp_static_graph: true, which counts backward passes; expected false": args.ddp_static_graph,
            },
        )
    if looks.gradients is not None:
        optimizer = _steps_early(args)
        _check_gradients(
            "diagnostics.gradients: a look at the gradients of the tasks",
            {
                **_without_gradients(trainer, kind),
                f"optim: {optimizer}, which steps in the backward pass": optimizer is not None,
            },
        )


def _without_gradients(trainer: BilevelMTLTrainer, sharded: str | None) -> dict[str, bool]:
    """Where the gradients of single tasks cannot be had, and whether it is so."""
    args = trainer.args
    reentrant = args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
    return {
        f"{sharded}, which shards the parameters": sharded is not None,
        "use_reentrant: true, under which torch gives no gradients of single tasks; expected false": bool(reentrant),
        "fp16, whose scaled gradients would be those of no task; use bf16 or float32": args.fp16,
    }


def _check_gradients(who: str, problems: Mapping[str, bool]) -> None:
    """Raise `OptionError` for the first of `problems` that is there."""
    for problem, is_there in problems.items():
        if is_there:
            raise OptionError(f"{who} is not valid with {problem}")


def _steps_early(args: BilevelMTLTrainingArguments) -> str | None:
    """The optimizer, where it is one that steps in the backward pass."""
    optimizer = OptimizerNames(args.optim).value
    return optimizer if optimizer in ("lomo", "adalomo") or optimizer.endswith("_layerwise") else None


def _check_second_look(trainer: BilevelMTLTrainer, sharded: str | None) -> None:
    """Raise `OptionError` where a method that runs a batch once more cannot."""
    args, objective = trainer.args, trainer.balancer.objective
    what = "a double loop"
    if isinstance(objective, ProgressObjective):
        what = objective.name_of(objective.reevaluate)
        if sharded is not None and trainer.balancer.needs_look_ahead:
            # A look after the step is a forward pass like any other.
            other = objective.name_of("same_batch")
            raise OptionError(f"balancer.{what} is not valid with {sharded}, which shards the parameters, use {other}")
        if trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
            other = objective.name_of("next_batch")
            raise OptionError(f"balancer.{what} is not valid with version 1 of FSDP, use version 2, or {other}")
    if args.balance_over == "micro_batch" and args.gradient_accumulation_steps > 1:
        raise OptionError(
            f"balance_over: 'micro_batch' is not valid with {what} under gradient accumulation, use 'window'"
        )
    if not trainer.balancer.needs_look_ahead:
        return
    optimizer = _steps_early(args)
    if optimizer is not None:
        raise OptionError(f"balancer.{what} is not valid with optim: {optimizer}, which steps in the backward pass")
    if args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        raise OptionError(f"balancer.{what} is not valid with use_reentrant: true, expected false")


def plain_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's wrapper, which skips steps and scales gradients."""
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def sampling_options(trainer: Trainer) -> TaskSamplingOptions | None:
    """`task_sampling`; its defaults (proportional, batches of one task each) where there are several training sets."""
    options: TaskSamplingOptions | None = trainer.args.task_sampling_options()
    several = isinstance(trainer.train_dataset, TaskDatasets)
    return TaskSamplingOptions() if options is None and several else options


def check_sampling(trainer: TaskLossTrainer) -> TaskSamplingOptions | None:
    """The options of the task sampler, None where there is none; raises `OptionError` where the training data cannot be
    sampled by task."""
    options = sampling_options(trainer)
    if options is None:
        return None
    sets = trainer.train_dataset
    several = isinstance(sets, TaskDatasets)
    refuse_other_sampling(trainer.args.train_sampling_strategy, "several training sets" if several else "task_sampling")
    if several:
        why = _joins_sets(trainer, options)
        if why is not None and len(sets.datasets) > 1:
            kept = trainer.kept_columns
            names = [*trainer.label_names, *COLLATED_LABELS]
            check_alike(sets, lambda name: kept is None or name in kept, names, why)
    elif sets is not None:
        # Said now, not when training starts.
        example_tasks(sets, trainer.task_names)
    return options


def _joins_sets(trainer: TaskLossTrainer, options: TaskSamplingOptions) -> str | None:
    """The setting by which one batch is made of rows of several tasks; None: there is none."""
    if options.batches == "mixed":
        return "task_sampling.batches: mixed"
    accelerator = trainer.accelerator
    dispatched = accelerator.dispatch_batches and trainer.args.world_size > 1 and options.ranks != "same"
    return "dispatch_batches: true (without task_sampling.ranks: same)" if dispatched else None


@dataclass(frozen=True)
class RunSettings:
    """What a Trainer's balancer, its sampler and its logs are built from; another one means to build them again.

    Attributes:
        name, options: of the method, as given, with D of a feature router.
        resolved: the method's options with their defaults.
        task_names: the K tasks.
        dtype: the balancer's.
        others: the other arguments that are read when things are built.
    """

    name: str
    options: Mapping[str, Any]
    resolved: object
    task_names: tuple[str, ...]
    dtype: torch.dtype
    others: Mapping[str, Any]

    @classmethod
    def of(cls, trainer: BilevelMTLTrainer) -> RunSettings:
        """Those of `trainer` as its arguments are now."""
        args = trainer.args
        name, given = args.balancer_name_and_options()
        options = with_num_features(name, given, trainer.model)
        exact = any(parameter.dtype == torch.float64 for parameter in trainer.model.parameters())
        keys = ("absent_tasks", "task_priors", "balancer_init_from", "diagnostics")
        return cls(
            name=name,
            options=options,
            resolved=resolve_options(name, options),
            task_names=trainer.task_names,
            dtype=torch.float64 if exact else torch.float32,
            others={"sampling": sampling_options(trainer), **{key: copy.deepcopy(getattr(args, key)) for key in keys}},
        )

    @property
    def method(self) -> tuple[object, ...]:
        """What decides whether a balancer's state fits another one."""
        return (self.name, self.resolved, self.task_names, self.dtype)


def resolve_absent_tasks(trainer: Trainer) -> AbsentTasks:
    """`absent_tasks`; `auto` is `hold` for the whole run where the task sampler draws batches of one task each."""
    given: AbsentTasks = trainer.args.absent_tasks
    sampling = sampling_options(trainer)
    one_task_each = sampling is not None and sampling.batches == "single_task"
    return "hold" if given == "auto" and one_task_each else given


def with_num_features(name: str, options: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """The balancer's `options`, with D of a feature router from `model.config.num_router_features` where not given."""
    resolved = resolve_options(name, options)
    wanted = isinstance(resolved, BilbOptions) and resolved.router == "features" and resolved.num_features is None
    length = getattr(config_of(model), "num_router_features", None) if wanted else None
    return dict(options) if length is None else {**options, "num_features": length}


def has_task_names(trainer: Trainer) -> bool:
    """Whether the arguments, the model's config or the training sets name the tasks."""
    return _task_names(trainer) is not None


def _task_names(trainer: Trainer) -> list[str] | None:
    """Those of the arguments, else of the model's config, else the keys of the training sets."""
    of_model = _task_names_of_model(trainer)
    if trainer.args.task_names is not None or of_model is not None:
        return of_model if trainer.args.task_names is None else list(trainer.args.task_names)
    sets = sets_of(trainer.train_dataset)
    return None if sets is None else list(sets)


def _task_names_of_model(trainer: Trainer) -> list[str] | None:
    return getattr(config_of(trainer.model), "task_names", None)


def resolve_task_names(trainer: Trainer) -> tuple[str, ...]:
    """The K task names: those of the arguments, else of `model.config.task_names`, else the keys of several training
    sets, else one task."""
    of_model, names = _task_names_of_model(trainer), _task_names(trainer)
    if of_model is not None and list(of_model) != list(names or ()):
        raise OptionError(f"task_names: {names} do not match model.config.task_names {list(of_model)}")
    sets = sets_of(trainer.train_dataset)
    if sets is not None:
        given = trainer.args.task_names is not None or of_model is not None
        check_names(sets, names if given else None, "train_dataset")
    return ("task_0",) if names is None else check_task_names(names)
