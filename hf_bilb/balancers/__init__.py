"""Loss balancers, one file per method, named as it is registered; a method is imported when it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_bilb.balancers.registry import (
    BalancerSpec,
    Cost,
    build_balancer,
    get_balancer_spec,
    list_balancers,
    register_balancer,
    resolve_options,
)
from hf_bilb.config.lazy import lazy_attribute

if TYPE_CHECKING:
    from hf_bilb.engine.balancer import LossBalancer
    from hf_bilb.engine.options import BalancerOptions

__all__ = [
    "BalancerOptions",
    "BalancerSpec",
    "Cost",
    "LossBalancer",
    "build_balancer",
    "get_balancer_spec",
    "list_balancers",
    "register_balancer",
    "resolve_options",
]

_MODULES = {"BalancerOptions": "hf_bilb.engine.options", "LossBalancer": "hf_bilb.engine.balancer"}


def __getattr__(name: str) -> Any:
    return lazy_attribute(__name__, name, _MODULES)
