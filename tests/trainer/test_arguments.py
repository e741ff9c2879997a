"""Drop-in: `Trainer`'s own arguments and signature are taken, and every field of them is kept."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from hf_bilb import BilevelMTLTrainer, BilevelMTLTrainingArguments, OptionError
from hf_bilb.trainer.arguments import OWN_FIELDS, as_bilevel_arguments
from tests.trainer.harness import FLOAT, TASK_NAMES, build_data, build_model, flat_parameters, plain_settings, run

#: Values other than the defaults, of each kind of field.
UNUSUAL = {
    "learning_rate": 0.0123, "num_train_epochs": 2, "weight_decay": 0.01, "seed": 17, "data_seed": 5,
    "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "logging_steps": 7,
    "eval_strategy": "steps", "eval_steps": 7, "save_strategy": "steps", "save_steps": 7, "save_total_limit": 4,
    "label_names": ["labels"], "metric_for_best_model": "accuracy", "greater_is_better": True,
    "load_best_model_at_end": True, "remove_unused_columns": False, "optim": "sgd", "report_to": "none",
    "accelerator_config": {"split_batches": True}, "run_name": "mine", "dataloader_drop_last": True,
    "lr_scheduler_type": "cosine", "warmup_steps": 3, "use_cpu": True, "disable_tqdm": True,
}  # fmt: skip


def field_values(args: Any, kind: type) -> dict[str, Any]:
    return {one.name: getattr(args, one.name) for one in dataclasses.fields(kind)}


@pytest.mark.parametrize("kind", [TrainingArguments, Seq2SeqTrainingArguments])
def test_every_field_of_plain_arguments_is_kept(kind: type, tmp_path: Path) -> None:
    extra = {"predict_with_generate": True, "generation_max_length": 9} if kind is Seq2SeqTrainingArguments else {}
    plain = kind(output_dir=str(tmp_path), **UNUSUAL, **extra)
    plain.set_by_hand = "kept, too"
    upgraded = as_bilevel_arguments(plain)
    assert isinstance(upgraded, BilevelMTLTrainingArguments) and isinstance(upgraded, kind)
    assert field_values(upgraded, kind) == field_values(plain, kind)
    assert upgraded.set_by_hand == "kept, too" and upgraded.device == plain.device
    fresh = BilevelMTLTrainingArguments(output_dir=str(tmp_path))
    assert {name: getattr(upgraded, name) for name in OWN_FIELDS} == {name: getattr(fresh, name) for name in OWN_FIELDS}
    # The caller's own object stays what it was.
    assert type(plain) is kind and not OWN_FIELDS & vars(plain).keys()


def test_upgraded_arguments_are_copied_saved_and_shown(tmp_path: Path) -> None:
    class Mine(TrainingArguments):
        pass

    for plain in (
        TrainingArguments(output_dir=str(tmp_path), use_cpu=True),
        Seq2SeqTrainingArguments(output_dir=str(tmp_path), use_cpu=True, generation_max_length=9),
    ):
        upgraded = as_bilevel_arguments(plain)
        torch.save(upgraded, tmp_path / "training_args.bin")
        for again in (torch.load(tmp_path / "training_args.bin", weights_only=False), copy.deepcopy(upgraded)):
            assert type(again) is type(upgraded) and again.to_dict() == upgraded.to_dict()
        assert "balancer" in upgraded.to_dict() and "balancer=bilb" in str(upgraded)
    assert isinstance(as_bilevel_arguments(Mine(output_dir=str(tmp_path))), Mine)
    ours = BilevelMTLTrainingArguments(output_dir=str(tmp_path))
    assert as_bilevel_arguments(ours) is ours


def test_a_trainer_from_plain_arguments_trains_as_one_from_ours(tmp_path: Path) -> None:
    settings = plain_settings(tmp_path, max_steps=4)
    trainer = BilevelMTLTrainer(build_model(FLOAT), TrainingArguments(**settings), None, build_data(16, dtype=FLOAT))
    trainer.train()
    expected = run(tmp_path, data=build_data(16, dtype=FLOAT), max_steps=4)
    assert trainer.balancer.name == "bilb" and list(trainer.task_names) == TASK_NAMES
    assert torch.equal(flat_parameters(trainer.model), expected.parameters)


def test_a_model_alone_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer, stock = BilevelMTLTrainer(build_model(FLOAT)), Trainer(build_model(FLOAT))
    assert isinstance(trainer.args, BilevelMTLTrainingArguments)
    assert trainer.args.output_dir == stock.args.output_dir


def test_the_signatures_are_those_of_trainer_and_ours() -> None:
    stock, ours = (inspect.signature(kind).parameters for kind in (Trainer, BilevelMTLTrainer))
    shared = list(ours)[: len(stock)]
    assert shared == list(stock)  # so that positions agree, too
    assert all(ours[name].default == stock[name].default and ours[name].kind == stock[name].kind for name in stock)
    assert list(ours)[len(stock) :] == ["task_loss_func", "task_item_counts"]
    for method in ("train", "evaluate", "predict", "training_step", "compute_loss", "prediction_step", "log"):
        expected = inspect.signature(getattr(Trainer, method)).parameters
        found = inspect.signature(getattr(BilevelMTLTrainer, method)).parameters
        assert list(found)[: len(expected)] == list(expected), method
        assert all(found[name].default == expected[name].default for name in expected), method


def test_an_unknown_keyword_is_a_type_error(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'task_los_func'"):
        BilevelMTLTrainer(build_model(FLOAT), task_los_func=None)


def test_trainers_can_stand_between_ours_and_trainer(tmp_path: Path) -> None:
    class Both(BilevelMTLTrainer, Seq2SeqTrainer):
        pass

    args = Seq2SeqTrainingArguments(**plain_settings(tmp_path, max_steps=2), generation_max_length=9)
    trainer = Both(build_model(FLOAT), args, train_dataset=build_data(8, dtype=FLOAT))
    trainer.train()
    assert trainer.args.generation_max_length == 9 and trainer.state.global_step == 2


@pytest.mark.parametrize(
    ("metric", "lower"),
    [
        ("loss", True),
        ("eval_loss", True),
        ("loss_beta", True),
        ("eval_loss_beta", True),
        ("eval_held_out_loss", True),
        ("eval_held_out_loss_beta", True),
        ("held_out_loss_beta", True),
        ("no_loss_accuracy", False),
        ("loss_free_f1", False),
        ("eval_loss_unknown", False),
        ("eval_elsewhere_loss_beta", False),
        ("dice_loss_score", False),
        ("accuracy", False),
    ],
)
def test_a_lower_metric_is_better_for_losses_of_tasks_alone(metric: str, lower: bool, tmp_path: Path) -> None:
    model, rows = build_model(FLOAT), build_data(8, dtype=FLOAT)
    evaluation = {"held_out": rows, "other": rows}
    settings = plain_settings(
        tmp_path,
        metric_for_best_model=metric,
        load_best_model_at_end=True,
        eval_strategy="epoch",
        save_strategy="epoch",
    )
    for args in (BilevelMTLTrainingArguments(**settings), TrainingArguments(**settings)):
        trainer = BilevelMTLTrainer(model, args, train_dataset=rows, eval_dataset=evaluation)
        assert trainer.args.greater_is_better is not lower
    # What is said is taken, whatever the name.
    said = BilevelMTLTrainingArguments(**settings, greater_is_better=lower)
    assert BilevelMTLTrainer(model, said, eval_dataset=evaluation).args.greater_is_better is lower


def test_tasks_named_in_the_arguments_settle_it_at_once(tmp_path: Path) -> None:
    args = BilevelMTLTrainingArguments(str(tmp_path), task_names=["nli", "qa"], metric_for_best_model="eval_loss_nli")
    assert args.greater_is_better is False
    with pytest.raises(OptionError, match=r"^max_dropped_steps: 0 is not valid, expected an integer >= 1"):
        BilevelMTLTrainingArguments(str(tmp_path), max_dropped_steps=0)
