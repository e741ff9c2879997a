"""One pretrained image encoder, one logit per binary task.

    features = pool(encoder((pixel_values - mean) / std))
    logits   = heads(features)

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
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from hf_bilb.errors import OptionError
from hf_bilb.losses.contract import check_task_names
from hf_bilb.losses.masked import masked_bce_with_logits
from hf_bilb.models.base import check_choice, check_dropout
from hf_bilb.models.outputs import KEYS_TO_IGNORE_AT_INFERENCE, MultiTaskOutput
from hf_bilb.models.pretrained import (
    EncoderModel,
    as_encoder_config,
    check_normalization,
    load_encoder,
    normalization_of,
    normalized,
    pooler_argument,
    read_encoder_config,
    read_image_processor,
)
from hf_bilb.models.spec import ModelSpec

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
    """

    encoder: str
    pooling: Pooling = "mean"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_dropout(self.dropout)


class MultiTaskImageConfig(PretrainedConfig):
    """What `MultiTaskImageModel` is made of; it holds the encoder's whole config, so a saved model needs nothing else.

    Args:
        encoder_config: of the encoder, or a mapping with its `model_type`; None is ViT's default.
        num_features: length D of the pooled encoding.
        task_names: the K tasks.
        image_size: height and width of the images that it is trained on.
        image_mean, image_std: of each colour, that the encoder wants taken off and divided by; pixels are in [0, 1].
        pooling: `mean` or `pooler`.
        dropout: before the heads, in [0, 1).
        encoder_name: where the encoder's weights came from.
        kwargs: what `PretrainedConfig` takes.

    Raises:
        OptionError: names that are empty or stand twice, numbers that do not fit.
    """

    model_type = "image_encoder"
    sub_configs: ClassVar[dict[str, Any]] = {"encoder_config": AutoConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = list(KEYS_TO_IGNORE_AT_INFERENCE)

    def __init__(
        self,
        encoder_config: PretrainedConfig | Mapping[str, Any] | None = None,
        num_features: int = 768,
        task_names: Sequence[str] = ("task_0",),
        image_size: int = 224,
        image_mean: Sequence[float] = (0.0, 0.0, 0.0),
        image_std: Sequence[float] = (1.0, 1.0, 1.0),
        pooling: Pooling = "mean",
        dropout: float = MultiTaskImageOptions.dropout,
        encoder_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        check_choice("pooling", pooling, get_args(Pooling))
        check_dropout(dropout)
        check_normalization(image_mean, image_std)
        self.encoder_config = as_encoder_config(encoder_config, "vit")
        self.num_features = self.num_router_features = num_features
        self.task_names = list(check_task_names(task_names))
        self.image_size = image_size
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.pooling = pooling
        self.dropout = dropout
        self.encoder_name = encoder_name
        super().__init__(**kwargs)


class MultiTaskImageModel(EncoderModel):
    """Predicts K binary attributes of an image.

    Cost: one forward and one backward pass of the encoder whatever K is; heads and losses are vectorised.
    """

    config_class = MultiTaskImageConfig
    base_model_prefix = "image_encoder"
    main_input_name = "pixel_values"

    def __init__(self, config: MultiTaskImageConfig) -> None:
        super().__init__(config)
        encoder_config = config.encoder_config
        self.encoder = AutoModel.from_config(
            encoder_config, **pooler_argument(encoder_config, config.pooling == "pooler")
        )
        self.dropout = nn.Dropout(config.dropout)
        self.heads = nn.Linear(config.num_features, len(config.task_names))
        self.post_init()

    @classmethod
    def from_encoder(cls, encoder: str, path: str = "encoder", **arguments: Any) -> MultiTaskImageModel:
        """A model with the pretrained weights of `encoder` in float32, and fresh heads.

        Its image processor's mean and standard deviation are taken over where there is one; else pixels stay in [0, 1].

        Args:
            encoder: a name on the hub, a folder, or `package:<module>`.
            path: the option it stands in, for messages.
            arguments: `task_names`, `image_size`, `pooling` and `dropout` of `MultiTaskImageConfig`.

        Raises:
            OptionError: one line, when it cannot be loaded, is no image encoder, or does not take such images.
            MissingPackageError: its package is not installed.
        """
        folder, encoder_config = read_encoder_config(encoder, path)
        with_pooler = arguments["pooling"] == "pooler"
        pretrained = load_encoder(encoder, folder, encoder_config, path, with_pooler)
        if pretrained.main_input_name != "pixel_values":
            raise OptionError(f"{path}: {encoder!r} takes {pretrained.main_input_name}, expected an image encoder")
        config = MultiTaskImageConfig(
            encoder_config,
            num_features=_count_features(pretrained, encoder, arguments["pooling"], arguments["image_size"]),
            encoder_name=encoder,
            **_normalization(folder, encoder, arguments["image_size"]),
            **arguments,
        )
        model = cls(config)
        model.encoder.load_state_dict(pretrained.state_dict())
        return model

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, return_dict: bool | None = None
    ) -> MultiTaskOutput | tuple[Tensor, ...]:
        """Predictions, and with labels the loss of each task.

        Args:
            pixel_values: `[B, 3, H, W]` in [0, 1], RGB.
            labels: `[B, K]`, 0 or 1, NaN where missing; None for predictions alone.
            return_dict: False for a plain tuple of what is there; None follows the config.

        Returns:
            `MultiTaskOutput`: `logits [B, K]` (positive: the attribute is there), and with labels the binary
            cross-entropies `losses [K]`, `num_items [K]` and `router_features [B, D]`, the pooled encoding.
        """
        normal = normalized(pixel_values, self.config.image_mean, self.config.image_std)
        features = _pool(self.encoder(pixel_values=normal), self.config.pooling)
        logits = self.heads(self.dropout(features))
        losses = None if labels is None else masked_bce_with_logits(logits, labels)
        return self._output(logits, losses, features, return_dict)


def _pool(output: ModelOutput, pooling: Pooling) -> Tensor:
    """`[B, D]` from what an encoder returns: hidden states `[B, T, D]` or `[B, D, H, W]`, pooled `[B, D(, 1, 1)]`."""
    if pooling == "pooler":
        return output["pooler_output"].flatten(1)
    hidden = output["last_hidden_state"]
    return hidden.mean(dim=(2, 3)) if hidden.dim() == 4 else hidden.mean(dim=1)


def build_multi_task_image(
    options: MultiTaskImageOptions, *, task_names: Sequence[str], image_size: int
) -> MultiTaskImageModel:
    """The model of a recipe.

    Args:
        options: the recipe's.
        task_names: the K tasks, from the data.
        image_size: height and width of the data's images.

    Raises:
        OptionError: an encoder that cannot be loaded or does not fit the data.
        MissingPackageError: its package is not installed.
    """
    return MultiTaskImageModel.from_encoder(
        options.encoder,
        path="model.encoder",
        task_names=task_names,
        image_size=image_size,
        pooling=options.pooling,
        dropout=options.dropout,
    )


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
