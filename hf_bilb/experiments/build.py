"""What a run consists of, made from its recipe: data options, training arguments, model, Trainer."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import TrainerCallback

from hf_bilb.config.options import nearest, parse_options
from hf_bilb.config.user_code import load_reference, own_code
from hf_bilb.data import DATA_SETS, TaskData
from hf_bilb.errors import HfBilbError, OptionError
from hf_bilb.experiments.recipe import Recipe
from hf_bilb.inference.saved import model_files
from hf_bilb.models import MODELS, ModelSpec, PlainModelSpec
from hf_bilb.models.pretrained import EncoderModel
from hf_bilb.models.torch_module import check_columns
from hf_bilb.storage.weights import check_savable
from hf_bilb.trainer.arguments import BilevelMTLTrainingArguments
from hf_bilb.trainer.checks import check_reporting
from hf_bilb.trainer.trainer import BilevelMTLTrainer


@contextlib.contextmanager
def preparing(section: str, begun: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Whatever fails before the first step is one line with the recipe's section: nothing is lost, and it is mostly the
    recipe's settings that a library or somebody's own code stumbles over. The error itself is the line's cause."""
    try:
        yield
    except (HfBilbError, MemoryError, torch.OutOfMemoryError, BrokenProcessPool):
        raise
    except (Exception, SystemExit) as error:
        if begun():
            raise
        place = own_code(error)
        where = f"{place}: " if place is not None else ""
        raise OptionError(f"{section}: {where}{type(error).__name__}: {error}") from error


def resolve_data_options(recipe: Recipe) -> Any:
    """The options of the recipe's data set; those that are null and follow the model take the model's value.

    Raises:
        OptionError: the model has no such option, so the data set's is required.
    """
    spec = DATA_SETS[recipe.data["name"]]
    options = _without_name(recipe.data)
    from_model = spec.from_model(options) if callable(spec.from_model) else spec.from_model
    for key, of_model in from_model.items():
        if options[key] is None:
            if of_model not in recipe.model:
                name = recipe.model["name"]
                raise OptionError(f"data.{key}: is required, since the model {name!r} has no option {of_model!r}")
            options[key] = recipe.model[of_model]
    return parse_options(spec.options, options, "data")


def load_data(recipe: Recipe, options: Any) -> TaskData:
    """The recipe's data set with its checked options; one process prepares the cache, the others read it.

    Raises:
        OptionError: whatever is the matter, as a line of the section `data`; a part without rows.
    """
    with PartialState().local_main_process_first(), preparing("data"):
        data = DATA_SETS[recipe.data["name"]].load(options)
        _check_parts(data)
    return data


def _check_parts(data: TaskData) -> None:
    """Raise `OptionError` for a part without rows; training would end before its first step, or measure nothing."""
    parts = {"training": data.train, "validation": data.validation, "test": data.test}
    if empty := [name for name, part in parts.items() if len(part) == 0]:  # type: ignore[arg-type]  # map-style
        raise OptionError(f"data: the {empty[0]} part has no rows")


def check_model(recipe: Recipe) -> None:
    """See, before any data are read, that the model takes what the options of the data ask for.

    Raises:
        OptionError: it does not; names the models that do. Or its pretrained encoder is not there, or is of texts
            where the model takes images.
    """
    model = recipe.model["name"]
    for key, argument in DATA_SETS[recipe.data["name"]].model_needs.items():
        able = [name for name, spec in MODELS.items() if argument in _arguments(spec)]
        if recipe.data[key] is not None and model not in able:
            raise OptionError(
                f"data.{key}: {recipe.data[key]!r} asks for a model that takes {argument}, which {model!r} does not, "
                f"expected {' or '.join(able)}"
            )
    _check_task_types(recipe.data.get("tasks"), model)
    _check_encoder(recipe.model)


def _check_encoder(section: Mapping[str, Any]) -> None:
    """Raise `OptionError` where the pretrained encoder is not there, or is none for the inputs of the model."""
    encoder, spec = section.get("encoder"), MODELS[section["name"]]
    if isinstance(encoder, str) and isinstance(spec, ModelSpec) and issubclass(spec.model_class, EncoderModel):
        with preparing("model"):
            spec.model_class.read_encoder(encoder, "model.encoder")


def _check_task_types(tasks: Any, model: str) -> None:
    """Raise `OptionError` for a task, of data that say what type each is, that the model does not have."""
    known = _supported_types(model)
    types = {name: task["type"] for name, task in tasks.items()} if isinstance(tasks, Mapping) else {}
    for name, kind in types.items():
        if known is None or kind in known:
            continue
        able = [other for other in MODELS if kind in (_supported_types(other) or ())]
        raise OptionError(
            f"data.tasks.{name}.type: the model {model!r} has no {kind} (it has {', '.join(known)}), expected the "
            f"model {' or '.join(able)}"
        )


def _supported_types(model: str) -> tuple[str, ...] | None:
    """The types of tasks that a model has; None: it does not say."""
    spec = MODELS[model]
    config_class = spec.config_class if isinstance(spec, ModelSpec) else None
    return getattr(config_class, "supported_types", None)


def _arguments(spec: ModelSpec | PlainModelSpec) -> Collection[str]:
    """What a model names of what data may dictate; the rest, `PretrainedConfig` would swallow."""
    build = spec.build if isinstance(spec, PlainModelSpec) else spec.build or spec.config_class
    return inspect.signature(build).parameters


