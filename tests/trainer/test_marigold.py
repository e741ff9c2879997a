"""MARIGOLD in the Trainer, its modes: as a loop of one's own, clipped, over a window, resumed, scaled, refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_bilb import build_balancer
from hf_bilb.errors import NonFiniteLossError, OptionError
from hf_bilb.losses.masked import masked_mse
from tests.synthetic import build_data, build_model, flat_parameters
from tests.trainer.harness import (
    BATCH,
    FLOAT,
    TASK_NAMES,
    arguments,
    assert_goes_on,
    close,
    run,
    with_balancer,
)
from tests.trainer.test_double_loop import with_plugin
from tests.trainer.test_famo import Noisy
from tests.trainer.test_grad_scaler import Overflow, Router, WithScaler

OWN: dict[str, Any] = {"name": "marigold", "perturbation": 0.1, "beta": 0.3, "learning_rate": 0.2}
MODES: dict[str, dict[str, Any]] = {
    "exact": {**OWN, "mode": "exact"},
    "two_point": {**OWN, "mode": "exact", "estimator": "two_point"},
    "commit": OWN,
    "lagged": {**OWN, "mode": "lagged", "estimator": "one_point_baseline"},
    "auxiliary": {
        **OWN,
        "mode": "exact",
        "parametrization": "identity",
        "trainable_tasks": TASK_NAMES[1:],
        "upper_level": {"tasks": TASK_NAMES[:1]},
        "learning_rate": 0.01,
    },
}
every_mode = pytest.mark.parametrize("balancer", MODES.values(), ids=MODES)


@every_mode
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.05])
def test_as_a_loop_of_ones_own(balancer: dict[str, Any], max_grad_norm: float, tmp_path: Path) -> None:
    data = build_data(6 * BATCH, dtype=FLOAT, missing=0.3)
    settings = {"optim": "adamw_torch", "learning_rate": 0.02, "max_grad_norm": max_grad_norm}
    found = run(tmp_path, data=data, balancer=balancer, **settings)
    model, own = build_model(FLOAT), build_balancer(balancer, task_names=TASK_NAMES, dtype=FLOAT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.0)

    def clip() -> None:
        if max_grad_norm:
            nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)

    coefficients = with_balancer(model, data, own, optimizer=optimizer, before_step=clip)
    assert torch.equal(torch.stack(found.record.coefficients), torch.stack(coefficients))
    assert torch.equal(found.parameters, flat_parameters(model))
    assert not torch.allclose(coefficients[0], coefficients[-1], rtol=0.01)
    ours, theirs = found.trainer.balancer.state_dict(), own.state_dict()
    learned = [name for name in theirs if name.startswith(("objective.", "optimizer."))]
    assert all(torch.equal(ours[name], theirs[name]) for name in learned)


@pytest.mark.parametrize("mode", ["exact", "two_point", "commit", "lagged"])
def test_a_window_is_one_batch(mode: str, tmp_path: Path) -> None:
    data = build_data(24 * BATCH, dtype=FLOAT, missing=0.2)
    settings = {"balancer": MODES[mode], "balance_over": "window"}
    whole = run(tmp_path, data=data, per_device_train_batch_size=4 * BATCH, **settings)
    parts = run(tmp_path, data=data, gradient_accumulation_steps=4, **settings)
    assert close(parts.parameters, whole.parameters)
    assert close(torch.stack(parts.record.weights), torch.stack(whole.record.weights))


@every_mode
def test_a_resumed_run_goes_on_as_it_would_have(balancer: dict[str, Any], tmp_path: Path) -> None:
    data = build_data(8 * BATCH, dtype=FLOAT, missing=0.2)
    assert_goes_on(tmp_path, data, 5, balancer=balancer, optim="adamw_torch", learning_rate=0.02)


@pytest.mark.parametrize(("mode", "passes"), [("exact", 3), ("two_point", 4), ("commit", 2), ("lagged", 1)])
def test_passes_of_an_update_drop_the_same_units_and_leave_the_buffers_alone(
    mode: str, passes: int, tmp_path: Path
) -> None:
    data = build_data(6 * BATCH, dtype=FLOAT)
    model = Noisy(data[0]["features"].shape[0])
    functions = {"task_loss_func": lambda outputs, batch: masked_mse(outputs, batch["labels"])}
    settings = {"task_names": TASK_NAMES, "label_names": ["labels"], "balancer": MODES[mode]}
    run(tmp_path, model, data, trainer_arguments=functions, **settings)
    assert len(model.dropped) == 6 * passes
    updates = [model.dropped[i : i + passes] for i in range(0, len(model.dropped), passes)]
    for update in updates:
        assert all(torch.equal(update[0], other) for other in update[1:])
    assert not torch.equal(updates[0][0], updates[1][0])
    assert int(model.norm.num_batches_tracked) == 6


def test_what_a_dropped_update_has_tried_is_forgotten(tmp_path: Path) -> None:
    # The third batch is bad: what is trained before and after it is what is trained without it, but for the directions.
    data = build_data(5 * BATCH, dtype=FLOAT)
    data.labels[2 * BATCH, 0] = torch.inf
    found = run(tmp_path, data=data, balancer=MODES["exact"], nonfinite_loss="skip")
    without = [row for row in range(5 * BATCH) if row // BATCH != 2]
    kept = torch.utils.data.Subset(data, without)
    expected = run(tmp_path, data=kept, balancer=MODES["exact"])
    assert torch.equal(found.parameters, expected.parameters)
    ours, theirs = found.trainer.balancer.state_dict(), expected.trainer.balancer.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs if not name.startswith("guards."))


def test_under_a_gradient_scaler(tmp_path: Path) -> None:
    class Logits(Router):
        def on_step_end(self, *args: Any, balancer: Any, **kwargs: Any) -> None:
            self.logits.append(balancer.state_dict()["objective.logits"])

    class LateOverflow(Overflow):
        """In the pass that counts alone: the trial's gradients are finite."""

        def on_step_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
            self.hook, calls = None, []
            if state.global_step + 1 == self.step:

                def overflow(gradient: torch.Tensor) -> torch.Tensor | None:
                    calls.append(1)
                    return gradient + torch.inf if len(calls) == 2 else None

                self.hook = next(model.parameters()).register_hook(overflow)

    data = build_data(5 * BATCH, dtype=FLOAT)
    settings = {"optim": "adamw_torch", "learning_rate": 0.01, "balancer": MODES["exact"], "max_grad_norm": 1.0}
    found = []
    for step in (0, 3):
        logits = Logits()
        args = arguments(tmp_path, **settings)
        trainer = WithScaler(
            model=build_model(FLOAT), args=args, train_dataset=data, callbacks=[logits, LateOverflow(step)]
        )
        trainer.train()
        found.append((trainer, logits.logits))
    plain = run(tmp_path, data=data, **settings)
    torch.testing.assert_close(flat_parameters(found[0][0].model), plain.parameters, rtol=0, atol=1e-12)
    overflowed = found[1][1]
    assert torch.equal(overflowed[1], overflowed[2])
    assert not torch.equal(overflowed[2], overflowed[3])


