"""SegNet with a head for each dense task, as the multi-task papers have it (MTAN, CVPR 2019: "Split, Standard").

    encoder   W W | 2W 2W | 4W 4W 4W | 8W 8W 8W | 8W 8W 8W       each block ends in a max-pooling by 2
    decoder   8W 8W 8W | 4W 4W 4W | 2W 2W 2W | W W | W W         each block begins with its max-unpooling    W = 64
    heads     conv 3 x 3 to W, conv 1 x 1 to the task's outputs

(Badrinarayanan, Kendall, Cipolla: SegNet, PAMI 2017: max-unpooling puts a value back where the pooling of the same
level found it.) Convolutions of encoder and decoder are 3 x 3, followed by batch normalisation and ReLU. Pixels come in
[0, 1] and are taken as they are.

Batch normalisation sees the images of its own process only; `sync_batch_norm: true` makes it see those of all processes
(GPUs only: `torch.nn.SyncBatchNorm` knows no others), which batches of 2 per process, as on NYUv2, want.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig

from hf_bilb.errors import OptionError
from hf_bilb.losses.contract import check_task_names
from hf_bilb.losses.dense import DENSE_TASKS, check_dense_task
from hf_bilb.losses.task_types import TaskType
from hf_bilb.models.base import check_size
from hf_bilb.models.dense.layers import (
    DenseHeads,
    DenseModel,
    convolution_block,
    dense_task_types,
    finished,
    output_sizes,
)
from hf_bilb.models.outputs import KEYS_TO_IGNORE_AT_INFERENCE, MultiTaskOutput
from hf_bilb.models.spec import ModelSpec

_SMALLEST = 32  # five poolings by 2


@dataclass(frozen=True)
class SegNetOptions:
    """What a recipe's `model:` section may set.

    Attributes:
        width: channels of the first layer; the papers have 64. Time and size of the model go with its square.
        sync_batch_norm: statistics over the images of all processes (GPUs).
    """

    width: int = 64
    sync_batch_norm: bool = False

    def __post_init__(self) -> None:
        check_size("width", self.width)


class SegNetConfig(PretrainedConfig):
    """Sizes of `SegNetModel`.

    Args:
        task_names: the K tasks, of `segmentation`, `depth`, `normals`, in order.
        num_classes: of the segmentation: 13 (NYUv2), 7 or 19 (Cityscapes).
        width: channels of the first layer, W; the papers have 64. Time and size of the model go with its square.
        sync_batch_norm: statistics over the images of all processes (GPUs).
        kwargs: what `PretrainedConfig` takes.

    Attributes:
        num_router_features: W, what a feature router sees.

    Raises:
        OptionError: a size below 1, or tasks that are not known or stand twice.
    """

    model_type = "segnet"
    keys_to_ignore_at_inference: ClassVar[list[str]] = list(KEYS_TO_IGNORE_AT_INFERENCE)

    def __init__(
        self,
        task_names: Sequence[str] = DENSE_TASKS,
        num_classes: int = 13,
        width: int = SegNetOptions.width,
        sync_batch_norm: bool = SegNetOptions.sync_batch_norm,
        **kwargs: Any,
    ) -> None:
        check_size("width", width)
        check_size("num_classes", num_classes)
        self.task_names = list(check_task_names(task_names))
        for name in self.task_names:
            check_dense_task(name)
        self.num_classes = num_classes
        self.width = width
        self.sync_batch_norm = sync_batch_norm
        self.num_router_features = width
        super().__init__(**kwargs)

    @property
    def task_types(self) -> dict[str, TaskType]:
        """Name -> type, in order."""
        known = dense_task_types(self.num_classes)
        return {name: known[name] for name in self.task_names}


@dataclass(frozen=True)
class TrunkMaps:
    """What `SegNetTrunk` computes, from the first to the last block of encoder and of decoder.

    Attributes:
        encoder: of each block the maps after its first and its last convolution.
        unpooled: what each decoder block reads, after its unpooling.
        decoder: what each decoder block gives; the last has the frame's size and W channels.
    """

    encoder: tuple[tuple[Tensor, Tensor], ...]
    unpooled: tuple[Tensor, ...]
    decoder: tuple[Tensor, ...]


class SegNetTrunk(nn.Module):
    """Encoder and decoder, five blocks each: `[B, 3, H, W] -> TrunkMaps`; any height and width from 32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = trunk_sizes(width)
        below = [sizes[0], *sizes[:-1]]  # what decoder block j, counted from the frame's size, gives
        self.encoder_first = nn.ModuleList(
            convolution_block(i, o) for i, o in zip([3, *sizes[:-1]], sizes, strict=True)
        )
        self.encoder_rest = nn.ModuleList(_rest(level, size) for level, size in enumerate(sizes))
        self.decoder_first = nn.ModuleList(convolution_block(i, o) for i, o in zip(sizes, below, strict=True))
        self.decoder_rest = nn.ModuleList(_rest(level, size) for level, size in enumerate(below))

    def forward(self, pixel_values: Tensor) -> TrunkMaps:
        if min(pixel_values.shape[-2:]) < _SMALLEST:
            size = " x ".join(str(length) for length in pixel_values.shape[-2:])
            raise OptionError(f"pixel_values: {size} is not valid, expected {_SMALLEST} x {_SMALLEST} or more")
        maps, encoder, places = pixel_values, [], []
        for first, rest in zip(self.encoder_first, self.encoder_rest, strict=True):
            begun = first(maps)
            ended = rest(begun)
            maps, indices = functional.max_pool2d(ended, 2, return_indices=True)
            encoder.append((begun, ended))
            places.append(indices)
        unpooled, decoder = [], []
        for level in reversed(range(len(encoder))):
            # Its size says which of an odd frame's rows and columns the pooling has left out.
            frame = encoder[level][1].shape[-2:]
            unpooled.append(functional.max_unpool2d(maps, places[level], [2, 2], output_size=list(frame)))
            maps = self.decoder_rest[level](self.decoder_first[level](unpooled[-1]))
            decoder.append(maps)
        return TrunkMaps(tuple(encoder), tuple(unpooled), tuple(decoder))


