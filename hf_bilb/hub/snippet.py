"""Python code that loads a model and predicts with it, for the card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_bilb.errors import one_line
from hf_bilb.hub.remote_code import has_code


def snippet(name: str, saved: Mapping[str, Any]) -> str:
    """Code that runs as it is, where the files that it names are there.

    Args:
        name: of the repository, or a folder.
        saved: the content of `hf_bilb.json`; empty where the model has none.
    """
    trusted = ", trust_remote_code=True" if saved.get("module") else ""
    lines = ["import hf_bilb", "", f"model = hf_bilb.load({name!r}{trusted})"]
    inputs = saved.get("inputs") or {"kind": "none"}
    if any(task["type"] in _MAPS for task in saved.get("tasks", ())):
        lines += _pixels(inputs, saved["tasks"])
    else:
        lines += _READS.get(inputs["kind"], _nothing)(inputs)
    return "\n".join(lines)


def without_package(name: str, model: str, adapters: bool) -> str:
    """Code that loads the network of a repository by transformers alone; empty where that cannot be.

    Args:
        name: of the repository.
        model: its name in recipes, or its `model_type`.
        adapters: only adapters and heads are in the repository.
    """
    if model == "causal_lm":
        kind, trusted = "AutoModelForCausalLM", ""
    elif has_code(model):
        kind, trusted = "AutoModel", ", trust_remote_code=True"
    else:
        return ""
    lines = [f"from transformers import {kind}", ""]
    where = repr(name)
    if adapters and trusted:  # of a name, transformers looks for the adapters' base model in place of the code
        lines.insert(0, "from huggingface_hub import snapshot_download")
        where = f"snapshot_download({name!r})"
    return "\n".join([*lines, f"network = {kind}.from_pretrained({where}{trusted})"])


def _text(inputs: Mapping[str, Any]) -> list[str]:
    if inputs["are_words"]:
        rows = "[['One', 'row', 'is', 'a', 'list', 'of', 'words', '.']]"
    elif max(map(len, inputs["columns"])) > 1:
        rows = "[('The first text.', 'The second text.')]"
    else:
        rows = "['One text.', 'Another text.']"
    return [*_columns(column for choice in inputs["columns"] for column in choice), *_predicted(rows)]


def _image(inputs: Mapping[str, Any]) -> list[str]:
    return _predicted("['photo.jpg']")


def _pixels(inputs: Mapping[str, Any], tasks: Sequence[Mapping[str, Any]]) -> list[str]:
    if inputs["kind"] == "none":  # of a run of an earlier version
        return _nothing(inputs)
    lines = ["for prediction in model.predict(['photo.jpg']):  # or a folder of images"]
    for task in tasks:
        shown = _MAPS.get(task["type"])
        taken = f"prediction[{task['name']!r}]"
        lines.append(f"    print({taken})" if shown is None else f"    print({taken}.shape)  # {shown}")
    return lines


def _table(inputs: Mapping[str, Any]) -> list[str]:
    return [*_columns([*inputs["numeric"], *inputs["categorical"]]), *_predicted("'rows.csv'")]


def _molecules(inputs: Mapping[str, Any]) -> list[str]:
    return _predicted("['CCO', 'c1ccccc1']")


def _prompts(inputs: Mapping[str, Any]) -> list[str]:
    return ["answers = model.predict(['A prompt.'])", "print(answers[0])"]


def _nothing(inputs: Mapping[str, Any]) -> list[str]:
    return ["network = model.model  # a torch.nn.Module"]


_READS = {
    "text": _text,
    "image": _image,
    "table": _table,
    "features": _table,
    "smiles": _molecules,
    "prompt": _prompts,
}


#: Types of tasks of pixels -> what a map of the image's size holds.
_MAPS = {"segmentation": "numbers of classes", "dense_regression": "numbers"}


def _predicted(rows: str) -> list[str]:
    return [f"predictions = model.predict({rows})", "print(predictions.to_pandas())"]


def _columns(names: Any, most: int = 8) -> list[str]:
    known: Sequence[str] = [one_line(name, 40) for name in dict.fromkeys(names)]
    more = f" and {len(known) - most} more" if len(known) > most else ""
    return [f"# a file or a DataFrame has the columns {', '.join(known[:most])}{more}"] if known else []
