"""Texts, pairs of texts and lists of words as tokens, and where the labels of words go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from transformers import AutoTokenizer

from hf_bilb.errors import OptionError
from hf_bilb.losses.task_types import TaskType
from tests.data.glue_files import write_encoder
from tests.data.own.tables import labels, load, three_parts, write_csv, write_jsonl

TAGS: dict[str, Any] = {"type": "token_classification"}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_encoder(tmp_path_factory.mktemp("encoder")))


def test_a_pair_of_columns_is_tokenized_as_a_pair(tmp_path: Path, encoder: str) -> None:
    text = 'title,body,y\nthe cat,"a dog , on the mat",1\nthe tree,,2\n,the dog ran,3'
    files = three_parts(write_csv(tmp_path / "a.csv", text))
    inputs = {"text": ["title", "body"]}
    data = load(files=files, inputs=inputs, tasks={"y": {"type": "regression"}}, tokenizer=encoder, max_length=9)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    # An empty cell is the empty text.
    pairs = [("the cat", "a dog , on the mat"), ("the tree", ""), ("", "the dog ran")]
    for row, pair in enumerate(pairs):
        expected = tokenizer([pair[0]], [pair[1]], truncation=True, max_length=9)
        assert data.train[row]["input_ids"].tolist() == expected["input_ids"][0]
        assert data.train[row]["token_type_ids"].tolist() == expected["token_type_ids"][0]
    batch = data.data_collator([data.train[0], data.train[1]])
    assert {name: tuple(column.shape) for name, column in batch.items()} == {
        "input_ids": (2, 9), "token_type_ids": (2, 9), "attention_mask": (2, 9), "labels": (2, 1),
    }  # fmt: skip
    assert batch["attention_mask"].sum(1).tolist() == [9, 5]
    assert data.model_arguments["vocab_size"] == len(tokenizer) and data.model_arguments["max_length"] == 9
    assert type(data.processing_class) is type(tokenizer)


def test_text_is_kept_as_it_is_and_rows_without_any_are_said(
    tmp_path: Path, encoder: str, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"body": None, "y": 1}, {"body": "null", "y": 2}, {"body": "", "y": 3}]
    files = three_parts(write_jsonl(tmp_path / "a.jsonl", rows))
    data = load(files=files, inputs={"text": "body"}, tasks={"y": {"type": "regression"}}, tokenizer=encoder)
    assert [len(data.train[row]["input_ids"]) for row in range(3)] == [2, 3, 2]
    assert "6 rows have no text at all" in caplog.text


WORDS = [
    {"words": ["the", "dogs", "ran"], "tags": ["O", "B-animal", "O"], "topic": "dogs"},
    {"words": ["cat"], "tags": None, "topic": "cats"},
    {"words": ["a", "cat", "sat", "on"], "tags": ["O", "B-animal", None, "O"], "topic": None},
    {"words": ["tree"], "tags": None, "topic": None},
]


def subword_encoder(folder: Path) -> str:
    """A tokenizer that cuts words into letters, but for `a` and `the`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: n for n, word in enumerate([*special, *letters, *(f"##{one}" for one in letters), "the"])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=64, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]"
    )
    made.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_the_first_token_of_a_word_has_its_label(tmp_path: Path, kind: str) -> None:
    import pandas as pd

    file = tmp_path / f"a.{kind}"
    if kind == "csv":  # lists as Python writes them
        pd.DataFrame(WORDS).to_csv(file, index=False)
    else:
        write_jsonl(file, WORDS)
    tasks = {"tags": TAGS, "topic": {"type": "classification"}}
    tokenizer = subword_encoder(tmp_path / "letters")
    data = load(files=three_parts(str(file)), inputs={"text": "words"}, tasks=tasks, tokenizer=tokenizer, max_length=8)
    assert data.label_names == ("labels", "tag_labels") and len(data.train) == 3
    assert data.model_arguments["tasks"]["tags"] == TaskType("token_classification", 2, ("B-animal", "O"))
    # [CLS] the d ##o ##g ##s r [SEP]: cut within the third word, whose first token is still there.
    assert data.train[0]["tag_labels"].tolist() == [[-100], [1], [0], [-100], [-100], [-100], [1], [-100]]
    # [CLS] c ##a ##t [SEP]
    assert data.train[1]["tag_labels"].tolist() == [[-100]] * 5
    # [CLS] a c ##a ##t s ##a [SEP]: the third word has no label, the fourth is cut off.
    assert data.train[2]["tag_labels"].tolist() == [[-100], [1], [0], [-100], [-100], [-100], [-100], [-100]]
    batch = data.data_collator([data.train[row] for row in range(3)])
    assert batch["tag_labels"].shape == (3, 8, 1) and batch["tag_labels"].dtype == torch.int64
    assert (batch["tag_labels"][1, 5:] == -100).all()
    assert np.array_equal(batch["labels"].numpy(), np.float32([[1], [0], [np.nan]]), equal_nan=True)
    assert data.task_item_counts(batch).tolist() == [5, 2]
    assert "tags_f1_entity" in data.trivial_metrics


