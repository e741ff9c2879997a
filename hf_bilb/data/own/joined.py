"""The rows of all sources as one set, with the labels of all tasks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hf_bilb.data.cache import cache_root
from hf_bilb.data.own.images import FoundFiles, find_images
from hf_bilb.data.own.labels import Tags, TaskLabels, read_labels
from hf_bilb.data.own.leaks import warn_of_leaks
from hf_bilb.data.own.options import OwnDataOptions
from hf_bilb.data.own.pixels import Frames
from hf_bilb.data.own.source import Source, open_source
from hf_bilb.data.splits import PARTS
from hf_bilb.losses.task_types import TaskType, label_slices

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Joined:
    """The rows of all sources, with the labels of all tasks.

    Attributes:
        sources: one, or one for each task.
        tasks: name -> what is read of it, in order.
        source_of: task -> the number of its source.
        rows: part -> source's number -> its rows in the part; the training part has those with a label alone.
        images: of the rows; None: the inputs are no images.
    """

    sources: tuple[Source, ...]
    tasks: dict[str, TaskLabels]
    source_of: dict[str, int]
    rows: dict[str, tuple[Ints, ...]]
    images: FoundFiles | None = None

    @property
    def types(self) -> dict[str, TaskType]:
        """Task -> its type."""
        return {name: labels.type for name, labels in self.tasks.items()}

    @property
    def width(self) -> int:
        """W, the columns of `labels`."""
        return sum(task.label_width for task in self.types.values())

    @property
    def tagged(self) -> list[str]:
        """The tasks of tokens."""
        return [name for name, task in self.types.items() if task.items == "tokens"]

    @property
    def of_pixels(self) -> list[str]:
        """The tasks of pixels."""
        return [name for name, task in self.types.items() if task.items == "pixels"]

    def pixel_rows(self, task: str, part: str) -> Ints:
        """`[N]`, which of the labels of the task's file (`PixelLabels`) each row has; -1: none."""
        labels, number = self.tasks[task].pixels, self.source_of[task]
        assert labels is not None
        found = [np.full(len(rows), -1) for rows in self.rows[part]]
        found[number] = labels.rows[self.rows[part][number]]
        return np.concatenate(found)

    def tags(self, number: int) -> list[Tags | None]:
        """Of each of these, its tags in the rows of a source; None where they are in another one."""
        return [self.tasks[name].tags if self.source_of[name] == number else None for name in self.tagged]

    def tag_counts(self, task: str, part: str) -> Ints:
        """`[N]`, how many words of each row of the part have a tag of the task."""
        tags, number = self.tasks[task].tags, self.source_of[task]
        assert tags is not None
        found = [np.zeros(len(rows), np.int64) for rows in self.rows[part]]
        found[number] = tags.per_row()[self.rows[part][number]]
        return np.concatenate(found)

    def num_labelled(self, task: str, part: str) -> int:
        """Rows of the part that have a label of the task."""
        return int(self.tasks[task].has_label[self.rows[part][self.source_of[task]]].sum())

    def labels(self, part: str) -> NDArray[np.float32]:
        """`[N, W]`, NaN where missing."""
        return np.concatenate(self.labels_by_source(part))

    def labels_by_source(self, part: str) -> list[NDArray[np.float32]]:
        """The same of each source's rows."""
        found = [np.full((len(rows), self.width), np.nan, np.float32) for rows in self.rows[part]]
        for name, columns in label_slices(self.types).items():
            number = self.source_of[name]
            found[number][:, columns] = self.tasks[name].values[self.rows[part][number]]
        return found

    def task_ids(self, part: str) -> Ints | None:
        """`[N]`, the task of each row; None where all tasks share their rows."""
        if len(self.sources) < len(self.tasks):
            return None
        return np.repeat(np.arange(len(self.sources)), list(map(len, self.rows[part])))


def join_sources(options: OwnDataOptions) -> Joined:
    """Open every source and read the labels of every task; find the images."""
    of_sources = options.sources()
    sources = tuple(map(open_source, of_sources))
    warn_of_leaks(sources)
    source_of = {name: number for number, one in enumerate(of_sources) for name in one.tasks}
    images = find_images(sources) if options.kind == "image" else None
    root = cache_root(options.cache_dir)
    tasks = {}
    for name, task in options.tasks.items():
        number = source_of[name]
        frames = None if images is None else Frames(images.files, images.rows[number], options.image_size, root)
        tasks[name] = read_labels(sources[number], name, task, frames)
    rows = {part: tuple(getattr(source.split, part) for source in sources) for part in PARTS}
    labelled = [
        np.any([tasks[name].has_label for name, number in source_of.items() if number == this], axis=0)
        for this in range(len(sources))
    ]
    rows["train"] = tuple(of_source[known[of_source]] for of_source, known in zip(rows["train"], labelled, strict=True))
    return Joined(sources, tasks, source_of, rows, images)
