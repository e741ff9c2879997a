"""Tiny models of many families, and modules of one's own, whose weights are saved and loaded again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from peft import LoraConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn

from hf_bilb.losses.task_types import TaskType
from hf_bilb.models.dense.backbone import DenseBackboneConfig, DenseBackboneModel
from hf_bilb.models.image_encoder import MultiTaskImageConfig, MultiTaskImageModel
from hf_bilb.models.text_encoder import MultiTaskTextConfig, MultiTaskTextModel

Builder = Callable[[], nn.Module]

TEXT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40}
DECODER = {**TEXT, "num_key_value_heads": 1, "max_position_embeddings": 32, "head_dim": 8}
EXPERTS = {**DECODER, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
IMAGE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
VIT = {**IMAGE, "intermediate_size": 24, "num_labels": 3}
SWIN = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "image_size": 16, "patch_size": 4, "window_size": 2}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
CONVNEXT = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}
STAGES = {"out_features": ["stage1", "stage2"]}
BART = {
    **{f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in (("layers", 1), ("ffn_dim", 24))},
    **{"d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 40},
    "max_position_embeddings": 32,
}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 40}
MARIAN = {**BART, "pad_token_id": 0, "decoder_start_token_id": 0}
MODERNBERT = {**TEXT, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}


def family(model_class: Any, config_class: Any, **sizes: Any) -> Builder:
    return lambda: model_class(config_class(**sizes))


#: By kind; those marked * transformers saves under other names or in other shapes than the module has.
FAMILIES: dict[str, Builder] = {
    "image/vit*": family(hf.ViTForImageClassification, hf.ViTConfig, **VIT),
    "image/deit*": family(hf.DeiTForImageClassification, hf.DeiTConfig, **VIT),
    "image/dinov2*": family(hf.Dinov2ForImageClassification, hf.Dinov2Config, **IMAGE),
    "image/swin*": family(hf.SwinForImageClassification, hf.SwinConfig, **SWIN),
    "image/beit*": family(hf.BeitForImageClassification, hf.BeitConfig, **VIT),
    "image/resnet": family(hf.ResNetForImageClassification, hf.ResNetConfig, **RESNET),
    "image/convnext": family(hf.ConvNextForImageClassification, hf.ConvNextConfig, **CONVNEXT),
    "text/bert": family(hf.BertForSequenceClassification, hf.BertConfig, **TEXT),
    "text/bert_tied": family(hf.BertForMaskedLM, hf.BertConfig, **TEXT),
    "text/roberta": family(hf.RobertaForSequenceClassification, hf.RobertaConfig, **TEXT),
    "text/modernbert": family(hf.ModernBertForSequenceClassification, hf.ModernBertConfig, **MODERNBERT),
    "causal/gpt2_tied": family(hf.GPT2LMHeadModel, hf.GPT2Config, n_embd=16, n_layer=2, n_head=2, vocab_size=40),
    "causal/llama": family(hf.LlamaForCausalLM, hf.LlamaConfig, **DECODER),
    "experts/mixtral*": family(hf.MixtralForCausalLM, hf.MixtralConfig, **DECODER, num_local_experts=3),
    "experts/qwen3*": family(hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig, **EXPERTS),
    "seq2seq/t5_tied": family(hf.T5ForConditionalGeneration, hf.T5Config, **T5),
    "seq2seq/bart_tied": family(hf.BartForConditionalGeneration, hf.BartConfig, **BART),
    "seq2seq/marian_constants": family(hf.MarianMTModel, hf.MarianConfig, **MARIAN),
    "backbone/resnet": family(hf.ResNetBackbone, hf.ResNetConfig, **RESNET, **STAGES),
    "backbone/swin*": family(hf.SwinBackbone, hf.SwinConfig, **SWIN, **STAGES),
    "backbone/pixio*": family(hf.PixioBackbone, hf.PixioConfig, **IMAGE, **STAGES),
    "backbone/dinov2*": family(hf.Dinov2Backbone, hf.Dinov2Config, **IMAGE, **STAGES),
    "two_in_one/clip": lambda: hf.CLIPModel(hf.CLIPConfig(text_config=TEXT, vision_config=VIT, projection_dim=8)),
}


def compiled(model: nn.Module) -> nn.Module:
    """Wrapped and renamed as always, without the minutes of making kernels."""
    return torch.compile(model, backend="eager")


# --- around a model of transformers -------------------------------------------------------------------------------


class TwoHeads(hf.ViTPreTrainedModel):
    """What people write: a subclass with heads of their own."""

    def __init__(self, config: hf.ViTConfig) -> None:
        super().__init__(config)
        self.vit = hf.ViTModel(config, add_pooling_layer=False)
        self.heads = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return {"logits": self.heads(self.vit(pixel_values).last_hidden_state[:, 0])}


class Around(nn.Module):
    """A plain module around another one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.heads = nn.Linear(16, 2)


NUMBERS = {"a": TaskType("regression"), "b": TaskType("regression")}
CLASSES = {"a": TaskType("classification", 2), "b": TaskType("classification", 3)}


