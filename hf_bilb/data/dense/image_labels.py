"""Classes of whole images, in addition to labels at every pixel: read from a file of comma-separated values.

    part,image,scene,window
    train,0,kitchen,yes
    train,1,bedroom,
    val,0,kitchen,no

UTF-8, a line for each image: its part, how its files are named (in MTAN's layout the number, in Cityscapes' official
one `<city>_<sequence>_<frame>`), and a cell for each task with the name of a class; an empty one: this image has no
label of that task. The classes of a task are the different names in the whole file, sorted, as numbers where all of
them are whole numbers. Blanks around a cell do not count.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hf_bilb.config.options import nearest
from hf_bilb.errors import OptionError
from hf_bilb.losses.dense import DENSE_TASKS

_FIRST = ("part", "image")
_HEADER = ",".join([*_FIRST, "<task>", "..."])
_MISSING = -1


@dataclass(frozen=True)
class ImageLabels:
    """The classes of all images.

    Attributes:
        class_names: task -> the names of its classes 0, 1, ...; the M tasks in order.
        classes: part -> `[N, M]` classes of its images, -1 where missing.
    """

    class_names: Mapping[str, tuple[str, ...]]
    classes: Mapping[str, NDArray[np.int64]]

    def of_tasks(self, tasks: Sequence[str]) -> ImageLabels:
        """Those of some tasks, in their order."""
        places = [list(self.class_names).index(task) for task in tasks]
        return ImageLabels(
            {task: self.class_names[task] for task in tasks},
            {part: classes[:, places] for part, classes in self.classes.items()},
        )


def read_image_labels(file: Path, images: Mapping[str, Sequence[str]], allow_missing: bool) -> ImageLabels:
    """Read the file and check all of it.

    Args:
        file: see above.
        images: part -> the names of its images, in the order wanted.
        allow_missing: an image may have no line, and then lacks the labels of every task.

    Raises:
        OptionError: one line, with the file and the line's number: a header that is none, a task that is named badly
            or has fewer than two classes, a part or an image that is not known, an image that stands twice or nowhere.
    """
    lines = _lines(file)
    tasks = _read_header(file, next(lines, (1, [])))
    places = {part: {name: place for place, name in enumerate(names)} for part, names in images.items()}
    cells: dict[tuple[str, str], tuple[int, list[str]]] = {}
    for number, (part, image, *of_tasks) in _checked_width(file, lines, len(tasks)):
        where = f"{file}, line {number}"
        if part not in places:
            raise OptionError(f"{where}: part {part!r} is not valid, expected {' or '.join(places)}")
        if image not in places[part]:
            near = nearest(image, places[part])
            raise OptionError(f"{where}: part {part} has no image {image!r} in data.folder{near}")
        if (part, image) in cells:
            first, _ = cells[part, image]
            raise OptionError(f"{where}: image {image!r} of part {part} stands twice, first in line {first}")
        cells[part, image] = number, of_tasks
    if not allow_missing:
        _check_all_there(file, images, cells)
    names = {task: _classes(file, task, [words[k] for _, words in cells.values()]) for k, task in enumerate(tasks)}
    return ImageLabels(names, {part: _numbers(part, images[part], cells, names) for part in images})


def _lines(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Number of the line (from 1) and its cells, of every line that is not empty."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise OptionError(f"data.image_labels: {str(file)!r} cannot be read: {error.strerror or error}") from None
    try:
        text = content.decode("utf-8-sig")  # spreadsheets put a mark in front
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise OptionError(f"{file}, line {number}: is not UTF-8 (byte {content[error.start]:#04x})") from None
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        number = rows.line_num + 1  # of its beginning: a quoted cell may go over several lines
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise OptionError(f"{file}, line {number}: cannot be read as comma-separated values: {error}") from None
        if row:
            yield number, [cell.strip() for cell in row]


def _read_header(file: Path, line: tuple[int, list[str]]) -> list[str]:
    """The names of the tasks."""
    number, header = line
    where = f"{file}, line {number}"
    if tuple(header[:2]) != _FIRST:
        raise OptionError(f"{where}: begins with {','.join(header[:2])!r}, expected the header {_HEADER}")
    tasks = header[2:]
    if not tasks:
        raise OptionError(f"{where}: has no column of a task, expected the header {_HEADER}")
    for task in tasks:
        # It becomes a part of the keys of losses and metrics, and of options on a command line.
        if not re.fullmatch(r"\w[\w .-]*", task):
            raise OptionError(f"{where}: {task!r} is no name for a task, expected letters, digits, '_', '-', '.'")
        if task in DENSE_TASKS:
            raise OptionError(f"{where}: {task!r} is the name of a task with a label at every pixel")
        if tasks.count(task) > 1:
            raise OptionError(f"{where}: task {task!r} stands twice")
    return tasks


def _checked_width(
    file: Path, lines: Iterator[tuple[int, list[str]]], num_tasks: int
) -> Iterator[tuple[int, list[str]]]:
    for number, row in lines:
        if len(row) != 2 + num_tasks:
            raise OptionError(f"{file}, line {number}: has {len(row)} cells, expected {2 + num_tasks} as the header")
        yield number, row


def _check_all_there(file: Path, images: Mapping[str, Sequence[str]], cells: Mapping[tuple[str, str], object]) -> None:
    for part, names in images.items():
        missing = [name for name in names if (part, name) not in cells]
        if missing:
            raise OptionError(
                f"{file}: {len(missing)} of the {len(names)} images of part {part} have no line, first "
                f"{missing[0]!r}; data.allow_missing=true takes them without"
            )


def _classes(file: Path, task: str, words: Sequence[str]) -> tuple[str, ...]:
    """The names of a task's classes, in order."""
    found = sorted({word for word in words if word})
    if len(found) < 2:
        only = f"only the class {found[0]!r}" if found else "no label"
        raise OptionError(f"{file}, line 1: task {task!r} has {only} in all lines, expected two classes or more")
    if all(re.fullmatch(r"[+-]?[0-9]+", word) for word in found):
        found.sort(key=int)
    return tuple(found)


def _numbers(
    part: str,
    images: Sequence[str],
    cells: Mapping[tuple[str, str], tuple[int, list[str]]],
    names: Mapping[str, tuple[str, ...]],
) -> NDArray[np.int64]:
    """`[N, M]` of the images of a part."""
    codes = [{"": _MISSING, **{name: number for number, name in enumerate(known)}} for known in names.values()]
    classes = np.full((len(images), len(names)), _MISSING, np.int64)
    for place, image in enumerate(images):
        if (part, image) in cells:
            _, words = cells[part, image]
            classes[place] = [code[word] for code, word in zip(codes, words, strict=True)]
    return classes
