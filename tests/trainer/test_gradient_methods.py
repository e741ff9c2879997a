"""Gradient methods in the Trainer: as in a loop of one's own, over windows, in checkpoints; what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import TrainerCallback

from hf_bilb import BilevelMTLTrainer, build_balancer
from hf_bilb.engine.gradient_balancer import GradientBalancer
from hf_bilb.errors import NonFiniteLossError, OptionError
from tests.synthetic import build_data, build_model, flat_parameters, relative_difference
from tests.trainer.harness import BATCH, FLOAT, TASK_NAMES, arguments, assert_goes_on, batches, run

PCGRAD = {"name": "pcgrad", "order": "identity"}


def by_hand(balancer: Any, data: Any, **settings: Any) -> Tensor:
    """Plain gradient descent with the balancer."""
    model = build_model(FLOAT)
    built = build_balancer(balancer, task_names=TASK_NAMES, dtype=FLOAT, **settings).bind(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for batch in batches(data):
        optimizer.zero_grad()
        outputs = model(batch["features"], batch["labels"])
        built.backward(outputs.losses, outputs.num_items)
        optimizer.step()
        built.step()
    return flat_parameters(model)


@pytest.mark.parametrize("balancer", ["mgda", PCGRAD, "moco", {"name": "nash_mtl", "every_n_steps": 2}], ids=str)
def test_as_a_loop_of_ones_own(balancer: Any, tmp_path: Path) -> None:
    data = build_data(6 * BATCH, dtype=FLOAT, missing=0.3)
    found = run(tmp_path, data=data, balancer=balancer)
    assert relative_difference(found.parameters, by_hand(balancer, data)) <= 1e-14
    entry = found.steps[-1]
    assert entry["loss"] == pytest.approx(sum(entry[f"loss/{task}"] for task in TASK_NAMES), rel=1e-9)


def test_pcgrad_by_a_plain_loop(tmp_path: Path) -> None:
    """Yu et al. 2020, algorithm 1, on the trunk; the heads descend the sum."""
    data = build_data(5 * BATCH, dtype=FLOAT)
    found = run(tmp_path, data=data, balancer=PCGRAD)
    model = build_model(FLOAT)
    trunk = list(model.trunk.parameters())
    for batch in batches(data):
        losses = model(batch["features"], batch["labels"]).losses
        rows = [torch.autograd.grad(loss, trunk, retain_graph=True) for loss in losses]
        flat = [torch.cat([part.flatten() for part in row]) for row in rows]
        total = torch.zeros_like(flat[0])
        for i, own in enumerate(flat):
            projected = own.clone()
            for j, other in enumerate(flat):
                if j != i and projected @ other < 0:
                    projected -= (projected @ other) / (other @ other) * other
            total += projected
        heads = list(model.heads.parameters())
        of_heads = torch.autograd.grad(losses.sum(), heads)
        with torch.no_grad():
            for parameter, part in zip(trunk, total.split([p.numel() for p in trunk]), strict=True):
                parameter -= 0.05 * part.view_as(parameter)
            for parameter, gradient in zip(heads, of_heads, strict=True):
                parameter -= 0.05 * gradient
    assert relative_difference(found.parameters, flat_parameters(model)) <= 1e-13


def simplex(vector: Tensor) -> Tensor:
    """The nearest point with entries >= 0 that add up to 1, by bisection."""
    low, high = vector.min() - 1, vector.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (vector - middle).clamp(min=0).sum() > 1 else (low, middle)
    return (vector - low).clamp(min=0)


@pytest.mark.parametrize("parts", [3, 6])
def test_modo_takes_the_micro_batches_of_a_window_as_its_samples(parts: int, tmp_path: Path) -> None:
    """Chen et al. 2023: lambda <- Proj(lambda - gamma (J0 J1^T lambda + rho lambda)); the trunk has J2^T lambda."""
    data = build_data(2 * parts * BATCH, dtype=FLOAT)
    options = {"name": "modo", "gamma": 0.05, "rho": 0.1}
    found = run(tmp_path, data=data, balancer=options, gradient_accumulation_steps=parts, balance_over="window")
    model = build_model(FLOAT)
    trunk, heads = list(model.trunk.parameters()), list(model.heads.parameters())
    shares = torch.full((4,), 0.25, dtype=FLOAT)
    whole = list(batches(data))
    for start in range(0, len(whole), parts):
        samples: list[list[Tensor]] = [[], [], []]
        of_heads = [torch.zeros_like(p) for p in heads]
        for number, batch in enumerate(whole[start : start + parts]):
            losses = model(batch["features"], batch["labels"]).losses
            rows = [torch.autograd.grad(loss, trunk, retain_graph=True) for loss in losses]
            samples[number % 3].append(torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]))
            for total, gradient in zip(of_heads, torch.autograd.grad(losses.sum(), heads), strict=True):
                total += gradient / parts
        first, second, third = (torch.stack(sample).mean(0) for sample in samples)
        shares = simplex(shares - 0.05 * (first @ (second.T @ shares) + 0.1 * shares))
        step = shares @ third
        with torch.no_grad():
            for parameter, part in zip(trunk, step.split([p.numel() for p in trunk]), strict=True):
                parameter -= 0.05 * part.view_as(parameter)
            for parameter, gradient in zip(heads, of_heads, strict=True):
                parameter -= 0.05 * gradient
    assert found.trainer.state.global_step == 2
    assert relative_difference(found.parameters, flat_parameters(model)) <= 1e-12


@pytest.mark.parametrize("balancer", ["mgda", "pcgrad", "moco", "gradvac", "gradnorm"])
def test_a_run_that_goes_on_is_the_same_to_the_last_bit(balancer: str, tmp_path: Path) -> None:
    assert_goes_on(tmp_path, build_data(6 * BATCH, dtype=FLOAT, missing=0.3), 3, balancer=balancer)


def test_a_dropped_step_leaves_everything_as_it_was(tmp_path: Path) -> None:
    data = build_data(6 * BATCH, dtype=FLOAT)
    data.features[2 * BATCH] = torch.inf
    found = run(tmp_path, data=data, balancer="gradvac", nonfinite_loss="skip")
    kept = build_data(6 * BATCH, dtype=FLOAT)
    rows = [i for i in range(6 * BATCH) if i // BATCH != 2]
    clean = type(kept)(kept.features[rows], kept.labels[rows])
    assert (
        relative_difference(found.parameters, run(tmp_path / "clean", data=clean, balancer="gradvac").parameters)
        <= 1e-14
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "use_reentrant: true",
        ),
        ({"torch_compile": True}, "torch_compile: true"),
        ({"ddp_static_graph": True}, "ddp_static_graph: true"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_refused_before_training(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    args = arguments(tmp_path, balancer="mgda", **settings)
    with pytest.raises(OptionError, match=r"^balancer: 'mgda' looks at the gradients of the tasks.*" + message):
        BilevelMTLTrainer(build_model(FLOAT), args, train_dataset=build_data(8, dtype=FLOAT))


def test_adapters_that_begin_with_zeros_are_shared(tmp_path: Path) -> None:
    adapted = get_peft_model(build_model(FLOAT), LoraConfig(target_modules=["trunk.0"], modules_to_save=["heads"], r=2))
    adapted = adapted.double()
    args = arguments(tmp_path, balancer="nash_mtl", task_names=list(TASK_NAMES), gradient_accumulation_steps=2)
    trainer = BilevelMTLTrainer(adapted, args, train_dataset=build_data(6 * BATCH, dtype=FLOAT, missing=0.2))
    trainer.train()
    assert isinstance(trainer.balancer, GradientBalancer)
    names = {id(parameter): name for name, parameter in adapted.named_parameters()}
    shared = [names[id(parameter)] for parameter in trainer.balancer._shared.of_several]
    assert len(shared) == 2 and all("lora_" in name for name in shared)
    assert (trainer.balancer.coefficients - 1).abs().max() > 1e-3


def test_bf16_autocast(tmp_path: Path) -> None:
    rows = build_data(4 * BATCH)
    settings = {"balancer": "pcgrad", "bf16": True}
    found = BilevelMTLTrainer(build_model(torch.float32), arguments(tmp_path, **settings), train_dataset=rows)
    found.train()
    exact = BilevelMTLTrainer(build_model(torch.float32), arguments(tmp_path, balancer="pcgrad"), train_dataset=rows)
    exact.train()
    assert relative_difference(flat_parameters(found.model), flat_parameters(exact.model)) <= 0.02


@pytest.mark.parametrize("balancer", ["mgda", PCGRAD, "moco"], ids=str)
@pytest.mark.parametrize("first", [1, 2], ids=["one task first", "two tasks first"])
def test_tasks_that_come_in_a_later_micro_batch(first: int, balancer: Any, tmp_path: Path) -> None:
    data = build_data(4 * BATCH, dtype=FLOAT)
    data.labels[:BATCH, first:] = torch.nan
    settings = {"data": data, "balancer": balancer, "balance_over": "window"}
    parts = run(tmp_path / "parts", gradient_accumulation_steps=4, **settings)
    whole = run(tmp_path / "whole", per_device_train_batch_size=4 * BATCH, **settings)
    assert parts.trainer.state.global_step == whole.trainer.state.global_step == 1
    assert relative_difference(parts.parameters, whole.parameters) <= 1e-13


def steep(outputs: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """The losses; marked rows give the first one a root at 0, whose slope is infinite."""
    marked = outputs.logits[batch["features"][:, 0] == 7.0]
    first = torch.eye(len(TASK_NAMES), dtype=FLOAT)[0]
    root = (marked * 0).square().sum().sqrt()
    return torch.where(first > 0, outputs.losses + root, outputs.losses), outputs.num_items


@pytest.mark.parametrize("over", ["micro_batch", "window"])
@pytest.mark.parametrize("where", [0, 1])
def test_a_gradient_that_is_not_finite_drops_the_step_of_any_micro_batch(where: int, over: str, tmp_path: Path) -> None:
    data = build_data(4 * BATCH, dtype=FLOAT)
    data.features[where * BATCH, 0] = 7.0
    settings: dict[str, Any] = {"gradient_accumulation_steps": 2, "balance_over": over, "balancer": "pcgrad"}
    made = {"task_loss_func": steep}
    found = run(tmp_path, data=data, nonfinite_loss="skip", trainer_arguments=made, **settings)
    clean = type(data)(data.features[2 * BATCH :], data.labels[2 * BATCH :])
    expected = run(tmp_path / "clean", data=clean, trainer_arguments=made, **settings)
    assert relative_difference(found.parameters, expected.parameters) <= 1e-14
    with pytest.raises(NonFiniteLossError, match=r"gradient of task 'alpha'.* is not finite"):
        run(tmp_path / "raise", data=data, trainer_arguments=made, **settings)


class Thaw(TrainerCallback):
    """Trains the trunk from the third step on."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.trunk.requires_grad_(state.global_step >= 2)


def test_gradual_unfreezing(tmp_path: Path) -> None:
    model = build_model(FLOAT)
    model.trunk.requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    args = arguments(tmp_path, balancer="mgda", optim="sgd")
    trainer = BilevelMTLTrainer(model, args, train_dataset=build_data(4 * BATCH, dtype=FLOAT), callbacks=[Thaw()])
    trainer.optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    trainer.train()
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
