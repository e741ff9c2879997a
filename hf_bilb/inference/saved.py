"""`hf_bilb.json`: what lies next to a model's weights, so that its folder is all that predicting needs.

| key | what it says |
|---|---|
| `format` | of this file |
| `model`, `data` | their names in the recipe |
| `inputs` | how rows become inputs (`hf_bilb.data.inputs.kinds`): columns, lengths, means and deviations, categories |
| `tasks` | in the order of the outputs: name, type, classes, unit, means and deviations of the targets |
| `labels` | in which columns a task's labels stand, and what measures it |
| `csv` | how text files are read |
| `module` | of `torch_module`: the file with the network's function, a copy of which lies there, and its arguments |

A run writes it with the model, at its end and in every checkpoint. The weights, the config of the network itself and
the tokenizer are files of their own, as transformers and peft have them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_bilb.data.inputs.format import DataFormat
from hf_bilb.data.inputs.kinds import NoInputs
from hf_bilb.errors import CheckpointError, OptionError

if TYPE_CHECKING:
    from torch import nn

    from hf_bilb.data.task_data import TaskData

FILE = "hf_bilb.json"
FORMAT = 1


@dataclass(frozen=True)
class SavedModel:
    """What the file says.

    Attributes:
        model, data: names in the recipe.
        format: how rows become inputs, and what outputs mean.
        module: of `torch_module`: `factory`, `arguments` and `dictated`; None for others.
    """

    model: str
    data: str
    format: DataFormat
    module: Mapping[str, Any] | None = None

    def to_bytes(self) -> bytes:
        """The content of the file."""
        values = {"format": FORMAT, "model": self.model, "data": self.data, **self.format.to_dict()}
        if self.module is not None:
            values["module"] = self.module
        return (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode()


def model_files(model_options: Mapping[str, Any], data_name: str, data: TaskData, model: nn.Module) -> dict[str, bytes]:
    """Name -> content of what is written next to the weights of a run's model.

    Args:
        model_options: the `model` section of the recipe.
        data_name: of the data set in the recipe.
        data: it.
        model: of the run.
    """
    files: dict[str, bytes] = {}
    module = None
    if model_options["name"] == "torch_module":
        module, code = _module(model_options, data)
        files.update(code)
    config = _config_of_adapted(model)
    if config is not None:
        files["config.json"] = config.encode()
    files[FILE] = SavedModel(model_options["name"], data_name, _format_of(data, data_name), module).to_bytes()
    return files


def _format_of(data: TaskData, name: str) -> DataFormat:
    if data.format is not None:
        return data.format
    reason = f"the data set {name!r} does not say how rows become inputs"
    return DataFormat(NoInputs(reason), data.model_arguments.get("tasks", {}))


def _module(options: Mapping[str, Any], data: TaskData) -> tuple[dict[str, Any], dict[str, bytes]]:
    """How the network is built again, and the files with its code."""
    source, _, function = options["factory"].rpartition(":")
    code = {}
    if source.endswith(".py"):
        code[Path(source).name] = Path(source).read_bytes()
        source = Path(source).name
    dictated = {key: value for key, value in data.model_arguments.items() if key != "tasks"}
    module = {"factory": f"{source}:{function}", "arguments": options["arguments"], "dictated": _plain(dictated)}
    return {**module, "needs_tasks": "tasks" in data.model_arguments}, code


def _plain(dictated: Mapping[str, Any]) -> dict[str, Any]:
    """Those that JSON holds; what a data set of somebody's own dictates may be anything."""
    found = {}
    for key, value in dictated.items():
        try:
            found[key] = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            continue
    return found


def _config_of_adapted(model: nn.Module) -> str | None:
    """The config of a model under adapters, which peft does not save, where it knows no base model by name.

    With a name it would be in the way: `from_pretrained` would look for the whole model in the folder.
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel) or model.active_peft_config.base_model_name_or_path:
        return None
    return str(model.get_base_model().config.to_json_string())


def read_saved(folder: Path) -> SavedModel:
    """What `hf_bilb.json` of a folder says.

    Raises:
        CheckpointError: it is damaged, or of another version.
    """
    path = folder / FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise CheckpointError(f"{path}: has the format {values['format']}, expected {FORMAT}")
        form = DataFormat.from_dict(values, str(path))
        return SavedModel(values["model"], values["data"], form, values.get("module"))
    except (OSError, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: is damaged: {type(error).__name__}: {error}") from None
    except OptionError as error:
        raise CheckpointError(str(error)) from None
