"""Rates for parts of the model, and parts that are not trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from hf_bilb.config.patterns import check_patterns, matches
from hf_bilb.errors import OptionError


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Train no parameter that one of `patterns` means (`hf_bilb.config.patterns`).

    Dropout and the running statistics of BatchNorm in frozen modules go on as in training.

    Raises:
        OptionError: a pattern that means no parameter, or nothing that is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    check_patterns(patterns, names, "freeze")
    for name, parameter in model.named_parameters():
        if any(matches(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise OptionError(f"freeze: {list(patterns)} leaves no parameter that is trained")


def check_rates(model: nn.Module, rates: Mapping[str, float]) -> None:
    """Raise `OptionError` for a pattern of `learning_rates` that means no parameter that is trained."""
    check_patterns(rates, [name for name, p in model.named_parameters() if p.requires_grad], "learning_rates")


def split_groups(optimizer: Optimizer, model: nn.Module, rates: Mapping[str, float]) -> None:
    """Give the parameters that a pattern of `rates` means groups of their own, with that rate; the first that fits.

    The other settings of a group stay (weight decay). What no pattern means stays in the groups that were there, which
    come first, so that schedules, logs and `follow_model` see the rate of the arguments.

    Raises:
        OptionError: an optimizer that holds parameters of its own making (LOMO, GaLore).
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kept: list[dict[str, Any]] = []
    own: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        if any(id(parameter) not in names for parameter in group["params"]):
            raise OptionError(f"learning_rates: {type(optimizer).__name__} makes its own groups of parameters")
        parts: dict[float | None, list[Any]] = {None: []}
        for parameter in group["params"]:
            rate = next((rate for pattern, rate in rates.items() if matches(names[id(parameter)], pattern)), None)
            parts.setdefault(rate, []).append(parameter)
        kept.append({**group, "params": parts.pop(None)})
        own += [{**group, "params": params, "lr": rate} for rate, params in parts.items()]
    optimizer.param_groups = [*kept, *own]
