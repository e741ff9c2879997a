"""Any torch model: a recipe names a Python file, or a module, and the function in it that builds the network.

    model:
      name: torch_module
      factory: recipes/sarcos/network.py:build      # or package.module:build
      arguments: {hidden_size: 128}

    def build(num_features: int, num_tasks: int, hidden_size: int) -> nn.Module: ...

The function gets the recipe's arguments, and of what the data dictate what its parameters name: `num_features`,
`tasks`, `task_names`, `num_tasks`, ... What it returns is any `nn.Module`, whose forward takes columns of a batch by
name (`features`) and returns predictions `[B, K]`, a column for each task, or where some task has several outputs or is
of pixels a tuple with one tensor per task: `[B, size]`, of pixels `[B, size, H, W]`. It knows nothing of labels: losses
are the data set's (`TaskData.task_loss_func`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from hf_bilb.config.options import nearest
from hf_bilb.config.user_code import check_reference, load_reference
from hf_bilb.errors import OptionError
from hf_bilb.losses.task_types import have_one_output
from hf_bilb.models.spec import PlainModelSpec


@dataclass(frozen=True)
class TorchModuleOptions:
    """What a recipe's `model:` section may set.

    Attributes:
        factory: `path/to/file.py:function`, relative to the current folder, or `package.module:function`.
        arguments: the function's, in addition to what the data dictate.

    Raises:
        OptionError: `factory` is not of this form.
    """

    factory: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_reference(self.factory, "factory")


def build_torch_module(options: TorchModuleOptions, /, **dictated: Any) -> nn.Module:
    """Import what the recipe names, call it, and see that it returned a module.

    The module is returned as it is, but for a hook that hands its predictions to the Trainer under the name `logits`.

    Args:
        options: of the recipe.
        dictated: `TaskData.model_arguments`; with `tasks` in it, `task_names` may be named as well, and with those
            `num_tasks`.

    Raises:
        OptionError: no such file, module or function; arguments that it does not take or that are missing; something
            else than a module was returned; later, from its forward, where that returns no such predictions. What the
            file's own code raises when called comes through as it is.
    """
    factory = load_reference(options.factory, "model.factory")
    arguments = _arguments(factory, options, dictated)
    model = factory(**arguments)
    if not isinstance(model, nn.Module):
        raise OptionError(f"model.factory: {options.factory} returned {type(model).__name__}, expected an nn.Module")
    tasks = dictated.get("tasks", {})
    sizes = [task.size for task in tasks.values()] if tasks else [1] * len(dictated.get("task_names") or ())
    model.register_forward_hook(_NamedLogits(options.factory, sizes or None, not have_one_output(tasks)))
    return model


def check_columns(model: nn.Module, batch: Mapping[str, Any], label_names: tuple[str, ...]) -> None:
    """Raise `OptionError` where the model's forward requires a column that `batch` does not have.

    A module whose forward is called `forward(x)` would otherwise be told that x is missing, in the middle of a stack.
    """
    columns = [name for name in batch if name not in label_names]
    for name, parameter in inspect.signature(model.forward).parameters.items():
        variable = parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        if not variable and parameter.default is inspect.Parameter.empty and name not in columns:
            near = nearest(name, columns)
            raise OptionError(
                f"model.factory: forward of {type(model).__name__} takes {name!r}, which is no column of a batch; "
                f"expected some of {', '.join(columns)}{near}"
            )


@dataclass
class _NamedLogits:
    """A forward hook: Trainer takes a bare tensor for a tuple that begins with the loss, and cuts its first row off."""

    factory: str
    sizes: list[int] | None
    split: bool  # whether there is a tensor for each task

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> dict[str, Tensor | tuple[Tensor, ...]]:
        if self.sizes is not None and self.split:
            return {"logits": self._of_tasks(output, self.sizes)}
        columns = None if self.sizes is None else len(self.sizes)
        if not isinstance(output, Tensor) or output.ndim != 2 or columns not in (None, output.shape[1]):
            raise OptionError(
                f"model.factory: the module of {self.factory} returned {_shape(output)}, expected a tensor "
                f"[B, {'K' if columns is None else columns}], a column for each task"
            )
        return {"logits": output}

    def _of_tasks(self, output: Any, sizes: list[int]) -> tuple[Tensor, ...]:
        given = tuple(output) if isinstance(output, tuple | list) else (output,)
        widths = [_width(part) if isinstance(part, Tensor) else 0 for part in given]
        if widths != sizes:
            raise OptionError(
                f"model.factory: the module of {self.factory} returned {', '.join(map(_shape, given))}, expected a "
                f"tuple of {len(sizes)} tensors, one for each task, with {', '.join(map(str, sizes))} outputs"
            )
        return given


def _width(output: Tensor) -> int:
    """Of `[B, n]` or `[B, T, n]`, and of pixels `[B, n, H, W]`; 0 of anything else."""
    return 0 if output.ndim < 2 else output.shape[1 if output.ndim == 4 else -1]


def _shape(output: Any) -> str:
    return f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__


def _arguments(factory: Callable[..., Any], options: TorchModuleOptions, dictated: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's arguments, and of those that the data dictate the ones that the factory names."""
    signature = inspect.signature(factory)
    offered = dict(dictated)
    if "tasks" in offered:
        offered["task_names"] = list(offered["tasks"])
    if "task_names" in offered:
        offered["num_tasks"] = len(offered["task_names"])
    for key in options.arguments:
        if key in offered:
            raise OptionError(f"model.arguments.{key}: comes from the data ({offered[key]!r}), a recipe cannot set it")
    arguments = {key: value for key, value in offered.items() if key in signature.parameters} | options.arguments
    try:
        signature.bind(**arguments)
    except TypeError as error:
        unknown = [key for key in options.arguments if key not in signature.parameters]
        near = nearest(unknown[0], signature.parameters) if unknown else ""
        raise OptionError(
            f"model.arguments: {options.factory} takes {signature}: {error}{near}; "
            f"the data offer {', '.join(offered) or 'nothing'}"
        ) from None
    return arguments


SPEC = PlainModelSpec(options=TorchModuleOptions, build=build_torch_module)
