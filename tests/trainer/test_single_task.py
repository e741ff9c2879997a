"""K = 1: an ordinary model trains bit for bit as with `Trainer`; a model that returns `losses` trains on its loss."""

from __future__ import annotations

import logging
from collections import UserDict, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from hf_bilb import BilevelMTLTrainer, BilevelMTLTrainingArguments
from hf_bilb.trainer.losses_trainer import keeps_contract
from tests.synthetic import SyntheticData
from tests.trainer.harness import (
    BATCH,
    FLOAT,
    arguments,
    build_data,
    build_model,
    by_hand,
    close,
    flat_parameters,
    plain_settings,
    run,
    untimed,
)

SIZE = 30


class Ordinary(nn.Module):
    """A model as anybody writes it: a loss and logits, with dropout; no config, no task names."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))

    def forward(self, features: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.layers(features)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Tuples(Ordinary):
    """The same with a tuple as output."""

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Any:
        return tuple(super().forward(features, labels).values())


class PerExample(Ordinary):
    """With the loss of each example beside the loss."""

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Any:
        outputs = super().forward(features, labels)
        if labels is not None:
            outputs["losses"] = nn.functional.cross_entropy(outputs["logits"], labels, reduction="none")
        return outputs


class Parts(Ordinary):
    """With what the loss is made of beside the loss."""

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Any:
        outputs = super().forward(features, labels)
        if labels is None:
            return outputs
        parts = {"entropy": outputs["loss"], "size": outputs["logits"].square().mean()}
        return {**outputs, "loss": parts["entropy"] + 0.1 * parts["size"], "losses": parts}


class NamedTuples(Ordinary):
    Outputs = namedtuple("Outputs", ["loss", "logits"])

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Any:
        outputs = super().forward(features, labels)
        return self.Outputs(**outputs) if labels is not None else outputs


def ordinary(cls: type[nn.Module] = Ordinary) -> nn.Module:
    torch.manual_seed(0)
    return cls()


def bert() -> nn.Module:
    """`**kwargs` in its forward; its loss takes `num_items_in_batch`."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


def feature_rows() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        {"features": torch.randn(6, generator=generator), "labels": torch.randint(0, 3, (), generator=generator)}
        for _ in range(SIZE)
    ]


def token_rows() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        {
            "input_ids": torch.randint(0, 40, (8,), generator=generator),
            "labels": torch.randint(0, 3, (), generator=generator),
        }
        for _ in range(SIZE)
    ]


def accuracy(prediction: Any) -> dict[str, float]:
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids).mean())}


def same_arrays(first: Any, second: Any) -> bool:
    """Whether nested predictions are the same to the last bit."""
    if isinstance(first, (tuple, list)):
        return len(first) == len(second) and all(map(same_arrays, first, second))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same_arrays(first[key], second[key]) for key in first)
    return np.array_equal(first, second)


def loss_func(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    total = nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum")
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], dict[str, Any], dict[str, Any]]] = {
    "plain": (ordinary, feature_rows, {}, {}),
    "tuples": (lambda: ordinary(Tuples), feature_rows, {}, {}),
    "named_tuples": (lambda: ordinary(NamedTuples), feature_rows, {}, {}),
    "losses_too": (lambda: ordinary(PerExample), feature_rows, {}, {}),
    "losses_too_in_batches_of_one": (
        lambda: ordinary(PerExample),
        feature_rows,
        {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "num_train_epochs": 1},
        {},
    ),
    "losses_too_accumulation": (
        lambda: ordinary(PerExample),
        feature_rows,
        {"gradient_accumulation_steps": 3, "eval_on_start": True},
        {},
    ),
    "parts_too": (lambda: ordinary(Parts), feature_rows, {}, {}),
    "user_dict": (ordinary, feature_rows, {}, {"data_collator": lambda rows: UserDict(default_data_collator(rows))}),
    "accumulation": (ordinary, feature_rows, {"gradient_accumulation_steps": 3}, {}),
    "compute_loss_func": (
        ordinary,
        feature_rows,
        {"gradient_accumulation_steps": 2},
        {"compute_loss_func": loss_func},
    ),
    "bert": (bert, token_rows, {}, {}),
    "bert_smoothing": (bert, token_rows, {"label_smoothing_factor": 0.1}, {}),
    "bert_accumulation": (bert, token_rows, {"gradient_accumulation_steps": 3}, {}),
    "bert_smoothing_accumulation": (
        bert,
        token_rows,
        {"gradient_accumulation_steps": 2, "label_smoothing_factor": 0.2},
        {},
    ),
    "bert_clipping_schedule_nan_filter": (
        bert,
        token_rows,
        {"max_grad_norm": 0.1, "lr_scheduler_type": "linear", "logging_steps": 3, "eval_on_start": True},
        {},
    ),
}


