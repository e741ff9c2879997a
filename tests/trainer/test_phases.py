"""Warm-up on the plain sum, a router that is frozen, and a balancer that begins with what another run has learned."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from hf_bilb import BilevelMTLTrainer, OptionError
from hf_bilb.errors import CheckpointError, NonFiniteLossError
from hf_bilb.trainer.checkpointing import DESCRIPTION, MARKER, STAGING, TENSORS
from hf_bilb.trainer.running_log import VECTORS_FILE
from tests.checkpoints.test_damage import delete, scramble, truncate
from tests.synthetic import SyntheticData
from tests.trainer.harness import (
    BATCH,
    FLOAT,
    TASK_NAMES,
    Run,
    arguments,
    batches,
    build_data,
    build_model,
    close,
    flat_parameters,
    run,
    untimed,
)
from tests.trainer.models import FeatureModel, build

BILB: dict[str, Any] = {"name": "bilb", "learning_rate": 0.1}
QM9: dict[str, Any] = {**BILB, "preset": "qm9"}
#: F can be written down in two lines, see `bilb_by_hand`.
PLAIN: dict[str, Any] = {**BILB, "normalization": "none", "pairs": "adjacent", "discrepancy_weight": 0.02}
STEPS, SWITCH = 8, 3


def rows(missing: float = 0.3) -> SyntheticData:
    return build_data(STEPS * BATCH, dtype=FLOAT, missing=missing)


def part(data: SyntheticData, first: int, last: int = STEPS) -> SyntheticData:
    """Batches `first` to `last`, the last one left out."""
    return SyntheticData(data.features[first * BATCH : last * BATCH], data.labels[first * BATCH : last * BATCH])


class States(TrainerCallback):
    """The balancer's state after each update."""

    def __init__(self) -> None:
        self.after: list[dict[str, Tensor]] = []

    def on_step_end(self, *args: Any, balancer: Any, **kwargs: Any) -> None:
        self.after.append(balancer.state_dict())


def states_of(folder: Path, **settings: Any) -> list[dict[str, Tensor]]:
    states = States()
    given = {"data": rows(), **settings}
    run(folder, trainer_arguments={"callbacks": [states]}, **given)
    return states.after