def image_encoder() -> nn.Module:
    return MultiTaskImageModel(MultiTaskImageConfig(hf.ViTConfig(**VIT), 16, NUMBERS, image_size=16))


def text_encoder() -> nn.Module:
    return MultiTaskTextModel(MultiTaskTextConfig(hf.BertConfig(**TEXT), CLASSES))


def dense_backbone() -> nn.Module:
    config = hf.Dinov2Config(**IMAGE, out_features=["stage1", "stage2"])
    return DenseBackboneModel(DenseBackboneConfig(config, ["segmentation", "depth"], num_classes=3, decoder_size=8))


def compiled_encoder() -> nn.Module:
    model = TwoHeads(hf.ViTConfig(**VIT))
    model.vit = compiled(model.vit)
    return model


WRAPPED: dict[str, Builder] = {
    "subclass": lambda: TwoHeads(hf.ViTConfig(**VIT)),
    "image_encoder": image_encoder,
    "text_encoder": text_encoder,
    "dense_backbone": dense_backbone,
    "module_around_vit": lambda: Around(FAMILIES["image/vit*"]()),
    "module_around_experts": lambda: Around(FAMILIES["experts/mixtral*"]()),
    "module_around_tied": lambda: Around(FAMILIES["seq2seq/t5_tied"]()),
    "compiled_vit": lambda: compiled(FAMILIES["image/vit*"]()),
    "compiled_module": lambda: compiled(Around(FAMILIES["image/vit*"]())),
    "compiled_part": compiled_encoder,
    "compiled_part_of_module": lambda: Around(compiled(FAMILIES["experts/mixtral*"]())),
}


# --- shared memory ------------------------------------------------------------------------------------------------


class Branch(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(16, 1)

    def forward(self, features: Tensor) -> Tensor:
        return self.head(self.encoder(features).relu())


class Branches(nn.Module):
    """A sub-model for each task; all have the same encoder."""

    def __init__(self, num_features: int = 8, num_tasks: int = 2) -> None:
        super().__init__()
        encoder = nn.Linear(num_features, 16)
        self.tasks = nn.ModuleDict({f"task_{k}": Branch(encoder) for k in range(num_tasks)})

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        return {"logits": torch.cat([branch(features) for branch in self.tasks.values()], 1)}


class OneParameter(nn.Module):
    """Two layers with one parameter, one with its transpose, and two windows on one buffer that overlap."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))
        self.b.weight = self.a.weight
        self.c.weight = nn.Parameter(self.a.weight.detach().t())
        memory = torch.arange(10.0)
        self.register_buffer("first", memory[:6])
        self.register_buffer("second", memory[4:])
        self.convolution = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)


class SharedHeads(hf.ViTPreTrainedModel):
    """Layers that a model of transformers shares without saying so in `_tied_weights_keys`."""

    def __init__(self, config: hf.ViTConfig) -> None:
        super().__init__(config)
        self.vit = hf.ViTModel(config, add_pooling_layer=False)
        neck = nn.Linear(config.hidden_size, config.hidden_size)
        self.heads = nn.ModuleList(nn.Sequential(neck, nn.Linear(config.hidden_size, 1)) for _ in range(2))
        self.post_init()


SHARED: dict[str, Builder] = {
    "branches": Branches,
    "one_parameter": OneParameter,
    "heads": lambda: SharedHeads(hf.ViTConfig(**VIT)),
}


# --- adapters -----------------------------------------------------------------------------------------------------


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(r=2, **settings)


def adapted_vit() -> nn.Module:
    config = lora(target_modules=["q_proj", "v_proj"], modules_to_save=["heads"])
    return get_peft_model(TwoHeads(hf.ViTConfig(**VIT)), config)


def two_adapters() -> nn.Module:
    model = adapted_vit()
    model.add_adapter("second", lora(target_modules=["q_proj"]))
    model.set_adapter("second")
    return model


def unfrozen_beside() -> nn.Module:
    model = adapted_vit()
    model.base_model.model.vit.layernorm.weight.requires_grad_(True)
    return model


def adapted_resnet() -> nn.Module:
    model = hf.ResNetForImageClassification(hf.ResNetConfig(**RESNET))
    return get_peft_model(model, lora(target_modules=["convolution"]))


def adapted_in_place() -> nn.Module:
    model = FAMILIES["causal/llama"]()
    model.add_adapter(lora(target_modules=["q_proj"]))
    return model


def with_prompt(config: Any) -> nn.Module:
    return get_peft_model(FAMILIES["causal/llama"](), config)


ADAPTED: dict[str, Builder] = {
    "vit": adapted_vit,
    "two_adapters": two_adapters,
    "unfrozen_beside": unfrozen_beside,
    "running_statistics": adapted_resnet,
    "in_place": adapted_in_place,
    "compiled": lambda: compiled(adapted_vit()),
    "experts": lambda: get_peft_model(FAMILIES["experts/mixtral*"](), lora(target_modules=["q_proj"])),
    "prompt": lambda: with_prompt(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    "computed_prompt": lambda: with_prompt(PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
}
