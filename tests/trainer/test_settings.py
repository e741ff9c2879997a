"""What cannot work is refused with one clear line, before training where possible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import HfArgumentParser, Trainer

from hf_bilb import BilevelMTLTrainer, BilevelMTLTrainingArguments, OptionError
from tests.trainer.harness import FLOAT, TASK_NAMES, arguments, build_data, build_model


def build(folder: Path, model: Any = None, trainer_arguments: Any = None, **settings: Any) -> BilevelMTLTrainer:
    return BilevelMTLTrainer(
        model=build_model(FLOAT) if model is None else model,
        args=arguments(folder, **settings),
        train_dataset=build_data(8, dtype=FLOAT),
        **(trainer_arguments or {}),
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"balancer": "blib"}, "balancer: 'blib' is not known (did you mean \"bilb\"?)"),
        ({"balancer": {"name": "blib"}}, "balancer: 'blib' is not known (did you mean \"bilb\"?)"),
        (
            {"balancer": {"preset": "celeba"}},
            "balancer: {'preset': 'celeba'} is not valid, expected a name or a mapping",
        ),
        ({"balancer": 3}, "balancer: 3 is not valid, expected a name or a mapping"),
        ({"balancer": {"name": "bilb", "lambda": 1}}, "balancer.lambda: unknown option, value 1"),
        ({"balancer": {"name": "si", "normalization": "log"}}, "balancer.normalization: 'log' is not valid"),
        (
            {"absent_tasks": "holdd"},
            'absent_tasks: \'holdd\' is not valid, expected one of "auto", "skip", "hold" (did you mean',
        ),
        ({"nonfinite_loss": "ignore"}, 'nonfinite_loss: \'ignore\' is not valid, expected one of "raise", "skip"'),
        ({"balance_over": "windw"}, "balance_over: 'windw' is not valid, expected one of"),
        ({"task_names": []}, "task_names: is empty"),
        ({"task_names": ["a", "a"]}, "task_names: 'a' stands twice"),
    ],
)
def test_arguments_are_checked_when_they_are_made(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError) as caught:
        arguments(tmp_path, **settings)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task_names": ["a", "b", "c", "d"]}, "task_names: ['a', 'b', 'c', 'd'] do not match model.config.task_names"),
        ({"task_names": TASK_NAMES[:3]}, "task_names: ['alpha', 'beta', 'gamma'] do not match model.config.task_names"),
        ({"task_names": TASK_NAMES[::-1]}, "task_names: ['delta', 'gamma', 'beta', 'alpha'] do not match"),
        ({"task_priors": [1.0, 2.0]}, "task_priors: got 2 values, expected one for each of the 4 tasks"),
        (
            {"task_priors": [1.0, 2.0, -1.0, 1.0]},
            "task_priors: [1.0, 2.0, -1.0, 1.0] is not valid, expected numbers >= 0",
        ),
        (
            {"balancer": {"name": "bilb", "initial_logits": [1.0]}},
            "balancer.initial_logits: got 1 values, expected one",
        ),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: 0.1 would be ignored"),
    ],
)
def test_names_and_lengths_are_checked_when_the_trainer_is_built(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(OptionError) as caught:
        build(tmp_path, **settings)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_compute_loss_func_with_several_tasks(tmp_path: Path) -> None:
    with pytest.raises(
        OptionError, match=r"^compute_loss_func: would be ignored with several tasks; use task_loss_func"
    ):
        build(tmp_path, trainer_arguments={"compute_loss_func": lambda *args, **kwargs: None})


def test_data_parallel(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(OptionError, match=r"^n_gpu: 2 GPUs in one process mean DataParallel, which .* `torchrun`"):
        BilevelMTLTrainer(model=build_model(FLOAT), args=args)


@pytest.mark.parametrize(("getter", "kind"), [("tp", "tensor"), ("cp", "context"), ("sp", "sequence")])
def test_parallelism_of_one_model(getter: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, f"get_{getter}_size", lambda self: 2)
    with pytest.raises(OptionError, match=rf"^parallelism_config: {kind} parallelism \(2\) is not supported"):
        build(tmp_path)


def test_unknown_constructor_arguments_raise(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="task_loss_fun"):
        build(tmp_path, trainer_arguments={"task_loss_fun": None})


def test_task_names_come_from_the_arguments_or_the_models_config(tmp_path: Path) -> None:
    assert build(tmp_path).task_names == tuple(TASK_NAMES)
    model = torch.nn.Linear(6, 2).double()
    assert build(tmp_path, model, task_names=["x", "y"]).task_names == ("x", "y")
    assert build(tmp_path, model).task_names == ("task_0",)


def test_the_balancer_has_the_precision_of_the_model(tmp_path: Path) -> None:
    assert build(tmp_path).balancer.dtype == torch.float64
    for dtype in (torch.float32, torch.bfloat16):
        assert build(tmp_path, build_model(dtype)).balancer.dtype == torch.float32


def test_arguments_survive_their_own_dictionary_and_a_command_line(tmp_path: Path) -> None:
    settings = {"balancer": {"name": "bilb", "preset": "celeba"}, "task_priors": [1.0, 2.0], "absent_tasks": "hold"}
    args = arguments(tmp_path, **settings)
    assert {key: args.to_dict()[key] for key in settings} == settings
    parser = HfArgumentParser(BilevelMTLTrainingArguments)  # type: ignore[arg-type]
    line = ["--output_dir", str(tmp_path), "--use_cpu", "--balancer", '{"name": "bilb", "preset": "qm9"}']
    line += ["--task_names", "a", "b", "--task_priors", "1", "2e-1", "--absent_tasks", "hold"]
    (parsed,) = parser.parse_args_into_dataclasses(line)
    assert parsed.balancer == {"name": "bilb", "preset": "qm9"} and parsed.task_names == ["a", "b"]
    assert parsed.task_priors == [1.0, 0.2] and parsed.absent_tasks == "hold"
    (named,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--use_cpu", "--balancer", "si"])
    assert named.balancer_name_and_options() == ("si", {})
