"""What is likely to be forgotten or mistyped at first is said in one line that says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainingArguments

from hf_bilb import BilevelMTLTrainer, OptionError, TaskLossError
from hf_bilb.losses.masked import masked_mse
from tests.trainer.harness import arguments, plain_settings

NAMES = ["a", "b"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 2)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.layer(features)
        return {"logits": logits} if labels is None else {"loss": (logits - labels).square().sum(), "logits": logits}


def rows() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(8, 4, generator=generator), torch.randn(8, 2, generator=generator)
    return Dataset.from_dict({"features": features.tolist(), "labels": labels.tolist()})


def losses(outputs: Any, batch: Any) -> Any:
    return masked_mse(outputs["logits"], batch["labels"])


def trainer(folder: Path, func: Any, **settings: Any) -> BilevelMTLTrainer:
    settings = {"task_names": NAMES, "label_names": ["labels"], **settings}
    return BilevelMTLTrainer(Net(), arguments(folder, **settings), train_dataset=rows(), task_loss_func=func)


@pytest.mark.parametrize(
    ("func", "message"),
    [
        (
            lambda o, b: (*losses(o, b)[0], 1.0),
            r"^task_loss_func: returned a tuple of 3, expected losses \(a ten",
        ),
        (lambda o, b: losses(o, b)[0].detach(), r"^losses: none of them depends on a trainable parameter \(detached"),
    ],
)
def test_losses_that_cannot_be_trained_on(func: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(TaskLossError, match=message):
        trainer(tmp_path, func).train()


def test_a_function_that_cannot_be_called(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"^task_loss_func: is called as task_loss_func\(outputs, batch\), which it "):
        trainer(tmp_path, lambda model, outputs, batch: None)


def test_counts_by_task(tmp_path: Path) -> None:
    found = []
    for counts in (lambda b: torch.tensor([4, 4]), lambda b: {"b": 4, "a": torch.tensor(4)}):
        args = arguments(tmp_path, task_names=NAMES, label_names=["labels"], gradient_accumulation_steps=2)
        own = BilevelMTLTrainer(Net(), args, train_dataset=rows(), task_loss_func=losses, task_item_counts=counts)
        own.train()
        found.append(own.model.layer.weight.detach())
    assert torch.equal(*found)


def test_forgotten_task_names_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    said = "task_names: not given, so that there is one task"
    plain = TrainingArguments(**plain_settings(tmp_path), label_names=["labels"])
    BilevelMTLTrainer(Net(), plain, train_dataset=rows()).train()
    assert said not in caplog.text  # an ordinary model with one task
    several = TrainingArguments(**plain_settings(tmp_path), label_names=["labels", "others"])
    for args in (several, arguments(tmp_path, balancer="famo", label_names=["labels"])):
        caplog.clear()
        BilevelMTLTrainer(Net(), args, train_dataset=rows())
        assert said in caplog.text


def test_a_mistyped_label_is_said_before_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    built = trainer(tmp_path, losses, label_names=["labels", "lables"])
    assert "label_names: 'lables' is no column of train_dataset (did you mean \"labels\"?)" in caplog.text
    caplog.clear()
    assert "eval_loss" not in built.evaluate(rows())
    assert (
        "eval: no evaluation losses: the batches have no column 'lables' of label_names (their columns: " in caplog.text
    )


def test_a_search_without_an_objective_sums_the_metrics_and_not_the_losses(tmp_path: Path) -> None:
    built = trainer(tmp_path, losses)
    measured = {"eval_loss": 3.0, "eval_loss_a": 2.0, "eval_loss_b": 4.0, "eval_runtime": 1.0, "epoch": 1.0}
    assert built._objective_of_search(dict(measured)) == 3.0
    assert built._objective_of_search({**measured, "eval_accuracy": 0.5, "eval_f1": 0.25}) == 0.75


def test_a_prediction_step_of_ones_own(tmp_path: Path) -> None:
    class Own(BilevelMTLTrainer):
        def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
            inputs = self._prepare_inputs(inputs)
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
            return loss.detach(), outputs["logits"].detach(), inputs["labels"]

    args = arguments(tmp_path, task_names=NAMES, label_names=["labels"])
    found, expected = (kind(Net(), args, task_loss_func=losses).evaluate(rows()) for kind in (Own, BilevelMTLTrainer))
    assert {k: v for k, v in found.items() if "loss" in k} == {k: v for k, v in expected.items() if "loss" in k}


def test_the_metric_may_change_between_trainings(tmp_path: Path) -> None:
    built = trainer(tmp_path, losses, metric_for_best_model="eval_loss_a")
    assert built.args.greater_is_better is False
    built.args.metric_for_best_model = "accuracy"
    built.train()
    assert built.args.greater_is_better is True
