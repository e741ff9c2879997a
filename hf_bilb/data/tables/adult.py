"""Adult: 48,842 people of the US census of 1994, two binary tasks.

Kohavi, Scaling up the accuracy of naive-Bayes classifiers: a decision-tree hybrid, KDD 1996; UCI Machine Learning
Repository, "Adult". Read from the original files.

| task | class 1 |
|---|---|
| income | more than 50,000 dollars a year |
| never_married | marital status "Never-married" (the second task that MMoE, KDD 2018, has on the larger census data) |

Features: 5 numbers (age, education in years, capital gain and loss, hours a week) and 7 columns of categories, "?"
being one. No features: the tasks' own columns, and `fnlwgt`, which says how many people a row stands for.
`relationship` (husband, own child, ...) stays in and tells much of the marital status, as is usual with these data.

The official `adult.test` is the test part; validation rows are held out of `adult.data`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hf_bilb.data.checks import check_at_least, check_fraction, check_tasks
from hf_bilb.data.splits import Split, hold_out
from hf_bilb.data.tables.binary import binary_task_data
from hf_bilb.data.tables.files import BinaryTask, Layout, find_file, read_rows
from hf_bilb.data.task_data import DataSetSpec, TaskData

LAYOUT = Layout(
    columns=(
        "age", "workclass", "fnlwgt", "education", "education-num", "marital-status", "occupation", "relationship",
        "race", "sex", "capital-gain", "capital-loss", "hours-per-week", "native-country", "classification",
    ),
    numbers=("age", "education-num", "capital-gain", "capital-loss", "hours-per-week"),
    left_out=("fnlwgt",),
    tasks=(
        # adult.test has a full stop after the class.
        BinaryTask("income", "classification", frozenset({">50K", ">50K."}), frozenset({"<=50K", "<=50K."})),
        BinaryTask(
            "never_married",
            "marital-status",
            frozenset({"Never-married"}),
            frozenset(
                {"Married-civ-spouse", "Divorced", "Separated", "Widowed", "Married-spouse-absent", "Married-AF-spouse"}
            ),
        ),
    ),
)  # fmt: skip
TASKS = tuple(task.name for task in LAYOUT.tasks)


@dataclass(frozen=True)
class AdultOptions:
    """What a recipe's `data:` section may set.

    Attributes:
        folder: with `adult.data` and `adult.test`, or the same with a header as `adult_train.csv` and
            `adult_test.csv`; each may be packed (`.xz`, `.gz`).
        tasks: which, in the order of the loss vector; null = both. The features do not depend on it.
        validation_fraction: the share of the rows of `adult.data` that is held out.
        seed: of their choice.

    Raises:
        OptionError: an unknown task, a share that is none, a seed below 0.
    """

    folder: str
    tasks: tuple[str, ...] | None = None
    validation_fraction: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_tasks(self.tasks, TASKS)
        check_fraction("validation_fraction", self.validation_fraction)
        check_at_least("seed", self.seed, 0)


def load_adult(options: AdultOptions) -> TaskData:
    """Adult with `features` and `labels [K]`; a second.

    Raises:
        OptionError: see `find_file` and `read_rows`; too few rows to hold any out.
    """
    tasks = LAYOUT.chosen(options.tasks)
    train = read_rows(find_file(options.folder, ("adult.data", "adult_train.csv")), LAYOUT, tasks)
    test = read_rows(find_file(options.folder, ("adult.test", "adult_test.csv")), LAYOUT, tasks)
    num_rows = len(train.labels)
    trained, held_out = hold_out(num_rows, options.seed, options.validation_fraction)
    split = Split(trained, held_out, np.arange(num_rows, num_rows + len(test.labels)))
    return binary_task_data(train.followed_by(test), split, LAYOUT, tasks)


SPEC = DataSetSpec(options=AdultOptions, load=load_adult)
