"""`LoadedPixelModel`: what `hf_bilb.load` gives for models with tasks of pixels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_bilb.data.inputs.encoded import Encoded
from hf_bilb.data.inputs.format import DataFormat
from hf_bilb.data.inputs.pixels import SIZES
from hf_bilb.errors import CheckpointError
from hf_bilb.inference.batches import check_batch_size
from hf_bilb.inference.forward import measured, num_batches, outputs_of
from hf_bilb.inference.image_predictions import ImagePrediction
from hf_bilb.inference.predictions import Predictions
from hf_bilb.losses.dense import IMAGE_LABELS
from hf_bilb.losses.task_types import LABELS, TaskType, pixel_tasks
from hf_bilb.metrics.dense import DenseMetrics
from hf_bilb.metrics.info import MetricInfo
from hf_bilb.metrics.mixed import MixedMetrics

#: Images at a time, unless another number is asked for.
BATCH_SIZE = 8


class LoadedPixelModel:
    """A trained model that predicts something at every pixel of an image, and of whole images.

    Attributes:
        model: the network, in evaluation mode.
        format: how images become inputs, and what outputs mean.
        tasks: name -> `TaskType`: classes, units.
        folder: that it was loaded from.
    """

    def __init__(self, model: nn.Module, data_format: DataFormat, folder: Path) -> None:
        self.model = model
        self.format = data_format
        self.folder = folder

    @property
    def tasks(self) -> Mapping[str, TaskType]:
        return self.format.tasks

    def predict(self, inputs: Any, batch_size: int = BATCH_SIZE, progress: bool | None = None) -> ImagePredictions:
        """What the model says of images; each batch is computed when one iterates over it.

            for prediction in model.predict(["a.jpg", "b.jpg"]):
                prediction["segmentation"]  # [H, W], of the size of the image

        Args:
            inputs: a list of images (paths, `PIL.Image`, arrays `[H, W, 3]` of uint8 or of floats from 0 to 1), an
                image file, a folder of image files; or a table with a column of them, as of `LoadedModel.predict`.
                Every image is resized to the size of training.
            batch_size: images at a time.
            progress: as of `LoadedModel.predict`.

        Returns:
            `ImagePredictions`, in the order of the images.

        On a CPU, images in the same batches have the outputs of the Trainer's evaluation to the bit, as of
        `LoadedModel.predict`.

        Raises:
            OptionError: a column or a file that is missing; while one iterates, an image that does not decode.

        Cost: one forward pass of every image; memory of one batch, whatever their number.
        """
        check_batch_size(batch_size)
        return ImagePredictions(self, self.format.encode(inputs, None), batch_size, progress)

    def columns(self, all_classes: bool = False) -> list[str]:
        """The names in `ImagePrediction.to_columns`."""
        none = {name: [torch.empty(0, task.size)] for name, task in self._of_images.items()}
        return list(Predictions.of(self._of_images, none, None).to_columns(all_classes))

    def evaluate(self, inputs: Any, batch_size: int = BATCH_SIZE, progress: bool | None = None) -> dict[str, float]:
        """The metrics of the run, on a table that has the labels' columns of the training data.

        Args:
            inputs: a table, as for `predict`. Of the packaged data sets: with a column `image` and one for each task,
                of its name: files as `hf_bilb.data.dense.nyuv2` has them, and names of classes of whole images. A task
                whose column is not there is not measured.
            batch_size, progress: as for `predict`.

        Returns:
            metric -> value, as of `LoadedModel.evaluate`. Pixels are measured in the size of training, as in the run.

        Raises:
            OptionError: as for `predict`; no column of any task; a label that is none, or of another size than its
                image.
        """
        check_batch_size(batch_size)
        encoded = self.format.encode(inputs, None, with_labels=True)
        outputs = self._outputs(encoded, batch_size, progress)
        return measured(self._metrics(), outputs, self._label_names, num_batches(encoded, batch_size))

    @property
    def metric_infos(self) -> tuple[MetricInfo, ...]:
        """Title, unit and direction of every metric of `evaluate`."""
        metrics = self._metrics()
        return metrics.facts if isinstance(metrics, DenseMetrics) else metrics.infos

    # ----------------------------------------------------------------------------------------------------------------

    @property
    def directions(self) -> frozenset[str]:
        """The tasks that predict vectors of length 1."""
        return frozenset(self.tasks).intersection([] if self.format.dense is None else ["normals"])

    @property
    def _of_images(self) -> dict[str, TaskType]:
        return {name: task for name, task in self.tasks.items() if task.items == "rows"}

    @property
    def _label_names(self) -> tuple[str, ...]:
        of_pixels = tuple(pixel_tasks(self.tasks))
        if self.format.dense is not None:
            return (*of_pixels, *([IMAGE_LABELS] if self._of_images else []))
        return (*([LABELS] if self._of_images else []), *of_pixels)

    def _metrics(self) -> MixedMetrics | DenseMetrics:
        dense = self.format.dense
        if dense is None:
            chosen = {name: place.metrics for name, place in self.format.labels.items() if place.metrics is not None}
            return MixedMetrics(self.tasks, chosen, self._label_names)
        return DenseMetrics(
            tuple(self.tasks),
            self.tasks["segmentation"].size if "segmentation" in self.tasks else 0,
            dense.delta_m_base,
            dense.batch_size,
            dense.delta_m_average,
            self.tasks["depth"].unit if "depth" in self.tasks else "",
            {name: task.size for name, task in self._of_images.items()},
        )

    def _outputs(self, encoded: Encoded, batch_size: int, progress: bool | None) -> Iterator[tuple[Any, Any]]:
        """Each batch with its logits."""
        withheld = (SIZES, LABELS, IMAGE_LABELS, *pixel_tasks(self.tasks))
        return outputs_of(self.model, encoded, batch_size, progress, withheld)

    def _by_task(self, logits: Tensor | tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Each task's outputs, `[B, ...]`; of one task its tensor will do."""
        entries = (logits,) if isinstance(logits, Tensor) else logits
        if len(entries) < len(self.tasks):
            raise CheckpointError(f"{self.folder}: the model gives {len(entries)} outputs, its tasks {len(self.tasks)}")
        return dict(zip(self.tasks, entries, strict=False))

    def __repr__(self) -> str:
        return f"LoadedPixelModel({str(self.folder)!r}, tasks {', '.join(self.tasks)})"


class ImagePredictions:
    """Predictions of N images, an `ImagePrediction` each, which are made while one iterates; `len` is N.

    To iterate again is to compute again. `[one] = model.predict([image])` takes the prediction of one image.
    """

    def __init__(self, model: LoadedPixelModel, encoded: Encoded, batch_size: int, progress: bool | None) -> None:
        self._model, self._encoded, self._batch_size, self._progress = model, encoded, batch_size, progress

    @property
    def tasks(self) -> Mapping[str, TaskType]:
        """Name -> type."""
        return self._model.tasks

    def __len__(self) -> int:
        return len(self._encoded)

    def __iter__(self) -> Iterator[ImagePrediction]:
        model = self._model
        for batch, logits in model._outputs(self._encoded, self._batch_size, self._progress):
            found = {name: output.float().cpu() for name, output in model._by_task(logits).items()}
            for place, (height, width) in enumerate(batch[SIZES].tolist()):
                # A copy: a view would keep the whole batch.
                outputs = {name: output[place].clone() for name, output in found.items()}
                yield ImagePrediction(model.tasks, outputs, (height, width), model.directions)

    def __repr__(self) -> str:
        return f"ImagePredictions({len(self)} images, tasks {', '.join(self._model.tasks)})"
