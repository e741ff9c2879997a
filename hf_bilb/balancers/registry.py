"""Names of the methods: register one, list them, build one from a name and options."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from hf_bilb.config.options import parse_options, unknown_name
from hf_bilb.errors import OptionError

if TYPE_CHECKING:
    import torch

    from hf_bilb.engine.balancer import LossBalancer
    from hf_bilb.engine.objective import Objective
    from hf_bilb.engine.options import BalancerOptions
    from hf_bilb.engine.records import AbsentTasks

ObjectiveClass = TypeVar("ObjectiveClass", bound="type[Objective]")

#: Methods of this package, each in the file of its name; imported when it is asked for.
LOSS_METHODS = ("bilb", "dwa", "famo", "gls", "go4align", "imtl_l", "ls", "marigold", "rlw", "si", "stch", "uw")
#: Those that look at the tasks' gradients, in the folder `gradient`.
GRADIENT_METHODS = (
    "aligned_mtl", "cagrad", "fairgrad", "graddrop", "gradnorm", "gradvac", "imtl_g", "mgda", "moco", "modo",
    "nash_mtl", "pcgrad", "sdmgrad", "torchjd", "upgrad",
)  # fmt: skip
BUILT_IN = (*LOSS_METHODS, *GRADIENT_METHODS)


@dataclass(frozen=True)
class Cost:
    """What one update costs in addition to the model's optimizer step, for one choice of options.

    Attributes:
        forwards: passes of the model over the batch, a number or a formula (`"N + 2"`).
        backwards: likewise.
        memory: what is kept in addition to one step's graph and gradients; d is the number of trainable parameters.
        when: the options that this is the cost with, as in a recipe; empty: always.
    """

    forwards: int | str
    backwards: int | str
    memory: str = "none"
    when: str = ""

    def __str__(self) -> str:
        """`2F + 1B`, `(N + 2)F + (N + 1)B`."""
        passes = (str(number) for number in (self.forwards, self.backwards))
        forwards, backwards = (text if text.isalnum() else f"({text})" for text in passes)
        return f"{forwards}F + {backwards}B"


@dataclass(frozen=True)
class BalancerSpec:
    """A registered method: its name in recipes, its objective and options, where it comes from, what it costs."""

    name: str
    objective: type[Objective]
    options: type[BalancerOptions]
    paper: str
    costs: tuple[Cost, ...]

    @property
    def equation(self) -> str:
        """What the file of the method says first: the paper, its equations, and what their symbols are called here."""
        return inspect.cleandoc(sys.modules[self.objective.__module__].__doc__ or "")


_REGISTRY: dict[str, BalancerSpec] = {}


def register_balancer(
    name: str, *, options: type[BalancerOptions], paper: str, costs: Sequence[Cost] = (Cost(1, 1),)
) -> Callable[[ObjectiveClass], ObjectiveClass]:
    """Class decorator that makes an `Objective` available under `name`, in Python and in recipes.

    Args:
        name: how recipes call it.
        options: a frozen, keyword-only dataclass that extends `BalancerOptions`; its fields are the recipe's keys.
        paper: the source, with the equation.
        costs: of an update, one entry for each choice of options that changes them; the cheapest there is by default.

    Raises:
        ValueError: when `name` is taken.
    """

    def register(objective: ObjectiveClass) -> ObjectiveClass:
        if objective.__module__ != _module_of(name):
            _load(name)
        if name in _REGISTRY:
            taken = _REGISTRY[name].objective
            raise ValueError(f"balancer {name!r} is already registered, by {taken.__module__}.{taken.__qualname__}")
        _REGISTRY[name] = BalancerSpec(name, objective, options, paper, tuple(costs))
        return objective

    return register


def list_balancers() -> list[str]:
    """The names of all registered balancers, sorted."""
    return sorted({*BUILT_IN, *_REGISTRY})


def _module_of(name: str) -> str:
    return f"{__package__}.gradient.{name}" if name in GRADIENT_METHODS else f"{__package__}.{name}"


def balancer_module(name: str) -> str | None:
    """The module of a method of this package that has not been imported; None for one that is at hand."""
    return _module_of(name) if name in BUILT_IN and name not in _REGISTRY else None


def _load(name: object) -> None:
    """Import the method `name` where it is one of this package and has not been."""
    if name in BUILT_IN and name not in _REGISTRY:
        import_module(_module_of(str(name)))


def get_balancer_spec(name: str, path: str = "balancer") -> BalancerSpec:
    """The registration of `name`; raises `OptionError` with the nearest name when there is none."""
    if isinstance(name, str):
        _load(name)
    if not isinstance(name, str) or name not in _REGISTRY:
        raise unknown_name(path, name, list_balancers())
    return _REGISTRY[name]


def resolve_options(name: str, options: Mapping[str, Any], path: str = "balancer") -> BalancerOptions:
    """Check `options` of the balancer `name` and fill in its preset and defaults, without building it.

    Raises:
        OptionError: one line with the key path, the value and what was expected.
    """
    cls = get_balancer_spec(name, path).options
    options = cls.prepared(options)
    preset = options.get("preset")
    given = dict(cls.presets.get(preset, {})) if isinstance(preset, str) else {}
    return parse_options(cls, {**given, **options}, path)


def build_balancer(
    balancer: str | Mapping[str, Any],
    num_tasks: int | None = None,
    *,
    task_names: Sequence[str] | None = None,
    absent_tasks: AbsentTasks = "auto",
    task_priors: Sequence[float] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    shared_parameters: Sequence[str | torch.nn.Parameter] | None = None,
    **options: Any,
) -> LossBalancer:
    """Build a loss balancer.

    Args:
        balancer: a name (`list_balancers()`), or a mapping `{"name": ..., option: value}` as in a recipe.
        num_tasks: K; may be left out when `task_names` is given.
        task_names: K names, used in messages, logs and checkpoints; default `task_0`, `task_1`, ...
        absent_tasks: `skip` (F over the present tasks), `hold` (the last known loss stands in, detached), or `auto`:
            `hold` in a step whose global batch, over all ranks and micro-batches of the decision, has a single task,
            else `skip`.
        task_priors: K fixed factors that the user gives the tasks; they multiply the coefficients, whatever the method.
        device, dtype: of the K numbers it works on (default float32); float64 where the model trains in float64.
        shared_parameters: of gradient methods, names or patterns; or the parameters themselves, in place of `bind`.
        **options: the method's options, checked by name and type (see the method's options class).

    Returns:
        a `LossBalancer`.

    Raises:
        OptionError: unknown name or option (with the nearest valid one), wrong type, lengths that do not match K.
    """
    import torch

    from hf_bilb.engine.balancer import LossBalancer
    from hf_bilb.engine.gradient_balancer import GradientBalancer
    from hf_bilb.engine.gradient_method import GradientMethod

    patterns, parameters = _patterns_or_parameters(shared_parameters)
    if patterns is not None:
        options["shared_parameters"] = patterns
    given = dict(balancer) if isinstance(balancer, Mapping) else {"name": balancer}
    if "name" not in given:
        raise OptionError(f"balancer.name: is required, expected one of {', '.join(list_balancers())}")
    name = given.pop("name")
    spec = get_balancer_spec(name)
    names = _task_names(num_tasks, task_names)
    resolved = resolve_options(name, {**given, **options})
    try:
        objective = spec.objective(len(names), resolved)
        objective.set_task_names(names)
    except OptionError as error:
        raise OptionError(f"balancer.{error}") from None
    by_gradients = isinstance(objective, GradientMethod)
    if parameters and not by_gradients:
        raise OptionError(f"balancer.shared_parameters: balancer {name!r} does not look at gradients")
    built = (GradientBalancer if by_gradients else LossBalancer)(
        name,
        objective,
        resolved,
        names,
        absent_tasks=absent_tasks,
        task_priors=task_priors,
        device=device,
        dtype=torch.float32 if dtype is None else dtype,
    )
    if isinstance(built, GradientBalancer) and parameters:
        built.share(parameters)
    return built


def _patterns_or_parameters(
    shared_parameters: Sequence[str | torch.nn.Parameter] | None,
) -> tuple[Sequence[Any] | None, list[torch.nn.Parameter]]:
    """Which of the two a user has given; the other is None, or empty."""
    import torch

    if shared_parameters is None:
        return None, []
    parameters: list[Any] = [p for p in shared_parameters if isinstance(p, torch.Tensor)]
    if 0 < len(parameters) < len(shared_parameters):
        raise OptionError("balancer.shared_parameters: names and parameters are mixed, expected one or the other")
    return (None, parameters) if parameters else (shared_parameters, [])


def _task_names(num_tasks: int | None, task_names: Sequence[str] | None) -> tuple[str, ...]:
    if task_names is None:
        if num_tasks is None or isinstance(num_tasks, bool) or not isinstance(num_tasks, int) or num_tasks < 1:
            raise OptionError(f"num_tasks: {num_tasks!r} is not valid, expected an integer >= 1 (or task_names)")
        return tuple(f"task_{k}" for k in range(num_tasks))
    from hf_bilb.losses.contract import check_task_names

    names = check_task_names(task_names)
    if num_tasks is not None and num_tasks != len(names):
        raise OptionError(f"task_names: got {len(names)} names, expected {num_tasks} (num_tasks)")
    return names