@pytest.mark.parametrize("made", [np.array, lambda words: list(np.array(words)), list])
def test_lists_as_pandas_writes_them(tmp_path: Path, encoder: str, made: Any) -> None:
    """Arrays of NumPy have no commas, lists of its strings have `np.str_` around them."""
    import pandas as pd

    rows = [
        {name: made(row[name]) for name in ("words", "tags")}
        for row in WORDS
        if row["tags"] and None not in row["tags"]
    ]
    pd.DataFrame([*rows, {"words": made(["it's", 'a "cat"']), "tags": made(["O", "B-animal"])}]).to_csv(
        tmp_path / "a.csv"
    )
    files = three_parts(str(tmp_path / "a.csv"))
    data = load(files=files, inputs={"text": "words"}, tasks={"tags": TAGS}, tokenizer=encoder)
    assert data.model_arguments["tasks"]["tags"].names == ("B-animal", "O")
    found = [[int(tag) for tag in data.test[row]["tag_labels"][:, 0] if tag >= 0] for row in range(2)]
    assert found == [[1, 0, 1], [1, 0]]


def test_a_word_tagged_minus_100_has_no_label(tmp_path: Path, encoder: str) -> None:
    files = three_parts(write_jsonl(tmp_path / "a.jsonl", [{"words": ["the", "cat", "ran"], "tags": [0, 1, -100]}]))
    data = load(files=files, inputs={"text": "words"}, tasks={"tags": TAGS}, tokenizer=encoder)
    assert data.model_arguments["tasks"]["tags"].names == ("0", "1")
    assert data.train[0]["tag_labels"][:, 0].tolist() == [-100, 0, 1, -100, -100]


def long_rows(folder: Path, tags: list[str], words: list[str] | None = None) -> str:
    """Three rows of 20 words, of which 6 fit into 8 tokens, and one of 4."""
    words = words or ["the", "cat"] * 10
    rows = [{"words": words, "tags": tags}] * 3 + [{"words": words[:4], "tags": tags[:4]}]
    return write_jsonl(folder / "long.jsonl", rows)


def test_tags_that_are_cut_off_are_said_and_have_no_weight(
    tmp_path: Path, encoder: str, caplog: pytest.LogCaptureFixture
) -> None:
    files = three_parts(long_rows(tmp_path, ["A", "B", "B", "B"] + ["B", "A"] + ["A"] * 14))
    task = {**TAGS, "class_weights": "balanced"}
    options = {"files": files, "inputs": {"text": "words"}, "tokenizer": encoder}
    data = load(**options, tasks={"tags": task}, max_length=8)
    # Left: three times A B B B B A, and A B B B.
    left = ["A"] * (3 * 2 + 1) + ["B"] * (3 * 4 + 3)
    expected = compute_class_weight("balanced", classes=np.array(["A", "B"]), y=left)
    assert data.model_arguments["tasks"]["tags"].class_weights == pytest.approx(expected)
    assert caplog.text.count("42 of 64 tags, in 3 of 4 rows of the t") == 2  # train and test
    caplog.clear()
    load(**options, tasks={"tags": task}, max_length=64)
    assert not caplog.records


