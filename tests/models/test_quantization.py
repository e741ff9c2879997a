"""Weights in 4 or 8 bits: what transformers is given, and what is refused before anything is loaded."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from hf_bilb.config.options import parse_options
from hf_bilb.errors import MissingPackageError, OptionError
from hf_bilb.models.causal_lm import CausalLmOptions, build_causal_lm
from hf_bilb.models.quantization import loading_arguments, quantization_config


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As if there were a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    return monkeypatch


def with_package(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    find = importlib.util.find_spec
    fake: Any = lambda name, *rest: (object() if there else None) if name == "bitsandbytes" else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", fake)


def test_what_transformers_is_given(gpu: pytest.MonkeyPatch) -> None:
    with_package(gpu, there=True)
    four, eight = quantization_config("4bit"), quantization_config("8bit")
    assert four is not None and eight is not None
    assert (four.load_in_4bit, four.load_in_8bit, four.bnb_4bit_quant_type) == (True, False, "nf4")
    assert four.bnb_4bit_use_double_quant and four.bnb_4bit_compute_dtype == torch.bfloat16
    assert (eight.load_in_4bit, eight.load_in_8bit) == (False, True)
    assert loading_arguments(four) == {"quantization_config": four, "device_map": {"": 1}}
    assert quantization_config(None) is None and loading_arguments(None) == {}


def test_a_package_that_is_missing_is_one_line(gpu: pytest.MonkeyPatch) -> None:
    with_package(gpu, there=False)
    message = r"^model\.quantization: 4bit needs the package bitsandbytes, install it with: pip install bitsandbytes$"
    with pytest.raises(MissingPackageError, match=message):
        quantization_config("4bit")


def test_a_language_model_refuses_it_without_lora_and_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(OptionError, match=r"^model\.quantization: 4bit weights cannot be trained, expected lora"):
        parse_options(CausalLmOptions, {"model": "nowhere", "quantization": "4bit"}, "model")
    with pytest.raises(OptionError, match=r"^model\.quantization: '2bit' is not valid, expected"):
        parse_options(CausalLmOptions, {"model": "nowhere", "quantization": "2bit"}, "model")
    options = parse_options(CausalLmOptions, {"model": "nowhere", "quantization": "8bit", "lora": {}}, "model")
    with pytest.raises(OptionError, match=r"^model\.quantization: 8bit needs a CUDA GPU, and there is none"):
        build_causal_lm(options, vocab_size=10, max_length=8, packed=False, special_tokens={})
