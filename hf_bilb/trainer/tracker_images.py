"""Pictures of a run in its trackers, next to the numbers that Trainer logs there."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import (
    CometCallback,
    MLflowCallback,
    SwanLabCallback,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
)

from hf_bilb.errors import one_line

logger = logging.getLogger(__name__)

#: Part of the trackers' page that the pictures stand in.
SECTION = "plots"


class TrackerImages(TrainerCallback):
    """Sends pictures to the trackers of `report_to` that take some: TensorBoard, Weights & Biases, MLflow (and
    DagsHub), Comet, SwanLab, Trackio.

    It is one of the callbacks that a trainer is given, since Trainer closes MLflow's run at the end of training: what
    comes later would go into another run.

    State: the id of MLflow's run.
    """

    def __init__(self) -> None:
        self.mlflow_run: str | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember the run that MLflow's callback, which Trainer has put first, has begun."""
        mlflow = sys.modules.get("mlflow")  # which that callback has imported
        run = mlflow.active_run() if mlflow is not None and state.is_world_process_zero else None
        self.mlflow_run = None if run is None else run.info.run_id

    def send(self, trainer: Trainer, pictures: Sequence[Path]) -> None:
        """Send PNG files under their names, at the trainer's last step; by the first process alone.

        A tracker that does not take them is a warning: a run is not lost for its pictures.
        """
        if not pictures or not trainer.is_world_process_zero():
            return
        for callback in list(trainer.callback_handler.callbacks):
            send = next((send for kind, send in _SENDERS.items() if isinstance(callback, kind)), None)
            if send is None:
                continue
            try:
                send(Sent(pictures, trainer.state.global_step, self.mlflow_run), callback)
            except Exception as error:  # whatever a tracker, or the network, makes of it
                who, what = type(callback).__name__.removesuffix("Callback"), f"{type(error).__name__}: {error}"
                logger.warning("report_to: %s did not take the pictures: %s", who, one_line(what, 300))


@dataclass(frozen=True)
class Sent:
    """What is sent: PNG files, the step they belong to, and the id of MLflow's run."""

    files: Sequence[Path]
    step: int
    mlflow_run: str | None

    @property
    def tags(self) -> dict[str, Path]:
        """Name in a tracker -> file."""
        return {f"{SECTION}/{file.stem}": file for file in self.files}


def _to_tensorboard(sent: Sent, callback: TensorBoardCallback) -> None:
    from PIL import Image

    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        from tensorboardX import SummaryWriter  # type: ignore[no-redef]
    # A file of its own in the run's folder: the callback has closed its writer.
    with SummaryWriter(log_dir=callback.logging_dir) as writer:
        for tag, file in sent.tags.items():
            with Image.open(file) as image:
                writer.add_image(tag, np.asarray(image.convert("RGB")), sent.step, dataformats="HWC")


def _to_wandb(sent: Sent, callback: WandbCallback) -> None:
    import wandb

    logged = {tag: wandb.Image(str(file)) for tag, file in sent.tags.items()}
    wandb.log({**logged, "train/global_step": sent.step})  # the step that Trainer's numbers have


def _to_mlflow(sent: Sent, callback: MLflowCallback) -> None:
    import mlflow

    client = mlflow.MlflowClient()
    for file in sent.files if sent.mlflow_run is not None else ():
        client.log_artifact(sent.mlflow_run, str(file), SECTION)


def _to_comet(sent: Sent, callback: CometCallback) -> None:
    import comet_ml

    experiment = comet_ml.get_running_experiment()
    for tag, file in sent.tags.items() if experiment is not None else ():
        experiment.log_image(str(file), name=tag, step=sent.step)


def _to_swanlab(sent: Sent, callback: SwanLabCallback) -> None:
    import swanlab

    swanlab.log({tag: swanlab.Image(str(file)) for tag, file in sent.tags.items()}, step=sent.step)


def _to_trackio(sent: Sent, callback: TrackioCallback) -> None:
    import trackio

    logged = {tag: trackio.Image(str(file)) for tag, file in sent.tags.items()}
    trackio.log({**logged, "train/global_step": sent.step})


_SENDERS: dict[type[TrainerCallback], Callable[[Sent, Any], None]] = {
    TensorBoardCallback: _to_tensorboard,
    WandbCallback: _to_wandb,
    MLflowCallback: _to_mlflow,
    CometCallback: _to_comet,
    SwanLabCallback: _to_swanlab,
    TrackioCallback: _to_trackio,
}
