"""The partial labels example on made-up files: what it keeps of the labels, and the table of its runs."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from examples import partial_labels as example
from hf_bilb.reporting.results import read_results
from tests.data.dense_scenes import write_mtan

ROOT = Path(__file__).parents[2]
KINDS = ("label", "depth", "normal")
SHORT = [
    "trainer.max_steps=2", "trainer.per_device_train_batch_size=4", "trainer.use_cpu=true", "trainer.disable_tqdm=true",
    "trainer.logging_steps=1", "trainer.warmup_steps=0", "trainer.report_to=none", "trainer.save_strategy=no",
    "model.decoder_size=8",
    "model.encoder={model_type: resnet, embedding_size: 8, hidden_sizes: [8, 12], depths: [1, 1], layer_type: basic}",
]  # fmt: skip
BED, FLOOR, SOFA, WALL = 0, 4, 8, 11


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(ROOT)
    folder = tmp_path / "nyuv2"
    write_mtan(folder, (12, 5), size=(24, 32))
    for part, count in (("train", 12), ("val", 5)):
        for number in range(count):  # rooms of three kinds, every second one with a floor
            classes = np.full((24, 32), (BED, SOFA, WALL)[number % 3], np.float32)
            classes[:12] = FLOOR if number % 2 else -1
            np.save(folder / part / "label" / f"{number}.npy", classes)
    return folder


def lines_of(folder: Path) -> dict[tuple[str, int], dict[str, str]]:
    with (folder / "image_labels.csv").open(encoding="utf-8", newline="") as stream:
        return {(line["part"], int(line["image"])): line for line in csv.DictReader(stream)}


def test_what_is_kept_of_the_labels(source: Path, tmp_path: Path) -> None:
    example.make_partial(source, tmp_path / "some", seed=0)
    kept = {kind: {int(f.stem) for f in (tmp_path / "some" / "train" / kind).iterdir()} for kind in KINDS}
    assert [len(numbers) for numbers in kept.values()] == [4, 4, 4]
    assert set.union(*kept.values()) == set(range(12))
    for kind in ("image", *KINDS):
        for file in (tmp_path / "some").glob(f"*/{kind}/*.npy"):
            assert np.array_equal(np.load(file), np.load(source / file.parts[-3] / kind / file.name), equal_nan=True)
    assert all(len(os.listdir(tmp_path / "some" / "val" / kind)) == 5 for kind in ("image", *KINDS))
    lines = lines_of(tmp_path / "some")
    assert len(lines) == 17
    for (part, number), line in lines.items():
        room, floor = ("bedroom", "living room", "other")[number % 3], "yes" if number % 2 else "no"
        assert line["room"] in ({room} if part == "val" else {room, ""})
        assert line["floor"] in ({floor} if part == "val" else {floor, ""})
    for task in ("room", "floor"):
        assert 0 < sum(not line[task] for line in lines.values()) < 12
    for seed, same in ((0, True), (1, False)):
        example.make_partial(source, tmp_path / str(seed), seed)
        assert (lines_of(tmp_path / str(seed)) == lines) == same
    example.make_partial(source, tmp_path / "some", seed=1)  # into the same folder: nothing of before is left
    assert len(list((tmp_path / "some" / "train" / "depth").iterdir())) == 4


def test_the_table_says_what_the_runs_measured(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [*SHORT, "--data", str(source), "--output", str(tmp_path / "runs")]
    done = CliRunner().invoke(example.main, arguments)
    assert done.exit_code == 0, done.output
    assert "depth       4 of 12 training images" in done.output
    folder = tmp_path / "runs" / "seed-0"
    rows = [line.split() for line in (folder / "table.txt").read_text("utf-8").splitlines()]
    (accuracies,) = [row for row in rows if row[:2] == ["room", "accuracy"]]
    for word, method in zip(accuracies[2:4], ("ls", "bilb"), strict=True):
        metrics = {metric.key: metric.value for metric in read_results(folder / method).metrics}
        assert {"segmentation_miou", "depth_abs_error", "normals_mean_angle", "floor_macro_f1"} <= metrics.keys()
        assert float(word.rstrip("*")) == pytest.approx(metrics["room_accuracy"], rel=1e-3)
        assert (folder / method / "gallery.png").is_file()
    monkeypatch.setattr("hf_bilb.experiments.train.run_recipe", lambda *_: pytest.fail("trained again"))
    again = CliRunner().invoke(example.main, arguments)
    assert again.exit_code == 0, again.output


def test_a_set_that_lacks_labels_itself_is_one_line(source: Path, tmp_path: Path) -> None:
    (source / "train" / "depth" / "3.npy").unlink()
    done = CliRunner().invoke(example.main, ["--data", str(source), "--output", str(tmp_path / "runs")])
    assert done.exit_code != 0 and "train/depth/3.npy' is missing, expected a set with all" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "nowhere/train/image' holds no .npy files, expected MTAN's layout"),
        (["--seed", "-1"], "-1 is not in the range"),
        (["trainer.optimm=sgd"], "Error: trainer.optimm: unknown option, value 'sgd' (did you mean \"optim\"?)"),
    ],
)
def test_a_mistake_is_one_line(source: Path, arguments: list[str], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(example.main, ["--data", str(source), *arguments, "--output", str(tmp_path / "runs")])
    assert done.exit_code != 0 and message in done.output and "Traceback" not in done.output
