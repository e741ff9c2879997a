"""A small made-up data set under the name `made_up`; run as a program, the command line of hf_bilb with it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from hf_bilb.data import DATA_SETS, DataSetSpec, MetricInfo, TaskData
from hf_bilb.data.rows import VectorRows, collate_vectors

TASKS = ("easy", "steep", "noise")


@dataclass(frozen=True)
class MadeUpOptions:
    """`rows`: of the training part; `poison`: a label that is infinite."""

    rows: int = 192
    poison: bool = False


def load_made_up(options: MadeUpOptions) -> TaskData:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(options.rows + 64, 5, generator=generator)
    labels = features @ torch.randn(5, 3, generator=generator) * torch.tensor([1.0, 10.0, 0.0])
    labels += torch.randn(labels.shape, generator=generator) * torch.tensor([0.1, 0.1, 1.0])
    if options.poison:
        labels[: options.rows, 1] = torch.inf
    parts = [slice(0, options.rows), slice(options.rows, -32), slice(-32, None)]
    train, validation, test = (VectorRows({"features": features[part], "labels": labels[part]}) for part in parts)

    def errors(predictions, labels):
        return {f"mae_{task}": float(np.abs(predictions - labels).mean(0)[k]) for k, task in enumerate(TASKS)}

    test_labels = test.columns["labels"].numpy()
    return TaskData(
        train=train,
        validation=validation,
        test=test,
        task_names=TASKS,
        label_names=("labels",),
        data_collator=collate_vectors,
        compute_metrics=lambda prediction: errors(prediction.predictions, prediction.label_ids),
        metrics=tuple(MetricInfo(f"mae_{task}", task, "MAE", "m", higher_is_better=False) for task in TASKS),
        trivial_metrics=errors(train.columns["labels"].numpy().mean(0), test_labels),
        model_arguments={"num_features": 5, "task_names": list(TASKS)},
    )


MADE_UP = DataSetSpec(options=MadeUpOptions, load=load_made_up)

RECIPE = """
model: {name: qm9_mlp, hidden_size: 16, num_layers: 1, head_size: 4}
data: made_up
balancer: {name: bilb}
trainer:
  output_dir: run
  seed: 1
  use_cpu: true
  num_train_epochs: 4
  per_device_train_batch_size: 16
  learning_rate: 1e-1
  logging_steps: 5
  eval_strategy: epoch
  save_strategy: epoch
  load_best_model_at_end: true
"""

if __name__ == "__main__":
    from hf_bilb.cli import main

    DATA_SETS["made_up"] = MADE_UP
    main()
