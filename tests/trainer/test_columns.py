"""Which columns of a data set reach whom: label columns survive, and are withheld from models that do not take them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn

from hf_bilb import BilevelMTLTrainer
from hf_bilb.errors import MissingColumnError, TaskLossError, TrainerError
from tests.trainer.harness import BATCH, arguments, flat_parameters, run

NAMES = ["income", "education"]


class TwoHeads(nn.Module):
    """Takes `features` alone; refuses everything else."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads = nn.Linear(3, 2)
        self.calls: list[set[str]] = []

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        self.calls.append({"features"})
        return {"logits": self.heads(features)}


class Everything(TwoHeads):
    """Takes `features` and anything else, and says what it got."""

    def forward(self, features: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        self.calls.append({"features", *kwargs})
        return {"logits": self.heads(features)}


def rows(size: int = 4 * BATCH) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    return Dataset.from_dict(
        {
            "features": torch.randn(size, 3, generator=generator).tolist(),
            "income": torch.randn(size, generator=generator).tolist(),
            "education": torch.randn(size, generator=generator).tolist(),
            "weight": torch.rand(size, generator=generator).tolist(),
        }
    )


seen: list[set[str]] = []


def losses(outputs: Any, batch: Any) -> dict[str, Tensor]:
    seen.append(set(batch))
    return {
        name: (outputs["logits"][:, k] - batch[name]).square().mean() for k, name in enumerate(NAMES) if name in batch
    }


COMMON: dict[str, Any] = {"task_names": NAMES, "label_names": NAMES, "balancer": "ls"}


@pytest.mark.parametrize("remove", [True, False])
@pytest.mark.parametrize("cls", [TwoHeads, Everything])
def test_label_columns_go_to_the_loss_and_not_to_the_model(cls: Any, remove: bool, tmp_path: Path) -> None:
    seen.clear()
    model = cls()
    found = run(
        tmp_path,
        model,
        rows(),
        trainer_arguments={"task_loss_func": losses, "eval_dataset": rows(6)},
        remove_unused_columns=remove,
        eval_strategy="epoch",
        **COMMON,
    )
    expected = {"features", *NAMES} if remove else {"features", "weight", *NAMES}
    assert seen and all(columns == expected for columns in seen)
    extra = {"weight"} if cls is Everything and not remove else set()
    assert all(call == {"features", *extra} for call in model.calls)
    evaluation = found.trainer.state.log_history[-2]
    assert {"eval_loss_income", "eval_loss_education"} <= set(evaluation)
    predicted = found.trainer.predict(rows(6))
    assert predicted.predictions.shape == (6, 2) and len(predicted.label_ids) == 2


def test_prediction_without_label_columns(tmp_path: Path) -> None:
    model = TwoHeads()
    trainer = BilevelMTLTrainer(
        model=model, args=arguments(tmp_path, remove_unused_columns=False, **COMMON), task_loss_func=losses
    )
    bare = rows(6).remove_columns(NAMES)
    assert trainer.predict(bare).predictions.shape == (6, 2)
    partly = rows(6).remove_columns(NAMES[:1])
    output = trainer.predict(partly)
    assert output.label_ids is None and output.predictions.shape == (6, 2)


def test_a_wrong_label_name_is_said_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = {**COMMON, "label_names": ["income", "eduction"], "remove_unused_columns": False}
    trainer = BilevelMTLTrainer(
        model=TwoHeads(), args=arguments(tmp_path, **settings), eval_dataset=rows(6), task_loss_func=losses
    )
    metrics = trainer.evaluate()
    assert not any("loss" in key for key in metrics)
    assert "no evaluation losses: the batches have no column 'eduction' of label_names (their columns: " in caplog.text


def test_without_label_names_it_is_said_what_they_are_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"task_names": NAMES, "remove_unused_columns": False}
    trainer = BilevelMTLTrainer(
        model=TwoHeads(), args=arguments(tmp_path, **settings), eval_dataset=rows(6), task_loss_func=losses
    )
    assert trainer.label_names == [] and not any("loss" in key for key in trainer.evaluate())
    assert "no evaluation losses: label_names is empty; name the columns there" in caplog.text


class Batchwise(TwoHeads):
    """Takes whatever a batch holds, and names nothing."""

    def forward(self, **batch: Any) -> dict[str, Tensor]:  # type: ignore[override]
        self.calls.append(set(batch))
        return {"logits": self.heads(batch["features"])}


