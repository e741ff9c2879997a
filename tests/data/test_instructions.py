"""Instructions from JSONL and from GLUE: what becomes of a text, batches, what is held out, and what is refused."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_bilb.config.options import parse_options
from hf_bilb.data import DATA_SETS, TaskData
from hf_bilb.data.text.glue_prompts import WORDINGS
from hf_bilb.data.text.instruction_rows import InstructionRows, PackExamples, tokenize_instructions
from hf_bilb.data.text.instructions import new_tokenizer, read_jsonl, unigram_perplexity
from hf_bilb.data.text.rows import PadTokens
from hf_bilb.errors import OptionError
from tests.data.glue_files import write_glue
from tests.data.language_files import TASKS, rows, tokenizer_of, write_jsonl

GLUE = Path(__file__).resolve().parents[3] / "shared" / "data" / "glue"


def load(**options: Any) -> TaskData:
    spec = DATA_SETS["instructions"]
    return spec.load(parse_options(spec.options, {"tokenizer": {"vocab_size": 400}, **options}, "data"))


def texts(data: TaskData, part: InstructionRows) -> list[tuple[str, str]]:
    """What each row says, and what of it is an item."""
    decode = data.processing_class.decode
    return [(decode(row["input_ids"]), decode(row["token_labels"][row["token_labels"] != -100])) for row in part]


# --- examples as tokens -------------------------------------------------------------------------------------------


def test_an_example_is_prompt_and_response_and_only_the_response_counts(tmp_path: Path) -> None:
    data = load(jsonl={"train": str(write_jsonl(tmp_path / "train.jsonl"))})
    assert data.task_names == tuple(sorted(TASKS)) == TASKS
    written = {f"<bos>{row['prompt']}{row['response']}<eos>": f"{row['response']}<eos>" for row in rows(20)}
    found = [text for part in (data.train, data.validation, data.test) for text in texts(data, part)]
    assert len(found) == 60
    assert dict(found) == written
    for part in (data.train, data.validation, data.test):
        for row, (text, _) in zip(part, texts(data, part), strict=True):
            assert text.startswith(f"<bos>{TASKS[row['task_ids']]}: ")


def test_with_train_on_prompt_everything_but_the_first_token_counts(tmp_path: Path) -> None:
    data = load(jsonl={"train": str(write_jsonl(tmp_path / "train.jsonl"))}, train_on_prompt=True)
    for whole, counted in texts(data, data.train):
        assert whole == f"<bos>{counted}"


@pytest.mark.parametrize("max_length", [8, 12, 30])
def test_what_is_too_long_loses_the_beginning_of_the_prompt_and_then_the_end_of_the_response(max_length: int) -> None:
    tokenizer = tokenizer_of()
    prompts, responses = ["the cat sat on the mat"] * 3, [" dog", " the dog ran on and on under a tree", " ?"]
    parts = [[tokenizer(text, add_special_tokens=False)["input_ids"] for text in side] for side in (prompts, responses)]
    found, cut = tokenize_instructions(tokenizer, prompts, responses, np.zeros(3, np.int64), max_length)
    expected_cuts = lost = 0
    for row, prompt, response in zip(found, *parts, strict=True):
        answer = [*response, tokenizer.eos_token_id]
        expected_cuts += 1 + len(prompt) + len(answer) > max_length
        lost += 1 + len(answer) > max_length
        while prompt and 1 + len(prompt) + len(answer) > max_length:
            prompt = prompt[1:]
        expected = [tokenizer.bos_token_id, *prompt, *answer][:max_length]
        assert row["input_ids"].tolist() == expected
        assert row["token_labels"].tolist() == [-100] * (1 + len(prompt)) + expected[1 + len(prompt) :]
    assert (cut.rows, cut.responses) == (expected_cuts, lost)
    assert (max_length == 30) == (expected_cuts == 0)


def test_what_is_cut_is_said_once_for_each_part(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = str(write_jsonl(tmp_path / "train.jsonl"))
    with caplog.at_level(logging.WARNING):
        load(jsonl={"train": file}, max_length=10)
    said = [record.message for record in caplog.records if "max_length" in record.message]
    assert [text.split(":")[0] for text in said] == ["train", "validation", "test"]
    assert " of 48 examples have more than max_length 10 tokens" in said[0]


def test_a_tokenizer_that_puts_nothing_in_front_gets_no_bos() -> None:
    tokenizer = tokenizer_of()
    from tokenizers.processors import ByteLevel

    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=False)
    (row,), _ = tokenize_instructions(tokenizer, [""], [" dog"], np.zeros(1, np.int64), 20)
    ids = [*tokenizer(" dog")["input_ids"], tokenizer.eos_token_id]
    assert row["input_ids"].tolist() == ids
    assert row["token_labels"].tolist() == [-100, *ids[1:]]  # nothing predicts the first one


def test_a_tokenizer_without_an_end_is_refused() -> None:
    tokenizer = tokenizer_of()
    tokenizer.eos_token = None
    with pytest.raises(OptionError, match=r"^data\.tokenizer: has no end-of-sequence token"):
        tokenize_instructions(tokenizer, ["a"], ["b"], np.zeros(1, np.int64), 20)


def test_a_chat_template_brings_its_own_tokens(tmp_path: Path) -> None:
    tokenizer = tokenizer_of()
    tokenizer.chat_template = (
        "<bos>{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.role == 'assistant' %}<eos>\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    jsonl = {"train": str(write_jsonl(tmp_path / "train.jsonl"))}
    data = load(jsonl=jsonl, tokenizer=str(tmp_path / "tokenizer"), chat=True)
    written = {
        f"<bos>[user]{row['prompt']}[assistant]{row['response']}<eos>\n": f"{row['response']}<eos>\n"
        for row in rows(20)
    }
    found = dict(texts(data, data.train))
    assert len(found) == 48 and found.items() <= written.items()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "without")
    with pytest.raises(OptionError, match=r"^data\.chat: the tokenizer has no chat template"):
        load(jsonl=jsonl, tokenizer=str(tmp_path / "without"), chat=True)


def test_the_same_texts_give_the_same_tokenizer() -> None:
    one, two = tokenizer_of(), tokenizer_of()
    assert one.get_vocab() == two.get_vocab()
    assert one.backend_tokenizer.to_str() == two.backend_tokenizer.to_str()
    text = "The cat, naïve & 漢字\n"
    assert one.decode(one(text)["input_ids"]) == f"<bos>{text}"
    assert len(one) <= 400


# --- batches ------------------------------------------------------------------------------------------------------


def few_rows(packed: bool) -> InstructionRows:
    """Three examples of 4, 2 and 3 tokens, of the tasks 1, 0 and 1."""
    return InstructionRows(
        np.array([4, 2, 3]), np.array([2, 1, 1]), np.arange(10, 19, dtype=np.int32), np.array([1, 0, 1]), packed
    )


def test_padded_batches() -> None:
    batch = PadTokens(7)(list(few_rows(packed=False)))
    assert {name: column.tolist() for name, column in batch.items()} == {
        "input_ids": [[10, 11, 12, 13], [14, 15, 7, 7], [16, 17, 18, 7]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]],
        "token_labels": [[-100, -100, 12, 13], [-100, 15, -100, -100], [-100, 17, 18, -100]],
        "task_ids": [1, 0, 1],
    }
    assert all(column.dtype == torch.int64 for column in batch.values())


def test_packed_batches() -> None:
    batch = PackExamples(7)(list(few_rows(packed=True)))
    assert batch.pop("use_cache") is False
    assert {name: column.tolist() for name, column in batch.items()} == {
        "input_ids": [[10, 11, 12, 13, 14, 15, 16, 17, 18]],
        "position_ids": [[0, 1, 2, 3, 0, 1, 0, 1, 2]],
        "token_labels": [[-100, -100, 12, 13, -100, 15, -100, 17, 18]],
        "task_ids": [[1, 1, 1, 1, 0, 0, 1, 1, 1]],
    }


def test_only_training_rows_are_packed_and_counts_are_the_same(tmp_path: Path) -> None:
    jsonl = {"train": str(write_jsonl(tmp_path / "train.jsonl"))}
    packed, padded = load(jsonl=jsonl, packed=True), load(jsonl=jsonl)
    batches = [data.data_collator([data.train[i] for i in range(9)]) for data in (packed, padded)]
    assert batches[0]["input_ids"].shape[0] == 1 and batches[1]["input_ids"].shape[0] == 9
    counts = [data.task_item_counts(batch).tolist() for data, batch in zip((packed, padded), batches, strict=True)]
    by_hand = [sum((row["token_labels"] >= 0).sum() for row in list(padded.train)[:9] if row["task_ids"] == k)
               for k in range(3)]  # fmt: skip
    assert counts[0] == counts[1] == by_hand
    evaluated = packed.data_collator([packed.validation[i] for i in range(3)])
    assert evaluated["attention_mask"].shape[0] == 3


def test_rows_are_read_by_number_and_hold_their_tasks() -> None:
    found = few_rows(packed=False)
    assert len(found) == 3 and found[-1]["input_ids"].tolist() == [16, 17, 18]
    with pytest.raises(IndexError):
        found[3]
    assert found.items(1).tolist() == [12, 13, 17, 18] and found.items(0).tolist() == [15]
    with pytest.raises(ValueError, match="do not fit"):
        InstructionRows(np.array([4]), np.array([1]), np.zeros(3, np.int32), np.array([0]))


# --- parts --------------------------------------------------------------------------------------------------------


def test_what_is_held_out_depends_on_seed_and_task_alone(tmp_path: Path) -> None:
    jsonl = {"train": str(write_jsonl(tmp_path / "train.jsonl", count=30))}
    whole, again, other = (load(jsonl=jsonl, seed=seed) for seed in (0, 0, 1))
    few = load(jsonl=jsonl, max_train=5)
    alone = load(jsonl=jsonl, tasks=["shout"], tokenizer={"vocab_size": 400})
    assert [len(part) for part in (whole.train, whole.validation, whole.test)] == [72, 9, 9]
    held = [{text for text, _ in texts(data, data.test)} for data in (whole, again, other, few)]
    assert held[0] == held[1] == held[3] != held[2]
    assert len(few.train) == 15
    parts = [{text for text, _ in texts(whole, part)} for part in (whole.train, whole.validation, whole.test)]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    assert {text for text, _ in texts(alone, alone.test)} == {t for t in held[0] if t.startswith("<bos>shout")}


def test_files_of_their_own_are_parts_as_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = {part: str(write_jsonl(tmp_path / f"{part}.jsonl", count, seed))
             for seed, (part, count) in enumerate({"train": 20, "validation": 4, "test": 3}.items())}  # fmt: skip
    data = load(jsonl=files)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [60, 12, 9]
    with caplog.at_level(logging.WARNING):
        subset = load(jsonl=files, tasks=["shout", "copy"])
    assert subset.task_names == ("shout", "copy")
    assert "20 rows of other tasks are left out (length)" in caplog.text
    assert {row["task_ids"] for row, (text, _) in zip(subset.test, texts(subset, subset.test), strict=True)
            if text.startswith("<bos>shout")} == {0}  # fmt: skip


def test_the_trivial_predictor_knows_how_often_each_token_is_an_item() -> None:
    train, test = few_rows(packed=False), few_rows(packed=False)
    found = unigram_perplexity(train, test, ["a", "b", "c"], 19)
    chance = dict.fromkeys((12, 13, 17, 18), (1 + 1 / 19) / 5)  # of task 1: four items, once each, and one more
    expected = math.exp(-sum(math.log(chance[token]) for token in (12, 13, 17, 18)) / 4)
    assert found["perplexity_b"] == pytest.approx(expected, rel=1e-12)
    assert found["perplexity_a"] == pytest.approx(2 / (1 + 1 / 19), rel=1e-12)
    assert "perplexity_c" not in found


# --- GLUE ---------------------------------------------------------------------------------------------------------


def test_glue_becomes_prompts_and_answers(tmp_path: Path) -> None:
    tasks = ("cola", "stsb", "mnli", "rte")
    write_glue(tmp_path, tasks, num_train=20, num_dev=6)
    data = load(glue={"folder": str(tmp_path)}, tasks=list(tasks))
    assert [len(part) for part in (data.train, data.validation, data.test)] == [72, 8, 24]
    answers = {task: set() for task in tasks}
    for row, (text, answer) in zip(data.test, texts(data, data.test), strict=True):
        task = tasks[row["task_ids"]]
        answers[task].add(answer)
        assert text.startswith("<bos>" + WORDINGS[task].prompt.split("{")[0])
        assert text.endswith(f"\nAnswer:{answer}")
    assert answers == {
        "cola": {" yes<eos>", " no<eos>"},
        "stsb": {" 0.0<eos>", " 2.5<eos>", " 3.8<eos>", " 5.0<eos>"},
        "mnli": {" yes<eos>", " maybe<eos>", " no<eos>"},
        "rte": {" yes<eos>", " no<eos>"},
    }


@pytest.mark.parametrize(
    ("task", "label", "answer"),
    [("cola", 1, " yes"), ("sst2", 0, " negative"), ("mrpc", 1, " yes"), ("rte", 0, " yes"), ("qnli", 1, " no"),
     ("mnli", 1, " maybe"), ("wnli", 0, " no"), ("qqp", 1, " yes"), ("stsb", 3.25, " 3.2")],
)  # fmt: skip
def test_labels_in_words(task: str, label: float, answer: str) -> None:
    from hf_bilb.data.text.glue_prompts import instruction

    prompt, response = instruction(task, ("a {0} b", "c"), label)
    assert response == answer
    assert "a {0} b" in prompt and prompt.endswith("Answer:")


@pytest.mark.data
@pytest.mark.skipif(not GLUE.is_dir(), reason="needs GLUE's TSV files in ../shared/data/glue")
def test_the_real_glue() -> None:
    data = load(glue={"folder": str(GLUE)}, tasks=["rte", "wnli"], tokenizer={"vocab_size": 1000}, packed=True)
    whole, answer = texts(data, data.test)[0]
    assert answer in (" yes<eos>", " no<eos>")
    assert whole.startswith("<bos>Text: ") and "\nDoes the text imply the claim?\nAnswer:" in whole
    # Nearly as often yes as no, and an end that is certain to come.
    assert 2.7 < data.trivial_metrics["perplexity_rte"] < 2.95


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: is no JSON: Expecting property name"),
        ("[1]", "line 2: is no object, expected one with task, prompt, response"),
        (
            '{"task": "a", "prompt": "b", "respnse": "c"}',
            r"line 2: has no key 'response' .*\(did you mean .respnse",
        ),
        ('{"task": "a", "prompt": 3, "response": "c"}', "line 2: prompt is 3, expected a text"),
        ('{"task": "a", "prompt": "b", "response": ""}', "line 2: response is empty"),
        ('{"task": "", "prompt": "b", "response": "c"}', "line 2: task is empty"),
        ('{"task": "a ", "prompt": "b", "response": "c"}', "line 2: task is 'a ', expected a name without spaces"),
        ('{"task": "a\\nb", "prompt": "b", "response": "c"}', r"line 2: task is 'a\\nb', expected a name without"),
        ('{"task": "a", "prompt": "\\ud83d", "response": "c"}', "line 2: prompt holds half of a character"),
        ('{"task": "a", "prompt": "b", "response": ' + "9" * 5000 + "}", "line 2: is no JSON: .* digits"),
        ("[" * 100_000, "line 2: is no JSON: maximum recursion"),
        ("\N{LATIN SMALL LETTER E WITH ACUTE}".encode("latin-1"), "line 2: is no UTF-8: .* can't decode byte 0xe9"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str | bytes, message: str) -> None:
    file = tmp_path / "rows.jsonl"
    first = json.dumps({"task": "a", "prompt": "b", "response": "c"}).encode()
    wrong = line.encode() if isinstance(line, str) else line
    file.write_bytes(first + b"\n" + wrong + b"\n\n")
    with pytest.raises(OptionError, match=f"^{file}, {message}") as caught:
        read_jsonl(file)
    assert "\n" not in str(caught.value)


def test_a_file_with_a_byte_order_mark_and_empty_lines_is_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    row = {"task": "a", "prompt": "b\u2028\r", "response": "é", "source": 3}
    text = "\r\n".join(["", json.dumps(row, ensure_ascii=False), "  ", json.dumps(row)])
    file.write_text(text, encoding="utf-8-sig", newline="")
    assert read_jsonl(file) == [("a", "b\u2028\r", "é")] * 2


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.content }}", "the tokenizer's chat template fails: Unexpected end of template"),
        ("{{ raise_exception('no user here') }}", "the tokenizer's chat template fails: no user here"),
        ("{% for m in messages %}[{{ m.role }}]{% endfor %}", "the tokenizer's chat template leaves out the response"),
        (
            "{% for m in messages|reverse %}{{ m.content }}{% endfor %}",
            "the tokenizer's chat template changes a prompt once it is answered",
        ),
    ],
)
def test_a_chat_template_that_does_not_do_is_said_in_one_line(tmp_path: Path, template: str, message: str) -> None:
    tokenizer = tokenizer_of()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    file = str(write_jsonl(tmp_path / "train.jsonl"))
    with pytest.raises(OptionError, match=f"^data.chat: {message}") as caught:
        load(jsonl={"train": file}, tokenizer=str(tmp_path / "tokenizer"), chat=True)
    assert "\n" not in str(caught.value)


def test_without_a_padding_token_the_end_pads_and_is_no_item(tmp_path: Path) -> None:
    tokenizer = tokenizer_of()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    data = load(jsonl={"train": str(write_jsonl(tmp_path / "t.jsonl"))}, tokenizer=str(tmp_path / "tokenizer"))
    rows = [data.train[i] for i in range(8)]
    batch = data.data_collator(rows)
    padded = batch["attention_mask"] == 0
    assert padded.any() and (batch["input_ids"][padded] == tokenizer.eos_token_id).all()
    assert (batch["token_labels"][padded] == -100).all()
    assert (batch["token_labels"] == tokenizer.eos_token_id).sum() == 8  # the end of each response still is one
    assert data.model_arguments["special_tokens"]["pad_token_id"] == tokenizer.eos_token_id


def test_options_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    file = str(write_jsonl(tmp_path / "train.jsonl", count=4))
    for options, message in (
        ({}, r"^data\.jsonl: one of jsonl \(files of instructions\) and glue is needed, neither is set$"),
        ({"jsonl": {"train": file}, "glue": {"folder": "x"}}, r"^data\.jsonl: .* both are set$"),
        ({"glue": {}}, r"^data\.glue\.folder: one of folder .* neither is set$"),
        ({"glue": {"folder": "x"}, "tasks": ["colla"]}, r"^data\.tasks: 'colla' is not known \(did you mean \"cola\""),
        ({"glue": {"folder": str(tmp_path / "none")}}, r"^data\.glue\.folder: .* is no folder"),
        ({"jsonl": {"train": file}, "tasks": ["coppy"]}, r"^data\.tasks: .* no row of task 'coppy' \(did you mean"),
        ({"jsonl": {"train": str(tmp_path / "no.jsonl")}}, r"no\.jsonl: cannot be read"),
        ({"jsonl": {"train": file}, "tokenizer": {"vocab_size": 3}}, r"^data\.tokenizer\.vocab_size: 3 is not valid"),
        ({"jsonl": {"train": file}, "tokenizer": None}, r"^data\.tokenizer: is required where the model has no name"),
        ({"jsonl": {"train": file}, "max_length": 2}, r"^data\.max_length: 2 is not valid"),
        ({"jsonl": {"train": file}, "validation_fraction": 0.5}, r"^data\.validation_fraction: 0\.5 is not valid"),
        ({"jsonl": {"train": file}, "chat": True}, r"^data\.chat: a new tokenizer has no chat template"),
    ):
        with pytest.raises(OptionError, match=message):
            load(**options)
    few = write_jsonl(tmp_path / "few.jsonl", count=2)
    with pytest.raises(OptionError, match=r"^data\.validation_fraction: 2 training rows of 'copy' are too few"):
        load(jsonl={"train": str(few)})


def test_a_tokenizer_for_shorter_texts_is_refused(tmp_path: Path) -> None:
    tokenizer = new_tokenizer(["a b c d"] * 4, 300)
    tokenizer.model_max_length = 16
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    file = str(write_jsonl(tmp_path / "train.jsonl", count=4))
    with pytest.raises(OptionError, match=r"^data\.max_length: 512 is not valid, expected at most 16"):
        load(jsonl={"train": file}, tokenizer=str(tmp_path / "tokenizer"))
