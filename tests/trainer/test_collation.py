"""Labels that are None in data sets of several tasks: NaN or -100, as their column has it, whatever a batch holds."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value, concatenate_datasets, interleave_datasets
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset as TorchDataset
from transformers import default_data_collator

from hf_bilb import BilevelMTLTrainer
from hf_bilb.errors import TaskLossError
from hf_bilb.losses.masked import masked_cross_entropy
from hf_bilb.trainer.collation import with_missing_labels
from tests.trainer.harness import BATCH, arguments, flat_parameters, run

NAN = float("nan")
LABELS = ["cls", "reg", "box", "flag", "tokens"]
CLASSES = Dataset.from_dict(
    {"x": [[0.0, 1.0]] * 3, "cls": [0, 1, 2], "flag": [True, False, True], "tokens": [[1, 2], [3, None], [5, 6]]},
    features=Features(
        x=List(Value("float64")),
        cls=ClassLabel(names=["a", "b", "c"]),
        flag=Value("bool"),
        tokens=List(Value("int64")),
    ),
)
NUMBERS = Dataset.from_dict(
    {"x": [[2.0, 3.0]] * 3, "reg": [0.5, 1.5, 2.5], "box": [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]}
)
#: Whether the model takes a column.
EVERYTHING = defaultdict(lambda: True)
X_ALONE = defaultdict(bool, x=True)
JOINED = concatenate_datasets([CLASSES, NUMBERS])


def collated(data: Any, rows: list[int], taken: Any = X_ALONE) -> dict[str, Tensor]:
    collate = with_missing_labels(default_data_collator, data, LABELS, several_tasks=True, taken=taken)
    fetch = getattr(data, "__getitems__", None)
    return collate(fetch(rows) if fetch else [data[i] for i in rows])


@pytest.mark.parametrize("form", [None, "torch", "numpy"])
@pytest.mark.parametrize(
    ("rows", "cls", "reg", "box", "flag", "tokens"),
    [
        ([1, 4], [1, -100], [NAN, 1.5], [[NAN] * 2, [3.0, 4.0]], [0, -100], [[3, -100], [-100] * 2]),
        ([4, 1], [-100, 1], [1.5, NAN], [[3.0, 4.0], [NAN] * 2], [-100, 0], [[-100] * 2, [3, -100]]),
        ([0, 2], [0, 2], [NAN] * 2, [[NAN] * 2] * 2, [1, 1], [[1, 2], [5, 6]]),
        ([3, 5], [-100] * 2, [0.5, 2.5], [[1.0, 2.0], [5.0, 6.0]], [-100] * 2, [[-100] * 2] * 2),
    ],
)
def test_none_has_the_type_of_its_column(
    rows: list[int], cls: Any, reg: Any, box: Any, flag: Any, tokens: Any, form: str | None
) -> None:
    expected = {"cls": cls, "reg": reg, "box": box, "flag": flag, "tokens": tokens}
    if form is not None:
        # `datasets` itself fails on a list after a null one, in these formats.
        expected = {name: values for name, values in expected.items() if name not in ("box", "tokens")}
    batch = collated(JOINED.select_columns(["x", *expected]).with_format(form), rows)
    assert batch.keys() == {"x", *expected}
    for name, values in expected.items():
        kind = torch.float32 if name in ("reg", "box") else torch.int64
        torch.testing.assert_close(batch[name], torch.tensor(values, dtype=kind), equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("data", [CLASSES.select([0, 2]), NUMBERS, NUMBERS.with_format("torch")])
def test_a_data_set_without_nulls_is_left_to_the_default(data: Dataset) -> None:
    data = data.remove_columns("tokens") if "tokens" in data.column_names else data
    assert with_missing_labels(default_data_collator, data, LABELS, True, EVERYTHING) is default_data_collator


def test_a_collator_of_ones_own_is_left_alone() -> None:
    def own(rows: list[Any]) -> dict[str, Tensor]:
        return default_data_collator(rows)

    assert with_missing_labels(own, JOINED, LABELS, True, EVERYTHING) is own


def test_a_set_without_any_label_has_none() -> None:
    # As with Trainer: its predictions need no labels.
    unlabelled = JOINED.map(lambda row: dict.fromkeys(LABELS), features=JOINED.features)
    assert collated(unlabelled, [0, 1]).keys() == {"x"}


def test_a_stream_knows_its_types() -> None:
    stream = JOINED.to_iterable_dataset()
    rows = list(stream)
    collate = with_missing_labels(default_data_collator, stream, LABELS, True, X_ALONE)
    with pytest.raises(
        TaskLossError, match=r"^label column 'tokens': all 2 labels of a batch are None, and nothing says how"
    ):
        collate([rows[3], rows[4]])
    assert collate([rows[0], rows[4]])["tokens"].tolist() == [[1, 2], [-100, -100]]
    batch = collate([rows[3], rows[4]])
    assert batch["cls"].tolist() == [-100, -100] and batch["cls"].dtype == torch.int64


KINDS = {
    "int8": [1, 0], "int32": [7, -1], "int64": [2**31, 3], "uint8": [255, 0], "bool": [True, False],
    "float32": [0.5, 3.0], "float64": [0.5, 3.0],
}  # fmt: skip


def rows_of(data: Any, rows: list[int]) -> list[dict[str, Any]]:
    """A stream's, or those that torch's loader asks a table for."""
    return [row for i, row in enumerate(data) if i in rows] if not hasattr(data, "__len__") else data.__getitems__(rows)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("form", [None, "torch", "numpy"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_number_stays_what_it_is(kind: str, form: str | None, streamed: bool) -> None:
    values = KINDS[kind]
    first = Dataset.from_dict({"x": [[0.0]] * 2, "label": values}).cast_column("label", Value(kind))
    data = concatenate_datasets([first, Dataset.from_dict({"x": [[1.0]] * 2, "other": [1.0, 2.0]})])
    data = data.to_iterable_dataset() if streamed else data
    data = data.select_columns(["x", "label"]).with_format(form)
    collate = with_missing_labels(default_data_collator, data, ["labels"], True, X_ALONE)
    if kind == "int64" and form is not None and not streamed:
        # `datasets` gives 2^31 as a float32, in which 2^31 + 1 would be the same: refused, not guessed.
        with pytest.raises(TaskLossError, match=r"^label column 'label': whole numbers of 2\^24 and more lose digits"):
            collate(rows_of(data, [0, 2]))
        assert collate(rows_of(data, [0, 1]))["labels"].tolist() == values
        return
    found = collate(rows_of(data, [0, 2]))["labels"]
    if kind.startswith("float"):
        assert found.is_floating_point() and float(found[0]) == values[0] and bool(found[1].isnan())
    else:
        assert found.dtype == torch.int64 and found.tolist() == [int(values[0]), -100]
    whole = collate(rows_of(data, [0, 1]))["labels"]
    assert whole.tolist() == [float(value) if kind.startswith("float") else int(value) for value in values]


@pytest.mark.parametrize("form", [None, "torch", "numpy"])
def test_class_numbers_beyond_two_to_the_24(form: str | None) -> None:
    big = 2**24 + 1  # the first whole number that float32 does not have
    classes = Dataset.from_dict({"x": [[0.0, 1.0]] * 2, "cls": [big, 3]})
    data = concatenate_datasets([classes, NUMBERS.select_columns(["x", "reg"])]).with_format(form)
    if form is None:
        assert collated(data, [0, 2])["cls"].tolist() == [big, -100]
    else:
        with pytest.raises(TaskLossError, match=r"^label column 'cls': whole numbers of 2\^24 and more lose digits"):
            collated(data, [0, 2])
        assert collated(data, [1, 2])["cls"].tolist() == [3, -100]
    assert collated(data, [0, 1])["cls"].tolist() == [big, 3]
    assert collated(data, [0, 1])["cls"].dtype == torch.int64


@pytest.mark.parametrize("form", [None, "torch", "numpy"])
def test_lists_of_varying_length(form: str | None) -> None:
    tokens = Dataset.from_dict({"x": [[0.0, 1.0]] * 3, "tokens": [[1, 2], [3, 4, 5], [6, 7]]})
    data = concatenate_datasets([tokens, NUMBERS.select_columns(["x", "reg"])])
    data = data.select_columns(["x", "tokens"]).with_format(form)
    assert collated(data, [1, 3])["tokens"].tolist() == [[3, 4, 5], [-100] * 3]
    assert collated(data, [0, 2, 3])["tokens"].tolist() == [[1, 2], [6, 7], [-100] * 2]
    # Without any, as long as the last ones.
    collate = with_missing_labels(default_data_collator, data, LABELS, True, X_ALONE)
    assert collate(rows_of(data, [1, 3]))["tokens"].shape == (2, 3)
    assert collate(rows_of(data, [3, 4]))["tokens"].tolist() == [[-100] * 3] * 2


@pytest.mark.parametrize("form", [None, "torch", "numpy"])
@pytest.mark.parametrize("fixed", [False, True])
def test_lists_in_lists(fixed: bool, form: str | None) -> None:
    pairs = [[[1, None], [2, 3]], [[None, None], [4, 5]]]
    inner = List(Value("int64"), length=2) if fixed else List(Value("int64"))
    kind = List(inner, length=2) if fixed else List(inner)
    features = Features(x=List(Value("float64")), spans=kind)
    spans = Dataset.from_dict({"x": [[0.0]] * 2, "spans": pairs}, features=features)
    missing = Dataset.from_dict({"x": [[0.0]] * 2, "spans": [None, None]}, features=features)
    data = concatenate_datasets([spans, missing]).with_format(form)
    collate = with_missing_labels(default_data_collator, data, ["spans"], True, X_ALONE)
    none = [[-100, -100], [-100, -100]]
    for rows, expected in (
        ([0, 1], [[[1, -100], [2, 3]], [[-100, -100], [4, 5]]]),
        ([0, 2], [[[1, -100], [2, 3]], none]),
        ([2, 3], [none, none]),
    ):
        found = collate(rows_of(data, rows))["spans"]
        assert found.dtype == torch.int64 and found.tolist() == expected


class Plain(TorchDataset):
    """Rows that lack the labels of other tasks."""

    def __init__(self, *rows: dict[str, Any]) -> None:
        self.rows = [{"x": torch.zeros(2), **row} for row in rows]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def test_rows_of_ones_own_data_set() -> None:
    data = Plain({"cls": 1}, {"reg": 0.5}, {"cls": 2, "reg": 1})
    collate = with_missing_labels(default_data_collator, data, LABELS, True, X_ALONE)
    batch = collate([data[0], data[1]])
    assert batch["cls"].tolist() == [1, -100] and batch["reg"].tolist() == pytest.approx([NAN, 0.5], nan_ok=True)
    # What the columns hold was seen: whole numbers among floats, and a batch of missing ones.
    later = collate([{**data[2], "cls": None}, {**data[0], "cls": None, "reg": None}])
    assert later["cls"].tolist() == [-100, -100] and later["cls"].dtype == torch.int64
    assert later["reg"].tolist() == pytest.approx([1.0, NAN], nan_ok=True)


def test_what_nothing_tells_is_one_line() -> None:
    with pytest.raises(TaskLossError, match=r"^label column 'cls': all 2 labels of a batch are None, and nothing says"):
        collated(Plain({"cls": None, "reg": 0.5}, {"cls": None, "reg": 1.5}), [0, 1])
    missing = Dataset.from_dict({"x": [[0.0], None, [1.0]], "reg": [1.0, 2.0, 3.0]})
    for rows, place in (([0, 1], 1), ([1, 2], 0)):
        with pytest.raises(TaskLossError, match=rf"^column 'x': row {place} of a batch of 2 is None, which the model "):
            collated(missing, rows)
    # Not what the model takes: Trainer withholds it.
    assert collated(missing, [0, 2], taken=defaultdict(bool)).keys() == {
        "x",
        "reg",
    }


# --- training -----------------------------------------------------------------------------------------------------


class Heads(nn.Module):
    """Three classes and a number."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads = nn.Linear(4, 4)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        outputs = self.heads(features)
        return {"cls": outputs[:, :3], "reg": outputs[:, 3]}


