"""Methods registered during a test are gone after it, and their files can be imported again."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hf_bilb.balancers import registry


@contextmanager
def registration_undone() -> Iterator[None]:
    """What is registered inside, and the modules that did it, are forgotten at the end."""
    for name in registry.BUILT_IN:  # imported inside, it would be forgotten with the others
        registry.get_balancer_spec(name)
    specs, modules = dict(registry._REGISTRY), set(sys.modules)
    try:
        yield
    finally:
        registry._REGISTRY.clear()
        registry._REGISTRY.update(specs)
        for name in [name for name in sys.modules if name not in modules and name.startswith("hf_bilb_reference_")]:
            del sys.modules[name]