class LossesBatchwise(Batchwise):
    def forward(self, **batch: Any) -> dict[str, Any]:  # type: ignore[override]
        outputs: dict[str, Any] = super().forward(**batch)
        return {**outputs, "losses": losses(outputs, batch)} if "income" in batch else outputs


def test_a_forward_that_names_nothing_is_given_every_column(tmp_path: Path) -> None:
    # As a data set of the table kind, and as a list.
    for data in (rows(), list(rows().with_format("torch"))):
        vectors = []
        for cls, func in ((TwoHeads, losses), (Batchwise, losses), (LossesBatchwise, None)):
            model = cls()
            trainer = run(
                tmp_path, model, data, trainer_arguments={"task_loss_func": func, "eval_dataset": data}, **COMMON
            ).trainer
            assert {"eval_loss_income", "eval_loss_education"} <= trainer.evaluate().keys()
            vectors.append(flat_parameters(model))
            # `label_names` go to the loss alone, where a function makes it.
            labels = set(NAMES) if func is None else set()
            takes = {"features"} if cls is TwoHeads else {"features", "weight", *labels}
            assert all(call == takes for call in model.calls)
        assert torch.equal(vectors[0], vectors[1]) and torch.equal(vectors[0], vectors[2])


# --- a column that is not there ---------------------------------------------------------------------------------------


def asking(key: str, how: str = "item") -> Any:
    def weighted(outputs: Any, batch: Any) -> dict[str, Tensor]:
        values = {"item": lambda: batch[key], "get": lambda: batch.get(key), "pop": lambda: batch.pop(key)}
        there = how != "in" or key in batch
        weight = values[how]() if how != "in" and there else None
        factor = weight.mean() if isinstance(weight, Tensor) else 1.0
        return {name: factor * loss for name, loss in losses(outputs, batch).items()}

    return weighted


DROPPED = (
    "the batch has no column 'weight': remove_unused_columns dropped it, for the model's forward does not take it; "
    "keep it by label_names=['income', 'education', 'weight'], or by remove_unused_columns=False"
)


