"""What the models of dense prediction have in common: layers of K tasks computed together, and what a forward returns.

The maps of K tasks lie one after the other along the channels, `[B, K C, H, W]`; `for_each_task` sees them as
`[B K, C, H, W]` without a copy, for a layer that all tasks share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import initialization

from hf_bilb.errors import TaskLossError
from hf_bilb.losses.dense import dense_task_losses, unit_vectors
from hf_bilb.losses.task_types import TaskType
from hf_bilb.models.base import MultiTaskModel
from hf_bilb.models.outputs import MultiTaskOutput


def convolution_block(inputs: int, outputs: int) -> nn.Sequential:
    """3 x 3 convolution, batch normalisation, ReLU: `[B, inputs, H, W] -> [B, outputs, H, W]`."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def for_each_task(maps: Tensor, num_tasks: int) -> Tensor:
    """`[B, K C, H, W] -> [B K, C, H, W]`: a view."""
    return maps.unflatten(1, (num_tasks, -1)).flatten(0, 1)


def side_by_side(maps: Tensor, num_tasks: int) -> Tensor:
    """`[B K, C, H, W] -> [B, K C, H, W]`: a view."""
    return maps.unflatten(0, (-1, num_tasks)).flatten(1, 2)


class TaskConv2d(nn.Conv2d):
    """K convolutions side by side, one for each task.

    Args:
        inputs, outputs: channels of one task.
        kernel_size: odd; the frame keeps its size.
        num_tasks: K.
        shared_input: all tasks read the same maps `[B, inputs, H, W]`; else each its own, `[B, K inputs, H, W]`.
        bias: whether there is one.
        fan_in: channels that one output is a sum over, for the first weights, where another layer adds to it.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel_size: int,
        num_tasks: int,
        shared_input: bool = False,
        bias: bool = True,
        fan_in: int | None = None,
    ) -> None:
        self.fans = (inputs if fan_in is None else fan_in, outputs)
        super().__init__(
            inputs if shared_input else num_tasks * inputs,
            num_tasks * outputs,
            kernel_size,
            padding=kernel_size // 2,
            groups=1 if shared_input else num_tasks,
            bias=bias,
        )


def xavier_normal_(convolution: nn.Conv2d) -> None:
    """Xavier's normal weights and zero biases, as the papers' networks begin; those of one task for a `TaskConv2d`."""
    fan_in, fan_out = (
        convolution.fans if isinstance(convolution, TaskConv2d) else (convolution.in_channels, convolution.out_channels)
    )
    positions = math.prod(convolution.kernel_size)
    initialization.normal_(convolution.weight, std=math.sqrt(2 / (positions * (fan_in + fan_out))))
    if convolution.bias is not None:
        initialization.zeros_(convolution.bias)


class SharedBatchNorm(nn.Module):
    """Batch normalisation that K tasks share, each with its own maps' statistics: `[B, K C, H, W]`, same shape out.

    Equal to calling one `torch.nn.BatchNorm2d` for one task after the other, as the official MTAN code does: in
    training every task is normalised by its own batch; weight, bias and running statistics are common, and the running
    ones take in task 1, ..., K in this order (the last task counts most).

    State: that of `norm`. Cost: one batch normalisation over K C channels and some operations on `[K, C]`. A `norm`
    that `torch.nn.SyncBatchNorm.convert_sync_batchnorm` has converted is called K times instead.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm: nn.BatchNorm2d | nn.SyncBatchNorm = nn.BatchNorm2d(channels)

    def forward(self, maps: Tensor) -> Tensor:
        norm = self.norm
        num_tasks = maps.shape[1] // norm.num_features
        if isinstance(norm, nn.SyncBatchNorm):
            return torch.cat([norm(part) for part in maps.chunk(num_tasks, dim=1)], dim=1)
        assert norm.running_mean is not None and norm.running_var is not None
        weight, bias, mean, variance = (
            tensor.repeat(num_tasks) for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        )
        # With momentum 1 it leaves the statistics of this batch in `mean` and `variance`.
        out = functional.batch_norm(maps, mean, variance, weight, bias, self.training, 1.0, norm.eps)
        if self.training:
            self._remember(mean.view(num_tasks, -1), variance.view(num_tasks, -1))
        return out

    def _remember(self, means: Tensor, variances: Tensor) -> None:
        """Take `[K, C]` into the running statistics, as K updates one after the other would."""
        norm, num_tasks = self.norm, len(means)
        assert norm.momentum is not None and norm.running_mean is not None
        assert norm.running_var is not None and norm.num_batches_tracked is not None
        keep = 1 - norm.momentum
        later = torch.arange(num_tasks - 1, -1, -1, dtype=means.dtype, device=means.device)
        shares = norm.momentum * keep**later
        with torch.no_grad():
            norm.running_mean.mul_(keep**num_tasks).add_(shares @ means)
            norm.running_var.mul_(keep**num_tasks).add_(shares @ variances)
            norm.num_batches_tracked.add_(num_tasks)


