"""`balance_over: window`: F once per update, on all its micro-batches, as if they were one batch."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

import hf_bilb.engine.balancer
from hf_bilb import BilevelMTLTrainer
from hf_bilb.engine.replay import RandomState
from hf_bilb.errors import NonFiniteLossError, TaskLossError
from hf_bilb.trainer import compat
from hf_bilb.trainer.step import OptimizerStep
from tests.synthetic import SyntheticData, SyntheticModel
from tests.trainer.harness import (
    FLOAT,
    TASK_NAMES,
    Run,
    arguments,
    batches,
    build_data,
    build_model,
    close,
    flat_parameters,
    plain_settings,
    run,
    untimed,
)
from tests.trainer.models import FeatureModel, NoisyModel, NormalisedModel, build
from tests.trainer.test_models import bert
from tests.trainer.test_models import rows as bert_rows
from tests.trainer.test_single_task import ordinary

WHOLE = 16
ADAM: dict[str, Any] = {"optim": "adamw_torch", "learning_rate": 0.02, "weight_decay": 0.0}
BILB: dict[str, Any] = {"name": "bilb", "learning_rate": 0.05}
FEATURES: dict[str, Any] = {
    "name": "bilb", "learning_rate": 0.05, "router": "features", "initial_logits": None, "activation": "softmax",
}  # fmt: skip
BALANCERS: dict[str, Any] = {
    "bilb": BILB,
    "qm9": {**BILB, "preset": "qm9"},
    "celeba": {**BILB, "preset": "celeba"},
    "si": "si",
    "uw": {"name": "uw", "learning_rate": 0.05},
    "features": FEATURES,
    "cityscapes": {**BILB, "preset": "cityscapes"},
    "nyuv2": {**BILB, "preset": "nyuv2"},
}


def with_features(balancer: Any) -> bool:
    return isinstance(balancer, dict) and (balancer.get("preset") in ("cityscapes", "nyuv2") or "router" in balancer)


def model_for(balancer: Any, **config: Any) -> SyntheticModel:
    if with_features(balancer):
        return build(FeatureModel, num_router_features=8, **config)
    return build_model(FLOAT, **config)


def split(
    folder: Path, parts: int, model: nn.Module | None = None, data: Any = None, whole: int = WHOLE, **settings: Any
) -> Run:
    """Updates of `whole` rows in `parts` micro-batches, F over the window."""
    given = {"balance_over": "window", "balancer": BILB, **ADAM, **settings}
    return run(
        folder,
        model,
        data,
        per_device_train_batch_size=whole // parts,
        gradient_accumulation_steps=parts,
        **given,
    )


def assert_same_training(found: Run, expected: Run, references: bool = True) -> None:
    tolerance = 1e-12
    assert found.trainer.state.global_step == expected.trainer.state.global_step > 1
    assert close(found.parameters, expected.parameters, tolerance)
    ours, theirs = found.trainer.balancer.state_dict(), expected.trainer.balancer.state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        # References and last losses are those of a decision: of a window, or of a micro-batch.
        if references or not key.startswith(("normalization.", "memory.", "guards.")):
            torch.testing.assert_close(ours[key], value, rtol=10 * tolerance, atol=tolerance, msg=key)
    assert [entry.keys() for entry in found.steps] == [entry.keys() for entry in expected.steps]
    for one, other in zip(found.steps, expected.steps, strict=True):
        for key in other.keys() - {"epoch"}:  # counted in micro-batches by Trainer
            number = other[key]
            assert one[key] == pytest.approx(number, rel=10 * tolerance, abs=tolerance), key
    train_loss = [trainer.state.log_history[-1]["train_loss"] for trainer in (found.trainer, expected.trainer)]
    assert train_loss[0] == pytest.approx(train_loss[1], rel=tolerance)


# --- exactness ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BALANCERS)
@pytest.mark.slow
def test_as_one_batch(name: str, tmp_path: Path) -> None:
    # 70 rows: the last update has six, as 6, as 4 + 2, or as one micro-batch of 6 in a window of two.
    balancer = BALANCERS[name]
    data = build_data(70, dtype=FLOAT, missing=0.4)
    # QM9's references are taken anew in the second epoch.
    settings: dict[str, Any] = {"balancer": balancer, "num_train_epochs": 2 if name == "qm9" else 1}
    expected = split(tmp_path, 1, model_for(balancer), data, **settings)
    assert expected.trainer.state.global_step == 5 * settings["num_train_epochs"]
    for parts in (2, 4) if name in ("bilb", "features") else (4,):
        found = split(tmp_path, parts, model_for(balancer), data, **settings)
        assert_same_training(found, expected)
    if isinstance(balancer, dict):
        moved = found.trainer.balancer.state_dict()
        start = BilevelMTLTrainer(model=model_for(balancer), args=arguments(tmp_path, balancer=balancer)).balancer
        assert all(
            not torch.equal(moved[key], value)
            for key, value in start.state_dict().items()
            if key.startswith("objective.")
        )


def test_micro_batch_is_not_as_one_batch(tmp_path: Path) -> None:
    # What the exactness is worth: the cheap way differs, so that the comparison above can fail.
    expected = split(tmp_path, 1, data=build_data(64, dtype=FLOAT))
    found = split(tmp_path, 4, data=build_data(64, dtype=FLOAT), balance_over="micro_batch")
    assert not close(found.parameters, expected.parameters, 1e-4)


@pytest.mark.parametrize("name", ["bilb", "features"])
def test_sgd_against_a_loop_of_ones_own(name: str, tmp_path: Path) -> None:
    # The whole batch without a Trainer: the reference is no run of ours with other settings.
    from hf_bilb import build_balancer

    options = {"router": "features", "num_features": 8, "initial_logits": None} if name == "features" else {}
    balancer = build_balancer("bilb", task_names=TASK_NAMES, dtype=FLOAT, learning_rate=0.05, **options)
    data, settings = build_data(64, dtype=FLOAT, missing=0.3), {"balancer": {**BILB, **options}}
    model = model_for(settings["balancer"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    balancer.on_epoch_begin(0)
    for batch in batches(data, WHOLE):
        optimizer.zero_grad()
        outputs = model(**batch)
        features = outputs.router_features if name == "features" else None
        balancer.backward(outputs.losses, outputs.num_items, features)
        optimizer.step()
        balancer.step()
    found = split(tmp_path, 4, model_for(settings["balancer"]), data, optim="sgd", learning_rate=0.05, **settings)
    assert close(found.parameters, flat_parameters(model))
    for key, value in balancer.state_dict().items():
        torch.testing.assert_close(found.trainer.balancer.state_dict()[key], value, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("name", ["bilb", "si", "uw"])
def test_auxiliary_loss_and_priors(name: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"balancer": BALANCERS[name], "task_priors": [2.0, 1.0, 0.5, 1.0]}
    data = build_data(64, dtype=FLOAT, missing=0.3)
    expected = split(tmp_path, 1, build_model(FLOAT, auxiliary_weight=0.3), data, **settings)
    found = split(tmp_path, 4, build_model(FLOAT, auxiliary_weight=0.3), data, **settings)
    assert_same_training(found, expected)
    assert all(value > 0 for value in found.logged("auxiliary_loss"))


class SometimesAuxiliary(SyntheticModel):
    """An auxiliary loss in batches whose first feature says so."""

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Any:
        outputs = super().forward(features, labels)
        if features[0, 0] > 0:
            outputs.auxiliary_loss = outputs.logits.square().mean()
        return outputs


def test_an_auxiliary_loss_of_a_later_micro_batch_is_logged(tmp_path: Path) -> None:
    data = build_data(16, dtype=FLOAT)
    data.features[:, 0] = torch.tensor([-1.0] * 8 + [1.0] * 8)
    found = split(tmp_path, 2, build(SometimesAuxiliary), data)
    model = build(SometimesAuxiliary)
    expected = float(model(**batches(data, 8)[1]).auxiliary_loss.detach()) / 2
    assert found.logged("auxiliary_loss") == [pytest.approx(expected, rel=1e-12)]


def one_task_batches(updates: int = 4, size: int = 4) -> SyntheticData:
    """Every `size` rows show one task; each update of K `size` rows shows all of them, in another order."""
    data = build_data(updates * 4 * size, dtype=FLOAT)
    labels = torch.full_like(data.labels, torch.nan)
    generator = torch.Generator().manual_seed(0)
    for update in range(updates):
        for place, task in enumerate(torch.randperm(4, generator=generator).tolist()):
            rows = slice((4 * update + place) * size, (4 * update + place + 1) * size)
            labels[rows, task] = data.labels[rows, task]
    return SyntheticData(data.features, labels)


@pytest.mark.parametrize(
    ("name", "absent_tasks"), [("bilb", "auto"), ("bilb", "skip"), ("bilb", "hold"), ("qm9", "auto"), ("uw", "auto")]
)
@pytest.mark.slow
def test_micro_batches_of_one_task_each(name: str, absent_tasks: str, tmp_path: Path) -> None:
    data = one_task_batches()
    settings: dict[str, Any] = {"balancer": BALANCERS[name], "absent_tasks": absent_tasks}
    expected = split(tmp_path, 1, data=data, **settings)
    for parts in (2, 4) if absent_tasks == "auto" else (4,):
        assert_same_training(split(tmp_path, parts, data=data, **settings), expected)


def test_a_task_that_is_absent_from_a_whole_window_is_held(tmp_path: Path) -> None:
    data = one_task_batches()
    data.labels[16:32][:, 2] = torch.nan
    settings: dict[str, Any] = {"absent_tasks": "hold", "data": data}
    expected = split(tmp_path, 1, **settings)
    found = split(tmp_path, 4, **settings)
    assert_same_training(found, expected)
    assert found.logged("loss/gamma")[1] is None and found.logged("coefficient/gamma")[1] is None
    # `auto` skips here: the window has several tasks, in whatever micro-batches.
    skipped = split(tmp_path, 4, data=data, absent_tasks="skip")
    assert not close(skipped.parameters, expected.parameters, 1e-6)
    for parts in (1, 4):
        assert_same_training(split(tmp_path, parts, data=data), skipped)


def present_losses(outputs: Any, batch: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A dict of the tasks that have a label in the batch, in another order than the tasks'."""
    losses, counts = {}, {}
    for k, task in reversed(list(enumerate(TASK_NAMES))):
        here = batch["labels"][:, k].isfinite()
        if here.any():
            losses[task] = (outputs.logits[here, k] - batch["labels"][here, k]).square().mean()
            counts[task] = here.sum()
    return losses, counts


