"""`LoadedModel`: what `hf_bilb.load` gives for models whose outputs are those of tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_bilb.data.inputs.encoded import Encoded
from hf_bilb.data.inputs.format import DataFormat
from hf_bilb.data.inputs.kinds import NoInputs
from hf_bilb.inference.batches import by_task, check_batch_size
from hf_bilb.inference.forward import measured, num_batches, outputs_of
from hf_bilb.inference.predictions import Predictions
from hf_bilb.losses.task_types import LABELS, TAG_LABELS, TaskType
from hf_bilb.metrics.info import MetricInfo
from hf_bilb.metrics.mixed import MixedMetrics


class LoadedModel:
    """A trained model that predicts.

    Attributes:
        model: the network, in evaluation mode.
        tokenizer: of texts; else None.
        format: how rows become inputs, and what outputs mean.
        tasks: name -> `TaskType`: classes, units.
        folder: that it was loaded from.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, data_format: DataFormat, folder: Path) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.format = data_format
        self.folder = folder

    @property
    def tasks(self) -> Mapping[str, TaskType]:
        return self.format.tasks

    def predict(self, inputs: Any, batch_size: int = 32, progress: bool | None = None) -> Predictions:
        """What the model says of every row, in the units of the training data.

        Args:
            inputs: a file (`.csv`, `.tsv`, `.jsonl`, `.parquet`), a pandas DataFrame, a `datasets.Dataset`, a list of
                dicts or a dict of lists, with the columns of the training data; or a list: of texts, of pairs of
                texts, of lists of words, of images (paths or `PIL.Image`), of SMILES, or of tuples of a table's
                columns. In a table a missing cell and an unknown category are as in training.
            batch_size: rows at a time.
            progress: a bar: None where it takes more than a second on a terminal; True, False: always, never.

        Returns:
            `Predictions`, in the order of the rows.

        On a CPU, rows in the same batches have the outputs of the Trainer's evaluation to the bit, but where that ran
        in mixed precision. Other batches, and other devices, round otherwise in the last bits.

        Raises:
            OptionError: a column that is missing, a cell that is none: one line with file, row and column.

        Cost: one forward pass of every row; texts are tokenized first, images decoded batch by batch.
        """
        check_batch_size(batch_size)
        encoded = self.format.encode(inputs, self.tokenizer)
        found: dict[str, list[Tensor]] = {name: [] for name in self.tasks}
        for _, logits in self._outputs(encoded, batch_size, progress):
            for name, output in by_task(self.tasks, logits, self.folder).items():
                found[name].extend(output.cpu()) if output.ndim == 3 else found[name].append(output.cpu())
        return Predictions.of(self.tasks, found, encoded.words)

    def columns(self, all_classes: bool = False) -> list[str]:
        """The names in `Predictions.to_columns`.

        Raises:
            OptionError: the model reads no rows.
        """
        if isinstance(self.format.inputs, NoInputs):
            raise self.format.inputs.refusal()
        empty = {name: [torch.empty(0, task.size)] for name, task in self.tasks.items() if task.label_width}
        none: dict[str, list[Tensor]] = {name: [] for name in self.tasks}
        return list(Predictions.of(self.tasks, {**none, **empty}, []).to_columns(all_classes))

    def evaluate(self, inputs: Any, batch_size: int = 32, progress: bool | None = None) -> dict[str, float]:
        """The metrics of the run, on rows that have the labels' columns of the training data.

        Args:
            inputs, batch_size, progress: as for `predict`. A task whose column is not there is not measured.

        Returns:
            metric -> value, those that are defined on these rows; `metric_infos` says what each is.

        Raises:
            OptionError: as for `predict`; no column of any task; a label that the model does not know; the model was
                trained on data whose labels are read by their own data set alone.
        """
        check_batch_size(batch_size)
        encoded = self.format.encode(inputs, self.tokenizer, with_labels=True)
        outputs = self._outputs(encoded, batch_size, progress)
        return measured(self._metrics(), outputs, self._label_names, num_batches(encoded, batch_size))

    @property
    def metric_infos(self) -> tuple[MetricInfo, ...]:
        """Title, unit and direction of every metric of `evaluate`."""
        return self._metrics().infos

    # ----------------------------------------------------------------------------------------------------------------

    @property
    def _label_names(self) -> tuple[str, ...]:
        in_rows = any(task.label_width for task in self.tasks.values())
        of_tokens = any(not task.label_width for task in self.tasks.values())
        return (*([LABELS] if in_rows else []), *([TAG_LABELS] if of_tokens else []))

    def _metrics(self) -> MixedMetrics:
        chosen = {name: place.metrics for name, place in self.format.labels.items() if place.metrics is not None}
        return MixedMetrics(self.tasks, chosen, self._label_names)

    def _outputs(self, encoded: Encoded, batch_size: int, progress: bool | None) -> Iterator[tuple[Any, Any]]:
        """Each batch with its logits."""
        return outputs_of(self.model, encoded, batch_size, progress, (LABELS, TAG_LABELS))

    def __repr__(self) -> str:
        reads = "nothing of a user's" if isinstance(self.format.inputs, NoInputs) else self.format.inputs.kind
        return f"LoadedModel({str(self.folder)!r}, reads {reads}, tasks {', '.join(self.tasks)})"