@pytest.mark.parametrize(("case", "balancer"), [("plain", "ls"), *((case, "bilb") for case in CASES)])
def test_bit_for_bit_as_trainer(case: str, balancer: str, tmp_path: Path) -> None:
    build, rows, settings, more = CASES[case]
    common = plain_settings(
        tmp_path, **{"optim": "adamw_torch", "eval_strategy": "epoch", "num_train_epochs": 2, **settings}
    )
    results = []
    for ours in (False, True):
        model = build()
        args = BilevelMTLTrainingArguments(**common, balancer=balancer) if ours else TrainingArguments(**common)
        cls: Any = BilevelMTLTrainer if ours else Trainer
        trainer = cls(
            model=model, args=args, train_dataset=rows(), eval_dataset=rows(), compute_metrics=accuracy, **more
        )
        # Before anything is trained, and without labels, too.
        predicted = [trainer.predict([{k: v for k, v in row.items() if k != "labels"} for row in rows()[:5]])]
        predicted.append(trainer.predict(rows()[:6]))
        output = trainer.train()
        predicted.append(trainer.predict(rows()[:7]))
        results.append((model, trainer.state.log_history, output.training_loss, predicted))
    (plain, logs, loss, predicted), (other, our_logs, our_loss, our_predicted) = results
    assert torch.equal(flat_parameters(plain), flat_parameters(other))
    assert untimed(our_logs) == untimed(logs) and our_loss == loss
    for theirs, ours_ in zip(predicted, our_predicted, strict=True):
        assert same_arrays(theirs.predictions, ours_.predictions)
        assert untimed([ours_.metrics]) == untimed([theirs.metrics])


def test_logs_of_an_ordinary_model_hold_nothing_of_ours(tmp_path: Path) -> None:
    found = run(tmp_path, ordinary(), feature_rows(), trainer_arguments={"callbacks": []})
    assert set(found.steps[0]) == {"loss", "grad_norm", "learning_rate", "epoch", "step"}
    assert found.trainer.balancer.coefficients is None


def test_unknown_columns_are_withheld_in_every_batch(tmp_path: Path) -> None:
    # Trainer would stop at the first one: the forward does not take them.
    rows = [{**row, "number": torch.tensor(i)} for i, row in enumerate(feature_rows())]
    vectors = []
    for data, settings in ((feature_rows(), {}), (rows, {"remove_unused_columns": False})):
        model = ordinary()
        trainer = run(
            tmp_path, model, data, trainer_arguments={"callbacks": [], "eval_dataset": data}, **settings
        ).trainer
        bare = [{k: v for k, v in row.items() if k != "labels"} for row in data]
        vectors.append((flat_parameters(model), trainer.evaluate()["eval_loss"], trainer.predict(bare).predictions))
    assert torch.equal(vectors[0][0], vectors[1][0]) and vectors[0][1] == vectors[1][1]
    assert np.array_equal(vectors[0][2], vectors[1][2])


def test_losses_beside_a_loss_are_mentioned_where_no_tasks_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, ordinary(PerExample), feature_rows(), trainer_arguments={"callbacks": []})
    said = [r.getMessage() for r in caplog.records if "`losses`" in r.getMessage()]
    assert len(said) == 1 and "of shape [4], and there are no task_names: it is trained on `loss`" in said[0]
    caplog.clear()
    found = run(tmp_path, ordinary(PerExample), feature_rows(), trainer_arguments={"callbacks": []}, task_names=["a"])
    assert "loss/a" not in found.steps[0] and "`losses`" not in caplog.text


ONE, FOUR, COUNT = torch.ones(1), torch.ones(4), torch.ones(1)


@pytest.mark.parametrize(
    ("outputs", "named", "contract"),
    [
        ({"losses": ONE}, False, True),
        ({"losses": FOUR}, False, True),  # refused afterwards, with its shape
        ({"losses": {"a": ONE}}, False, True),
        ({"loss": None, "losses": ONE}, False, True),
        ({"loss": ONE}, True, False),
        ({"loss": ONE, "losses": None}, True, False),
        ({"logits": ONE}, True, False),
        ((ONE, FOUR), True, False),
        ({"loss": ONE, "losses": ONE}, False, False),
        ({"loss": ONE, "losses": ONE}, True, True),
        ({"loss": ONE, "losses": ONE, "num_items": COUNT}, False, True),
        ({"loss": ONE, "losses": FOUR, "num_items": COUNT}, True, False),
        ({"loss": ONE, "losses": {"a": ONE}}, True, True),
        ({"loss": ONE, "losses": {"a": ONE, "b": ONE}}, True, False),
        ({"loss": ONE, "losses": [ONE]}, True, False),
    ],
)
def test_which_model_of_one_task_keeps_the_contract(outputs: Any, named: bool, contract: bool) -> None:
    assert keeps_contract(outputs, "a", named) is contract


