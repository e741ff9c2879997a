"""An exported model computes under onnxruntime what torch computes, and its page's code answers as `predict`."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pandas as pd
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoTokenizer, set_seed

import hf_bilb
from hf_bilb.cli import main
from hf_bilb.data.inputs.format import DataFormat
from hf_bilb.data.inputs.kinds import (
    FeatureInputs,
    ImageInputs,
    MoleculeInputs,
    NoInputs,
    PromptInputs,
    TableInputs,
    TextInputs,
)
from hf_bilb.errors import CheckpointError, ExportError
from hf_bilb.inference.batches import batches_of, by_task, forward_columns
from hf_bilb.inference.onnx import check, export, graph
from hf_bilb.inference.saved import SavedModel
from hf_bilb.losses.task_types import TaskType
from hf_bilb.models import (
    CelebaCnnConfig,
    CelebaCnnModel,
    DenseBackboneConfig,
    DenseBackboneModel,
    MultiTaskImageConfig,
    MultiTaskImageModel,
    MultiTaskTextConfig,
    MultiTaskTextModel,
    Qm9MlpConfig,
    Qm9MlpModel,
    SegNetConfig,
    SegNetModel,
    TabularMlpConfig,
    TabularMlpModel,
)
from tests.data.glue_files import write_encoder
from tests.inference import runs
from tests.inference.pixel_runs import scenes_run, shapes_run

DOCS = Path(__file__).parents[2] / "docs" / "export.md"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["export", *map(str, arguments)], catch_exceptions=False)


def refused(done: Result, code: int = 2) -> str:
    """The last line, which is the only one on stderr."""
    assert done.exit_code == code, done.output
    assert re.fullmatch(r"hf-bilb: error: [^\n]+\n", done.stderr), done.stderr
    return done.stderr


# --- models -------------------------------------------------------------------------------------------------------


def sharpen(folder: Path) -> None:
    """Make heads and adapters of a short run so large that nothing of them is lost in rounding."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        random = torch.Generator().manual_seed(0)
        for name, tensor in tensors.items():
            if "head" in name or "lora_" in name:
                tensors[name] = tensor + 0.3 * torch.randn(tensor.shape, generator=random)
        save_file(tensors, file, {"format": "pt"})


