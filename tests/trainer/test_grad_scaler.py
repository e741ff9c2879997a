"""Mixed precision's gradient scaler: the router moves when the model moves, a dropped step closes the scaler's round.

Trainer ignores fp16 on a CPU, so the scaler (torch's own, which works on CPU tensors) is put where accelerate has it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.optimizer import patch_optimizer_step
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_bilb import BilevelMTLTrainer
from hf_bilb.balancers import LossBalancer
from tests.synthetic import build_data, build_model, flat_parameters
from tests.trainer.harness import BATCH, FLOAT, Recorder, arguments, run

INITIAL_SCALE = 2.0**10
STEPS = 5


class WithScaler(BilevelMTLTrainer):
    """A trainer whose accelerator scales gradients."""

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        # Called once model and optimizer are prepared.
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=INITIAL_SCALE, growth_interval=10_000)
        optimizer = self.optimizer
        optimizer.scaler = self.accelerator.scaler
        optimizer._accelerate_step_called = False
        optimizer._optimizer_original_step_method = optimizer.optimizer.step
        optimizer._optimizer_patched_step_method = patch_optimizer_step(optimizer, optimizer.optimizer.step)
        return super().create_scheduler(*args, **kwargs)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        # As accelerate does under fp16: clipping opens the scaler's round.
        self.accelerator.scaler.unscale_(self.optimizer.optimizer)
        return super()._clip_grad_norm(model)


class Overflow(TrainerCallback):
    """Makes one gradient infinite in step number `step`, as an overflow in half precision does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        self.model = model
        self.hook = None
        if state.global_step + 1 == self.step:
            self.hook = next(model.parameters()).register_hook(lambda gradient: gradient + torch.inf)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self.hook is not None:
            self.hook.remove()


class Router(TrainerCallback):
    """The router's logits after each step."""

    def __init__(self) -> None:
        self.logits: list[Tensor] = []

    def on_step_end(self, *args: Any, balancer: LossBalancer, **kwargs: Any) -> None:
        self.logits.append(balancer.state_dict()["objective.router.logits"])


def train(folder: Path, data: Any, *callbacks: TrainerCallback, **settings: Any) -> tuple[WithScaler, Recorder]:
    recorder = Recorder()
    trainer = WithScaler(
        model=build_model(FLOAT),
        args=arguments(folder, optim="adamw_torch", learning_rate=0.01, balancer={"name": "bilb"}, **settings),
        train_dataset=data,
        callbacks=[recorder, *callbacks],
    )
    trainer.train()
    return trainer, recorder


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_an_overflow_leaves_model_and_router_alone(tmp_path: Path, max_grad_norm: float) -> None:
    router = Router()
    data = build_data(STEPS * BATCH, dtype=FLOAT)
    trainer, record = train(tmp_path, data, router, Overflow(3), max_grad_norm=max_grad_norm)
    assert trainer.accelerator.scaler.get_scale() == INITIAL_SCALE / 2
    assert torch.equal(record.parameters[1], record.parameters[2])
    assert torch.equal(router.logits[1], router.logits[2])
    for earlier, later in ((0, 1), (2, 3), (3, 4)):
        assert not torch.equal(record.parameters[earlier], record.parameters[later])
        assert not torch.equal(router.logits[earlier], router.logits[later])


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_dropped_step_closes_the_scalers_round(tmp_path: Path, max_grad_norm: float) -> None:
    router = Router()
    data = build_data(STEPS * BATCH, dtype=FLOAT)
    data.labels[2 * BATCH, 0] = torch.inf
    trainer, record = train(tmp_path, data, router, max_grad_norm=max_grad_norm, nonfinite_loss="skip")
    assert trainer.state.global_step == STEPS
    assert trainer.accelerator.scaler.get_scale() == INITIAL_SCALE
    assert torch.equal(record.parameters[1], record.parameters[2])
    assert torch.equal(router.logits[1], router.logits[2])
    assert not torch.equal(record.parameters[2], record.parameters[3])
    assert not torch.equal(router.logits[2], router.logits[3])


def test_scaled_gradients_train_like_unscaled_ones(tmp_path: Path) -> None:
    data = build_data(STEPS * BATCH, dtype=FLOAT)
    scaled, _ = train(tmp_path / "scaled", data)
    plain = run(tmp_path / "plain", data=data, optim="adamw_torch", learning_rate=0.01, balancer={"name": "bilb"})
    # A power of two: scaling and unscaling lose nothing.
    torch.testing.assert_close(flat_parameters(scaled.model), plain.parameters, rtol=0, atol=1e-12)
