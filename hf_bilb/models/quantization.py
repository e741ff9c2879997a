"""Weights in 4 or 8 bits for a frozen model under LoRA, by transformers and bitsandbytes."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import torch
from transformers import BitsAndBytesConfig

from hf_bilb.errors import MissingPackageError, OptionError

Quantization = Literal["4bit", "8bit"]


def check_needs_lora(quantization: Quantization | None, lora: object) -> None:
    """Raise `OptionError` for quantised weights without adapters: they cannot be trained."""
    if quantization is not None and lora is None:
        raise OptionError(f"quantization: {quantization} weights cannot be trained, expected lora: {{}} with it")


def quantization_config(
    quantization: Quantization | None, path: str = "model.quantization"
) -> BitsAndBytesConfig | None:
    """What `from_pretrained` takes as `quantization_config`; None for none. Nothing is loaded here.

    4 bits are NF4 with quantised constants and products in bfloat16 (QLoRA: Dettmers et al., NeurIPS 2023, arXiv
    2305.14314); 8 bits are LLM.int8() (Dettmers et al., NeurIPS 2022, arXiv 2208.07339).

    Raises:
        OptionError: there is no CUDA GPU.
        MissingPackageError: bitsandbytes is not installed.
    """
    if quantization is None:
        return None
    if not torch.cuda.is_available():
        raise OptionError(f"{path}: {quantization} needs a CUDA GPU, and there is none; expected null")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingPackageError(
            f"{path}: {quantization} needs the package bitsandbytes, install it with: pip install bitsandbytes"
        )
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def loading_arguments(config: BitsAndBytesConfig | None) -> dict[str, Any]:
    """Of `from_pretrained`: quantised weights are made on the GPU that the process trains on."""
    return {} if config is None else {"quantization_config": config, "device_map": {"": torch.cuda.current_device()}}
