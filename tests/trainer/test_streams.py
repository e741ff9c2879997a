"""Training data without a length: passes like those of sized data, and a resume in any of them is exact."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets.distributed import split_dataset_by_node
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_bilb import BilevelMTLTrainer
from hf_bilb.errors import CheckpointError, OptionError
from hf_bilb.trainer.data_trainer import say_split_already
from tests.synthetic import build_data, build_model, flat_parameters
from tests.trainer.harness import BATCH, FLOAT, arguments, plain_settings, untimed

ROWS = 4 * BATCH + 2
STEPS = 14


class Stream(IterableDataset):
    """Rows in order, without their number."""

    def __init__(self, size: int = ROWS) -> None:
        self.rows = build_data(size, dtype=FLOAT, missing=0.2)

    def order(self) -> list[int]:
        return list(range(len(self.rows)))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self.rows[i] for i in self.order())


class ByEpoch(Stream):
    """Other rows, and as many as it likes, in each pass, by `set_epoch`."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def order(self) -> list[int]:
        order = super().order()
        random.Random(self.epoch).shuffle(order)
        return order[: ROWS - BATCH * (self.epoch % 3)]


class ByChance(Stream):
    """An order from the default generators of torch, Python and numpy."""

    def order(self) -> list[int]:
        order = torch.randperm(ROWS).tolist()
        random.shuffle(order)
        return order[: int(np.random.randint(2 * BATCH, ROWS))]