def test_one_task_in_a_dict_of_losses(tmp_path: Path) -> None:
    class InADict(Ordinary):
        def forward(self, features: Tensor, labels: Tensor | None = None) -> Any:
            outputs = super().forward(features, labels)
            return {"losses": {"a": outputs["loss"]}, "logits": outputs["logits"]}

    vectors = []
    for cls in (Ordinary, InADict):
        model = ordinary(cls)
        run(tmp_path, model, feature_rows(), trainer_arguments={"callbacks": []}, balancer="ls", task_names=["a"])
        vectors.append(flat_parameters(model))
    torch.testing.assert_close(vectors[0], vectors[1], rtol=1e-6, atol=1e-7)


# --- one task with `losses` ---------------------------------------------------------------------------------------


def one_task(missing: float = 0.0) -> tuple[Any, SyntheticData]:
    return build_model(FLOAT, task_names=["only"]), build_data(8 * BATCH, num_tasks=1, dtype=FLOAT, missing=missing)


@pytest.mark.parametrize("name", ["ls", "bilb", "si"])
def test_losses_of_one_task(name: str, tmp_path: Path) -> None:
    model, data = one_task()
    settings: dict[str, Any] = {"normalization": "none"} if name == "bilb" else {}
    found = run(tmp_path, model, data, balancer={"name": name, **settings}, eval_strategy="no")
    other, _ = one_task()
    values = by_hand(other, data, lambda losses, items, step: losses.log().sum() if name == "si" else losses.sum())
    assert close(found.parameters, flat_parameters(other))
    assert found.logged("loss") == pytest.approx(values, rel=1e-12)
    assert found.logged("loss/only") == pytest.approx(found.logged("loss_mean"), rel=1e-15)


@pytest.mark.parametrize("kwargs_forward", [False, True])
@pytest.mark.parametrize("accumulation", [2, 4])
def test_one_task_accumulates_without_a_factor_from_the_first_update_on(
    accumulation: int, kwargs_forward: bool, tmp_path: Path
) -> None:
    # The Trainer learns from the first output which kind of model this is; the first window must be right already.
    _, data = one_task(missing=0.4)
    results = []
    for steps, size in ((accumulation, BATCH), (1, accumulation * BATCH)):
        model = build_model(FLOAT, task_names=["only"], kwargs_forward=kwargs_forward)
        found = run(
            tmp_path,
            model,
            data,
            balancer="ls",
            gradient_accumulation_steps=steps,
            per_device_train_batch_size=size,
        )
        results.append((torch.stack(found.record.parameters), found.logged("loss")))
    (parts, part_losses), (whole, whole_losses) = results
    assert close(parts[0], whole[0]) and close(parts[-1], whole[-1])
    assert part_losses == pytest.approx(whole_losses, rel=1e-12)


def test_one_task_with_a_task_loss_func_and_withheld_columns(tmp_path: Path) -> None:
    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = one_task()[0]

        def forward(self, features: Tensor) -> dict[str, Tensor]:
            return {"logits": self.inner(features).logits}

    model, (plain, data) = Logits(), one_task()
    found = run(
        tmp_path,
        model,
        data,
        trainer_arguments={
            "task_loss_func": lambda outputs, batch: (outputs["logits"] - batch["labels"]).square().mean(0)
        },
        balancer="ls",
        label_names=["labels"],
    )
    by_hand(plain, data, lambda losses, items, step: losses.sum())
    assert close(flat_parameters(model.inner), flat_parameters(plain))
    assert found.logged("loss/task_0") == pytest.approx(found.logged("loss"))


def test_one_task_with_losses_is_given_no_column_that_its_forward_does_not_take(tmp_path: Path) -> None:
    model, data = one_task()
    rows = [{**data[i], "name": torch.tensor(i)} for i in range(len(data))]
    found = run(tmp_path, model, rows, balancer="ls", remove_unused_columns=False)
    expected = run(tmp_path, one_task()[0], data, balancer="ls")
    assert torch.equal(found.parameters, expected.parameters)


def test_evaluation_first_settles_the_kind_of_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, data = one_task()
    args = arguments(tmp_path, balancer="ls", eval_on_start=True, eval_strategy="epoch")
    trainer = BilevelMTLTrainer(model=model, args=args, train_dataset=data, eval_dataset=data)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 2 and all(entry["eval_loss"] == entry["eval_loss_only"] for entry in evaluations)