def losses(outputs: Any, batch: Any) -> dict[str, Tensor]:
    there = ~batch["reg"].isnan()
    return {
        "cls": masked_cross_entropy(outputs["cls"], batch["cls"])[0],
        "reg": functional.mse_loss(outputs["reg"][there], batch["reg"][there]),
    }


def tables() -> tuple[Dataset, Dataset]:
    drawn = torch.randn(6 * BATCH, 4, generator=torch.Generator().manual_seed(0))
    half = 3 * BATCH
    return (
        Dataset.from_dict({"features": drawn[:half].tolist(), "cls": [i % 3 for i in range(half)]}),
        Dataset.from_dict({"features": drawn[half:].tolist(), "reg": drawn[half:].sum(1).tolist()}),
    )


def by_hand(data: Dataset) -> Tensor:
    """SGD on the sum of the means over the rows that have a label, from the data set's rows."""
    model = Heads()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for start in range(0, len(data), BATCH):
        total = torch.zeros(())
        rows = [data[i] for i in range(start, start + BATCH)]
        for name, loss in (("cls", functional.cross_entropy), ("reg", functional.mse_loss)):
            labelled = [row for row in rows if row[name] is not None]
            if labelled:
                outputs = model(torch.tensor([row["features"] for row in labelled]))[name]
                total = total + loss(outputs, torch.tensor([row[name] for row in labelled]))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    return flat_parameters(model)


