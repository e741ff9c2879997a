"""The columns of a batch: which ones the model's forward takes, which ones the loss alone needs, why one is missing."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, cast

from accelerate.utils import is_compiled_module
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel
from transformers.trainer_utils import unwrap_peft_model

from hf_bilb.config.options import nearest
from hf_bilb.errors import MissingColumnError, TrainerError
from hf_bilb.trainer.task_datasets import sets_of

logger = logging.getLogger(__name__)

#: What the usual collators hand over as `labels`.
COLLATED_LABELS = ("label", "label_ids")


def innermost(model: nn.Module) -> nn.Module:
    """The module whose forward names the columns: inside `torch.compile`, wrappers of several devices, and peft."""
    while True:
        if is_compiled_module(model):
            model = cast(nn.Module, model._orig_mod)
        elif isinstance(model, (DataParallel, DistributedDataParallel, FullyShardedDataParallel)):
            model = model.module
        elif (base := unwrap_peft_model(model)) is not model:
            model = base
        else:
            return model


def config_of(model: nn.Module) -> Any:
    """The config of the model inside the wrappers, or None."""
    return getattr(innermost(model), "config", None)


class ForwardColumns:
    """Which columns of a batch the model's forward takes.

    Args:
        model: wrapped or not.
        label_names: label columns.
        withhold_labels: a `task_loss_func` makes the losses of them: a forward with `**kwargs` that does not name them
            gets none of them.
        told: columns that say something of the rows (`task_ids`): kept as labels are, and withheld like them.

    Attributes:
        taken: whether the forward takes a column, by its name; found out once for each.
        takes_everything: the forward names nothing and takes anything (`forward(**batch)`): no column is unused.
        signature: the columns that `remove_unused_columns` keeps.
    """

    def __init__(
        self, model: nn.Module, label_names: list[str], withhold_labels: bool, told: Sequence[str] = ()
    ) -> None:
        model = innermost(model)
        self._names, self._takes_any = _parameters(model.forward)
        self._withheld = {*label_names, *told} if withhold_labels else set()
        self._encoder = _encoder_parameters(model) if self._takes_any else set()
        self.takes_everything = self._takes_any and not self._names
        self.taken: Mapping[str, bool] = _Answers(self.takes)
        self.signature = [*self._names, *sorted({*COLLATED_LABELS, *label_names, *told})]

    def select(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The part of `inputs` to call the model with."""
        if not isinstance(inputs, Mapping):
            raise TrainerError(
                f"batch: got a {type(inputs).__name__}, expected a mapping column -> values, which the model is called "
                "with; let the data_collator return a dict"
            )
        return {key: value for key, value in inputs.items() if self.taken[key]}

    def select_to_generate(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The part of `inputs` for `model.generate`, which refuses what neither model nor encoder name."""
        return {key: value for key, value in inputs.items() if key in self._names or key in self._encoder}

    def takes(self, key: str) -> bool:
        """Whether the model's forward takes the column `key`."""
        return key in self._names or (self._takes_any and key not in self._withheld)


class _Answers(dict[str, bool]):
    """The answers to a question about names, each asked once."""

    def __init__(self, ask: Callable[[str], bool]) -> None:
        super().__init__()
        self._ask = ask

    def __missing__(self, name: str) -> bool:
        self[name] = self._ask(name)
        return self[name]


def takes_any(model: nn.Module) -> bool:
    """Whether the model's forward takes keywords that it does not name."""
    return _parameters(model.forward)[1]


def _parameters(forward: Callable[..., Any]) -> tuple[list[str], bool]:
    """The names that `forward` can be called with, and whether it takes any other."""
    try:
        parameters = inspect.signature(forward).parameters.values()
    except ValueError:
        # A traced module's; it is not written in Python.
        return [argument.name for argument in forward.schema.arguments[1:]], False  # type: ignore[attr-defined]
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = [p.name for p in parameters if p.kind not in variable]
    return names, any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def _encoder_parameters(model: nn.Module) -> set[str]:
    if not isinstance(model, PreTrainedModel) or not getattr(model.config, "is_encoder_decoder", False):
        return set()
    return set(_parameters(model.get_encoder().forward)[0])


# --- a column that is not there -------------------------------------------------------------------------------------


class MissingColumns:
    """Says why a function of the user's finds no such column in a batch.

    Args:
        columns: of the model.
        label_names: label columns.
        removes: whether `remove_unused_columns` is on.
        data_sets: gives the data sets that batches may come from.
    """

    def __init__(
        self,
        columns: ForwardColumns,
        label_names: list[str],
        removes: bool,
        data_sets: Callable[[], Iterable[object]],
    ) -> None:
        self._kept = set(columns.signature)
        self._label_names = label_names
        self._removes = removes and not columns.takes_everything
        self._data_sets = data_sets
        self._said: set[str] = set()

    def watched(self, batch: Mapping[str, Any], asker: str) -> Batch:
        """A copy of `batch` (not of its tensors) to call the function `asker` with."""
        return Batch(batch, self, asker)

    def watching(self, function: Callable[[Mapping[str, Any]], Any], asker: str) -> Callable[[Mapping[str, Any]], Any]:
        """`function` of a batch, called with watched ones."""
        return lambda batch: function(self.watched(batch, asker))

    def refuse(self, key: object, batch: Mapping[str, Any], asker: str) -> NoReturn:
        """Raise `MissingColumnError`: one line that says why `batch` has no column `key` and what to do."""
        known = {name for data in self._data_sets() for name in _column_names(data, look=True)}
        what = f"{asker}: the batch has no column {key!r}"
        if self._dropped(key, known):
            raise MissingColumnError(f"{what}: {self._why_dropped(key)}")
        if key in known:
            did = "calls it 'labels'" if key in COLLATED_LABELS and "labels" in batch else "left it out"
            raise MissingColumnError(f"{what}, though the data set has it: the data collator {did}")
        near = nearest(str(key), {*batch, *known})
        columns = ", ".join(map(str, batch)) or "no columns"
        hint = "" if known or not self._removes else "; remove_unused_columns drops those not in label_names"
        raise MissingColumnError(f"{what}{near}; it has: {columns}{hint}")

    def mention(self, key: object, asker: str) -> None:
        """Warn once where the function asks whether the batch has a column that was dropped."""
        if key in self._said or not self._removes:
            return
        if self._dropped(key, {name for data in self._data_sets() for name in _column_names(data, look=False)}):
            self._said.add(str(key))
            logger.warning("%s asks for the column %r: %s", asker, key, self._why_dropped(key))

    def _dropped(self, key: object, known: set[str]) -> bool:
        return self._removes and key in known and key not in self._kept

    def _why_dropped(self, key: object) -> str:
        return (
            "remove_unused_columns dropped it, for the model's forward does not take it; keep it by "
            f"label_names={[*self._label_names, key]}, or by remove_unused_columns=False"
        )


class Batch(dict[str, Any]):
    """A batch as a user's function sees it: a dict that says why a column is not there."""

    def __init__(
        self, columns: Mapping[str, Any], missing: MissingColumns | None = None, asker: str = "task_loss_func"
    ) -> None:
        super().__init__(columns)
        self._missing = missing
        self._asker = asker

    def __missing__(self, key: str) -> NoReturn:
        if self._missing is None:
            raise KeyError(key)
        self._missing.refuse(key, self, self._asker)

    def __contains__(self, key: object) -> bool:
        found = super().__contains__(key)
        if not found and self._missing is not None:
            self._missing.mention(key, self._asker)
        return found

    def get(self, key: str, default: Any = None) -> Any:
        """As in dict."""
        return super().get(key, default) if key in self else default

    def pop(self, key: str, *default: Any) -> Any:
        """As in dict."""
        return super().pop(key, *default) if key in self or default else self[key]


def _column_names(data: Any, look: bool) -> Iterator[str]:
    """The names of a data set's columns, as far as they can be told; `look`: an example may be drawn for it."""
    sets = sets_of(data)
    if sets is not None:
        for part in sets.values():
            yield from _column_names(part, look)
        return
    names = getattr(data, "column_names", None)
    if names is not None:
        yield from names
    elif isinstance(data, (list, tuple)) or (look and data is not None and not isinstance(data, IterableDataset)):
        first = data[0] if len(data) else None
        yield from first if isinstance(first, Mapping) else ()
