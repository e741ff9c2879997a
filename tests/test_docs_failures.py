"""docs/when_something_fails.md: each message on the page is what its command prints, when the mistake is made."""

from __future__ import annotations

import csv
import importlib.util
import logging
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from hf_bilb.cli import main
from hf_bilb.errors import TaskLossError
from hf_bilb.experiments.packaged import recipes_folder
from tests.hub.runs import use

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "when_something_fails.md").read_text(encoding="utf-8")
FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", flags=re.M | re.S)
MESSAGES = [text for language, text in FENCED.findall(PAGE) if language == "text"]
NOWHERE = "http://127.0.0.1:9"


def section(number: int) -> str:
    (found,) = re.findall(rf"^## {number}\. .*?(?=^## )", PAGE, flags=re.M | re.S)
    return str(found)


def run(*command: str) -> Any:
    return CliRunner().invoke(main, command)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with table and recipe of docs/your_data.md, a run of one epoch, and the other files of the page."""
    folder = tmp_path_factory.mktemp("fails")
    (script,) = re.findall(r"^```python\n(.*?)^```$", (DOCS / "your_data.md").read_text("utf-8"), flags=re.M | re.S)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(script, {})
        assert run("init", "flats.csv", "--tasks", "price,days_on_market,sold").exit_code == 0
        quick = ["trainer.num_train_epochs=1", "trainer.disable_tqdm=true", "trainer.use_cpu=true"]
        assert run("train", "flats.yaml", *quick).exit_code == 0
        with open("flats.csv", newline="") as file:
            header, *rows = csv.reader(file)
        days = header.index("days_on_market")
        with open("empty.csv", "w", newline="") as file:
            csv.writer(file).writerows([header, *([*row[:days], "", *row[days + 1 :]] for row in rows)])
        lines = [f"{'good' if row % 2 else 'bad'} flat {row},{row % 2}" for row in range(20)]
        Path("texts.csv").write_text("\n".join(["text,topic", *lines]) + "\n")
        assert run("init", "texts.csv", "--text", "text", "--tasks", "topic").exit_code == 0
        shutil.copy(recipes_folder() / "qm9" / "ls_small.yaml", folder)
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(shutil.copytree(finished, tmp_path / "work"))
    return Path.cwd()


def without_packages(patch: pytest.MonkeyPatch) -> None:
    original = importlib.util.find_spec
    missing = ("qm9pack", "wandb")
    patch.setattr(importlib.util, "find_spec", lambda name, *more: None if name in missing else original(name, *more))


def without_memory(patch: pytest.MonkeyPatch) -> None:
    """As torch words it on a GPU."""

    def forward(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.77 GiB of which 1.21 GiB "
            "is free."
        )

    patch.setattr("hf_bilb.models.tabular_mlp.TabularMlpModel.forward", forward)


def with_damage(patch: pytest.MonkeyPatch) -> None:
    with open("runs/flats/checkpoint-50/model.safetensors", "r+b") as file:
        file.truncate(1000)


def without_token(patch: pytest.MonkeyPatch) -> None:
    use(SimpleNamespace(endpoint=NOWHERE), patch, token=None)  # type: ignore[arg-type]


def without_network(patch: pytest.MonkeyPatch) -> None:
    use(SimpleNamespace(endpoint=NOWHERE), patch)  # type: ignore[arg-type]


Preparation = Callable[[pytest.MonkeyPatch], None]
#: What makes a command fail, where it does not do so by itself: by a piece of the message.
PREPARED: dict[str, Preparation] = {
    "is not installed": without_packages,
    "out of memory": without_memory,
    "damaged": with_damage,
    "no token": without_token,
    "cannot be reached": without_network,
    "cannot be loaded": without_network,
}


def prepared(message: str, patch: pytest.MonkeyPatch) -> None:
    for piece, prepare in PREPARED.items():
        if piece in message:
            prepare(patch)


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.WARNING):
        yield caplog


@pytest.mark.parametrize("message", [text for text in MESSAGES if text.startswith("$ ")], ids=lambda text: text[:60])
def test_the_command_prints_the_message(
    message: str, folder: Path, monkeypatch: pytest.MonkeyPatch, warnings: pytest.LogCaptureFixture
) -> None:
    command, *printed = message.splitlines()
    program, *arguments = shlex.split(command.removeprefix("$ "))
    assert program == "hf-bilb"
    if "runs/flats" not in message:  # nothing has been trained yet
        shutil.rmtree("runs")
    prepared(message, monkeypatch)
    done = run(*arguments)
    assert done.exit_code in (1, 2), done.output
    assert done.stderr.splitlines()[-1].replace(NOWHERE, "https://huggingface.co") == printed[-1]
    said = [record.getMessage() for record in warnings.records]
    assert all(line in said for line in printed[:-1])


def test_the_model_without_losses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (message,) = (text.strip() for language, text in FENCED.findall(section(4)) if language == "text")
    (code,) = (text for language, text in FENCED.findall(section(4)) if language == "python")
    wrong = re.sub(r"^    task_loss_func=.*\n", "", code, flags=re.M)
    assert wrong != code
    with pytest.raises(TaskLossError) as raised:
        exec(wrong, {})
    assert f"{type(raised.value).__module__}.{type(raised.value).__name__}: {raised.value}" == message
    exec(code, {})


def test_there_are_ten_sections_and_a_message_in_each() -> None:
    for number in range(1, 11):
        assert any(language == "text" for language, _ in FENCED.findall(section(number)))
    assert "## 11." not in PAGE


def test_messages_in_the_text_are_words_of_the_library() -> None:
    sources = " ".join(path.read_text("utf-8") for path in (DOCS.parent / "hf_bilb").rglob("*.py"))
    for quoted in ("there is one task", "had no label, or no loss, in any step: not trained", "is no column"):
        assert quoted in re.sub(r"\s+", " ", PAGE) and quoted in sources
