"""Loss balancers, one file per method. Importing the package registers them."""

from __future__ import annotations

from hf_bilb.balancers import bilb, dwa, famo, gls, go4align, imtl_l, ls, marigold, rlw, si, stch, uw
from hf_bilb.balancers.registry import (
    BalancerSpec,
    Cost,
    build_balancer,
    get_balancer_spec,
    list_balancers,
    register_balancer,
    resolve_options,
)
from hf_bilb.engine.balancer import LossBalancer
from hf_bilb.engine.options import BalancerOptions

__all__ = [
    "BalancerOptions",
    "BalancerSpec",
    "Cost",
    "LossBalancer",
    "bilb",
    "build_balancer",
    "dwa",
    "famo",
    "get_balancer_spec",
    "gls",
    "go4align",
    "imtl_l",
    "list_balancers",
    "ls",
    "marigold",
    "register_balancer",
    "resolve_options",
    "rlw",
    "si",
    "stch",
    "uw",
]
