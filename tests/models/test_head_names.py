"""Tasks are often named after columns, with signs that transformers takes for patterns when it loads weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hf_bilb.losses.task_types import TaskType
from hf_bilb.models import MODELS


@pytest.mark.parametrize("name", ["price (EUR)", "a|*x*", "C++", "ok?", "x[0]", "50 %", "^y$", "plain_name"])
def test_a_model_loads_whatever_its_tasks_are_called(name: str, tmp_path: Path) -> None:
    spec = MODELS["tabular_mlp"]
    data = {"numeric_names": ["a"], "numeric_means": [0.0], "numeric_stds": [1.0], "categories": {}}
    tasks = {name: TaskType("regression"), "other": TaskType("classification", 3)}
    model = spec.model_class(spec.config_class(hidden_sizes=[4], tasks=tasks, **data))
    model.save_pretrained(tmp_path)
    loaded = spec.model_class.from_pretrained(tmp_path)
    assert list(loaded.config.task_types) == [name, "other"]
    saved, found = model.state_dict(), loaded.state_dict()
    assert saved.keys() == found.keys() and all(torch.equal(saved[key], found[key]) for key in saved)
