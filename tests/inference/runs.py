"""Runs of two steps, each with its Trainer, whose predictions a loaded folder must repeat."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from hf_bilb.config.yaml import dump_yaml
from hf_bilb.data import TaskData
from hf_bilb.experiments.build import build_trainer, load_data, resolve_data_options
from hf_bilb.experiments.recipe import Recipe, read_recipe
from hf_bilb.experiments.train import _save
from hf_bilb.trainer.trainer import BilevelMTLTrainer
from tests.data.glue_files import write_encoder

WORDS = "good bad film book great dull story plot".split()


@dataclass
class Run:
    """A run that is finished: its folder, data and Trainer, and the file of its test part."""

    folder: Path
    data: TaskData
    trainer: BilevelMTLTrainer
    test: Path

    def outputs(self) -> dict[str, np.ndarray]:
        """The Trainer's predictions on the test part, by task."""
        found = self.trainer.predict(self.data.test).predictions
        tasks = self.data.format.tasks
        if isinstance(found, tuple):
            return dict(zip(tasks, found, strict=True))
        return dict(zip(tasks, np.split(found, len(tasks), axis=1), strict=True))


def recipe_of(root: Path, model: dict[str, Any], data: dict[str, Any], trainer: dict[str, Any]) -> Recipe:
    """Two steps in `root/run`."""
    settings = {
        "output_dir": str(root / "run"), "max_steps": 2, "seed": 0, "learning_rate": 1e-2,
        "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "save_strategy": "steps", "save_steps": 1,
        "eval_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, **trainer,
    }  # fmt: skip
    path = root / "recipe.yaml"
    path.write_text(dump_yaml({"model": model, "data": data, "balancer": "ls", "trainer": settings}))
    return read_recipe(str(path))


def finished(root: Path, model: dict[str, Any], data: dict[str, Any], test: Path, **trainer: Any) -> Run:
    """Train, and save as a run does."""
    recipe = recipe_of(root, model, data, trainer)
    set_seed(0)
    loaded = load_data(recipe, resolve_data_options(recipe))
    made = build_trainer(recipe, loaded)
    made.train()
    _save(made)
    return Run(root / "run", loaded, made, test)


# --- data ---------------------------------------------------------------------------------------------------------


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def files_of(root: Path, name: str, rows: list[dict[str, Any]]) -> tuple[dict[str, str], Path]:
    """Three parts of the rows, as the recipe names them, and the test part."""
    parts = {"train": rows[:32], "validation": rows[32:40], "test": rows[40:]}
    paths = {part: str(jsonl(root / f"{name}_{part}.jsonl", own)) for part, own in parts.items()}
    return paths, Path(paths["test"])


def reviews(root: Path) -> tuple[dict[str, Any], Path]:
    """Texts with a number, a class and labels; some of each are missing."""
    generator = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for number in range(61):
        words = generator.choice(WORDS, generator.integers(3, 12)).tolist()
        rows.append(
            {
                "title": words[0],
                "body": " ".join(words[1:]),
                "stars": None if number % 7 == 3 else 10.0 * words.count("good") + 3,
                "topic": "film" if "film" in words else "book" if "book" in words else "other",
                "flags": [flag for flag in ("plot", "story") if flag in words],
            }
        )
    files, test = files_of(root, "reviews", rows)
    tasks = {
        "stars": {"type": "regression", "unit": "points"},
        "topic": {"type": "classification", "metrics": ["accuracy"]},
        "flags": {"type": "multi_label"},
    }
    data = {"name": "table", "files": files, "inputs": {"text": ["title", "body"]}, "tasks": tasks, "max_length": 16}
    return data, test


def text_run(root: Path, lora: bool = False, encoder: str | None = None) -> Run:
    data, test = reviews(root)
    encoder = str(write_encoder(root / "encoder")) if encoder is None else encoder
    model: dict[str, Any] = {"name": "multi_task_text", "encoder": encoder}
    return finished(root, {**model, "lora": {"r": 2}} if lora else model, data, test)


def tags_run(root: Path) -> Run:
    """A task of tokens and one of rows."""
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(61):
        words = generator.choice(WORDS, generator.integers(2, 20)).tolist()
        tags = ["B-X" if word in ("film", "book") else "O" for word in words]
        rows.append({"words": words, "tags": tags, "first": words[0]})
    files, test = files_of(root, "tags", rows)
    tasks = {"tags": {"type": "token_classification"}, "first": {"type": "classification", "classes": WORDS}}
    data = {"name": "table", "files": files, "inputs": {"text": "words"}, "tasks": tasks, "max_length": 12}
    return finished(root, {"name": "multi_task_text", "encoder": str(write_encoder(root / "encoder"))}, data, test)


def groups_run(root: Path) -> Run:
    """Classes that several words mean, of rows, of lists and of tokens; -100 and words of `csv.missing` are none."""
    generator = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for number in range(61):
        words = generator.choice(WORDS, generator.integers(2, 9)).tolist()
        stars = -100 if number % 7 == 3 else "-9.0" if number % 7 == 5 else 1 + words.count("good") + number % 3
        rows.append({"words": words, "tags": words, "stars": str(stars), "about": words[::2]})
    files, test = files_of(root, "groups", rows)
    sense = {"thing": ["film", "book", "story", "plot"], "word": ["good", "bad", "great", "dull"]}
    tasks = {
        "stars": {"type": "classification", "classes": {"low": [1, 2], "high": list(range(3, 12))}},
        "about": {"type": "multi_label", "classes": sense},
        "tags": {"type": "token_classification", "classes": sense},
    }
    data = {"name": "table", "files": files, "inputs": {"text": "words"}, "tasks": tasks, "max_length": 12,
            "csv": {"missing": ["-9.0"]}}  # fmt: skip
    return finished(root, {"name": "multi_task_text", "encoder": str(write_encoder(root / "encoder"))}, data, test)


