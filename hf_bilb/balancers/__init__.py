"""Loss balancers, one file per method. Importing the package registers them."""

from __future__ import annotations

from hf_bilb.balancers import (
    bilb,
    dwa,
    famo,
    gls,
    go4align,
    imtl_l,
    linear_scalarization,
    marigold,
    rlw,
    scale_invariant,
    stch,
    uncertainty,
)
from hf_bilb.balancers.base import LossBalancer
from hf_bilb.balancers.options import BalancerOptions
from hf_bilb.balancers.registry import (
    BalancerSpec,
    Cost,
    build_balancer,
    get_balancer_spec,
    list_balancers,
    register_balancer,
    resolve_options,
)

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
    "linear_scalarization",
    "list_balancers",
    "marigold",
    "register_balancer",
    "resolve_options",
    "rlw",
    "scale_invariant",
    "stch",
    "uncertainty",
]
