"""One process of `test_dense_mixture`: pixel-wise tasks and classes of whole images, one rank or two.

python -m tests.distributed.dense_mixture FOLDER 1
python -m torch.distributed.run --nproc_per_node 2 -m tests.distributed.dense_mixture FOLDER 2
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import default_data_collator

from hf_bilb import BilevelMTLTrainer, BilevelMTLTrainingArguments
from hf_bilb.losses.dense import dense_item_counts
from hf_bilb.models import DenseBackboneConfig, DenseBackboneModel
from tests.distributed.training import world_size
from tests.distributed.worker import main
from tests.synthetic import flat_parameters

TASKS = ("segmentation", "depth", "scene", "normals")
CLASSES, SCENES, UPDATE, STEPS = 4, 3, 8, 4
#: Balancer, where F is taken. Both are exact for a linear F, `window` for every one.
KINDS = {"ls": ("ls", "micro_batch"), "bilb": ("bilb", "window"), "famo": ("famo", "window")}


def model_of() -> DenseBackboneModel:
    """Layer and group normalisation only: nothing in it looks at the batch."""
    torch.manual_seed(0)
    encoder = {"model_type": "convnext", "hidden_sizes": [8, 12], "depths": [1, 1], "num_stages": 2, "patch_size": 4}
    config = DenseBackboneConfig(encoder, TASKS, CLASSES, {"scene": SCENES}, decoder_size=8)
    return DenseBackboneModel(config).double()


def rows() -> list[dict[str, Tensor]]:
    """32 images in updates of 8, most of them with labels of some tasks only.

    Update 1: the first half has segmentation alone, the second depth and scenes alone. Update 2: nothing has a depth.
    Update 3: the second half has no label at all.
    """
    generator = torch.Generator().manual_seed(3)
    made = []
    for number in range(UPDATE * STEPS):
        frame = (16, 24)
        row = {
            "pixel_values": torch.rand(3, *frame, generator=generator, dtype=torch.float64),
            "segmentation": torch.randint(-1, CLASSES, frame, generator=generator),
            "depth": torch.rand(frame, generator=generator, dtype=torch.float64) + 0.5,
            "normals": functional.normalize(torch.randn(3, *frame, generator=generator, dtype=torch.float64), dim=0),
            "image_labels": torch.randint(SCENES, (1,), generator=generator),
        }
        step, second_half = number // UPDATE, number % UPDATE >= UPDATE // 2
        kept = torch.rand(4, generator=generator) < 0.6
        kept = {
            1: torch.tensor([not second_half, second_half, second_half, False]),
            2: kept & torch.tensor([True, False, True, True]),
            3: kept & (not second_half),
        }.get(step, kept)
        for column, there in zip(("segmentation", "depth", "image_labels", "normals"), kept.tolist(), strict=True):
            if not there:
                row[column].fill_(-1 if column in ("segmentation", "image_labels") else 0)
        made.append(row)
    return made


def train(balancer: str, over: str) -> dict[str, Any]:
    """Updates of 8 images: of one batch, or of two ranks with two micro-batches of two."""
    accumulation = 1 if world_size() == 1 else 2
    model = model_of()
    settings: dict[str, Any] = {
        "use_cpu": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True,
        "lr_scheduler_type": "constant", "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0,
        "num_train_epochs": 1, "dataloader_pin_memory": False, "train_sampling_strategy": "sequential",
        "ddp_find_unused_parameters": False, "balance_over": over, "balancer": balancer,
        "per_device_train_batch_size": UPDATE // accumulation // world_size(),
        "gradient_accumulation_steps": accumulation,
        "task_names": list(TASKS), "label_names": ["segmentation", "depth", "normals", "image_labels"],
    }  # fmt: skip
    trainer = BilevelMTLTrainer(
        model,
        BilevelMTLTrainingArguments(str(Path(sys.argv[1]) / "run"), **settings),
        train_dataset=rows(),
        data_collator=default_data_collator,
        task_item_counts=partial(dense_item_counts, task_names=TASKS, image_tasks=("scene",)),
    )
    before = flat_parameters(model).clone()
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss_mean" in entry]
    return {
        "before": before,
        "parameters": flat_parameters(model),
        "balancer": trainer.balancer.state_dict(),
        "steps": trainer.state.global_step,
        "losses": [[entry.get(f"loss/{task}") for task in TASKS] for entry in logged],
    }


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), lambda: {name: partial(train, *kind) for name, kind in KINDS.items()})
