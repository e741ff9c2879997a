"""What a recipe can name, each entry imported when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from importlib import import_module
from typing import Any, TypeVar

Entry = TypeVar("Entry")


class Registry(MutableMapping[str, Entry]):
    """Entries by name. Looking at names imports nothing; taking an entry imports the module that has it.

    Args:
        modules: name -> module, whose `SPEC` is the entry, or `module:NAME`.

    More entries can be put in (`registry["mine"] = ...`), also in place of those.
    """

    def __init__(self, modules: Mapping[str, str]) -> None:
        self.modules = dict(modules)
        self._entries: dict[str, Entry] = {}

    def __getitem__(self, name: str) -> Entry:
        """The entry; raises `KeyError` where there is none of this name."""
        if name not in self._entries:
            module, _, attribute = self.modules[name].partition(":")
            self._entries[name] = getattr(import_module(module), attribute or "SPEC")
        return self._entries[name]

    def __setitem__(self, name: str, entry: Entry) -> None:
        self._entries[name] = entry

    def __delitem__(self, name: str) -> None:
        if name not in self:
            raise KeyError(name)
        self._entries.pop(name, None)
        self.modules.pop(name, None)

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self.modules

    def __iter__(self) -> Iterator[str]:
        return iter([*self.modules, *(name for name in self._entries if name not in self.modules)])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def unread(self, name: str) -> str | None:
        """The module that has the entry, as long as it is not imported; None for one that is at hand."""
        return None if name in self._entries else self.modules.get(name)


DATA_SETS: Registry[Any] = Registry(
    {
        "adult": "hf_bilb.data.tables.adult",
        "celeba": "hf_bilb.data.images.celeba",
        "census_income": "hf_bilb.data.tables.census",
        "cityscapes": "hf_bilb.data.dense.cityscapes",
        "glue": "hf_bilb.data.text.glue",
        "instructions": "hf_bilb.data.text.instructions",
        "nyuv2": "hf_bilb.data.dense.nyuv2",
        "qm9": "hf_bilb.data.molecules.qm9",
        "qm9_graphs": "hf_bilb.data.molecules.qm9_graphs",
        "sarcos": "hf_bilb.data.tables.sarcos",
        "sider": "hf_bilb.data.molecules.molecule_net:SIDER",
        "table": "hf_bilb.data.own.data_set",
        "tox21": "hf_bilb.data.molecules.molecule_net:TOX21",
    }
)
MODELS: Registry[Any] = Registry(
    {
        "causal_lm": "hf_bilb.models.causal_lm",
        "celeba_cnn": "hf_bilb.models.celeba_cnn",
        "dense_backbone": "hf_bilb.models.dense.backbone",
        "image_encoder": "hf_bilb.models.image_encoder",
        "mpnn": "hf_bilb.models.graph.mpnn",
        "mtan": "hf_bilb.models.dense.mtan",
        "multi_task_text": "hf_bilb.models.text_encoder",
        "qm9_mlp": "hf_bilb.models.qm9_mlp",
        "segnet": "hf_bilb.models.dense.segnet",
        "tabular_mlp": "hf_bilb.models.tabular_mlp",
        "torch_module": "hf_bilb.models.torch_module",
    }
)
#: Of these, those that are no models of our own: their configs, where they have one, are those of transformers.
WITHOUT_CONFIG = ("causal_lm", "torch_module")