def trunk_sizes(width: int) -> list[int]:
    """Channels of the five encoder blocks."""
    return [factor * width for factor in (1, 2, 4, 8, 8)]


def _rest(level: int, size: int) -> nn.Sequential:
    return nn.Sequential(*(convolution_block(size, size) for _ in range(1 if level < 2 else 2)))


class TrunkModel(DenseModel):
    """A model of dense tasks on `SegNetTrunk`, with `heads` that read `_head_maps` of it."""

    trunk: SegNetTrunk
    heads: DenseHeads

    @abstractmethod
    def _head_maps(self, maps: TrunkMaps) -> Tensor:
        """What the heads read, `[B, C, H, W]`."""

    def forward(
        self,
        pixel_values: Tensor,
        segmentation: Tensor | None = None,
        depth: Tensor | None = None,
        normals: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> MultiTaskOutput | tuple[Tensor, ...]:
        """Predictions, and with labels of any task the losses (`hf_bilb.losses.dense`).

        Args:
            pixel_values: `[B, 3, H, W]` in [0, 1], RGB; H and W from 32.
            segmentation: int64 `[B, H, W]`, -1 where not labelled.
            depth: `[B, H, W]`, 0 where not measured.
            normals: `[B, 3, H, W]`, unit vectors, (0, 0, 0) where not known.
            return_dict: False for a plain tuple of what is there; None follows the config.

        Returns:
            `MultiTaskOutput`: `logits`, a tuple in the order of the tasks (`[B, C, H, W]` logits of the classes, depth
            `[B, H, W]`, normals `[B, 3, H, W]` of length 1), and with labels `losses [K]`, `num_items [K]` (pixels) and
            `router_features`, the global means of the maps that the heads read (SegNet `[B, W]`; MTAN `[B, K W]`, every
            task's one after the other: LDC-MTL's router input). A task without labels is absent.

        Raises:
            OptionError: a frame that is too small.
            TaskLossError: labels of a task that the model does not have, or of the wrong shape.
        """
        maps = self._head_maps(self.trunk(pixel_values))
        names = self.config.task_names
        predictions = {name: finished(name, out) for name, out in zip(names, self.heads(maps), strict=True)}
        labels = {"segmentation": segmentation, "depth": depth, "normals": normals}
        return self._dense_output(predictions, labels, maps.mean(dim=(2, 3)), return_dict)


class SegNetModel(TrunkModel):
    """Predicts dense tasks from common maps; 25 million parameters at width 64.

    Cost: one forward and one backward of the trunk whatever K is; the heads are two convolutions.
    """

    config_class = SegNetConfig
    base_model_prefix = "segnet"

    def __init__(self, config: SegNetConfig) -> None:
        super().__init__(config)
        self.trunk = SegNetTrunk(config.width)
        sizes = output_sizes(config.task_names, config.num_classes)
        self.heads = DenseHeads(config.width, sizes, shared_input=True)
        if config.sync_batch_norm:
            nn.SyncBatchNorm.convert_sync_batchnorm(self)
        self.post_init()

    def _head_maps(self, maps: TrunkMaps) -> Tensor:
        return maps.decoder[-1]


SPEC = ModelSpec(SegNetConfig, SegNetModel, options=SegNetOptions)
