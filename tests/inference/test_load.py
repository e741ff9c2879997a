"""What a run has left predicts what the run's Trainer predicts, bit for bit on a CPU."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import hf_bilb
from hf_bilb.errors import CheckpointError, OptionError
from tests.inference import runs
from tests.inference.runs import Run


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """A finished run by its name; each is trained once."""
    known: dict[str, Run] = {}

    def get(name: str) -> Run:
        if name not in known:
            root = tmp_path_factory.mktemp(name)
            if name in ("lora", "language_lora"):
                known[name] = (runs.text_run if name == "lora" else runs.language_run)(root, lora=True)
            else:
                known[name] = getattr(runs, f"{name}_run")(root)
        return known[name]

    return get


@pytest.mark.parametrize("name", ["text", "lora", "table", "image", "module"])
@pytest.mark.parametrize("checkpoint", ["", "checkpoint-2"])
def test_outputs_are_the_run_s_to_the_bit(name: str, checkpoint: str, run_of: Callable[[str], Run]) -> None:
    run = run_of(name)
    loaded = hf_bilb.load(run.folder / checkpoint, device="cpu", trust_remote_code=name == "module")
    found, expected = loaded.predict(run.test, batch_size=8), run.outputs()
    assert list(found) == list(expected) and len(found) == len(run.data.test)
    for task, outputs in expected.items():
        assert np.array_equal(found.outputs[task], outputs), task


def test_tags_are_those_of_the_words_first_tokens(run_of: Callable[[str], Run]) -> None:
    run = run_of("tags")
    found = hf_bilb.load(run.folder, device="cpu").predict(run.test, batch_size=8)
    outputs = run.outputs()["tags"]
    words = [json.loads(line)["words"] for line in run.test.read_text().splitlines()]
    assert any(len(row) > 10 for row in words) and len(words) == len(found)
    for row, own in enumerate(words):
        # Every word is one token; [CLS] stands before the first, and 12 tokens are what is read.
        seen = min(len(own), 10)
        assert np.array_equal(found.outputs["tags"][row][:seen], outputs[row, 1 : seen + 1])
        best = outputs[row, 1 : seen + 1].argmax(axis=1)
        names = run.data.format.tasks["tags"].names
        assert found["tags"][row] == [*(names[place] for place in best), *[None] * (len(own) - seen)]
    assert np.array_equal(found.outputs["first"], run.outputs()["first"])


@pytest.mark.parametrize("name", ["language", "language_lora"])
def test_a_language_model_answers_as_the_run_s(name: str, run_of: Callable[[str], Run]) -> None:
    run = run_of(name)
    loaded = hf_bilb.load(run.folder, device="cpu")
    model = run.trainer.model.eval()
    ids = torch.tensor([loaded.tokens_of("say good ")])
    first = run.data.test[0]["input_ids"]
    assert loaded.tokens_of("say good ") == first[: ids.shape[1]].tolist()
    with torch.no_grad():
        assert torch.equal(loaded.model(input_ids=ids).logits, model(input_ids=ids).logits)
        written = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=5)
    expected = loaded.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    answers = loaded.predict(["say good ", "say a longer one "], batch_size=1, max_new_tokens=5)
    assert answers[0] == expected and len(answers) == 2
    assert loaded.predict(run.test, max_new_tokens=2).to_pandas().columns.tolist() == ["response"]
    with pytest.raises(OptionError, match="num_beems"):
        loaded.predict(["a"], num_beems=3)


@pytest.mark.parametrize("name", ["text", "table", "image", "tags", "groups"])
def test_metrics_are_the_run_s(name: str, run_of: Callable[[str], Run]) -> None:
    run = run_of(name)
    measured = run.trainer.evaluate(run.data.test, metric_key_prefix="test")
    loaded = hf_bilb.load(run.folder, device="cpu")
    found = loaded.evaluate(run.test, batch_size=8)
    expected = {key.removeprefix("test_"): value for key, value in measured.items()}
    keys = [info.key for info in run.data.metrics if info.key in expected]
    assert keys and list(found) == keys
    assert found == {key: expected[key] for key in keys}
    assert loaded.metric_infos == run.data.metrics


def test_a_regression_is_in_its_unit(run_of: Callable[[str], Run]) -> None:
    run = run_of("table")
    found = hf_bilb.load(run.folder, device="cpu").predict(run.test)
    pay = [json.loads(line)["pay"] for line in
           (run.test.parent / "people_train.jsonl").read_text().splitlines()]  # fmt: skip
    expected = found.outputs["pay"][:, 0].astype(np.float64) * np.std(pay) + np.mean(pay)
    np.testing.assert_allclose(found["pay"], expected, rtol=1e-9)


# --- AutoModel ----------------------------------------------------------------------------------------------------

ORDERS = {
    "ours first": "import hf_bilb\nassert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    "from transformers import AutoConfig, AutoModel",
    "ours last": "from transformers import AutoConfig, AutoModel\nimport hf_bilb",
    "table of configs in between": "import transformers, hf_bilb\nfrom transformers import AutoConfig, AutoModel",
}


@pytest.mark.parametrize("order", ORDERS)
def test_auto_classes_in_a_fresh_process(order: str, run_of: Callable[[str], Run], tmp_path: Path) -> None:
    """The other packaged models are known by the same table; the logits of the run with adapters are the run's."""
    run = run_of("lora")
    batch = run.data.data_collator([run.data.test[row] for row in range(8)])
    batch = {name: column for name, column in batch.items() if name != "labels"}
    torch.save(batch, tmp_path / "batch.pt")
    code = f"""
import sys
{ORDERS[order]}
import torch
from hf_bilb.config.registry import MODELS, WITHOUT_CONFIG
for name in MODELS:
    if name not in WITHOUT_CONFIG:
        assert type(AutoConfig.for_model(name)).__module__.startswith("hf_bilb.models"), name
config = AutoConfig.from_pretrained({str(run.folder)!r})
assert type(config).__name__ == "MultiTaskTextConfig"
model = AutoModel.from_pretrained({str(run.folder)!r})
with torch.no_grad():
    logits = model(**torch.load({str(tmp_path / "batch.pt")!r}))["logits"]
torch.save(logits, {str(tmp_path / "logits.pt")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = run.outputs()
    for found, (name, outputs) in zip(torch.load(tmp_path / "logits.pt"), expected.items(), strict=True):
        assert np.array_equal(found.numpy(), outputs[:8]), name


# --- what is wrong is one line ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["text", "lora", "table", "image", "language", "language_lora", "module"])
def test_a_weight_that_no_file_has_is_an_error(name: str, run_of: Callable[[str], Run], tmp_path: Path) -> None:
    file = "adapter_model.safetensors" if "lora" in name else "model.safetensors"
    folder = tmp_path / name
    shutil.copytree(run_of(name).folder, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    lost = without_a_weight(folder / file)
    loaders = [lambda: hf_bilb.load(folder, trust_remote_code=True)]
    if name in ("text", "lora", "table", "image"):  # of a language model the class is that of transformers
        loaders.append(lambda: AutoModel.from_pretrained(folder))
    for loader in loaders:
        with pytest.raises(CheckpointError) as raised:
            loader()
        said = lost.replace(".weight", "").removeprefix("base_model.model.")
        assert said in str(raised.value) and str(raised.value).startswith(str(folder))
        assert "is missing" in str(raised.value) or "are missing" in str(raised.value)


def without_a_weight(file: Path) -> str:
    """Take one weight of the last layers out of a file; returns its name."""
    tensors = load_file(file)
    places = ("head_", "heads.0.weight", "layers.1.mlp", "layers.1.self_attn", "layer.1.")
    lost = next(key for place in places for key in tensors if place in key)
    save_file({key: value for key, value in tensors.items() if key != lost}, file, {"format": "pt"})
    return lost


@pytest.mark.parametrize(("name", "base"), [("lora", "encoder"), ("language_lora", "base")])
def test_a_weight_that_the_model_under_adapters_lacks_is_an_error(
    name: str, base: str, run_of: Callable[[str], Run], tmp_path: Path
) -> None:
    run = run_of(name)
    file = run.folder.parent / base / "model.safetensors"
    shutil.copy(file, tmp_path)
    try:
        lost = without_a_weight(file)
        with pytest.raises(OptionError, match=rf": its files lack {re.escape(lost)}"):
            hf_bilb.load(run.folder)
    finally:
        shutil.copy(tmp_path / file.name, file)


def test_adapters_without_their_encoder(run_of: Callable[[str], Run], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run_of("lora").folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "encoder_name": "no/such"}))
    with pytest.raises(OptionError, match="the encoder of its adapters: 'no/such' cannot be loaded"):
        hf_bilb.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds adapters, and no config\.json"):
        hf_bilb.load(folder)


def test_own_code_runs_only_when_it_is_trusted(run_of: Callable[[str], Run], tmp_path: Path) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(run_of("module").folder, folder)
    with pytest.raises(OptionError, match=r"built by network\.py:build, .*trust_remote_code=True"):
        hf_bilb.load(folder)
    (run_of("module").test.parent / "network.py").rename(tmp_path / "network.py")  # the copy is what is run
    try:
        assert len(hf_bilb.load(folder, trust_remote_code=True).predict([{"age": 1, "hours": 2, "job": "a"}])) == 1
    finally:
        (tmp_path / "network.py").rename(run_of("module").test.parent / "network.py")


def test_folders_without_a_model(tmp_path: Path, run_of: Callable[[str], Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OptionError, match=r"there is no folder '.*emty' \(did you mean \"empty\"\?\)"):
        hf_bilb.load(tmp_path / "emty")
    with pytest.raises(CheckpointError, match="holds no model"):
        hf_bilb.load(tmp_path / "empty")
    (tmp_path / "empty" / "recipe.yaml").write_text("")
    with pytest.raises(CheckpointError, match="has not finished, and has no checkpoint yet"):
        hf_bilb.load(tmp_path / "empty")
    shutil.copytree(run_of("table").folder / "checkpoint-2", tmp_path / "empty" / "checkpoint-2")
    with pytest.raises(CheckpointError, match=r"has not finished; its last checkpoint is .*checkpoint-2"):
        hf_bilb.load(tmp_path / "empty")
    (tmp_path / "empty" / "checkpoint-2" / "hf_bilb.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"hf_bilb\.json: is damaged"):
        hf_bilb.load(tmp_path / "empty" / "checkpoint-2")
    with pytest.raises(OptionError, match="device: 'cuda:77' cannot be used here"):
        hf_bilb.load(run_of("table").folder, device="cuda:77")


def test_a_folder_of_one_s_own_trainer(run_of: Callable[[str], Run], tmp_path: Path) -> None:
    for name, columns in (("text", ["title", "body"]), ("image", None)):
        run = run_of(name)
        shutil.copytree(run.folder, tmp_path / name, ignore=shutil.ignore_patterns("hf_bilb.json", "checkpoint-*"))
        rows = [json.loads(line) for line in run.test.read_text().splitlines()]
        given = (
            [(row["title"], row["body"]) for row in rows]
            if columns
            else [run.test.parent / row["file"] for row in rows]
        )
        found = hf_bilb.load(tmp_path / name, device="cpu").predict(given, batch_size=8)
        expected = hf_bilb.load(run.folder, device="cpu").predict(run.test, batch_size=8)
        if name == "image":  # a text's max_length is in hf_bilb.json alone
            assert all(np.array_equal(found.outputs[task], expected.outputs[task]) for task in found)
        assert len(found) == len(expected) and list(found) == list(expected)