def write_model(folder: Path, model: Any, kind: Any, tasks: Mapping[str, TaskType], tokenizer: Any = None) -> Path:
    """A folder as a run leaves it, of a model with random weights that are not small."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weights in model.parameters():
            weights += 0.2 * torch.randn(weights.shape, generator=random)
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    saved = SavedModel(model.config.model_type, "table", DataFormat(kind, tasks))
    (folder / "hf_bilb.json").write_bytes(saved.to_bytes())
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[runs.Run, Path]]:
    """A finished run and its export by name; each is made once."""
    known: dict[str, tuple[runs.Run, Path]] = {}

    def get(name: str) -> tuple[runs.Run, Path]:
        if name not in known:
            root = tmp_path_factory.mktemp(name)
            run = runs.text_run(root, lora=True) if name == "lora" else getattr(runs, f"{name}_run")(root)
            sharpen(run.folder)
            done = call(run.folder, "--format", "onnx", *(["--trust-remote-code"] if name == "module" else []))
            assert done.exit_code == 0, done.output
            known[name] = run, run.folder / "onnx"
        return known[name]

    return get


RUNS = ["text", "lora", "tags", "table", "image", "module"]


def computed(folder: Path, batch: Mapping[str, Any]) -> list[np.ndarray]:
    """What onnxruntime computes."""
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    return session.run(None, {one.name: np.asarray(batch[one.name]) for one in session.get_inputs()})


def of_torch(loaded: Any, batch: Mapping[str, Any]) -> list[np.ndarray]:
    """What the loaded model computes, adapters and all."""
    columns = forward_columns(loaded.model)
    taken = {name: value for name, value in batch.items() if columns is None or name in columns}
    with torch.no_grad():
        logits = loaded.model(**taken)["logits"]
    tasks = loaded.tasks or loaded.model.config.task_types
    return [output.numpy() for output in by_task(tasks, logits).values()]


def assert_same(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    assert len(found) == len(expected)
    assert max(np.abs(one).max() for one in expected) > 0.05  # what is compared is not nothing
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
        best = np.sort(other, axis=-1)
        clear = (best[..., -1] - best[..., -2] > 1e-4) if other.shape[-1] > 1 else np.bool_(False)
        assert np.array_equal(one.argmax(-1)[clear], other.argmax(-1)[clear])


# --- equal to torch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_outputs_are_torch_s_for_batches_of_any_size(name: str, exported: Callable[[str], Any]) -> None:
    run, folder = exported(name)
    loaded = hf_bilb.load(run.folder, device="cpu", trust_remote_code=True)
    encoded = loaded.format.encode(run.test, loaded.tokenizer)
    lengths = set()
    for rows in (1, 4, 21):  # 2 are traced
        for batch in batches_of(encoded, rows):
            assert_same(computed(folder, batch), of_torch(loaded, batch))
            lengths.add(tuple(next(iter(batch.values())).shape))
    assert len(lengths) > (6 if name in ("text", "lora", "tags") else 2)


@pytest.mark.parametrize("name", ["text", "lora"])
def test_long_padding_changes_nothing(name: str, exported: Callable[[str], Any]) -> None:
    run, folder = exported(name)
    loaded = hf_bilb.load(run.folder, device="cpu")
    (batch,) = batches_of(loaded.format.encode(run.test, loaded.tokenizer), 21)
    padded = {key: nn.functional.pad(column, (0, 90)) for key, column in batch.items()}
    assert_same(computed(folder, padded), of_torch(loaded, batch))


def test_a_missing_number_and_an_unknown_word(exported: Callable[[str], Any]) -> None:
    run, folder = exported("table")
    loaded = hf_bilb.load(run.folder, device="cpu")
    numeric = torch.tensor([[np.nan, 0.5], [1.0, np.nan], [np.nan, np.nan], [1.0, 0.5]])
    categorical = torch.tensor([[0], [3], [4], [-1]])  # three words are known
    batch = {"numeric": numeric, "categorical": categorical}
    found = computed(folder, batch)
    assert_same(found, of_torch(loaded, batch))
    assert not np.isnan(np.concatenate(found, axis=1)).any()
    unknown = computed(folder, {**batch, "categorical": torch.zeros(4, 1, dtype=torch.int64)})
    assert all(np.array_equal(one[2:], other[2:]) for one, other in zip(found, unknown, strict=True))


# --- the file -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "inputs", "outputs"),
    [
        (
            "text",
            {key: ["batch", "sequence"] for key in ("input_ids", "token_type_ids", "attention_mask")},
            {"stars": ["batch", 1], "topic": ["batch", 3], "flags": ["batch", 2]},
        ),
        (
            "tags",
            {key: ["batch", "sequence"] for key in ("input_ids", "token_type_ids", "attention_mask")},
            {"tags": ["batch", "sequence", 2], "first": ["batch", 8]},
        ),
        (
            "table",
            {"numeric": ["batch", 2], "categorical": ["batch", 1]},
            {"pay": ["batch", 1], "rich": ["batch", 1], "town": ["batch", 2]},
        ),
        ("image", {"pixel_values": ["batch", 3, 16, 16]}, {"red": ["batch", 1], "kind": ["batch", 2]}),
    ],
)
def test_names_and_shapes(name: str, inputs: Any, outputs: Any, exported: Callable[[str], Any]) -> None:
    run, folder = exported(name)
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    assert {one.name: one.shape for one in session.get_inputs()} == inputs
    assert {one.name: one.shape for one in session.get_outputs()} == outputs
    onnx.checker.check_model(folder / "model.onnx", full_check=True)
    held = json.loads(session.get_modelmeta().custom_metadata_map["hf_bilb"])
    assert (
        held
        == json.loads((folder / "hf_bilb.json").read_text())
        == json.loads((run.folder / "hf_bilb.json").read_text())
    )
    content = (folder / "model.onnx").read_bytes() + (folder / "README.md").read_bytes()
    assert b"site-packages" not in content and os.fsencode(run.folder.parent) not in content


def test_a_text_s_tokenizer_goes_along(exported: Callable[[str], Any]) -> None:
    run, folder = exported("text")
    texts = ["good film", "a dull story"]
    found, expected = (AutoTokenizer.from_pretrained(one)(texts)["input_ids"] for one in (folder, run.folder))
    assert found == expected
    with pytest.raises(CheckpointError, match="holds an ONNX model"):
        hf_bilb.load(folder)


def test_tasks_with_any_names_keep_their_outputs(tmp_path: Path) -> None:
    """Those of inputs, of what is within the graph, and of words that no programming language has."""
    names = ["numeric", "linear", "embedding", "numeric_output", "days on market", "größe", "val_0", "batch", "addmm"]
    tasks = {name: TaskType("classification", 2 + number % 3) for number, name in enumerate(names)}
    kind = TableInputs(("a", "b"), (0.0, 1.0), (1.0, 2.0), ("c",), (("x", "y"),))
    set_seed(0)
    model = TabularMlpModel(
        TabularMlpConfig(tasks, numeric_names=["a", "b"], categories={"c": ["x", "y"]}, hidden_sizes=[8])
    )
    folder = write_model(tmp_path / "run", model, kind, tasks)
    inner = {value for node in onnx_of(folder).graph.node for value in (node.name, *node.output)}
    outputs = [value.name for value in onnx.load(folder / "onnx" / "model.onnx").graph.output]
    assert outputs == ["numeric_output_output", *names[1:]] and len({*outputs}) == len(names)
    assert {"linear.inner", "embedding.inner"} & inner
    batch = {"numeric": torch.randn(3, 2), "categorical": torch.tensor([[1], [2], [0]])}
    assert_same(computed(folder / "onnx", batch), of_torch(hf_bilb.load(folder, device="cpu"), batch))


def onnx_of(folder: Path) -> onnx.ModelProto:
    done = call(folder)
    assert done.exit_code == 0, done.output
    return onnx.load(folder / "onnx" / "model.onnx")


# --- from a row to the answer -------------------------------------------------------------------------------------


def code_of(page: str) -> str:
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, flags=re.M | re.S)
    return code


def answers(code: str, folder: Path, rows: str = "", **names: Any) -> dict[str, Any]:
    """What the code gives for each task in `folder`; `rows`: in place of the rows that it has."""
    code = re.sub(r"^rows = .*$", lambda found: rows or found[0], code, flags=re.M)
    space: dict[str, Any] = dict(names)
    here = Path.cwd()
    try:
        os.chdir(folder)
        with contextlib.redirect_stdout(io.StringIO()) as printed, warnings.catch_warnings():
            warnings.simplefilter("error")
            exec(compile(code, "README.md", "exec"), space)
    finally:
        os.chdir(here)
    outputs = space["session"].run(None, space["inputs"])
    assert all(task["name"] in printed.getvalue() for task in space["saved"]["tasks"])
    return {
        task["name"]: space["answer"](task, output)
        for task, output in zip(space["saved"]["tasks"], outputs, strict=True)
    }


def test_the_page_s_code_answers_for_texts(exported: Callable[[str], Any]) -> None:
    run, folder = exported("lora")
    given = [json.loads(line) for line in run.test.read_text().splitlines()]
    found = answers(
        code_of((folder / "README.md").read_text()), folder, "rows = given",
        given=[(row["title"], row["body"]) for row in given],
    )  # fmt: skip
    expected = hf_bilb.load(run.folder, device="cpu").predict(run.test)
    np.testing.assert_allclose(found["stars"][:, 0], expected["stars"], atol=1e-3)
    assert found["topic"].tolist() == expected["topic"].tolist()
    assert len({*found["topic"]}) > 1
    np.testing.assert_allclose(found["flags"], expected.probabilities["flags"], atol=1e-5)


def test_the_page_s_code_answers_for_words(exported: Callable[[str], Any]) -> None:
    run, folder = exported("tags")
    given = [json.loads(line)["words"] for line in run.test.read_text().splitlines()]
    found = answers(code_of((folder / "README.md").read_text()), folder, "rows = given", given=given)
    expected = hf_bilb.load(run.folder, device="cpu").predict(run.test)
    # What was cut off has no tag.
    assert found["tags"] == [[tag for tag in row if tag is not None] for row in expected["tags"]]
    assert found["first"].tolist() == expected["first"].tolist()


def test_the_page_s_code_answers_for_a_table(exported: Callable[[str], Any]) -> None:
    run, folder = exported("table")
    given = pd.read_json(run.test, lines=True)
    given.loc[3, "job"] = "unheard of"
    assert given["age"].isna().any() and given["job"].isna().any()
    found = answers(code_of((folder / "README.md").read_text()), folder, "rows = given", given=given)
    expected = hf_bilb.load(run.folder, device="cpu").predict(given)
    np.testing.assert_allclose(found["pay"][:, 0], expected["pay"], rtol=1e-5)
    np.testing.assert_allclose(found["rich"][:, 0], expected.probabilities["rich"], atol=1e-5)
    assert found["town"].tolist() == expected["town"].tolist() and len({*found["town"]}) > 1


def test_the_page_s_code_answers_for_an_image(exported: Callable[[str], Any]) -> None:
    run, folder = exported("image")
    path = run.test.parent / json.loads(run.test.read_text().splitlines()[0])["file"]
    code = code_of((folder / "README.md").read_text()).replace('"photo.jpg"', repr(str(path)))
    found, expected = answers(code, folder), hf_bilb.load(run.folder, device="cpu").predict([path])
    np.testing.assert_allclose(found["red"][:, 0], expected["red"], rtol=1e-5)
    assert found["kind"].tolist() == expected["kind"].tolist()


def test_the_page_s_code_answers_for_features(tmp_path: Path) -> None:
    kind = FeatureInputs(("a", "b"), (1.0, 10.0), (2.0, 5.0), ("c", "d"), (("x", "y"), ("1", "2", "3")))
    tasks = {"one": TaskType("multi_label"), "two": TaskType("regression", 1, (), (), "m", (3.0,), (2.0,))}
    folder = write_model(tmp_path / "run", Qm9MlpModel(Qm9MlpConfig(7, ["one", "two"], hidden_size=8)), kind, tasks)
    onnx_of(folder)
    given = pd.DataFrame({"a": [1.0, -3.0, 2.5], "b": [7, 12, 20], "c": ["y", None, "x"], "d": [1, 3, 9]})
    code = code_of((folder / "onnx" / "README.md").read_text())
    found = answers(code, folder / "onnx", "rows = given", given=given)
    expected = hf_bilb.load(folder, device="cpu").predict(given)
    np.testing.assert_allclose(found["two"][:, 0], expected["two"], atol=1e-5)
    np.testing.assert_allclose(found["one"][:, 0], expected.probabilities["one"], atol=1e-6)
    assert answers(code, folder / "onnx")["one"].shape == (1, 1)  # as printed


def test_the_page_s_code_answers_for_single_texts(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(write_encoder(tmp_path / "encoder"))
    tasks = {"kind": TaskType("classification", 3), "size": TaskType("regression", 2)}
    config = AutoConfig.for_model(
        "distilbert", dim=8, n_layers=1, n_heads=2, hidden_dim=8, vocab_size=len(tokenizer), max_position_embeddings=40
    )
    set_seed(0)
    model = MultiTaskTextModel(MultiTaskTextConfig(config, tasks, pooling="cls"))
    folder = write_model(tmp_path / "run", model, TextInputs((("text",),), 32), tasks, tokenizer)
    # The tokenizer makes token types, which this encoder does not have.
    assert [value.name for value in onnx_of(folder).graph.input] == ["input_ids", "attention_mask"]
    code = code_of((folder / "onnx" / "README.md").read_text())
    found = answers(code, folder / "onnx")
    expected = hf_bilb.load(folder, device="cpu").predict(["Great service.", "Never again."])
    np.testing.assert_allclose(found["size"], expected["size"], atol=1e-5)
    assert [str(name) for name in found["kind"]] == list(expected["kind"])  # classes without names: numbers


# --- other models -------------------------------------------------------------------------------------------------

RESNET = {
    "model_type": "resnet", "embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic",
    "num_groups": 1,
}  # fmt: skip
SWIN = {
    "model_type": "swin", "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4, "image_size": 32,
}  # fmt: skip


def test_attention_in_windows(tmp_path: Path) -> None:
    """Traced with gradients, Swin is not translated."""
    tasks = {"one": TaskType("regression")}
    model = MultiTaskImageModel(MultiTaskImageConfig(SWIN, 16, tasks, image_size=32, image_mean=[0.5, 0.4, 0.3]))
    folder = write_model(tmp_path / "run", model, ImageInputs("image", 32), tasks)
    onnx_of(folder)
    batch = {"pixel_values": torch.rand(3, 3, 32, 32)}
    assert_same(computed(folder / "onnx", batch), of_torch(hf_bilb.load(folder, device="cpu"), batch))


def test_all_tasks_in_one_tensor(tmp_path: Path) -> None:
    names = ["Bald", "Young", "Smiling"]
    tasks = dict.fromkeys(names, TaskType("multi_label"))
    model = CelebaCnnModel(CelebaCnnConfig(tasks, image_size=16, width=2))
    folder = write_model(tmp_path / "run", model, ImageInputs("image", 16), tasks)
    assert [value.name for value in onnx_of(folder).graph.output] == names
    batch = {"pixel_values": torch.rand(5, 3, 16, 16)}
    found = computed(folder / "onnx", batch)
    assert [one.shape for one in found] == [(5, 1)] * 3
    assert_same(found, of_torch(hf_bilb.load(folder, device="cpu"), batch))


@pytest.mark.parametrize("image_size", [32, None])
def test_tasks_of_pixels(image_size: int | None, tmp_path: Path) -> None:
    tasks = {
        "mask": TaskType("segmentation", 3),
        "depth": TaskType("dense_regression", 1, (), (), "m", (4.0,), (2.0,)),
        "scene": TaskType("classification", 3),
    }
    model = DenseBackboneModel(DenseBackboneConfig(RESNET, tasks=tasks, image_size=image_size, decoder_size=4))
    folder = write_model(tmp_path / "run", model, NoInputs("pixels"), tasks)
    onnx_of(folder)
    frame = (32, 32) if image_size else (40, 72)
    batch = {"pixel_values": torch.rand(1, 3, *frame)}
    found = computed(folder / "onnx", batch)
    assert_same(found, of_torch(hf_bilb.load(folder, device="cpu"), batch))
    page = (folder / "onnx" / "README.md").read_text()
    size = "32, 32" if image_size else "height, width"
    assert f"| `depth` | `[batch, 1, {size}]` | float32 | `output * std + mean` is in m |" in page
    from PIL import Image

    pixels = (batch["pixel_values"][0].permute(1, 2, 0) * 255).byte().numpy()
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    code = code_of(page).replace('"photo.jpg"', repr(str(tmp_path / "photo.png")))
    same = computed(folder / "onnx", {"pixel_values": pixels.transpose(2, 0, 1)[None].astype(np.float32) / 255})
    answered = answers(code, folder / "onnx")
    np.testing.assert_array_equal(answered["depth"], same[1] * np.float64(2) + 4)
    np.testing.assert_array_equal(answered["mask"], same[0].argmax(axis=1))


@pytest.mark.parametrize("kind", ["table", "scenes"])
def test_finished_runs_with_tasks_of_pixels(kind: str, tmp_path: Path) -> None:
    run = shapes_run(tmp_path) if kind == "table" else scenes_run(tmp_path, "dense_backbone")
    frame = (32, 32) if kind == "table" else hf_bilb.load(run.folder).format.inputs.size
    graph = onnx_of(run.folder).graph
    loaded = hf_bilb.load(run.folder, device="cpu")
    assert [value.name for value in graph.output] == list(loaded.tasks)
    batch = {"pixel_values": torch.rand(2, 3, *frame, generator=torch.Generator().manual_seed(0))}
    for found, expected in zip(computed(run.folder / "onnx", batch), of_torch(loaded, batch), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_segnet_with_its_unpooling(tmp_path: Path) -> None:
    model = SegNetModel(SegNetConfig(["segmentation", "depth"], 4, width=2, sync_batch_norm=False)).eval()
    folder = write_model(tmp_path / "run", model, NoInputs("pixels"), {})
    assert [value.name for value in onnx_of(folder).graph.output] == ["segmentation", "depth"]
    batch = {"pixel_values": torch.rand(2, 3, 64, 64)}
    for one, other in zip(
        computed(folder / "onnx", batch), of_torch(hf_bilb.load(folder, device="cpu"), batch), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-4 * max(1, np.abs(other).max()))


# --- what is not exported -----------------------------------------------------------------------------------------

TASK = {"one": TaskType("regression")}


def only_described(folder: Path, model: str, kind: Any) -> Path:
    """A folder whose weights nobody gets to."""
    folder.mkdir()
    (folder / "hf_bilb.json").write_bytes(SavedModel(model, "table", DataFormat(kind, TASK)).to_bytes())
    (folder / "model.safetensors").touch()
    return folder


def test_models_that_are_refused(tmp_path: Path, exported: Callable[[str], Any]) -> None:
    module, _ = exported("module")
    for name, kind, said in (
        ("mpnn", MoleculeInputs(), "it reads graphs of molecules"),
        ("mpnn", NoInputs("graphs"), "it reads graphs of molecules"),
        ("torch_module", NoInputs("a reason"), r"nobody but its data set makes its inputs \(a reason\)"),
        ("qm9_mlp", NoInputs("descriptors"), "nobody but its data set makes its inputs"),
        ("causal_lm", PromptInputs("prompt", 8), "it is a language model, for which there is optimum"),
    ):
        folder = only_described(tmp_path / f"{len(list(tmp_path.iterdir()))}", name, kind)
        assert re.search(said, refused(call(folder))) and not (folder / "onnx").exists()
    done = call(module.folder, "--output", tmp_path / "own")
    assert "trust_remote_code=True" in refused(done) and not (tmp_path / "own").exists()


def test_folders_that_are_refused(exported: Callable[[str], Any], tmp_path: Path) -> None:
    run, _ = exported("table")
    assert "is already there; --force writes over its files" in refused(call(run.folder))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    done = call(run.folder, "--output", tmp_path / "other", "--force")
    assert "holds no export to write over" in refused(done)
    assert "which is a file" in refused(call(run.folder, "--output", tmp_path / "other" / "mine.txt"))
    assert "there is no folder" in refused(call(tmp_path / "oter"))
    assert [path.name for path in tmp_path.rglob("*")] == ["other", "mine.txt"]
    assert refused(call(run.folder, "--format", "onyx")).startswith("hf-bilb: error: Invalid value for '--format'")


def test_packages_that_are_missing(
    exported: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = exported("table")
    there = importlib.util.find_spec
    missing = {"onnxruntime"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else there(name))
    done = call(run.folder, "--output", tmp_path / "a")
    assert done.exit_code == 0 and "onnxruntime is not installed: it was not compared" in done.output
    missing.add("onnxscript")
    done = call(run.folder, "--output", tmp_path / "b")
    assert 'export needs onnxscript: pip install "hf-bilb[onnx]"' in refused(done) and not (tmp_path / "b").exists()


# --- what goes wrong ----------------------------------------------------------------------------------------------


def test_what_differs_from_torch_is_not_written(
    exported: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = exported("lora")
    # Adapters that are taken off in place of being merged.
    monkeypatch.setattr("peft.PeftModel.merge_and_unload", lambda model: model.base_model.unload(), raising=False)
    said = refused(call(run.folder, "--output", tmp_path / "deep" / "new"), code=1)
    assert re.search(r"outputs of the task '\w+' differ from torch's by \d\.\de[-+]\d+, more than 0\.0001", said)
    assert not list(tmp_path.iterdir())


def test_a_failed_export_leaves_the_one_before(exported: Callable[[str], Any]) -> None:
    run, _ = exported("table")
    old = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    assert "more than 0" in refused(call(run.folder, "--force", "--atol", 0), code=1)
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == old
    assert not [path for path in run.folder.iterdir() if path.name.startswith(".")]


def test_an_export_is_written_over(exported: Callable[[str], Any], tmp_path: Path) -> None:
    run, folder = exported("table")
    target = tmp_path / "new"
    target.mkdir()
    for name in ("model.onnx", "model.onnx.data", "README.md"):
        (target / name).write_text("old")
    (target / "mine.txt").write_text("mine")
    done = call(run.folder, "--output", target, "--force")
    assert done.exit_code == 0 and done.stderr == ""
    assert re.fullmatch(
        r"loading .*\ntranslating it into ONNX\n"
        r"compared with torch on 4 made-up rows: the largest difference is \d\.\de-\d+\n"
        r"wrote .*new: README\.md, hf_bilb\.json, model\.onnx\n",
        done.stdout,
    )
    names = sorted(path.name for path in target.iterdir())
    assert names == ["README.md", "hf_bilb.json", "mine.txt", "model.onnx"]
    assert (target / "README.md").read_text() == (folder / "README.md").read_text()


class OfOneSize(nn.Module):
    def forward(self, numeric: torch.Tensor) -> torch.Tensor:
        return torch.stack([numeric.nan_to_num()[row] for row in range(len(numeric))])


class Branching(nn.Module):
    def forward(self, numeric: torch.Tensor) -> torch.Tensor:
        return numeric if float(numeric.nan_to_num().sum()) > 0 else -numeric


@pytest.mark.parametrize(
    ("network", "said"),
    [(OfOneSize(), "computes with the batch size 2 alone"), (Branching(), "torch cannot translate the model into")],
)
def test_networks_that_are_not_translated(network: nn.Module, said: str) -> None:
    network.register_forward_hook(lambda module, inputs, output: {"logits": output})
    batch = {"numeric": torch.ones(2, 2)}
    with pytest.raises(ExportError, match=said) as raised:
        graph.translate(network, {"a": TASK["one"], "b": TASK["one"]}, batch, {"numeric": {0: "batch"}})
    assert "\n" not in str(raised.value)


def test_weights_that_are_quantized(exported: Callable[[str], Any], tmp_path: Path) -> None:
    run, _ = exported("table")
    loaded = hf_bilb.load(run.folder, device="cpu")
    loaded.model.trunk[0].weight = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(hf_bilb.OptionError, match="its weights are quantized here"):
        export._check_weights(loaded)


def test_large_weights_lie_in_a_file_of_their_own(
    exported: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, folder = exported("table")
    monkeypatch.setattr(export, "_LARGEST_FILE", 100)
    assert call(run.folder, "--output", tmp_path / "large").exit_code == 0
    assert (tmp_path / "large" / "model.onnx.data").stat().st_size > 100
    batch = {"numeric": torch.ones(3, 2), "categorical": torch.ones(3, 1, dtype=torch.int64)}
    assert_same(computed(tmp_path / "large", batch), computed(folder, batch))


@pytest.mark.parametrize(
    ("got", "right", "difference"),
    [
        ([1.0, 2.0], [1.0, 2.5], 0.2),  # of the largest output, which is above 1
        ([0.1, 0.2], [0.1, 0.5], 0.3),
        ([np.nan, 1.0], [np.nan, 1.0], 0.0),
        ([np.nan, 1.0], [1.0, 1.0], np.inf),
        ([1.0], [1.0, 1.0], np.inf),
    ],
)
def test_differences(got: list[float], right: list[float], difference: float) -> None:
    assert check._difference(np.array(got), np.array(right)) == pytest.approx(difference)


# --- docs/export.md -----------------------------------------------------------------------------------------------

PAGE = DOCS.read_text(encoding="utf-8")


@pytest.mark.parametrize(("number", "name", "folder"), [(0, "text", "reviews"), (1, "table", "people"),
                                                       (2, "image", "photos")])  # fmt: skip
def test_code_of_the_docs(number: int, name: str, folder: str, exported: Callable[[str], Any], tmp_path: Path) -> None:
    """It is that of the exported page, and answers as `predict` for the rows that it prints."""
    run, made = exported(name)
    code = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.M | re.S)[number]
    own = code_of((made / "README.md").read_text()).replace('Path(".")', f'Path("runs/{folder}/onnx")')
    assert [line for line in code.splitlines() if not line.startswith("rows = ")] == [
        line for line in own.splitlines() if not line.startswith("rows = ")
    ]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / folder).symlink_to(run.folder)
    (tmp_path / "photo.jpg").symlink_to(run.test.parent / "1.jpg")
    found = answers(code, tmp_path)
    rows = {
        "text": [("Great service.", "We will come again."), ("No.", "Never again.")],
        "table": [{"age": 31, "hours": 20, "job": "a"}, {"age": None, "hours": 35, "job": "unheard of"}],
        "image": [tmp_path / "photo.jpg"],
    }[name]
    expected = hf_bilb.load(run.folder, device="cpu").predict(rows)
    for task, kind in expected.tasks.items():
        if kind.type == "classification":
            assert found[task].tolist() == expected[task].tolist()
        else:
            right = expected[task] if kind.type == "regression" else expected.probabilities[task]
            np.testing.assert_allclose(found[task].squeeze(), right.squeeze(), rtol=1e-4)


def test_the_page_names_the_options_and_the_commands(exported: Callable[[str], Any], monkeypatch: Any) -> None:
    said = CliRunner().invoke(main, ["export", "--help"]).output
    assert set(re.findall(r"^\| `(--[a-z-]+)", PAGE, re.M)) == set(re.findall(r"^ +(--[a-z-]+)", said, re.M))
    (commands,) = re.findall(r"^```sh\n(.*?)^```$", PAGE, flags=re.M | re.S)
    run, _ = exported("text")
    _, command = commands.splitlines()
    arguments = command.replace("runs/reviews", str(run.folder)).split()
    assert arguments[:2] == ["hf-bilb", "export"] and "--force writes over" in refused(call(*arguments[2:]))


def test_names_that_the_page_gives() -> None:
    (printed,) = re.findall(r"^```\n(loading .*?)^```$", PAGE, flags=re.M | re.S)
    assert len(printed.splitlines()) == 4
    assert (
        export.export_onnx.__module__ == "hf_bilb.inference.onnx.export" and f"{export._LARGEST_FILE / 1e9} GB" in PAGE
    )
