"""The recipe of the hub's language model, from the Hub at `HF_ENDPOINT` and back to it.

python -m tests.hub.language_worker FOLDER    train `recipes/instructions/bilb.yaml` with FOLDER/glue, push the
                                              adapters, load them in both ways, save what they say to FOLDER/found.pt
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_bilb.cli import main

BASE, ADAPTERS = "Qwen/Qwen2.5-0.5B", "somebody/adapters"


def settings(folder: Path) -> list[str]:
    """What makes the recipe small; model, adapters, packing, sampling, accumulation and balancer stay."""
    trainer = {
        "output_dir": folder / "run", "max_steps": 3, "eval_steps": 3, "save_steps": 3, "logging_steps": 1,
        "per_device_train_batch_size": 4, "warmup_steps": 0, "learning_rate": 0.1, "bf16": "false", "use_cpu": "true",
        "disable_tqdm": "true", "push_to_hub": "true", "hub_model_id": ADAPTERS,
    }  # fmt: skip
    data = [f"data.glue={{folder: {folder}/glue}}", "data.max_length=64", "evaluation.plots=false"]
    return [*(f"trainer.{name}={value}" for name, value in trainer.items()), *data]


def train_and_load(folder: Path) -> None:
    main.main(["train", "recipes/instructions/bilb.yaml", *settings(folder)], standalone_mode=False)
    tokens = AutoTokenizer.from_pretrained(ADAPTERS)("Sentence: The cat sat.", return_tensors="pt").input_ids
    models = {
        "base": AutoModelForCausalLM.from_pretrained(BASE),
        "auto": AutoModelForCausalLM.from_pretrained(ADAPTERS),
        "peft": AutoPeftModelForCausalLM.from_pretrained(ADAPTERS),
    }
    with torch.no_grad():
        torch.save({name: model.eval()(tokens).logits for name, model in models.items()}, folder / "found.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    train_and_load(Path(sys.argv[1]))
