"""Which rows are drawn for the parts that have no files."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hf_bilb.data.own.parts import draw_groups, draw_parts, draw_strata
from hf_bilb.data.splits import split_rows
from hf_bilb.errors import OptionError
from tests.data.own.tables import labels, load, write_csv


def check_complete(parts: list[np.ndarray], num_rows: int) -> None:
    """Every row is in one part."""
    assert sorted(np.concatenate(parts).tolist()) == list(range(num_rows))


def test_rows_are_drawn_as_in_the_other_data_sets() -> None:
    test, validation, train = draw_parts(50, [0.2, 0.1], seed=3)
    check_complete([test, validation, train], 50)
    other = split_rows(50, 3, None, num_validation=5, num_test=10)
    for mine, theirs in zip((train, validation, test), other, strict=True):
        assert np.array_equal(mine, theirs)


@pytest.mark.parametrize("seed", range(5))
def test_groups_stay_together(seed: int) -> None:
    generator = np.random.default_rng(seed)
    groups = generator.integers(0, 40, 400)
    groups = np.unique(groups, return_inverse=True)[1]
    parts = draw_groups(groups, [0.2, 0.1], seed)
    check_complete(parts, 400)
    found = [set(groups[part].tolist()) for part in parts]
    assert not (found[0] & found[1] or found[0] & found[2] or found[1] & found[2])
    # A share may miss the rows of less than one group.
    assert 80 - 20 < len(parts[0]) <= 80 and 40 - 20 < len(parts[1]) <= 40


def test_a_large_group_goes_to_training_and_no_part_is_empty() -> None:
    groups = np.repeat([0, 1, 2, 3], [90, 4, 3, 3])
    for seed in range(5):
        test, validation, train = draw_groups(groups, [0.05, 0.01], seed)
        assert len(test) <= 5 and len(validation) in (3, 4) and 0 in groups[train]  # 1 row is no whole group
    with pytest.raises(OptionError, match="2 groups are too few for 3 parts"):
        draw_groups(np.array([0, 1, 1]), [0.1, 0.1], 0)


@pytest.mark.parametrize("seed", range(5))
def test_strata_have_their_share_in_every_part(seed: int) -> None:
    sizes = [500, 300, 150, 47, 3]
    strata = np.random.default_rng(seed).permutation(np.repeat(range(5), sizes))
    parts = draw_strata(strata, [0.2, 0.1], seed)
    check_complete(parts, 1000)
    assert [len(part) for part in parts] == [200, 100, 700]
    for part, share in zip(parts, (0.2, 0.1, 0.7), strict=True):
        counts = Counter(strata[part].tolist())
        assert all(abs(counts[stratum] - share * size) <= 1 for stratum, size in enumerate(sizes))


def test_strata_of_one_row_each_are_a_plain_split() -> None:
    parts = draw_strata(np.arange(100), [0.1, 0.1], 0)
    assert [len(part) for part in parts] == [10, 10, 80]
    check_complete(parts, 100)
    assert not np.array_equal(parts[0], draw_strata(np.arange(100), [0.1, 0.1], 1)[0])


def table(folder: Path, num_rows: int = 60) -> str:
    rows = [f"{row},{row % 7},{'ab'[row % 3 == 0]}" for row in range(num_rows)]
    return write_csv(folder / "a.csv", "\n".join(["y,customer,c", *rows]))


def rows_of(data: object, part: str) -> set[int]:
    return {int(value) for value in labels(data, part)[:, 0]}  # type: ignore[arg-type]


TASKS = {"y": {"type": "regression", "standardize": False}}


def test_parts_without_files_are_drawn_and_do_not_depend_on_the_tasks(tmp_path: Path) -> None:
    options = {"files": table(tmp_path), "inputs": {"numeric": ["customer"]}, "split": {"test": 0.2, "seed": 1}}
    data = load(**options, tasks=TASKS)
    found = [rows_of(data, part) for part in ("train", "validation", "test")]
    assert list(map(len, found)) == [42, 6, 12] and set.union(*found) == set(range(60))
    expected = split_rows(60, 1, None, num_validation=6, num_test=12)
    assert found == [set(part.tolist()) for part in expected]
    again = load(**options, tasks={"c": {"type": "classification"}, **TASKS})
    assert {int(value) for value in labels(again, "test")[:, 1]} == found[2]
    other = load(**{**options, "split": {"test": 0.2, "seed": 2}}, tasks=TASKS)
    assert rows_of(other, "test") != found[2]


def test_the_drawn_validation_part_leaves_a_given_test_part_alone(tmp_path: Path) -> None:
    test = write_csv(tmp_path / "test.csv", "y,customer,c\n100,1,a\n")
    files = {"train": table(tmp_path), "test": test}
    data = load(files=files, inputs={"numeric": ["customer"]}, tasks=TASKS)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [54, 6, 1]
    assert rows_of(data, "test") == {100}


def test_group_and_stratum_columns(tmp_path: Path) -> None:
    options = {"files": table(tmp_path), "inputs": {"categorical": ["c"]}, "tasks": TASKS}
    data = load(**options, split={"group_by": "customer", "validation": 0.2, "test": 0.2})
    customers = [{row % 7 for row in rows_of(data, part)} for part in ("train", "validation", "test")]
    assert all(customers) and sum(map(len, customers)) == 7
    data = load(**options, split={"stratify_by": "c", "validation": 0.2, "test": 0.2})
    assert [sum(row % 3 == 0 for row in rows_of(data, part)) for part in ("train", "validation", "test")] == [12, 4, 4]


def test_groups_that_are_in_the_files_of_two_parts_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    test = write_csv(tmp_path / "test.csv", "y,customer,c\n100,3,a\n100,8,a")
    options = {"files": {"train": table(tmp_path), "test": test}, "inputs": {"categorical": ["c"]}, "tasks": TASKS}
    load(**options, split={"group_by": "customer"})
    assert "1 values of 'customer' are in the training part and in the test part, such as '3'" in caplog.text


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("replaced", [True, False])
def test_a_file_with_other_rows_and_the_old_time_of_change_is_read_again(
    tmp_path: Path, kind: str, replaced: bool
) -> None:
    """As `rsync -t` (which replaces the file) and `cp -p` (which writes into it) leave it."""
    file = tmp_path / f"a.{kind}"
    found = []
    for first in (10, 50):
        frame = pd.DataFrame({"y": range(first, first + 20), "x": 1})
        new = tmp_path / f"new.{kind}"
        if kind == "csv":
            frame.to_csv(new, index=False)
        else:
            frame.to_parquet(new) if kind == "parquet" else frame.to_json(new, orient="records", lines=True)
        new.replace(file) if replaced else shutil.copyfile(new, file)
        os.utime(file, (10**9, 10**9))
        data = load(files=str(file), inputs={"numeric": ["x"]}, tasks=TASKS)
        found.append(set.union(*(rows_of(data, part) for part in ("train", "validation", "test"))))
    assert found == [set(range(10, 30)), set(range(50, 70))]
