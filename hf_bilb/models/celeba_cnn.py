"""The convolutional network of the multi-task papers on CelebA (FAMO, LDC-MTL): 9 layers, then one head per attribute.

    conv W | conv 2W, conv 2W | conv 4W, conv 4W | conv 8W, conv 8W | linear 8W, linear 8W | K heads        W = 64

Convolutions are 3 x 3, each layer is followed by batch normalisation and ReLU (and has no bias of its own); max-pooling
by 2 stands between the blocks, the mean over the frame after the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_bilb.errors import OptionError
from hf_bilb.losses.mixed import MixedLosses
from hf_bilb.losses.task_names import CELEBA_ATTRIBUTES
from hf_bilb.losses.task_types import TaskType
from hf_bilb.models.base import MultiTaskModel
from hf_bilb.models.outputs import KEYS_TO_IGNORE_AT_INFERENCE, MultiTaskOutput
from hf_bilb.models.spec import ModelSpec
from hf_bilb.models.tasks import Tasks, TasksConfig


@dataclass(frozen=True)
class CelebaCnnOptions:
    """What a recipe's `model:` section may set.

    Attributes:
        width: channels of the first layer; the papers have 64. Time and size of the model go with its square.
    """

    width: int = 64

    def __post_init__(self) -> None:
        _check_width(self.width)


class CelebaCnnConfig(TasksConfig):
    """Sizes of `CelebaCnnModel`.

    Args:
        tasks: name -> type of the K attributes, `multi_label` of size 1 each; None: those of `task_names`.
        image_size: height and width of the images that it is trained on, at least 8.
        width: channels of the first layer, W; the papers have 64. Time and size of the model go with its square.
        task_names: their order, that of the labels' columns; None: as `tasks` stand, or CelebA's 40.
        kwargs: what `PretrainedConfig` takes.

    Attributes:
        num_router_features: 8 W, what a feature router sees.

    Raises:
        OptionError: a size that is too small, tasks that are not binary, or names that are empty or stand twice.
    """

    model_type = "celeba_cnn"
    keys_to_ignore_at_inference: ClassVar[list[str]] = list(KEYS_TO_IGNORE_AT_INFERENCE)
    supported_types: ClassVar[tuple[str, ...]] = ("multi_label",)

    def __init__(
        self,
        tasks: Tasks | None = None,
        image_size: int = 64,
        width: int = CelebaCnnOptions.width,
        task_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        _check_width(width)
        if image_size < 8:
            raise OptionError(f"image_size: {image_size} is not valid, expected 8 or more (three poolings by 2)")
        if tasks is None:
            tasks = dict.fromkeys(CELEBA_ATTRIBUTES if task_names is None else task_names, TaskType("multi_label"))
        self.set_tasks(tasks, task_names)
        for name, task in self.task_types.items():
            if task.size != 1:
                raise OptionError(f"tasks.{name}.size: {task.size} is not valid, expected 1, one label a task")
        self.image_size = image_size
        self.width = width
        self.num_router_features = 8 * width
        super().__init__(**kwargs)


def _check_width(width: int) -> None:
    if width < 1:
        raise OptionError(f"width: {width} is not valid, expected 1 or more (the papers: 64)")


class CelebaCnnModel(MultiTaskModel):
    """Predicts K binary attributes of an image; 5.2 million parameters at width 64.

    Batch normalisation needs two images or more in a training batch, and under several processes sees those of its
    own process only (`torch.nn.SyncBatchNorm.convert_sync_batchnorm` changes that).

    Cost: one forward and one backward whatever K is; heads and losses are vectorised over the tasks.
    """

    config_class = CelebaCnnConfig
    base_model_prefix = "celeba_cnn"
    main_input_name = "pixel_values"

    def __init__(self, config: CelebaCnnConfig) -> None:
        super().__init__(config)
        width = config.width
        self.trunk = nn.Sequential(
            *_convolution(3, width),
            nn.MaxPool2d(2),
            *_convolution(width, 2 * width),
            *_convolution(2 * width, 2 * width),
            nn.MaxPool2d(2),
            *_convolution(2 * width, 4 * width),
            *_convolution(4 * width, 4 * width),
            nn.MaxPool2d(2),
            *_convolution(4 * width, 8 * width),
            *_convolution(8 * width, 8 * width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            *_linear(8 * width),
            *_linear(8 * width),
        )
        self.heads = nn.Linear(8 * width, len(config.task_names))
        self._losses = MixedLosses(config.task_types)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # torch's own, as in the papers; transformers would draw from a normal distribution with deviation 0.02.
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, return_dict: bool | None = None
    ) -> MultiTaskOutput | tuple[Tensor, ...]:
        """Predictions, and with labels the loss of each task.

        Args:
            pixel_values: `[B, 3, H, W]` in [0, 1], RGB.
            labels: `[B, K]`, 0 or 1, NaN where missing; None for predictions alone.
            return_dict: False for a plain tuple of what is there; None follows the config.

        Returns:
            `MultiTaskOutput`: `logits [B, K]` (positive: the attribute is there), and with labels the binary
            cross-entropies `losses [K]`, `num_items [K]` and `router_features [B, 8 W]` (what the heads read).
        """
        # A third to a half faster on a CPU; the weights follow by themselves.
        features = self.trunk(pixel_values.contiguous(memory_format=torch.channels_last))
        logits = self.heads(features)
        losses = None if labels is None else self._losses.of_joined(logits, None, labels, None)
        return self._output(logits, losses, features, return_dict)


def _convolution(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)


def _linear(size: int) -> tuple[nn.Module, ...]:
    return nn.Linear(size, size, bias=False), nn.BatchNorm1d(size), nn.ReLU(inplace=True)


SPEC = ModelSpec(CelebaCnnConfig, CelebaCnnModel, options=CelebaCnnOptions)
