"""`hf-bilb prepare nyuv2`: the official file in MTAN's layout, scenes, interruptions, what can be wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from hf_bilb.cli import main
from hf_bilb.data.dense import prepare_nyuv2 as prepare
from hf_bilb.data.dense.nyuv2 import Nyuv2Options, load_nyuv2
from hf_bilb.data.dense.nyuv2_labels import classes_13, official_split
from hf_bilb.data.dense.prepare_nyuv2 import SETTINGS, prepare_nyuv2
from hf_bilb.data.dense.surface_normals import NYUV2_CAMERA
from hf_bilb.errors import MissingPackageError, OptionError
from tests.data.dense_scenes import plane, write_mtan
from tests.processes import group_is_gone, wait_for

SPLIT = (np.array([3, 0]), np.array([1, 2, 4]))
SCENES = ["living_room", "bedroom", "", "café", "bedroom"]


# --- the official file --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A file as MATLAB writes it, of 5 images: a plane each, and labels of all 894 classes."""
    h5py = pytest.importorskip("h5py", reason="needs h5py")
    generator = np.random.default_rng(0)
    content = {
        "images": generator.integers(0, 256, (5, 480, 640, 3), dtype=np.uint8),
        "labels": generator.integers(0, 895, (5, 480, 640), dtype=np.uint16),
        "depths": np.stack([plane((0.1 * i, -0.2, -1.0), 2.0 + i, (480, 640), NYUV2_CAMERA)[0] for i in range(5)]),
    }
    content["depths"][:, :20] = 0
    file = tmp_path_factory.mktemp("official") / "nyu_depth_v2_labeled.mat"
    with h5py.File(file, "w") as stream:
        for name, values in content.items():
            turned = np.ascontiguousarray(values.transpose(0, *reversed(range(1, values.ndim))))
            stream[name] = turned.astype(np.float32) if name == "depths" else turned
        write_scenes(stream, SCENES)
    return file, content


def write_scenes(stream: object, scenes: list[str]) -> None:
    """A cell array as MATLAB writes it: references to columns of characters, of an empty one to its shape."""
    import h5py

    assert isinstance(stream, h5py.File)
    references = np.empty((1, len(scenes)), h5py.ref_dtype)
    for number, text in enumerate(scenes):
        characters = np.array([[ord(character)] for character in text], np.uint16)
        cell = stream.create_dataset(f"#refs#/{number}", data=characters if text else np.zeros(2, np.uint64))
        cell.attrs["MATLAB_class"] = np.bytes_("char")
        if not text:
            cell.attrs["MATLAB_empty"] = np.uint8(1)
        references[0, number] = cell.ref
    stream.create_dataset("sceneTypes", data=references, dtype=h5py.ref_dtype)


def changed(official: Path, target: Path) -> object:
    """A copy of the official file, open for changes."""
    import h5py

    target.write_bytes(official.read_bytes())
    return h5py.File(target, "r+")


