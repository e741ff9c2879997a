"""`trust_remote_code=True` loads a pushed model where hf_bilb is not installed, and computes what it computes here."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load, save
from torch import Tensor
from transformers import BertConfig, ResNetConfig

from hf_bilb._version import __version__
from hf_bilb.config.registry import MODELS, WITHOUT_CONFIG
from hf_bilb.errors import CheckpointError
from hf_bilb.hub.flat_sources import flat_sources
from hf_bilb.hub.remote_code import with_code
from hf_bilb.losses.task_types import TaskType
from hf_bilb.models.lora import LoraOptions, add_encoder_lora
from tests.hub.runs import use
from tests.hub.server import Hub

WORKER = Path(__file__).with_name("remote_worker.py")
OURS = sorted(set(MODELS.modules) - set(WITHOUT_CONFIG))
TASKS = {"a": TaskType("regression"), "b": TaskType("classification", 3), "c": TaskType("multi_label", 2)}
TAGS = {**TASKS, "d": TaskType("token_classification", 4)}
BERT = BertConfig(vocab_size=20, hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
                  max_position_embeddings=16)  # fmt: skip
RESNET = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
PIXELS = {"pixel_values": torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
DENSE = {
    **PIXELS,
    "segmentation": torch.randint(0, 5, (3, 32, 32), generator=torch.Generator().manual_seed(1)),
    "depth": torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(2)),
    "normals": torch.nn.functional.normalize(torch.ones(3, 3, 32, 32), dim=1),
}
LABELS = torch.tensor([[0.3, 2, 1, 0], [float("nan"), 1, 0, 0], [-0.1, float("nan"), 1, 1]])
TEXT = {
    "input_ids": torch.arange(15).reshape(3, 5),
    "attention_mask": torch.ones(3, 5, dtype=torch.int64),
    "labels": LABELS,
    "tag_labels": torch.arange(15).reshape(3, 5, 1) % 4,
}
MOLECULES = {
    "nodes": torch.rand(3, 4, 11, generator=torch.Generator().manual_seed(3)),
    "edges": torch.rand(3, 4, 4, 5, generator=torch.Generator().manual_seed(4)),
    "edge_mask": ~torch.eye(4, dtype=torch.bool).expand(3, 4, 4),
    "num_nodes": [4, 4, 4],
    "labels": torch.ones(3, 2),
}
TABLE = {
    "numeric": torch.tensor([[0.1, 2.0], [float("nan"), 1.0], [3.0, -1.0]]),
    "categorical": torch.ones(3, 1).long(),
}
COLUMNS = {"numeric_names": ["x", "y"], "categories": {"z": ["p", "q"]}, "hidden_sizes": [8]}
DESCRIPTORS = {"features": torch.rand(3, 6, generator=torch.Generator().manual_seed(5)), "labels": torch.ones(3, 2)}
#: Model -> its config's arguments, and a batch.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "celeba_cnn": ({"task_names": ["a", "b"], "image_size": 32, "width": 4}, {**PIXELS, "labels": torch.ones(3, 2)}),
    "dense_backbone": ({"encoder_config": RESNET, "num_classes": 5, "decoder_size": 8}, DENSE),
    "image_encoder": (
        {"encoder_config": RESNET, "tasks": TASKS, "image_size": 32, "num_features": 12},
        {**PIXELS, "labels": LABELS},
    ),
    "mpnn": ({"task_names": ["a", "b"], "hidden_size": 8, "edge_hidden_size": 8}, MOLECULES),
    "mtan": ({"num_classes": 5, "width": 4}, DENSE),
    "multi_task_text": ({"encoder_config": BERT, "tasks": TAGS}, TEXT),
    "qm9_mlp": ({"task_names": ["a", "b"], "num_features": 6, "hidden_size": 8}, DESCRIPTORS),
    "segnet": ({"num_classes": 5, "width": 4}, DENSE),
    "tabular_mlp": ({"tasks": TASKS, **COLUMNS}, {**TABLE, "labels": LABELS}),
}
LORA = "adapters"


@dataclass
class Loaded:
    """Repository -> what is in it; its outputs here; its outputs, or the message of the error, in the other process."""

    repos: dict[str, dict[str, bytes]]
    expected: dict[str, dict[str, Any]]
    found: dict[str, Any]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp("remote")
    expected: dict[str, dict[str, Any]] = {}
    with Hub() as hub, pytest.MonkeyPatch.context() as patch:
        use(hub, patch)
        patch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))

        def put(name: str, model: Any, batch: dict[str, Any]) -> None:
            model.train()(**batch)  # running statistics
            model.eval().save_pretrained(folder / name)
            if name == LORA:
                (folder / name / "config.json").write_text(model.get_base_model().config.to_json_string())
            files = with_code({path.name: path for path in (folder / name).iterdir() if path.is_file()})
            pushed = {path: one if isinstance(one, bytes) else one.read_bytes() for path, one in files.items()}
            hub.repos[f"somebody/{name}"] = pushed
            torch.save(batch, folder / f"{name}.pt")
            with torch.no_grad():
                expected[f"somebody/{name}"] = dict(model(**batch))

        for name, (arguments, batch) in CASES.items():
            torch.manual_seed(0)
            spec = MODELS[name]
            put(name, spec.model_class(spec.config_class(**arguments)), batch)
        text = MODELS["multi_task_text"].model_class(MODELS["multi_task_text"].config_class(BERT, TAGS))
        text.encoder.save_pretrained(folder / "encoder")
        hub.repos["somebody/encoder"] = {one.name: one.read_bytes() for one in (folder / "encoder").iterdir()}
        adapted = add_encoder_lora(type(text).from_encoder("somebody/encoder", tasks=TAGS), LoraOptions(r=2))
        put(LORA, adapted, TEXT)
        hub.repos["somebody/no_peft"] = hub.repos[f"somebody/{LORA}"]
        hub.repos["somebody/no_encoder"] = without_encoder(hub.repos[f"somebody/{LORA}"])
        for name in CASES:
            hub.repos[f"somebody/lost_{name}"] = lost(hub.repos[f"somebody/{name}"], "model.safetensors")
        hub.repos["somebody/lost_adapters"] = lost(hub.repos[f"somebody/{LORA}"], "adapter_model.safetensors")
        wanted = {repo: repo != "somebody/no_peft" for repo in hub.repos if repo != "somebody/encoder"}
        (folder / "wanted.json").write_text(json.dumps(wanted))
        shutil.copy(WORKER, folder)  # where no module of the tests is next to it
        environment = hub.environment(folder)
        del environment["PYTHONPATH"]
        command = [sys.executable, WORKER.name, str(folder)]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-6000:]
        hub.unanswered.clear()
        return Loaded(dict(hub.repos), expected, torch.load(folder / "found.pt"))


def first_name(repo: dict[str, bytes], file: str) -> str:
    """A weight of a head, or where they are one tensor of all of them."""
    names = sorted(load(repo[file]))
    return next((name for name in names if "head" in name and name.endswith("weight")), names[-1])


def lost(repo: dict[str, bytes], file: str) -> dict[str, bytes]:
    """The repository without one of its weights."""
    tensors, name = load(repo[file]), first_name(repo, file)
    return {**repo, file: save({key: value for key, value in tensors.items() if key != name}, {"format": "pt"})}


def without_encoder(repo: dict[str, bytes]) -> dict[str, bytes]:
    config = {**json.loads(repo["config.json"]), "encoder_name": "somebody/nothing"}
    return {**repo, "config.json": json.dumps(config).encode()}


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        return torch.equal(found, expected)
    return len(found) == len(expected) and all(map(same, found, expected))


def test_every_packaged_model_is_a_case() -> None:
    assert sorted(CASES) == OURS


@pytest.mark.parametrize("name", [*OURS, LORA])
def test_outputs_without_the_package_are_the_same_to_the_bit(name: str, loaded: Loaded) -> None:
    found, expected = loaded.found[f"somebody/{name}"], loaded.expected[f"somebody/{name}"]
    assert not isinstance(found, str), found
    assert found.keys() == expected.keys() >= {"losses", "logits"}
    for key in expected:
        assert same(found[key], expected[key]), key


@pytest.mark.parametrize("name", [*OURS, LORA])
def test_a_weight_that_is_not_there_is_an_error_without_the_package_too(name: str, loaded: Loaded) -> None:
    file = "adapter_model.safetensors" if name == LORA else "model.safetensors"
    missing = first_name(loaded.repos[f"somebody/{name}"], file).removeprefix("base_model.model.")
    said = loaded.found[f"somebody/lost_{name}"]
    assert isinstance(said, str) and said.startswith("CheckpointError: ") and "is missing" in said and missing in said


def test_adapters_without_what_they_need(loaded: Loaded) -> None:
    said = loaded.found["somebody/no_peft"]
    assert said.startswith("ImportError: ") and "Run `pip install peft`" in said
    said = loaded.found["somebody/no_encoder"]
    assert said.startswith("OptionError: ") and "the encoder of its adapters: 'somebody/nothing' cannot be" in said


# --- the files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*OURS, LORA])
def test_no_file_knows_the_package(name: str, loaded: Loaded) -> None:
    repo = loaded.repos[f"somebody/{name}"]
    code = {path: content.decode() for path, content in repo.items() if path.endswith(".py")}
    allowed = {"torch", "transformers", "huggingface_hub"} | ({"peft", "safetensors"} if name == LORA else set())
    for path, source in code.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert f"{node.module}.py" in code
            elif isinstance(node, ast.Import | ast.ImportFrom):
                modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names]
                packages = {module.partition(".")[0] for module in modules}
                assert packages <= allowed | sys.stdlib_module_names, path
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert re.fullmatch(r"hf_bilb(\.\w+)*", node.value) is None, path
        top = source.splitlines()[0]
        assert re.match(rf"# From hf_bilb(\.\w+)+ of hf_bilb {re.escape(__version__)}, Apache License 2\.0", top)
    lines = sum(source.count("\n") for source in code.values())
    assert lines < (2600 if name in ("dense_backbone", LORA) else 2000), "it takes half of the library along"
    references = json.loads(repo["config.json"])["auto_map"]
    assert references.keys() == {"AutoConfig", "AutoModel"}
    assert {f"{reference.partition('.')[0]}.py" for reference in references.values()} <= code.keys()


def test_models_of_others_have_no_code(tmp_path: Path) -> None:
    for config in ({"model_type": "llama"}, {"model_type": "causal_lm"}, {}, []):
        files = {"config.json": json.dumps(config).encode(), "x": b""}
        assert with_code(files) == files
    assert with_code({"network.py": b""}) == {"network.py": b""}
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: is damaged"):
        with_code({"config.json": tmp_path / "config.json"})


BAD = {
    "import hf_bilb.errors\ndef f(): return hf_bilb.errors": "import hf_bilb.errors",
    "from hf_bilb import errors\ndef f(): return errors": "the module errors as a whole",
    "def f(): return g('hf_bilb.errors')": "the text 'hf_bilb.errors'",
    "def f():\n    import hf_bilb": "import of the package",
    "print()\ndef f(): pass": "a statement that its import runs",
    "def g(): pass": "f is not defined",
    "from hf_bilb.models.lora import x\ndef f(): return x": "x of a module that is left out",
}


@pytest.mark.parametrize("source", BAD)
def test_what_would_need_the_package_is_told(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_to_flatten.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=re.escape(BAD[source])):
        flat_sources({"mine_to_flatten": ["f"]}, left_out={"hf_bilb.models.lora": "no"})
