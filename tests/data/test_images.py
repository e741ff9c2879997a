"""Images: decoded once into a cache that survives interruptions, changes and company; batches out of it."""

from __future__ import annotations

import io
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from hf_bilb.data.images import files as images
from hf_bilb.data.images.celeba import CelebaOptions, load_celeba
from hf_bilb.data.images.files import decode, prepare_images
from hf_bilb.data.images.rows import ImageRows
from hf_bilb.data.rows import collate_images
from hf_bilb.errors import OptionError
from tests.data.celeba_files import Counted, name_of, write_celeba

ROOT = Path(__file__).parents[2]


def options(folder: Path) -> CelebaOptions:
    return CelebaOptions(folder=str(folder), cache_dir=str(folder.parent / "cache"), image_size=16)


# --- decoding -----------------------------------------------------------------------------------------------------


def test_images_of_the_size_asked_for_are_taken_as_they_are() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    np.testing.assert_array_equal(decode(file.getvalue(), 16, "x"), pixels.transpose(2, 0, 1))
    grey = io.BytesIO()
    Image.fromarray(pixels[:, :, 0]).save(grey, "PNG")
    np.testing.assert_array_equal(decode(grey.getvalue(), 16, "x"), np.stack([pixels[:, :, 0]] * 3))


# --- the cache ----------------------------------------------------------------------------------------------------


@pytest.fixture
def chunks_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "CHUNK", 3)


@pytest.mark.usefixtures("chunks_of_three")
def test_images_are_decoded_once(tmp_path: Path) -> None:
    source = Counted()
    file = prepare_images(source, 16, str(tmp_path))
    np.testing.assert_array_equal(np.load(file), source.pixels())
    assert sorted(source.reads) == list(range(10))
    again = prepare_images(source, 16, str(tmp_path))
    assert again == file and len(source.reads) == 10
    assert prepare_images(source, 8, str(tmp_path)) != file  # another size is another file


@pytest.mark.usefixtures("chunks_of_three")
def test_after_an_error_finished_chunks_are_reused(tmp_path: Path) -> None:
    source = Counted()
    source.broken = 7
    with pytest.raises(OptionError, match=r"^image 7: does not decode: 6 bytes that are no image$"):
        prepare_images(source, 16, str(tmp_path))
    assert not list(tmp_path.rglob("images.npy"))
    source.broken, source.reads = None, []
    file = prepare_images(source, 16, str(tmp_path))
    assert sorted(source.reads) == [6, 7, 8, 9]
    np.testing.assert_array_equal(np.load(file), source.pixels())


@pytest.mark.usefixtures("chunks_of_three")
def test_a_changed_image_renews_its_chunk_alone(tmp_path: Path) -> None:
    source = Counted()
    file = prepare_images(source, 16, str(tmp_path))
    source.files[4], source.versions[4], source.reads = source.files[0], "1", []
    assert prepare_images(source, 16, str(tmp_path)) == file
    assert sorted(source.reads) == [3, 4, 5]
    np.testing.assert_array_equal(np.load(file), source.pixels())


@pytest.mark.usefixtures("chunks_of_three")
@pytest.mark.parametrize("damage", ["record lost", "record cut", "record cut short", "part lost"])
def test_what_an_interruption_can_leave_is_mended(tmp_path: Path, damage: str) -> None:
    source = Counted()
    source.broken = 9
    with pytest.raises(OptionError):
        prepare_images(source, 16, str(tmp_path))
    (record,), (part,) = tmp_path.rglob("finished.txt"), tmp_path.rglob("images.npy.part")
    if damage == "record lost":
        record.unlink()
    elif damage.startswith("record cut"):
        record.write_text(record.read_text()[: -7 if damage.endswith("short") else -4])
    else:
        part.unlink()
    source.broken, source.reads = None, []
    np.testing.assert_array_equal(np.load(prepare_images(source, 16, str(tmp_path))), source.pixels())
    assert sorted(source.reads) == ([6, 7, 8, 9] if damage.startswith("record cut") else list(range(10)))


