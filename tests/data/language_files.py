"""A causal language model and a tokenizer of a few kilobytes, and made-up instructions, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.data.glue_files import sentence

TASKS = ("copy", "length", "shout")


def rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """`count` examples of each task, taking turns, prompts of 3 to 12 words and responses of 1 to 6."""
    generator = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        for task in TASKS:
            text = sentence(generator)
            response = {"copy": " " + text[:20], "length": f" {len(text.split())}", "shout": " " + text[:9].upper()}
            made.append({"task": task, "prompt": f"{task}: {text}\nAnswer:", "response": response[task]})
    return made


def write_jsonl(file: Path, count: int = 20, seed: int = 0) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(count, seed)), encoding="utf-8")
    return file


def tokenizer_of(vocab_size: int = 400) -> Any:
    from hf_bilb.data.text.instructions import new_tokenizer

    return new_tokenizer([row[key] for row in rows(60, seed=9) for key in ("prompt", "response")], vocab_size)


def write_language_model(folder: Path, model_type: str = "llama", **sizes: Any) -> Path:
    """A model with random weights and its tokenizer, loadable by the Auto classes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = tokenizer_of()
    tokenizer.save_pretrained(folder)
    small = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**small, **sizes})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder
