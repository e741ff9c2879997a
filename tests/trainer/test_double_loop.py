"""The double loop of BiLB4MTL in the Trainer: z, its descent on the update's own batch, its place in checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call
from transformers import Trainer, TrainerCallback

from hf_bilb import BilevelMTLTrainer, OptionError, build_balancer
from hf_bilb.engine.replay import RandomState
from hf_bilb.errors import NonFiniteLossError
from hf_bilb.losses.contract import TaskLosses
from hf_bilb.trainer.checkpointing import TENSORS
from tests.synthetic import SyntheticData, build_data
from tests.trainer.harness import (
    BATCH,
    FLOAT,
    TASK_NAMES,
    arguments,
    batches,
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
from tests.trainer.test_single_task import feature_rows, ordinary
from tests.trainer.test_window import ADAM, Passes, assert_same_training, random_states, split

INNER: dict[str, Any] = {"inner_steps": 2, "inner_learning_rate": 0.05, "penalty_weight": 1.5}
DOUBLE: dict[str, Any] = {"name": "bilb", "learning_rate": 0.1, "lower_level": INNER}
SINGLE: dict[str, Any] = {"name": "bilb", "learning_rate": 0.1}
STEPS = 6


def data(missing: float = 0.3) -> SyntheticData:
    return build_data(STEPS * BATCH, dtype=FLOAT, missing=missing)


def z_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = "lower_level.z."
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# --- the same as by hand ------------------------------------------------------------------------------------------


def algorithm_2(model: nn.Module, rows: SyntheticData, steps: int, beta: float, weight: float) -> dict[str, Any]:
    """The paper's penalty form in plain torch: adjacent pairs, weights sigmoid(w), g = sum sigma l, SGD for both."""
    x = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    z = {name: value.clone() for name, value in x.items()}
    w = torch.ones(4, dtype=FLOAT)

    def losses(at: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        logits = functional_call(model, at, (batch["features"],)).logits
        return (logits - batch["labels"]).square().mean(0)

    def lower(logits: Tensor, values: Tensor) -> Tensor:
        return (torch.sigmoid(logits) * values).sum()

    def upper(logits: Tensor, values: Tensor) -> Tensor:
        weighted = torch.sigmoid(logits) * values
        return (weighted[:-1] - weighted[1:]).abs().sum()

    for batch in batches(rows):
        for _ in range(steps):
            point = {name: value.clone().requires_grad_() for name, value in z.items()}
            gradients = torch.autograd.grad(lower(w, losses(point, batch)), list(point.values()))
            z = {name: z[name] - beta * gradient for name, gradient in zip(z, gradients, strict=True)}
        point = {name: value.clone().requires_grad_() for name, value in x.items()}
        logits = w.clone().requires_grad_()
        at_x, at_z = losses(point, batch), losses(z, batch)
        total = 1.5 * (lower(logits, at_x) - lower(logits, at_z)) + weight * upper(logits, at_x)
        gradients = torch.autograd.grad(total, [*point.values(), logits])
        x = {name: x[name] - 0.05 * gradient for name, gradient in zip(x, gradients, strict=False)}
        w = w - 0.1 * gradients[-1]
    return {"x": torch.cat([value.flatten() for value in x.values()]), "z": z, "w": w}


def test_against_algorithm_2_in_plain_torch(tmp_path: Path) -> None:
    expected = algorithm_2(build_model(FLOAT), data(0.0), 2, 0.05, 0.3)
    balancer = {
        **DOUBLE, "optimizer": "sgd", "normalization": "none", "pairs": "adjacent", "weight_denominator": "none",
        "discrepancy_weight": 0.3,
    }  # fmt: skip
    found = run(tmp_path, data=data(0.0), balancer=balancer)
    state = found.trainer.balancer.state_dict()
    assert close(found.parameters, expected["x"])
    assert close(state["objective.router.logits"], expected["w"])
    z = z_of(state)
    assert z.keys() == expected["z"].keys()
    assert all(close(z[name], expected["z"][name]) for name in z)
    assert not close(z["heads.weight"], dict(found.trainer.model.named_parameters())["heads.weight"].detach(), 1e-3)


def own_loop(model: nn.Module, rows: SyntheticData, size: int = BATCH, **options: Any) -> Any:
    """A loop of one's own around the balancer, with the same dropout masks in every pass."""
    balancer = build_balancer(DOUBLE, task_names=TASK_NAMES, dtype=FLOAT, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=ADAM["learning_rate"], weight_decay=0.0)
    balancer.bind(model, optimizer)
    balancer.on_epoch_begin(0)
    torch.manual_seed(3)
    for batch in batches(rows, size):
        before = RandomState.capture(torch.device("cpu"))

        def again(batch: Any = batch, before: RandomState = before) -> TaskLosses:
            now = RandomState.capture(torch.device("cpu"))
            before.restore()
            outputs = model(**batch)
            now.restore()
            return TaskLosses(outputs.losses, outputs.num_items)

        optimizer.zero_grad()
        outputs = model(**batch)
        balancer.backward(outputs.losses, outputs.num_items)
        optimizer.step()
        balancer.step(reevaluate=again)
    return balancer


def test_as_a_loop_of_ones_own(tmp_path: Path) -> None:
    model = build_model(FLOAT)
    balancer = own_loop(model, data())
    found = run(tmp_path, data=data(), balancer=DOUBLE, **ADAM)
    assert torch.equal(found.parameters, flat_parameters(model))
    ours, theirs = found.trainer.balancer.state_dict(), balancer.state_dict()
    assert same(ours, theirs) and len(z_of(ours)) == 6


def test_with_dropout_as_a_loop_of_ones_own(tmp_path: Path) -> None:
    # Trainer's loader draws before the first batch; drawn here, too.
    class Seeded(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
            if state.global_step == 0:
                torch.manual_seed(3)

    model = build_model(FLOAT, dropout=0.3).train()
    balancer = own_loop(model, data())
    settings: dict[str, Any] = {"trainer_arguments": {"callbacks": [Seeded()]}, "balancer": DOUBLE, **ADAM}
    found = run(tmp_path, build_model(FLOAT, dropout=0.3), data(), **settings)
    assert torch.equal(found.parameters, flat_parameters(model))
    assert same(found.trainer.balancer.state_dict(), balancer.state_dict())


@pytest.mark.parametrize("kind", ["parameter", "features"])
def test_over_a_window_as_one_batch(kind: str, tmp_path: Path) -> None:
    def model() -> nn.Module:
        return build_model(FLOAT) if kind == "parameter" else build(FeatureModel, num_router_features=8)

    balancer = {**DOUBLE, "router": kind, "initial_logits": 1.0 if kind == "parameter" else None}
    rows = build_data(54, dtype=FLOAT, missing=0.3)
    expected = split(tmp_path, 1, model(), rows, balancer=balancer)
    assert expected.trainer.state.global_step == 4
    for parts in (2, 4):
        # `assert_same_training` compares z, too: it is in the balancer's state.
        assert_same_training(split(tmp_path, parts, model(), rows, balancer=balancer), expected)
    single = {key: value for key, value in balancer.items() if key != "lower_level"}
    assert not close(split(tmp_path, 1, model(), rows, balancer=single).parameters, expected.parameters, 1e-6)


# --- the passes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "expected"),
    # Forward passes with gradients, without, and `accelerator.backward`: N = 2 descents, one look at z_N.
    [(1, (3, 1, 1)), (4, (4 + 2 * 4, 4 + 2 * 4 + 4, 4))],
)
def test_passes(parts: int, expected: tuple[int, int, int], tmp_path: Path) -> None:
    passes = Passes()
    trainer = BilevelMTLTrainer(
        model=build_model(FLOAT),
        args=arguments(
            tmp_path,
            balance_over="window",
            balancer=DOUBLE,
            per_device_train_batch_size=16 // parts,
            gradient_accumulation_steps=parts,
            balancer_warmup_steps=1,
            balancer_freeze_after=3,
        ),
        train_dataset=build_data(80, dtype=FLOAT),
        callbacks=[passes],
    )
    passes.watch(trainer)
    trainer.train()
    plain = (parts, 0 if parts == 1 else parts, parts)
    assert passes.counts == [plain, expected, expected, plain, plain]


def test_every_pass_has_the_dropout_masks_of_its_micro_batch(tmp_path: Path) -> None:
    model = build_model(FLOAT, dropout=0.5)
    seen: list[tuple[bool, Tensor]] = []
    model.register_forward_hook(lambda *a: seen.append((torch.is_grad_enabled(), a[2].losses.detach().clone())))
    split(tmp_path, 4, model, build_data(16, dtype=FLOAT), balancer=DOUBLE, learning_rate=0.0)
    # Pass 1, the pass that counts, and the two passes of the first descent, where z is still x.
    first, again, at_z, with_gradients = (seen[i : i + 4] for i in range(0, 16, 4))
    assert [grad for grad, _ in first + again + at_z + with_gradients] == [False] * 4 + [True] * 4 + [False] * 4 + [
        True
    ] * 4
    for other in (again, at_z, with_gradients):
        assert all(torch.equal(one, two) for (_, one), (_, two) in zip(first, other, strict=True))
    assert not torch.equal(first[0][1], seen[16][1]), "z has moved"


class NoisyNormalisedModel(NoisyModel, NormalisedModel):
    """BatchNorm, and draws from every generator."""


def test_the_inner_loop_leaves_no_trace(tmp_path: Path) -> None:
    # With a model at a standstill only the forward passes could change buffers and random numbers.
    states = []

    class RandomStates(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            states.append(random_states())

    found = []
    for balancer in (SINGLE, DOUBLE):
        given: dict[str, Any] = {"trainer_arguments": {"callbacks": [RandomStates()]}, "learning_rate": 0.0}
        found.append(run(tmp_path, build(NoisyNormalisedModel, dropout=0.3), data(), balancer=balancer, **given))
    assert same(*(dict(result.trainer.model.state_dict()) for result in found))
    assert states[:STEPS] == states[STEPS:]
    assert all(before != after for before, after in zip(states[0], states[1], strict=True))
    assert not same(*(z_of(result.trainer.balancer.state_dict()) or {"": torch.ones(1)} for result in found))
    assert all(parameter.requires_grad for parameter in found[1].trainer.model.parameters())


def test_clipping_is_the_models_alone(tmp_path: Path) -> None:
    found = [run(tmp_path, data=data(), balancer=DOUBLE, learning_rate=0.0, max_grad_norm=n) for n in (0.0, 1e-3)]
    assert same(*(result.trainer.balancer.state_dict() for result in found))


def test_evaluation_changes_nothing(tmp_path: Path) -> None:
    plain = run(tmp_path, data=data(), balancer=DOUBLE)
    more = {"eval_dataset": build_data(8, dtype=FLOAT)}
    found = run(tmp_path, data=data(), balancer=DOUBLE, trainer_arguments=more, eval_strategy="steps", eval_steps=1)
    assert torch.equal(plain.parameters, found.parameters)
    assert same(plain.trainer.balancer.state_dict(), found.trainer.balancer.state_dict())


def test_losses_from_a_function_and_auxiliary_ones(tmp_path: Path) -> None:
    def as_dict(outputs: Any, batch: Any) -> Any:
        losses = dict(zip(TASK_NAMES, outputs.losses.unbind(), strict=True))
        return losses, dict(zip(TASK_NAMES, outputs.num_items.unbind(), strict=True))

    expected = run(tmp_path, build_model(FLOAT, auxiliary_weight=0.3), data(), balancer=DOUBLE)
    given: dict[str, Any] = {"trainer_arguments": {"task_loss_func": as_dict}}
    found = run(tmp_path, build_model(FLOAT, auxiliary_weight=0.3), data(), balancer=DOUBLE, **given)
    assert torch.equal(found.parameters, expected.parameters)
    assert same(found.trainer.balancer.state_dict(), expected.trainer.balancer.state_dict())


# --- phases, dropped updates, divergence --------------------------------------------------------------------------


def test_z_starts_where_balancing_begins(tmp_path: Path) -> None:
    found = run(tmp_path, data=data(), balancer=DOUBLE, balancer_warmup_steps=3)
    model = build_model(FLOAT)
    torch.nn.utils.vector_to_parameters(found.record.parameters[2], model.parameters())
    rows = data()
    rest = run(tmp_path, model, SyntheticData(rows.features[3 * BATCH :], rows.labels[3 * BATCH :]), balancer=DOUBLE)
    assert torch.equal(found.parameters, rest.parameters)
    assert same(found.trainer.balancer.state_dict(), rest.trainer.balancer.state_dict())


def test_frozen_z_stays(tmp_path: Path) -> None:
    states = []

    class States(TrainerCallback):
        def on_step_end(self, *args: Any, balancer: Any, **kwargs: Any) -> None:
            states.append(z_of(balancer.state_dict()))

    run(tmp_path, data=data(), balancer=DOUBLE, balancer_freeze_after=3, trainer_arguments={"callbacks": [States()]})
    assert not same(states[1], states[2])
    assert all(same(states[2], later) for later in states[3:])


def test_a_dropped_update_leaves_z_alone(tmp_path: Path) -> None:
    rows = data(0.0)
    rows.labels[3 * BATCH, 1] = torch.inf
    kept = torch.tensor([row for row in range(STEPS * BATCH) if row // BATCH != 3])
    settings: dict[str, Any] = {"balancer": DOUBLE, "nonfinite_loss": "skip"}
    found = run(tmp_path, build(NormalisedModel), rows, **settings)
    expected = run(tmp_path, build(NormalisedModel), SyntheticData(rows.features[kept], rows.labels[kept]), **settings)
    assert found.trainer.state.global_step == STEPS and found.steps[-1]["dropped_steps/beta"] == 1
    assert same(found.trainer.balancer.state_dict(), expected.trainer.balancer.state_dict())
    assert same(dict(found.trainer.model.state_dict()), dict(expected.trainer.model.state_dict()))


def test_a_z_that_diverges_is_one_line(tmp_path: Path) -> None:
    balancer = {**DOUBLE, "lower_level": {"inner_steps": 5, "inner_learning_rate": 1e200}}
    model = build_model(FLOAT)
    with pytest.raises(
        NonFiniteLossError, match=r"^step 1: lower level: .*task '\w+' is .* at z.*inner_learning_rate"
    ) as caught:
        run(tmp_path, model, data(), balancer=balancer)
    assert "\n" not in str(caught.value) and flat_parameters(model).isfinite().all()


# --- checkpoints --------------------------------------------------------------------------------------------------


def test_z_is_in_the_checkpoint_and_not_in_the_model(tmp_path: Path) -> None:
    found = run(tmp_path, data=data(), balancer=DOUBLE, save_strategy="steps", save_steps=3)
    saved = load_file(tmp_path / "checkpoint-6" / TENSORS)
    assert same(saved, found.trainer.balancer.state_dict()) and bool(saved["lower_level.started"])
    names = {name for name, _ in build_model(FLOAT).named_parameters()}
    assert z_of(saved).keys() == names == set(found.trainer.model.state_dict())
    assert load_file(tmp_path / "checkpoint-6" / "model.safetensors").keys() == names


@pytest.mark.parametrize(("at", "built_anew"), [(2, False), (4, False), (4, True)])
def test_resumed_bit_for_bit(at: int, built_anew: bool, tmp_path: Path) -> None:
    # Balancing begins in update 4: resumed before it and after it.
    settings: dict[str, Any] = {
        **ADAM, "balancer": DOUBLE, "save_strategy": "steps", "save_steps": 2, "balancer_warmup_steps": 3,
        "gradient_accumulation_steps": 2, "balance_over": "window", "num_train_epochs": 2,
    }  # fmt: skip
    whole = run(tmp_path, build_model(FLOAT, dropout=0.3), data(), **settings)

    def other_model() -> nn.Module:
        return build_model(FLOAT, dropout=0.3, seed=9)

    model = {"model_init": other_model} if built_anew else {"model": other_model()}
    resumed = BilevelMTLTrainer(args=arguments(tmp_path, **settings), train_dataset=data(), **model)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    assert torch.equal(flat_parameters(resumed.model), whole.parameters)
    assert same(resumed.balancer.state_dict(), whole.trainer.balancer.state_dict())
    assert untimed([e for e in resumed.state.log_history if "loss" in e]) == untimed(whole.steps)


def test_load_best_model_at_end_brings_its_z(tmp_path: Path) -> None:
    more = {"eval_dataset": build_data(8, dtype=FLOAT, seed=8)}
    settings: dict[str, Any] = {
        "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "learning_rate": 0.3,
        "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True,
    }  # fmt: skip
    found = run(tmp_path, data=data(), balancer=DOUBLE, trainer_arguments=more, **settings)
    # The one with the largest loss: none of the last.
    best = Path(found.trainer.state.best_model_checkpoint)
    assert best.name != f"checkpoint-{STEPS}"
    assert same(found.trainer.balancer.state_dict(), load_file(best / TENSORS))
    assert not same(z_of(load_file(best / TENSORS)), z_of(load_file(tmp_path / f"checkpoint-{STEPS}" / TENSORS)))


def test_another_runs_z_belongs_to_another_model(tmp_path: Path) -> None:
    run(tmp_path / "source", data=data(), balancer=DOUBLE, save_strategy="epoch")
    args = arguments(tmp_path, balancer=DOUBLE, balancer_init_from=str(tmp_path / "source"))
    trainer = BilevelMTLTrainer(model=build_model(FLOAT, seed=5), args=args, train_dataset=data())
    begins = []

    class AtFirstStep(TrainerCallback):
        def on_train_begin(self, *args: Any, balancer: Any, **kwargs: Any) -> None:
            begins.append(balancer.state_dict())

    trainer.add_callback(AtFirstStep())
    trainer.train()
    saved = load_file(tmp_path / "source" / f"checkpoint-{STEPS}" / TENSORS)
    assert torch.equal(begins[0]["objective.router.logits"], saved["objective.router.logits"])
    assert not bool(begins[0]["lower_level.started"])
    start = dict(build_model(FLOAT, seed=5).named_parameters())
    assert all(torch.equal(value, start[name]) for name, value in z_of(begins[0]).items())


def test_a_single_loops_balancer_serves_a_double_loop_to_begin_with(tmp_path: Path) -> None:
    run(tmp_path / "source", data=data(), balancer=SINGLE, save_strategy="epoch")
    found = run(tmp_path, data=data(), balancer=DOUBLE, balancer_init_from=str(tmp_path / "source"))
    assert z_of(found.trainer.balancer.state_dict())


# --- adapters, one task -------------------------------------------------------------------------------------------


def test_frozen_parameters_have_no_z(tmp_path: Path) -> None:
    model = build_model(FLOAT)
    model.trunk[0].requires_grad_(False)
    found = run(tmp_path, model, data(), balancer=DOUBLE)
    names = set(z_of(found.trainer.balancer.state_dict()))
    assert names == {name for name, _ in model.named_parameters() if not name.startswith("trunk.0.")}
    assert torch.equal(model.trunk[0].weight, build_model(FLOAT).trunk[0].weight)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_with_lora_z_holds_adapters_and_heads_alone(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(bert(), LoraConfig(r=2, target_modules=["query"], modules_to_save=["heads"]))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    settings: dict[str, Any] = {"balancer": DOUBLE, "learning_rate": 0.1, "save_strategy": "epoch"}
    found = run(tmp_path, model, bert_rows(), **settings)
    z = z_of(found.trainer.balancer.state_dict())
    assert z.keys() == trainable and all("lora_" in name or "heads" in name for name in z)
    assert any(not torch.equal(value, dict(model.named_parameters())[name]) for name, value in z.items())
    assert z_of(load_file(tmp_path / "checkpoint-3" / TENSORS)).keys() == trainable


def test_an_ordinary_model_with_one_task_trains_as_with_trainer(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    results = []
    for cls, args in (
        (Trainer, TrainingArguments(**plain_settings(tmp_path))),
        (BilevelMTLTrainer, arguments(tmp_path, balancer=DOUBLE)),
    ):
        trainer = cls(model=ordinary(), args=args, train_dataset=feature_rows())
        trainer.train()
        results.append(trainer)
    assert torch.equal(*(flat_parameters(trainer.model) for trainer in results))
    assert untimed(results[0].state.log_history) == untimed(results[1].state.log_history)


def test_a_second_train_and_a_model_built_anew(tmp_path: Path) -> None:
    trainer = BilevelMTLTrainer(
        model_init=lambda: build_model(FLOAT), args=arguments(tmp_path, balancer=DOUBLE), train_dataset=data()
    )
    found = []
    for _ in range(2):
        trainer.train()
        found.append(trainer.balancer.state_dict())
    assert same(*found)
    assert same(found[0], run(tmp_path, data=data(), balancer=DOUBLE).trainer.balancer.state_dict())


# --- refusals -----------------------------------------------------------------------------------------------------


def with_plugin(kind: str) -> Callable[[Any], None]:
    def enable(monkeypatch: pytest.MonkeyPatch) -> None:
        # Neither can be switched on without its launcher.
        original = Trainer.create_accelerator_and_postprocess

        def patched(self: Trainer) -> None:
            original(self)
            setattr(self, f"is_{kind}_enabled", True)

        monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", patched)

    return enable


REFUSED: list[Any] = [
    pytest.param({"fp16": True}, None, "the gradients of the inner loop are not scaled for fp16, use bf16 or float32"),
    pytest.param({}, with_plugin("fsdp"), "an inner loop over z is not valid with FSDP, which shards the parameters"),
    pytest.param(
        {}, with_plugin("deepspeed"), "an inner loop over z is not valid with DeepSpeed, which shards the parameters"
    ),
    pytest.param(
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
        None,
        "an inner loop over z is not valid with use_reentrant: true, expected false",
    ),
]


@pytest.mark.parametrize(
    ("key", "options"),
    [("balancer.lower_level", {"balancer": DOUBLE}), ("diagnostics", {"balancer": "bilb", "diagnostics": {}})],
)
@pytest.mark.parametrize(("settings", "enable", "message"), REFUSED, ids=["fp16", "fsdp", "deepspeed", "reentrant"])
def test_refused_when_the_trainer_is_built(
    key: str, options: Any, settings: Any, enable: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments(tmp_path, **options, **settings)
    if enable is not None:
        enable(monkeypatch)
    with pytest.raises(OptionError) as caught:
        BilevelMTLTrainer(model=bert(), args=args)
    assert str(caught.value) == f"{key}: {message}"


def test_micro_batches_are_refused(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"balancer": DOUBLE, "gradient_accumulation_steps": 2}
    message = r"^balance_over: 'micro_batch' is not valid with a double loop under gradient accumulation, use 'window'$"
    with pytest.raises(OptionError, match=message):
        BilevelMTLTrainer(model=build_model(FLOAT), args=arguments(tmp_path, **settings))
    # N = 0 is the single loop.
    single = {**DOUBLE, "lower_level": {**INNER, "inner_steps": 0}}
    BilevelMTLTrainer(model=build_model(FLOAT), args=arguments(tmp_path, **{**settings, "balancer": single}))


def test_activation_checkpointing_without_reentry_is_the_same_training(tmp_path: Path) -> None:
    plain = run(tmp_path, bert(), bert_rows(), balancer=DOUBLE)
    again = run(tmp_path, bert(), bert_rows(), balancer=DOUBLE, activation_checkpointing=True)
    assert torch.equal(plain.parameters, again.parameters)
    assert same(plain.trainer.balancer.state_dict(), again.trainer.balancer.state_dict())


def test_autocast(tmp_path: Path) -> None:
    # Every pass over z runs in bf16 as the others do: at a standstill, where z starts at x, the losses are the same.
    model = build_model()
    seen: list[Tensor] = []
    model.register_forward_hook(lambda *a: seen.append(a[2].losses.detach().clone()))
    run(tmp_path, model, build_data(BATCH), balancer=DOUBLE, learning_rate=0.0, bf16=True)
    assert torch.equal(seen[0], seen[1])
    full = build_model()(**batches(build_data(BATCH))[0]).losses
    assert not torch.equal(seen[0], full) and torch.allclose(seen[0], full, rtol=0.05)