@pytest.mark.parametrize(
    ("balancer", "settings", "plugin", "message"),
    [
        (
            "exact",
            {"gradient_accumulation_steps": 2},
            None,
            r"^balance_over: 'micro_batch' is not valid with mode: 'exact' under gradient accumulation, use 'window'",
        ),
        (
            "commit",
            {"gradient_accumulation_steps": 2},
            None,
            r"^balance_over: 'micro_batch' is not valid with mode: 'commit' under gradient accumulation, use 'window'",
        ),
        ("exact", {}, "deepspeed", r"^balancer\.mode: 'exact' is not valid with DeepSpeed, .* use mode: 'commit'"),
        (
            "commit",
            {},
            "fsdp",
            r"^balancer\.mode: 'commit' is not valid with version 1 of FSDP, use version 2, or mode: 'lagged'",
        ),
        ("exact", {}, "fsdp", r"^balancer\.mode: 'exact' is not valid with FSDP"),
        (
            "exact",
            {"optim": "adalomo"},
            None,
            r"^balancer\.mode: 'exact' is not valid with optim: adalomo, which steps",
        ),
        (
            "exact",
            {"optim": "galore_adamw_layerwise"},
            None,
            r"^balancer\.mode: 'exact' is not valid with optim: galore_adamw_layerwise",
        ),
    ],
)
def test_refused_before_training(
    balancer: str, settings: Any, plugin: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if plugin is not None:
        with_plugin(plugin)(monkeypatch)
    with pytest.raises(OptionError, match=message):
        run(tmp_path, balancer=MODES[balancer], **settings)


def test_lagged_is_fine_where_the_others_are_refused(tmp_path: Path) -> None:
    data = build_data(4 * BATCH, dtype=FLOAT)
    found = run(tmp_path, data=data, balancer=MODES["lagged"], gradient_accumulation_steps=2)
    assert found.trainer.state.global_step == 2


def test_a_function_is_given_by_its_name(tmp_path: Path) -> None:
    function = {**OWN, "upper_level": lambda losses, known: losses.sum()}
    with pytest.raises(OptionError, match=r"^balancer\.upper_level: <function .* expected its name: path/to/file\.py:"):
        arguments(tmp_path, balancer=function)


def test_a_loss_that_a_trial_brings_out_of_bounds_is_named_with_its_step(tmp_path: Path) -> None:
    def losses(outputs: Any, batch: Any) -> Any:
        found, items = masked_mse(outputs.logits, batch["labels"])
        return found - 0.2, items

    data = build_data(20 * BATCH, dtype=FLOAT)
    with pytest.raises(
        NonFiniteLossError, match=r"^step \d+: the loss of task '\w+' is -.* after a trial step, but bal"
    ):
        run(
            tmp_path,
            data=data,
            balancer={**MODES["exact"], "beta": 0.001},
            learning_rate=0.5,
            trainer_arguments={"task_loss_func": losses},
        )
