"""Images by their paths, and images in a table."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from hf_bilb.data.images import files
from hf_bilb.errors import OptionError
from tests.data.own.tables import labels, load, write_csv, write_jsonl

GREYS = (0, 50, 100, 150, 200, 250)
TASKS: dict[str, Any] = {"grey": {"type": "regression", "standardize": False}, "dark": {"type": "multi_label"}}


def png(grey: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (12, 9), (grey, grey, grey)).save(stream, "PNG")
    return stream.getvalue()


def rows(folder: Path) -> list[dict[str, Any]]:
    (folder / "sub").mkdir(exist_ok=True)
    for grey in GREYS:
        (folder / f"sub/{grey}.png").write_bytes(png(grey))
    return [{"image": f"sub/{grey}.png", "grey": grey, "dark": grey < 120} for grey in GREYS]


def greys(data: Any, part: str) -> NDArray[np.float32]:
    """What the images show, `[N]`."""
    found = getattr(data, part)
    batch = found[list(range(len(found)))]["pixel_values"]
    assert tuple(batch.shape[1:]) == (3, 8, 8) and batch.dtype.is_floating_point
    return (batch[:, 0, 0, 0] * 255).round().numpy()


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "saved"])
def test_images_belong_to_their_rows(tmp_path: Path, kind: str) -> None:
    given = rows(tmp_path)
    if kind == "csv":
        file = write_csv(
            tmp_path / "a.csv", "image,grey,dark\n" + "\n".join(",".join(map(str, row.values())) for row in given)
        )
    elif kind == "jsonl":
        file = write_jsonl(tmp_path / "a.jsonl", given)
    else:
        held = datasets.Dataset.from_list(
            [{**row, "image": {"bytes": png(row["grey"]), "path": None}} for row in given]
        )
        table, file = held.cast_column("image", datasets.Image()), str(tmp_path / f"a.{kind}")
        table.to_parquet(file) if kind == "parquet" else table.save_to_disk(file)
    options = {"files": file, "inputs": {"image": "image"}, "tasks": TASKS, "image_size": 8}
    data = load(**options, cache_dir=str(tmp_path / "cache"))
    found = [*(greys(data, part) for part in ("train", "validation", "test"))]
    assert sorted(np.concatenate(found).tolist()) == list(GREYS) and list(map(len, found)) == [4, 1, 1]
    for part, shown in zip(("train", "validation", "test"), found, strict=True):
        assert np.array_equal(labels(data, part), np.stack([shown, shown < 120], axis=1))
    assert data.model_arguments["image_size"] == 8 and data.processing_class is None


def test_images_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = rows(tmp_path)
    decoded: list[str] = []
    decode = files.decode

    def counted(data: bytes, image_size: int, where: str) -> NDArray[np.uint8]:
        decoded.append(where)
        return decode(data, image_size, where)

    monkeypatch.setattr(files, "decode", counted)
    # Every image is named by two rows.
    file = write_jsonl(tmp_path / "a.jsonl", [*given, *given])
    options = {"files": file, "inputs": {"image": "image"}, "tasks": TASKS, "image_size": 8}
    load(**options, cache_dir=str(tmp_path / "cache"))
    assert len(decoded) == len(GREYS)
    load(**options, cache_dir=str(tmp_path / "cache"))
    assert len(decoded) == len(GREYS)
    (tmp_path / "sub/0.png").write_bytes(png(7) + b" ")  # another image under the same name
    data = load(**options, cache_dir=str(tmp_path / "cache"))
    assert 7 in np.concatenate([greys(data, part) for part in ("train", "validation", "test")])


@pytest.mark.parametrize(("kind", "white"), [("png", 65535), ("tif", 65535), ("float.tif", 1)])
def test_images_of_16_bits_and_floats_are_scaled(tmp_path: Path, kind: str, white: int) -> None:
    rows = []
    for grey in GREYS:
        values = np.full((8, 8), grey / 255 * white)
        name = f"{grey}.{kind}"
        Image.fromarray(values.astype(np.uint16 if white > 1 else np.float32)).save(tmp_path / name)
        rows.append({"image": name, "grey": grey})
    task = {"grey": TASKS["grey"]}
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    data = load(files=file, inputs={"image": "image"}, tasks=task, image_size=8, cache_dir=str(tmp_path / "cache"))
    assert np.array_equal(greys(data, "train"), labels(data)[:, 0]) and len(set(greys(data, "train"))) == 4


def test_floats_beyond_1_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 255, np.float32)).save(tmp_path / "a.tif")
    file = write_jsonl(tmp_path / "a.jsonl", [{"image": "a.tif", "grey": grey} for grey in range(9)])
    task = {"grey": TASKS["grey"]}
    with pytest.raises(OptionError) as error:
        load(files=file, inputs={"image": "image"}, tasks=task, image_size=8, cache_dir=str(tmp_path / "cache"))
    what = "has grey values from 255 to 255, expected floats from 0 to 1"
    assert str(error.value) == f"data: {file}, row 1: image '{tmp_path / 'a.tif'}': {what}"


def test_replaced_files_of_images_in_a_table_are_seen(tmp_path: Path) -> None:
    """A column of type `datasets.Image` may hold paths alone."""
    given = rows(tmp_path)
    held = datasets.Dataset.from_list([{**row, "image": str(tmp_path / row["image"])} for row in given])
    file = str(tmp_path / "a.parquet")
    held.cast_column("image", datasets.Image()).to_parquet(file)
    options = {"files": file, "inputs": {"image": "image"}, "tasks": TASKS, "image_size": 8}
    before = load(**options, cache_dir=str(tmp_path / "cache"))
    assert np.array_equal(greys(before, "train"), labels(before)[:, 0])
    for grey in GREYS:
        (tmp_path / f"sub/{grey}.png").write_bytes(png(grey + 1) + b" ")
    after = load(**options, cache_dir=str(tmp_path / "cache"))
    assert np.array_equal(greys(after, "train"), labels(after)[:, 0] + 1)


def test_images_of_several_sources(tmp_path: Path) -> None:
    given = rows(tmp_path)
    one, two = write_jsonl(tmp_path / "a.jsonl", given), write_jsonl(tmp_path / "sub" / "b.jsonl", [
        {"picture": Path(row["image"]).name, "dark": row["dark"]} for row in given])  # fmt: skip
    tasks = {
        "grey": {**TASKS["grey"], "files": one, "inputs": {"image": "image"}},
        "dark": {**TASKS["dark"], "files": two, "inputs": {"image": "picture"}},
    }
    data = load(tasks=tasks, image_size=8, cache_dir=str(tmp_path / "cache"))
    ids, found, shown = data.train.task_ids, labels(data), greys(data, "train")
    assert ids.tolist() == [0] * 4 + [1] * 4
    assert np.array_equal(found[:4, 0], shown[:4]) and np.array_equal(found[4:, 1], shown[4:] < 120)