def test_the_official_file_becomes_mtan_s_layout(official: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    file, content = official
    assert prepare_nyuv2(file, tmp_path / "nyuv2", (240, 320), num_workers=2, split=SPLIT) == (2, 3)
    data = load_nyuv2(Nyuv2Options(str(tmp_path / "nyuv2"), augment=False, cache_dir=str(tmp_path / "cache")))
    for rows, chosen in ((data.train, SPLIT[0]), (data.test, SPLIT[1])):
        assert len(rows) == len(chosen)
        for row, image in zip(rows, chosen.tolist(), strict=True):
            pixels = torch.from_numpy(content["images"][image]).permute(2, 0, 1).float()[None] / 255
            small = torch.nn.functional.interpolate(pixels, (240, 320), mode="bilinear", antialias=True)[0]
            torch.testing.assert_close(row["pixel_values"], small, rtol=0, atol=1e-5)
            labels, depth = (content[name][image][1::2, 1::2] for name in ("labels", "depths"))
            assert np.array_equal(row["segmentation"].numpy(), classes_13()[labels])
            np.testing.assert_array_equal(row["depth"].numpy(), depth.astype(np.float32))
            known = (row["normals"] != 0).any(dim=0)
            unit = plane((0.1 * image, -0.2, -1.0), 1.0, (4, 4))[1]
            assert known[20:-5, 5:-5].all() and not known[:10].any()
            np.testing.assert_allclose(row["normals"][:, known].mean(dim=1).numpy(), unit, atol=1e-4)


def test_preparing_goes_on_where_it_stood(official: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    file, _ = official
    prepare_nyuv2(file, tmp_path, (48, 64), num_workers=1, split=SPLIT)
    files = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.rglob("*.npy")}
    assert len(files) == 20 and not list(tmp_path.rglob("*.tmp"))
    gone = tmp_path / "val" / "normal" / "1.npy"
    gone.rename(gone.with_suffix(".tmp"))  # as an interruption leaves it
    prepare_nyuv2(file, tmp_path, (48, 64), num_workers=2, split=SPLIT)
    for path, (before, changed_at) in files.items():
        assert path.read_bytes() == before
        assert (path.stat().st_mtime_ns == changed_at) == (path.parent.parent.name != "val" or path.stem != "1")
    with pytest.raises(OptionError) as error:
        prepare_nyuv2(file, tmp_path, (24, 32), split=SPLIT)
    assert str(error.value) == (
        f"{tmp_path}: holds images prepared with {{'size': [48, 64], 'train': 2, 'val': 3}}, not "
        "{'size': [24, 32], 'train': 2, 'val': 3}; choose another folder"
    )


def test_the_kind_of_scene_is_a_label_of_the_whole_image(
    official: tuple[Path, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    file = tmp_path / "out" / "image_labels.csv"
    prepare_nyuv2(official[0], file.parent, (8, 16), num_workers=1, split=SPLIT)
    lines = ["part,image,scene", "train,0,café", "train,1,living_room", "val,0,bedroom", "val,1,", "val,2,bedroom"]
    assert file.read_bytes() == "".join(f"{line}\n" for line in lines).encode()
    own = "part,image,scene,window\n"
    file.write_text(own, encoding="utf-8")
    prepare_nyuv2(official[0], file.parent, (8, 16), num_workers=1, split=SPLIT)
    assert file.read_text(encoding="utf-8") == own  # what somebody has added to it stays
    file.unlink()
    prepare_nyuv2(official[0], file.parent, (8, 16), num_workers=1, split=SPLIT)
    assert file.read_text(encoding="utf-8").splitlines() == lines


def test_a_file_without_scenes_is_prepared_all_the_same(
    official: tuple[Path, dict[str, np.ndarray]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with changed(official[0], tmp_path / "x.mat") as stream:  # type: ignore[attr-defined]
        del stream["sceneTypes"]
    assert prepare_nyuv2(tmp_path / "x.mat", tmp_path / "out", (8, 16), num_workers=1, split=SPLIT) == (2, 3)
    assert caplog.messages == [f"{tmp_path}/x.mat: has no sceneTypes, so there will be no image_labels.csv"]
    assert len(list((tmp_path / "out").rglob("*.npy"))) == 20 and not list(tmp_path.rglob("*.csv"))


def test_scenes_that_are_something_else_are_one_line(
    official: tuple[Path, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    import h5py

    def error() -> str:
        with pytest.raises(OptionError) as found:
            prepare_nyuv2(tmp_path / "x.mat", tmp_path / "out", (8, 16), num_workers=1, split=SPLIT)
        return str(found.value)

    for values in (np.arange(5.0), np.array([b"bedroom"] * 5, object)):
        with changed(official[0], tmp_path / "x.mat") as stream:  # type: ignore[attr-defined]
            del stream["sceneTypes"]
            stream["sceneTypes"] = values
        assert error().startswith(f"{tmp_path}/x.mat: sceneTypes is ")
        assert error().endswith(" [5], expected references [1, 5]")
    with changed(official[0], tmp_path / "x.mat") as stream:  # type: ignore[attr-defined]
        del stream["sceneTypes"], stream["#refs#"]
        write_scenes(stream, SCENES[:3])
    assert error() == f"{tmp_path}/x.mat: sceneTypes is object [1, 3], expected references [1, 5]"
    with changed(official[0], tmp_path / "x.mat") as stream:  # type: ignore[attr-defined]
        del stream["sceneTypes"]
        stream.create_dataset("sceneTypes", (1, 5), h5py.ref_dtype)  # they refer to nothing
    assert error().startswith(f"{tmp_path}/x.mat: sceneTypes cannot be read: ") and "\n" not in error()
    assert not list((tmp_path / "out").rglob("*.npy"))


# --- interruptions ------------------------------------------------------------------------------------------------

# The command, for a file with so few images.
COMMAND = """
import sys
import numpy as np
from hf_bilb.data.dense import prepare_nyuv2 as prepare
prepare.NUM_IMAGES = 24
prepare.official_split = lambda: (np.arange(1, 24, 2), np.arange(0, 24, 2))
from hf_bilb.cli import main
main()
"""


def start(file: Path, output: Path, workers: int) -> subprocess.Popen[str]:
    """In a process group of its own, as a terminal gives one to a command."""
    arguments = ["prepare", "nyuv2", str(file), "--output", str(output), "--size", "96", "128"]
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *arguments, "--workers", str(workers)],
        start_new_session=True,
        # Tests that run in the background have none, and their children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def two_dozen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Path, bytes]]:
    """A file of 24 images, compressed in pieces as MATLAB does it, and what becomes of it without an interruption."""
    h5py = pytest.importorskip("h5py", reason="needs h5py")
    root = tmp_path_factory.mktemp("two_dozen")
    generator = np.random.default_rng(1)
    with h5py.File(root / "x.mat", "w") as stream:
        packed = {"compression": "gzip", "compression_opts": 3}
        images = stream.create_dataset("images", (24, 3, 640, 480), np.uint8, chunks=(1, 1, 320, 480), **packed)
        depths = stream.create_dataset("depths", (24, 640, 480), np.float32, chunks=(1, 80, 480), **packed)
        labels = stream.create_dataset("labels", (24, 640, 480), np.uint16, chunks=(1, 160, 480), **packed)
        for row in range(24):
            images[row] = generator.integers(0, 256, (3, 1, 480))
            depths[row] = plane((0.1, 0.02 * row, -1.0), 2.0, (480, 640), NYUV2_CAMERA)[0].T
            labels[row] = generator.integers(0, 895)
        write_scenes(stream, ["kitchen", "study"] * 12)
    process = start(root / "x.mat", root / "out", 1)
    output, error = process.communicate(timeout=120)
    assert (process.returncode, output) == (0, f"{root}/out: 12 training and 12 test images\n"), error
    return root / "x.mat", contents(root / "out")


def contents(folder: Path) -> dict[Path, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {path.relative_to(folder): path.read_bytes() for path in files}


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX processes")
@pytest.mark.parametrize(("how", "workers"), [("interrupt", 2), ("interrupt", 1), ("kill", 2)])
def test_the_command_goes_on_where_it_was_interrupted(
    two_dozen: tuple[Path, dict[Path, bytes]], tmp_path: Path, how: str, workers: int
) -> None:
    file, expected = two_dozen
    assert len(expected) == 4 * 24 + 2
    process = start(file, tmp_path, workers)
    wait_for(lambda: len(list(tmp_path.rglob("*.npy"))) >= 8 or process.poll() is not None, 60)
    assert process.poll() is None
    if how == "interrupt":
        os.killpg(process.pid, signal.SIGINT)  # all of them, as Ctrl-C does
    else:
        os.kill(process.pid, signal.SIGKILL)  # the parent alone
    output, error = process.communicate(timeout=60)
    assert output == "" and "Traceback" not in error
    if how == "interrupt":
        assert process.returncode == 130
        *bar, last = [line for line in error.splitlines() if line]
        assert last == "hf-bilb: interrupted; the same command goes on where it stood"
        assert all(line.startswith("preparing nyuv2: ") for line in bar)
    wait_for(lambda: group_is_gone(process.pid))
    found = contents(tmp_path)
    finished = {path for path in found if path.suffix != ".tmp"}
    assert 8 <= len(finished) < len(expected) and all(found[path] == expected[path] for path in finished)
    before = {path: (tmp_path / path).stat().st_mtime_ns for path in finished}
    process = start(file, tmp_path, 2)
    output, error = process.communicate(timeout=120)
    assert process.returncode == 0 and output == f"{tmp_path}: 12 training and 12 test images\n"
    assert contents(tmp_path) == expected
    last_kind = {(path.parts[0], path.stem) for path in before if path.parent.name == prepare.KINDS[-1]}
    kept = [path for path in before if path.suffix != ".npy" or (path.parts[0], path.stem) in last_kind]
    assert len(kept) >= 6 and all((tmp_path / path).stat().st_mtime_ns == before[path] for path in kept)


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX processes")
def test_two_commands_at_once_do_not_get_in_each_others_way(
    two_dozen: tuple[Path, dict[Path, bytes]], tmp_path: Path
) -> None:
    both = [start(two_dozen[0], tmp_path, 1) for _ in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum(f"{tmp_path}: waiting for another process that prepares it" in error for error in errors) == 1
    assert contents(tmp_path) == two_dozen[1]


def test_a_worker_that_is_killed_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> tuple[int, int]:
        raise BrokenProcessPool("A process in the process pool was terminated abruptly")

    monkeypatch.setattr(prepare, "prepare_nyuv2", killed)
    what = "a worker process was killed (no memory left?); the same command goes on from what is finished"
    assert run(tmp_path / "x.mat", "--output", tmp_path / "out") == (1, f"hf-bilb: error: {what}\n")


# --- what is wrong ------------------------------------------------------------------------------------------------


def test_a_damaged_image_is_one_line_that_names_it(two_dozen: tuple[Path, dict[Path, bytes]], tmp_path: Path) -> None:
    import h5py

    with h5py.File(two_dozen[0]) as stream:
        place = stream["depths"].id.get_chunk_info_by_coord((3, 0, 0)).byte_offset
    damaged = bytearray(two_dozen[0].read_bytes())
    damaged[place : place + 64] = bytes(64)
    (tmp_path / "x.mat").write_bytes(damaged)
    with pytest.raises(OptionError) as error:
        prepare_nyuv2(tmp_path / "x.mat", tmp_path / "out", (8, 16), 2, (np.arange(12), np.arange(12, 24)))
    assert str(error.value).startswith(f"{tmp_path}/x.mat: image 3 cannot be read: ")
    assert "\n" not in str(error.value)


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX processes")
def test_no_space_left_is_one_line(official: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    import resource

    process = os.fork()
    if process == 0:
        try:
            stream = (tmp_path / "message").open("wb", buffering=0)
            sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
            prepare_nyuv2(official[0], tmp_path / "out", (16, 32), 2, SPLIT)
        except OptionError as error:
            stream.write(str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(process, 0)
    message = (tmp_path / "message").read_text(encoding="utf-8")
    assert message == f"{tmp_path}/out: cannot be written: File too large"


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["prepare", "nyuv2", *map(str, arguments)])
    return result.exit_code, result.output


def test_what_is_wrong_with_the_official_file_is_one_line(
    official: tuple[Path, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    import h5py

    file, _ = official
    out = tmp_path / "out"
    code, output = run(file, "--output", out)
    assert (code, output) == (2, f"hf-bilb: error: {file}: has 5 images, expected NYU Depth V2's 1449\n")
    code, output = run(tmp_path / "none.mat", "--output", out)
    assert code == 2 and "none.mat: cannot be read as nyu_depth_v2_labeled.mat (MATLAB 7.3): no such file" in output
    other = tmp_path / "other.mat"
    other.write_bytes(b"MATLAB 5.0 MAT-file")
    code, output = run(other, "--output", out)
    assert code == 2 and "other.mat: cannot be read as nyu_depth_v2_labeled.mat" in output and output.count("\n") == 1
    with h5py.File(other, "w") as stream:
        stream["images"] = np.zeros((1, 3, 64, 48), np.uint8)
    code, output = run(other, "--output", out)
    assert code == 2 and "other.mat: images is [1, 3, 64, 48], expected [N, 3, 640, 480]" in output
    for wrong in ("folder", "text"):
        with h5py.File(other, "w") as stream:
            if wrong == "folder":
                stream.create_group("images")
            else:
                stream["images"] = np.zeros((1, 3, 640, 480), "S1")
        code, output = run(other, "--output", out)
        assert code == 2 and output.endswith("images is no array of numbers, expected NYU Depth V2's file\n")
    with h5py.File(other, "w") as stream:
        stream["rawDepths"] = np.zeros(3)
    code, output = run(other, "--output", out)
    assert code == 2 and "other.mat: has no images (it has rawDepths), expected NYU Depth V2's file" in output
    assert not out.exists()


def test_a_note_that_is_damaged_is_one_line(official: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    (tmp_path / SETTINGS).write_text("{")
    with pytest.raises(OptionError, match=f"{SETTINGS}: cannot be read: "):
        prepare_nyuv2(official[0], tmp_path, split=SPLIT)


def test_a_folder_of_other_images_is_left_alone(official: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    write_mtan(tmp_path)
    with pytest.raises(OptionError, match="holds images that were not prepared by this command; choose another folder"):
        prepare_nyuv2(official[0], tmp_path, split=SPLIT)


def test_without_h5py_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(MissingPackageError, match=r"preparing nyuv2 needs h5py: pip install hf-bilb\[nyuv2\]"):
        prepare_nyuv2(tmp_path / "x.mat", tmp_path / "out")
    assert run(tmp_path / "x.mat", "--output", tmp_path / "out")[0] == 2


def test_all_images_of_the_official_split_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, int, int]] = []

    def noted(job: prepare._Job) -> int:
        written.extend((folder.name, number, row) for row, (folder, number) in zip(job.rows, job.places, strict=True))
        return len(job.rows)

    monkeypatch.setattr(prepare, "_check_file", lambda file: 1449)
    monkeypatch.setattr(prepare, "_scenes", lambda file, count: None)
    monkeypatch.setattr(prepare, "_write", noted)
    code, output = run(tmp_path / "x.mat", "--output", tmp_path / "out", "--workers", 1)
    assert code == 0 and "out: 795 training and 654 test images\n" in output
    train, test = official_split()
    expected = [("train", i, row) for i, row in enumerate(train)] + [("val", i, row) for i, row in enumerate(test)]
    assert written == expected
