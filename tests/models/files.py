"""What is saved of a model is what is loaded again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PreTrainedModel


def saved_and_loaded(model: PreTrainedModel, folder: Path, config_keys: Sequence[str] = ()) -> tuple[Any, ...]:
    """Save the model, in evaluation mode, and load it by `AutoModel` and by its own class.

    Asserts that both are of its class and have its weights bit for bit, and that the config is of its class and has
    its values of `config_keys`.
    """
    model.eval().save_pretrained(folder)
    expected = model.state_dict()
    found = tuple(auto.from_pretrained(folder, dtype="auto") for auto in (AutoModel, type(model)))
    for loaded in found:
        assert type(loaded) is type(model)
        weights = loaded.state_dict()
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is type(model.config)
    for key in config_keys:
        assert getattr(config, key) == getattr(model.config, key), key
    return found