def training_arguments(recipe: Recipe, data: TaskData | None = None) -> BilevelMTLTrainingArguments:
    """The recipe's `trainer` and `balancer` sections as training arguments; with `data`, its tasks and label columns.

    Raises:
        OptionError: one line, for settings that do not fit together.
        MissingPackageError: a package that `report_to` needs is not installed.
    """
    settings = dict(recipe.trainer)
    if data is not None:
        settings.update(task_names=list(data.task_names), label_names=list(data.label_names))
        settings.setdefault("batch_eval_metrics", data.metrics_by_batch)
        _settle_best_metric(settings, data)
    try:
        args = BilevelMTLTrainingArguments(**settings, balancer=recipe.balancer)
    except Exception as error:  # of transformers: whatever it makes of settings that do not fit together
        raise OptionError(f"trainer: {error}") from None
    check_reporting(args.report_to, "trainer.report_to")
    return args


def _settle_best_metric(settings: dict[str, Any], data: TaskData) -> None:
    """The data set knows which way up its metrics are, so that no recipe has to say `greater_is_better`."""
    name = settings.get("metric_for_best_model")
    if name is None:
        return
    key = name.removeprefix("eval_")
    known = {metric.key: metric.higher_is_better for metric in data.metrics}
    losses = ["loss", *(f"loss_{task}" for task in data.task_names)]
    if key not in (*known, *losses):
        raise OptionError(
            f"trainer.metric_for_best_model: {name!r} is not measured on these data{nearest(key, [*known, *losses])}"
        )
    upwards = known.get(key, False)
    if settings.setdefault("greater_is_better", upwards) not in (None, upwards):
        better = "higher" if upwards else "lower"
        raise OptionError(
            f"trainer.greater_is_better: {not upwards} is wrong for {name!r}, which is better when {better}"
        )
    settings["greater_is_better"] = upwards


def build_model(recipe: Recipe, data: TaskData) -> nn.Module:
    """The recipe's model with fresh or pretrained weights; what the data dictate (sizes, task names) goes into it."""
    spec = MODELS[recipe.model["name"]]
    options = _without_name(recipe.model)
    if spec.build is not None:
        try:
            inspect.signature(spec.build).bind(spec.options, **data.model_arguments)
        except TypeError as error:
            raise OptionError(f"model.name: {recipe.model['name']!r} is no model for these data ({error})") from None
    if isinstance(spec, PlainModelSpec):
        model = spec.build(parse_options(spec.options, options, "model"), **data.model_arguments)
        rows = [data.train[0]]
        batch = rows[0] if data.data_collator is None else data.data_collator(rows)
        check_columns(model, batch, data.label_names)
        check_savable(model)
        return model
    if spec.build is not None:
        return spec.build(parse_options(spec.options, options, "model"), **data.model_arguments)
    known = _arguments(spec)
    if odd := next((key for key in data.model_arguments if key not in known), None):
        names = f"the model {recipe.model['name']!r} and the data {recipe.data['name']!r}"
        raise OptionError(f"model.name: {names} do not go together (the model has no {odd})")
    return spec.model_class(spec.config_class(**options, **data.model_arguments))


def task_loss_func(recipe: Recipe, data: TaskData) -> Callable[..., Any] | None:
    """The data set's losses, for a model that returns predictions alone; None for one with losses of its own.

    Raises:
        OptionError: the data set has none.
    """
    name = recipe.model["name"]
    if not isinstance(MODELS[name], PlainModelSpec):
        return None
    if data.task_loss_func is None:
        raise OptionError(
            f"model.name: {name!r} returns predictions alone, and the data set {recipe.data['name']!r} has no losses "
            "for them"
        )
    return data.task_loss_func


def build_callbacks(recipe: Recipe) -> list[TrainerCallback]:
    """What `callbacks` of the recipe names, made without arguments.

    Raises:
        OptionError: something that cannot be made so, or that is no `transformers.TrainerCallback`.
    """
    made = []
    for i, reference in enumerate(recipe.callbacks):
        path = f"callbacks[{i}]"
        try:
            callback = load_reference(reference, path)()
        except TypeError as error:
            raise OptionError(f"{path}: {reference} cannot be made without arguments: {error}") from error
        if not isinstance(callback, TrainerCallback):
            got = type(callback).__name__
            raise OptionError(f"{path}: {reference} makes a {got}, expected a transformers.TrainerCallback")
        made.append(callback)
    return made


def build_trainer(recipe: Recipe, data: TaskData, callbacks: Sequence[TrainerCallback] = ()) -> BilevelMTLTrainer:
    """The recipe's Trainer, with its model and these data; `callbacks` are added to its own."""
    with preparing("model"):
        model = build_model(recipe, data)
    with preparing("trainer"):
        args = training_arguments(recipe, data)
        if recipe.trainer.get("hub_strategy", "end") == "end":
            args.push_to_hub = False  # the run pushes when it is measured; Trainer would, before it
        trainer = BilevelMTLTrainer(
            model=model,
            args=args,
            train_dataset=data.train,
            eval_dataset=data.validation,
            data_collator=data.data_collator,
            compute_metrics=data.compute_metrics,
            processing_class=data.processing_class,
            task_item_counts=data.task_item_counts,
            task_loss_func=task_loss_func(recipe, data),
            callbacks=list(callbacks),
        )
    trainer.model_files = model_files(recipe.model, recipe.data["name"], data, model)
    return trainer


def _without_name(section: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key != "name"}
