"""From a network of torch to a graph of ONNX, by torch's own exporter."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_bilb.errors import ExportError
from hf_bilb.inference.batches import by_task
from hf_bilb.losses.task_types import TaskType

if TYPE_CHECKING:
    import onnx_ir


class TaskOutputs(nn.Module):
    """What becomes the graph: a model whose inputs come in order, and whose outputs are one tensor for each task.

    Args:
        model: returns `logits`.
        tasks: name -> type, in the order of the outputs.
        inputs: names of the columns.
    """

    def __init__(self, model: nn.Module, tasks: Mapping[str, TaskType], inputs: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.tasks = dict(tasks)
        self.inputs = tuple(inputs)

    def forward(self, *columns: Tensor) -> tuple[Tensor, ...]:
        logits = self.model(**dict(zip(self.inputs, columns, strict=True)))["logits"]
        return tuple(by_task(self.tasks, logits).values())


def merged(model: Any) -> nn.Module:
    """The model with its adapters, where it has some, merged into its weights, which changes it."""
    plain: nn.Module = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    return plain.eval()


def output_names(tasks: Mapping[str, TaskType], inputs: Sequence[str]) -> list[str]:
    """Those of the tasks; `<task>_output` for one that is called as an input, and so on."""
    names: list[str] = []
    for task in tasks:
        name = task
        while name in inputs or (name != task and name in tasks):
            name += "_output"
        names.append(name)
    return names


def translate(
    model: nn.Module, tasks: Mapping[str, TaskType], batch: Mapping[str, Tensor], axes: Mapping[str, Mapping[int, str]]
) -> onnx_ir.Model:
    """The graph of `model`, without what names files of this machine.

    Args:
        model: without adapters (`merged`).
        tasks: of its outputs.
        batch: inputs that it is traced with.
        axes: input -> dimension that may have any size -> its name.

    Raises:
        ExportError: torch cannot translate it, or it computes with the sizes of this batch alone.
    """
    wanted = {name: dict(axes[name]) for name in batch}
    dims = {name: torch.export.Dim(name) for of_input in wanted.values() for name in of_input.values()}
    shapes = tuple({place: dims[name] for place, name in of_input.items()} for of_input in wanted.values())
    wrapped = TaskOutputs(model, tasks, list(batch)).eval()
    with _quiet(), torch.no_grad():  # with gradients the attention of some encoders (Swin) is not translated
        try:
            program = torch.onnx.export(
                wrapped,
                tuple(batch.values()),
                dynamo=True,
                verbose=False,
                input_names=list(batch),
                dynamic_shapes={"columns": shapes},
            )
        except Exception as error:  # of any kind: the model's code runs on symbols in place of numbers
            raise ExportError(f"torch cannot translate the model into ONNX: {_cause(error)}") from error
    assert program is not None
    graph = program.model.graph
    _check_sizes(graph, wanted)
    _drop_unused(graph)
    _name_outputs(graph, output_names(tasks, [str(value.name) for value in graph.inputs]))
    for node in graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with the paths of files
    return program.model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter tells those who develop it."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [one.level for one in loggers]
    try:
        for one in loggers:
            one.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)


def _cause(error: BaseException) -> str:
    """What went wrong first, in its first line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _check_sizes(graph: onnx_ir.Graph, wanted: Mapping[str, Mapping[int, str]]) -> None:
    """Where code takes a size for a plain number (`len(x)`), the graph has that of the batch which was traced."""
    for value in graph.inputs:
        assert value.shape is not None
        for place, name in wanted[str(value.name)].items():
            if isinstance(value.shape[place], int):
                raise ExportError(
                    f"the model computes with the {name} size {value.shape[place]} alone once it is translated: its "
                    "code takes the size of a tensor for a number (len(x) in place of x.shape[0])"
                )


def _drop_unused(graph: onnx_ir.Graph) -> None:
    """Inputs that the model passes over, such as token types, though the graph may take the batch's size from them."""
    for value in list(graph.inputs):
        uses = tuple(value.uses())
        if value.is_graph_output() or any(node.op_type != "Shape" for node, _ in uses):
            continue
        others = [other for other in graph.inputs if other is not value]
        found = [
            next((other for other in others if _sizes(other, node) == _sizes(value, node)), None) for node, _ in uses
        ]
        if None not in found:
            for (node, place), other in zip(uses, found, strict=True):
                node.replace_input_with(place, other)
            graph.inputs.remove(value)


def _sizes(value: onnx_ir.Value, node: onnx_ir.Node) -> list[str]:
    """The dimensions of `value` that a node of type Shape reads."""
    assert value.shape is not None
    start, end = (node.attributes[key].as_int() if key in node.attributes else None for key in ("start", "end"))
    return [str(size) for size in value.shape[start:end]]


def _name_outputs(graph: onnx_ir.Graph, names: Sequence[str]) -> None:
    """Name the outputs; a value within the graph that has such a name already gets another one."""
    inner = [value for node in graph.all_nodes() for value in node.outputs]
    for value in (*inner, *graph.initializers.values()):
        if value.name in names and not value.is_graph_output():
            value.name = f"{value.name}.inner"
    for value in graph.outputs:
        value.name = f"{value.name}.output"  # out of the way of those that are named next
    for value, name in zip(graph.outputs, names, strict=True):
        value.name = name
