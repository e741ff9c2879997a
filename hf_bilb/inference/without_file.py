"""Models that were saved without `hf_bilb.json`, by a Trainer of one's own: what their config tells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hf_bilb.config.registry import MODELS, WITHOUT_CONFIG
from hf_bilb.data.inputs.format import DataFormat
from hf_bilb.data.inputs.kinds import ImageInputs, InputKind, NoInputs, PixelInputs, TableInputs, TextInputs
from hf_bilb.errors import CheckpointError
from hf_bilb.inference.saved import FILE, SavedModel


def described_by_config(folder: Path) -> SavedModel:
    """Tasks and inputs by the config; texts are the columns `text` and `text_pair`, an image is `image`.

    Raises:
        CheckpointError: no config, or that of no model of this package.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder}: has neither {FILE} nor config.json, so nobody knows what its weights are")
    try:
        name = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: is damaged: {error}") from None
    if name not in MODELS or name in WITHOUT_CONFIG:
        raise CheckpointError(f"{folder}: has no {FILE}, and model_type {name!r} is no model of hf_bilb")
    config = MODELS[name].config_class.from_pretrained(folder)
    return SavedModel(name, "", DataFormat(_inputs(config), getattr(config, "task_types", {})))


def _inputs(config: Any) -> InputKind:
    if config.model_type == "multi_task_text":
        positions = getattr(config.encoder_config, "max_position_embeddings", None) or 512
        return TextInputs((("text",), ("text", "text_pair")), min(positions, 512))
    if config.model_type in ("image_encoder", "celeba_cnn"):
        return ImageInputs("image", config.image_size)
    if config.model_type == "dense_backbone" and config.tasks and config.image_size and config.dense_tasks:
        return PixelInputs("image", config.image_size)
    if config.model_type == "tabular_mlp":
        size = len(config.numeric_names)
        return TableInputs(
            tuple(config.numeric_names),
            tuple(config.numeric_means or (0.0,) * size),
            tuple(config.numeric_stds or (1.0,) * size),
            tuple(config.categorical_names),
            tuple(tuple(config.categories[name]) for name in config.categorical_names),
        )
    return NoInputs(f"the folder has no {FILE}, which says how rows become inputs")