def test_a_class_that_is_cut_off_altogether(tmp_path: Path, encoder: str, caplog: pytest.LogCaptureFixture) -> None:
    files = three_parts(long_rows(tmp_path, ["A", "B"] * 3 + ["C"] * 14))
    options = {"files": files, "inputs": {"text": "words"}, "tokenizer": encoder, "max_length": 8}
    load(**options, tasks={"tags": TAGS})
    assert "data.max_length (8 tokens) leaves no tag of the class 'C' in the training part" in caplog.text
    with pytest.raises(OptionError, match=r"class 'C' has no label, .* \(after data.max_length, 8 tokens\)"):
        load(**options, tasks={"tags": {**TAGS, "class_weights": "balanced"}})


def test_words_without_any_token(tmp_path: Path, encoder: str) -> None:
    file = long_rows(tmp_path, ["A", "B"] * 10, ["\u200b", " "] * 10)
    files = three_parts(file)
    with pytest.raises(OptionError) as error:
        load(files=files, inputs={"text": "words"}, tokenizer=encoder, tasks={"tags": TAGS}, max_length=8)
    assert str(error.value) == (
        f"data: {files['train']}: no tag of column 'tags' in the training part is left: its words have no token, or "
        "are cut off by data.max_length (8)"
    )


def test_tasks_of_words_alone_have_no_labels_of_rows(tmp_path: Path, encoder: str) -> None:
    files = three_parts(write_jsonl(tmp_path / "a.jsonl", WORDS))
    data = load(files=files, inputs={"text": "words"}, tasks={"tags": TAGS}, tokenizer=encoder)
    assert data.label_names == ("tag_labels",) and "labels" not in data.data_collator([data.train[0]])
    assert len(data.train) == 2 and len(data.test) == 4


def test_words_without_a_task_of_words_are_a_text(tmp_path: Path, encoder: str) -> None:
    files = three_parts(write_jsonl(tmp_path / "a.jsonl", WORDS))
    data = load(files=files, inputs={"text": "words"}, tasks={"topic": {"type": "classification"}}, tokenizer=encoder)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    assert data.train[0]["input_ids"].tolist() == tokenizer("the dogs ran")["input_ids"]
    assert labels(data).tolist() == [[1.0], [0.0]]


def test_words_begin_with_a_space_in_byte_level_tokenizers(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import RobertaTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator(["a cat sat on the mat"] * 20, trainer)
    RobertaTokenizerFast(tokenizer_object=backend, model_max_length=128).save_pretrained(tmp_path / "roberta")
    files = three_parts(write_jsonl(tmp_path / "a.jsonl", WORDS))
    tokenizer = str(tmp_path / "roberta")
    data = load(files=files, inputs={"text": "words"}, tasks={"tags": TAGS}, tokenizer=tokenizer)
    text = data.processing_class.decode(data.train[1]["input_ids"], skip_special_tokens=True)
    assert text == " a cat sat on"


def test_tags_stay_with_their_words_in_drawn_parts(tmp_path: Path, encoder: str) -> None:
    generator = np.random.default_rng(0)
    tag_of = {"cat": "B-animal", "dog": "B-animal", "tree": "B-plant", "the": "O", "ran": "O"}
    rows = [{"words": list(generator.choice(list(tag_of), generator.integers(1, 6)))} for _ in range(40)]
    file = write_jsonl(tmp_path / "a.jsonl", [{**row, "tags": [tag_of[word] for word in row["words"]]} for row in rows])
    data = load(files=file, inputs={"text": "words"}, tasks={"tags": TAGS}, tokenizer=encoder)
    names = data.model_arguments["tasks"]["tags"].names
    seen = 0
    for part in (data.train, data.validation, data.test):
        for row in (part[place] for place in range(len(part))):
            words = data.processing_class.convert_ids_to_tokens(row["input_ids"][1:-1])
            assert [names[tag] for tag in row["tag_labels"][1:-1, 0]] == [tag_of[word] for word in words]
            seen += len(words)
    assert seen == sum(len(row["words"]) for row in rows)
