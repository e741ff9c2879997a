"""A training process that knows the test's Hub from `HF_ENDPOINT`, which is read at import.

python -m tests.hub.worker push FOLDER      train, pushing; stop after 13 steps; push the end; train the whole run
python -m tests.hub.worker resume FOLDER    download `last-checkpoint` and go on from it
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import TrainerCallback

from tests.checkpoints.runs import QM9, Run, build_trainer, finish

REPO = "somebody/balanced"
RUN = Run(0, 0, {"balancer": QM9})
STOP_AT, LAST_SAVE = 13, 10


class StopAt(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= STOP_AT


def push(folder: Path) -> None:
    trainer = build_trainer(
        RUN,
        folder / "pushed",
        push_to_hub=True,
        hub_model_id=REPO,
        hub_token="hf_test",
        hub_strategy="checkpoint",
        # Otherwise a save that falls into an upload is not pushed.
        hub_always_push=True,
    )
    trainer.add_callback(StopAt())
    trainer.train()
    trainer.push_to_hub()
    finish(build_trainer(RUN, folder / "whole"), folder / "whole.pt", resume=False)


def resume(folder: Path) -> None:
    downloaded = Path(snapshot_download(REPO, allow_patterns="last-checkpoint/*", cache_dir=folder / "cache"))
    finish(build_trainer(RUN, folder / "resumed"), folder / "resumed.pt", resume=str(downloaded / "last-checkpoint"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"push": push, "resume": resume}[sys.argv[1]](Path(sys.argv[2]))
