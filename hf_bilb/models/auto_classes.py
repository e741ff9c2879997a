"""`AutoConfig` and `AutoModel` know our models after `import hf_bilb`, and neither transformers nor torch is imported
for that.

When `transformers` imports its table of configs, a stand-in for each of our configs is put in, by its public
`AutoConfig.register`. The first use of a stand-in imports the module of the model, which registers the config and the
model themselves. Where the table is imported already, this is done at once.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from hf_bilb.config.registry import MODELS, WITHOUT_CONFIG

#: The module of transformers that has the table.
TABLE = "transformers.models.auto.configuration_auto"


def register_when_needed() -> None:
    """Now, where the table is there; else when it is imported. Any number of calls is as good as one."""
    if TABLE in sys.modules:
        _register_stand_ins(sys.modules[TABLE])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the table, by the other finders, and adds to its import that the stand-ins are put in."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # As if it had never been another one: what asks for a module's source goes to its loader.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _register_stand_ins(module)


def _register_stand_ins(table: ModuleType) -> None:
    for name in MODELS.modules:
        if name not in WITHOUT_CONFIG and MODELS.unread(name) is not None:
            table.AutoConfig.register(name, _stand_in(name), exist_ok=True)


def _stand_in(name: str) -> type[Any]:
    """A class in place of the config of our model `name`: making a config imports the model and makes its own."""
    from transformers.configuration_utils import PretrainedConfig

    def make(cls: type[Any], *args: Any, **kwargs: Any) -> Any:
        return MODELS[name].config_class(*args, **kwargs)

    def from_dict(cls: type[Any], config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return MODELS[name].config_class.from_dict(config_dict, **kwargs)

    body = {"model_type": name, "__new__": make, "from_dict": classmethod(from_dict)}
    return type(f"{name}_stand_in", (PretrainedConfig,), body)
