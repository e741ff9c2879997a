"""Every tensor of a model comes back to the bit, or loading it fails with one line that names what does not match."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_bilb.errors import CheckpointError
from hf_bilb.storage.adapter_weights import BESIDE
from hf_bilb.storage.weights import check_savable, load_weights
from hf_bilb.trainer.weights_trainer import RestoringTrainer
from tests.checkpoints.weight_models import (
    ADAPTED,
    FAMILIES,
    SHARED,
    WRAPPED,
    Branches,
    adapted_vit,
    two_adapters,
)


def named(model: nn.Module) -> dict[str, Tensor]:
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in model.state_dict().items()}


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in named(model).items()}


def scramble(model: nn.Module, seed: int, names: set[str] | None = None) -> None:
    """Other values, in place, for every tensor but constants that are not saved."""
    random = torch.Generator().manual_seed(seed)
    constant = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    with torch.no_grad():
        for name, tensor in named(model).items():
            if name in constant or (names is not None and name not in names):
                continue
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=random))
            else:
                tensor.copy_(torch.randint(2, 9, tensor.shape, generator=random))


def assert_is(model: nn.Module, wanted: Mapping[str, Tensor]) -> None:
    found = named(model)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def differing(model: nn.Module, wanted: Mapping[str, Tensor]) -> set[str]:
    return {name for name, tensor in named(model).items() if not torch.equal(tensor, wanted[name])}


def trainer_of(model: nn.Module, folder: Path, trainer: type[Trainer] = RestoringTrainer) -> Trainer:
    return trainer(model, TrainingArguments(str(folder / "run"), use_cpu=True, report_to="none"))


def save(model: nn.Module, folder: Path) -> str:
    """What the trainer writes into a checkpoint."""
    trainer_of(model, folder).save_model(str(folder / "checkpoint-1"))
    return str(folder / "checkpoint-1")


def resume(model: nn.Module, checkpoint: str) -> None:
    trainer_of(model, Path(checkpoint).parent)._load_from_checkpoint(checkpoint)


def load_best(model: nn.Module, checkpoint: str) -> None:
    trainer = trainer_of(model, Path(checkpoint).parent)
    trainer.state.best_model_checkpoint = checkpoint
    trainer._load_best_model()


def assert_comes_back(model: nn.Module, folder: Path, names: set[str] | None = None) -> str:
    """Save; then resume, and load the best model, into the same model with other values. Returns the checkpoint."""
    scramble(model, 1, names)
    wanted, objects = snapshot(model), list(model.parameters())
    checkpoint = save(model, folder)
    assert_is(model, wanted)
    for seed, load in ((2, resume), (3, load_best)):
        scramble(model, seed, names)
        assert len(differing(model, wanted)) >= (len(wanted) if names is None else len(names)) - 2
        load(model, checkpoint)
        assert_is(model, wanted)
    # The optimizer holds them.
    assert all(a is b for a, b in zip(objects, model.parameters(), strict=True))
    return checkpoint


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_of_every_family(name: str, tmp_path: Path) -> None:
    model = FAMILIES[name]()
    checkpoint = assert_comes_back(model, tmp_path)
    saved = load_file(f"{checkpoint}/model.safetensors")
    assert ("*" in name) == (not saved.keys() <= model.state_dict().keys()), "is saved under other names"
    if name == "backbone/pixio*":
        return  # transformers itself confuses its two layers of one name
    # And so has transformers itself read it.
    assert_is(type(model).from_pretrained(checkpoint), snapshot(model))


@pytest.mark.parametrize("name", WRAPPED)
def test_a_model_in_another_module(name: str, tmp_path: Path) -> None:
    model = WRAPPED[name]()
    checkpoint = assert_comes_back(model, tmp_path)
    bare = getattr(model, "_orig_mod", model)
    assert not any("_orig_mod" in key for key in load_file(f"{checkpoint}/model.safetensors"))
    if isinstance(bare, PreTrainedModel) and name != "compiled_part":
        assert_is(type(bare).from_pretrained(checkpoint), snapshot(model))


def test_a_compiled_run_and_one_that_is_not_read_each_other(tmp_path: Path) -> None:
    plain, compiled = WRAPPED["subclass"](), WRAPPED["compiled_part"]()
    scramble(compiled, 1)
    resume(plain, save(compiled, tmp_path / "a"))
    assert_is(plain, snapshot(compiled))
    scramble(plain, 2)
    resume(compiled, save(plain, tmp_path / "b"))
    assert_is(compiled, snapshot(plain))


@pytest.mark.parametrize("name", ["image/vit*", "experts/mixtral*", "seq2seq/t5_tied"])
def test_shards_and_pickles(name: str, tmp_path: Path) -> None:
    model = FAMILIES[name]()
    scramble(model, 1)
    wanted = snapshot(model)
    model.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    whole = load_file(save(model, tmp_path) + "/model.safetensors")
    (tmp_path / "pickle").mkdir()
    torch.save(whole, tmp_path / "pickle" / "pytorch_model.bin")
    for seed, folder in ((2, "shards"), (3, "pickle")):
        scramble(model, seed)
        load_best(model, str(tmp_path / folder))
        assert_is(model, wanted)


def test_stock_checkpoint_of_a_compiled_model(tmp_path: Path) -> None:
    """Its names are those of the compiled module, mapped by transformers."""
    model = WRAPPED["compiled_part"]()
    scramble(model, 1)
    wanted = snapshot(model)
    trainer_of(model, tmp_path, Trainer).save_model(str(tmp_path / "stock"))
    scramble(model, 2)
    resume(model, str(tmp_path / "stock"))
    assert_is(model, wanted)


# --- shared memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHARED)
def test_what_is_shared_comes_back_shared(name: str, tmp_path: Path) -> None:
    model = SHARED[name]()
    check_savable(model)
    places = {key: tensor.data_ptr() for key, tensor in model.state_dict().items()}
    checkpoint = assert_comes_back(model, tmp_path)
    assert {key: tensor.data_ptr() for key, tensor in model.state_dict().items()} == places
    wanted, again = snapshot(model), SHARED[name]()
    load_weights(again, checkpoint)
    assert_is(again, wanted)
    if isinstance(model, PreTrainedModel):
        assert_is(type(model).from_pretrained(checkpoint), wanted)
    elif name == "branches":
        scramble(model, 5)
        assert load_model(model, f"{checkpoint}/model.safetensors") == (set(), [])
        assert_is(model, wanted)


def test_a_shared_layer_is_written_once(tmp_path: Path) -> None:
    saved = load_file(save(Branches(num_tasks=5), tmp_path) + "/model.safetensors")
    assert len(saved) == 2 + 5 * 2


def test_what_is_one_tensor_here_and_two_there_is_refused(tmp_path: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in Branches().state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    resume(Branches(), str(tmp_path))  # the same values twice
    tensors["tasks.task_1.encoder.bias"] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"tasks\.task_0\.encoder\.bias and .*share memory in the model, but not"):
        resume(Branches(), str(tmp_path))


class Extra(nn.Linear):
    def get_extra_state(self) -> str:
        return "text"

    def set_extra_state(self, state: Any) -> None:
        pass


def expanded() -> nn.Module:
    model = nn.Linear(2, 2)
    model.register_buffer("scale", torch.ones(1).expand(4))
    return model


def sparse() -> nn.Module:
    model = nn.Linear(2, 2)
    model.register_buffer("graph", torch.eye(3).to_sparse())
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Extra(2, 2), "the model cannot be saved: _extra_state is of type str, and a checkpoint holds tensors"),
        (expanded, "the model cannot be saved: scale was expanded: several of its entries are one place in memory"),
        (sparse, "the model cannot be saved: graph has the layout torch.sparse_coo, and a checkpoint holds dense"),
    ],
)
def test_what_cannot_be_saved_is_found_before_training(build: Any, message: str, tmp_path: Path) -> None:
    trainer = trainer_of(build(), tmp_path)
    trainer.train_dataset = [{"x": torch.zeros(2)}]
    with pytest.raises(CheckpointError) as raised:
        trainer.train()
    assert str(raised.value).startswith(message) and "\n" not in str(raised.value)
    assert trainer.optimizer is None


# --- what does not match ------------------------------------------------------------------------------------------


def changed(state: dict[str, Tensor], change: str) -> dict[str, Tensor]:
    first, second = sorted(state)[-2:]
    if change == "missing":
        del state[first]
    elif change == "unexpected":
        state["head.of.another"] = torch.zeros(2)
    elif change == "shape":
        state[second] = state[second].new_zeros(7)
    return state


@pytest.mark.parametrize("load", [resume, load_best])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "1 is missing ("),
        ("unexpected", "1 is not of this model (head.of.another)"),
        ("shape", "(7,) where ("),
    ],
)
@pytest.mark.parametrize("name", ["vit", "module", "adapters"])
def test_what_does_not_match_is_refused(name: str, change: str, message: str, load: Any, tmp_path: Path) -> None:
    model = {"vit": FAMILIES["image/vit*"], "module": Branches, "adapters": adapted_vit}[name]()
    checkpoint = save(model, tmp_path)
    file = Path(checkpoint) / ("adapter_model.safetensors" if name == "adapters" else "model.safetensors")
    save_file(changed(load_file(file), change), file)
    scramble(model, 2)
    before = snapshot(model)
    with pytest.raises(CheckpointError) as raised:
        load(model, checkpoint)
    assert message in str(raised.value) and checkpoint in str(raised.value) and "\n" not in str(raised.value)
    assert_is(model, before)


def test_many_names_are_counted_and_a_few_shown(tmp_path: Path) -> None:
    checkpoint = save(FAMILIES["image/vit*"](), tmp_path)
    with pytest.raises(CheckpointError) as raised:
        resume(FAMILIES["text/bert"](), checkpoint)
    assert "39 are missing (bert.embeddings.word_embeddings.weight, " in str(raised.value)
    assert "are not of this model (" in str(raised.value) and len(str(raised.value)) < 700


def test_an_expert_that_is_missing(tmp_path: Path) -> None:
    model = FAMILIES["experts/mixtral*"]()
    file = Path(save(model, tmp_path)) / "model.safetensors"
    state = load_file(file)
    key = next(key for key in state if ".experts.1." in key)
    del state[key]
    save_file(state, file)
    with pytest.raises(CheckpointError, match=r"do not match the model"):
        resume(model, str(file.parent))


def test_files_that_are_gone_or_damaged(tmp_path: Path) -> None:
    model = FAMILIES["image/vit*"]()
    with pytest.raises(CheckpointError, match="Can't find a valid checkpoint at"):
        load_best(model, str(tmp_path))
    model.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    shard = sorted((tmp_path / "shards").glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:50])
    with pytest.raises(CheckpointError, match=f"{shard.name}: cannot be read as tensors"):
        load_best(model, str(tmp_path / "shards"))
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name}: is missing"):
        load_best(model, str(tmp_path / "shards"))


def test_a_constant_that_was_saved_once_is_no_error(tmp_path: Path) -> None:
    model = FAMILIES["text/bert"]()
    file = Path(save(model, tmp_path)) / "model.safetensors"
    constant = model.bert.embeddings.position_ids
    save_file({**load_file(file), "bert.embeddings.position_ids": constant.contiguous()}, file)
    resume(model, str(file.parent))


def test_another_type_of_number_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = save(FAMILIES["text/bert"]().half(), tmp_path)
    with caplog.at_level(logging.WARNING, "hf_bilb"):
        resume(FAMILIES["text/bert"](), checkpoint)
    assert "are of another type than the model's and are converted" in caplog.text


def test_another_version_of_transformers_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = FAMILIES["text/bert"]()
    config = Path(save(model, tmp_path)) / "config.json"
    with caplog.at_level(logging.WARNING, "hf_bilb"):
        resume(model, str(config.parent))
        assert caplog.text == ""
        config.write_text(config.read_text().replace(transformers.__version__, "5.0.1"))
        resume(model, str(config.parent))
    assert "was saved with transformers 5.0.1, this is " in caplog.text


# --- adapters -----------------------------------------------------------------------------------------------------


def moved(model: nn.Module) -> set[str]:
    """Names that training moves: parameters with a gradient, running statistics, all adapters."""
    names = {name for name, p in model.named_parameters() if p.requires_grad or "lora_" in name}
    names |= {name for name in model.state_dict() if "running_" in name or "num_batches" in name}
    return {name.replace("_orig_mod.", "") for name in names}


@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_and_what_is_trained_beside_them(name: str, tmp_path: Path) -> None:
    model = ADAPTED[name]()
    checkpoint = Path(assert_comes_back(model, tmp_path, moved(model)))
    assert not (checkpoint / "model.safetensors").exists()
    beside = {"unfrozen_beside", "running_statistics", "computed_prompt", "prompt"}
    assert (checkpoint / BESIDE).is_file() == (name in beside)


@pytest.mark.parametrize("name", ["vit", "prompt"])
def test_adapters_of_the_stock_trainer(name: str, tmp_path: Path) -> None:
    model = ADAPTED[name]()
    scramble(model, 1, moved(model))
    wanted = snapshot(model)
    trainer_of(model, tmp_path, Trainer).save_model(str(tmp_path / "stock"))
    scramble(model, 2, moved(model))
    resume(model, str(tmp_path / "stock"))
    assert_is(model, wanted)


def test_each_adapter_gets_its_own_file(tmp_path: Path) -> None:
    checkpoint = save(two_adapters(), tmp_path)
    assert (Path(checkpoint) / "second" / "adapter_model.safetensors").is_file()
    (Path(checkpoint) / "second" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"second/adapter_model\.safetensors: is missing"):
        load_best(two_adapters(), checkpoint)


def test_peft_reads_what_is_saved(tmp_path: Path) -> None:
    model = adapted_vit()
    scramble(model, 1, moved(model))
    loaded = PeftModel.from_pretrained(WRAPPED["subclass"](), save(model, tmp_path))
    found = snapshot(loaded)
    assert all(torch.equal(found[name], tensor) for name, tensor in snapshot(model).items() if name in moved(model))
