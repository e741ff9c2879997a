"""How many items stand behind a loss that comes without a count: in evaluation, training, windows; and what is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from hf_bilb import BilevelMTLTrainer
from hf_bilb.errors import NonFiniteLossError
from hf_bilb.trainer.item_counts import ItemCounter
from tests.synthetic import SyntheticData
from tests.trainer.harness import (
    BATCH,
    FLOAT,
    TASK_NAMES,
    arguments,
    batches,
    build_data,
    build_model,
    close,
    flat_parameters,
    run,
)
from tests.trainer.test_losses import LogitsModel

NAN = torch.nan


class Rows(Dataset):
    """Rows of the columns given."""

    def __init__(self, **columns: Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


class Constant(nn.Module):
    """Predicts one number, 0 at first, for everything."""

    def __init__(self) -> None:
        super().__init__()
        self.number = nn.Parameter(torch.zeros((), dtype=FLOAT))

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        return {"logits": features[:, 0] * 0 + self.number}


def evaluated(folder: Path, data: Dataset, losses: Any, label_names: list[str], **settings: Any) -> dict[str, float]:
    trainer = BilevelMTLTrainer(
        model=Constant(),
        args=arguments(folder, **{"label_names": label_names, "task_names": ["a", "b"], **settings}),
        eval_dataset=data,
        task_loss_func=losses,
    )
    return trainer.evaluate()


# --- evaluation: the number of labels, whatever their layout ------------------------------------------------------


def scattered(*shape: int) -> Tensor:
    """Ones with a 10 alone in the last batch, all others of which are missing."""
    values = torch.ones(3 * BATCH, *shape, dtype=FLOAT)
    values[2 * BATCH :] = NAN
    values[2 * BATCH + 1] = 10.0
    return values


#: Mean of the squares: 8 ones and one 100 in 9 labels; a mean of the batches' would be 34 or so.
EXACT = (2 * BATCH + 100) / (2 * BATCH + 1)
FEATURES = torch.zeros(3 * BATCH, 2, dtype=FLOAT)
ONES = torch.ones(3 * BATCH, dtype=FLOAT)


def means(outputs: Any, batch: Any) -> dict[str, Tensor]:
    """Of each task over its labelled entries, from columns `a` and `b`."""
    found = {}
    for name in ("a", "b"):
        there = ~batch[name].isnan()
        predictions = outputs["logits"].view(-1, *[1] * (there.ndim - 1)).expand_as(there)
        found[name] = functional.mse_loss(predictions[there], batch[name][there])
    return found


def of_one_column(outputs: Any, batch: Any) -> Tensor:
    columns = dict(zip("ab", batch["labels"].unbind(1), strict=True))
    return torch.stack(list(means(outputs, columns).values()))


def tokens(missing: int) -> Tensor:
    """Whole numbers `[12, 3]`: 1, a single 10 in the last batch, whose others are `missing`."""
    return scattered(3).nan_to_num(missing).long()


def of_integers(missing: int) -> Callable[[Any, Any], dict[str, Tensor]]:
    def losses(outputs: Any, batch: Any) -> dict[str, Tensor]:
        labels = batch["b"].to(FLOAT)
        return means(outputs, {"a": batch["a"], "b": labels.masked_fill(batch["b"] == missing, NAN)})

    return losses


@pytest.mark.parametrize(
    ("columns", "label_names", "losses", "settings"),
    [
        ({"a": ONES, "b": scattered()}, ["a", "b"], means, {}),
        ({"b": scattered(), "a": ONES}, ["b", "a"], means, {}),
        # More columns than tasks: those of the tasks' names.
        ({"weight": ONES, "b": scattered(), "a": ONES}, ["weight", "b", "a"], means, {}),
        # One column of the task's name, the other by what is left.
        (
            {"b": scattered(), "x": ONES},
            ["b", "x"],
            lambda outputs, batch: means(outputs, {"a": batch["x"], "b": batch["b"]}),
            {},
        ),
        ({"labels": torch.stack([ONES, scattered()], 1)}, ["labels"], of_one_column, {}),
        ({"a": ONES, "b": scattered(4)}, ["a", "b"], means, {}),
        ({"a": ONES, "b": tokens(-100)}, ["a", "b"], of_integers(-100), {}),
        ({"a": ONES, "b": tokens(255)}, ["a", "b"], of_integers(255), {"ignore_index": 255}),
    ],
)
def test_means_over_labels_are_weighted_by_their_number(
    columns: Any, label_names: list[str], losses: Any, settings: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = evaluated(tmp_path, Rows(features=FEATURES, **columns), losses, label_names, **settings)
    assert found["eval_loss_a"] == pytest.approx(1.0) and found["eval_loss_b"] == pytest.approx(EXACT, rel=1e-12)
    assert found["eval_loss"] == pytest.approx((1 + EXACT) / 2, rel=1e-12)
    assert not [record for record in caplog.records if record.name.startswith("hf_bilb")]


def test_counts_of_ones_own_come_first(tmp_path: Path) -> None:
    data = Rows(features=FEATURES, a=ONES, b=scattered())

    def with_counts(outputs: Any, batch: Any) -> Any:
        # The last batch counts nothing, whatever its labels say.
        count = torch.tensor(0.0 if batch["b"].isnan().any() else 1.0)
        return means(outputs, batch), {"a": count, "b": count}

    assert evaluated(tmp_path, data, with_counts, ["a", "b"])["eval_loss_b"] == pytest.approx(1.0)


def test_task_item_counts_come_before_the_columns(tmp_path: Path) -> None:
    trainer = BilevelMTLTrainer(
        model=Constant(),
        args=arguments(tmp_path, label_names=["a", "b"], task_names=["a", "b"]),
        eval_dataset=Rows(features=FEATURES, a=ONES, b=scattered()),
        task_loss_func=means,
        task_item_counts=lambda batch: torch.tensor([1, 2 * int(batch["b"].isnan().any()) + 1]),
    )
    # 1, 1 and 100 with counts 1, 1 and 3.
    assert trainer.evaluate()["eval_loss_b"] == pytest.approx(302 / 5)


@pytest.mark.parametrize("size", [3 * BATCH, BATCH])
def test_an_unknown_layout_is_said_once_where_it_matters(
    size: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    columns = {"x": ONES, "y": ONES, "z": scattered()}
    trainer = BilevelMTLTrainer(
        model=Constant(),
        args=arguments(tmp_path, label_names=list(columns), task_names=["a", "b"]),
        eval_dataset=Rows(features=FEATURES[:size], **{name: column[:size] for name, column in columns.items()}),
        task_loss_func=lambda outputs, batch: means(outputs, {"a": batch["x"] + batch["y"] - 1, "b": batch["z"]}),
    )
    for _ in range(2):
        trainer.evaluate()
    said = (
        "num_items: nothing tells how many labels tasks a, b have in a batch (label_names: ['x', 'y', 'z']); the batch"
    )
    # A single batch has nothing beside it.
    assert caplog.text.count(said) == (1 if size > BATCH else 0)
    assert "task_item_counts(batch) -> [K]" in caplog.text or size == BATCH


# --- what an evaluation lacks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("b", "a", "said"),
    [
        (NAN, 1.0, "eval: task 'b' has no label here; eval_loss is the mean of 1 of 2 tasks"),
        (NAN, NAN, "eval: all labels of a, b are missing (NaN or -100); there is no eval_loss"),
    ],
)
def test_tasks_without_labels_are_named_once(
    a: float, b: float, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = Rows(features=FEATURES, a=ONES * a, b=ONES * b)
    trainer = BilevelMTLTrainer(
        model=Constant(),
        args=arguments(tmp_path, label_names=["a", "b"], task_names=["a", "b"]),
        eval_dataset=data,
        task_loss_func=means,
    )
    for _ in range(2):
        found = {key for key in trainer.evaluate() if "loss" in key}
        assert found == (set() if a != a else {"eval_loss", "eval_loss_a"})
    assert caplog.text.count(said) == 1
    trainer.evaluate(data, metric_key_prefix="other")
    assert caplog.text.count(said.replace("eval", "other")) == 1
    caplog.clear()
    trainer.predict(Rows(features=FEATURES))
    trainer.predict(Rows(features=FEATURES, a=ONES * NAN, b=ONES * NAN))
    assert "label" not in caplog.text


def test_nan_labels_in_a_plain_mean_are_pointed_to(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def plain(outputs: Any, batch: Any) -> dict[str, Tensor]:
        return {name: (outputs["logits"] - batch[name]).square().mean() for name in ("a", "b")}

    data = Rows(features=FEATURES, a=ONES, b=scattered())
    assert evaluated(tmp_path, data, plain, ["a", "b"])["eval_loss_b"] != 0
    assert "eval: the loss of b is nan; NaN labels stand for missing ones: leave them out before the" in caplog.text
    with pytest.raises(NonFiniteLossError) as caught:
        run(
            tmp_path,
            Constant(),
            data,
            trainer_arguments={"task_loss_func": plain},
            label_names=["a", "b"],
            task_names=["a", "b"],
        )
    assert str(caught.value) == (
        "the loss of task 'b' is nan at step 3; 3 of its 4 labels in this step are NaN, which stands for missing ones: "
        "leave them out before the mean (masked_mse, masked_l1, masked_bce_with_logits of hf_bilb.losses.masked do); "
        "if they are, fix the data or the model"
    )


# --- training -----------------------------------------------------------------------------------------------------


def selected_means(outputs: Any, batch: Any) -> Tensor:
    """Of each task over its labelled rows, without counts: NaN where a batch has none."""
    errors = (outputs["logits"] - batch["labels"].nan_to_num()).square()
    there = ~batch["labels"].isnan()
    return torch.stack([errors[there[:, k], k].mean() for k in range(there.shape[1])])


COMMON: dict[str, Any] = {"task_names": TASK_NAMES, "label_names": ["labels"], "balancer": "ls"}


def plain_sgd(data: SyntheticData, size: int) -> Tensor:
    """The parameters after SGD on the sum of the present tasks' means over whole batches, and no library."""
    model = build_model(FLOAT)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for batch in batches(data, size):
        optimizer.zero_grad()
        losses = selected_means({"logits": model(batch["features"]).logits}, batch)
        losses[~losses.isnan()].sum().backward()
        optimizer.step()
    return flat_parameters(model)


