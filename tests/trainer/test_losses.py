"""The contract of losses through the Trainer: forms, counts, partial labels, absent tasks, auxiliary loss, priors."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_bilb import BilevelMTLTrainer, build_balancer
from hf_bilb.errors import TaskLossError
from hf_bilb.losses.masked import masked_mse
from tests.synthetic import SyntheticData
from tests.trainer.harness import (
    BATCH,
    FLOAT,
    TASK_NAMES,
    arguments,
    batches,
    build_data,
    build_model,
    by_hand,
    close,
    flat_parameters,
    run,
    with_balancer,
)

METHODS = ["ls", "si", "uw", "bilb"]


class LogitsModel(nn.Module):
    """A model that knows nothing of tasks: features in, predictions out."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build_model(FLOAT)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        return {"logits": self.inner(features).logits}


def as_tensor(outputs: Any, batch: Any) -> Tensor:
    return (outputs["logits"] - batch["labels"]).square().mean(0)


def as_tensor_with_counts(outputs: Any, batch: Any) -> tuple[Tensor, Tensor]:
    return masked_mse(outputs["logits"], batch["labels"])


def as_dict(outputs: Any, batch: Any) -> dict[str, Tensor]:
    return dict(zip(TASK_NAMES, as_tensor(outputs, batch).unbind(), strict=True))


