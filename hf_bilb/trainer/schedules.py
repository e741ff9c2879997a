"""A learning rate that falls by a factor every so many epochs, which `lr_scheduler_type` does not offer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from hf_bilb.config.options import bounded, check_bounds
from hf_bilb.errors import OptionError


@dataclass(frozen=True)
class StepLROptions:
    """`step_lr`: after every `epochs` epochs the learning rate is multiplied by `factor`, as torch's `StepLR` does.

    LDC-MTL's runs: `{epochs: 3, factor: 0.3}` on CelebA, `{epochs: 100, factor: 0.5}` on NYUv2 and Cityscapes.

    Attributes:
        epochs: after so many epochs each time, 1 or more.
        factor: above 0, at most 1.
    """

    epochs: int = bounded(at_least=1, expected="1 or more")
    factor: float = bounded(above=0, at_most=1, expected="0 < factor <= 1")

    def __post_init__(self) -> None:
        check_bounds(self)


def step_schedule(optimizer: Optimizer, options: StepLROptions, updates_per_epoch: int) -> LambdaLR:
    """The schedule, stepped once per update; it depends on the number of updates alone, so a resume goes on with it."""
    return LambdaLR(optimizer, lambda update: options.factor ** (update // (options.epochs * updates_per_epoch)))


def updates_per_epoch(trainer: Trainer, num_training_steps: int) -> int:
    """Updates of one epoch: of the `num_training_steps` where epochs are counted, else what the data set's length says.

    Raises:
        OptionError: steps are counted (`max_steps`) and the data set has no length.
    """
    args = trainer.args
    if args.max_steps <= 0:
        return max(math.ceil(num_training_steps / args.num_train_epochs), 1)
    try:
        examples = len(trainer.train_dataset)
    except TypeError:
        raise OptionError("step_lr: counts epochs, and this training set has no length") from None
    batches = examples / (args.train_batch_size * args.world_size)
    batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    return max(math.ceil(batches / args.gradient_accumulation_steps), 1)