def sparse() -> SyntheticData:
    """Half of the labels are missing, all of `beta` in batch 2 and all of `gamma` in the first two."""
    data = build_data(6 * BATCH, dtype=FLOAT, missing=0.5)
    data.labels[BATCH : 2 * BATCH, 1] = NAN
    data.labels[: 2 * BATCH, 2] = NAN
    return data


@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_losses_without_counts_train_as_whole_batches(
    accumulation: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Losses that are NaN as a micro-batch has no label leave no trace.
    model = LogitsModel()
    found = run(
        tmp_path,
        model,
        sparse(),
        trainer_arguments={"task_loss_func": selected_means},
        gradient_accumulation_steps=accumulation,
        **COMMON,
    )
    assert close(flat_parameters(model.inner), plain_sgd(sparse(), accumulation * BATCH))
    there = sparse().labels.isfinite().view(-1, accumulation * BATCH, 4).any(1).tolist()
    logged = [[entry.get(f"loss/{task}") is not None for task in TASK_NAMES] for entry in found.steps]
    assert logged == there
    assert not [record for record in caplog.records if record.name.startswith("hf_bilb")]


def test_unknown_counts_are_said_in_training_where_they_matter(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = build_data(4 * BATCH, dtype=FLOAT)
    rows = Rows(features=data.features, x=data.labels[:, :2], y=data.labels[:, 2:])

    def losses(outputs: Any, batch: Any) -> Tensor:
        return (outputs["logits"] - torch.cat([batch["x"], batch["y"]], 1)).square().mean(0)

    for accumulation in (1, 2):
        caplog.clear()
        model = LogitsModel()
        run(
            tmp_path,
            model,
            rows,
            trainer_arguments={"task_loss_func": losses},
            gradient_accumulation_steps=accumulation,
            **{**COMMON, "label_names": ["x", "y"]},
        )
        # Nothing is missing: the batch sizes are right.
        assert close(flat_parameters(model.inner), plain_sgd(data, accumulation * BATCH))
        assert caplog.text.count("num_items: nothing tells how many labels tasks alpha, beta, gamma, delta have") == (
            accumulation - 1
        )


# --- windows ------------------------------------------------------------------------------------------------------


def coded(data: SyntheticData, first: int = 0) -> SyntheticData:
    """Missing labels are -1 from row `first` on, which no column tells."""
    labels = data.labels.clone()
    labels[first:] = labels[first:].nan_to_num(-1.0)
    return SyntheticData(data.features, labels)


def decoded(outputs: Any, batch: Any) -> tuple[Tensor, Tensor]:
    there = (batch["labels"] != -1) & ~batch["labels"].isnan()
    errors = torch.where(there, outputs["logits"] - batch["labels"].nan_to_num(), 0.0).square()
    return errors.sum(0) / there.sum(0).clamp(min=1), there.sum(0)


class Counting(LogitsModel):
    """Counts its forward passes, with and without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = {True: 0, False: 0}

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        self.passes[torch.is_grad_enabled()] += 1
        return super().forward(features)


def windows(folder: Path, data: SyntheticData, losses: Any, **more: Any) -> Counting:
    model = Counting()
    run(
        folder,
        model,
        data,
        trainer_arguments={"task_loss_func": losses, **more},
        gradient_accumulation_steps=2,
        **COMMON,
    )
    return model


def test_counts_of_the_losses_that_the_columns_do_not_tell(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = sparse()
    expected = plain_sgd(data, 2 * BATCH)
    model = windows(tmp_path, coded(data), decoded)
    assert close(flat_parameters(model.inner), expected)
    said = (
        "gradient accumulation: the batches do not tell how many items tasks alpha, beta, gamma, delta have in a whole"
    )
    assert caplog.text.count(said) == 1
    assert model.passes == {True: 6, False: 6}
    # What the batches do tell costs one look, at the first window.
    caplog.clear()
    model = windows(tmp_path, data, decoded)
    assert close(flat_parameters(model.inner), expected) and model.passes == {True: 6, False: 2}
    model = windows(tmp_path, coded(data), decoded, task_item_counts=lambda batch: (batch["labels"] != -1).sum(0))
    assert close(flat_parameters(model.inner), expected) and model.passes == {True: 6, False: 2}
    assert "gradient accumulation" not in caplog.text


def test_task_item_counts_that_are_wrong_are_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = windows(tmp_path, sparse(), decoded, task_item_counts=lambda batch: torch.full((4,), BATCH))
    assert close(flat_parameters(model.inner), plain_sgd(sparse(), 2 * BATCH))
    assert caplog.text.count("gradient accumulation: the batches do not tell") == 1


def test_counts_that_differ_later_are_found_when_the_trainer_logs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # The second of five windows differs; seen at the next one's log, the fourth is exact again.
    data = build_data(10 * BATCH, dtype=FLOAT, missing=0.5)
    model = windows(tmp_path, coded(data, 2 * BATCH), decoded)
    assert caplog.text.count("since the last log the batches told other counts than num_items of the losses for ") == 1
    assert model.passes == {True: 10, False: 2 + 4}
    assert not close(flat_parameters(model.inner), plain_sgd(data, 2 * BATCH), 1e-6)


def test_a_column_that_only_the_loss_needs_is_no_label() -> None:
    labels = torch.tensor([[1.0, torch.nan], [2.0, torch.nan], [3.0, 4.0]])
    batch = {"labels": labels, "weight": torch.ones(3), "mask": torch.ones(3)}
    for names in (["labels"], ["labels", "weight"], ["weight", "labels"], ["labels", "weight", "mask"]):
        assert ItemCounter(None, names, ["a", "b"]).count(batch).num_items.tolist() == [3, 1]
    vectors = {"labels": labels[:, :, None].expand(3, 2, 5), "weight": torch.ones(3)}
    assert ItemCounter(None, ["labels", "weight"], ["a", "b"]).count(vectors).num_items.tolist() == [15, 5]
    # Columns named as the tasks are theirs, whatever else is called `labels`.
    named = {"a": torch.ones(3), "labels": labels}
    assert ItemCounter(None, ["a", "labels"], ["a", "b"]).count(named).num_items.tolist() == [3, 4]
