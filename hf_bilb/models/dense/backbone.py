"""A pretrained backbone with a light decoder and a head for each dense task, and for each task of whole images.

    maps_1 .. maps_n = encoder((pixel_values - mean) / std)            any backbone of transformers' AutoBackbone
    common           = relu(norm(sum_i upsample(conv1_i(maps_i))))     D channels, a quarter of the frame
    features_k       = relu(norm(conv3_k(common)))                     D channels for each dense task
    dense task       = upsample(conv1_k(features_k))                   the frame's size
    image features_k = relu(norm(linear_k(mean over the frame of maps_n)))   D numbers for each task of whole images
    image task       = linear_k(image features_k)

The norm of image features is over the D numbers of a task. Without it they die: means of maps behind a ReLU are above
zero, so that one step of Adam moves all D numbers by the same sign, further than they differ.

A decoder in the way of SegFormer's (Xie et al., NeurIPS 2021): a sum of projected maps is a 1 x 1 convolution of all of
them together. Upsampling is bilinear, norm is group normalisation: the decoder has no batch statistics. Those of the
encoder, in ResNets, see the images of their own process (`torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)` changes
that on GPUs). The branches of all tasks run as one convolution, each group of the normalisation within one task.

The tasks are given in one of two ways: as `tasks` of any types of rows and pixels (`hf_bilb.losses.task_types`), what
data of one's own dictate, or as the papers' tasks `segmentation`, `depth` and `normals`, and `image_tasks` with one
class per image, with their losses (`hf_bilb.losses.dense`).

Pixels come in [0, 1]; the mean and standard deviation of the encoder's image processor are in the config, and applied
in here. One model may have tasks of both kinds, and every image labels of some of them only; without a dense task there
is no decoder.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoBackbone, AutoConfig, PretrainedConfig

from hf_bilb.config.options import unknown_name
from hf_bilb.errors import MissingPackageError, OptionError, TaskLossError
from hf_bilb.losses.contract import check_task_names
from hf_bilb.losses.dense import DENSE_TASKS, IMAGE_LABELS, check_dense_task, labels_by_task
from hf_bilb.losses.mixed import MixedLosses
from hf_bilb.losses.task_types import LABELS, PIXEL_TYPES, ROW_TYPES, TaskType, have_one_output, pixel_tasks
from hf_bilb.models.base import check_size
from hf_bilb.models.dense.layers import DenseModel, TaskConv2d, TaskOutputs, dense_task_types, finished
from hf_bilb.models.lora import LoraOptions, add_encoder_lora
from hf_bilb.models.outputs import KEYS_TO_IGNORE_AT_INFERENCE, MultiTaskOutput
from hf_bilb.models.pretrained import (
    EncoderModel,
    as_encoder_config,
    check_normalization,
    load_pretrained,
    normalization_of,
    normalized,
    read_encoder_config,
    read_image_processor,
    take_encoder,
)
from hf_bilb.models.quantization import Quantization, check_needs_lora, loading_arguments, quantization_config
from hf_bilb.models.spec import ModelSpec
from hf_bilb.models.tasks import Tasks, TasksConfig

_STRIDE = 4  # of the maps that the decoder works on
_MOST_GROUPS = 32  # of a group normalisation
_MOST_STAGES = 4  # that the decoder reads, where the recipe does not say which
#: Layers that some backbones put between a pretrained encoder and its maps; no file of the encoder has them.
_NEW_LAYERS = "hidden_states_norms."


@dataclass(frozen=True)
class DenseBackboneOptions:
    """What a recipe's `model:` section may set.

    Attributes:
        encoder: a name on the hub (`microsoft/resnet-50`, `facebook/dinov2-base`), a folder, or `package:<module>`; or
            a mapping with `model_type` and that config's arguments, for fresh weights.
        stages: of the encoder whose maps the decoder reads; null: all of up to four, else four equally far apart.
        decoder_size: channels D of the decoder and of each task's branch.
        lora: options of LoRA, with which only the adapters, the decoder and the heads are trained; null = everything
            is. For most image models `target_modules` has to name the layers; without it an error lists them.
        quantization: `4bit` or `8bit`, of the encoder's weights under LoRA; needs a CUDA GPU and bitsandbytes.
    """

    encoder: str | dict[str, Any]
    stages: tuple[str, ...] | None = None
    decoder_size: int = 128
    lora: LoraOptions | None = None
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        check_size("decoder_size", self.decoder_size)
        if self.lora is not None and not isinstance(self.encoder, str):
            raise OptionError("lora: adapters need pretrained weights to stand on, expected null for a fresh encoder")
        check_needs_lora(self.quantization, self.lora)


class DenseBackboneConfig(TasksConfig):
    """What `DenseBackboneModel` is made of; it holds the encoder's whole config, so a saved model needs nothing else.

    Args:
        encoder_config: of the backbone, or a mapping with its `model_type`; None is ResNet's default.
        task_names: the K tasks in order, the names of `tasks`; without `tasks` of `segmentation`, `depth`, `normals`
            and of `image_tasks`. None: as they stand there.
        num_classes: of the papers' segmentation.
        image_tasks: task -> number of classes, of the tasks with one class per image, without `tasks`.
        stages: of the encoder, whose maps the decoder reads; see `DenseBackboneOptions`. Image tasks read the last,
            and without a decoder it is the only one.
        decoder_size: channels D; 2 at least with image tasks.
        image_mean, image_std: of each colour, that the encoder wants taken off and divided by; pixels are in [0, 1].
        encoder_name: where the encoder's weights came from; with LoRA they are not saved, and come from there again.
        quantization: that they were loaded with.
        tasks: name -> type, or that as a dict, of rows (images) and pixels; None or empty: the tasks are the papers'.
        image_size: height and width of the images that it is trained on, where they are all the same.
        kwargs: what `PretrainedConfig` takes.

    Attributes:
        num_router_features: K D, what a feature router sees.

    Raises:
        OptionError: tasks or stages that are not known, numbers that do not fit.
    """

    model_type = "dense_backbone"
    sub_configs: ClassVar[dict[str, Any]] = {"encoder_config": AutoConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = list(KEYS_TO_IGNORE_AT_INFERENCE)
    supported_types: ClassVar[tuple[str, ...]] = (*ROW_TYPES, *PIXEL_TYPES)

    def __init__(
        self,
        encoder_config: PretrainedConfig | Mapping[str, Any] | None = None,
        task_names: Sequence[str] | None = None,
        num_classes: int = 13,
        image_tasks: Mapping[str, int] | None = None,
        stages: Sequence[str] | None = None,
        decoder_size: int = DenseBackboneOptions.decoder_size,
        image_mean: Sequence[float] = (0.0, 0.0, 0.0),
        image_std: Sequence[float] = (1.0, 1.0, 1.0),
        encoder_name: str | None = None,
        quantization: Quantization | None = None,
        tasks: Tasks | None = None,
        image_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        check_size("num_classes", num_classes)
        check_size("decoder_size", decoder_size)
        check_normalization(image_mean, image_std)
        given = dict(image_tasks or {})
        if tasks:
            if given:
                raise OptionError(f"image_tasks: {', '.join(given)} do not go with tasks, which has all of them")
            self.set_tasks(tasks, task_names)
        else:
            self.tasks = {}
            self.task_names = list(check_task_names(DENSE_TASKS if task_names is None else task_names))
            _check_tasks(self.task_names, given)
        # A config's file sorts its keys: the order is that of the task names.
        self.image_tasks = {name: given[name] for name in self.task_names if name in given}
        self.num_classes = num_classes
        pixel_tasks(self.task_types)  # whether their labels can have columns
        if self.row_tasks and decoder_size < 2:
            raise OptionError(f"decoder_size: {decoder_size} is not valid with image tasks, expected 2 or more")
        self.encoder_config = copy.deepcopy(as_encoder_config(encoder_config, "resnet"))
        self.stages = _set_stages(self.encoder_config, stages)
        if not self.dense_tasks:  # maps that nobody reads may have layers of their own, which would not be trained
            self.stages = _set_stages(self.encoder_config, self.stages[-1:])
        self.image_size = image_size
        self.decoder_size = decoder_size
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.encoder_name = encoder_name
        self.quantization = quantization
        self.num_router_features = len(self.task_names) * decoder_size
        super().__init__(**kwargs)

    @property
    def task_types(self) -> dict[str, TaskType]:
        """Name -> type, in order; of the papers' tasks the one with as many outputs, though their losses are others."""
        if self.tasks:
            return super().task_types
        of_images = {name: TaskType("classification", classes) for name, classes in self.image_tasks.items()}
        known = {**dense_task_types(self.num_classes), **of_images}
        return {name: known[name] for name in self.task_names}

    @property
    def dense_tasks(self) -> list[str]:
        """Those of `task_names` that have a label at every pixel, in order."""
        return [name for name, task in self.task_types.items() if task.items == "pixels"]

    @property
    def row_tasks(self) -> list[str]:
        """Those that have labels of whole images, in order."""
        return [name for name, task in self.task_types.items() if task.items == "rows"]