def learned(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What learning changes: the method's own parameters and their moments."""
    return {key: value for key, value in state.items() if key.startswith(("objective.", "optimizer."))}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def same_log(one: Run, other: Run) -> bool:
    """As text: a step without F has NaN in it, which equals nothing."""
    return json.dumps(untimed(one.steps)) == json.dumps(untimed(other.steps))


# --- warm-up ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("balancer", [BILB, QM9, {"name": "uw", "learning_rate": 0.1}, "si"], ids=str)
def test_warm_up_is_the_plain_sum_and_then_a_run_begins(balancer: Any, tmp_path: Path) -> None:
    data = rows()
    found = run(tmp_path, data=data, balancer=balancer, balancer_warmup_steps=SWITCH)
    model = build_model(FLOAT)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step, batch in enumerate(batches(part(data, 0, SWITCH))):
        optimizer.zero_grad()
        errors = (model(batch["features"]).logits - batch["labels"].nan_to_num()).square()
        present = batch["labels"].isfinite()
        loss = (torch.where(present, errors, 0.0).sum(0) / present.sum(0).clamp(min=1)).sum()
        loss.backward()
        optimizer.step()
        assert close(found.record.parameters[step], flat_parameters(model))
        assert found.steps[step]["loss"] == pytest.approx(float(loss.detach()), rel=1e-12)
    # From here on as a fresh run on the rest of the data, references included.
    torch.nn.utils.vector_to_parameters(found.record.parameters[SWITCH - 1], model.parameters())
    rest = run(tmp_path, model, part(data, SWITCH), balancer=balancer)
    assert torch.equal(found.parameters, rest.parameters)
    ours, theirs = found.trainer.balancer.state_dict(), rest.trainer.balancer.state_dict()
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []


def test_nothing_is_learned_in_the_warm_up(tmp_path: Path) -> None:
    states = states_of(tmp_path, data=rows(0.0), balancer=BILB, balancer_warmup_steps=SWITCH)
    fresh = BilevelMTLTrainer(model=build_model(FLOAT), args=arguments(tmp_path, balancer=BILB)).balancer.state_dict()
    quiet = ("objective.", "optimizer.", "normalization.", "guards.")
    for step, state in enumerate(states):
        unchanged = {key for key in fresh if key.startswith(quiet) and torch.equal(state[key], fresh[key])}
        if step < SWITCH:
            assert unchanged == {key for key in fresh if key.startswith(quiet)}
        else:
            assert not any(key.startswith(("objective.router", "normalization.seen")) for key in unchanged)


def test_weights_and_discrepancy_are_logged_from_balancing_on(tmp_path: Path) -> None:
    found = run(tmp_path, data=rows(0.0), balancer=PLAIN, balancer_warmup_steps=SWITCH)
    for step, entry in enumerate(found.steps):
        assert ("discrepancy" in entry) == ("weight/alpha" in entry) == (step >= SWITCH)
        assert entry["loss/alpha"] > 0
    assert all(entry[f"coefficient/{task}"] == 1.0 for entry in found.steps[:SWITCH] for task in TASK_NAMES)
    assert [weights is None for weights in found.record.weights] == [True] * SWITCH + [False] * (STEPS - SWITCH)
    # Steps 3 and 4 in one entry: weights of the one in which there were any, coefficients and F of both.
    coarse = run(tmp_path, data=rows(0.0), balancer=PLAIN, balancer_warmup_steps=SWITCH, logging_steps=2)
    entry, third, fourth = coarse.steps[1], found.steps[2], found.steps[3]
    for key in ("discrepancy", "weight/alpha", "weight/delta"):
        assert entry[key] == pytest.approx(fourth[key], rel=1e-12)
    for key in ("loss", "loss_mean", "loss/beta", "coefficient/alpha"):
        assert entry[key] == pytest.approx((third[key] + fourth[key]) / 2, rel=1e-12), key


def test_a_warm_up_without_end_is_ls(tmp_path: Path) -> None:
    found = run(tmp_path, data=rows(), balancer=QM9, balancer_warmup_steps=STEPS)
    expected = run(tmp_path, data=rows(), balancer="ls")
    assert torch.equal(found.parameters, expected.parameters)
    for one, other in zip(found.steps, expected.steps, strict=True):
        assert one == pytest.approx(other, rel=1e-14)


def test_the_warm_up_counts_updates(tmp_path: Path) -> None:
    for balance_over in ("micro_batch", "window"):
        settings: dict[str, Any] = {"gradient_accumulation_steps": 2, "balance_over": balance_over}
        found = run(tmp_path, data=rows(), balancer=BILB, balancer_warmup_steps=2, **settings)
        assert ["weight/alpha" in entry for entry in found.steps] == [False, False, True, True]
        plain = run(tmp_path, data=rows(), balancer="ls", **settings)
        assert torch.equal(found.record.parameters[1], plain.record.parameters[1])
        assert not torch.equal(found.record.parameters[2], plain.record.parameters[2])


def test_a_feature_router_warms_up(tmp_path: Path) -> None:
    balancer = {**BILB, "router": "features", "initial_logits": None}
    found = run(
        tmp_path, build(FeatureModel, num_router_features=8), rows(), balancer=balancer, balancer_warmup_steps=3
    )
    plain = run(tmp_path, build(FeatureModel, num_router_features=8), rows(), balancer="ls")
    assert torch.equal(found.record.parameters[2], plain.record.parameters[2])
    assert not torch.equal(found.record.parameters[3], plain.record.parameters[3])
    assert found.logged("weight/alpha")[2] is None and found.logged("weight/alpha")[3] is not None


def test_losses_a_logarithm_cannot_take_are_fine_until_it_is_taken(tmp_path: Path) -> None:
    def shifted(outputs: Any, batch: Any) -> Tensor:
        return outputs.losses - 100

    given: dict[str, Any] = {"trainer_arguments": {"task_loss_func": shifted}, "data": rows(0.0), "balancer": "si"}
    with pytest.raises(NonFiniteLossError, match=rf"at step {SWITCH + 1}, but balancer 'si' takes logarithms"):
        run(tmp_path, balancer_warmup_steps=SWITCH, **given)


def test_a_loss_that_is_not_finite_is_seen_in_the_warm_up(tmp_path: Path) -> None:
    data = rows(0.0)
    data.labels[BATCH, 1] = math.inf
    with pytest.raises(NonFiniteLossError, match=r"^the loss of task 'beta' is inf at step 2"):
        run(tmp_path, data=data, balancer=BILB, balancer_warmup_steps=SWITCH)
    # A dropped step is one of the warm-up's.
    found = run(tmp_path, data=data, balancer=BILB, balancer_warmup_steps=SWITCH, nonfinite_loss="skip")
    assert ["weight/alpha" in entry for entry in found.steps] == [False] * SWITCH + [True] * (STEPS - SWITCH)


def test_a_second_train_warms_up_as_the_first(tmp_path: Path) -> None:
    # With over 32 tasks the full vectors go to a file: no column of weights before there are any.
    tasks = [f"task_{k}" for k in range(40)]
    trainer = BilevelMTLTrainer(
        model_init=lambda: build_model(FLOAT, task_names=tasks),
        args=arguments(tmp_path, balancer=BILB, balancer_warmup_steps=2),
        train_dataset=build_data(4 * BATCH, num_tasks=40, dtype=FLOAT),
    )
    texts = []
    for _ in range(2):
        trainer.train()
        texts.append((tmp_path / VECTORS_FILE).read_text())
    assert ["weight" in json.loads(line) for line in texts[0].splitlines()] == [False, False, True, True]
    assert texts[0] == texts[1]


# --- frozen -------------------------------------------------------------------------------------------------------


def bilb_by_hand(losses: Tensor, sigma: Tensor, weight: float) -> Tensor:
    """F of `PLAIN` at fixed weights."""
    values = sigma * losses
    return (sigma * losses).sum() / sigma.sum() + weight * (values[:-1] - values[1:]).abs().sum()


def test_a_frozen_router_goes_on_weighting(tmp_path: Path) -> None:
    data = rows(0.0)
    found = run(tmp_path, data=data, balancer=PLAIN, balancer_freeze_after=SWITCH)
    weights = found.record.weights
    assert all(not torch.equal(weights[i], weights[i + 1]) for i in range(SWITCH))
    assert all(torch.equal(weights[SWITCH], later) for later in weights[SWITCH:])
    model = build_model(FLOAT)
    torch.nn.utils.vector_to_parameters(found.record.parameters[SWITCH - 1], model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step, batch in enumerate(batches(part(data, SWITCH)), start=SWITCH):
        optimizer.zero_grad()
        value = bilb_by_hand(model(**batch).losses, weights[SWITCH], 0.02)
        value.backward()
        optimizer.step()
        assert found.steps[step]["loss"] == pytest.approx(float(value.detach()), rel=1e-12)
        assert close(found.record.parameters[step], flat_parameters(model))


@pytest.mark.parametrize("balancer", [BILB, QM9, {"name": "uw", "learning_rate": 0.1}], ids=str)
def test_parameters_moments_and_references_stay(balancer: Any, tmp_path: Path) -> None:
    # Two epochs: the references of `every_epoch` stay, too.
    states = states_of(tmp_path, balancer=balancer, balancer_freeze_after=SWITCH, num_train_epochs=2)
    free = states_of(tmp_path, balancer=balancer, num_train_epochs=2)
    assert len(states) == 2 * STEPS
    for step in range(2 * STEPS):
        if step < SWITCH:
            assert same(states[step], free[step])
        else:
            assert same(learned(states[step]), learned(states[SWITCH - 1]))
            assert not same(learned(free[step]), learned(free[step - 1]))
            key = "normalization.reference_losses"
            assert torch.equal(states[step][key], states[SWITCH - 1][key])
    if balancer is QM9:
        assert not torch.equal(free[STEPS][key], free[STEPS - 1][key])
    # What is remembered of the losses goes on.
    assert not torch.equal(states[-1]["memory.last_losses"], states[SWITCH - 1]["memory.last_losses"])


def test_frozen_from_the_start_is_a_router_that_does_not_learn(tmp_path: Path) -> None:
    # Task 3 is first seen in the fourth batch: its reference is taken then.
    data = rows(0.0)
    data.labels[: 3 * BATCH, 3] = torch.nan
    for warmup in (0, 2):
        settings: dict[str, Any] = {"data": data, "balancer_warmup_steps": warmup}
        found = run(tmp_path, balancer=BILB, balancer_freeze_after=warmup, **settings)
        expected = run(tmp_path, balancer={**BILB, "learning_rate": 0.0}, **settings)
        assert torch.equal(found.parameters, expected.parameters) and same_log(found, expected)
        assert torch.equal(found.trainer.balancer.reference_losses, expected.trainer.balancer.reference_losses)


def test_frozen_while_accumulating(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"gradient_accumulation_steps": 2, "balance_over": "window", "balancer": BILB}
    found = run(tmp_path, data=rows(), balancer_freeze_after=2, **settings)
    free = run(tmp_path, data=rows(), **settings)
    weights = found.record.weights
    assert torch.equal(weights[1], free.record.weights[1]) and torch.equal(weights[2], free.record.weights[2])
    assert torch.equal(weights[3], weights[2]) and not torch.equal(free.record.weights[3], weights[2])


# --- argument errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"balancer_warmup_steps": -1}, "balancer_warmup_steps: -1 is not valid, expected an integer >= 0"),
        ({"balancer_warmup_steps": 0.1}, "balancer_warmup_steps: 0.1 is not valid, expected an integer"),
        ({"balancer_warmup_steps": True}, "balancer_warmup_steps: True is not valid, expected an integer"),
        ({"balancer_warmup_steps": None}, "balancer_warmup_steps: None is not valid, expected an integer"),
        ({"balancer_freeze_after": -1}, "balancer_freeze_after: -1 is not valid, expected null or at least"),
        ({"balancer_freeze_after": "soon"}, "balancer_freeze_after: 'soon' is not valid, expected an integer or null"),
        (
            {"balancer_warmup_steps": 5, "balancer_freeze_after": 4},
            "balancer_freeze_after: 4 is not valid, expected null or at least balancer_warmup_steps (5)",
        ),
    ],
)
def test_steps_are_checked_when_the_arguments_are_made(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError) as caught:
        arguments(tmp_path, **settings)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_steps_written_as_text_are_numbers(tmp_path: Path) -> None:
    args = arguments(tmp_path, balancer_warmup_steps="3", balancer_freeze_after=1e1)
    assert (args.balancer_warmup_steps, args.balancer_freeze_after) == (3, 10)


