"""Models handed over inside a wrapper, which hides the signature: they train as without it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from hf_bilb import BilevelMTLTrainer
from hf_bilb.losses.masked import masked_mse
from hf_bilb.trainer.columns import ForwardColumns, innermost
from tests.trainer.harness import (
    BATCH,
    FLOAT,
    TASK_NAMES,
    arguments,
    build_data,
    build_model,
    flat_parameters,
    plain_settings,
)


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "compile": compiled,
    "DataParallel": nn.DataParallel,
    "DataParallel of compile": lambda model: nn.DataParallel(compiled(model)),
}


class Predictions(nn.Module):
    """The synthetic model without losses: `task_loss_func` makes them of a column that its forward does not take."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build_model(FLOAT)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        return {"logits": self.inner(features).logits}


def rows(size: int = 2 * BATCH) -> list[dict[str, Tensor]]:
    """With a column that no forward takes."""
    data = build_data(size, dtype=FLOAT)
    return [{**data[i], "number": torch.tensor(i)} for i in range(size)]


def trained(folder: Path, model: Any, remove: bool, predictions: bool) -> tuple[Tensor, list[dict[str, Any]], Any]:
    given: dict[str, Any] = {"label_names": ["labels"], "task_names": TASK_NAMES} if predictions else {}
    trainer = BilevelMTLTrainer(
        model=model,
        args=arguments(folder, remove_unused_columns=remove, eval_strategy="epoch", **given),
        train_dataset=rows(),
        eval_dataset=rows(),
        task_loss_func=(lambda outputs, batch: masked_mse(outputs["logits"], batch["labels"])) if predictions else None,
    )
    assert trainer.label_names == ["labels"]
    trainer.train()
    losses = [{k: v for k, v in entry.items() if "loss" in k} for entry in trainer.state.log_history]
    return flat_parameters(trainer.model), losses, trainer.predict(rows(6)).predictions


@pytest.mark.parametrize("wrapper", ["compile", "DataParallel"])
@pytest.mark.parametrize("predictions", [False, True], ids=["losses", "task_loss_func"])
def test_the_columns_are_those_of_the_model_inside(wrapper: str, predictions: bool, tmp_path: Path) -> None:
    build = Predictions if predictions else lambda: build_model(FLOAT)
    for remove in (True, False):
        plain = trained(tmp_path, build(), remove, predictions)
        wrapped = trained(tmp_path, WRAPPERS[wrapper](build()), remove, predictions)
        torch.testing.assert_close(wrapped[0], plain[0], rtol=1e-12, atol=0)
        for found, wanted in zip(wrapped[1], plain[1], strict=True):
            assert found == pytest.approx(wanted, rel=1e-10)
        np.testing.assert_allclose(wrapped[2], plain[2], rtol=1e-10)


class Ordinary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 4)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.layer(features)
        return (
            {"loss": (logits - labels).square().mean(), "logits": logits} if labels is not None else {"logits": logits}
        )


@pytest.mark.parametrize("remove", [True, False])
def test_an_ordinary_model_trains_as_with_trainer_without_the_wrapper(remove: bool, tmp_path: Path) -> None:
    # Trainer itself drops every column but `label`, or hands `num_items_in_batch` to a forward that does not take it.
    found = []
    for cls, model in ((Trainer, Ordinary()), (BilevelMTLTrainer, compiled(Ordinary()))):
        args: Any = (
            TrainingArguments(**plain_settings(tmp_path, eval_strategy="epoch"))
            if cls is Trainer
            else arguments(tmp_path, eval_strategy="epoch", remove_unused_columns=remove)
        )
        data = build_data(5 * BATCH)
        trainer = cls(model=model, args=args, train_dataset=data, eval_dataset=data)
        trainer.train()
        losses = [value for entry in trainer.state.log_history for key, value in entry.items() if "loss" in key]
        found.append((flat_parameters(trainer.model), losses))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_innermost(wrapper: str) -> None:
    model = Ordinary()
    assert innermost(WRAPPERS[wrapper](model)) is model


def test_innermost_of_peft() -> None:
    config = peft.LoraConfig(target_modules=["layer"], r=1)
    model = Ordinary()
    assert innermost(compiled(peft.get_peft_model(model, config))) is model
    mixed = peft.get_peft_model(Ordinary(), config, mixed=True)
    assert isinstance(innermost(mixed), Ordinary)


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return called


class Decorated(Ordinary):
    forward = decorated(Ordinary.forward)  # type: ignore[assignment]


class Anything(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any: ...


class SomeAndAnything(nn.Module):
    def forward(self, features: Tensor, **kwargs: Any) -> Any: ...


BATCH_KEYS = {"features": 0, "labels": 1, "input": 2, "weight": 3}


@pytest.mark.parametrize(
    ("model", "withhold", "selected"),
    [
        (Ordinary(), False, {"features", "labels"}),
        (Decorated(), False, {"features", "labels"}),
        (nn.Sequential(nn.Linear(2, 2)), True, {"input"}),
        (torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), True, {"input"}),
        (Anything(), False, set(BATCH_KEYS)),
        (Anything(), True, {"features", "input", "weight"}),
        (SomeAndAnything(), False, set(BATCH_KEYS)),
        (SomeAndAnything(), True, {"features", "input", "weight"}),
    ],
)
def test_which_columns_a_forward_is_given(model: nn.Module, withhold: bool, selected: set[str]) -> None:
    columns = ForwardColumns(model, ["labels"], withhold_labels=withhold)
    assert set(columns.select(BATCH_KEYS)) == selected
    assert columns.takes_everything == isinstance(model, Anything)
    assert {"label", "label_ids", "labels"} <= set(columns.signature)
