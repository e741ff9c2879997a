"""What `hf-bilb init` is asked for, checked as far as it goes without reading the table. No torch."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from hf_bilb.config.options import nearest, shown
from hf_bilb.data.own.csv_options import check_repeats
from hf_bilb.errors import OptionError
from hf_bilb.experiments.packaged import recipe_file
from hf_bilb.storage.folders import check_output_folder


@dataclass(frozen=True)
class StarterRequest:
    """A recipe for a table of the user's.

    Attributes:
        table: a file, a pattern of files of which the first is looked at, or a folder saved by `datasets`.
        text: one column of texts, or two for pairs.
        image: a column of images. Without it and `text`, the columns that are no labels are the inputs of a model for
            tables.
        tasks: the columns to predict; none: those that are named as labels usually are.
        columns: the names of all columns, for a text file without them; none: they are in its first line.
        output: the recipe's file, or a folder; None: the name of the table with `.yaml`, in the current folder.
        force: write over a file that is there.

    Raises:
        OptionError: no such table, options that do not go together, a file that would be lost.
        StorageError: a folder that cannot be written to.
    """

    table: str
    text: tuple[str, ...] = ()
    image: str | None = None
    tasks: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    output: str | None = None
    force: bool = False

    def __post_init__(self) -> None:
        path = Path(self.table)
        if not path.exists() and not re.search(r"[*?\[]", self.table):
            near = nearest(path.name, [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else [])
            raise OptionError(f"{self.table}: there is no such file{near}, seen from {str(Path.cwd())!r}")
        if self.text and self.image is not None:
            raise OptionError(
                f"--image: {shown(self.image)} and --text {','.join(self.text)} are both set, expected one of the two"
            )
        check_repeats("--text", self.text)
        check_repeats("--tasks", self.tasks)
        check_repeats("--columns", self.columns)
        if len(self.text) > 2:
            raise OptionError(f"--text: got {len(self.text)} columns, expected one, or two for pairs of texts")
        check_output_folder(self.target.parent, "--output")
        if self.target.exists() and not self.force:
            raise OptionError(
                f"--output: {shown(str(self.target))} is already there: --force writes over it, another --output "
                "leaves it"
            )

    @property
    def target(self) -> Path:
        """The file to write."""
        stem = re.sub(r"[^\w-]+", "_", Path(self.table).name.partition(".")[0]).strip("_-") or "recipe"
        return recipe_file(self.output, f"{stem}.yaml")

    @property
    def command(self) -> str:
        """As it would be typed, without where it writes to."""
        lists = {"--text": self.text, "--tasks": self.tasks, "--columns": self.columns}
        given = {"--image": self.image, **{option: ",".join(names) for option, names in lists.items()}}
        options = [part for option, value in given.items() if value for part in (option, value)]
        return shlex.join(["hf-bilb", "init", self.table, *options])
