"""What is registered, as plain values: read off the registry, the options classes and a balancer that is built."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_bilb.balancers.registry import BalancerSpec, build_balancer, get_balancer_spec, list_balancers
from hf_bilb.config.options import describe_type
from hf_bilb.engine.gradient_method import GradientMethod, GradientOptions
from hf_bilb.engine.options import BalancerOptions
from hf_bilb.errors import OptionError
from hf_bilb.reporting.balancer_table import BalancerEntry, Catalogue, CostEntry, OptionEntry, flow

_SIZES = (3, 5, 8)  # numbers of tasks to find out how a size depends on K
_PLAIN = "ls"  # has no state of its own: what it has, every balancer has
_PLAIN_GRADIENT = "mgda"  # neither has this one: what it has, every gradient method has


def catalogue() -> Catalogue:
    """All registered balancers, sorted by name."""
    common = _states(_PLAIN)
    return Catalogue(
        balancers=tuple(describe(name) for name in list_balancers()),
        common_options=tuple(options_table(BalancerOptions)),
        common_state=tuple(_shapes(common, frozenset())),
        gradient_options=tuple(o for o in options_table(GradientOptions) if o not in options_table(BalancerOptions)),
        gradient_state=tuple(_shapes(_without(_states(_PLAIN_GRADIENT), common), frozenset())),
    )


def describe(name: str) -> BalancerEntry:
    """The registered balancer `name`; raises `OptionError` with the nearest name when there is none."""
    spec = get_balancer_spec(name, "NAME")
    common = {option.name: option for option in options_table(BalancerOptions)}
    options = options_table(spec.options)
    own = [option for option in options if option.name not in common]
    changed = [o for o in options if o.name in common and o.default != common[o.name].default]
    return BalancerEntry(
        name=name,
        family="gradient" if issubclass(spec.objective, GradientMethod) else "loss",
        paper=spec.paper,
        costs=tuple(CostEntry(str(cost), cost.memory, cost.when) for cost in spec.costs),
        state=_state(spec),
        options=(*own, *changed),
        presets=spec.options.presets,
        equation=spec.equation,
        summary=inspect.cleandoc(spec.objective.__doc__ or ""),
        source=f"class {spec.objective.__qualname__} in {Path(inspect.getfile(spec.objective)).name}",
    )


# ---------------------------------------------------------------------------------------------------- state


def _state(spec: BalancerSpec) -> tuple[str, ...] | None:
    """The entries of its state that not every balancer of its family has; None where it needs options to be built."""
    try:
        built = [build_balancer(spec.name, size) for size in _SIZES]
    except OptionError:
        return None
    shared = _states(_PLAIN_GRADIENT if issubclass(spec.objective, GradientMethod) else _PLAIN)
    trained = frozenset(f"objective.{name}" for name, _ in built[0].objective.named_parameters())
    return tuple(_shapes(_without([balancer.state_dict() for balancer in built], shared), trained))


def _states(name: str) -> list[dict[str, Tensor]]:
    return [build_balancer(name, size).state_dict() for size in _SIZES]


def _without(states: list[dict[str, Tensor]], others: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """`states` without the entries that `others` have, and without the optimizer's."""
    return [
        {key: value for key, value in state.items() if key not in others[0] and not key.startswith("optimizer.")}
        for state in states
    ]


def _shapes(states: list[dict[str, Tensor]], trained: frozenset[str]) -> list[str]:
    """`logits [K] (trained)` for each entry, from the same state for `_SIZES` tasks."""
    lines = []
    for key in states[0]:
        name = key.removeprefix("objective.").removesuffix("_extra_state")
        name = f"{name.rstrip('.')} (on the host)".lstrip() if key.endswith("_extra_state") else name
        dimensions = zip(*(state[key].shape for state in states), strict=True)
        shape = ", ".join(_in_terms_of_k(sizes) for sizes in dimensions)
        lines.append(f"{name}{f' [{shape}]' if shape else ''}{' (trained)' if key in trained else ''}")
    return lines


def _in_terms_of_k(sizes: tuple[int, ...]) -> str:
    """The straight line through `sizes` at `_SIZES`: `K`, `2K`, `K + 1`, `50`; `...` where it is none."""
    slope = (sizes[1] - sizes[0]) / (_SIZES[1] - _SIZES[0])
    start = sizes[0] - slope * _SIZES[0]
    if any(size != start + slope * number for size, number in zip(sizes, _SIZES, strict=True)):
        return "..."
    of_k = "" if slope == 0 else "K" if slope == 1 else f"{slope:g}K"
    return of_k if of_k and start == 0 else f"{of_k} + {start:g}" if of_k else f"{start:g}"


# ---------------------------------------------------------------------------------------------------- options


def options_table(cls: type[Any]) -> list[OptionEntry]:
    """The options of a dataclass: default, what each accepts, and what its docstring says of it."""
    hints, meanings = typing.get_type_hints(cls), _meanings(cls)
    return [
        OptionEntry(field.name, _default(field), describe_type(hints[field.name]), meanings.get(field.name, ""))
        for field in dataclasses.fields(cls)
    ]


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return flow(_plain(field.default_factory()))
    return "required" if field.default is dataclasses.MISSING else flow(_plain(field.default))


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def _meanings(cls: type[Any]) -> dict[str, str]:
    """Option -> what the sections `Attributes:` or `Args:` say of it, of the class and of those it extends."""
    meanings: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        text = inspect.cleandoc(base.__doc__ or "")
        section = re.search(r"^(?:Attributes|Args):\n((?:[ ]+.*\n?|\n)*)", text, flags=re.M)
        entries = re.split(r"^ {4}(?=\S)", section[1], flags=re.M)[1:] if section else []
        for names, _, meaning in (entry.partition(":") for entry in entries):
            meanings.update(dict.fromkeys(names.split(", "), " ".join(meaning.split())))
    return meanings
