"""One process of the test of dense metrics under several ranks; see `tests.distributed.worker`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from hf_bilb import BilevelMTLTrainer
from hf_bilb.metrics.dense import DenseMetrics
from tests.distributed.training import arguments, world_size
from tests.distributed.worker import main
from tests.metrics.dense_images import (
    IMAGE_TASKS,
    MIXED,
    NUM_CLASSES,
    PUBLISHED_BATCH,
    TASKS,
    Images,
    MixedImages,
    MixedModel,
    Model,
    dense_metrics,
)

#: Images: 3: the second rank has one alone; 7, 9: its last batch is filled up; 8: none is. Global batches are of 4.
NUMBERS = (3, 7, 8, 9)
WITH_IMAGE_TASKS = 15


def evaluated(number: int, on_each_rank: bool) -> dict[str, Any]:
    metrics = dense_metrics()
    args = arguments(
        per_device_eval_batch_size=4 // world_size(),
        balancer="ls",
        label_names=list(TASKS),
        task_names=list(TASKS),
        batch_eval_metrics=True,
    )
    trainer = BilevelMTLTrainer(
        model=Model(),
        args=args,
        eval_dataset=Images(number),
        compute_metrics=metrics,
        preprocess_logits_for_metrics=metrics.per_image if on_each_rank else None,
    )
    # Twice: the second does not see what the first left.
    found = [trainer.evaluate(), trainer.evaluate()][1]
    return {"metrics": {key: found[f"eval_{key}"] for key in metrics.keys}}


def evaluated_with_image_tasks(number: int, on_each_rank: bool) -> dict[str, Any]:
    metrics = DenseMetrics(MIXED, NUM_CLASSES, batch_size=PUBLISHED_BATCH, image_tasks=IMAGE_TASKS)
    args = arguments(
        per_device_eval_batch_size=4 // world_size(), balancer="ls", label_names=list(metrics.label_names),
        task_names=list(MIXED), batch_eval_metrics=True,
    )  # fmt: skip
    trainer = BilevelMTLTrainer(
        model=MixedModel(),
        args=args,
        eval_dataset=MixedImages(number),
        compute_metrics=metrics,
        preprocess_logits_for_metrics=metrics.per_image if on_each_rank else None,
    )
    found = trainer.evaluate()
    return {"metrics": {key: found[f"eval_{key}"] for key in metrics.keys}}


def scenarios() -> dict[str, Callable[[], dict[str, Any]]]:
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for on_each_rank, how in ((False, "gathered"), (True, "each rank")):
        for number in NUMBERS:
            found[f"{number}/{how}"] = partial(evaluated, number, on_each_rank)
        found[f"image tasks/{how}"] = partial(evaluated_with_image_tasks, WITH_IMAGE_TASKS, on_each_rank)
    return found


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), scenarios)