SETTINGS: dict[str, Any] = {"task_names": ["cls", "reg"], "label_names": ["cls", "reg"], "balancer": "ls"}


@pytest.mark.parametrize("form", [None, "torch"])
@pytest.mark.parametrize("join", [concatenate_datasets, interleave_datasets])
def test_joined_data_sets_train_and_evaluate(join: Any, form: str | None, tmp_path: Path) -> None:
    data = join(list(tables()))
    found = run(
        tmp_path,
        Heads(),
        data.with_format(form),
        trainer_arguments={"task_loss_func": losses, "eval_dataset": data.with_format(form)},
        eval_strategy="epoch",
        **SETTINGS,
    )
    torch.testing.assert_close(found.parameters, by_hand(data), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        outputs = found.trainer.model(torch.tensor([row["features"] for row in data]))
    there = [i for i, row in enumerate(data) if row["cls"] is not None]
    expected = functional.cross_entropy(outputs["cls"][there], torch.tensor([data[i]["cls"] for i in there]))
    evaluation = next(entry for entry in found.trainer.state.log_history if "eval_loss" in entry)
    assert evaluation["eval_loss_cls"] == pytest.approx(float(expected), rel=1e-5)
    assert found.trainer.data_collator is default_data_collator


def test_batches_of_workers_and_of_one_task(tmp_path: Path) -> None:
    # A set of one task among those of several: the other's column is full of None.
    both = concatenate_datasets(list(tables()))
    trainer = BilevelMTLTrainer(
        model=Heads(),
        args=arguments(tmp_path, dataloader_num_workers=1, **SETTINGS),
        eval_dataset=both.select(range(2 * BATCH)),
        task_loss_func=losses,
    )
    batch = next(iter(trainer.get_eval_dataloader()))
    assert batch["cls"].dtype == torch.int64 and batch["reg"].isnan().all()
    assert {key for key in trainer.evaluate() if "loss" in key} == {"eval_loss", "eval_loss_cls"}
