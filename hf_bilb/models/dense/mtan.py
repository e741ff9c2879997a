"""MTAN on SegNet: Liu, Johns, Davison, "End-to-End Multi-Task Learning with Attention", CVPR 2019.

The backbone of the multi-task papers on NYUv2 and Cityscapes (Nash-MTL, FAMO, LDC-MTL, MARIGOLD): the SegNet of
`hf_bilb.models.dense.segnet` without its heads, and for each task k and block j a soft attention module that chooses
from the block's maps. With p (first maps) and u (last maps) of encoder block j, v (unpooled) and d (last) of a decoder
block:

    encoder   a_k = sigmoid(BN(conv1(relu(BN(conv1([p, t_k]))))))    t_k <- pool(shared3(a_k * u))     no t_k in block 1
    decoder   s_k = shared3(upsample(t_k))    a_k = (the same of [v, s_k])    t_k <- a_k * d
    heads     conv 3 x 3, conv 1 x 1 of the last t_k

conv1 are 1 x 1 convolutions of each task's own; shared3 is a 3 x 3 convolution with batch normalisation and ReLU that
all tasks share, upsample is bilinear. The official code runs all of that task by task. Here the tasks' maps lie side by
side: attention and heads are grouped convolutions, what the tasks share runs once with the tasks in the batch. conv1 of
[p, t_k] is a sum of two convolutions, so that p is read once for all tasks. Predictions and gradients are the same, to
rounding.

Of `router_features` see `TrunkModel.forward`; batch normalisation as in `hf_bilb.models.dense.segnet`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from hf_bilb.losses.dense import DENSE_TASKS
from hf_bilb.models.dense.layers import (
    DenseHeads,
    SharedBatchNorm,
    TaskConv2d,
    for_each_task,
    output_sizes,
    side_by_side,
)
from hf_bilb.models.dense.segnet import SegNetConfig, SegNetOptions, SegNetTrunk, TrunkMaps, TrunkModel, trunk_sizes
from hf_bilb.models.spec import ModelSpec


class MtanConfig(SegNetConfig):
    """Sizes of `MtanModel`: the arguments and errors of `SegNetConfig`.

    Attributes:
        num_router_features: K W, what a feature router sees.
    """

    model_type = "mtan"

    # Written out: of a subclass without one, PretrainedConfig makes a dataclass with an __init__ of its own.
    def __init__(
        self,
        task_names: Sequence[str] = DENSE_TASKS,
        num_classes: int = 13,
        width: int = SegNetOptions.width,
        sync_batch_norm: bool = SegNetOptions.sync_batch_norm,
        **kwargs: Any,
    ) -> None:
        super().__init__(task_names, num_classes, width, sync_batch_norm, **kwargs)
        self.num_router_features = len(self.task_names) * width


class TaskAttention(nn.Module):
    """The attention modules of all tasks in one block.

    Args:
        shared: channels of the maps that all tasks read.
        own: channels of each task's own maps; 0 in the first block.
        outputs: channels of the maps that are attended to.
        num_tasks: K.
    """

    def __init__(self, shared: int, own: int, outputs: int, num_tasks: int) -> None:
        super().__init__()
        fan_in = shared + own
        self.of_shared = TaskConv2d(shared, outputs, 1, num_tasks, shared_input=True, fan_in=fan_in)
        self.of_own = TaskConv2d(own, outputs, 1, num_tasks, bias=False, fan_in=fan_in) if own else None
        self.hidden_norm = nn.BatchNorm2d(num_tasks * outputs)
        self.out = TaskConv2d(outputs, outputs, 1, num_tasks)
        self.out_norm = nn.BatchNorm2d(num_tasks * outputs)

    def forward(self, shared: Tensor, own: Tensor | None, attended: Tensor) -> Tensor:
        """Maps `[B, shared, H, W]`, `[B, K own, H, W]` and `[B, C, H, W]` -> the last, weighted: `[B, K C, H, W]`."""
        hidden = self.of_shared(shared)
        if self.of_own is not None:
            assert own is not None
            hidden += self.of_own(own)
        masks = self.out_norm(self.out(functional.relu(self.hidden_norm(hidden), inplace=True))).sigmoid_()
        return (masks.unflatten(1, (-1, attended.shape[1])) * attended.unsqueeze(1)).flatten(1, 2)


class SharedBlock(nn.Module):
    """3 x 3 convolution, batch normalisation, ReLU with the same weights for every task: `[B, K C, H, W]` to the same
    of other channels."""

    def __init__(self, inputs: int, outputs: int, num_tasks: int) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        self.convolution = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm = SharedBatchNorm(outputs)

    def forward(self, maps: Tensor) -> Tensor:
        convolved = self.convolution(for_each_task(maps, self.num_tasks))
        return functional.relu(self.norm(side_by_side(convolved, self.num_tasks)), inplace=True)


class MtanModel(TrunkModel):
    """Predicts dense tasks, each from maps of its own choice; 44 million parameters with three tasks at width 64.

    Cost: one forward and one backward of the trunk, and for each task about as much time again (on a CPU; maps of the
    frame's size, with few weights); as many kernels for many tasks as for one.

    Parameters of every task's own lie in one tensor for all tasks (`encoder_attention`, `decoder_attention`, `heads`).
    A method that asks which are shared is told `trunk.*`, `encoder_shared.*` and `decoder_shared.*`.
    """

    config_class = MtanConfig
    base_model_prefix = "mtan"

    def __init__(self, config: MtanConfig) -> None:
        super().__init__(config)
        num_tasks, sizes = len(config.task_names), trunk_sizes(config.width)
        given = [sizes[0], *sizes[:-1]]  # by decoder block j, counted from the frame's size
        self.trunk = SegNetTrunk(config.width)
        self.encoder_attention = nn.ModuleList(
            TaskAttention(size, size if level else 0, size, num_tasks) for level, size in enumerate(sizes)
        )
        self.encoder_shared = nn.ModuleList(
            SharedBlock(i, o, num_tasks) for i, o in zip(sizes, [*sizes[1:], sizes[-1]], strict=True)
        )
        self.decoder_shared = nn.ModuleList(SharedBlock(i, o, num_tasks) for i, o in zip(sizes, given, strict=True))
        self.decoder_attention = nn.ModuleList(
            TaskAttention(size, out, out, num_tasks) for size, out in zip(sizes, given, strict=True)
        )
        self.heads = DenseHeads(config.width, output_sizes(config.task_names, config.num_classes), shared_input=False)
        if config.sync_batch_norm:
            nn.SyncBatchNorm.convert_sync_batchnorm(self)
        self.post_init()

    def _head_maps(self, maps: TrunkMaps) -> Tensor:
        """Every task's last maps, side by side: `[B, K W, H, W]`."""
        own: Tensor | None = None
        for (begun, ended), attention, shared in zip(
            maps.encoder, self.encoder_attention, self.encoder_shared, strict=True
        ):
            own = functional.max_pool2d(shared(attention(begun, own, ended)), 2)
        assert own is not None
        decoder = zip(
            maps.unpooled,
            maps.decoder,
            reversed(self.decoder_shared),
            reversed(self.decoder_attention),
            strict=True,
        )
        for unpooled, given, shared, attention in decoder:
            larger = functional.interpolate(own, size=unpooled.shape[-2:], mode="bilinear", align_corners=True)
            own = attention(unpooled, shared(larger), given)
        return own


SPEC = ModelSpec(MtanConfig, MtanModel, options=SegNetOptions)
