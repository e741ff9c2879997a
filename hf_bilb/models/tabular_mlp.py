"""A multilayer perceptron on the columns of a table, one linear head per task of any type.

    inputs   = [numbers, which of them are missing, an embedding of the value of each categorical column]
    features = L times: dropout(relu(norm(linear(.))))
    task:      head_<task>(features)

A missing number is 0, the mean of standardised numbers, and a second input of its column says so. A missing or unknown
value of a categorical column is the embedding of number 0, which begins as zeros: where training has none, it stays
neutral. Norm is layer normalisation, so that a row does not depend on the others in its batch. ReLU and dropout are
what Gorishniy et al. (Revisiting Deep Learning Models for Tabular Data, NeurIPS 2021, arXiv 2106.11959) have in their
MLP, which few models beat on tables without tuning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_bilb.errors import OptionError, TaskLossError
from hf_bilb.losses.task_types import ROW_TYPES, TaskType
from hf_bilb.models.base import check_dropout, check_size
from hf_bilb.models.outputs import KEYS_TO_IGNORE_AT_INFERENCE, MultiTaskOutput
from hf_bilb.models.spec import ModelSpec
from hf_bilb.models.tasks import Tasks, TasksConfig
from hf_bilb.models.typed_tasks import TypedTasksModel

_LARGEST_EMBEDDING = 32


@dataclass(frozen=True)
class TabularMlpOptions:
    """What a recipe's `model:` section may set.

    Attributes:
        hidden_sizes: width of each layer, one number or more.
        embedding_size: numbers in the embedding of a categorical column's value, the same for all columns; null: by
            the column with the most values n, 1.6 n^0.56 rounded, at most 32 (2 for n = 2, 6 for 10, 21 for 100).
        dropout: after every layer, in [0, 1).
    """

    hidden_sizes: tuple[int, ...] = (256, 256)
    embedding_size: int | None = None
    dropout: float = 0.1

    def __post_init__(self) -> None:
        _check_sizes(self.hidden_sizes, self.embedding_size, self.dropout)


class TabularMlpConfig(TasksConfig):
    """What `TabularMlpModel` is made of, and what it has to know of the columns to read a row.

    Args:
        tasks: name -> type (`hf_bilb.losses.task_types`), or that as a dict, of rows; None: one number, `task_0`.
        numeric_names: the D numeric columns, in order.
        numeric_means, numeric_stds: `[D]`, of the training rows: what the data were standardised with. None: they were
            not.
        categories: categorical column -> its values in the training rows; the first has the number 1, as 0 stands for
            one that is missing or unknown.
        hidden_sizes, embedding_size, dropout: see `TabularMlpOptions`.
        task_names, categorical_names: the order of `tasks` and `categories`, where a file has lost it; None: as they
            stand.
        kwargs: what `PretrainedConfig` takes.

    Attributes:
        num_router_features: the last of `hidden_sizes`, what a feature router sees.

    Raises:
        OptionError: numbers that do not fit, or tasks of types that it does not have.
    """

    model_type = "tabular_mlp"
    keys_to_ignore_at_inference: ClassVar[list[str]] = list(KEYS_TO_IGNORE_AT_INFERENCE)
    supported_types: ClassVar[tuple[str, ...]] = ROW_TYPES

    def __init__(
        self,
        tasks: Tasks | None = None,
        numeric_names: Sequence[str] = (),
        numeric_means: Sequence[float] | None = None,
        numeric_stds: Sequence[float] | None = None,
        categories: Mapping[str, Sequence[str]] | None = None,
        hidden_sizes: Sequence[int] = TabularMlpOptions.hidden_sizes,
        embedding_size: int | None = TabularMlpOptions.embedding_size,
        dropout: float = TabularMlpOptions.dropout,
        task_names: Sequence[str] | None = None,
        categorical_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        _check_sizes(hidden_sizes, embedding_size, dropout)
        self.set_tasks({"task_0": TaskType("regression")} if tasks is None else tasks, task_names)
        self.numeric_names = list(numeric_names)
        for key, values in (("numeric_means", numeric_means), ("numeric_stds", numeric_stds)):
            if values is not None and len(values) != len(self.numeric_names):
                raise OptionError(f"{key}: got {len(values)} values, expected {len(self.numeric_names)}")
        self.numeric_means = None if numeric_means is None else [float(value) for value in numeric_means]
        self.numeric_stds = None if numeric_stds is None else [float(value) for value in numeric_stds]
        given = dict(categories or {})
        names = list(given if categorical_names is None else categorical_names)
        if set(names) != set(given):
            raise OptionError(f"categorical_names: {names} are not the columns of categories, {list(given)}")
        self.categorical_names = names
        self.categories = {name: list(given[name]) for name in names}
        self.hidden_sizes = list(hidden_sizes)
        self.embedding_size = embedding_size
        self.dropout = dropout
        self.num_router_features = self.hidden_sizes[-1]
        super().__init__(**kwargs)

    def check_columns(self) -> None:
        """Raise `OptionError` where there is no column to read."""
        if not self.numeric_names and not self.categorical_names:
            raise OptionError("numeric_names, categories: both are empty, expected at least one column")


def _check_sizes(hidden_sizes: Sequence[int], embedding_size: int | None, dropout: float) -> None:
    if not hidden_sizes:
        raise OptionError("hidden_sizes: is empty, expected at least one number")
    for size in hidden_sizes:
        check_size("hidden_sizes", size)
    if embedding_size is not None:
        check_size("embedding_size", embedding_size)
    check_dropout(dropout)


class TabularMlpModel(TypedTasksModel):
    """Predicts numbers, classes and labels of rows of a table.

    Cost: one lookup for all categorical columns and one pass of the layers, whatever K is; heads and losses are
    vectorised over the tasks.
    """

    config_class = TabularMlpConfig
    base_model_prefix = "tabular_mlp"
    main_input_name = "numeric"

    def __init__(self, config: TabularMlpConfig) -> None:
        super().__init__(config)
        config.check_columns()
        counts = [len(config.categories[name]) for name in config.categorical_names]
        width = 2 * len(config.numeric_names)
        if counts:
            size = config.embedding_size or embedding_size_for(max(counts))
            # One table for all columns: a column's row 0, and one for each of its values.
            self.embedding = nn.Embedding(sum(counts) + len(counts), size)
            # In the weights' file, since what is made here is not there where a model is loaded.
            self.register_buffer("counts", torch.tensor(counts))
            self.register_buffer("offsets", torch.tensor([sum(counts[:i]) + i for i in range(len(counts))]))
            width += len(counts) * size
        layers: list[nn.Module] = []
        for hidden_size in config.hidden_sizes:
            layers += [nn.Linear(width, hidden_size), nn.LayerNorm(hidden_size), nn.ReLU(), nn.Dropout(config.dropout)]
            width = hidden_size
        self.trunk = nn.Sequential(*layers)
        self._add_heads(config.task_types, width)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear) and module in self.trunk:
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=1.0)
            with torch.no_grad():
                module.weight[self.offsets] = 0.0
        else:
            super()._init_weights(module)

    def forward(
        self,
        numeric: Tensor | None = None,
        categorical: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> MultiTaskOutput | tuple[Tensor, ...]:
        """Predictions, and with labels the loss of each task.

        Args:
            numeric: `[B, D]`, standardised, NaN where missing; None for a model without numeric columns.
            categorical: `[B, C]` int64, the number of the column's value, 1 to n; 0, or any other, where it is missing
                or unknown. None for a model without categorical columns.
            labels: `[B, W]`, NaN where missing (`hf_bilb.losses.task_types`); None for predictions alone.
            return_dict: False for a plain tuple of what is there; None follows the config.

        Returns:
            `MultiTaskOutput`: `logits [B, K]` where every task has one output, else a tuple with one tensor per task:
            `[B, D]` numbers, `[B, C]` or `[B, M]` logits. With labels also `losses [K]` and `num_items [K]`
            (`hf_bilb.losses.mixed`), and `router_features`, the last layer's output.

        Raises:
            TaskLossError: a column's input is missing, or has another width than the config says.
        """
        config = self.config
        inputs: list[Tensor] = []
        if config.numeric_names:
            numbers = _checked("numeric", numeric, len(config.numeric_names))
            missing = numbers.isnan()
            inputs += [torch.where(missing, 0, numbers).to(self.dtype), missing.to(self.dtype)]
        if config.categorical_names:
            values = _checked("categorical", categorical, len(config.categorical_names))
            known = (values > 0) & (values <= self.counts)
            inputs.append(self.embedding(torch.where(known, values, 0) + self.offsets).flatten(1))
        return self._heads_output(self.trunk(torch.cat(inputs, dim=1)), labels, return_dict)


def embedding_size_for(num_values: int) -> int:
    """Numbers of the embedding of a column with so many values."""
    return min(_LARGEST_EMBEDDING, max(1, round(1.6 * num_values**0.56)))


def _checked(name: str, column: Tensor | None, width: int) -> Tensor:
    if column is None or column.ndim != 2 or column.shape[1] != width:
        got = "nothing" if column is None else f"shape {tuple(column.shape)}"
        raise TaskLossError(f"{name}: got {got}, expected [B, {width}]")
    return column


SPEC = ModelSpec(TabularMlpConfig, TabularMlpModel, options=TabularMlpOptions)