class OwnGenerator(Stream):
    """An order from a generator of its own, as accelerate expects it."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(5)

    def order(self) -> list[int]:
        return torch.randperm(ROWS, generator=self.generator).tolist()


def of_the_hub() -> datasets.IterableDataset:
    rows = Stream().rows
    columns = {"features": rows.features.tolist(), "labels": rows.labels.tolist()}
    return datasets.Dataset.from_dict(columns).to_iterable_dataset(num_shards=3).shuffle(seed=3, buffer_size=5)


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {name: torch.stack([torch.as_tensor(row[name], dtype=FLOAT) for row in rows]) for name in rows[0]}


def trainer_for(
    folder: Path, data: Any, callbacks: Any = None, dropout: float = 0.2, **settings: Any
) -> BilevelMTLTrainer:
    defaults = {
        "balancer": "bilb",
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": 1,
        "optim": "adamw_torch",
    }
    return BilevelMTLTrainer(
        model=build_model(FLOAT, dropout=dropout),
        args=arguments(folder, **{**defaults, "learning_rate": 0.01, "optim": "adamw_torch", **settings}),
        train_dataset=data,
        eval_dataset=build_data(BATCH, dtype=FLOAT),
        data_collator=collate,
        callbacks=callbacks,
    )


def assert_goes_on(
    folder: Path, make: Callable[[], Any], at: list[int], callback: Any = None, **settings: Any
) -> BilevelMTLTrainer:
    """From each of the checkpoints `at`: parameters, balancer and logs end as without interruption, to the bit."""
    callbacks = None if callback is None else [callback]
    whole = trainer_for(folder, make(), callbacks, **settings)
    whole.train()
    assert len(at) > 0
    for step in at:
        resumed = trainer_for(folder / f"from-{step}", make(), callbacks, **settings)
        resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        assert torch.equal(flat_parameters(resumed.model), flat_parameters(whole.model)), step
        assert untimed(resumed.state.log_history) == untimed(whole.state.log_history), step
        ours, theirs = resumed.balancer.state_dict(), whole.balancer.state_dict()
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0, equal_nan=True)
    return whole


@pytest.mark.parametrize("make", [Stream, ByEpoch, ByChance, OwnGenerator, of_the_hub])
def test_a_resume_in_any_pass_is_exact(make: Callable[[], Any], tmp_path: Path) -> None:
    # Passes end after 5 steps: checkpoints in the first, at its end, in the second and in the third.
    whole = assert_goes_on(tmp_path, make, [3, 5, 8, 12])
    assert whole.state.epoch > 2


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2},
        {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2, "balance_over": "window"},
        {"balancer": {"name": "dwa", "window": "epoch"}},
        {"balancer": {"name": "bilb", "reference": "every_epoch"}, "gradient_accumulation_steps": 2},
        {"save_strategy": "epoch", "eval_strategy": "epoch", "gradient_accumulation_steps": 2},
    ],
)
def test_windows_and_methods_that_count_passes(settings: dict[str, Any], tmp_path: Path) -> None:
    at = [2, 3, 8, 11]
    if "save_strategy" in settings:
        at = [3, 5]
    assert_goes_on(tmp_path, ByEpoch, at, **settings)


def test_worker_processes(tmp_path: Path) -> None:
    assert_goes_on(tmp_path, of_the_hub, [9], dataloader_num_workers=2)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("over", ["micro_batch", "window"])
def test_a_pass_is_one_of_sized_data(accumulation: int, over: str, tmp_path: Path) -> None:
    # 18 rows: the last batch of a pass is short, and so is its last update under accumulation.
    settings = {"gradient_accumulation_steps": accumulation, "balance_over": over, "save_strategy": "no"}
    found = [trainer_for(tmp_path, data, dropout=0.0, **settings) for data in (Stream(), Stream().rows)]
    for trainer in found:
        trainer.train()
    stream, sized = found
    assert torch.equal(flat_parameters(stream.model), flat_parameters(sized.model))
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in found]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS


def test_a_pass_shorter_than_an_update(tmp_path: Path) -> None:
    # Trainer would never step: no pass has enough micro-batches.
    trainer = trainer_for(tmp_path, Stream(BATCH), max_steps=3, gradient_accumulation_steps=4, save_strategy="no")
    trainer.train()
    assert trainer.state.global_step == 3


def test_an_epoch_of_sized_data_that_a_callback_cuts_short(tmp_path: Path) -> None:
    class CutShort(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_epoch_stop = state.global_step % 3 == 0

    settings = {"max_steps": -1, "num_train_epochs": 4, "train_sampling_strategy": "random"}
    rows = Stream().rows
    whole = assert_goes_on(tmp_path, lambda: rows, [3, 4, 8], CutShort(), **settings)
    assert whole.state.global_step == 12


def test_what_was_finished_stays_as_it_is(tmp_path: Path) -> None:
    whole = trainer_for(tmp_path, Stream(), max_steps=7)
    whole.train()
    again = trainer_for(tmp_path / "again", Stream(), max_steps=7)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert again.state.global_step == 7
    assert torch.equal(flat_parameters(again.model), flat_parameters(whole.model))


# --- what cannot be exact is said ---------------------------------------------------------------------------------


def test_without_a_position_the_state_of_trainer_tells_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = trainer_for(tmp_path, Stream())
    whole.train()
    checkpoint = tmp_path / "checkpoint-8"
    (checkpoint / "data_position_0.json").unlink()
    resumed = trainer_for(tmp_path / "other", Stream())
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert (
        "holds no data_position_0.json: by its trainer_state.json it was saved after 3 updates of pass 1" in caplog.text
    )
    assert torch.equal(flat_parameters(resumed.model), flat_parameters(whole.model))


def test_what_trainer_counts_is_what_its_state_is_read_for(tmp_path: Path) -> None:
    # Stock Trainer, in its own words: the third pass, after one update.
    from hf_bilb.trainer.data_position import position_of_state

    args = TrainingArguments(**plain_settings(tmp_path, max_steps=11, gradient_accumulation_steps=1))

    class Summed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build_model(FLOAT)

        def forward(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": self.inner(features, labels).losses.sum()}

    trainer = Trainer(model=Summed(), args=args, train_dataset=Stream())
    trainer.train()
    trainer.state.max_steps = 11
    found = position_of_state(trainer.state)
    assert found is not None and (found.epoch, found.updates, found.global_step) == (2, 1, 11)


def test_data_that_shall_not_be_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer_for(tmp_path, Stream()).train()
    resumed = trainer_for(tmp_path / "other", Stream(), ignore_data_skip=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert "ignore_data_skip: pass 1 over the training data begins again, though 3 updates" in caplog.text
    assert resumed.state.epoch > 2


def test_another_batch_size(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer_for(tmp_path, Stream()).train()
    for size, accumulation, said in ((1, BATCH, False), (3, 1, False), (5, 1, True)):
        caplog.clear()
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        resumed = trainer_for(tmp_path / "other", Stream(), **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
        assert ("the training data go on at the nearest update" in caplog.text) == said


def test_a_damaged_position_is_one_line(tmp_path: Path) -> None:
    trainer_for(tmp_path, Stream(), max_steps=2).train()
    path = tmp_path / "checkpoint-2" / "data_position_0.json"
    for found in ("[]", '{"format": 1}', path.read_text().replace('"epoch": 0', '"epoch": -1'), "{"):
        path.write_text(found)
        with pytest.raises(CheckpointError, match=r"data_position_0\.json: .*is damaged") as error:
            trainer_for(tmp_path / "other", Stream()).train(resume_from_checkpoint=str(path.parent))
        assert "\n" not in str(error.value)


def test_a_stream_that_is_split_already(caplog: pytest.LogCaptureFixture) -> None:
    whole = of_the_hub()
    for data, ranks, said in ((whole, 2, False), (split_dataset_by_node(whole, 0, 2), 1, False), (Stream(), 2, False)):
        say_split_already(data, "eval_dataset", ranks)
        assert bool(caplog.text) == said
    say_split_already(split_dataset_by_node(whole, 0, 2), "eval_dataset", 2)
    assert "eval_dataset: split_dataset_by_node has divided it among 2 ranks" in caplog.text


# --- data that are not there --------------------------------------------------------------------------------------


def refusal(trainer: BilevelMTLTrainer, call: str = "train") -> str:
    with pytest.raises(OptionError) as error:
        getattr(trainer, call)()
    assert "\n" not in str(error.value) and trainer.state.global_step == 0
    return str(error.value)


def test_empty_data_are_one_line_before_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    some, none = build_data(6, dtype=FLOAT), datasets.Dataset.from_dict({"features": [], "labels": []})
    assert refusal(trainer_for(tmp_path, none)) == "train_dataset: is empty, expected at least one example"
    few = trainer_for(tmp_path, some, dataloader_drop_last=True, per_device_train_batch_size=8, max_steps=-1)
    assert refusal(few) == (
        "train_dataset: 6 examples make no batch of 8 on each of 1 rank(s); expected more, or "
        "dataloader_drop_last: false"
    )
    stream = Stream()
    stream.order = list  # type: ignore[method-assign]
    assert refusal(trainer_for(tmp_path, stream)) == (
        "train_dataset: gave no batch at all, expected at least one example"
    )
    evaluated = trainer_for(tmp_path, some, eval_strategy="steps", eval_steps=1)
    evaluated.eval_dataset = {"near": some, "far": none}
    assert refusal(evaluated) == "eval_dataset['far']: is empty, expected at least one example"
    evaluated.eval_dataset = none
    assert refusal(evaluated, "evaluate") == "eval_dataset: is empty, expected at least one example"
    evaluated.eval_dataset = stream
    assert refusal(evaluated, "evaluate") == "eval_dataset: gave no batch at all, expected at least one example"


def test_evaluation_drops_no_rows(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, None, dataloader_drop_last=True)
    data = build_data(BATCH + 1, dtype=FLOAT)
    with torch.no_grad():
        expected = (trainer.model.eval()(data.features).logits - data.labels).square().mean(0).tolist()
    metrics = trainer.evaluate(data)
    assert [metrics[f"eval_loss_{name}"] for name in trainer.task_names] == pytest.approx(expected, rel=1e-12)
    assert len(trainer.predict(data).predictions) == BATCH + 1 and trainer.args.dataloader_drop_last
