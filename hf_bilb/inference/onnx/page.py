"""`README.md` of an exported model: its inputs and outputs, and code that goes from a row to the answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hf_bilb.data.inputs.kinds import FeatureInputs, ImageInputs, InputKind, SceneInputs, TableInputs, TextInputs
from hf_bilb.inference.saved import SavedModel
from hf_bilb.losses.task_types import TaskType


@dataclass(frozen=True)
class Port:
    """An input or an output of the graph.

    Attributes:
        name: in the graph.
        shape: numbers, and names of dimensions that may have any size.
        dtype: `float32` or `int64`.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str

    @property
    def cells(self) -> str:
        """The first cells of its row in a table."""
        return f"| `{self.name}` | `[{', '.join(map(str, self.shape))}]` | {self.dtype} |"


def page_text(
    saved: SavedModel, inputs: Sequence[Port], outputs: Sequence[Port], name: str, opset: int, version: str
) -> str:
    """The page.

    Args:
        saved: of the exported model; its tasks are those of `outputs`, in order.
        inputs, outputs: of the graph.
        name: of the model.
        opset: of the graph.
        version: of this package.
    """
    tasks = saved.format.tasks
    lines = [
        f"# {name} as ONNX",
        "",
        f"`{saved.model}`, exported by hf_bilb {version}: `model.onnx`, opset {opset}, float32. `hf_bilb.json` says "
        "how rows become its inputs and what its outputs mean; in `model.onnx` the metadata `hf_bilb` are the same.",
        "",
        "| input | shape | type | what |",
        "| --- | --- | --- | --- |",
        *(f"{port.cells} {_INPUTS.get(port.name, '')} |" for port in inputs),
        "",
        "| output | shape | type | what |",
        "| --- | --- | --- | --- |",
        *(f"{port.cells} {_meaning(task)} |" for port, task in zip(outputs, tasks.values(), strict=True)),
        "",
        f"This needs {', '.join(_packages(saved.format.inputs))}, and neither torch nor hf_bilb:",
        "",
        "```python",
        example(saved.format.inputs, tasks, [port.name for port in inputs], "."),
        "```",
    ]
    return "\n".join(lines) + "\n"


_INPUTS = {
    "input_ids": "tokens",
    "attention_mask": "1 for tokens, 0 for padding",
    "token_type_ids": "0 or 1, as the tokenizer says",
    "pixel_values": "RGB from 0 to 1; the model takes its own mean and deviation off",
    "numeric": "`(value - mean) / std`, NaN where missing",
    "categorical": "place of the word among the column's, from 1; 0 where missing or not known",
    "features": "`(value - mean) / std` of the numbers, then a 1 for the word of each other column",
}


def _meaning(task: TaskType) -> str:
    if task.type in ("regression", "dense_regression"):
        unit = f" is in {task.unit}" if task.unit else " is the number"
        return f"`output * std + mean`{unit}" if task.means else "the number"
    if task.type == "multi_label":
        return "the sigmoid is the probability of each label"
    return "the softmax is the probability of each class"


def _packages(kind: InputKind) -> list[str]:
    of_kind = {"text": ["transformers"], "table": ["pandas"], "features": ["pandas"]}
    return ["onnxruntime", "numpy", *of_kind.get(kind.kind, ["pillow"])]


# --- code ---------------------------------------------------------------------------------------------------------


def example(kind: InputKind, tasks: Mapping[str, TaskType], inputs: Sequence[str], folder: str) -> str:
    """Code from a row to what is printed.

    Args:
        kind: of the rows.
        tasks: in the order of the outputs.
        inputs: of the graph.
        folder: that it reads.
    """
    imports, rows = _reading(kind, inputs)
    return "\n".join(
        [
            "import json",
            "from pathlib import Path",
            "",
            *sorted(["import numpy as np", "import onnxruntime", *imports], key=lambda line: line.split()[1].lower()),
            "",
            f'folder = Path("{folder}")',
            'saved = json.loads((folder / "hf_bilb.json").read_text(encoding="utf-8"))',
            'session = onnxruntime.InferenceSession(folder / "model.onnx")',
            "",
            *rows,
            "",
            "",
            "def answer(task, output):",
            *(f"    {line}" for line in _decoding(tasks)),
            "",
            "",
            'for task, output in zip(saved["tasks"], session.run(None, inputs)):',
            '    print(task["name"], answer(task, output))',
        ]
    )


def _reading(kind: InputKind, inputs: Sequence[str]) -> tuple[list[str], list[str]]:
    """Imports, and the lines that make `inputs`."""
    if isinstance(kind, TextInputs):
        return ["from transformers import AutoTokenizer"], _texts(kind)
    if isinstance(kind, TableInputs | FeatureInputs):
        return ["import pandas as pd"], _table(kind, inputs)
    return ["from PIL import Image"], _image(kind)