@pytest.mark.usefixtures("chunks_of_three")
def test_of_two_that_prepare_at_once_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    renamed: list[str] = []
    rename = os.replace
    monkeypatch.setattr(images.os, "replace", lambda old, new: (renamed.append(Path(new).name), rename(old, new)))
    source = Counted()
    source.seconds = 0.02
    threads = [threading.Thread(target=prepare_images, args=(source, 16, str(tmp_path))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert renamed == ["images.npy.part", "images.npy"]  # what one has finished the other leaves alone
    assert sorted(source.reads) == list(range(10))
    np.testing.assert_array_equal(np.load(prepare_images(source, 16, str(tmp_path))), source.pixels())


KILLED = """
import sys
from hf_bilb.data.images import files as images
from tests.data.celeba_files import Counted
images.CHUNK = 3
source = Counted()
source.seconds = 0.05
read = source.read
def slow(row):
    if row == 6:
        print("there", flush=True)
        images.os.kill(images.os.getpid(), 9)
    return read(row)
source.read = slow
images.prepare_images(source, 16, sys.argv[1])
"""


@pytest.mark.usefixtures("chunks_of_three")
def test_a_killed_process_leaves_what_the_next_goes_on_with(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    source = Counted()
    np.testing.assert_array_equal(np.load(prepare_images(source, 16, str(tmp_path))), source.pixels())
    assert sorted(source.reads) == [6, 7, 8, 9]


def test_files_that_changed_are_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "celeba"
    write_celeba(folder)
    load_celeba(options(folder))
    face = folder / "img_align_celeba" / name_of(2)
    other = (folder / "img_align_celeba" / name_of(9)).read_bytes()
    face.write_bytes(other)
    os.utime(face, ns=(0, 12345))
    pixels = load_celeba(options(folder)).train[2]["pixel_values"].numpy() * 255
    np.testing.assert_array_equal(pixels, decode(other, 16, "x"))


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    write_celeba(tmp_path / "celeba")
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError) as caught:
        load_celeba(CelebaOptions(folder=str(tmp_path / "celeba"), cache_dir=str(tmp_path / "file")))
    assert str(caught.value).startswith("data.cache_dir: ")
    assert str(caught.value).endswith("cannot be written: Not a directory")


@pytest.mark.parametrize("former", [False, True])
def test_without_a_folder_the_cache_of_all_data_sets_is_taken_and_a_former_one_is_used_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, former: bool
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr("hf_bilb.data.cache.default_root", lambda: tmp_path / "ours")
    source = Counted()
    if former:
        prepare_images(source, 16, str(tmp_path / "datasets" / "hf_bilb"))
    reads = len(source.reads)
    file = prepare_images(source, 16)
    assert file.is_relative_to(tmp_path / ("datasets/hf_bilb" if former else "ours"))
    assert len(source.reads) == (reads if former else 10)


# --- batches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_hold_the_rows_asked_for(tmp_path: Path, workers: int) -> None:
    write_celeba(tmp_path / "celeba")
    train = load_celeba(options(tmp_path / "celeba")).train
    order = [5, 0, 11, 3, 3]
    loader = DataLoader(train, batch_sampler=[order, [7]], collate_fn=collate_images, num_workers=workers)
    first, second = loader
    assert first["pixel_values"].shape == (5, 3, 16, 16) and second["pixel_values"].shape == (1, 3, 16, 16)
    for batch, rows in ((first, order), (second, [7])):
        for position, row in enumerate(rows):
            for name in ("pixel_values", "labels"):
                assert torch.equal(batch[name][position], train[row][name])
    assert torch.equal(train[-1]["labels"], train[11]["labels"])
    with pytest.raises(IndexError):
        train[12]


def test_rows_and_batches_are_joined_in_any_mixture() -> None:
    rows = [{"pixel_values": torch.full((3, 2, 2), float(k)), "labels": torch.full((4,), float(k))} for k in range(3)]
    two = {name: torch.stack([rows[1][name], rows[2][name]]) for name in rows[0]}
    joined = collate_images([rows[0], two])
    assert joined["pixel_values"][:, 0, 0, 0].tolist() == joined["labels"][:, 0].tolist() == [0, 1, 2]
    assert collate_images([rows[1]])["labels"].shape == (1, 4)


def test_pickled_rows_carry_no_pixels(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (50, 3, 64, 64), dtype=np.uint8))
    rows = ImageRows(tmp_path / "images.npy", np.arange(50), np.zeros((50, 2), np.float32))
    pickled = pickle.dumps(rows)
    assert len(pickled) < 3000
    assert torch.equal(pickle.loads(pickled)[7]["pixel_values"], rows[7]["pixel_values"])
