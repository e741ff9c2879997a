"""What our models have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_bilb.errors import CheckpointError, OptionError
from hf_bilb.models.outputs import MultiTaskOutput
from hf_bilb.storage.tensor_files import Differences

_ALIGNMENT = 64  # bytes, of what torch allocates on a CPU


class MultiTaskModel(PreTrainedModel):
    """A model with K tasks whose forward returns a `MultiTaskOutput`."""

    accepts_loss_kwargs = False  # the losses are means over the valid items already; the Trainer shall not rescale

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`; on a CPU what is loaded computes bit for bit what was saved.

        Tensors that lie in a safetensors file in memory are not aligned, and matrix products round otherwise then.

        Raises:
            CheckpointError: tensors that no file holds, and would be random, or that this model does not have; but for
                a caller who asks for the report (`output_loading_info=True`), which has both. Shapes may differ with
                `ignore_mismatched_sizes=True`, as there.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        differences = Differences(sorted(info["missing_keys"]), sorted(info["unexpected_keys"]))
        if differences and not output_loading_info:
            raise CheckpointError(f"{model.name_or_path}: its weights do not match {cls.__name__}: {differences}")
        align(model)
        return (model, info) if output_loading_info else model

    def _output(
        self,
        logits: Tensor | tuple[Tensor, ...],
        losses: tuple[Tensor, Tensor] | None,
        features: Tensor,
        return_dict: bool | None,
        shared: bool = True,
        read: Tensor | None = None,
    ) -> MultiTaskOutput | tuple[Tensor, ...]:
        """What `forward` returns.

        Args:
            logits: the predictions.
            losses: `[K]` with num_items `[K]`; None without labels.
            features: `[B, D]`, what the heads read; goes out with the losses alone.
            return_dict: False for a plain tuple of what is there; None follows the config.
            shared: whether all heads read `features` itself, or what it is made of: the `shared_features`.
            read: what `features` is made of, where some heads read that; None: it is `features`.
        """
        output = MultiTaskOutput(logits=logits)
        as_dict = self.config.return_dict if return_dict is None else return_dict
        if losses is not None:
            # By name alone: a tuple would hold the same tensor twice.
            heads_read = (features if read is None else read) if shared and as_dict else None
            output = MultiTaskOutput(*losses, logits, router_features=features, shared_features=heads_read)
        return output if as_dict else output.to_tuple()


def align(model: nn.Module) -> None:
    """Put tensors that lie in a file in memory where torch puts its own: on a CPU matrix products round otherwise."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % _ALIGNMENT:
            tensor.data = tensor.data.clone()


def check_size(key: str, value: int) -> None:
    """Raise `OptionError` unless `value` is at least 1."""
    if value < 1:
        raise OptionError(f"{key}: {value} is not valid, expected 1 or more")


def check_choice(key: str, value: str, choices: Sequence[str]) -> None:
    """Raise `OptionError` unless `value` is one of `choices`."""
    if value not in choices:
        raise OptionError(f"{key}: {value!r} is not valid, expected one of {', '.join(choices)}")


def check_dropout(dropout: float) -> None:
    """Raise `OptionError` unless `dropout` is in [0, 1)."""
    if not 0 <= dropout < 1:
        raise OptionError(f"dropout: {dropout} is not valid, expected 0 <= dropout < 1")
