"""What the tests of the data set `table` have in common."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_bilb.config.options import parse_options
from hf_bilb.data import DATA_SETS, TaskData


def load(**options: Any) -> TaskData:
    """The data set with these options, as a recipe has them."""
    data_set = DATA_SETS["table"]
    return data_set.load(parse_options(data_set.options, options, "data"))


def write_csv(file: Path, text: str) -> str:
    """Lines of text, without the spaces that indent them."""
    file.write_text("".join(f"{line.strip()}\n" for line in text.strip().splitlines()), encoding="utf-8")
    return str(file)


def write_jsonl(file: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def labels(data: TaskData, part: str = "train") -> NDArray[np.float32]:
    """`[N, W]`."""
    rows = getattr(data, part)
    return np.stack([np.asarray(rows[place]["labels"]) for place in range(len(rows))])


def three_parts(file: str) -> dict[str, str]:
    """The same rows in three files, so that every row of a part is known."""
    path = Path(file)
    copies = {part: path.with_stem(f"{path.stem}-{part}") for part in ("train", "validation", "test")}
    for copy in copies.values():
        copy.write_bytes(path.read_bytes())
    return {part: str(copy) for part, copy in copies.items()}
