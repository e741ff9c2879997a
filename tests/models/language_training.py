"""Short training runs of a small causal language model on three tasks, for tests of one process and of several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_bilb import BilevelMTLTrainer, BilevelMTLTrainingArguments
from hf_bilb.data.text.instruction_rows import InstructionRows, PackExamples
from hf_bilb.losses.tokens import TokenLosses
from hf_bilb.metrics.perplexity import Perplexity
from hf_bilb.models.causal_lm import CausalLmOptions, build_causal_lm

TASKS = ("copy", "length", "shout")
VOCAB = 50
LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip


def model_of(config: dict[str, Any] | None = None, **options: Any) -> nn.Module:
    """A fresh model in float64."""
    torch.manual_seed(0)
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    made = CausalLmOptions(config=LLAMA if config is None else config, **options)
    return build_causal_lm(made, vocab_size=VOCAB, max_length=16, packed=False, special_tokens=special).double()


def data_of(count: int, packed: bool = False) -> InstructionRows:
    """Examples of 3 to 15 tokens, of which 1 to 8 are items; mostly of task 0, hardly any of task 2."""
    generator = np.random.default_rng(5)
    items = generator.integers(1, 9, count)
    ignored = generator.integers(2, 8, count)
    drawn = np.resize([0, 1, 0, 0, 2, 0, 1, 0, 0, 0, 0], count)  # in fours: 3 1 0, 2 1 1, 3 1 0, ...
    return InstructionRows(
        items + ignored,
        ignored,
        generator.integers(3, VOCAB, (items + ignored).sum()).astype(np.int32),
        drawn.astype(np.int64),
        packed,
    )


def trainer_of(folder: Path, model: nn.Module, train: Any, evaluated: Any = None, **settings: Any) -> BilevelMTLTrainer:
    """A Trainer that goes through the data in order, with SGD."""
    defaults: dict[str, Any] = {
        "use_cpu": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True,
        "lr_scheduler_type": "constant", "optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0,
        "num_train_epochs": 1, "dataloader_pin_memory": False, "train_sampling_strategy": "sequential",
        "task_names": list(TASKS), "label_names": ["token_labels", "task_ids"],
    }  # fmt: skip
    losses = TokenLosses(len(TASKS))
    return BilevelMTLTrainer(
        model,
        BilevelMTLTrainingArguments(str(folder), **{**defaults, **settings}),
        train_dataset=train,
        eval_dataset=evaluated,
        data_collator=PackExamples(2),
        task_loss_func=losses,
        task_item_counts=losses.count,
        compute_metrics=Perplexity(),
    )


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def by_row(model: nn.Module, data: InstructionRows) -> dict[str, list[float]]:
    """Task -> the losses of its tokens, one example and one token at a time."""
    found: dict[str, list[float]] = {task: [] for task in TASKS}
    for row in data:
        tokens = torch.from_numpy(row["input_ids"]).long()
        with torch.no_grad():
            scores = torch.log_softmax(model(input_ids=tokens[None]).logits[0], dim=-1)
        for t, label in enumerate(row["token_labels"].tolist()):
            if label != -100:
                found[TASKS[row["task_ids"]]].append(-float(scores[t - 1, label]))
    return found
