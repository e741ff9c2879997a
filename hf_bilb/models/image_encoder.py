"""One pretrained image encoder, one linear head per task of any type, whole or with LoRA.

    features = pool(encoder((pixel_values - mean) / std))
    task:      head_<task>(dropout(features))

Any image model of `AutoModel` will do (ViT, ResNet, ConvNeXt, Swin, ...). Pixels come in [0, 1], as
`hf_bilb.data.images.rows` serves them; the mean and standard deviation of the encoder's image processor are in the
config, and applied in here.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from hf_bilb.errors import OptionError
from hf_bilb.losses.task_types import ROW_TYPES, TaskType
from hf_bilb.models.base import check_choice, check_dropout
from hf_bilb.models.lora import LoraOptions, add_encoder_lora
from hf_bilb.models.outputs import KEYS_TO_IGNORE_AT_INFERENCE, MultiTaskOutput
from hf_bilb.models.pretrained import (
    EncoderModel,
    as_encoder_config,
    check_normalization,
    load_encoder,
    normalization_of,
    normalized,
    pooler_argument,
    read_image_processor,
    take_encoder,
)
from hf_bilb.models.quantization import Quantization, check_needs_lora, quantization_config
from hf_bilb.models.spec import ModelSpec
from hf_bilb.models.tasks import Tasks, TasksConfig
from hf_bilb.models.typed_tasks import TypedTasksModel

logger = logging.getLogger(__name__)

Pooling = Literal["mean", "pooler"]


@dataclass(frozen=True)
class MultiTaskImageOptions:
    """What a recipe's `model:` section may set.

    Attributes:
        encoder: a name on the hub (`google/vit-base-patch16-224-in21k`, `microsoft/resnet-50`), a folder, or
            `package:<module>` for an installed package with a model in it.
        pooling: `mean` over the positions of the encoder's last hidden state (patches, tokens, or height and width), or
            `pooler`, the encoder's own pooled output.
        dropout: before the heads, in [0, 1).
        lora: options of LoRA, with which only the adapters and the heads are trained; null = everything is. For most
            image models `target_modules` has to name the layers; without it an error lists them.
        quantization: `4bit` or `8bit`, of the encoder's weights under LoRA; needs a CUDA GPU and bitsandbytes.
    """

    encoder: str
    pooling: Pooling = "mean"
    dropout: float = 0.0
    lora: LoraOptions | None = None
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        check_dropout(self.dropout)
        check_needs_lora(self.quantization, self.lora)


class MultiTaskImageConfig(TasksConfig):
    """What `MultiTaskImageModel` is made of; it holds the encoder's whole config, so a saved model needs nothing else.

    Args:
        encoder_config: of the encoder, or a mapping with its `model_type`; None is ViT's default.
        num_features: length D of the pooled encoding.
        tasks: name -> type (`hf_bilb.losses.task_types`), or that as a dict, of rows; None: one binary one, `task_0`.
        image_size: height and width of the images that it is trained on.
        image_mean, image_std: of each colour, that the encoder wants taken off and divided by; pixels are in [0, 1].
        pooling: `mean` or `pooler`.
        dropout: before the heads, in [0, 1).
        encoder_name: where the encoder's weights came from; with LoRA they are not saved, and come from there again.
        quantization: that they were loaded with.
        task_names: the order of `tasks`, where a file has lost it; None: as they stand.
        kwargs: what `PretrainedConfig` takes.

    Raises:
        OptionError: tasks with names that are empty or hold a dot, or of types that it does not have; numbers that do
            not fit.
    """

    model_type = "image_encoder"
    sub_configs: ClassVar[dict[str, Any]] = {"encoder_config": AutoConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = list(KEYS_TO_IGNORE_AT_INFERENCE)
    supported_types: ClassVar[tuple[str, ...]] = ROW_TYPES

    def __init__(
        self,
        encoder_config: PretrainedConfig | Mapping[str, Any] | None = None,
        num_features: int = 768,
        tasks: Tasks | None = None,
        image_size: int = 224,
        image_mean: Sequence[float] = (0.0, 0.0, 0.0),
        image_std: Sequence[float] = (1.0, 1.0, 1.0),
        pooling: Pooling = "mean",
        dropout: float = MultiTaskImageOptions.dropout,
        encoder_name: str | None = None,
        quantization: Quantization | None = None,
        task_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        check_choice("pooling", pooling, get_args(Pooling))
        check_dropout(dropout)
        check_normalization(image_mean, image_std)
        self.encoder_config = as_encoder_config(encoder_config, "vit")
        self.num_features = self.num_router_features = num_features
        self.set_tasks({"task_0": TaskType("multi_label")} if tasks is None else tasks, task_names)
        self.image_size = image_size
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.pooling = pooling
        self.dropout = dropout
        self.encoder_name = encoder_name
        self.quantization = quantization
        super().__init__(**kwargs)


class MultiTaskImageModel(EncoderModel, TypedTasksModel):
    """Predicts numbers, classes and labels of images.

    Cost: one forward and one backward pass of the encoder whatever K is; heads and losses are vectorised.
    """

    config_class = MultiTaskImageConfig
    base_model_prefix = "image_encoder"
    main_input_name = "pixel_values"
    encoder_arguments = ("tasks", "task_names", "image_size", "pooling", "dropout")

    def __init__(self, config: MultiTaskImageConfig) -> None:
        super().__init__(config)
        encoder_config = config.encoder_config
        self.encoder = AutoModel.from_config(
            encoder_config, **pooler_argument(encoder_config, config.pooling == "pooler")
        )
        self._add_heads(config.task_types, config.num_features, config.dropout)
        self.post_init()

    @classmethod
    def from_encoder(
        cls, encoder: str, path: str = "encoder", quantization: Quantization | None = None, **arguments: Any
    ) -> MultiTaskImageModel:
        """A model with the pretrained weights of `encoder` in float32, and fresh heads.

        Its image processor's mean and standard deviation are taken over where there is one; else pixels stay in [0, 1].

        Args:
            encoder: a name on the hub, a folder, or `package:<module>`.
            path: the option it stands in, for messages.
            quantization: of its weights.
            arguments: `tasks`, `image_size`, `pooling` and `dropout` of `MultiTaskImageConfig`.

        Raises:
            OptionError: one line, when it cannot be loaded, is no image encoder, does not take such images, or cannot
                be quantised here.
            MissingPackageError: its package, or bitsandbytes, is not installed.
        """
        quantized = quantization_config(quantization)
        folder, encoder_config = cls.read_encoder(encoder, path)
        with_pooler = arguments["pooling"] == "pooler"
        pretrained = load_encoder(encoder, folder, encoder_config, path, with_pooler, quantized)
        config = MultiTaskImageConfig(
            encoder_config,
            num_features=_count_features(pretrained, encoder, arguments["pooling"], arguments["image_size"]),
            encoder_name=encoder,
            quantization=quantization,
            **_normalization(folder, encoder, arguments["image_size"]),
            **arguments,
        )
        model = cls(config)
        take_encoder(model, pretrained, quantized is not None)
        return model

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, return_dict: bool | None = None
    ) -> MultiTaskOutput | tuple[Tensor, ...]:
        """Predictions, and with labels the loss of each task.

        Args:
            pixel_values: `[B, 3, H, W]` in [0, 1], RGB.
            labels: `[B, W]`, NaN where missing (`hf_bilb.losses.task_types`); None for predictions alone.
            return_dict: False for a plain tuple of what is there; None follows the config.

        Returns:
            `MultiTaskOutput`: `logits [B, K]` where every task has one output, else a tuple with one tensor per task:
            `[B, D]` numbers, `[B, C]` or `[B, M]` logits. With labels also `losses [K]` and `num_items [K]`
            (`hf_bilb.losses.mixed`), and `router_features [B, D]`, the pooled encoding.
        """
        normal = normalized(pixel_values, self.config.image_mean, self.config.image_std)
        features = _pool(self.encoder(pixel_values=normal), self.config.pooling)
        return self._heads_output(features, labels, return_dict)


def _pool(output: ModelOutput, pooling: Pooling) -> Tensor:
    """`[B, D]` from what an encoder returns: hidden states `[B, T, D]` or `[B, D, H, W]`, pooled `[B, D(, 1, 1)]`."""
    if pooling == "pooler":
        return output["pooler_output"].flatten(1)
    hidden = output["last_hidden_state"]
    return hidden.mean(dim=(2, 3)) if hidden.dim() == 4 else hidden.mean(dim=1)


def build_multi_task_image(
    options: MultiTaskImageOptions, *, tasks: Tasks, image_size: int
) -> MultiTaskImageModel | PeftModel:
    """The model of a recipe.

    Args:
        options: the recipe's.
        tasks: name -> type, from the data.
        image_size: height and width of the data's images.

    Raises:
        OptionError: an encoder that cannot be loaded or does not fit the data; layers for LoRA that it does not have;
            quantised weights without a GPU.
        MissingPackageError: its package, or bitsandbytes, is not installed.
    """
    model = MultiTaskImageModel.from_encoder(
        options.encoder,
        path="model.encoder",
        quantization=options.quantization,
        tasks=tasks,
        image_size=image_size,
        pooling=options.pooling,
        dropout=options.dropout,
    )
    return model if options.lora is None else add_encoder_lora(model, options.lora)


# --- the pretrained encoder ---------------------------------------------------------------------------------------


def _count_features(encoder: PreTrainedModel, name: str, pooling: Pooling, image_size: int) -> int:
    """Length of the pooled encoding, from one image: configs name it differently, and some encoders take one size."""
    images = torch.zeros(1, 3, image_size, image_size)
    try:
        with torch.no_grad():
            output = encoder.eval()(pixel_values=images)
    except (ValueError, RuntimeError) as error:
        text = " ".join(str(error).split())
        raise OptionError(
            f"data.image_size: {image_size} is not valid for model.encoder {name!r}{_expected_size(encoder)}: {text}"
        ) from None
    wanted = "pooler_output" if pooling == "pooler" else "last_hidden_state"
    if output.get(wanted) is None:
        raise OptionError(f"model.pooling: {pooling!r} needs {wanted}, which {name!r} does not return")
    return _pool(output, pooling).shape[1]


def _expected_size(encoder: PreTrainedModel) -> str:
    size = encoder.config.to_dict().get("image_size")
    return "" if size is None else f", expected {size}"


def _normalization(folder: str, name: str, image_size: int) -> dict[str, Any]:
    """The config's `image_mean` and `image_std`, from the encoder's image processor; says so when sizes differ."""
    processor = read_image_processor(folder)
    if processor is None:
        logger.warning("model.encoder: %r has no image processor: its pixels stay in [0, 1]", name)
        return {}
    size = processor.get("size")
    sizes = set(size.values()) if isinstance(size, Mapping) else {size}
    if size is not None and sizes != {image_size}:
        logger.warning("model.encoder: %r was made for images of %s, data.image_size is %d", name, size, image_size)
    return normalization_of(processor)


SPEC = ModelSpec(MultiTaskImageConfig, MultiTaskImageModel, options=MultiTaskImageOptions, build=build_multi_task_image)
