"""What tables that are one file have in common in a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from hf_bilb.data.checks import check_at_least, check_fraction, check_tasks
from hf_bilb.data.splits import Split, held_out_count, split_rows
from hf_bilb.errors import OptionError


def check_fractions(validation: float, test: float) -> None:
    """Raise `OptionError` unless both are shares and leave something for training."""
    check_fraction("validation_fraction", validation)
    check_fraction("test_fraction", test)
    if validation + test >= 1:
        raise OptionError(
            f"validation_fraction: {validation} and test_fraction {test} leave no training rows, expected less than 1 "
            "together"
        )


@dataclass(frozen=True)
class TableOptions:
    """What a recipe's `data:` section may set of a table that is one file and is split at random.

    Attributes:
        file: where the table is; in which form, the data set says.
        tasks: which, in the order of the loss vector; null = all. The features do not depend on it.
        test_fraction, validation_fraction: shares of the rows.
        seed: of the shuffling before the split.
        known_tasks: every task that the data set has; no option.

    Raises:
        OptionError: an unknown task, shares that leave nothing, a seed below 0.
    """

    file: str
    tasks: tuple[str, ...] | None = None
    test_fraction: float = 0.2
    validation_fraction: float = 0.1
    seed: int = 0

    known_tasks: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        check_tasks(self.tasks, self.known_tasks)
        check_fractions(self.validation_fraction, self.test_fraction)
        check_at_least("seed", self.seed, 0)

    @property
    def path(self) -> Path:
        """The file; raises `OptionError` where there is none."""
        if not Path(self.file).is_file():
            raise OptionError(f"data.file: there is no file {self.file!r}")
        return Path(self.file)

    def split(self, num_rows: int) -> Split:
        """The rows of each part, one at least; raises `OptionError` where they are too few."""
        counts = [held_out_count(num_rows, share) for share in (self.validation_fraction, self.test_fraction)]
        if sum(counts) >= num_rows:
            raise OptionError(f"data: {self.file} has {num_rows} rows, too few to split")
        return split_rows(num_rows, self.seed, None, *counts)