def people(root: Path) -> tuple[dict[str, Any], Path]:
    generator = np.random.default_rng(0)
    rows = []
    for number in range(61):
        age, hours, job = generator.integers(20, 60), generator.integers(10, 40), "abc"[generator.integers(0, 3)]
        rows.append(
            {
                "age": None if number % 9 == 4 else int(age),
                "hours": float(hours),
                "job": None if number % 8 == 5 else job,
                "pay": float(100 * age + 50 * hours),
                "rich": int(age > 40),
                "town": "north" if hours > 25 else "south",
            }
        )
    files, test = files_of(root, "people", rows)
    tasks = {
        "pay": {"type": "regression", "unit": "EUR"},
        "rich": {"type": "multi_label"},
        "town": {"type": "classification"},
    }
    inputs = {"numeric": ["age", "hours"], "categorical": ["job"]}
    return {"name": "table", "files": files, "inputs": inputs, "tasks": tasks}, test


def table_run(root: Path) -> Run:
    data, test = people(root)
    return finished(root, {"name": "tabular_mlp", "hidden_sizes": [16]}, data, test)


NETWORK = """
import torch
from torch import nn


class Network(nn.Module):
    def __init__(self, width, sizes):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(width, size) for size in sizes)

    def forward(self, numeric):
        return tuple(head(torch.nan_to_num(numeric)) for head in self.heads)


def build(tasks, numeric_names, scale):
    return Network(len(numeric_names), [task.size for task in tasks.values()])
"""


def module_run(root: Path) -> Run:
    data, test = people(root)
    (root / "network.py").write_text(NETWORK)
    model = {"name": "torch_module", "factory": f"{root / 'network.py'}:build", "arguments": {"scale": 2}}
    return finished(root, model, data, test)


def image_run(root: Path) -> Run:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    ViTModel(ViTConfig(**sizes, image_size=16, patch_size=8)).save_pretrained(root / "vit")
    processor = {"image_processor_type": "ViTImageProcessor", "do_normalize": True, "image_mean": [0.5, 0.4, 0.3],
                 "image_std": [0.5, 0.25, 0.2], "size": {"height": 16, "width": 16}}  # fmt: skip
    (root / "vit" / "preprocessor_config.json").write_text(json.dumps(processor))
    generator = np.random.default_rng(0)
    rows = []
    for number in range(61):
        pixels = generator.integers(0, 256, (20, 24, 3), np.uint8)
        name = f"{number}.{'jpg' if number % 2 else 'png'}"
        Image.fromarray(pixels).save(root / name)
        rows.append({"file": name, "red": float(pixels[..., 0].mean()), "kind": "ab"[number % 2]})
    files, test = files_of(root, "images", rows)
    tasks = {"red": {"type": "regression"}, "kind": {"type": "classification"}}
    data = {"name": "table", "files": files, "inputs": {"image": "file"}, "tasks": tasks, "image_size": 16,
            "cache_dir": str(root / "cache")}  # fmt: skip
    return finished(root, {"name": "image_encoder", "encoder": str(root / "vit")}, data, test)


LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip


def write_base(folder: Path) -> Path:
    """The model that adapters of a language run stand on."""
    set_seed(1)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLAMA, vocab_size=300)).save_pretrained(folder)
    return folder


def language_run(root: Path, lora: bool = False, base: str | None = None) -> Run:
    rows = [
        {"task": "ab"[number % 2], "prompt": f"say {word} ", "response": word * (1 + number % 2)}
        for number, word in enumerate(WORDS * 8)
    ]
    test = jsonl(root / "test.jsonl", rows[40:])
    data = {"name": "instructions", "jsonl": {"train": str(jsonl(root / "train.jsonl", rows)), "test": str(test)},
            "tokenizer": {"vocab_size": 300}, "max_length": 48}  # fmt: skip
    if not lora:
        return finished(root, {"name": "causal_lm", "config": LLAMA}, data, test)
    base = str(write_base(root / "base")) if base is None else base
    return finished(root, {"name": "causal_lm", "model": base, "lora": {"r": 2}}, data, test)


SMILES = "CCO CCN CCC c1ccccc1 CC(=O)O CCCl CO CN C1CCCCC1 Oc1ccccc1 CCOC CC#N".split()


def smiles_run(root: Path) -> Run:
    """Molecules as SMILES; needs RDKit."""
    rows = [{"smiles": SMILES[n % 12] + "C" * (n // 12), "NR-AR": n % 2, "SR-p53": n % 3 % 2} for n in range(48)]
    lines = [",".join(map(str, row.values())) for row in rows]
    (root / "molecules.csv").write_text("\n".join(["smiles,NR-AR,SR-p53", *lines]) + "\n")
    data = {"name": "tox21", "file": str(root / "molecules.csv"), "tasks": ["NR-AR", "SR-p53"], "split": "random",
            "cache_dir": str(root / "cache"), "num_workers": 1}  # fmt: skip
    model = {"name": "mpnn", "hidden_size": 8, "edge_hidden_size": 8}
    return finished(root, model, data, jsonl(root / "new.jsonl", [{"smiles": text} for text in SMILES]))


def qm9_run(root: Path) -> Run:
    """Molecules with coordinates, which no file of rows has; needs qm9pack."""
    data = {"name": "qm9", "num_train": 60, "num_validation": 20, "num_test": 20}
    return finished(root, {"name": "qm9_mlp", "hidden_size": 8}, data, root / "none")