def as_dict_with_counts(outputs: Any, batch: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    losses, counts = as_tensor_with_counts(outputs, batch)
    # In another order than the tasks'.
    names = list(reversed(TASK_NAMES))
    return dict(zip(names, losses.flip(0).unbind(), strict=True)), dict(
        zip(names, counts.flip(0).tolist(), strict=True)
    )


@pytest.mark.parametrize("form", [as_tensor, as_tensor_with_counts, as_dict, as_dict_with_counts])
@pytest.mark.parametrize("name", ["si", "bilb"])
def test_every_form_of_losses_trains_alike(name: str, form: Any, tmp_path: Path) -> None:
    expected = run(tmp_path, balancer=name)
    model = LogitsModel()
    settings: dict[str, Any] = {"task_names": TASK_NAMES, "label_names": ["labels"], "balancer": name}
    found = run(tmp_path, model, trainer_arguments={"task_loss_func": form}, **settings)
    assert torch.equal(flat_parameters(model.inner), expected.parameters)
    assert found.steps == expected.steps


@pytest.mark.parametrize("name", METHODS)
def test_as_a_loop_of_ones_own(name: str, tmp_path: Path) -> None:
    data = build_data(6 * BATCH, dtype=FLOAT, missing=0.4)
    found = run(tmp_path, data=data, balancer=name)
    model = build_model(FLOAT)
    coefficients = with_balancer(model, data, build_balancer(name, task_names=TASK_NAMES, dtype=FLOAT))
    assert found.trainer.state.global_step == 6
    assert torch.equal(torch.stack(found.record.coefficients), torch.stack(coefficients))
    assert torch.equal(found.parameters, flat_parameters(model))


def test_ls_and_si_against_their_formulas(tmp_path: Path) -> None:
    data = build_data(6 * BATCH, dtype=FLOAT, missing=0.4)

    def linear(losses: Tensor, num_items: Tensor, step: int) -> Tensor:
        return losses.sum()

    def logarithms(losses: Tensor, num_items: Tensor, step: int) -> Tensor:
        return losses[num_items > 0].log().sum()

    for name, objective in (("ls", linear), ("si", logarithms)):
        model = build_model(FLOAT)
        values = by_hand(model, data, objective)
        found = run(tmp_path, data=data, balancer=name)
        assert close(found.parameters, flat_parameters(model))
        assert found.logged("loss") == pytest.approx(values, rel=1e-12)


# --- absent tasks -------------------------------------------------------------------------------------------------


def gaps() -> SyntheticData:
    """Eight batches: task 1 is missing in batch 3, task 3 until batch 5, and batch 6 has no label at all."""
    data = build_data(8 * BATCH, dtype=FLOAT, missing=0.2)
    labels = data.labels.view(8, BATCH, -1)
    labels[3, :, 1] = torch.nan
    labels[:5, :, 3] = torch.nan
    labels[6] = torch.nan
    present = labels.isfinite().any(dim=1)
    assert present.sum() == 8 * 4 - 1 - 5 - 4
    return data


def held_ratio(absent_tasks: str) -> Any:
    """F = (sum_k l_k / l0_k)^(1/2) by hand: nonlinear, so that absent tasks matter."""
    references: dict[int, float] = {}
    last: dict[int, float] = {}

    def objective(losses: Tensor, num_items: Tensor, step: int) -> Tensor:
        total = losses.new_zeros(()) + 0 * losses.sum()
        for k, (loss, count) in enumerate(zip(losses, num_items, strict=True)):
            if count > 0:
                references.setdefault(k, float(loss.detach()))
                last[k] = float(loss.detach())
                total = total + loss / references[k]
            elif absent_tasks == "hold" and k in last:
                total = total + last[k] / references[k]
        return total.sqrt() if total > 0 else total

    return objective


@pytest.fixture
def root_balancer() -> Any:
    """A registered method F = sqrt(sum of the losses)."""
    from hf_bilb import register_balancer
    from hf_bilb.balancers import BalancerOptions, registry
    from hf_bilb.engine.objective import Objective, ObjectiveValue

    class Root(Objective):
        def __init__(self, num_tasks: int, options: BalancerOptions) -> None:
            super().__init__()

        def forward(self, losses: Tensor, active: Tensor, features: Tensor | None) -> ObjectiveValue:
            total = torch.where(active, losses, 0.0).sum()
            return ObjectiveValue(torch.where(active.any(), total, 1.0).sqrt() * active.any())

    register_balancer("root", options=BalancerOptions, paper="a test")(Root)
    yield {"name": "root", "normalization": "initial"}
    del registry._REGISTRY["root"]


@pytest.mark.parametrize("absent_tasks", ["skip", "hold"])
def test_absent_in_a_step_and_from_the_start_until_late(
    absent_tasks: str, root_balancer: dict[str, Any], tmp_path: Path
) -> None:
    data = gaps()
    found = run(tmp_path, data=data, balancer=root_balancer, absent_tasks=absent_tasks)
    model = build_model(FLOAT)
    values = by_hand(model, data, held_ratio(absent_tasks))
    assert close(found.parameters, flat_parameters(model))
    if absent_tasks == "hold":
        # Without a label there is still a value, but nothing to descend.
        assert torch.equal(found.record.parameters[6], found.record.parameters[5])
    # A step without any task has no F of its own to log.
    kept = [t for t in range(8) if t != 6]
    assert [found.logged("loss")[t] for t in kept] == pytest.approx([values[t] for t in kept], rel=1e-12)
    assert [entry is None for entry in found.logged("loss/beta")] == [t in (3, 6) for t in range(8)]
    assert [entry is None for entry in found.logged("coefficient/delta")] == [t < 5 or t == 6 for t in range(8)]
    coefficients = torch.stack(found.record.coefficients)
    assert (coefficients[:, 3] == 0).tolist() == [t < 5 or t == 6 for t in range(8)]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("absent_tasks", ["skip", "hold"])
def test_every_method_with_absent_tasks_as_a_loop_of_ones_own(name: str, absent_tasks: Any, tmp_path: Path) -> None:
    data = gaps()
    found = run(tmp_path, data=data, balancer=name, absent_tasks=absent_tasks)
    model = build_model(FLOAT)
    balancer = build_balancer(name, task_names=TASK_NAMES, dtype=FLOAT, absent_tasks=absent_tasks)
    with_balancer(model, data, balancer)
    assert torch.equal(found.parameters, flat_parameters(model)) and found.parameters.isfinite().all()
    ours, theirs = found.trainer.balancer.state_dict(), balancer.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_task_that_is_no_key_of_the_dict_is_absent(tmp_path: Path) -> None:
    def one_task_per_batch(outputs: Any, batch: Any) -> dict[str, Tensor]:
        losses = as_dict(outputs, batch)
        task = TASK_NAMES[int(batch["features"][0, 0].sign() > 0)]
        return {task: losses[task]}

    data = build_data(6 * BATCH, dtype=FLOAT)
    expected = [int(batch["features"][0, 0].sign() > 0) for batch in batches(data)]
    assert set(expected) == {0, 1}
    for absent_tasks in ("skip", "hold"):
        found = run(
            tmp_path,
            LogitsModel(),
            data,
            trainer_arguments={"task_loss_func": one_task_per_batch},
            task_names=TASK_NAMES,
            label_names=["labels"],
            absent_tasks=absent_tasks,
        )
        coefficients = torch.stack(found.record.coefficients)
        assert coefficients.count_nonzero(dim=1).tolist() == [1] * 6
        assert coefficients.argmax(dim=1).tolist() == expected
        # Alone, F = sigma l / sigma: no balancing; held, the last known losses of the other task count.
        alone = [found.logged(f"loss/{TASK_NAMES[k]}")[t] for t, k in enumerate(expected)]
        vacuous = found.logged("discrepancy") == [0.0] * 6
        assert vacuous == (absent_tasks == "skip") and None not in alone


@pytest.mark.parametrize("size", [4 * BATCH, 3 * BATCH])
def test_num_items_weight_the_micro_batches_of_a_window(size: int, tmp_path: Path) -> None:
    # One update from two micro-batches with unequal counts is the update from both at once; F is linear here. The last
    # window of three batches has one.
    data = build_data(size, dtype=FLOAT, missing=0.5)
    whole = run(tmp_path, data=data, balancer="ls", per_device_train_batch_size=2 * BATCH)
    parts = run(tmp_path, data=data, balancer="ls", gradient_accumulation_steps=2)
    assert whole.trainer.state.global_step == parts.trainer.state.global_step == 2
    assert close(parts.parameters, whole.parameters)
    for task in TASK_NAMES:
        assert parts.logged(f"loss/{task}") == pytest.approx(whole.logged(f"loss/{task}"), rel=1e-12)


def test_task_item_counts_are_used_and_checked(tmp_path: Path) -> None:
    data = build_data(4 * BATCH, dtype=FLOAT, missing=0.5)
    settings: dict[str, Any] = {"balancer": "ls", "gradient_accumulation_steps": 2}
    built_in = run(tmp_path, data=data, **settings)
    calls = []

    def counts(batch: Any) -> Tensor:
        calls.append(len(batch["labels"]))
        return batch["labels"].isfinite().sum(0)

    own = run(tmp_path, data=data, trainer_arguments={"task_item_counts": counts}, **settings)
    assert calls == [BATCH] * 4 and torch.equal(own.parameters, built_in.parameters)
    with pytest.raises(TaskLossError, match=r"^task_item_counts: returned 3, expected a tensor \[4\]"):
        run(tmp_path, data=data, trainer_arguments={"task_item_counts": lambda batch: 3}, **settings)


def task_of(batch: Any) -> int:
    """Batches of one task each: the sign of the first feature says which."""
    return int(batch["features"][0, 0].sign() > 0)


def test_one_task_per_micro_batch_is_counted_by_a_pass_unless_counts_are_given(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = build_data(4 * BATCH, dtype=FLOAT)
    data.features[:, 0] = torch.tensor([-1.0, 1.0, 1.0, -1.0], dtype=FLOAT).repeat_interleave(BATCH)
    settings: dict[str, Any] = {"balancer": "ls", "task_names": TASK_NAMES, "label_names": ["labels"]}

    def losses(outputs: Any, batch: Any) -> dict[str, Tensor]:
        return {TASK_NAMES[task_of(batch)]: as_tensor(outputs, batch)[task_of(batch)]}

    def counts(batch: Any) -> Tensor:
        return BATCH * torch.nn.functional.one_hot(torch.tensor(task_of(batch)), 4)

    def train(**more: Any) -> Tensor:
        model = LogitsModel()
        given = {"task_loss_func": losses, **more}
        run(tmp_path, model, data, trainer_arguments=given, gradient_accumulation_steps=2, **settings)
        return flat_parameters(model.inner)

    exact = train(task_item_counts=counts)
    assert "task_item_counts" not in caplog.text
    model = build_model(FLOAT)
    window = torch.optim.SGD(model.parameters(), lr=0.05)
    for first in (0, 2):
        window.zero_grad()
        for batch in batches(data)[first : first + 2]:
            as_tensor(model(batch["features"]), batch)[task_of(batch)].backward()
        window.step()
    assert close(exact, flat_parameters(model))
    # Otherwise a forward pass over the window says which task a micro-batch has, and that is said, once.
    assert close(train(), flat_parameters(model))
    assert caplog.text.count("do not tell how many items tasks alpha, beta, gamma, delta have in a whole window") == 1


# --- auxiliary loss and priors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_auxiliary_loss_is_added_as_it_is(accumulation: int, tmp_path: Path) -> None:
    data = build_data(4 * BATCH, dtype=FLOAT)
    found = run(
        tmp_path,
        build_model(FLOAT, auxiliary_weight=0.3),
        data,
        balancer={"name": "ls", "coefficient_scale": "sum_to_one"},
        gradient_accumulation_steps=accumulation,
    )
    model = build_model(FLOAT, auxiliary_weight=0.3)
    # Whole batches of equal size: the mean over micro-batches is the mean over the window.
    values = by_hand(model, data, lambda losses, items, step: losses.mean(), size=BATCH * accumulation)
    assert close(found.parameters, flat_parameters(model))
    sums = [
        4 * mean + auxiliary
        for mean, auxiliary in zip(found.logged("loss_mean"), found.logged("auxiliary_loss"), strict=True)
    ]
    assert found.logged("loss") == pytest.approx(sums, rel=1e-12)
    assert [
        m + a for m, a in zip(found.logged("loss_mean"), found.logged("auxiliary_loss"), strict=True)
    ] == pytest.approx(values)


def test_without_an_auxiliary_loss_none_is_logged(tmp_path: Path) -> None:
    assert run(tmp_path).logged("auxiliary_loss") == [None] * 5


def test_task_priors_are_fixed_factors(tmp_path: Path) -> None:
    priors = [1.0, 0.0, 2.0, 0.5]
    data = build_data(4 * BATCH, dtype=FLOAT, missing=0.3)
    found = run(tmp_path, data=data, balancer="ls", task_priors=priors)
    model = build_model(FLOAT)
    values = by_hand(model, data, lambda losses, items, step: (torch.tensor(priors, dtype=FLOAT) * losses).sum())
    assert close(found.parameters, flat_parameters(model))
    assert found.logged("loss") == pytest.approx(values, rel=1e-12)
    assert found.logged("coefficient/gamma") == [2.0] * 4 and found.logged("coefficient/beta") == [0.0] * 4


# --- refused ------------------------------------------------------------------------------------------------------


def test_a_model_without_losses_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskLossError, match=r"the model returned no `losses` \(it returned: logits\); return a field"):
        run(tmp_path, LogitsModel(), task_names=TASK_NAMES, label_names=["labels"])


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (lambda outputs, batch: as_tensor(outputs, batch)[:3], r"losses: got shape \(3,\), expected a tensor \[4\]"),
        (lambda outputs, batch: {"alhpa": as_tensor(outputs, batch)[0]}, r"losses: 'alhpa' is no task \(did you mean"),
        (lambda outputs, batch: (as_tensor(outputs, batch), torch.ones(3)), r"num_items: got shape \(3,\), expected a"),
        (lambda outputs, batch: 1.0, r"losses: got float, expected a tensor \[4\] or a dict"),
    ],
)
def test_losses_that_do_not_fit_are_refused(form: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(TaskLossError, match=r"^" + message):
        run(
            tmp_path,
            LogitsModel(),
            trainer_arguments={"task_loss_func": form},
            task_names=TASK_NAMES,
            label_names=["labels"],
        )


def test_a_second_train_with_a_new_model_has_a_new_balancer(tmp_path: Path) -> None:
    # `model_init` builds the model anew for every training (a hyperparameter search); the balancer starts anew with it.
    data = build_data(3 * BATCH, dtype=FLOAT)
    trainer = BilevelMTLTrainer(model_init=lambda: build_model(FLOAT), args=arguments(tmp_path), train_dataset=data)
    results = []
    for _ in range(2):
        trainer.train()
        results.append((flat_parameters(trainer.model), trainer.balancer.state_dict()))
    (one, state), (other, other_state) = results
    assert torch.equal(one, other) and all(torch.equal(state[key], other_state[key]) for key in state)


def test_an_optimizer_step_that_was_skipped_leaves_the_router_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As under fp16 after an overflow: the optimizer reports that it did not step.
    from accelerate.optimizer import AcceleratedOptimizer

    seen: list[Tensor] = []

    class Reader(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, *more: Any, **kwargs: Any) -> None:
            monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", property(lambda self: state.global_step == 1))

        def on_step_end(self, *args: Any, balancer: Any, **kwargs: Any) -> None:
            seen.append(balancer.state_dict()["objective.router.logits"])

    balancer = {"name": "bilb", "learning_rate": 0.1, "optimizer": "sgd"}
    run(
        tmp_path,
        data=build_data(4 * BATCH, dtype=FLOAT),
        trainer_arguments={"callbacks": [Reader()]},
        balancer=balancer,
    )
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise([torch.ones(4, dtype=FLOAT), *seen])]
    assert moved == [True, False, True, True]


def test_a_second_train_goes_on_with_model_and_balancer(tmp_path: Path) -> None:
    # As `Trainer` goes on with the model; its optimizer starts anew, ours with the balancer's state.
    data = build_data(3 * BATCH, dtype=FLOAT)
    trainer = BilevelMTLTrainer(model=build_model(FLOAT), args=arguments(tmp_path), train_dataset=data)
    trainer.train()
    model = build_model(FLOAT)
    balancer = build_balancer("bilb", task_names=TASK_NAMES, dtype=FLOAT)
    with_balancer(model, data, balancer)
    references = trainer.balancer.reference_losses
    trainer.train()
    with_balancer(model, data, balancer)
    assert torch.equal(flat_parameters(trainer.model), flat_parameters(model))
    assert torch.equal(trainer.balancer.reference_losses, references)
