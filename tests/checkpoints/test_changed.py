"""Checkpoints that people have changed, thinned out or brought along: loaded with one warning that names it all."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_bilb import BilevelMTLTrainer, BilevelMTLTrainingArguments
from hf_bilb.errors import CheckpointError
from hf_bilb.trainer.checkpointing import DESCRIPTION, MARKER, TENSORS, last_complete_checkpoint
from tests.checkpoints.runs import Run, build_trainer
from tests.checkpoints.test_damage import RUN, delete, flip, forget_digests
from tests.synthetic import SyntheticModel, build_data, build_model, flat_parameters

FILES_OF_BALANCER = (TENSORS, DESCRIPTION)


class Beginning(TrainerCallback):
    """What a run begins with, and what the first step does."""

    step = -1

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **kwargs: Any) -> None:
        self.step = state.global_step
        self.parameters = flat_parameters(model)
        self.has_moments = len(optimizer.state_dict()["state"]) > 0
        self.rate = optimizer.param_groups[0]["lr"]
        self.balancer = kwargs["balancer"].state_dict() if "balancer" in kwargs else {}


class SumTrainer(Trainer):
    """What a stock Trainer makes of the synthetic model."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(**inputs)
        return (outputs.losses.sum(), outputs) if return_outputs else outputs.losses.sum()


def stock_run(folder: Path, **settings: Any) -> None:
    args = TrainingArguments(
        str(folder), max_steps=11, save_steps=5, report_to="none", use_cpu=True, disable_tqdm=True, **settings
    )
    SumTrainer(model=build_model(), args=args, train_dataset=build_data(88)).train()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    build_trainer(RUN, folder).train()
    return folder


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stock") / "run"
    stock_run(folder)
    return folder


@pytest.fixture
def run_folder(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def go_on(
    folder: Path, resume: str | bool, caplog: pytest.LogCaptureFixture, run: Run = RUN, **settings: Any
) -> tuple[Beginning, list[str]]:
    """Resume and train one step; what it began with, and our warnings."""
    trainer = build_trainer(run, folder, max_steps=12, save_strategy="no", **settings)
    begin = Beginning()
    trainer.add_callback(begin)
    with caplog.at_level(logging.WARNING, "hf_bilb"):
        trainer.train(resume_from_checkpoint=resume)
    return begin, [record.getMessage() for record in caplog.records if record.name.startswith("hf_bilb")]


def saved_balancer(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / TENSORS)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# --- what may be missing or different -----------------------------------------------------------------------------


def edit(path: Path) -> None:
    state = json.loads(path.read_text())
    path.write_text(json.dumps({**state, "eval_steps": 12345}))


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("training_args.bin", delete, "training_args.bin is missing"),
        ("training_args.bin", flip, "training_args.bin was changed"),
        ("config.json", delete, "config.json is missing"),
        ("trainer_state.json", edit, "trainer_state.json was changed"),
        ("config.json", edit, "config.json was changed"),
        (DESCRIPTION, edit, f"{DESCRIPTION} was changed"),
        ("rng_state.pth", delete, "rng_state.pth is missing; what starts FRESH: random numbers"),
        ("optimizer.pt", delete, "optimizer.pt is missing; what starts FRESH: optimizer and learning rate schedule"),
        ("scheduler.pt", delete, "scheduler.pt is missing; what starts FRESH: optimizer and learning rate schedule"),
        (TENSORS, delete, f"{TENSORS} is missing; what starts FRESH: balancer"),
        (DESCRIPTION, delete, f"{DESCRIPTION} is missing; what starts FRESH: balancer"),
        (MARKER, delete, f"{MARKER} is missing (a checkpoint of Trainer has none), so that nothing tells"),
    ],
)
def test_it_is_loaded_with_one_warning(
    run_folder: Path, caplog: pytest.LogCaptureFixture, name: str, change: Callable[[Path], None], expected: str
) -> None:
    checkpoint = run_folder / "checkpoint-11"
    saved = flat_parameters(SyntheticModel.from_pretrained(trained_copy(run_folder, checkpoint)))
    balancer = saved_balancer(checkpoint)
    change(checkpoint / name)
    begin, warnings = go_on(run_folder, str(checkpoint), caplog)
    assert begin.step == 11 and torch.equal(begin.parameters, saved)
    (warning,) = warnings
    assert str(checkpoint) in warning and expected in warning and "\n" not in warning
    fresh = name in ("optimizer.pt", "scheduler.pt")
    assert begin.has_moments is not fresh
    # A linear decay to zero at step 12: where it starts anew, it starts at its top.
    assert begin.rate == pytest.approx(1e-2 if fresh else 0.0, abs=1e-4)
    if change is delete and name in FILES_OF_BALANCER:
        assert same(begin.balancer, build_trainer(RUN, run_folder).balancer.state_dict())
    else:
        assert same(begin.balancer, balancer)


