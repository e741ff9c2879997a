"""Classes of whole images from a file: what is read is what stands there; what is wrong is one line with its number."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from hf_bilb.data.dense.image_labels import ImageLabels, read_image_labels
from hf_bilb.errors import OptionError

IMAGES = {"train": ["0", "1", "2", "10"], "val": ["0", "1"]}
LINES = (
    "part,image,scene,window,floor",
    "train,2,kitchen,yes,10",
    "train,0,bedroom,no,9",
    "val,1,kitchen,,",
    "train,10,,no,-1",
    "val,0,attic,yes,9",
    "train,1,bedroom,yes,",
)


def write(folder: Path, lines: Sequence[str] = LINES, ending: str = "\n") -> Path:
    file = folder / "labels.csv"
    file.write_text(ending.join(lines) + ending, encoding="utf-8", newline="")
    return file


def names_of(labels: ImageLabels, part: str) -> list[dict[str, str]]:
    """Image by image and task by task the name of the class, empty where missing."""
    return [
        {
            task: names[number] if number >= 0 else ""
            for (task, names), number in zip(labels.class_names.items(), row.tolist(), strict=True)
        }
        for row in labels.classes[part]
    ]


def test_every_image_has_the_classes_of_its_line(tmp_path: Path) -> None:
    file = write(tmp_path)
    labels = read_image_labels(file, IMAGES, allow_missing=False)
    with file.open(encoding="utf-8", newline="") as stream:
        lines = {(line.pop("part"), line.pop("image")): line for line in csv.DictReader(stream)}
    for part, images in IMAGES.items():
        assert labels.classes[part].dtype == np.int64
        assert names_of(labels, part) == [lines[part, image] for image in images]


def test_classes_are_sorted_as_words_or_as_numbers(tmp_path: Path) -> None:
    labels = read_image_labels(write(tmp_path), IMAGES, allow_missing=False)
    assert labels.class_names == {
        "scene": ("attic", "bedroom", "kitchen"),  # attic is in the validation part alone
        "window": ("no", "yes"),
        "floor": ("-1", "9", "10"),
    }
    assert labels.classes["train"].tolist() == [[1, 0, 1], [1, 1, -1], [2, 1, 2], [-1, 0, 0]]
    mixed = [LINES[0], *(line.replace("-1", "9a") for line in LINES[1:])]
    assert read_image_labels(write(tmp_path, mixed), IMAGES, False).class_names["floor"] == ("10", "9", "9a")


def test_some_tasks_in_an_order_of_their_own(tmp_path: Path) -> None:
    labels = read_image_labels(write(tmp_path), IMAGES, allow_missing=False)
    some = labels.of_tasks(["floor", "scene"])
    assert list(some.class_names) == ["floor", "scene"]
    for part in IMAGES:
        expected = [{task: row[task] for task in ("floor", "scene")} for row in names_of(labels, part)]
        assert names_of(some, part) == expected


def test_spreadsheets_files_read_alike(tmp_path: Path) -> None:
    plain = read_image_labels(write(tmp_path), IMAGES, allow_missing=False)
    quoted = ['"part", image ,scene,"window",floor', *LINES[1:4], "", *(f" {line} " for line in LINES[4:]), ""]
    file = write(tmp_path, quoted, ending="\r\n")
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    again = read_image_labels(file, IMAGES, allow_missing=False)
    assert again.class_names == plain.class_names
    assert all(np.array_equal(again.classes[part], plain.classes[part]) for part in IMAGES)


def test_a_name_with_commas_and_other_letters_is_one_class(tmp_path: Path) -> None:
    lines = [line.replace("kitchen", '"küche, groß"') for line in LINES]
    labels = read_image_labels(write(tmp_path, lines), IMAGES, allow_missing=False)
    assert labels.class_names["scene"][-1] == "küche, groß"


def test_an_image_without_a_line_may_be_allowed(tmp_path: Path) -> None:
    file = write(tmp_path, [line for line in LINES if not line.startswith(("train,2", "train,1,"))])
    with pytest.raises(OptionError) as error:
        read_image_labels(file, IMAGES, allow_missing=False)
    assert str(error.value) == (
        f"{file}: 2 of the 4 images of part train have no line, first '1'; data.allow_missing=true takes them without"
    )
    labels = read_image_labels(file, IMAGES, allow_missing=True)
    assert labels.classes["train"][[1, 2]].tolist() == [[-1] * 3] * 2
    assert (labels.classes["train"][[0, 3]] >= 0).any(axis=1).all()


HEAD = LINES[0]
EXPECTED = "the header part,image,<task>,..."
WRONG = {
    "empty": ([], f"line 1: begins with '', expected {EXPECTED}"),
    "no header": (LINES[1:], f"line 1: begins with 'train,2', expected {EXPECTED}"),
    "other order": (["image,part,scene", "0,train,a"], f"line 1: begins with 'image,part', expected {EXPECTED}"),
    "no task": (["part,image", "train,0"], f"line 1: has no column of a task, expected {EXPECTED}"),
    "no name": (["part,image,scene,", "train,0,a,b"], "line 1: '' is no name for a task, expected letters, digits"),
    "bad name": (["part,image,a/b"], "line 1: 'a/b' is no name for a task, expected letters, digits, '_', '-', '.'"),
    "dense": (["part,image,depth"], "line 1: 'depth' is the name of a task with a label at every pixel"),
    "twice": (["part,image,a,b,a"], "line 1: task 'a' stands twice"),
    "part": ([HEAD, "test,0,a,b,c"], "line 2: part 'test' is not valid, expected train or val"),
    "image": ([HEAD, *LINES[1:3], "train,7,a,b,c"], "line 4: part train has no image '7' in data.folder"),
    "wrong part": ([HEAD, "val,2,a,b,c"], "line 2: part val has no image '2' in data.folder"),
    "leading zero": ([HEAD, "train,02,a,b,c"], "line 2: part train has no image '02' in data.folder (did you mean"),
    "image twice": ([*LINES, "", LINES[2]], "line 9: image '0' of part train stands twice, first in line 3"),
    "short": ([*LINES[:4], "train,10,kitchen"], "line 5: has 3 cells, expected 5 as the header"),
    "long": ([*LINES[:2], "train,10,a,b,c,d"], "line 3: has 6 cells, expected 5 as the header"),
    "one class": ([HEAD, *(line.replace("no", "yes") for line in LINES[1:])], "line 1: task 'window' has only the cl"),
    "no class": ([HEAD, "train,0,a,,1", "train,1,b,,2"], "line 1: task 'window' has no label in all lines, expected t"),
    "quotes": ([HEAD, "train,0,a,b,c", 'train,1,"a"b,c,d'], "line 3: cannot be read as comma-separated values: "),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_one_line_with_its_number(tmp_path: Path, what: str) -> None:
    lines, message = WRONG[what]
    file = write(tmp_path, lines)
    with pytest.raises(OptionError) as error:
        read_image_labels(file, IMAGES, allow_missing=what in ("no class",))
    assert str(error.value).startswith(f"{file}, {message}") and "\n" not in str(error.value)


def test_a_cell_over_two_lines_does_not_shift_the_numbers(tmp_path: Path) -> None:
    file = write(tmp_path, [HEAD, 'train,0,"living\nroom",yes,1', "train,77,a,b,c"])
    with pytest.raises(OptionError, match=", line 4: part train has no image '77'"):
        read_image_labels(file, IMAGES, allow_missing=True)


def test_a_file_that_is_missing_or_not_utf_8(tmp_path: Path) -> None:
    file = tmp_path / "labels.csv"
    with pytest.raises(OptionError) as error:
        read_image_labels(file, IMAGES, allow_missing=False)
    assert str(error.value) == f"data.image_labels: {str(file)!r} cannot be read: No such file or directory"
    with pytest.raises(OptionError, match=r"^data\.image_labels: .* cannot be read: Is a directory$"):
        read_image_labels(tmp_path, IMAGES, allow_missing=False)
    file.write_bytes("\n".join([*LINES[:3], "train,1,Küche,yes,1"]).encode("latin-1"))
    with pytest.raises(OptionError) as error:
        read_image_labels(file, IMAGES, allow_missing=False)
    assert str(error.value) == f"{file}, line 4: is not UTF-8 (byte 0xfc)"
