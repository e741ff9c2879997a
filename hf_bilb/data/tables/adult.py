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

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_bilb.data.checks import check_at_least, check_fraction, check_tasks
from hf_bilb.data.own.options import Patterns, SplitOptions
from hf_bilb.data.tables.binary import BinaryTask, Layout, load_binary
from hf_bilb.data.task_data import DataSetSpec, TaskData
from hf_bilb.errors import OptionError

LAYOUT = Layout(
    columns=(
        "age", "workclass", "fnlwgt", "education", "education-num", "marital-status", "occupation", "relationship",
        "race", "sex", "capital-gain", "capital-loss", "hours-per-week", "native-country", "classification",
    ),
    numbers=("age", "education-num", "capital-gain", "capital-loss", "hours-per-week"),
    left_out=("fnlwgt",),
    tasks={
        # adult.test has a full stop after the class.
        "income": BinaryTask("classification", (">50K", ">50K."), ("<=50K", "<=50K.")),
        "never_married": BinaryTask(
            "marital-status",
            ("Never-married",),
            ("Married-civ-spouse", "Divorced", "Separated", "Widowed", "Married-spouse-absent", "Married-AF-spouse"),
        ),
    },
)  # fmt: skip
TASKS = tuple(LAYOUT.tasks)
#: Part -> the names that its file may have.
FILES = {"train": ("adult.data", "adult_train.csv"), "test": ("adult.test", "adult_test.csv")}


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
        check_fraction("validation_fraction", self.validation_fraction, below=0.9)
        check_at_least("seed", self.seed, 0)


def load_adult(options: AdultOptions) -> TaskData:
    """Adult with `features` and `labels [K]`; a second.

    Raises:
        OptionError: the folder or a file is missing; see `load_binary`.
    """
    files: dict[str, Patterns] = {part: str(_find_file(options.folder, names)) for part, names in FILES.items()}
    split = SplitOptions(validation=options.validation_fraction, seed=options.seed)
    return load_binary(LAYOUT.options(files, options.tasks, split))


def _find_file(folder: str, names: Sequence[str]) -> Path:
    """The first of the files that is there, as it is or packed."""
    path = Path(folder)
    if not path.is_dir():
        raise OptionError(f"data.folder: there is no folder {folder!r}")
    for name in (name + packed for name in names for packed in ("", ".xz", ".gz")):
        if (path / name).is_file():
            return path / name
    raise OptionError(f"data.folder: {folder!r} has no file {' or '.join(names)} (as it is, .xz or .gz)")


SPEC = DataSetSpec(options=AdultOptions, load=load_adult)