def trained_copy(run_folder: Path, checkpoint: Path) -> Path:
    return Path(shutil.copytree(checkpoint, run_folder.parent / "as_saved"))


def test_an_untouched_one_is_loaded_without_a_word(run_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for resume in (str(run_folder / "checkpoint-11"), True):
        begin, warnings = go_on(run_folder, resume, caplog)
        assert begin.step == 11 and warnings == []


def test_one_of_a_former_version_is_loaded_without_a_word(run_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    forget_digests(run_folder / "checkpoint-11")
    begin, warnings = go_on(run_folder, True, caplog)
    assert begin.step == 11 and warnings == [] and begin.has_moments


class Slim(TrainerCallback):
    """Deletes what it takes for ballast, as soon as a checkpoint is written."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        for name in ("training_args.bin", "optimizer.pt", TENSORS, DESCRIPTION):
            (folder / name).unlink()


def test_what_an_on_save_callback_deletes_does_not_stop_a_resume(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = build_trainer(RUN, tmp_path)
    trainer.add_callback(Slim())
    trainer.train()
    begin, (warning,) = go_on(tmp_path, True, caplog)
    assert begin.step == 11
    for name in ("training_args.bin", "optimizer.pt", TENSORS, DESCRIPTION):
        assert f"{name} is missing" in warning


# --- weights in other files ---------------------------------------------------------------------------------------


def shard(checkpoint: Path, size: int = 300) -> list[Path]:
    """Save the weights anew, in several files."""
    SyntheticModel.from_pretrained(checkpoint).save_pretrained(checkpoint, max_shard_size=size)
    delete(checkpoint / "model.safetensors")
    shards = sorted(checkpoint.glob("model-*.safetensors"))
    assert len(shards) > 1
    return shards


def test_weights_that_were_sharded_afterwards(run_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = run_folder / "checkpoint-11"
    saved = flat_parameters(SyntheticModel.from_pretrained(checkpoint))
    shard(checkpoint)
    begin, (warning,) = go_on(run_folder, str(checkpoint), caplog)
    assert begin.step == 11 and torch.equal(begin.parameters, saved) and begin.has_moments
    assert "its weights lie in other files than those that were saved" in warning and "model-0" not in warning


def lose_one(shards: list[Path]) -> None:
    shards[0].unlink()


def cut_one(shards: list[Path]) -> None:
    shards[0].write_bytes(shards[0].read_bytes()[:-8])


def exchange_two(shards: list[Path]) -> None:
    first, second = shards[0].read_bytes(), shards[1].read_bytes()
    shards[0].write_bytes(second)
    shards[1].write_bytes(first)


def spoil_index(shards: list[Path]) -> None:
    (shards[0].parent / "model.safetensors.index.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "pattern"),
    [
        (lose_one, "Can't find a valid checkpoint at .*model-00001-of-.*: is missing"),
        (cut_one, "model-00001-of-.*: is truncated"),
        (exchange_two, "model-00001-of-.*: does not agree with model.safetensors.index.json: '"),
        (spoil_index, "model.safetensors.index.json: is damaged"),
    ],
)
def test_shards_that_do_not_agree_are_refused(
    run_folder: Path, damage: Callable[[list[Path]], None], pattern: str
) -> None:
    checkpoint = run_folder / "checkpoint-11"
    damage(shard(checkpoint))
    with pytest.raises(CheckpointError, match=pattern):
        build_trainer(RUN, run_folder).train(resume_from_checkpoint=str(checkpoint))


def test_one_shard_of_another_run_is_refused(run_folder: Path) -> None:
    # Saved in shards from the start: then one of them is exchanged, or the index is edited as well.
    from hf_bilb.storage.checkpoint_marker import write_marker

    checkpoint = run_folder / "checkpoint-11"
    shards = shard(checkpoint)
    write_marker(checkpoint, "a", True)
    flip(shards[1], 0.9)
    for change in (lambda: None, lambda: edit(checkpoint / "model.safetensors.index.json")):
        change()
        with pytest.raises(CheckpointError, match=f"{shards[1].name}: is damaged or another run's"):
            build_trainer(RUN, run_folder).train(resume_from_checkpoint=str(checkpoint))


# --- checkpoints of Trainer ---------------------------------------------------------------------------------------


def test_one_of_trainer_is_loaded_with_a_warning(stock: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = stock / "checkpoint-10"
    begin, (warning,) = go_on(tmp_path, str(checkpoint), caplog)
    assert begin.step == 10 and begin.has_moments
    assert torch.equal(begin.parameters, flat_parameters(SyntheticModel.from_pretrained(checkpoint)))
    assert warning.startswith(f"{checkpoint}: {MARKER} is missing")
    assert f"{TENSORS} is missing" in warning and warning.endswith("what starts FRESH: balancer")


def test_the_last_one_of_trainer_is_found(stock: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = shutil.copytree(stock, tmp_path / "run")
    delete(folder / "checkpoint-11" / "trainer_state.json")  # written last: it was not finished
    begin, warnings = go_on(folder, True, caplog)
    assert begin.step == 10
    assert "passing over" in warnings[0] and "checkpoint-11" in warnings[0] and "was not finished" in warnings[0]
    assert "checkpoint-10" in warnings[1] and MARKER in warnings[1]


@pytest.mark.parametrize("name", ["optimizer.pt", "model.safetensors", "trainer_state.json"])
def test_a_damaged_one_of_trainer_is_one_line(stock: Path, tmp_path: Path, name: str) -> None:
    checkpoint = shutil.copytree(stock / "checkpoint-10", tmp_path / "checkpoint-10")
    content = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=f"{name}: is (damaged|truncated)") as caught:
        build_trainer(RUN, tmp_path).train(resume_from_checkpoint=str(checkpoint))
    assert "\n" not in str(caught.value)


def test_one_without_weights_is_one_line(stock: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(stock / "checkpoint-10", tmp_path / "checkpoint-10")
    delete(checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"Can't find a valid checkpoint at .*checkpoint-10: it holds no weights"):
        build_trainer(RUN, tmp_path).train(resume_from_checkpoint=str(checkpoint))


def test_the_last_one_is_none_of_ours_without_a_marker(run_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    delete(run_folder / "checkpoint-11" / MARKER)
    begin, warnings = go_on(run_folder, True, caplog)
    assert begin.step == 10 and "checkpoint-11" in warnings[0]


def test_a_state_of_another_shape_is_one_line(stock: Path, tmp_path: Path) -> None:
    # Whole files that hold something else: found when it is loaded.
    checkpoint = shutil.copytree(stock / "checkpoint-10", tmp_path / "checkpoint-10")
    torch.save({"state": {}, "param_groups": []}, checkpoint / "optimizer.pt")
    with pytest.raises(CheckpointError, match="optimizer and learning rate schedule cannot be loaded") as caught:
        build_trainer(RUN, tmp_path).train(resume_from_checkpoint=str(checkpoint))
    assert "\n" not in str(caught.value)
    torch.save({"python": 3}, checkpoint / "rng_state.pth")
    shutil.copy(stock / "checkpoint-10" / "optimizer.pt", checkpoint)
    with pytest.raises(CheckpointError, match="the random state cannot be loaded"):
        build_trainer(RUN, tmp_path).train(resume_from_checkpoint=str(checkpoint))


# --- an ordinary model --------------------------------------------------------------------------------------------


class Ordinary(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(5, 1)

    def forward(self, x: Any, labels: Any = None) -> dict[str, Any]:
        y = self.linear(x)
        return {"loss": (y - labels).square().mean(), "logits": y}


@pytest.mark.parametrize("writer", ["ours", "save_only_model", "stock"])
def test_nothing_is_said_of_balancers_to_an_ordinary_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, writer: str
) -> None:
    rows = [{"x": torch.ones(5) * i, "labels": torch.ones(1)} for i in range(16)]
    settings: dict[str, Any] = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_steps": 2}
    settings |= {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    only = {"save_only_model": writer == "save_only_model"}
    classes = (Trainer, TrainingArguments) if writer == "stock" else (BilevelMTLTrainer, BilevelMTLTrainingArguments)
    with caplog.at_level(logging.WARNING):
        for (trainer, arguments), steps, resume in (
            (classes, 2, None),
            ((BilevelMTLTrainer, BilevelMTLTrainingArguments), 4, str(tmp_path / "checkpoint-2")),
        ):
            args = arguments(str(tmp_path), max_steps=steps, **settings, **only)
            trainer(model=Ordinary(), args=args, train_dataset=rows, eval_dataset=rows).train(resume)
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("hf_bilb")]
    assert not any("balancer" in message for message in ours)
    assert len(ours) == (0 if writer == "ours" else 1)


# --- which run, and which of its checkpoints ----------------------------------------------------------------------


def marker(checkpoint: Path) -> dict[str, Any]:
    return dict(json.loads((checkpoint / MARKER).read_text()))


def test_the_id_of_a_run_goes_on_in_its_own_folder_only(run_folder: Path, tmp_path: Path) -> None:
    ids = {marker(path)["run"] for path in run_folder.glob("checkpoint-*")}
    assert len(ids) == 1
    build_trainer(RUN, run_folder, max_steps=12).train(resume_from_checkpoint=str(run_folder / "checkpoint-10"))
    assert {marker(path)["run"] for path in run_folder.glob("checkpoint-*")} == ids
    build_trainer(RUN, tmp_path / "next", max_steps=12).train(resume_from_checkpoint=str(run_folder / "checkpoint-11"))
    assert marker(tmp_path / "next" / "checkpoint-12")["run"] not in ids
    moved = shutil.move(run_folder, tmp_path / "moved")
    build_trainer(RUN, moved, max_steps=13).train(resume_from_checkpoint=True)
    assert marker(moved / "checkpoint-13")["run"] in ids


def test_a_resume_goes_on_with_the_later_of_two_runs(run_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    # Started over, and stopped before it came as far as the run before.
    build_trainer(RUN, run_folder, max_steps=5, seed=6).train()
    begin, warnings = go_on(run_folder, True, caplog)
    assert begin.step == 5
    assert "checkpoint-10, checkpoint-11 are of an earlier run than checkpoint-5" in warnings[0]
    shutil.rmtree(run_folder / "checkpoint-5")
    assert go_on(run_folder, True, caplog)[0].step == 11


def test_looking_twice_at_a_checkpoint_hashes_it_once_until_it_is_touched(run_folder: Path, monkeypatch: Any) -> None:
    from hf_bilb.storage import checkpoint_marker

    hashed: list[str] = []
    digest = checkpoint_marker._digest
    monkeypatch.setattr(checkpoint_marker, "_digest", lambda path: (hashed.append(path.name), digest(path))[1])
    monkeypatch.setattr(checkpoint_marker, "_SECONDS_TO_SETTLE", 0.05)
    time.sleep(0.1)
    last_complete_checkpoint(run_folder)
    first = len(hashed)
    assert first == len(marker(run_folder / "checkpoint-11")["files"])
    last_complete_checkpoint(run_folder)
    assert len(hashed) == first
    flip(run_folder / "checkpoint-11" / "model.safetensors")
    assert last_complete_checkpoint(run_folder) == str(run_folder / "checkpoint-10")