def _check_tasks(task_names: Sequence[str], image_tasks: Mapping[str, int]) -> None:
    for name, classes in image_tasks.items():
        check_size(f"image_tasks.{name}", classes)
        if name in DENSE_TASKS:
            raise OptionError(f"image_tasks: {name!r} is the name of a task with a label at every pixel")
        if name not in task_names:
            raise OptionError(f"image_tasks: {name!r} is not among task_names {list(task_names)}")
    for name in task_names:
        if name not in image_tasks:
            check_dense_task(name)


def _set_stages(encoder_config: PretrainedConfig, stages: Sequence[str] | None) -> list[str]:
    """Make the backbone return the maps of `stages`, or of those that are chosen for None."""
    known = list(_backbone_stages(encoder_config))[1:]  # the first is what stands before the stages
    chosen = list(stages or ())
    for name in chosen:
        if name not in known:
            raise unknown_name("stages", name, known)
    if not chosen:
        number = min(len(known), _MOST_STAGES)
        chosen = [known[len(known) * (i + 1) // number - 1] for i in range(number)]
    # The backbone returns them in its own order.
    encoder_config.out_features = [name for name in known if name in chosen]
    return list(encoder_config.out_features)


def _backbone_stages(encoder_config: PretrainedConfig, path: str = "encoder") -> Sequence[str]:
    if type(encoder_config) not in AutoBackbone._model_mapping:
        raise OptionError(
            f"{path}: {encoder_config.model_type!r} is no backbone of transformers' AutoBackbone, expected one "
            "such as resnet, convnext, swin, dinov2, pvt_v2"
        )
    names: Sequence[str] = encoder_config.stage_names
    return names


class DenseBackboneModel(EncoderModel, DenseModel):
    """Predicts dense tasks and classes of whole images from one image.

    Cost: one forward and one backward pass of the encoder whatever K is; the decoder works at a quarter of the frame,
    its branches are one convolution. Gradient checkpointing is the encoder's, where it knows it.
    """

    config_class = DenseBackboneConfig
    base_model_prefix = "dense_backbone"
    encoder_arguments = (
        "tasks", "task_names", "num_classes", "image_tasks", "image_size", "stages", "decoder_size",
    )  # fmt: skip

    def __init__(self, config: DenseBackboneConfig) -> None:
        super().__init__(config)
        types, size = config.task_types, config.decoder_size
        self._dense, self._of_rows = dense, of_rows = config.dense_tasks, config.row_tasks
        self._one_tensor = bool(config.tasks) and have_one_output(types)
        self._losses = MixedLosses(types) if config.tasks else None
        groups = math.gcd(size, _MOST_GROUPS)
        self.encoder = AutoBackbone.from_config(config.encoder_config)
        channels = self.encoder.channels
        if dense:
            self.projections = nn.ModuleList(nn.Conv2d(inputs, size, 1) for inputs in channels)
            self.common_norm = nn.GroupNorm(groups, size)
            self.branches = TaskConv2d(size, size, 3, len(dense), shared_input=True)
            self.branch_norm = nn.GroupNorm(len(dense) * groups, len(dense) * size)
            self.heads = TaskOutputs(size, [types[name].size for name in dense])
        if of_rows:
            self.image_branches = nn.Linear(channels[-1], len(of_rows) * size)
            self.image_norm = nn.GroupNorm(len(of_rows), len(of_rows) * size)
            self.image_heads = TaskOutputs(size, [types[name].size for name in of_rows])
        self.post_init()

    @classmethod
    def read_encoder(cls, encoder: str, path: str) -> tuple[str, PretrainedConfig]:
        """As `EncoderModel.read_encoder`, of a backbone of `AutoBackbone`."""
        folder, config = read_encoder_config(encoder, path)
        _backbone_stages(config, path)
        return folder, config

    @classmethod
    def from_encoder(
        cls, encoder: str, path: str = "encoder", quantization: Quantization | None = None, **arguments: Any
    ) -> DenseBackboneModel:
        """A model with the pretrained weights of `encoder` in float32, and a fresh decoder and heads.

        Its image processor's mean and standard deviation are taken over where there is one; else pixels stay in [0, 1].

        Args:
            encoder: a name on the hub, a folder, or `package:<module>`.
            path: the option it stands in, for messages.
            quantization: of its weights.
            arguments: of `DenseBackboneConfig`, but for the encoder's.

        Raises:
            OptionError: one line, when it cannot be loaded, is no backbone of `AutoBackbone`, or cannot be quantised
                here.
            MissingPackageError: its package, or bitsandbytes, is not installed.
        """
        quantized = quantization_config(quantization, "quantization")
        folder, encoder_config = cls.read_encoder(encoder, path)
        facts: dict[str, Any] = {**normalization_of(read_image_processor(folder)), **arguments}
        config = DenseBackboneConfig(encoder_config, encoder_name=encoder, quantization=quantization, **facts)
        model = cls(config)
        # Not by `AutoBackbone.from_pretrained`, which takes every folder for a model of timm.
        backbone_class = AutoBackbone._model_mapping[type(config.encoder_config)]
        loading = loading_arguments(quantized)
        pretrained = load_pretrained(
            backbone_class, encoder, folder, config.encoder_config, path, _NEW_LAYERS, **loading
        )
        take_encoder(model, pretrained, quantized is not None)
        return model

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        image_labels: Tensor | None = None,
        return_dict: bool | None = None,
        **pixel_labels: Tensor | None,
    ) -> MultiTaskOutput | tuple[Tensor, ...]:
        """Predictions, and with labels of any task the losses.

        Args:
            pixel_values: `[B, 3, H, W]` in [0, 1], RGB.
            labels: of a model with `tasks`: `[B, W]`, those of the tasks of rows, NaN where missing.
            image_labels: of one with the papers' tasks: int64 `[B, M]`, classes of the M `image_tasks` in the order of
                `task_names`, -1 where missing.
            return_dict: False for a plain tuple of what is there; None follows the config.
            pixel_labels: the labels of the other tasks by their names. With `tasks`: `segmentation` int64 `[B, H, W]`,
                below 0 where missing, `dense_regression` `[B, D, H, W]`, NaN where missing. The papers': `segmentation`
                int64 `[B, H, W]`, -1 where not labelled; `depth` `[B, H, W]`, 0 where not measured; `normals`
                `[B, 3, H, W]`, unit vectors, (0, 0, 0) where not known.

        Returns:
            `MultiTaskOutput`: `logits`, a tuple in the order of the tasks: `[B, C, H, W]` logits of classes,
            `[B, D, H, W]` numbers, the papers' depth `[B, H, W]` and normals `[B, 3, H, W]` of length 1, `[B, size]`
            for a task of rows; one tensor `[B, K]` where all tasks are of rows with one output each. With labels also
            `losses [K]`, `num_items [K]` and `router_features [B, K D]`, each task's pooled features.

        Raises:
            TaskLossError: labels of a task that the model does not have, or of the wrong shape.
        """
        config = self.config
        self._check_columns(labels, image_labels, pixel_labels)
        maps = self.encoder(pixel_values=normalized(pixel_values, config.image_mean, config.image_std)).feature_maps
        predictions: dict[str, Tensor] = {}
        pooled: dict[str, Tensor] = {}
        if self._dense:
            frame = pixel_values.shape[-2:]
            dense = self._dense_features(maps, frame)
            for name, out in zip(self._dense, self.heads(dense), strict=True):
                predictions[name] = functional.interpolate(out, size=frame, mode="bilinear")
            pooled.update(self._by_task(self._dense, dense.mean(dim=(2, 3))))
        if self._of_rows:
            images = functional.relu(self.image_norm(self.image_branches(maps[-1].mean(dim=(2, 3)))))
            outputs = self.image_heads(images[..., None, None])
            predictions.update({name: out.flatten(1) for name, out in zip(self._of_rows, outputs, strict=True)})
            pooled.update(self._by_task(self._of_rows, images))
        features = torch.cat([pooled[name] for name in config.task_names], dim=1)
        if self._losses is not None:
            losses = self._typed_losses(self._losses, predictions, labels, pixel_labels)
            by_task = tuple(predictions[name] for name in config.task_names)
            logits = torch.cat(by_task, dim=1) if self._one_tensor else by_task
            return self._output(logits, losses, features, return_dict, shared=False)
        predictions = {name: finished(name, out) for name, out in predictions.items()}
        of_tasks = labels_by_task({**pixel_labels, IMAGE_LABELS: image_labels}, list(config.image_tasks))
        return self._dense_output(predictions, of_tasks, features, return_dict, list(config.image_tasks))

    def _check_columns(
        self, labels: Tensor | None, image_labels: Tensor | None, pixel_labels: Mapping[str, Tensor | None]
    ) -> None:
        """Raise `TaskLossError` for labels that no task has."""
        config = self.config
        known = {name: name in self._dense for name in pixel_labels}
        known |= {LABELS: bool(config.tasks and self._of_rows), IMAGE_LABELS: bool(config.image_tasks)}
        given = {**pixel_labels, LABELS: labels, IMAGE_LABELS: image_labels}
        for name, values in given.items():
            if values is not None and not known[name]:
                tasks = ", ".join(config.task_names)
                raise TaskLossError(f"{name}: labels are given, but the model's tasks are {tasks}")

    def _typed_losses(
        self,
        losses: MixedLosses,
        predictions: Mapping[str, Tensor],
        labels: Tensor | None,
        pixel_labels: Mapping[str, Tensor | None],
    ) -> tuple[Tensor, Tensor] | None:
        """Losses and numbers of items of a model with `tasks`; None without labels of any task."""
        if labels is None and all(values is None for values in pixel_labels.values()):
            return None
        of_rows = [predictions[name] for name in self._of_rows]
        pixels = [predictions[name] for name in self._dense]
        rows = torch.cat(of_rows, dim=1) if of_rows else None
        return losses.of_joined(rows, None, labels, None, pixels, pixel_labels)

    def _dense_features(self, maps: Sequence[Tensor], frame: Sequence[int]) -> Tensor:
        """What the dense heads read, the tasks side by side: `[B, K D, H / 4, W / 4]`."""
        size = [math.ceil(length / _STRIDE) for length in frame]
        projected = [
            functional.interpolate(projection(part), size=size, mode="bilinear")
            for projection, part in zip(self.projections, maps, strict=True)
        ]
        common = functional.relu(self.common_norm(sum(projected[1:], start=projected[0])))
        return functional.relu(self.branch_norm(self.branches(common)))

    def _by_task(self, names: Sequence[str], features: Tensor) -> dict[str, Tensor]:
        """Task -> `[B, D]` of `[B, K D]`."""
        return dict(zip(names, features.split(self.config.decoder_size, dim=1), strict=True))


def build_dense_backbone(
    options: DenseBackboneOptions,
    *,
    tasks: Tasks | None = None,
    image_size: int | None = None,
    task_names: Sequence[str] | None = None,
    num_classes: int = 13,
    image_tasks: Mapping[str, int] | None = None,
) -> DenseBackboneModel | PeftModel:
    """The model of a recipe.

    Args:
        options: the recipe's.
        tasks, image_size, task_names, num_classes, image_tasks: of `DenseBackboneConfig`, from the data.

    Raises:
        OptionError: an encoder that cannot be loaded or is no backbone; stages, or layers for LoRA, that it does not
            have; quantised weights without a GPU.
        MissingPackageError: its package, or bitsandbytes, is not installed.
    """
    arguments: dict[str, Any] = {
        "tasks": tasks,
        "image_size": image_size,
        "task_names": task_names,
        "num_classes": num_classes,
        "image_tasks": image_tasks,
        "stages": options.stages,
        "decoder_size": options.decoder_size,
    }
    try:
        if isinstance(options.encoder, str):
            model = DenseBackboneModel.from_encoder(options.encoder, quantization=options.quantization, **arguments)
        elif "model_type" in options.encoder:
            model = DenseBackboneModel(DenseBackboneConfig(options.encoder, **arguments))
        else:
            raise OptionError(f"encoder.model_type: is required, got {', '.join(options.encoder) or 'nothing'}")
    except (OptionError, MissingPackageError) as error:
        raise type(error)(f"model.{error}") from None
    return model if options.lora is None else add_encoder_lora(model, options.lora)


SPEC = ModelSpec(DenseBackboneConfig, DenseBackboneModel, options=DenseBackboneOptions, build=build_dense_backbone)
