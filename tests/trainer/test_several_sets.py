"""`train_dataset={task: data set}`: batches of one set each with its own columns, evaluation sets of one task each."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset
from transformers import EvalPrediction

from hf_bilb import BilevelMTLTrainer, BilevelMTLTrainingArguments
from hf_bilb.errors import MissingColumnError, OptionError
from hf_bilb.trainer.item_counts import ItemCounter
from hf_bilb.trainer.sampling import TaskSampler, TaskSamplingOptions
from hf_bilb.trainer.task_datasets import TaskDatasets
from tests.synthetic import TASK_NAMES, SyntheticData, build_data, build_model, flat_parameters
from tests.trainer.harness import BATCH, FLOAT, assert_goes_on, plain_settings, untimed

NAN = float("nan")
#: Neither is a whole number of batches.
SIZES = {"topic": 22, "stars": 9}


def topics(size: int = SIZES["topic"], seed: int = 0) -> Dataset:
    drawn = torch.randn(size, 3, generator=torch.Generator().manual_seed(seed))
    return Dataset.from_dict(
        {"features": drawn.tolist(), "label": [i % 3 for i in range(size)], "title": ["-"] * size},
        features=Features(
            features=List(Value("float32")), label=ClassLabel(names=["a", "b", "c"]), title=Value("string")
        ),
    )


def stars(size: int = SIZES["stars"], seed: int = 1) -> Dataset:
    drawn = torch.randn(size, 3, generator=torch.Generator().manual_seed(seed))
    return Dataset.from_dict({"weight": [0.5] * size, "features": drawn.tolist(), "label": drawn.sum(1).tolist()})


class TwoHeads(nn.Module):
    """Three classes and a number; notes the columns and the labels that its forward gets."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads = nn.Linear(3, 4)
        self.calls: list[dict[str, Any]] = []

    def forward(self, features: Tensor, task_ids: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        self.calls.append({"task_ids": task_ids, "labels": labels})
        outputs = self.heads(features)
        if labels is None:
            return {"logits": outputs}
        task = int(task_ids[0])
        if task == 0:
            return {"losses": {"topic": functional.cross_entropy(outputs[:, :3], labels)}, "logits": outputs[:, :3]}
        return {"losses": {"stars": functional.mse_loss(outputs[:, 3], labels)}, "logits": outputs[:, 3]}


class FeaturesAlone(nn.Module):
    """A forward that knows of no task."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads = nn.Linear(3, 4)

    def forward(self, features: Tensor, **kwargs: Any) -> Tensor:
        assert not kwargs
        return self.heads(features)


def settings(folder: Path, **more: Any) -> BilevelMTLTrainingArguments:
    given = {"train_sampling_strategy": "random", "balancer": "ls", **more}
    return BilevelMTLTrainingArguments(**plain_settings(folder, **given))


def trainer_of(folder: Path, model: nn.Module | None = None, **more: Any) -> BilevelMTLTrainer:
    keys = ("train_dataset", "eval_dataset", "compute_metrics", "task_loss_func", "data_collator")
    arguments = {key: more.pop(key) for key in keys if key in more}
    return BilevelMTLTrainer(
        model=TwoHeads() if model is None else model,
        args=settings(folder, **more),
        **{"train_dataset": {"topic": topics(), "stars": stars()}, **arguments},
    )


def designed(tasks: Tensor, epochs: int, names: list[str], options: dict[str, Any] | None = None) -> list[list[int]]:
    """The rows of the sets, one set after the other, in the batches of the sampler, which has tests of its own."""
    sampler = TaskSampler(tasks, TaskSamplingOptions(**(options or {})), names, BATCH, seed=3)
    return [batch for epoch in range(epochs) for batch in sampler.order(epoch).view(-1, BATCH).tolist()]


# --- training -------------------------------------------------------------------------------------------------------


def learned_by_hand(epochs: int) -> tuple[Tensor, list[int]]:
    """SGD on the loss of each batch's set; the tasks of the batches."""
    rows = [*topics(), *stars()]
    tasks = torch.tensor([0] * SIZES["topic"] + [1] * SIZES["stars"])
    model = FeaturesAlone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    seen = []
    for batch in designed(tasks, epochs, ["topic", "stars"]):
        outputs = model(torch.tensor([rows[i]["features"] for i in batch]))
        labels = torch.tensor([rows[i]["label"] for i in batch])
        (task,) = {int(tasks[i]) for i in batch}
        seen.append(task)
        loss = functional.mse_loss(outputs[:, 3], labels) if task else functional.cross_entropy(outputs[:, :3], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return flat_parameters(model), seen


@pytest.mark.parametrize("workers", [0, 2])
def test_each_batch_is_of_one_set_and_trains_its_task(workers: int, tmp_path: Path) -> None:
    more = {"dataloader_num_workers": workers, "dataloader_persistent_workers": workers > 0}
    trainer = trainer_of(tmp_path, num_train_epochs=3, **more)
    assert trainer.task_names == ("topic", "stars")
    assert trainer.balancer.absent_tasks == "hold"
    trainer.train()
    expected, tasks = learned_by_hand(epochs=3)
    assert set(tasks) == {0, 1}
    torch.testing.assert_close(flat_parameters(trainer.model), expected, rtol=1e-5, atol=1e-6)
    calls = trainer.model.calls
    assert [call["task_ids"].tolist() for call in calls] == [[task] * BATCH for task in tasks]
    # Each set's labels are of their own type.
    kinds = {0: torch.int64, 1: torch.float32}
    assert all(call["labels"].dtype == kinds[task] for call, task in zip(calls, tasks, strict=True))
    assert all(call["task_ids"].dtype == torch.int64 for call in calls)


def losses(outputs: Tensor, batch: Any) -> dict[str, Tensor]:
    assert set(batch) == {"features", "labels", "task_ids"}
    if int(batch["task_ids"][0]) == 0:
        return {"topic": functional.cross_entropy(outputs[:, :3], batch["labels"])}
    return {"stars": functional.mse_loss(outputs[:, 3], batch["labels"])}


def test_a_loss_function_gets_the_tasks_that_the_model_does_not_take(tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path, FeaturesAlone(), task_loss_func=losses, label_names=["labels"], num_train_epochs=3,
        eval_dataset={"stars": stars(seed=5), "topic": topics(seed=6)},
    )  # fmt: skip
    trainer.train()
    torch.testing.assert_close(flat_parameters(trainer.model), learned_by_hand(3)[0], rtol=1e-5, atol=1e-6)
    assert {"eval_topic_loss", "eval_stars_loss", "eval_loss"} <= set(trainer.evaluate())


class Rows(TorchDataset):
    """A set of one's own, with `set_epoch` and without columns that are known."""

    def __init__(self, rows: Dataset) -> None:
        self.rows, self.epochs = list(rows), []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


def test_sets_of_any_kind_give_the_same_batches(tmp_path: Path) -> None:
    own = Rows(topics())
    kinds = {"topic": own, "stars": list(stars())}
    trainer = trainer_of(tmp_path, train_dataset=kinds, num_train_epochs=3)
    assert trainer.train_dataset.datasets == kinds
    trainer.train()
    torch.testing.assert_close(flat_parameters(trainer.model), learned_by_hand(3)[0], rtol=1e-5, atol=1e-6)
    assert sorted(set(own.epochs)) == [0, 1, 2]


def test_the_order_of_the_tasks_is_that_of_their_names(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, task_names=["stars", "topic"])
    assert trainer.task_names == ("stars", "topic") == tuple(trainer.train_dataset.datasets)
    loader = trainer.get_train_dataloader()
    of_type = {batch["labels"].dtype: set(batch["task_ids"].tolist()) for batch in loader}
    assert of_type == {torch.float32: {0}, torch.int64: {1}}
    # A mapping of `datasets` does as well.
    again = trainer_of(tmp_path, train_dataset=DatasetDict(topic=topics(), stars=stars()))
    assert again.task_names == ("topic", "stars")


def test_sets_that_are_given_later(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, task_names=["topic", "stars"])
    trainer.train_dataset = {"stars": stars(30), "topic": topics(4)}
    trainer.train()
    assert trainer.state.global_step == 9
    assert isinstance(trainer.train_dataset, TaskDatasets)


@pytest.mark.parametrize("sampling", [{"strategy": "round_robin"}, {"strategy": "temperature", "temperature": 3.0}])
def test_task_sampling_draws_from_the_sets(sampling: dict[str, Any], tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, task_sampling=sampling, num_train_epochs=2)
    trainer.train()
    tasks = torch.tensor([0] * SIZES["topic"] + [1] * SIZES["stars"])
    expected = [tasks[batch].tolist() for batch in designed(tasks, 2, ["topic", "stars"], sampling)]
    assert [call["task_ids"].tolist() for call in trainer.model.calls] == expected


class BothHeads(TwoHeads):
    """All losses of a batch in which every row is of a task of its own, without `num_items`."""

    def forward(self, features: Tensor, task_ids: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        self.calls.append({"task_ids": task_ids, "labels": labels})
        errors = (self.heads(features)[:, :2] - labels[:, None]).square()
        own = functional.one_hot(task_ids, 2).bool()
        return {"losses": torch.where(own, errors, 0.0).sum(0) / own.sum(0).clamp(min=1)}


def test_mixed_batches_of_sets_with_the_same_columns(tmp_path: Path) -> None:
    sets = {"topic": stars(20, seed=3).remove_columns("weight"), "stars": stars(20)}
    more = {"task_sampling": {"batches": "mixed"}, "balance_over": "window", "gradient_accumulation_steps": 2}
    trainer = trainer_of(tmp_path, BothHeads(), train_dataset=sets, **more)
    trainer.train()
    assert trainer.balancer.absent_tasks == "auto"
    calls = trainer.model.calls
    assert sum(len(set(call["task_ids"].tolist())) == 2 for call in calls) > len(calls) / 2
    for call in calls:
        rows = {(float(label), int(task)) for label, task in zip(call["labels"], call["task_ids"], strict=True)}
        given = [(label, task) for task, data in enumerate(sets.values()) for label in torch.tensor(data["label"])]
        assert rows <= {(float(label), task) for label, task in given}


def test_missing_labels_are_those_of_their_own_set(tmp_path: Path) -> None:
    columns = topics().features
    some = topics(8).map(lambda row, i: {"label": None if i % 2 else row["label"]}, with_indices=True, features=columns)
    none = stars(8).map(lambda row, i: {"label": None if i % 4 else row["label"]}, with_indices=True)
    trainer = trainer_of(tmp_path, train_dataset={"topic": some, "stars": none})
    found: dict[int, list[Tensor]] = {0: [], 1: []}
    for batch in trainer.get_train_dataloader():
        found[int(batch["task_ids"][0])].append(batch["labels"])
    whole, real = torch.cat(found[0]), torch.cat(found[1])
    assert whole.dtype == torch.int64 and sorted(whole.tolist()) == [-100] * 4 + [0, 0, 1, 2]
    assert real.dtype == torch.float32 and int(real.isnan().sum()) == 6


# --- resume ---------------------------------------------------------------------------------------------------------


def sets_of_four() -> dict[str, SyntheticData]:
    """Of the synthetic model's four tasks, of different sizes; every row has the label of its own task alone."""
    found = {}
    for k, (task, size) in enumerate(zip(TASK_NAMES, (13, 9, 3, 6), strict=True)):
        data = build_data(size, dtype=FLOAT, seed=k)
        data.labels[:, torch.arange(4) != k] = torch.nan
        found[task] = data
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_goes_on_in_the_middle_of_an_epoch(workers: int, tmp_path: Path) -> None:
    more = {"dataloader_num_workers": workers, "dataloader_persistent_workers": workers > 0}
    # 10 batches in an epoch.
    assert_goes_on(tmp_path, sets_of_four(), 13, train_sampling_strategy="random", num_train_epochs=2, **more)


# --- evaluation -----------------------------------------------------------------------------------------------------


def loss_by_hand(model: nn.Module, rows: Dataset, task: str) -> float:
    with torch.no_grad():
        outputs = model.heads(torch.tensor(rows["features"][:]))
    labels = torch.tensor(rows["label"][:])
    found = functional.cross_entropy(outputs[:, :3], labels) if task == "topic" else functional.mse_loss(
        outputs[:, 3], labels
    )  # fmt: skip
    return float(found)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_each_set_has_the_loss_of_its_task(batch_size: int, tmp_path: Path) -> None:
    sets = {"stars": stars(seed=5), "topic": topics(seed=6)}
    trainer = trainer_of(tmp_path, eval_dataset=sets, per_device_eval_batch_size=batch_size)
    metrics = trainer.evaluate()
    expected = {task: loss_by_hand(trainer.model, rows, task) for task, rows in sets.items()}
    for task, loss in expected.items():
        assert metrics[f"eval_{task}_loss"] == metrics[f"eval_loss_{task}"] == pytest.approx(loss, rel=1e-5)
    assert metrics["eval_loss"] == pytest.approx(sum(expected.values()) / 2, rel=1e-5)
    assert {key for key in metrics if "loss" in key} == {
        "eval_stars_loss", "eval_topic_loss", "eval_loss", "eval_loss_stars", "eval_loss_topic",
    }  # fmt: skip
    assert trainer.eval_dataset == sets, "a user's sets stay as they are"
    # Others, of one task, by another prefix; the training sets.
    other = trainer.evaluate({"topic": topics(5)}, metric_key_prefix="test")
    assert other["test_loss"] == pytest.approx(loss_by_hand(trainer.model, topics(5), "topic"), rel=1e-5)
    trained = trainer.evaluate(trainer.train_dataset)
    assert trained["eval_loss_stars"] == pytest.approx(loss_by_hand(trainer.model, stars(), "stars"), rel=1e-5)


def test_losses_without_num_items_count_the_rows_of_their_task(tmp_path: Path) -> None:
    class Vector(TwoHeads):
        def forward(self, features: Tensor, task_ids: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
            outputs = self.heads(features)
            classes = functional.cross_entropy(outputs[:, :3], labels.long().clamp(0, 2))
            return {"losses": torch.stack([classes, functional.mse_loss(outputs[:, 3], labels.float())])}

    sets = {"stars": stars(seed=5), "topic": topics(seed=6)}
    trainer = trainer_of(tmp_path, Vector(), eval_dataset=sets)
    metrics = trainer.evaluate()
    assert metrics["eval_loss_topic"] == pytest.approx(loss_by_hand(trainer.model, sets["topic"], "topic"), rel=1e-5)
    assert metrics["eval_loss_stars"] == pytest.approx(loss_by_hand(trainer.model, sets["stars"], "stars"), rel=1e-5)
    trainer.train()
    torch.testing.assert_close(flat_parameters(trainer.model), learned_by_hand(1)[0], rtol=1e-5, atol=1e-6)


def test_losses_of_other_tasks_are_none_of_a_set(tmp_path: Path) -> None:
    class Counted(BothHeads):
        def forward(self, features: Tensor, task_ids: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
            errors = (self.heads(features)[:, :2] - labels[:, None]).square()
            return {"losses": errors.mean(0), "num_items": torch.full((2,), len(features))}

    sets = {"topic": stars(seed=6), "stars": stars(seed=5)}
    trainer = trainer_of(tmp_path, Counted(), train_dataset={"topic": stars(), "stars": stars()}, eval_dataset=sets)
    metrics = trainer.evaluate()
    for k, (task, rows) in enumerate(sets.items()):
        with torch.no_grad():
            errors = trainer.model.heads(torch.tensor(rows["features"][:]))[:, k] - torch.tensor(rows["label"][:])
        assert metrics[f"eval_{task}_loss"] == pytest.approx(float(errors.square().mean()), rel=1e-5)
        assert metrics[f"eval_loss_{task}"] == metrics[f"eval_{task}_loss"]


@pytest.mark.parametrize("metric", ["loss", "loss_stars", "eval_stars_loss"])
def test_the_best_model_by_a_loss(metric: str, tmp_path: Path) -> None:
    sets = {"stars": stars(seed=5), "topic": topics(seed=6)}
    trainer = trainer_of(
        tmp_path, eval_dataset=sets, num_train_epochs=4, learning_rate=0.6, eval_strategy="epoch",
        save_strategy="epoch", load_best_model_at_end=True, metric_for_best_model=metric,
    )  # fmt: skip
    trainer.train()
    key = metric if metric.startswith("eval_") else f"eval_{metric}"
    values = [entry[key] for entry in trainer.state.log_history if key in entry]
    assert len(values) == 4 and min(values) != values[-1], "the last model is not to be the best one"
    assert trainer.state.best_metric == min(values)
    assert trainer.evaluate()[key] == pytest.approx(min(values), rel=1e-6)
    # One more entry of the log has what an evaluation of all would have.
    joint = [entry for entry in untimed(trainer.state.log_history) if "eval_loss" in entry]
    assert [set(entry) - {"epoch", "step"} for entry in joint] == [
        {"eval_loss", "eval_loss_topic", "eval_loss_stars"}
    ] * 5


def test_early_stopping_by_the_mean(tmp_path: Path) -> None:
    sets = {"stars": stars(seed=5), "topic": topics(seed=6)}
    trainer = trainer_of(
        tmp_path, eval_dataset=sets, num_train_epochs=9, learning_rate=0.0, eval_strategy="epoch",
        metric_for_best_model="loss", early_stopping=2,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.epoch == 3


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    assert prediction.predictions.shape == (SIZES["topic"], 3)
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


def error(prediction: EvalPrediction) -> dict[str, float]:
    assert prediction.predictions.shape == prediction.label_ids.shape == (SIZES["stars"],)
    return {"mae": float(abs(prediction.predictions - prediction.label_ids).mean())}


def test_metrics_of_each_task(tmp_path: Path) -> None:
    sets = {"stars": stars(seed=5), "topic": topics(seed=6)}
    functions = {"topic": accuracy, "stars": error}
    trainer = trainer_of(tmp_path, eval_dataset=sets, compute_metrics=functions)
    metrics = trainer.evaluate()
    with torch.no_grad():
        outputs = {task: trainer.model.heads(torch.tensor(rows["features"][:])) for task, rows in sets.items()}
    labels = {task: torch.tensor(rows["label"][:]) for task, rows in sets.items()}
    right = (outputs["topic"][:, :3].argmax(1) == labels["topic"]).float().mean()
    assert metrics["eval_topic_accuracy"] == pytest.approx(float(right))
    expected = (outputs["stars"][:, 3] - labels["stars"]).abs().mean()
    assert metrics["eval_stars_mae"] == pytest.approx(float(expected), rel=1e-5)
    assert not {"eval_topic_mae", "eval_stars_accuracy"} & set(metrics)
    # The search's default objective is Trainer's: the sum of the metrics, none of which is a loss.
    metrics = untimed([metrics])[0]
    total = metrics["eval_topic_accuracy"] + metrics["eval_stars_mae"]
    assert trainer._objective_of_search(metrics) == pytest.approx(total)
    assert trainer.predict({"stars": sets["stars"]}).metrics["test_mae"] == metrics["eval_stars_mae"]
    alone = trainer_of(tmp_path, eval_dataset=sets)
    metrics = untimed([alone.evaluate()])[0]
    assert alone._objective_of_search(metrics) == metrics["eval_loss"]


def test_predictions_of_one_set(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    rows = topics(5)
    output = trainer.predict({"topic": rows})
    with torch.no_grad():
        expected = trainer.model.heads(torch.tensor(rows["features"][:]))[:, :3]
    torch.testing.assert_close(torch.from_numpy(output.predictions), expected)
    assert output.metrics["test_loss"] == pytest.approx(loss_by_hand(trainer.model, rows, "topic"), rel=1e-5)
    assert trainer.predict({"stars": stars(5).remove_columns("label")}).predictions.shape == (5, 4)


def test_evaluation_alone(tmp_path: Path) -> None:
    # A script that evaluates a trained model has no training sets.
    sets = {"topic": topics(seed=6), "stars": stars(seed=5)}
    trainer = trainer_of(tmp_path, train_dataset=None, eval_dataset=sets, task_names=["topic", "stars"])
    metrics = trainer.evaluate()
    assert metrics["eval_loss_stars"] == pytest.approx(loss_by_hand(trainer.model, sets["stars"], "stars"), rel=1e-5)


def test_workers_that_stay_keep_the_sets_apart(tmp_path: Path) -> None:
    sets = {"stars": stars(seed=5), "topic": topics(seed=6)}
    more = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer = trainer_of(tmp_path, eval_dataset=sets, **more)
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first["eval_loss"] == second["eval_loss"]
    assert first["eval_stars_loss"] == pytest.approx(loss_by_hand(trainer.model, sets["stars"], "stars"), rel=1e-5)


def test_with_one_training_set_the_names_of_evaluation_sets_mean_nothing(tmp_path: Path) -> None:
    held_out = build_data(6, dtype=FLOAT, seed=9)
    trainer = BilevelMTLTrainer(
        model=build_model(FLOAT),
        args=settings(tmp_path),
        train_dataset=build_data(8, dtype=FLOAT),
        eval_dataset={"alpha": held_out, "beta": held_out},
    )
    metrics = trainer.evaluate()
    assert "eval_loss" not in metrics
    assert {f"eval_alpha_loss_{task}" for task in TASK_NAMES} <= set(metrics)


# --- what is refused ------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from topics()


class NoLength(TorchDataset):
    def __getitem__(self, index: int) -> dict[str, Any]:
        return topics()[index]


TOPIC, STARS = topics(), stars()
MIXED = {"task_sampling": {"batches": "mixed"}}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train_dataset": {"topics": TOPIC, "stars": STARS}, "task_names": ["topic", "stars"]},
         r'train_dataset: \'topics\' is no task \(did you mean "topic"\?\); tasks: topic, stars'),
        ({"train_dataset": {"topic": TOPIC}, "task_names": ["topic", "stars"]},
         "train_dataset: has no data set of task 'stars', expected one of each: topic, stars"),
        ({"train_dataset": DatasetDict(train=TOPIC, test=TOPIC)},
         "train_dataset: train, test are the parts of one data set, expected one of them, or a mapping task"),
        ({"train_dataset": {}}, "train_dataset: is an empty mapping, expected task -> data set"),
        ({"train_dataset": {"topic": TOPIC, "stars": STARS.select([])}},
         r"train_dataset\['stars'\]: is empty, expected at least one example"),
        ({"train_dataset": {"topic": Stream(), "stars": STARS}},
         r"train_dataset\['topic'\]: Stream has no index per example that a sampler could choose; join streams"),
        ({"train_dataset": {"topic": TOPIC.to_iterable_dataset(), "stars": STARS}},
         r"train_dataset\['topic'\]: IterableDataset has no index per example"),
        ({"train_dataset": {"topic": NoLength(), "stars": STARS}},
         r"train_dataset\['topic'\]: got a NoLength, expected a data set with __len__ and __getitem__"),
        ({"train_dataset": {"topic": DatasetDict(train=TOPIC), "stars": STARS}},
         r"train_dataset\['topic'\]: is a mapping \(train\), expected one data set"),
        ({"train_dataset": {"topic": TOPIC.add_column("task_ids", [0] * 22), "stars": STARS}},
         r"train_dataset\['topic'\]: has a column 'task_ids', which says the task where sets are joined; here its key"),
        ({"train_sampling_strategy": "group_by_length"},
         "train_sampling_strategy: 'group_by_length' cannot be combined with several training sets, whose order the"),
        ({**MIXED, "remove_unused_columns": False},
         "task_sampling.batches: mixed puts rows of several training sets into one batch, which need the same columns; "
         "'topic' has features, label, title, 'stars' has features, label, weight"),
        (MIXED, "task_sampling.batches: mixed puts rows of several training sets into one batch, whose column 'label' "
                r"has one type; it holds whole numbers in 'topic' and floats in 'stars' \(Dataset.cast_column"),
        ({"eval_dataset": {"topic": Stream()}}, r"eval_dataset\['topic'\]: Stream has no index per example"),
        ({"compute_metrics": {"topics": accuracy}}, r'compute_metrics: "?\'?topics\'?"? is not known \(did you mean'),
        ({"compute_metrics": {"topic": accuracy}, "eval_dataset": TOPIC},
         "compute_metrics: a mapping task -> function needs evaluation sets of one task each"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=f"^{message}") as raised:
        trainer_of(tmp_path, **given)
    assert "\n" not in str(raised.value)


def test_one_evaluation_is_of_one_set(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    sets = {"topic": TOPIC, "stars": STARS}
    with pytest.raises(OptionError, match=r"^test_dataset: got 2 data sets \(topic, stars\), expected one: \{task:"):
        trainer.predict(sets)
    with pytest.raises(OptionError, match=r"^test_dataset: got 2 data sets"):
        trainer.predict(trainer.train_dataset)


def test_a_set_without_a_label_column_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    unlabelled = {"topic": TOPIC, "stars": STARS.rename_column("label", "score")}
    with caplog.at_level(logging.WARNING):
        trainer = trainer_of(
            tmp_path, FeaturesAlone(), train_dataset=unlabelled, task_loss_func=losses, label_names=["labels"]
        )
    assert "label_names: 'labels' is no column of train_dataset['stars']" in caplog.text
    assert "train_dataset['topic']" not in caplog.text
    with pytest.raises((MissingColumnError, AssertionError)):
        trainer.train()


# --- counts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "columns", "expected"),
    [
        (["labels"], {"labels": torch.tensor([1.0, NAN, 2.0, NAN])}, [1, 1]),
        # Tokens of as many positions as there are tasks.
        (["labels"], {"labels": torch.tensor([[1, 2], [-100, 2], [-100, -100], [3, 4]])}, [3, 2]),
        # As many label columns as tasks, which are of rows all the same; `task_ids` among them are no labels.
        (["starts", "ends"], {"starts": torch.tensor([1, 2, 3, -100]), "ends": torch.tensor([4, 5, 6, -100])}, [4, 2]),
        (["labels", "task_ids"], {"labels": torch.tensor([1.0, NAN, 2.0, NAN])}, [1, 1]),
        # Labels of all tasks in one column say it themselves.
        (["labels"], {"labels": torch.tensor([[1.0, NAN], [NAN, 1.0], [NAN, 2.0], [NAN, 3.0]])}, [1, 3]),
        (["one"], {"other": torch.tensor([1, 2, 3, 4])}, [2, 2]),
    ],
)  # fmt: skip
def test_counts_of_rows_of_a_task_each(names: list[str], columns: dict[str, Tensor], expected: list[int]) -> None:
    batch = {**columns, "task_ids": torch.tensor([0, 0, 1, 1])}
    counts = ItemCounter(None, names, ["one", "two"]).count(batch)
    assert counts.num_items.tolist() == expected
    assert bool(counts.assumed) == ("other" in columns)
