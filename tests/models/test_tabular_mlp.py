"""The model for tables against a plain loop over rows and columns; files, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_bilb.config.options import parse_options
from hf_bilb.errors import OptionError, TaskLossError
from hf_bilb.losses.task_types import TaskType
from hf_bilb.models import MODELS, TabularMlpConfig, TabularMlpModel, TabularMlpOptions
from hf_bilb.models.tabular_mlp import embedding_size_for
from tests.models.files import saved_and_loaded

# In an order that no file keeps.
TASKS = {
    "zeta": TaskType("regression", 2, means=(1.0, 2.0), stds=(3.0, 4.0)),
    "kind": TaskType("classification", 3, names=("x", "y", "z")),
    "alpha": TaskType("multi_label", 2),
}
COLUMNS: dict[str, Any] = {
    "numeric_names": ["width", "height", "age"],
    "numeric_means": [1.0, 2.0, 30.0],
    "numeric_stds": [1.0, 0.5, 9.0],
    "categories": {"town": ["a", "b", "c", "d"], "colour": ["red", "blue"]},
}


def model_of(**changes: Any) -> TabularMlpModel:
    torch.manual_seed(0)
    arguments = {"tasks": TASKS, **COLUMNS, "hidden_sizes": [7, 5], "dropout": 0.0, **changes}
    model = TabularMlpModel(TabularMlpConfig(**arguments))
    for parameter in model.parameters():  # neither zeros nor ones, so that a wrong one shows
        nn.init.normal_(parameter, std=0.5)
    return model.eval()


def batch_of(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    numeric = torch.randn(6, 3, generator=generator, dtype=dtype)
    numeric[0, 1] = numeric[4, 0] = torch.nan
    categorical = torch.tensor([[1, 1], [4, 2], [0, 2], [2, 0], [3, 1], [0, 0]])
    labels = torch.cat([torch.randn(6, 2, generator=generator), torch.tensor([[0.0, 1, 2, 0, 1, 2]]).T], dim=1)
    labels = torch.cat([labels, torch.randint(2, (6, 2), generator=generator).float()], dim=1)
    labels[1, 0] = labels[2, 2] = labels[5, 4] = torch.nan
    return {"numeric": numeric, "categorical": categorical, "labels": labels.to(dtype)}


def plain_features(model: TabularMlpModel, batch: dict[str, Tensor]) -> Tensor:
    """Row by row and column by column: a table of embeddings for each column, and the layers by hand."""
    config, rows = model.config, []
    for numbers, values in zip(batch["numeric"], batch["categorical"], strict=True):
        inputs = [0.0 if number.isnan() else number for number in numbers]
        inputs += [float(number.isnan()) for number in numbers]
        row, start = [torch.stack([torch.as_tensor(value, dtype=numbers.dtype) for value in inputs])], 0
        for name, value in zip(config.categorical_names, values, strict=True):
            of_column = model.embedding.weight[start : start + 1 + len(config.categories[name])]
            row.append(of_column[value])
            start += len(of_column)
        hidden = torch.cat(row)
        for linear, norm in ((model.trunk[0], model.trunk[1]), (model.trunk[4], model.trunk[5])):
            hidden = linear.weight @ hidden + linear.bias
            hidden = (hidden - hidden.mean()) / (hidden.var(unbiased=False) + norm.eps).sqrt()
            hidden = (hidden * norm.weight + norm.bias).clamp(min=0)
        rows.append(hidden)
    return torch.stack(rows)


def test_it_equals_a_plain_loop() -> None:
    model, batch = model_of().double(), batch_of(torch.float64)
    output = model(**batch)
    features = plain_features(model, batch)
    torch.testing.assert_close(output.router_features, features, rtol=1e-10, atol=1e-12)
    expected = [features @ head.weight.T + head.bias for head in (model.head_zeta, model.head_kind, model.head_alpha)]
    for one, other in zip(output.logits, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    labels = batch["labels"]
    there = ~labels.isnan()
    losses = [
        nn.functional.mse_loss(expected[0][there[:, :2]], labels[:, :2][there[:, :2]]),
        nn.functional.cross_entropy(expected[1][there[:, 2]], labels[there[:, 2], 2].long()),
        nn.functional.binary_cross_entropy_with_logits(expected[2][there[:, 3:]], labels[:, 3:][there[:, 3:]]),
    ]
    torch.testing.assert_close(output.losses, torch.stack(losses), rtol=1e-10, atol=1e-12)
    assert output.num_items.tolist() == [11, 5, 11]
    found = torch.autograd.grad(output.losses.sum(), list(model.parameters()))
    wanted = torch.autograd.grad(torch.stack(losses).sum(), list(model.parameters()))
    for (name, _), one, other in zip(model.named_parameters(), found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-11, msg=name)


def test_a_number_that_is_no_value_counts_as_unknown() -> None:
    model, batch = model_of(), batch_of()
    batch["categorical"][1] = torch.tensor([5, 3])  # of 4 and 2 values: 5 would be a row of the next column
    unknown = model(**batch).router_features[1]
    batch["categorical"][1] = torch.tensor([-1, 0])
    assert torch.equal(model(**batch).router_features[1], unknown)


def test_a_missing_number_is_the_mean_and_says_so() -> None:
    model, batch = model_of(), batch_of()
    mean = {**batch, "numeric": batch["numeric"].nan_to_num(0.0)}
    gone, there = model(**batch).router_features, model(**mean).router_features
    assert not torch.allclose(gone[0], there[0]) and torch.equal(gone[1], there[1])
    with torch.no_grad():
        model.trunk[0].weight[:, 3:6] = 0.0  # what reads which are missing
    torch.testing.assert_close(model(**batch).router_features, model(**mean).router_features)


def test_unknown_values_begin_neutral_and_layers_keep_their_scale() -> None:
    torch.manual_seed(0)
    model = TabularMlpModel(TabularMlpConfig(tasks=TASKS, **COLUMNS))
    assert model.embedding.weight[[0, 5]].eq(0).all() and model.embedding.weight[[1, 2, 3, 4, 6, 7]].any(dim=1).all()
    assert model.trunk[0].weight.std().item() == pytest.approx((2 / model.trunk[0].in_features) ** 0.5, rel=0.1)
    assert model.head_kind.weight.std().item() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize("columns", [("numeric",), ("categorical",), ("numeric", "categorical")])
def test_every_parameter_is_reached_also_without_labels_of_a_task(columns: tuple[str, ...]) -> None:
    absent = {} if "numeric" in columns else {key: [] for key in COLUMNS if key != "categories"}
    model = model_of(**({} if "categorical" in columns else {"categories": {}}), **absent)
    batch = {name: column for name, column in batch_of().items() if name in (*columns, "labels")}
    batch["labels"][:, 2] = torch.nan
    output = model(**batch)
    output.losses.sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert not model.head_kind.weight.grad.any() and output.num_items[1] == 0


def test_without_labels_only_predictions_and_one_tensor_where_each_task_has_one_output() -> None:
    batch = batch_of()
    del batch["labels"]
    assert list(model_of()(**batch)) == ["logits"]
    tasks = {"a": TaskType("regression"), "b": TaskType("multi_label")}
    assert model_of(tasks=tasks)(**batch).logits.shape == (6, 2)


def test_it_learns_what_depends_on_a_category_and_on_what_is_missing() -> None:
    generator = torch.Generator().manual_seed(0)
    numeric = torch.randn(256, 3, generator=generator)
    numeric[torch.rand(256, generator=generator) < 0.5, 2] = torch.nan
    categorical = torch.stack([torch.randint(5, (256,), generator=generator) for _ in range(2)], dim=1) % 3
    target = torch.tensor([0.0, 2.0, -1.0])[categorical[:, 0]] + 1.5 * numeric[:, 2].isnan() + numeric[:, 0]
    torch.manual_seed(0)
    model = TabularMlpModel(TabularMlpConfig({"y": TaskType("regression")}, **COLUMNS, hidden_sizes=[32], dropout=0.0))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        output = model(numeric, categorical, target[:, None])
        output.losses.sum().backward()
        optimizer.step()
    assert output.losses[0] < 0.02 * target.var()


# --- files --------------------------------------------------------------------------------------------------------


def test_saved_and_loaded_with_all_that_it_knows(tmp_path: Path) -> None:
    model, batch = model_of(), batch_of()
    keys = ("task_names", "tasks", "task_types", "numeric_names", "numeric_means", "numeric_stds", "categories",
            "categorical_names", "hidden_sizes", "embedding_size", "dropout", "num_router_features")  # fmt: skip
    for loaded in saved_and_loaded(model, tmp_path, keys):
        assert all(map(torch.equal, loaded(**batch).logits, model(**batch).logits))
        # A file sorts its keys; the order is that of the columns.
        assert list(loaded.config.task_types) == ["zeta", "kind", "alpha"]
        assert list(loaded.config.categories) == ["town", "colour"]
        assert loaded.config.task_types == TASKS


# --- options ------------------------------------------------------------------------------------------------------


def test_the_size_of_embeddings_follows_the_column_with_most_values() -> None:
    assert [embedding_size_for(n) for n in (1, 2, 4, 10, 100, 10_000)] == [2, 2, 3, 6, 21, 32]
    assert model_of().embedding.weight.shape == (8, 3)
    assert model_of(embedding_size=4).embedding.weight.shape == (8, 4)


def test_the_registry_builds_it_from_options_and_data() -> None:
    spec = MODELS["tabular_mlp"]
    options = parse_options(spec.options, {"hidden_sizes": [8], "dropout": 0.2}, "model")
    config = spec.config_class(**dataclasses.asdict(options), tasks=TASKS, **COLUMNS)
    assert spec.model_class(config)(**batch_of()).losses.shape == (3,)
    assert config.num_router_features == 8 and config.keys_to_ignore_at_inference[0] == "losses"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_sizes": []}, "hidden_sizes: is empty"),
        ({"hidden_sizes": [8, 0]}, "hidden_sizes: 0 is not valid"),
        ({"embedding_size": 0}, "embedding_size: 0 is not valid"),
        ({"dropout": 1.0}, "dropout: 1.0 is not valid"),
    ],
)
def test_bad_options_are_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=f"^model.{message}"):
        parse_options(TabularMlpOptions, values, "model")
    with pytest.raises(OptionError, match=f"^{message}"):
        TabularMlpConfig(tasks=TASKS, **COLUMNS, **values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"numeric_means": [1.0]}, "numeric_means: got 1 values, expected 3"),
        ({"categorical_names": ["town"]}, "categorical_names: \\['town'\\] are not the columns of categories"),
        ({"tasks": {"a": TaskType("token_classification", 2)}}, "tasks.a.type: token_classification is no task of tab"),
    ],
)
def test_bad_configs_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=f"^{message}"):
        TabularMlpConfig(**{"tasks": TASKS, **COLUMNS, **values})


def test_no_columns_and_inputs_of_another_shape() -> None:
    with pytest.raises(OptionError, match=r"^numeric_names, categories: both are empty"):
        TabularMlpModel(TabularMlpConfig(TASKS))
    batch = batch_of()
    with pytest.raises(TaskLossError, match=r"^numeric: got shape \(6, 2\), expected \[B, 3\]"):
        model_of()(batch["numeric"][:, :2], batch["categorical"])
    with pytest.raises(TaskLossError, match=r"^categorical: got nothing, expected \[B, 2\]"):
        model_of()(batch["numeric"])
