"""Loss balancers, one file per method. Importing the package registers them."""

from __future__ import annotations

from hf_bilb.balancers import bilb, famo, linear_scalarization, scale_invariant, uncertainty
from hf_bilb.balancers.base import LossBalancer
from hf_bilb.balancers.options import BalancerOptions
from hf_bilb.balancers.registry import (
    BalancerSpec,
    build_balancer,
    get_balancer_spec,
    list_balancers,
    register_balancer,
    resolve_options,
)

__all__ = [
    "BalancerOptions",
    "BalancerSpec",
    "LossBalancer",
    "bilb",
    "build_balancer",
    "famo",
    "get_balancer_spec",
    "linear_scalarization",
    "list_balancers",
    "register_balancer",
    "resolve_options",
    "scale_invariant",
    "uncertainty",
]