def _texts(kind: TextInputs) -> list[str]:
    count = max(map(len, kind.columns))
    if kind.are_words:
        rows, given = '[["One", "row", "is", "a", "list", "of", "words", "."]]', ["rows", "is_split_into_words=True"]
    elif count == 1:
        rows, given = '["Great service.", "Never again."]', ["rows"]
    else:
        rows = '[("Great service.", "We will come again."), ("No.", "Never again.")]'
        given = ["[first for first, _ in rows]", "[second for _, second in rows]"]
    return [
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        f"rows = {rows}",
        "tokens = tokenizer(",
        *(f"    {one}," for one in given),
        "    padding=True,",
        "    truncation=True,",
        '    max_length=saved["inputs"]["max_length"],',
        '    return_tensors="np",',
        ")",
        "inputs = {one.name: tokens[one.name] for one in session.get_inputs()}",
    ]


def _table(kind: TableInputs | FeatureInputs, inputs: Sequence[str]) -> list[str]:
    lines = [f"rows = {_rows(kind)}", 'columns = saved["inputs"]']
    one_hot, parts = kind.kind == "features", []
    if kind.numeric and ("numeric" in inputs or one_hot):
        parts.append("numeric")
        lines += [
            'numbers = rows[columns["numeric"]].to_numpy(np.float64, na_value=np.nan)',
            'numeric = ((numbers - columns["means"]) / columns["stds"]).astype(np.float32)',
        ]
    if kind.categorical and ("categorical" in inputs or one_hot):
        parts.append("categorical")
        lines += [
            "places = [  # from 0; -1 where missing or not known; whole numbers are words such as 3",
            '    pd.Index(known).get_indexer(rows[name].map(str, na_action="ignore"))',
            '    for name, known in zip(columns["categorical"], columns["categories"])',
            "]",
        ]
        if one_hot:
            lines += [
                'sizes = [len(known) for known in columns["categories"]]',
                "one_hot = [np.eye(size + 1)[place][:, :-1] for size, place in zip(sizes, places)]",
                "categorical = np.concatenate(one_hot, axis=1)",
            ]
        else:
            lines.append("categorical = np.stack(places, axis=1) + 1")
    if one_hot:
        lines.append(f'inputs = {{"features": np.concatenate([{", ".join(parts)}], axis=1, dtype=np.float32)}}')
    else:
        lines.append("inputs = {" + ", ".join(f'"{name}": {name}' for name in parts) + "}")
    return lines


def _rows(kind: TableInputs | FeatureInputs) -> str:
    """One row in the middle of the training data; a file, where it would be long."""
    cells = [
        f"{json.dumps(name, ensure_ascii=False)}: {mean:.4g}"
        for name, mean in zip(kind.numeric, kind.means, strict=True)
    ]
    for name, known in zip(kind.categorical, kind.categories, strict=True):
        cells.append(f"{json.dumps(name, ensure_ascii=False)}: {json.dumps((*known, '')[0], ensure_ascii=False)}")
    row = f"pd.DataFrame([{{{', '.join(cells)}}}])"
    return row if len(row) < 100 else 'pd.read_csv("rows.csv")'


def _image(kind: InputKind) -> list[str]:
    lines = ['image = Image.open("photo.jpg").convert("RGB")']
    if isinstance(kind, ImageInputs):
        lines += [
            'size = saved["inputs"]["image_size"]',
            "image = image.resize((size, size), Image.Resampling.BILINEAR)",
        ]
    if isinstance(kind, SceneInputs):
        lines += [
            'height, width = saved["inputs"]["size"]',
            "image = image.resize((width, height), Image.Resampling.BILINEAR)",
        ]
    return [*lines, 'inputs = {"pixel_values": np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 255}']


def _decoding(tasks: Mapping[str, TaskType]) -> list[str]:
    """The body of `answer`, for the types that there are."""
    types, lines = {task.type for task in tasks.values()}, []
    if "regression" in types:
        lines += [
            'if task["type"] == "regression":',
            '    return output * task.get("stds", [1]) + task.get("means", [0])',
        ]
    if "dense_regression" in types:
        lines += [
            'if task["type"] == "dense_regression":  # [rows, numbers, height, width]',
            '    scale = [np.reshape(task[key], (-1, 1, 1)) for key in ("stds", "means") if key in task]',
            "    return output * scale[0] + scale[1] if scale else output",
        ]
    if "multi_label" in types:
        lines += ['if task["type"] == "multi_label":', "    return 1 / (1 + np.exp(-output))  # the probabilities"]
    if "segmentation" in types:
        lines += [
            'if task["type"] == "segmentation":  # [rows, classes, height, width]',
            "    return output.argmax(axis=1)",
        ]
    if "token_classification" in types:
        lines += [
            'if task["type"] == "token_classification":  # a word has the tag of its first token',
            "    words = [tokens.word_ids(row) for row in range(len(rows))]",
            "    places = [[of.index(word) for word in sorted({*of} - {None})] for of in words]",
            '    tags = np.array(task["names"])[output.argmax(axis=-1)]',
            "    return [tags[row, of].tolist() for row, of in enumerate(places)]",
        ]
    if "classification" in types:
        lines += [
            "best = output.argmax(axis=-1)",
            'return np.array(task["names"])[best] if "names" in task else best',
        ]
    return lines