class TaskOutputs(nn.Module):
    """The last 1 x 1 convolution of every task: `[B, K C, H, W]` -> K tensors `[B, n_k, H, W]`, from one convolution.

    A grouped convolution wants as many outputs of every task, so that the weights are filled up with zeros to the
    largest n_k on the way; those that are stored and trained are the n_1 + ... + n_K rows.
    """

    def __init__(self, inputs: int, sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.weight = nn.Parameter(torch.empty(sum(sizes), inputs))
        self.bias = nn.Parameter(torch.empty(sum(sizes)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier's normal weights of each task's own convolution, zero biases."""
        inputs = self.weight.shape[1]
        stds = [math.sqrt(2 / (inputs + size)) for size in self.sizes for _ in range(size)]
        drawn = torch.randn_like(self.weight) * torch.tensor(stds).to(self.weight).unsqueeze(1)
        initialization.copy_(self.weight, drawn)
        initialization.zeros_(self.bias)

    def forward(self, maps: Tensor) -> tuple[Tensor, ...]:
        most, num_tasks = max(self.sizes), len(self.sizes)
        out = functional.conv2d(
            maps,
            _filled_up(self.weight, self.sizes)[..., None, None],
            _filled_up(self.bias, self.sizes),
            groups=num_tasks,
        )
        return tuple(part[:, :size] for part, size in zip(out.split(most, dim=1), self.sizes, strict=True))


def _filled_up(rows: Tensor, sizes: Sequence[int]) -> Tensor:
    """n_1 + ... + n_K rows -> K times max(n_k) rows, zeros after each task's own."""
    most = max(sizes)
    blank = rows.new_zeros(most, *rows.shape[1:])
    parts = [part for own in rows.split(list(sizes)) for part in (own, blank[len(own) :])]
    return torch.cat(parts)


class DenseHeads(nn.Module):
    """A head for each task, two convolutions (3 x 3 and 1 x 1, nothing between) as in the multi-task papers.

    Args:
        width: channels C that a head reads, and has between its convolutions.
        sizes: outputs n_k of each task.
        shared_input: all heads read the same maps `[B, C, H, W]`; else each its own, `[B, K C, H, W]`.

    Returns K tensors `[B, n_k, H, W]`. Cost: two convolutions whatever K is.
    """

    def __init__(self, width: int, sizes: Sequence[int], shared_input: bool) -> None:
        super().__init__()
        self.hidden = TaskConv2d(width, width, 3, len(sizes), shared_input)
        self.outputs = TaskOutputs(width, sizes)

    def forward(self, maps: Tensor) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = self.outputs(self.hidden(maps))
        return found


def dense_task_types(num_classes: int) -> dict[str, TaskType]:
    """The papers' tasks as those with as many outputs, though their losses are others."""
    return {
        "segmentation": TaskType("segmentation", num_classes),
        "depth": TaskType("dense_regression"),
        "normals": TaskType("dense_regression", 3),
    }


def output_sizes(task_names: Sequence[str], num_classes: int) -> list[int]:
    """Channels that each task of `dense_losses.DENSE_TASKS` predicts at a pixel."""
    sizes = {"segmentation": num_classes, "depth": 1, "normals": 3}
    return [sizes[name] for name in task_names]


def finished(name: str, maps: Tensor) -> Tensor:
    """The prediction of a task from its head's output `[B, n, H, W]`: logits, depth `[B, H, W]`, unit normals."""
    if name == "depth":
        return maps.squeeze(1)
    return unit_vectors(maps) if name == "normals" else maps


class DenseModel(MultiTaskModel):
    """A model with `task_names` of dense tasks, whose forward returns what `_dense_output` makes."""

    main_input_name = "pixel_values"

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            xavier_normal_(module)
        elif isinstance(module, TaskOutputs):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    def _dense_output(
        self,
        predictions: Mapping[str, Tensor],
        labels: Mapping[str, Tensor | None],
        features: Tensor,
        return_dict: bool | None,
        image_tasks: Sequence[str] = (),
    ) -> MultiTaskOutput | tuple[Tensor, ...]:
        """Predictions, and with labels of any task the losses and what a feature router sees.

        Raises:
            TaskLossError: labels of a task that the model does not have, or of another shape than its predictions.
        """
        task_names = self.config.task_names
        given = [name for name, label in labels.items() if label is not None]
        for name in given:
            if name not in task_names:
                raise TaskLossError(f"{name}: labels are given, but the model's tasks are {', '.join(task_names)}")
        losses = dense_task_losses(predictions, labels, task_names, image_tasks) if given else None
        logits = tuple(predictions[name] for name in task_names)
        return self._output(logits, losses, features, return_dict, shared=False)  # the heads read maps