@pytest.mark.parametrize("how", ["item", "pop"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_column_that_only_the_loss_needs(how: str, accumulation: int, tmp_path: Path) -> None:
    settings = {**COMMON, "gradient_accumulation_steps": accumulation}
    given = {"task_loss_func": asking("weight", how), "eval_dataset": rows(6)}
    for data in (rows(), list(rows().with_format("torch"))):
        model = TwoHeads()
        before = flat_parameters(model)
        with pytest.raises(MissingColumnError) as caught:
            run(tmp_path, model, data, trainer_arguments=given, **settings)
        assert str(caught.value) == f"task_loss_func: {DROPPED}"
        assert torch.equal(flat_parameters(model), before)
    # Both ways out, followed, give the same; and the column is the weight.
    ways = ({"remove_unused_columns": False}, {"label_names": [*NAMES, "weight"]})
    vectors = []
    for way in ways:
        model = TwoHeads()
        trainer = run(tmp_path, model, rows(), trainer_arguments=given, **{**COMMON, **way}).trainer
        vectors.append(flat_parameters(model))
        assert {"eval_loss_income", "eval_loss_education"} <= trainer.evaluate().keys()
    model = TwoHeads()
    run(tmp_path, model, rows(), trainer_arguments={"task_loss_func": losses}, **COMMON)
    assert torch.equal(vectors[0], vectors[1]) and not torch.equal(vectors[0], flat_parameters(model))


@pytest.mark.parametrize("how", ["get", "in"])
def test_asking_whether_a_dropped_column_is_there(how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = {"task_loss_func": asking("weight", how)}
    run(tmp_path, TwoHeads(), rows(), trainer_arguments=given, **COMMON)
    assert [r.getMessage() for r in caplog.records if r.name == "hf_bilb.trainer.columns"] == [
        f"task_loss_func asks for the column 'weight': {DROPPED.split(': ', 1)[1]}"
    ]
    caplog.clear()
    run(tmp_path, TwoHeads(), rows(), trainer_arguments=given, remove_unused_columns=False, **COMMON)
    run(tmp_path, TwoHeads(), rows(), trainer_arguments={"task_loss_func": asking("of_some_sets", how)}, **COMMON)
    assert not [r for r in caplog.records if r.name == "hf_bilb.trainer.columns"]


@pytest.mark.parametrize(
    ("key", "settings", "message"),
    [
        (
            "incme",
            {},
            "the batch has no column 'incme' (did you mean \"income\"?); it has: features, income, education",
        ),
        (
            "label",
            {},
            "the batch has no column 'label', though the data set has it: the data collator calls it 'labels'",
        ),
        (
            "name",
            {"remove_unused_columns": False},
            "the batch has no column 'name', though the data set has it: the data collator left it out",
        ),
    ],
)
def test_a_column_that_no_batch_has(key: str, settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    data = rows().add_column("name", ["x"] * len(rows()))
    if key == "label":
        data = data.add_column("label", [0] * len(data))
    trainer = BilevelMTLTrainer(
        model=TwoHeads(),
        args=arguments(tmp_path, **{**COMMON, **settings}),
        eval_dataset={"one": data},
        task_loss_func=asking(key),
    )
    with pytest.raises(KeyError) as caught:  # it is one of those, too
        trainer.evaluate()
    assert str(caught.value) == f"task_loss_func: {message}"


def test_label_columns_in_no_label_names(tmp_path: Path) -> None:
    with pytest.raises(MissingColumnError, match=r"'income'.*keep it by label_names=\['income'\]"):
        run(
            tmp_path,
            TwoHeads(),
            rows(),
            trainer_arguments={"task_loss_func": lambda outputs, batch: {"income": batch["income"].sum()}},
            task_names=NAMES,
        )


def test_task_item_counts_of_a_dropped_column(tmp_path: Path) -> None:
    with pytest.raises(MissingColumnError) as caught:
        run(
            tmp_path,
            TwoHeads(),
            rows(),
            trainer_arguments={
                "task_loss_func": losses,
                "task_item_counts": lambda batch: batch["weight"].sum().expand(2),
            },
            gradient_accumulation_steps=2,
            **COMMON,
        )
    assert str(caught.value) == f"task_item_counts: {DROPPED}"


def test_other_mistakes_in_a_task_loss_func(tmp_path: Path) -> None:
    def failing(func: Any, **settings: Any) -> str:
        with pytest.raises(TaskLossError) as caught:
            run(tmp_path, TwoHeads(), rows(), trainer_arguments={"task_loss_func": func}, **settings)
        return str(caught.value)

    assert failing(lambda outputs, batch: {"income": outputs["logit"].sum()}, **COMMON) == (
        "task_loss_func: KeyError 'logit'; the model's outputs are: logits; the batch's columns: features, income, "
        "education"
    )
    unnamed = failing(losses, label_names=NAMES)
    assert unnamed == (
        "task_names: not given, so that there is one task; task_loss_func returned losses of ['income', 'education']: "
        "set task_names=['income', 'education']"
    )


def test_a_batch_that_is_no_mapping(tmp_path: Path) -> None:
    def pair(examples: list[Any]) -> Any:
        return torch.tensor([e["features"] for e in examples]), torch.zeros(len(examples))

    with pytest.raises(TrainerError, match=r"^batch: got a tuple, expected a mapping column -> values"):
        run(tmp_path, TwoHeads(), rows(), trainer_arguments={"task_loss_func": losses, "data_collator": pair}, **COMMON)


@pytest.mark.parametrize("label_names", [NAMES, NAMES[::-1]])
def test_columns_of_labels_give_the_counts_of_a_window(label_names: list[str], tmp_path: Path) -> None:
    # Two label columns with gaps: a window of two micro-batches is one batch of twice the size.
    full = rows(4 * BATCH).to_dict()
    for i in (0, 1, 2, 5, 9):
        full["income"][i] = float("nan")
    data = Dataset.from_dict(full)

    def masked(outputs: Any, batch: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        values, counts = {}, {}
        for k, name in enumerate(NAMES):
            there = batch[name].isfinite()
            errors = torch.where(there, outputs["logits"][:, k] - batch[name].nan_to_num(), 0.0).square()
            values[name], counts[name] = errors.sum() / there.sum().clamp(min=1), there.sum()
        return values, counts

    vectors = []
    for size, steps in ((BATCH, 2), (2 * BATCH, 1)):
        model = TwoHeads().double()
        model.forward = lambda features, m=model: {"logits": m.heads(features.double())}  # type: ignore[method-assign]
        run(
            tmp_path,
            model,
            data,
            trainer_arguments={"task_loss_func": masked},
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            **{**COMMON, "label_names": label_names},
        )
        vectors.append(flat_parameters(model))
    torch.testing.assert_close(vectors[0], vectors[1], rtol=1e-12, atol=1e-14)
