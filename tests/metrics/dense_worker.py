"""One process of the test of dense metrics under several ranks; see `tests.distributed.worker`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from hf_bilb import BilevelMTLTrainer
from hf_bilb.metrics.dense import DenseMetrics
from tests.distributed.training import arguments, world_size
from tests.distributed.worker import main
from tests.metrics.dense_images import (
    IMAGE_TASKS,
    MIXED,
    NUM_CLASSES,
    PUBLISHED_BATCH,
    Images,
    MixedImages,
    MixedModel,
    Model,
    dense_metrics,
)

#: Images: 3: the second rank has one alone; 7, 9: its last batch is filled up; 8: none is. Global batches are of 4.
NUMBERS = (3, 7, 8, 9)
WITH_IMAGE_TASKS = 15


def evaluated(metrics: DenseMetrics, model: nn.Module, images: Images, on_each_rank: bool) -> dict[str, Any]:
    args = arguments(
        per_device_eval_batch_size=4 // world_size(), balancer="ls", label_names=list(metrics.label_names),
        task_names=list(metrics.task_names), batch_eval_metrics=True,
    )  # fmt: skip
    trainer = BilevelMTLTrainer(
        model=model,
        args=args,
        eval_dataset=images,
        compute_metrics=metrics,
        preprocess_logits_for_metrics=metrics.per_image if on_each_rank else None,
    )
    # Twice: the second does not see what the first left.
    found = [trainer.evaluate(), trainer.evaluate()][1]
    return {"metrics": {key: found[f"eval_{key}"] for key in metrics.keys}}


def of_pixels(number: int, on_each_rank: bool) -> dict[str, Any]:
    return evaluated(dense_metrics(), Model(), Images(number), on_each_rank)


def with_image_tasks(number: int, on_each_rank: bool) -> dict[str, Any]:
    metrics = DenseMetrics(MIXED, NUM_CLASSES, batch_size=PUBLISHED_BATCH, image_tasks=IMAGE_TASKS)
    return evaluated(metrics, MixedModel(), MixedImages(number), on_each_rank)


def scenarios() -> dict[str, Callable[[], dict[str, Any]]]:
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for on_each_rank, how in ((False, "gathered"), (True, "each rank")):
        for number in NUMBERS:
            found[f"{number}/{how}"] = partial(of_pixels, number, on_each_rank)
        found[f"image tasks/{how}"] = partial(with_image_tasks, WITH_IMAGE_TASKS, on_each_rank)
    return found


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), scenarios)
