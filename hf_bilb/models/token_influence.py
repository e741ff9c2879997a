"""What a language model's logits depend on, tried on the model at hand before training starts.

Two kinds of model train without an error on something else than what was asked for: an encoder sees the tokens that it
is to predict, and many an architecture mixes examples that are packed into one row. Neither is told by a model's class
or options, so a row of a few tokens goes through the model, and the gradient of its logits with respect to the
embeddings of its tokens says which of them had an influence. What is masked has weight 0, and its gradient is exactly
0 in any dtype; values would differ in the last bits where experts take the tokens of a row together.

FlashAttention, which needs a GPU, is stood in for by an attention that does what it does with position ids, so what is
tried is whether they reach it, and what the rest of the model (convolutions, recurrent states, positions) does.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import flash_attention_mask

from hf_bilb.errors import OptionError

logger = logging.getLogger(__name__)

_STAND_IN = "hf_bilb_stand_in"  # of a name with "flash" in it transformers would look for a kernel
# Of the logits of an example that is packed to those of the same one alone. Rounding in bfloat16 makes a hundredth,
# positions that are counted on make them different ones.
_TOLERANCE = 0.05
# Their causal mask is a buffer: a packed row, as long as a batch, would fail in the first step. A trial of that length
# could take minutes.
_MASK_OF_FIXED_SIZE = ("gpt_neo",)


def check_causal(model: PreTrainedModel) -> None:
    """Try that logits depend on no later token, and that the model has no loss of its own that would be left out.

    A model that cannot be tried where it is (on a CPU, say) is let through with a warning.

    Raises:
        OptionError: one of the two.

    Cost: a forward and a backward pass of four tokens.
    """
    try:
        found = _try(model, [1, 2, 3, 4], [0, 1, 2, 3], slice(0, 2))
    except Exception as error:  # whatever the code of an architecture raises
        logger.warning("%s: could not be tried before training: %s", model.config.model_type, _one_line(error))
        return
    if any(found.influence[2:]):
        raise OptionError(
            f"model: {model.config.model_type!r} sees the tokens that it is to predict, expected a causal language "
            "model (of an encoder: its config with is_decoder: true)"
        )
    if found.own_loss:
        raise OptionError(
            f"model: {model.config.model_type!r} has a loss for its experts, which would be left out, expected a "
            "config with output_router_logits: false"
        )


def check_packing(model: PreTrainedModel) -> None:
    """Try that an example in a packed row has the logits that it has alone.

    `transformers` finds the examples by position ids that start again (as for its `DataCollatorWithFlattening`):
    FlashAttention runs them as separate sequences, the others mask them block by block.

    Raises:
        OptionError: the model does not, cannot be tried, or takes no row longer than its positions.

    Cost: two forward passes and a backward pass of five tokens.
    """
    kind, attention = model.config.model_type, getattr(model.config, "_attn_implementation", None)
    where = f"data.packed: {kind!r} with attention {attention!r}"
    if kind in _MASK_OF_FIXED_SIZE:
        positions = model.config.max_position_embeddings
        raise OptionError(f"{where} takes no row of more than {positions} tokens, expected packed: false")
    try:
        packed = _try(model, [1, 1, 1, 3, 4], [0, 1, 2, 0, 1], slice(3, 5))
        alone = _try(model, [3, 4], [0, 1], slice(0, 2))
    except Exception as error:  # whatever the code of an architecture raises
        raise OptionError(f"{where} cannot be tried with a packed row: {_one_line(error)}") from None
    if any(packed.influence[:3]):
        raise OptionError(f"{where} lets packed examples see each other, expected packed: false")
    if not (packed.logits - alone.logits).norm() <= _TOLERANCE * alone.logits.norm():
        raise OptionError(f"{where} counts positions on from one packed example to the next, expected packed: false")


@dataclass(frozen=True)
class _Trial:
    """Of one row: the logits asked for `[n, V]` in float32, whether each token's embedding had an influence on them,
    and whether the model returned a loss of its own."""

    logits: Tensor
    influence: list[bool]
    own_loss: bool


def _try(model: PreTrainedModel, tokens: list[int], positions: list[int], at: slice) -> _Trial:
    embeddings: list[Tensor] = []

    def watch(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        embeddings.append(output.detach().requires_grad_())
        return embeddings[-1].clone()  # some models scale it in place

    embedding = model.get_input_embeddings()
    device, training = embedding.weight.device, model.training
    handle = embedding.register_forward_hook(watch)
    try:
        with torch.enable_grad(), _without_flash(model):
            outputs = model.eval()(
                input_ids=torch.tensor([tokens], device=device),
                position_ids=torch.tensor([positions], device=device),
                use_cache=False,
            )
            logits = outputs.logits[0, at].float()
            (gradient,) = torch.autograd.grad(logits.sum(), embeddings[0])
    finally:
        handle.remove()
        model.train(training)
    # [1, T, D], or of some models [T, 1, D]
    influence = gradient.reshape(len(tokens), -1).ne(0).any(dim=1).tolist()
    return _Trial(logits.detach(), influence, outputs.get("aux_loss") is not None)


@contextmanager
def _without_flash(model: PreTrainedModel) -> Iterator[None]:
    """With FlashAttention's stand-in, where the model has FlashAttention."""
    attention = getattr(model.config, "_attn_implementation", None)
    if "flash" not in str(attention):
        yield
        return
    model.set_attn_implementation(_STAND_IN)
    try:
        yield
    finally:
        model.set_attn_implementation(attention)


def _flash_stand_in(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    position_ids: Tensor | None = None,
    is_causal: bool | None = None,
    **_: Any,  # as transformers calls it
) -> tuple[Tensor, None]:
    """`query [1, H, T, D]`, `key` and `value` to `[1, T, H, D]`: each example of a row by itself, as FlashAttention
    does where the position ids reach it."""
    num_tokens = query.shape[2]
    seen = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=query.device)
    if module.is_causal if is_causal is None else is_causal:
        seen = seen.tril()
    if position_ids is not None:
        example = position_ids.reshape(-1).eq(0).cumsum(0)
        seen &= example[:, None] == example
    output = functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(_STAND_IN, _flash_stand_in)
AttentionMaskInterface.register(_STAND_IN, flash_attention_mask)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
