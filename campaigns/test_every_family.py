"""Weights of every architecture in transformers' auto classes: saved by the trainer, then loaded as a resume does.

    python -m pytest campaigns/test_every_family.py                everything, and the report
    python -m pytest campaigns/test_every_family.py -k mixtral     the models of one architecture, without a report

Each model is made small and gets random values; after it is saved it gets others, and is then restored. A model that
cannot be made small by the usual names of sizes is counted as not built.
"""

from __future__ import annotations

import os
import platform
import re
from collections import Counter
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel, TrainingArguments
from transformers.models.auto import modeling_auto

from hf_bilb.storage.tensor_files import read_tensors, same_bits, weight_files
from hf_bilb.trainer.weights_trainer import RestoringTrainer

REPORT = Path(__file__).with_name("every_family.md")
MOST_PARAMETERS = 20_000_000
#: Sizes by their usual names; a config gets those that are smaller than its own.
SIZES = {
    **dict.fromkeys("num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers depth".split(), 2),
    **dict.fromkeys("num_encoder_layers num_decoder_layers num_blocks".split(), 2),
    **dict.fromkeys("num_attention_heads num_heads n_head n_heads num_key_value_heads".split(), 2),
    **dict.fromkeys("encoder_attention_heads decoder_attention_heads num_experts_per_tok moe_topk".split(), 2),
    **dict.fromkeys("hidden_size d_model dim n_embd embedding_size projection_dim encoder_hidden_size".split(), 32),
    **dict.fromkeys("intermediate_size hidden_dim d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim".split(), 32),
    **dict.fromkeys("moe_intermediate_size shared_expert_intermediate_size image_size".split(), 32),
    **dict.fromkeys("num_local_experts num_experts n_routed_experts moe_num_experts".split(), 4),
    **{"head_dim": 16, "vocab_size": 99, "max_position_embeddings": 64, "patch_size": 8},
}


def make_small(config: PretrainedConfig) -> None:
    """Set the sizes of `config` and of its parts; lists with an entry for each layer are cut, tokens stay in reach."""
    layers = vars(config).get("num_hidden_layers")
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            make_small(value)
        elif isinstance(value, int) and not isinstance(value, bool) and value > SIZES.get(name, value):
            setattr(config, name, SIZES[name])
        elif name.endswith("_token_id") and isinstance(value, int) and value >= SIZES["vocab_size"]:
            setattr(config, name, 1)
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == layers:
            setattr(config, name, value[: config.num_hidden_layers])


def model_classes() -> dict[str, str]:
    """Name of each class of a model in the auto classes, with its architecture."""
    tables = [name for name in dir(modeling_auto) if re.fullmatch(r"MODEL_.*MAPPING_NAMES", name)]
    found: dict[str, str] = {}
    for table in tables:
        for architecture, names in getattr(modeling_auto, table).items():
            for name in (names,) if isinstance(names, str) else names:
                found.setdefault(name, architecture)
    return dict(sorted(found.items()))


CLASSES = model_classes()


def build(name: str, folder: Path) -> PreTrainedModel:
    """A small model of the class `name`; skips the test where there is none."""
    try:
        model_class: Any = getattr(transformers, name)
        config = CONFIG_MAPPING[CLASSES[name]]()
        make_small(config)
        config = config if isinstance(config, model_class.config_class) else model_class.config_class()
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in model_class(config).parameters())
        if size <= MOST_PARAMETERS:
            config.save_pretrained(folder)  # validates it
            return model_class(config)
    except Exception as error:  # packages that are missing, sizes that do not go together
        pytest.skip(f"not built: {type(error).__name__}")
    pytest.skip("too large")


def scramble(model: PreTrainedModel, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    constant = set(model._keys_to_ignore_on_save or ())
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name not in constant and tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=random))


@pytest.fixture(scope="module")
def counts() -> Iterator[Counter[str]]:
    found: Counter[str] = Counter()
    transformers.logging.disable_progress_bar()
    yield found
    if found["asked"] == len(CLASSES):
        REPORT.write_text(report(found), encoding="utf-8")


@pytest.mark.parametrize("name", CLASSES)
def test_every_tensor_comes_back(name: str, counts: Counter[str], tmp_path: Path) -> None:
    counts["asked"] += 1
    model = build(name, tmp_path)
    counts["built"] += 1
    trainer = RestoringTrainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    scramble(model, 1)
    wanted = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    folder = str(tmp_path / "checkpoint-1")
    trainer.save_model(folder)
    counts["renamed"] += not read_tensors(weight_files(folder)).keys() <= wanted.keys()
    scramble(model, 2)
    trainer._load_from_checkpoint(folder)
    wrong = [key for key, tensor in model.state_dict().items() if not same_bits(tensor, wanted[key])]
    counts["restored"] += not wrong
    assert wrong == []


def report(counts: Counter[str]) -> str:
    command = "python -m pytest campaigns/test_every_family.py"
    return f"""# Weights of every architecture

{date.today()}; {os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, torch \
{torch.__version__}, transformers {transformers.__version__}.
Command: `{command}`.

transformers' auto classes name {counts["asked"]} classes of models. {counts["built"]} of them could be made small here
and were saved by the trainer, filled with other values, and restored as a resume does; transformers saves
{counts["renamed"]} of these under other names, or in other shapes, than the module has.
The others need a package that is not installed, have more than 20 million parameters even so, or cannot be built from
sizes set by their usual names.

Restored to the bit, every tensor: {counts["restored"]} of {counts["built"]}.
"""
