"""One process of `test_token_mixture`: a language model on a mixture of tasks, one rank or two.

python -m tests.distributed.token_mixture FOLDER 1
python -m torch.distributed.run --nproc_per_node 2 -m tests.distributed.token_mixture FOLDER 2
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tests.distributed.training import world_size
from tests.distributed.worker import main
from tests.models.language_training import TASKS, data_of, flat, model_of, trainer_of

#: Balancer, where F is taken, packed, micro-batches of each of two ranks. Both places are exact for a linear F,
#: `window` for every one; they are the same where there is one micro-batch.
KINDS = {
    "ls": ("ls", "micro_batch", False, 2),
    "ls_packed": ("ls", "micro_batch", True, 2),
    "bilb_packed": ("bilb", "window", True, 2),
    "bilb_of_two_batches": ("bilb", "micro_batch", False, 1),
    "bilb_of_two_packed_rows": ("bilb", "micro_batch", True, 1),
}


def train(balancer: str, over: str, packed: bool, micro_batches: int) -> dict[str, Any]:
    """48 examples in updates of 16: of one batch, or of two ranks with one or two micro-batches."""
    accumulation = 1 if world_size() == 1 else micro_batches
    trainer = trainer_of(
        Path(sys.argv[1]) / "run",
        model_of(),
        data_of(48, packed),
        data_of(21),  # the last batch of the ranks is filled up
        per_device_train_batch_size=16 // accumulation // world_size(),
        per_device_eval_batch_size=4,
        gradient_accumulation_steps=accumulation,
        balance_over=over,
        balancer=balancer,
        ddp_find_unused_parameters=False,
    )
    before = flat(trainer.model).clone()
    trainer.train()
    measured = trainer.evaluate()
    return {
        "before": before,
        "parameters": flat(trainer.model),
        "balancer": trainer.balancer.state_dict(),
        "steps": trainer.state.global_step,
        "measured": {
            f"{key}_{task}": measured[f"eval_{key}_{task}"] for key in ("loss", "perplexity") for task in TASKS
        },
    }


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), lambda: {name: lambda kind=kind: train(*kind) for name, kind in KINDS.items()})
