"""CelebA: files in the original layout and on the hub, their errors, the tasks, a recipe's run."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, f1_score

from hf_bilb.config.options import parse_options
from hf_bilb.data import DATA_SETS
from hf_bilb.data.images.celeba import ATTRIBUTES, SINGLE_TASK_F1, CelebaOptions, load_celeba, read_folder, read_hub
from hf_bilb.data.images.files import decode
from hf_bilb.data.rows import collate_images
from hf_bilb.errors import OptionError
from hf_bilb.experiments.recipe import read_recipe
from hf_bilb.experiments.train import run_recipe
from hf_bilb.losses.task_types import TaskType
from hf_bilb.reporting.results import read_results
from tests.data.celeba_files import change_line, made_up, name_of, write_celeba

ROOT = Path(__file__).parents[2]
REAL = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_real_data = [
    pytest.mark.data,
    pytest.mark.skipif(not (REAL / "celeba").is_dir(), reason="needs the faces in ../shared/data/celeba"),
]
PARTITION, LABELS = "list_eval_partition.txt", "list_attr_celeba.txt"


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def options(folder: Path, **changes: object) -> CelebaOptions:
    return CelebaOptions(folder=str(folder), cache_dir=str(folder.parent / "cache"), image_size=16, **changes)


# --- the original files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("archive", [False, True])
def test_parts_pixels_and_labels_are_those_of_the_files(tmp_path: Path, archive: bool) -> None:
    expected = write_celeba(tmp_path / "celeba", (12, 5, 6), archive)
    data = load_celeba(options(tmp_path / "celeba"))
    files, _ = made_up(23)
    row = 0
    for part, count in ((data.train, 12), (data.validation, 5), (data.test, 6)):
        assert len(part) == count
        for index in range(count):
            example = part[index]
            whole = torch.from_numpy(np.array(Image.open(io.BytesIO(files[row])))).permute(2, 0, 1)
            # torch's own resampling, in integers as Pillow's.
            resized = torch.nn.functional.interpolate(whole[None], (16, 16), mode="bilinear", antialias=True)[0]
            assert (example["pixel_values"] * 255 - resized.float()).abs().max() <= 1.001
            assert example["pixel_values"].dtype == example["labels"].dtype == torch.float32
            assert example["labels"].tolist() == expected[row].tolist()
            row += 1


def test_some_tasks_in_an_order_of_one_s_own(tmp_path: Path) -> None:
    labels = write_celeba(tmp_path / "celeba")
    tasks = ("Young", "Bald", "Smiling")
    columns = [ATTRIBUTES.index(task) for task in tasks]
    data = load_celeba(options(tmp_path / "celeba", tasks=tasks))
    np.testing.assert_array_equal(data.train.labels, labels[:12, columns])
    assert data.task_names == tasks and data.model_arguments["image_size"] == 16
    assert data.model_arguments["tasks"] == dict.fromkeys(tasks, TaskType("multi_label"))
    assert list(data.model_arguments["tasks"]) == list(tasks)
    keys = ["Young_f1", "Bald_f1", "Smiling_f1", "mean_f1", "mean_accuracy", "mean_roc_auc", "delta_m"]
    assert [metric.key for metric in data.metrics] == list(data.trivial_metrics) == keys
    assert data.single_task_base == {"Young_f1": 0.91907, "Bald_f1": 0.7205613, "Smiling_f1": 0.924108}
    assert [metric.task for metric in data.metrics] == [*tasks, "", "", "", ""]


def test_the_header_says_which_column_is_which(tmp_path: Path) -> None:
    labels = write_celeba(tmp_path)
    file = tmp_path / LABELS
    lines = [line.split() for line in file.read_text().splitlines()]
    turned = [lines[0], lines[1][::-1], *([line[0], *line[:0:-1]] for line in lines[2:])]
    file.write_text("\r\n".join(" ".join(line) for line in turned))
    np.testing.assert_array_equal(read_folder(tmp_path, ("Bald", "Young")).labels, labels[:, [4, 39]])


def test_a_part_of_the_set_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_celeba(tmp_path / "celeba", (12, 5, 6))
    load_celeba(options(tmp_path / "celeba"))
    assert "23 of CelebA's 202599 images (12 training, 5 validation, 6 test): results do not compare" in caplog.text


def test_max_train_takes_the_first_training_images_alone(tmp_path: Path) -> None:
    labels = write_celeba(tmp_path / "celeba", (12, 5, 6))
    data = load_celeba(options(tmp_path / "celeba", max_train=4))
    assert [len(part) for part in (data.train, data.validation, data.test)] == [4, 5, 6]
    np.testing.assert_array_equal(data.train.labels, labels[:4])


def test_the_trivial_metrics_are_those_of_constant_answers(tmp_path: Path) -> None:
    write_celeba(tmp_path / "celeba", (12, 5, 6))
    data = load_celeba(options(tmp_path / "celeba"))
    train, test = data.train.labels, data.test.labels
    f1 = [f1_score(test[:, k], np.ones(6)) for k in range(40)]
    often = (train.mean(axis=0) > 0.5).astype(int)
    accuracy = [accuracy_score(test[:, k], np.full(6, often[k])) for k in range(40)]
    found = data.trivial_metrics
    np.testing.assert_allclose([found[f"{name}_f1"] for name in ATTRIBUTES], f1, rtol=1e-12)
    assert found["mean_accuracy"] == pytest.approx(np.mean(accuracy), rel=1e-12)
    assert found["mean_f1"] == pytest.approx(np.mean(f1), rel=1e-12) and found["mean_roc_auc"] == 0.5
    base = np.array(list(SINGLE_TASK_F1.values()))
    assert found["delta_m"] == pytest.approx(np.mean((base - f1) / base) * 100, rel=1e-12)


# --- what is wrong with them --------------------------------------------------------------------------------------


def _break(folder: Path, change: str) -> None:
    labels, partition, faces = folder / LABELS, folder / PARTITION, folder / "img_align_celeba"
    changes = {
        "no label file": labels.unlink,
        "no partition file": partition.unlink,
        "no images": lambda: faces.rename(folder / "images"),
        "label 0": lambda: change_line(labels, 5, "-1", " 0"),
        "short row": lambda: change_line(labels, 6, "-1", ""),
        "no count": lambda: change_line(labels, 1, "23", "22 23"),
        "cut off": lambda: change_line(labels, 1, "23", "24"),
        "no column": lambda: change_line(labels, 2, "Smiling", "Smile"),
        "part 3": lambda: change_line(partition, 4, " 0", " 3"),
        "not listed": lambda: change_line(partition, 4, "", ""),
        "no test": lambda: partition.write_text(partition.read_text().replace(" 2\n", " 1\n")),
        "missing image": (faces / name_of(7)).unlink,
        "cut image": lambda: (faces / name_of(7)).write_bytes((faces / name_of(7)).read_bytes()[:300]),
        "empty image": lambda: (faces / name_of(7)).write_bytes(b""),
        "text": lambda: (faces / name_of(7)).write_text("<html>not found</html>"),
    }
    changes[change]()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no label file", "data.folder: '{}' has neither list_attr_celeba.txt nor Anno/list_attr_celeba.txt"),
        ("no partition file", "data.folder: '{}' has neither list_eval_partition.txt nor Eval/list_eval_partition.txt"),
        ("no images", "data.folder: '{}' has neither img_align_celeba nor Img/img_align_celeba"),
        ("label 0", "{}/list_attr_celeba.txt, row 5: '0' is no label of task "),
        ("short row", "{}/list_attr_celeba.txt, row 6: 39 labels of '000004.jpg', expected 40"),
        ("no count", "{}/list_attr_celeba.txt, row 1: '22 23' is not valid, expected the number of images"),
        ("cut off", "{}/list_attr_celeba.txt: lists 23 images, expected 24, as row 1 says; is it cut off?"),
        ("no column", "{}/list_attr_celeba.txt, row 2: has no column for task Smiling (it has 5_o_Clock_Shadow, "),
        ("part 3", "{}/list_eval_partition.txt, row 4: '000004.jpg 3' is not valid, expected an image and 0, 1 or 2"),
        ("not listed", "{}/list_eval_partition.txt: has no line for '000004.jpg' ({}/list_attr_celeba.txt, row 6)"),
        ("no test", "data: '{}' has no test images"),
        ("missing image", "{}/img_align_celeba: 1 of the 23 images in {}/list_attr_celeba.txt are missing, first "
                          "'000008.jpg' (row 10); data.allow_missing=true leaves them out"),
        ("cut image", "{}/img_align_celeba/000008.jpg: does not decode: "),
        ("empty image", "{}/img_align_celeba/000008.jpg: does not decode: 0 bytes that are no image"),
        ("text", "{}/img_align_celeba/000008.jpg: does not decode: 22 bytes that are no image"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_that_names_file_and_row(tmp_path: Path, change: str, message: str) -> None:
    folder = tmp_path / "celeba"
    write_celeba(folder)
    _break(folder, change)
    with pytest.raises(OptionError) as caught:
        load_celeba(options(folder))
    assert one_line(caught).startswith(message.replace("{}", str(folder)))


def test_the_task_of_a_wrong_label_is_named(tmp_path: Path) -> None:
    write_celeba(tmp_path)
    lines = (tmp_path / LABELS).read_text().splitlines()
    cells = lines[4].split()
    cells[1 + ATTRIBUTES.index("Smiling")] = "2"
    change_line(tmp_path / LABELS, 5, "", " ".join(cells))
    with pytest.raises(OptionError, match=r"row 5: '2' is no label of task Smiling, expected -1 or 1$"):
        read_folder(tmp_path, ("Bald",))


def test_missing_images_can_be_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "celeba"
    labels = write_celeba(folder)
    for row in (7, 14):
        (folder / "img_align_celeba" / name_of(row)).unlink()
    data = load_celeba(options(folder, allow_missing=True))
    assert (
        "2 of the 23 images" in caplog.text
        and "are missing, first '000008.jpg' (row 10); they are left out" in caplog.text
    )
    np.testing.assert_array_equal(data.train.labels, np.delete(labels[:12], 7, axis=0))
    assert [len(part) for part in (data.train, data.validation, data.test)] == [11, 4, 6]
    full, _ = made_up(23)
    np.testing.assert_array_equal(data.test[0]["pixel_values"].numpy() * 255, decode(full[17], 16, "x"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "data.folder: one of folder (the original files) and hub (a name) is needed, neither is set"),
        (
            {"folder": "a", "hub": "b"},
            "data.folder: one of folder (the original files) and hub (a name) is needed, both",
        ),
        ({"folder": "a", "tasks": ["Smilling"]}, "data.tasks: 'Smilling' is not known (did you mean \"Smiling\"?)"),
        ({"folder": "a", "tasks": []}, "data.tasks: is empty"),
        ({"folder": "a", "tasks": ["Bald", "Bald"]}, "data.tasks: 'Bald' stands twice"),
        ({"folder": "a", "image_size": 4}, "data.image_size: 4 is not valid, expected 8 to 1024"),
        ({"folder": "a", "max_train": 0}, "data.max_train: 0 is not valid, expected 1 or more"),
        ({"folder": "a", "image_siez": 4}, 'data.image_siez: unknown option, value 4 (did you mean "image_size"?)'),
    ],
)
def test_bad_options_are_one_line(values: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_options(DATA_SETS["celeba"].options, values, "data")
    assert one_line(caught).startswith(message)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        OptionError, match=r"^data\.folder: '.*nowhere' is no folder, expected one with img_align_celeba"
    ):
        load_celeba(options(tmp_path / "nowhere"))


# --- the hub ------------------------------------------------------------------------------------------------------


def hub_tables(kind: str, tasks: tuple[str, ...] = ("Smiling", "Bald")) -> tuple[dict, np.ndarray]:
    import datasets

    files, labels = made_up(9)
    labels = labels[:, [ATTRIBUTES.index(task) for task in tasks]]
    written = {"bool": labels.astype(bool), "0/1": labels, "-1/1": 2 * labels - 1}[kind]
    tables = {}
    for split, rows in (("train", slice(0, 4)), ("valid", slice(4, 6)), ("test", slice(6, 9))):
        columns = {task: written[rows, k].tolist() for k, task in enumerate(tasks)}
        table = {
            "image": [{"bytes": data, "path": None} for data in files[rows]],
            **columns,
            "celeb_id": [1] * len(files[rows]),
        }
        tables[split] = datasets.Dataset.from_dict(table).cast_column("image", datasets.Image())
    return tables, labels


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("kind", ["bool", "0/1", "-1/1"])
def test_a_hub_set_of_parquet_files(tmp_path: Path, kind: str) -> None:
    tables, labels = hub_tables(kind)
    for split, table in tables.items():
        table.to_parquet(str(tmp_path / "set" / "data" / f"{split}-00000-of-00001.parquet"))
    arguments = {"hub": str(tmp_path / "set"), "tasks": ("Smiling", "Bald"), "image_size": 16}
    data = load_celeba(CelebaOptions(**arguments, cache_dir=str(tmp_path / "cache")))
    joined = np.concatenate([part.labels for part in (data.train, data.validation, data.test)])
    np.testing.assert_array_equal(joined, labels)
    assert len(data.train) == 4
    np.testing.assert_array_equal(data.test[1]["pixel_values"].numpy() * 255, decode(made_up(9)[0][7], 16, "x"))
    # Read again, it is the same set.
    first = read_hub(str(tmp_path / "set"), ("Smiling",)).images.key
    assert read_hub(str(tmp_path / "set"), ("Smiling",)).images.key == first


@pytest.mark.usefixtures("offline")
def test_a_hub_set_of_image_files_and_one_saved_to_disk(tmp_path: Path) -> None:
    import datasets

    tables, labels = hub_tables("-1/1")
    files, _ = made_up(9)
    datasets.DatasetDict(tables).save_to_disk(str(tmp_path / "saved"))
    row = 0
    for split, table in tables.items():
        folder = tmp_path / "files" / {"valid": "validation"}.get(split, split)
        folder.mkdir(parents=True)
        lines = ["file_name,Smiling,Bald"]
        for _ in range(len(table)):
            (folder / name_of(row)).write_bytes(files[row])
            lines.append(f"{name_of(row)},{2 * labels[row, 0] - 1},{2 * labels[row, 1] - 1}")
            row += 1
        (folder / "metadata.csv").write_text("\n".join(lines))
    for name in ("saved", "files"):
        faces = read_hub(str(tmp_path / name), ("Smiling", "Bald"))
        np.testing.assert_array_equal(faces.labels, labels)
        assert [faces.images.read(row) for row in range(9)] == files
        assert faces.parts.tolist() == [0] * 4 + [1] * 2 + [2] * 3


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("label", "{}, valid, row 1: 3 is no label of task Smiling, expected 0 or 1"),
        ("null", "{}, valid, row 1: None is no label of task Smiling, expected 0 or 1"),
        ("column", "{}, train: has no column for task Smiling (it has image, Smile, Bald, celeb_id)"),
        ("split", "data.hub: '{}' has no split validation or valid or val (it has train, test)"),
        ("image", "data.hub: '{}' has 0 image columns, expected one (columns: Smiling, Bald, celeb_id)"),
        ("broken", "{}, test, row 2: does not decode: 3 bytes that are no image"),
        ("nothing", "data.hub: '{}' cannot be loaded: "),
    ],
)
def test_what_is_wrong_on_the_hub_is_one_line(tmp_path: Path, change: str, message: str) -> None:
    import datasets

    tables, _ = hub_tables("0/1")
    if change in ("label", "null"):
        columns = tables["valid"].remove_columns("Smiling")
        tables["valid"] = columns.add_column("Smiling", [0, 3 if change == "label" else None])
    elif change == "column":
        tables = {split: table.rename_column("Smiling", "Smile") for split, table in tables.items()}
    elif change == "image":
        tables = {split: table.remove_columns("image") for split, table in tables.items()}
    elif change == "split":
        del tables["valid"]
    elif change == "broken":
        test = tables["test"].cast_column("image", datasets.Image(decode=False)).to_dict()
        test["image"][2] = {"bytes": b"???", "path": None}
        tables["test"] = datasets.Dataset.from_dict(test).cast_column("image", datasets.Image())
    root = tmp_path / "set"
    root.mkdir()
    if change != "nothing":
        datasets.DatasetDict(tables).save_to_disk(str(root))
    with pytest.raises(OptionError) as caught:
        load_celeba(CelebaOptions(hub=str(root), tasks=("Smiling",), cache_dir=str(tmp_path / "cache")))
    assert one_line(caught).startswith(message.replace("{}", str(root)))


# --- recipes ------------------------------------------------------------------------------------------------------


def test_the_papers_protocol() -> None:
    # LDC-MTL experiments/celeba/trainer.py: 15 epochs, batch 256, Adam at 1e-3 with StepLR(3, 0.3), no clipping.
    for name in ("ls", "bilb"):
        recipe = read_recipe(ROOT / "recipes" / "celeba" / f"{name}.yaml")
        expected = {
            "num_train_epochs": 15, "per_device_train_batch_size": 256, "learning_rate": 1e-3, "weight_decay": 0,
            "max_grad_norm": 0, "step_lr": {"epochs": 3, "factor": 0.3}, "metric_for_best_model": "mean_f1",
        }  # fmt: skip
        assert {key: recipe.trainer[key] for key in expected} == expected
        assert recipe.model == {"name": "celeba_cnn", "width": 64} and recipe.data["image_size"] == 64
    assert recipe.balancer["learning_rate"] == "follow_model" and recipe.balancer["discrepancy_weight"] == 0.01


def test_a_model_that_returns_logits_alone_gets_the_losses_of_the_papers(tmp_path: Path) -> None:
    write_celeba(tmp_path / "celeba")
    data = load_celeba(options(tmp_path / "celeba", tasks=("Young", "Bald")))
    batch = collate_images([data.train[row] for row in range(12)])
    logits = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    losses, num_items = data.task_loss_func({"logits": logits}, batch)
    expected = [torch.nn.functional.binary_cross_entropy(logits[:, k].sigmoid(), batch["labels"][:, k]) for k in (0, 1)]
    torch.testing.assert_close(losses, torch.stack(expected))
    assert num_items.tolist() == [12, 12]


@pytest.mark.parametrize("name", ["ls_small", "bilb"])
def test_a_recipe_trains_and_leaves_results(tmp_path: Path, name: str) -> None:
    write_celeba(tmp_path / "celeba", (48, 16, 16))
    changes = [
        f"data.folder={tmp_path}/celeba",
        f"data.cache_dir={tmp_path}/cache",
        "data.image_size=16",
        "data.tasks=[Bald, Smiling, Young]",
        "model.width=4",
        f"trainer.output_dir={tmp_path}/run",
        "trainer.num_train_epochs=12",
        "trainer.per_device_train_batch_size=8",
        "trainer.dataloader_num_workers=0",
        "trainer.learning_rate=1e-2",
        "trainer.warmup_steps=0",
        "trainer.use_cpu=true",
        "evaluation.plots=false",
    ]
    run_recipe(read_recipe(ROOT / "recipes" / "celeba" / f"{name}.yaml", changes))
    results = read_results(tmp_path / "run")
    values = {metric.key: metric.value for metric in results.metrics}
    assert list(values) == [
        "Bald_f1", "Smiling_f1", "Young_f1", "mean_f1", "mean_accuracy", "mean_roc_auc", "delta_m",
    ]  # fmt: skip
    assert values["Smiling_f1"] > 0.9  # what can be learned is
    base = {metric.key: metric.base for metric in results.metrics}
    f1 = np.array([values[f"{name}_f1"] for name in ("Bald", "Smiling", "Young")])
    single = np.array([base[f"{name}_f1"] for name in ("Bald", "Smiling", "Young")])
    assert values["delta_m"] == pytest.approx(np.mean((single - f1) / single) * 100)
    assert results.trivial_predictor == "best constant answer" and "issue 2" in results.base_source


def test_an_image_encoder_in_place_of_the_cnn(tmp_path: Path) -> None:
    from transformers import AutoModel, ResNetConfig, ResNetModel

    write_celeba(tmp_path / "celeba", (24, 8, 8))
    sizes = ResNetConfig(embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic")
    ResNetModel(sizes).save_pretrained(tmp_path / "encoder")
    changes = [
        f"model={{name: image_encoder, encoder: {tmp_path}/encoder}}",
        f"data.folder={tmp_path}/celeba",
        f"data.cache_dir={tmp_path}/cache",
        "data.image_size=16",
        f"trainer.output_dir={tmp_path}/run",
        "trainer.num_train_epochs=1",
        "trainer.per_device_train_batch_size=8",
        "trainer.use_cpu=true",
        "evaluation.plots=false",
    ]
    results = run_recipe(read_recipe(ROOT / "recipes" / "celeba" / "bilb_small.yaml", changes))
    assert results.training["steps"] == 3 and len(results.metrics) == 44
    model = AutoModel.from_pretrained(tmp_path / "run")
    assert model.config.task_names == list(ATTRIBUTES) and model(torch.rand(2, 3, 16, 16)).logits.shape == (2, 40)


class TestRealFaces:
    pytestmark = needs_real_data

    def test_the_part_beside_the_project(self, tmp_path: Path) -> None:
        unpack = [sys.executable, str(REAL / "unpack.py"), str(tmp_path), "--only", "celeba"]
        subprocess.run(unpack, check=True, capture_output=True)
        data = load_celeba(CelebaOptions(folder=str(tmp_path / "celeba"), cache_dir=str(tmp_path / "cache")))
        with open(REAL / "celeba" / "celeba_attributes.csv", newline="") as stream:
            rows = list(csv.DictReader(stream))
        for number, part in enumerate((data.train, data.validation, data.test)):
            own = [row for row in rows if int(row["partition"]) == number]
            np.testing.assert_array_equal(part.labels, [[int(row[name]) for name in ATTRIBUTES] for row in own])
            for index in (0, len(own) // 2, len(own) - 1):
                with Image.open(tmp_path / "celeba" / "img_align_celeba" / own[index]["image"]) as face:
                    expected = np.asarray(face.convert("RGB")).transpose(2, 0, 1)
                np.testing.assert_array_equal(np.rint(part[index]["pixel_values"].numpy() * 255), expected)
        assert [len(part) for part in (data.train, data.validation, data.test)] == [6399, 793, 818]