# --- begun from another run ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with checkpoints after 4 and 8 updates."""
    folder = tmp_path_factory.mktemp("source") / "run"
    run(folder, data=rows(), balancer=QM9, save_strategy="steps", save_steps=4)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-4", "checkpoint-8"]
    return folder


@pytest.fixture
def copied(source: Path, tmp_path: Path) -> Path:
    """A copy of it, to damage."""
    return Path(shutil.copytree(source, tmp_path / "source"))


def begun(folder: Path, init_from: Path, **settings: Any) -> BilevelMTLTrainer:
    given = {"balancer": QM9, "balancer_init_from": str(init_from), **settings}
    return BilevelMTLTrainer(
        model=build_model(FLOAT, seed=5), args=arguments(folder, **given), train_dataset=build_data(16, dtype=FLOAT)
    )


def saved(checkpoint: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(checkpoint / TENSORS)


@pytest.mark.parametrize(("place", "checkpoint"), [("", "checkpoint-8"), ("checkpoint-4", "checkpoint-4")])
def test_it_begins_with_what_was_learned(place: str, checkpoint: str, source: Path, tmp_path: Path) -> None:
    begins: list[dict[str, Tensor]] = []

    class AtBegin(TrainerCallback):
        def on_train_begin(self, *args: Any, balancer: Any, **kwargs: Any) -> None:
            begins.append(balancer.state_dict())

    trainer = begun(tmp_path, source / place)
    trainer.add_callback(AtBegin())
    trainer.train()
    theirs = saved(source / checkpoint)
    fresh = BilevelMTLTrainer(model=build_model(FLOAT), args=arguments(tmp_path, balancer=QM9)).balancer.state_dict()
    assert begins[0].keys() == theirs.keys()
    taken = {key for key, value in begins[0].items() if torch.equal(value, theirs[key])}
    anew = {"epoch", *(key for key in theirs if key.startswith("guards."))}
    assert theirs.keys() - taken == {key for key in anew if not torch.equal(theirs[key], fresh[key])}
    assert all(torch.equal(begins[0][key], fresh[key]) for key in anew)
    assert float(begins[0]["optimizer.router.logits.step"]) == int(checkpoint.split("-")[1])
    # And then it learns: from there, in its own steps.
    assert not torch.equal(trainer.balancer.state_dict()["objective.router.logits"], theirs["objective.router.logits"])


def test_the_model_is_this_runs_own(source: Path, tmp_path: Path) -> None:
    trainer = begun(tmp_path, source)
    assert torch.equal(flat_parameters(trainer.model), flat_parameters(build_model(FLOAT, seed=5)))


def test_the_first_weights_are_the_last_ones_of_the_other_run(source: Path, tmp_path: Path) -> None:
    trainer = begun(tmp_path, source, balancer_freeze_after=0)
    trainer.train()
    logits = saved(source / "checkpoint-8")["objective.router.logits"]
    expected = torch.sigmoid(torch.relu(logits))
    entry = trainer.state.log_history[0]
    assert [entry[f"weight/{task}"] for task in TASK_NAMES] == pytest.approx(expected.tolist(), rel=1e-12)


def test_references_are_kept_where_they_are_taken_once(tmp_path: Path) -> None:
    run(tmp_path / "source", data=rows(), balancer=BILB, save_strategy="epoch")
    trainer = begun(tmp_path / "next", tmp_path / "source", balancer=BILB)
    trainer.train()
    kept = saved(tmp_path / "source" / "checkpoint-8")["normalization.reference_losses"]
    assert torch.equal(trainer.balancer.reference_losses, kept)


def test_a_damaged_last_checkpoint_is_passed_over(copied: Path, tmp_path: Path, caplog: Any) -> None:
    truncate(copied / "checkpoint-8" / TENSORS)
    with caplog.at_level(logging.WARNING, "hf_bilb"):
        trainer = begun(tmp_path, copied)
    assert any("passing over" in message and "checkpoint-8" in message for message in caplog.messages)
    assert float(trainer.balancer.state_dict()["optimizer.router.logits.step"]) == 4


def test_the_other_run_may_be_under_way(copied: Path, tmp_path: Path) -> None:
    # Complete, but not yet in place: the run that writes it is going to move it.
    staged = copied / STAGING / "checkpoint-12"
    shutil.copytree(copied / "checkpoint-8", staged)
    begun(tmp_path, copied)
    assert (staged / MARKER).is_file() and not (copied / "checkpoint-12").exists()


def test_every_train_with_a_new_model_begins_there(source: Path, tmp_path: Path) -> None:
    trainer = BilevelMTLTrainer(
        model_init=lambda: build_model(FLOAT, seed=5),
        args=arguments(tmp_path, balancer=QM9, balancer_init_from=str(source)),
        train_dataset=build_data(16, dtype=FLOAT),
    )
    found = []
    for _ in range(2):
        trainer.train()
        found.append(trainer.balancer.state_dict())
    assert same(*found)
    expected = begun(tmp_path, source)
    expected.train()
    assert same(found[0], expected.balancer.state_dict())


def test_a_resumed_run_goes_on_with_its_own(source: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    whole = begun(tmp_path, source, **settings)
    whole.train()
    resumed = begun(tmp_path, source, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(resumed.balancer.state_dict(), whole.balancer.state_dict())
    assert torch.equal(flat_parameters(resumed.model), flat_parameters(whole.model))


def test_other_options_are_said(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hf_bilb"):
        begun(tmp_path, source)
        assert caplog.messages == []
        begun(tmp_path, source, balancer={**QM9, "learning_rate": 0.2})
    assert [f"{DESCRIPTION}: was saved with other options" in message for message in caplog.messages] == [True]


def remove_checkpoints(folder: Path) -> None:
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


@pytest.mark.parametrize(
    ("damage", "place", "pattern"),
    [
        (None, "checkpoint-7", r"checkpoint-7: there is no such folder, expected a checkpoint or a run's folder$"),
        (None, f"checkpoint-8/{TENSORS}", rf"{TENSORS}: there is no such folder"),
        (remove_checkpoints, "", r"source: holds no balancer state, expected a checkpoint that does$"),
        (lambda f: scramble(f / "checkpoint-8" / TENSORS), "", rf"{TENSORS}: is truncated or no safetensors file"),
        (lambda f: truncate(f / "checkpoint-8" / TENSORS), "checkpoint-8", rf"{TENSORS}: is truncated or no"),
        (lambda f: delete(f / "checkpoint-8" / TENSORS), "checkpoint-8", rf"{TENSORS}: is missing$"),
        (lambda f: truncate(f / "checkpoint-8" / DESCRIPTION), "checkpoint-8", rf"{DESCRIPTION}: is damaged"),
        (lambda f: delete(f / "checkpoint-8" / DESCRIPTION), "checkpoint-8", rf"{DESCRIPTION}: is missing$"),
    ],
    ids=["no folder", "a file", "no checkpoint", "scrambled", "truncated", "missing", "description", "no description"],
)
def test_what_cannot_be_read_is_one_line(
    damage: Callable[[Path], None] | None, place: str, pattern: str, copied: Path, tmp_path: Path
) -> None:
    if damage is not None:
        damage(copied)
    with pytest.raises(CheckpointError, match=pattern) as caught:
        begun(tmp_path, copied / place)
    assert "\n" not in str(caught.value) and str(copied) in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "tasks", "pattern"),
    [
        ({"balancer": "uw"}, TASK_NAMES, rf"{DESCRIPTION}: was saved by balancer 'bilb', this run uses 'uw'; go on"),
        ({}, [*TASK_NAMES[:3], "epsilon"], r"task 3 is 'delta' there and 'epsilon' in this run$"),
        ({}, TASK_NAMES[:3], r"was saved for 4 tasks, this run has 3$"),
        ({"balancer": {**QM9, "optimizer": "sgd"}}, TASK_NAMES, rf"{TENSORS}: .*entry 'optimizer.*; was it saved by"),
        ({"balancer": {**BILB, "router": "features"}}, TASK_NAMES, rf"{TENSORS}: .*entry 'objective.router.bias'"),
    ],
    ids=["method", "names", "number", "optimizer", "router"],
)
def test_what_does_not_fit_is_one_line(
    settings: dict[str, Any], tasks: list[str], pattern: str, source: Path, tmp_path: Path
) -> None:
    model = build_model(FLOAT, task_names=tasks, num_router_features=8)
    given = {"balancer": QM9, "balancer_init_from": str(source), **settings}
    with pytest.raises(CheckpointError, match=pattern) as caught:
        BilevelMTLTrainer(model=model, args=arguments(tmp_path, **given))
    assert "\n" not in str(caught.value) and str(source / "checkpoint-8") in str(caught.value)


def test_a_run_that_saved_models_alone_has_nothing_to_begin_with(tmp_path: Path) -> None:
    run(tmp_path / "source", data=rows(), balancer=QM9, save_strategy="epoch", save_only_model=True)
    for place in ("", "checkpoint-8"):
        with pytest.raises(CheckpointError, match=r": holds no balancer state, expected a checkpoint that does$"):
            begun(tmp_path / "next", tmp_path / "source" / place)
