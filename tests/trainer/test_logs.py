"""What is logged: recomputed by hand, read back from TensorBoard's files, summarised for many tasks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from hf_bilb import BilevelMTLTrainer
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

BILB = {"name": "bilb", "normalization": "none", "pairs": "adjacent", "discrepancy_weight": 0.02, "learning_rate": 0.1}


def partial() -> SyntheticData:
    data = build_data(6 * BATCH, dtype=FLOAT, missing=0.4)
    data.labels.view(6, BATCH, -1)[2, :, 1] = torch.nan
    data.labels.view(6, BATCH, -1)[:4, :, 3] = torch.nan
    return data


def bilb_by_hand(losses: Tensor, sigma: Tensor, weight: float) -> tuple[float, float]:
    """(F, f) of `BILB` over the given tasks."""
    f = sum(abs(float(sigma[i] * losses[i] - sigma[i + 1] * losses[i + 1])) for i in range(len(losses) - 1))
    return float((sigma * losses).sum() / sigma.sum()) + weight * f, f


def recorded_losses(found: Run, data: SyntheticData) -> list[tuple[Tensor, Tensor]]:
    """Losses and counts `[K]` of each step, at the parameters before it, from the definition."""
    model, result = build_model(FLOAT), []
    before = [flat_parameters(model), *found.record.parameters[:-1]]
    for vector, batch in zip(before, batches(data), strict=True):
        torch.nn.utils.vector_to_parameters(vector, model.parameters())
        with torch.no_grad():
            errors = (model(batch["features"]).logits - batch["labels"]).square()
        result.append((errors.nanmean(0).nan_to_num(), errors.isfinite().sum(0)))
    return result


@pytest.mark.parametrize("interval", [1, 2, 3])
def test_every_entry_by_hand(interval: int, tmp_path: Path) -> None:
    data = partial()
    found = run(tmp_path, data=data, balancer=BILB, logging_steps=interval)
    assert len(found.steps) == 6 // interval
    steps = recorded_losses(found, data)
    sigmas, coefficients = found.record.weights, found.record.coefficients
    values = []
    for (losses, counts), sigma in zip(steps, sigmas, strict=True):
        here = counts > 0
        values.append((*bilb_by_hand(losses[here], sigma[here], 0.02), float(losses[here].mean())))
    for n, entry in enumerate(found.steps):
        part = range(n * interval, (n + 1) * interval)
        assert entry["loss"] == pytest.approx(sum(values[t][0] for t in part) / interval, rel=1e-12)
        assert entry["discrepancy"] == pytest.approx(sum(values[t][1] for t in part) / interval, rel=1e-12)
        assert entry["loss_mean"] == pytest.approx(sum(values[t][2] for t in part) / interval, rel=1e-12)
        for k, task in enumerate(TASK_NAMES):
            there = [t for t in part if steps[t][1][k] > 0]
            if not there:
                assert all(f"{kind}/{task}" not in entry for kind in ("loss", "weight", "coefficient"))
                continue
            items = sum(float(steps[t][1][k]) for t in there)
            mean = sum(float(steps[t][0][k] * steps[t][1][k]) for t in there) / items
            assert entry[f"loss/{task}"] == pytest.approx(mean, rel=1e-12)
            for kind, vectors in (("weight", sigmas), ("coefficient", coefficients)):
                expected = sum(float(vectors[t][k]) for t in there) / len(there)
                assert entry[f"{kind}/{task}"] == pytest.approx(expected, rel=1e-12)
    output = found.trainer.state.log_history[-1]
    assert output["train_loss"] == pytest.approx(sum(value[0] for value in values) / 6, rel=1e-12)


def test_the_training_output_is_the_mean_of_f(tmp_path: Path) -> None:
    args = arguments(tmp_path, balancer="si", logging_steps=4)
    trainer = BilevelMTLTrainer(model=build_model(FLOAT), args=args, train_dataset=build_data(6 * BATCH, dtype=FLOAT))
    output = trainer.train()
    every = run(tmp_path, data=build_data(6 * BATCH, dtype=FLOAT), balancer="si")
    assert output.training_loss == pytest.approx(sum(every.logged("loss")) / 6, rel=1e-12)
    assert output.metrics["train_loss"] == output.training_loss == trainer.state.log_history[-1]["train_loss"]


def test_accumulation_logs_of_a_linear_method_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    data = build_data(6 * BATCH, dtype=FLOAT, missing=0.5)
    data.labels[:BATCH, 2] = torch.nan
    whole = run(tmp_path, data=data, balancer="ls", per_device_train_batch_size=2 * BATCH)
    parts = run(tmp_path, data=data, balancer="ls", gradient_accumulation_steps=2)
    for key in ("loss", "loss_mean", *(f"loss/{task}" for task in TASK_NAMES)):
        assert parts.logged(key) == pytest.approx(whole.logged(key), rel=1e-12)


@pytest.mark.parametrize("balancer", [{**BILB, "learning_rate": 0.0}, "si"], ids=["bilb", "si"])
def test_accumulation_logs_the_windows_f_to_first_order(balancer: Any, tmp_path: Path) -> None:
    # `si` is not homogeneous: there the share of all items shows.
    # Micro-batch m with the share f_m of all items and e_mk of task k's: f_m F_m + sum_k c_mk l_mk (e_mk - f_m), in
    # which the part of F that is linear in the losses is exact.
    data = build_data(6 * BATCH, dtype=FLOAT, missing=0.5)
    frozen: dict[str, Any] = {"data": data, "balancer": balancer, "learning_rate": 0.0}
    single, window = run(tmp_path, **frozen), run(tmp_path, **frozen, gradient_accumulation_steps=2)
    items = data.labels.view(6, BATCH, -1).isfinite().sum(1).to(FLOAT)
    losses = torch.stack([loss for loss, _ in recorded_losses(single, data)])
    values, coefficients = torch.tensor(single.logged("loss"), dtype=FLOAT), torch.stack(single.record.coefficients)
    for n, entry in enumerate(window.steps):
        part = slice(2 * n, 2 * n + 2)
        of_all, of_task = items[part].sum(1) / items[part].sum(), items[part] / items[part].sum(0)
        linear = coefficients[part] * losses[part] * (of_task - of_all.unsqueeze(1))
        assert entry["loss"] == pytest.approx(float((of_all * values[part]).sum() + linear.sum()), rel=1e-12)


def test_a_step_without_labels_does_not_dilute_the_means(tmp_path: Path) -> None:
    data = build_data(3 * BATCH, dtype=FLOAT)
    gap = SyntheticData(data.features.clone(), data.labels.clone())
    gap.labels[BATCH : 2 * BATCH] = torch.nan
    found = run(tmp_path, data=gap, balancer="ls", logging_steps=3)
    kept = torch.cat([torch.arange(BATCH), torch.arange(2 * BATCH, 3 * BATCH)])
    clean = run(tmp_path, data=SyntheticData(data.features[kept], data.labels[kept]), balancer="ls", logging_steps=2)
    for key in ("loss", "loss_mean", "loss/alpha", "coefficient/alpha"):
        assert found.logged(key) == pytest.approx(clean.logged(key), rel=1e-12)


def test_guards_speak_once_through_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, balancer={"name": "bilb", "preset": "celeba", "discrepancy_weight": 10.0})
    texts = [record.getMessage() for record in caplog.records if record.name.startswith("hf_bilb")]
    assert sum("balancer bilb: a coefficient was negative" in text for text in texts) == 1
    assert sum("beyond its edge" in text for text in texts) == 1


# --- TensorBoard --------------------------------------------------------------------------------------------------


def test_tensorboard_files_hold_what_was_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "events"
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(folder))
    found = run(tmp_path, data=partial(), balancer=BILB, logging_steps=2, report_to=["tensorboard"])
    (file,) = folder.rglob("events.out.tfevents*")
    events = EventAccumulator(str(file), size_guidance={"scalars": 0})
    events.Reload()
    wanted = [f"{kind}/{task}" for kind in ("loss", "weight", "coefficient") for task in TASK_NAMES]
    for key in ["loss", "loss_mean", "discrepancy", *wanted]:
        expected = {entry["step"]: entry[key] for entry in found.steps if key in entry}
        written = {event.step: event.value for event in events.Scalars(f"train/{key}")}
        # Written as float32.
        assert written == pytest.approx(expected, rel=1e-6), key
    assert len(events.Scalars("train/loss/alpha")) == 3 and len(events.Scalars("train/loss/delta")) == 1


# --- callbacks ----------------------------------------------------------------------------------------------------


def test_callbacks_read_the_balancer_in_every_event(tmp_path: Path) -> None:
    events: dict[str, Any] = {}

    class Reader(TrainerCallback):
        pass

    def reader(event: str) -> Any:
        def call(self: Any, args: Any, state: Any, control: Any, balancer: Any = None, **kwargs: Any) -> None:
            events.setdefault(event, []).append((state.global_step, balancer, balancer.coefficients))

        return call

    names = ["on_train_begin", "on_epoch_begin", "on_step_begin", "on_pre_optimizer_step", "on_optimizer_step"]
    names += ["on_step_end", "on_log", "on_epoch_end", "on_train_end"]
    for name in names:
        setattr(Reader, name, reader(name))
    found = run(tmp_path, trainer_arguments={"callbacks": [Reader()]}, balancer="bilb")
    assert set(events) == set(names)
    assert all(balancer is found.trainer.balancer for calls in events.values() for _, balancer, _ in calls)
    logged = [[entry[f"coefficient/{task}"] for task in TASK_NAMES] for entry in found.steps]
    read = [coefficients.tolist() for _, _, coefficients in events["on_step_end"]]
    assert [step for step, _, _ in events["on_step_end"]] == [1, 2, 3, 4, 5]
    for ours, theirs in zip(read, logged, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-12)


def test_callbacks_see_the_router_after_its_step(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    class Reader(TrainerCallback):
        def on_optimizer_step(self, *args: Any, balancer: Any, **kwargs: Any) -> None:
            seen.append(balancer.state_dict()["objective.router.logits"])

    found = run(tmp_path, trainer_arguments={"callbacks": [Reader()]}, balancer="bilb")
    assert not torch.equal(seen[0], torch.ones(4, dtype=FLOAT))
    assert torch.equal(seen[-1], found.trainer.balancer.state_dict()["objective.router.logits"])


# --- many tasks ---------------------------------------------------------------------------------------------------


def many(num_tasks: int) -> tuple[Any, SyntheticData]:
    names = [f"t{k}" for k in range(num_tasks)]
    data = build_data(4 * BATCH, num_tasks=num_tasks, dtype=FLOAT, missing=0.3)
    data.labels[: 2 * BATCH, 5] = torch.nan
    return build_model(FLOAT, task_names=names), data


@pytest.mark.parametrize("num_tasks", [33, 1000])
def test_above_32_tasks_a_summary_and_a_file_of_vectors(num_tasks: int, tmp_path: Path) -> None:
    model, data = many(num_tasks)
    found = run(tmp_path, model, data, balancer="bilb", logging_steps=2)
    assert len(found.steps) == 2
    lines = [json.loads(line) for line in (tmp_path / "task_vectors.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4] and [line["epoch"] for line in lines] == [0.5, 1.0]
    for entry, line in zip(found.steps, lines, strict=True):
        assert len(entry) < 25 and not any("/t" in key for key in entry)
        assert set(line) == {"step", "epoch", "loss", "weight", "coefficient"}
        for kind in ("loss", "weight", "coefficient"):
            vector = line[kind]
            assert len(vector) == num_tasks
            known = [value for value in vector if value is not None]
            assert entry[f"{kind}/min"] == min(known) and entry[f"{kind}/max"] == max(known)
            assert entry[f"{kind}/mean"] == pytest.approx(sum(known) / len(known), rel=1e-12)
        assert line["loss"][int(entry["loss/worst_task"])] == entry["loss/max"]
    assert lines[0]["loss"][5] is None and lines[0]["coefficient"][5] is None and lines[1]["loss"][5] is not None
    assert found.parameters.isfinite().all()


def test_up_to_32_tasks_every_task_and_no_file(tmp_path: Path) -> None:
    model, data = many(32)
    found = run(tmp_path, model, data, balancer="bilb", logging_steps=4)
    assert sum(key.startswith("loss/t") for key in found.steps[0]) == 32
    assert not (tmp_path / "task_vectors.jsonl").exists()


def test_a_new_run_in_the_same_folder_starts_a_new_file(tmp_path: Path) -> None:
    for _ in range(2):
        model, data = many(33)
        run(tmp_path, model, data, logging_steps=2)
    lines = (tmp_path / "task_vectors.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4]


def test_logging_rarely_or_never_changes_nothing_else(tmp_path: Path) -> None:
    often, rarely = run(tmp_path), run(tmp_path, logging_steps=100)
    never = run(tmp_path, logging_strategy="no")
    assert torch.equal(often.parameters, rarely.parameters) and torch.equal(often.parameters, never.parameters)
    finals = [untimed([found.trainer.state.log_history[-1]])[0]["train_loss"] for found in (often, rarely, never)]
    assert finals == pytest.approx([finals[0]] * 3, rel=1e-12) and math.isfinite(finals[0])
    assert close(often.parameters, rarely.parameters)
