"""The code of a packaged model, next to its weights in a repository: `trust_remote_code=True` loads it without this
package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_bilb._version import __version__
from hf_bilb.config.registry import MODELS, WITHOUT_CONFIG
from hf_bilb.errors import CheckpointError
from hf_bilb.hub.flat_sources import file_stem, flat_sources

CONFIG = "config.json"
ADAPTERS = "adapter_config.json"
_HEADER = (
    f"# From {{module}} of hf_bilb {__version__}, Apache License 2.0 (https://www.apache.org/licenses/LICENSE-2.0).\n"
    "# Cut out by `hf-bilb push`, so that trust_remote_code=True loads the model where hf_bilb is not installed."
)
#: What only adapters need, by peft.
_OF_ADAPTERS = {
    "hf_bilb.models.lora": "this code does not load adapters, and the folder has some; import hf_bilb first"
}


def with_code(files: Mapping[str, Path | bytes]) -> dict[str, Path | bytes]:
    """The files of a repository, and where its model is one of this package the code of it, which its config names.

    Models of transformers (`causal_lm`), `torch_module` and models that somebody else has registered have none.

    Args:
        files: path in the repository -> file or content; with `config.json` of the model.

    Raises:
        CheckpointError: `config.json` is damaged.
    """
    found = dict(files)
    config = _read_config(found.get(CONFIG, b"{}"))
    classes = _classes(config.get("model_type"))
    if not classes:
        return found
    references = {auto: f"{file_stem(one.__module__)}.{one.__name__}" for auto, one in classes.items()}
    wanted: dict[str, set[str]] = {}
    for one in classes.values():
        wanted.setdefault(one.__module__, set()).add(one.__name__)
    code = flat_sources(wanted, _HEADER, {} if ADAPTERS in found else _OF_ADAPTERS)
    found.update({name: source.encode() for name, source in code.items()})
    found[CONFIG] = (json.dumps({**config, "auto_map": references}, indent=2, sort_keys=True) + "\n").encode()
    return found


def has_code(model_type: object) -> bool:
    """Whether a repository with a model of this type gets its code."""
    return bool(_classes(model_type))


def _classes(model_type: object) -> dict[str, type[Any]]:
    """`AutoConfig`, `AutoModel` -> the class of this package; empty for models of others."""
    if not isinstance(model_type, str) or model_type in WITHOUT_CONFIG or model_type not in MODELS:
        return {}
    spec = MODELS[model_type]
    classes = {"AutoConfig": spec.config_class, "AutoModel": spec.model_class}
    ours = all(one.__module__.startswith("hf_bilb.") for one in classes.values())
    return classes if ours else {}


def _read_config(source: Path | bytes) -> dict[str, Any]:
    try:
        found = json.loads(source if isinstance(source, bytes) else source.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{source if isinstance(source, Path) else CONFIG}: is damaged: {error}") from None
    return found if isinstance(found, dict) else {}