@pytest.mark.parametrize("kind", ["partial", "one task"])
def test_losses_as_a_dict(kind: str, tmp_path: Path) -> None:
    data = build_data(64, dtype=FLOAT, missing=0.5) if kind == "partial" else one_task_batches()
    expected = split(tmp_path, 1, data=data)
    given: dict[str, Any] = {"trainer_arguments": {"task_loss_func": present_losses}}
    assert_same_training(split(tmp_path, 4, data=data, **given), expected)


def test_no_counts_are_needed_beforehand(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # Labels under a name that says nothing: under `micro_batch` a warning and weights by size, here neither.
    class Renamed(SyntheticModel):
        def forward(self, features: Tensor, targets: Tensor | None = None) -> Any:  # type: ignore[override]
            return super().forward(features, targets)

    data = build_data(64, dtype=FLOAT, missing=0.5)
    rows = [{"features": row["features"], "targets": row["labels"]} for row in (data[i] for i in range(64))]
    expected = split(tmp_path, 1, data=data)
    assert_same_training(split(tmp_path, 4, build(Renamed), rows), expected)
    assert not [record for record in caplog.records if record.name.startswith("hf_bilb")]


def test_clipping_and_a_schedule(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_grad_norm": 0.1, "lr_scheduler_type": "linear", "balancer": BALANCERS["qm9"]}
    data = build_data(64, dtype=FLOAT, missing=0.3)
    expected = split(tmp_path, 1, data=data, **settings)
    found = split(tmp_path, 4, data=data, **settings)
    assert_same_training(found, expected)
    assert min(found.logged("grad_norm")) > 0.1


class Returned(BilevelMTLTrainer):
    """Keeps what each micro-batch's `training_step` returns."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.returned.append(float(loss))
        return loss


@pytest.mark.parametrize("auxiliary_weight", [0.0, 0.3])
def test_what_the_micro_batches_return_adds_up_to_f(auxiliary_weight: float, tmp_path: Path) -> None:
    args = arguments(
        tmp_path, balance_over="window", balancer=BALANCERS["bilb"], gradient_accumulation_steps=4, logging_steps=1
    )
    data = build_data(64, dtype=FLOAT, missing=0.3)
    trainer = Returned(model=build_model(FLOAT, auxiliary_weight=auxiliary_weight), args=args, train_dataset=data)
    trainer.returned = []
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert torch.tensor(trainer.returned).view(4, 4).sum(1).tolist() == pytest.approx(logged, rel=1e-6)


# --- one evaluation of F ------------------------------------------------------------------------------------------


class BeforeEachUpdate(TrainerCallback):
    """The whole batch's losses at the parameters before each update, from the definition."""

    def __init__(self, data: SyntheticData) -> None:
        self.batches = batches(data, WHOLE)
        self.losses: list[Tensor] = []
        self.num_items: list[Tensor] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        batch = self.batches[state.global_step]
        with torch.no_grad():
            errors = (model.heads(model.trunk(batch["features"])) - batch["labels"]).square()
        self.losses.append(errors.nanmean(0))
        self.num_items.append(errors.isfinite().sum(0).to(FLOAT))


def test_f_is_evaluated_once_per_update_on_the_whole_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    original = hf_bilb.engine.balancer.differentiate

    def spy(objective: Any, normalization: Any, losses: Tensor, *args: Any) -> Any:
        seen.append(losses.clone())
        return original(objective, normalization, losses, *args)

    monkeypatch.setattr(hf_bilb.engine.balancer, "differentiate", spy)
    data = build_data(64, dtype=FLOAT, missing=0.4)
    before = BeforeEachUpdate(data)
    found = split(tmp_path, 4, data=data, trainer_arguments={"callbacks": [before]})
    assert found.trainer.state.global_step == len(seen) == 4
    torch.testing.assert_close(torch.stack(seen), torch.stack(before.losses), rtol=1e-13, atol=0)
    logged = torch.tensor([[entry[f"loss/{task}"] for task in TASK_NAMES] for entry in found.steps], dtype=FLOAT)
    torch.testing.assert_close(logged, torch.stack(before.losses), rtol=1e-13, atol=0)


class Passes(TrainerCallback):
    """Counts forward passes (with and without gradients) and backward passes of each update."""

    def __init__(self) -> None:
        self.counts: list[tuple[int, int, int]] = []
        self.now = [0, 0, 0]

    def watch(self, trainer: BilevelMTLTrainer) -> None:
        trainer.model.register_forward_hook(lambda *_: self._count(0 if torch.is_grad_enabled() else 1))
        original = trainer.accelerator.backward

        def backward(*args: Any, **kwargs: Any) -> None:
            self._count(2)
            original(*args, **kwargs)

        trainer.accelerator.backward = backward

    def _count(self, kind: int) -> None:
        self.now[kind] += 1

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.counts.append((self.now[0], self.now[1], self.now[2]))
        self.now = [0, 0, 0]


@pytest.mark.parametrize(
    ("balance_over", "parts", "expected"),
    [
        ("window", 4, [(4, 4, 4)] * 4 + [(2, 2, 2)]),
        ("window", 1, [(1, 0, 1)] * 5),
        ("window", 2, [(2, 2, 2)] * 4 + [(1, 0, 1)]),
        # The first window is looked at: are the counts that the batches tell those of the losses?
        ("micro_batch", 4, [(4, 4, 4)] + [(4, 0, 4)] * 3 + [(2, 0, 2)]),
    ],
)
def test_one_forward_pass_more_for_each_micro_batch(
    balance_over: str, parts: int, expected: list[tuple[int, int, int]], tmp_path: Path
) -> None:
    passes = Passes()
    trainer = BilevelMTLTrainer(
        model=build_model(FLOAT),
        args=arguments(
            tmp_path,
            balance_over=balance_over,
            per_device_train_batch_size=WHOLE // parts,
            gradient_accumulation_steps=parts,
        ),
        train_dataset=build_data(70, dtype=FLOAT, missing=0.3),
        callbacks=[passes],
    )
    passes.watch(trainer)
    trainer.train()
    assert passes.counts == expected


# --- both passes see the same -------------------------------------------------------------------------------------


def random_states() -> tuple[list[int], Any, tuple[list[int], int]]:
    """Where torch's, Python's and numpy's default generators are."""
    key, place = np.random.get_state()[1:3]
    return torch.get_rng_state().tolist(), random.getstate(), (key.tolist(), place)


class Seen(TrainerCallback):
    """The losses of every forward pass in training mode, by update; random states after each update."""

    def __init__(self, model: nn.Module) -> None:
        self.updates: list[list[Tensor]] = [[]]
        self.random_states: list[Any] = []
        model.register_forward_hook(self._note)

    def _note(self, model: nn.Module, inputs: Any, outputs: Any) -> None:
        if model.training:
            self.updates[-1].append(outputs["losses"].detach().clone())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.updates.append([])
        self.random_states.append(random_states())


def watched(folder: Path, model: nn.Module, data: Any, **settings: Any) -> tuple[Seen, Run]:
    seen = Seen(model)
    found = split(folder, 4, model, data, trainer_arguments={"callbacks": [seen]}, **settings)
    return seen, found


NOISES: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: build_model(FLOAT, dropout=0.4),
    "every generator": lambda: build(NoisyModel, dropout=0.4),
}


@pytest.mark.parametrize("noise", NOISES)
def test_both_passes_draw_the_same(noise: str, tmp_path: Path) -> None:
    data = build_data(70, dtype=FLOAT, missing=0.3)
    seen, _ = watched(tmp_path, NOISES[noise](), data)
    sizes = [len(update) for update in seen.updates]
    assert sizes == [8, 8, 8, 8, 4, 0]
    for update in seen.updates:
        half = len(update) // 2
        assert all(torch.equal(one, other) for one, other in zip(update[:half], update[half:], strict=True))
    # Another mask for each micro-batch: with a model at a standstill and the same rows in each.
    rows = SyntheticData(data.features[:4].repeat(4, 1), data.labels[:4].repeat(4, 1))
    seen, _ = watched(tmp_path, NOISES[noise](), rows, learning_rate=0.0)
    assert len({tuple(losses.tolist()) for losses in seen.updates[0]}) == 4


@pytest.mark.parametrize("noise", NOISES)
def test_random_numbers_go_on_as_with_one_pass(noise: str, tmp_path: Path) -> None:
    data = build_data(70, dtype=FLOAT, missing=0.3)
    twice, found = watched(tmp_path, NOISES[noise](), data, balancer="ls")
    once, expected = watched(tmp_path, NOISES[noise](), data, balancer="ls", balance_over="micro_batch")
    assert len(twice.random_states) == 5
    assert twice.random_states == once.random_states
    assert twice.random_states[0] != twice.random_states[1]
    # The plain sum is linear, so that nothing but a difference of masks could tell the two apart.
    assert_same_training(found, expected, references=False)


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_the_devices_generator_is_replayed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Module:
        """What torch has for each kind of device, as far as it is asked for."""

        state = torch.tensor([1])

        def get_rng_state(self) -> Tensor:
            return self.state

        def set_rng_state(self, state: Tensor) -> None:
            self.state = state

    module = Module()
    monkeypatch.setattr(torch, "get_device_module", lambda device: {kind: module}[device.type])
    before = RandomState.capture(torch.device(kind))
    module.state = torch.tensor([2])
    before.restore()
    assert module.state.tolist() == [1]


def test_autocast_gives_both_passes_the_same(tmp_path: Path) -> None:
    seen, found = watched(tmp_path, build_model(dropout=0.3), build_data(64), bf16=True)
    full, _ = watched(tmp_path, build_model(dropout=0.3), build_data(64))
    assert found.parameters.isfinite().all()
    assert not torch.equal(seen.updates[0][0], full.updates[0][0]), "it ran in float32"
    for update in seen.updates[:-1]:
        assert all(torch.equal(one, other) for one, other in zip(update[:4], update[4:], strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool, tmp_path: Path) -> None:
    def train(**settings: Any) -> Run:
        model = bert()
        model.bert.embeddings.dropout.p = 0.2
        return split(tmp_path, 3, model, bert_rows(), 12, num_train_epochs=2, **settings)

    plain = train()
    name = compat.ACTIVATION_CHECKPOINTING
    again = train(**{name: True, f"{name}_kwargs": {"use_reentrant": reentrant}})
    assert plain.trainer.state.global_step == 2
    assert torch.equal(plain.parameters, again.parameters) and plain.steps == again.steps


# --- pass 1 leaves no trace ---------------------------------------------------------------------------------------


def test_batchnorm_sees_every_batch_once(tmp_path: Path) -> None:
    # With the model at a standstill the buffers depend on the batches alone, not on the coefficients.
    data = build_data(64, dtype=FLOAT)
    settings: dict[str, Any] = {"data": data, "learning_rate": 0.0}
    found = split(tmp_path, 4, build(NormalisedModel), **settings)
    expected = split(tmp_path, 4, build(NormalisedModel), balance_over="micro_batch", **settings)
    ours, theirs = (dict(result.trainer.model.named_buffers()) for result in (found, expected))
    assert int(ours["trunk.5.num_batches_tracked"]) == 16
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    fresh = dict(build(NormalisedModel).named_buffers())
    assert not torch.equal(ours["trunk.5.running_mean"], fresh["trunk.5.running_mean"])


def test_batchnorm_while_it_trains(tmp_path: Path) -> None:
    # The plain sum is linear: window and micro-batch are the same training, if pass 1 leaves nothing behind.
    settings: dict[str, Any] = {"data": build_data(64, dtype=FLOAT, missing=0.3), "balancer": "ls"}
    found = split(tmp_path, 4, build(NormalisedModel, dropout=0.2), **settings)
    expected = split(tmp_path, 4, build(NormalisedModel, dropout=0.2), balance_over="micro_batch", **settings)
    assert_same_training(found, expected, references=False)
    for name, buffer in expected.trainer.model.named_buffers():
        torch.testing.assert_close(dict(found.trainer.model.named_buffers())[name], buffer, rtol=1e-12, atol=1e-14)


def test_the_first_pass_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = OptimizerStep.first_pass
    calls = 0

    def watched_pass(self: OptimizerStep, model: nn.Module, *look: Any) -> Any:
        nonlocal calls
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        gradients = [parameter.grad for parameter in model.parameters()]
        losses = original(self, model, *look)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        assert all(p.grad is old for p, old in zip(model.parameters(), gradients, strict=True))
        assert not any(batch.losses.requires_grad for batch in losses), "no graph is kept"
        assert model.training
        calls += 1
        return losses

    monkeypatch.setattr(OptimizerStep, "first_pass", watched_pass)
    split(tmp_path, 4, build(NormalisedModel, dropout=0.2), build_data(64, dtype=FLOAT))
    assert calls == 4


class ScheduleFreeLike(torch.optim.SGD):
    """Plain SGD that keeps other parameters for evaluation, as schedule-free optimizers do."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.05)
        self.training = True

    def train(self) -> None:
        self._switch(True, 2.0)

    def eval(self) -> None:
        self._switch(False, 0.5)

    def _switch(self, training: bool, factor: float) -> None:
        if self.training != training:
            self.training = training
            with torch.no_grad():
                for group in self.param_groups:
                    for parameter in group["params"]:
                        parameter.mul_(factor)  # a power of two: exact


def test_a_schedule_free_optimizer_is_in_training_mode_in_both_passes(tmp_path: Path) -> None:
    def train(parts: int, **settings: Any) -> Run:
        model = build_model(FLOAT)
        optimizer = ScheduleFreeLike(model.parameters())
        more = {"optimizers": (optimizer, None), "eval_dataset": build_data(8, dtype=FLOAT)}
        data = build_data(64, dtype=FLOAT)
        found = split(tmp_path, parts, model, data, trainer_arguments=more, **settings)
        optimizer.train()
        return found

    expected = train(1)
    found = train(4, eval_strategy="steps", eval_steps=1)
    assert len([entry for entry in found.trainer.state.log_history if "eval_loss" in entry]) == 4
    assert_same_training(found, expected)


class EvaluatesWithinTheWindow(TrainerCallback):
    """Evaluates after each micro-batch but the last."""

    trainer: BilevelMTLTrainer

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.evaluate()


@pytest.mark.parametrize("where", ["between", "within"])
def test_evaluation_changes_nothing(where: str, tmp_path: Path) -> None:
    def train(evaluating: bool) -> Run:
        callback = EvaluatesWithinTheWindow()
        settings: dict[str, Any] = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
        if evaluating and where == "between":
            settings.update(eval_strategy="steps", eval_steps=1, eval_on_start=True)
        trainer = BilevelMTLTrainer(
            # Between updates Trainer's data loader draws a seed; within a window both passes draw what they draw.
            model=build(NormalisedModel, dropout=0.2 if where == "within" else 0.0),
            args=arguments(tmp_path, balance_over="window", balancer=BALANCERS["qm9"], **ADAM, **settings),
            train_dataset=build_data(64, dtype=FLOAT),
            eval_dataset=build_data(8, dtype=FLOAT),
            callbacks=[callback] if evaluating and where == "within" else None,
        )
        callback.trainer = trainer
        trainer.train()
        return Run(trainer, None)  # type: ignore[arg-type]

    plain, evaluated = train(False), train(True)
    assert any("eval_loss" in entry for entry in evaluated.trainer.state.log_history)
    assert torch.equal(plain.parameters, evaluated.parameters)
    assert untimed(plain.steps) == untimed(evaluated.steps)
    ours, theirs = plain.trainer.balancer.state_dict(), evaluated.trainer.balancer.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


# --- losses that are not finite -----------------------------------------------------------------------------------


def poisoned(*without: int, at: int | None = None) -> SyntheticData:
    """Six micro-batches of four; one label of number `at` is infinite."""
    full = build_data(24, dtype=FLOAT)
    if at is not None:
        full.labels.view(6, 4, -1)[at, 1, 2] = torch.inf
    kept = torch.tensor([row for row in range(24) if row // 4 not in without])
    return SyntheticData(full.features[kept], full.labels[kept])


@pytest.mark.parametrize("at", [2, 3])
def test_raise_names_task_step_and_value(at: int, tmp_path: Path) -> None:
    model = build(NormalisedModel)
    message = r"^the loss of task 'gamma' is inf at step 2; fix the data or the model, or set nonfinite_loss: skip$"
    with pytest.raises(NonFiniteLossError, match=message):
        split(tmp_path, 2, model, poisoned(at=at), 8)
    before = split(tmp_path, 2, build(NormalisedModel), poisoned(2, 3, 4, 5), 8)
    assert torch.equal(flat_parameters(model), before.parameters)


@pytest.mark.parametrize("at", [2, 3])
def test_skip_drops_the_window(at: int, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"nonfinite_loss": "skip", "balancer": BALANCERS["qm9"]}
    found = split(tmp_path, 2, build(NormalisedModel), poisoned(at=at), 8, **settings)
    expected = split(tmp_path, 2, build(NormalisedModel), poisoned(2, 3), 8, **settings)
    assert found.trainer.state.global_step == 3 and expected.trainer.state.global_step == 2
    assert found.steps[-1]["dropped_steps/gamma"] == 1.0
    for ours, theirs in (
        (found.trainer.model.state_dict(), expected.trainer.model.state_dict()),
        (found.trainer.balancer.state_dict(), expected.trainer.balancer.state_dict()),
    ):
        assert ours.keys() == theirs.keys()
        assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []
    kept = [
        {k: v for k, v in entry.items() if k not in ("step", "epoch", "dropped_steps/gamma")} for entry in found.steps
    ]
    assert [kept[0], kept[2]] == [
        {k: v for k, v in entry.items() if k not in ("step", "epoch")} for entry in expected.steps
    ]


def test_a_wrong_output_is_said_before_any_gradient(tmp_path: Path) -> None:
    model = build_model(FLOAT)
    with pytest.raises(TaskLossError, match=r"^losses: got shape \(3,\), expected a tensor \[4\]"):
        split(tmp_path, 4, model, trainer_arguments={"task_loss_func": lambda outputs, batch: outputs.losses[:3]})
    assert all(parameter.grad is None for parameter in model.parameters())


# --- one task -----------------------------------------------------------------------------------------------------


class NormalisedOrdinary(nn.Module):
    """A model as anybody writes it, with dropout and BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(ordinary(), nn.Identity())
        self.norm = nn.BatchNorm1d(6)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Any:
        return self.inner[0](self.norm(features), labels)


def test_an_ordinary_model_with_one_task_trains_as_with_trainer(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    rows = [
        {"features": torch.randn(6, generator=generator), "labels": torch.randint(0, 3, (), generator=generator)}
        for _ in range(30)
    ]
    settings = plain_settings(tmp_path, optim="adamw_torch", gradient_accumulation_steps=3, num_train_epochs=2)
    from transformers import TrainingArguments

    torch.manual_seed(0)
    plain = Trainer(model=NormalisedOrdinary(), args=TrainingArguments(**settings), train_dataset=rows)
    plain.train()
    torch.manual_seed(0)
    ours = BilevelMTLTrainer(
        model=NormalisedOrdinary(), args=arguments(tmp_path, **settings, balance_over="window"), train_dataset=rows
    )
    ours.train()
    assert all(torch.equal(value, plain.model.state_dict()[key]) for key, value in ours.model.state_dict().items())
    assert untimed(ours.state.log_history) == untimed(plain.state.log_history)


def test_one_task_that_returns_losses(tmp_path: Path) -> None:
    data = build_data(64, num_tasks=1, dtype=FLOAT, missing=0.3)
    settings: dict[str, Any] = {"balancer": {**BILB, "normalization": "initial"}}
    expected = split(tmp_path, 1, build_model(FLOAT, task_names=["only"], dropout=0.0), data, **settings)
    found = split(tmp_path, 4, build_model(FLOAT, task_names=["only"], dropout=0.0), data, **settings)
    assert_same_training(found, expected)


# --- a trainer of one's own ---------------------------------------------------------------------------------------


class OwnSamples(BilevelMTLTrainer):
    """Takes its micro-batches as it likes, without asking `get_batch_samples` of the base class."""

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], None]:
        return [next(epoch_iterator) for _ in range(num_batches)], None


def test_a_subclass_with_its_own_batches_still_balances_every_update(tmp_path: Path) -> None:
    trainers = []
    for cls in (BilevelMTLTrainer, OwnSamples):
        trainer = cls(
            model=build_model(FLOAT),
            args=arguments(tmp_path, balancer=BILB, balancer_warmup_steps=1),
            train_dataset=build_data(20, dtype=FLOAT),
        )
        trainer.train()
        trainers.append(trainer)
    assert torch.equal(*(flat_parameters(trainer.model) for trainer in trainers))
    ours, theirs = (trainer.balancer.state_dict() for trainer in trainers)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert untimed(trainers[0].state.log_history) == untimed(trainers[1].state.log_history)


def test_a_loss_asked_for_after_training_is_a_batch_of_its_own(tmp_path: Path) -> None:
    for balance_over in ("window", "micro_batch"):
        trainer = split(tmp_path, 4, data=build_data(64, dtype=FLOAT), balance_over=balance_over, balancer="ls").trainer
        batch = batches(build_data(8, dtype=FLOAT), 8)[0]
        loss = trainer.compute_loss(trainer.model.train(), dict(batch))
        expected = (trainer.model(batch["features"]).logits - batch["labels"]).square().mean(0).sum()
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
