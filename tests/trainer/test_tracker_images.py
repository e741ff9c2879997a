"""Pictures go to the trackers of `report_to`, into the run of the training; TensorBoard is real, the others record."""

from __future__ import annotations

import io
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from transformers.integrations import integration_utils

from hf_bilb import BilevelMTLTrainer
from hf_bilb.reporting.files import save_figure
from hf_bilb.trainer.tracker_images import TrackerImages
from tests.synthetic import build_data
from tests.trainer.harness import arguments, build_model


def module(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> MagicMock:
    """A package that records what it is called with."""
    fake = MagicMock(**attributes)
    fake.__spec__ = ModuleSpec(name, None, origin="made up")
    monkeypatch.setitem(sys.modules, name, fake)
    return fake


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([1, 2], [3, 4])
    return [save_figure(figure, tmp_path / f"{name}.png") for name in ("losses", "weights")]


def trained(folder: Path, reporter: str) -> tuple[BilevelMTLTrainer, TrackerImages]:
    """A trainer that has trained and evaluated, as a recipe does before it draws."""
    data, images = build_data(8), TrackerImages()
    trainer = BilevelMTLTrainer(
        model=build_model(torch.float32),
        args=arguments(folder / "run", report_to=reporter, run_name="a name"),
        train_dataset=data,
        eval_dataset=data,
        callbacks=[images],
    )
    trainer.train()
    trainer.evaluate(metric_key_prefix="test")
    return trainer, images


def send(trainer: BilevelMTLTrainer, images: TrackerImages, pictures: list[Path]) -> None:
    images.send(trainer, pictures)


def test_tensorboard_has_the_pictures_as_they_were_drawn(tmp_path: Path, pictures: list[Path]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer, images = trained(tmp_path, "tensorboard")
    images.send(trainer, pictures)
    (folder,) = (tmp_path / "run").rglob("runs/*")
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    assert events.Tags()["images"] == ["plots/losses", "plots/weights"]
    assert "train/loss" in events.Tags()["scalars"]  # in one run
    (event,) = events.Images("plots/weights")
    assert event.step == trainer.state.global_step == 2
    shown, drawn = (
        np.asarray(Image.open(one).convert("RGB")) for one in (io.BytesIO(event.encoded_image_string), pictures[1])
    )
    assert np.array_equal(shown, drawn)


def test_wandb(tmp_path: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = module(monkeypatch, "wandb", Image=lambda path: ("image", path))
    module(monkeypatch, "wandb.sdk.lib.config_util", ConfigError=RuntimeError)
    send(*trained(tmp_path, "wandb"), pictures)
    assert wandb.log.call_args.args == (
        {
            "plots/losses": ("image", str(pictures[0])),
            "plots/weights": ("image", str(pictures[1])),
            "train/global_step": 2,
        },
    )


class FakeMLflow:
    """Runs that begin and end; numbers without a run begin one, as in MLflow."""

    def __init__(self) -> None:
        self.active: SimpleNamespace | None = None
        self.begun = 0
        self.sent: list[tuple[str, ...]] = []

    def start_run(self, **_: Any) -> None:
        self.begun += 1
        self.active = SimpleNamespace(info=SimpleNamespace(run_id=f"run {self.begun}"))

    def log_metrics(self, **_: Any) -> None:
        if self.active is None:
            self.start_run()

    def end_run(self) -> None:
        self.active = None


@pytest.mark.parametrize("reporter", ["mlflow", "dagshub"])
def test_mlflow_has_them_in_the_run_of_the_training(
    reporter: str, tmp_path: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = FakeMLflow()
    mlflow = module(
        monkeypatch,
        "mlflow",
        __version__="3.0",
        start_run=runs.start_run,
        end_run=runs.end_run,
        log_metrics=runs.log_metrics,
        active_run=lambda: runs.active,
    )
    mlflow.utils.validation.MAX_PARAM_VAL_LENGTH = mlflow.utils.validation.MAX_PARAMS_TAGS_PER_BATCH = 100
    mlflow.MlflowClient.return_value.log_artifact = lambda *what: runs.sent.append(what)
    module(monkeypatch, "dagshub")
    module(monkeypatch, "dagshub.upload")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://made.up/owner/name.mlflow")
    trainer, images = trained(tmp_path, reporter)
    if reporter == "mlflow":
        assert runs.begun == 2  # Trainer has ended the training's, and the evaluation began another one
    images.send(trainer, pictures)
    assert runs.sent == [("run 1", str(picture), "plots") for picture in pictures]


class AnyMethod:
    """Takes every call, also of names with two underscores, which a mock does not."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


def test_comet(tmp_path: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = AnyMethod()
    module(monkeypatch, "comet_ml", start=lambda **_: experiment, get_running_experiment=lambda: experiment)
    monkeypatch.setattr(integration_utils, "_is_comet_installed", True)
    monkeypatch.setattr(integration_utils, "_is_comet_recent_enough", True)
    send(*trained(tmp_path, "comet_ml"), pictures)
    sent = [(args, kwargs) for name, args, kwargs in experiment.calls if name == "log_image"]
    assert sent == [
        ((str(pictures[0]),), {"name": "plots/losses", "step": 2}),
        ((str(pictures[1]),), {"name": "plots/weights", "step": 2}),
    ]


def test_swanlab(tmp_path: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    swanlab = module(monkeypatch, "swanlab", Image=lambda path: ("image", path))
    send(*trained(tmp_path, "swanlab"), pictures[:1])
    assert swanlab.log.call_args.args == ({"plots/losses": ("image", str(pictures[0]))},)
    assert swanlab.log.call_args.kwargs == {"step": 2}


def test_trackio(tmp_path: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    trackio = module(monkeypatch, "trackio", Image=lambda path: ("image", path), __version__="0.25")
    trackio.context_vars.current_space_id.get.return_value = None
    send(*trained(tmp_path, "trackio"), pictures[:1])
    assert trackio.log.call_args.args == ({"plots/losses": ("image", str(pictures[0])), "train/global_step": 2},)


def test_a_tracker_that_fails_is_a_warning(
    tmp_path: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    swanlab = module(monkeypatch, "swanlab")
    trainer, images = trained(tmp_path, "swanlab")
    swanlab.log.side_effect = ConnectionError("no network\nat all")
    images.send(trainer, pictures)
    assert "report_to: SwanLab did not take the pictures: ConnectionError: no network at all" in caplog.messages


def test_without_trackers_or_pictures_nothing_happens(tmp_path: Path, pictures: list[Path]) -> None:
    send(*trained(tmp_path, "none"), pictures)
    trainer, images = trained(tmp_path / "other", "tensorboard")
    before = sorted((tmp_path / "other").rglob("*"))
    images.send(trainer, [])
    assert sorted((tmp_path / "other").rglob("*")) == before
