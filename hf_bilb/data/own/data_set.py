"""Data of one's own: columns of files become inputs and tasks.

    data:
      name: table
      files: {train: reviews/train-*.jsonl, test: reviews/test.csv}
      inputs: {text: [title, body]}
      tasks:
        stars: {type: regression, unit: stars}
        topic: {type: classification}

A row may have labels of some of the tasks; a row without any is left out of the training part. Or every task has rows
of its own (`files` or `hub` in it): then they are joined into one set, each row with the labels of its task, and
`task_ids` says which one that is, for `trainer.task_sampling`.

A batch has the columns `input_ids`, `attention_mask` (and `token_type_ids`) of texts, `pixel_values` of images, or
`numeric` and `categorical` of tables; and `labels` and `tag_labels`, as `hf_bilb.losses.task_types` has them.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_bilb.data.images.rows import ImageRows
from hf_bilb.data.inputs.format import DataFormat
from hf_bilb.data.inputs.kinds import ImageInputs, InputKind, LabelColumns, TextInputs
from hf_bilb.data.own.images import decoded_images
from hf_bilb.data.own.joined import Joined, join_sources
from hf_bilb.data.own.options import OwnDataOptions
from hf_bilb.data.own.summary import summary
from hf_bilb.data.own.table import Encoder, read_cells
from hf_bilb.data.own.text import Texts, check_lengths, read_texts, tokenize_texts
from hf_bilb.data.rows import Rows, VectorRows, collate_images, collate_vectors
from hf_bilb.data.splits import PARTS
from hf_bilb.data.task_data import DataSetSpec, TaskData
from hf_bilb.data.text.rows import PadTokens, TokenRows
from hf_bilb.data.text.tokenization import check_max_length, load_tokenizer
from hf_bilb.errors import OptionError
from hf_bilb.losses.mixed import MixedLosses
from hf_bilb.losses.task_types import LABELS, TAG_LABELS, TaskType
from hf_bilb.metrics.mixed import MixedMetrics, trivial_metrics

logger = logging.getLogger(__name__)


def load_own_data(options: OwnDataOptions) -> TaskData:
    """The tables with their inputs and labels; says in `summary` how many labels each task has in each part.

    Raises:
        OptionError: what is wrong in the files, in one line with file, row (the first one is 1) and column.
        MissingPackageError: the tokenizer's package is not installed.

    Cost: reading by `datasets`, the first time a second for some 500,000 rows of text files, later ones from its
    cache. Texts are tokenized at every start, about 20,000 a second; images are decoded once (`prepare_images`).
    """
    joined = join_sources(options)
    _warn_of_unmeasured(joined)
    build = {"text": _text_inputs, "image": _image_inputs, "table": _table_inputs}[options.kind]
    inputs = build(joined, options)
    for part, rows in inputs.parts.items():
        rows.task_ids = joined.task_ids(part)
    return _task_data(joined, inputs, options)


# --- inputs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """The parts with inputs and labels.

    Attributes:
        parts: part -> rows.
        collator: makes a batch of them.
        kind: how rows become inputs, for the saved model.
        model_arguments: what the inputs dictate to the model.
        processing_class: the tokenizer; None: there is none.
    """

    parts: Mapping[str, Rows]
    collator: Callable[[list[Any]], dict[str, Any]]
    kind: InputKind
    model_arguments: dict[str, Any]
    processing_class: Any = None


def _table_inputs(joined: Joined, options: OwnDataOptions) -> Inputs:
    cells = list(map(read_cells, joined.sources))
    encoder = Encoder.fit(joined.sources[0].options.inputs, cells, joined.rows["train"])

    def part(name: str) -> VectorRows:
        encoded = [encoder.encode(of_source, rows) for of_source, rows in zip(cells, joined.rows[name], strict=True)]
        columns = {column: torch.cat([one[column] for one in encoded]) for column in encoded[0]}
        return VectorRows({**columns, LABELS: torch.from_numpy(joined.labels(name))})

    parts = {name: part(name) for name in PARTS}
    return Inputs(parts, collate_vectors, encoder.inputs, encoder.model_arguments)


def _image_inputs(joined: Joined, options: OwnDataOptions) -> Inputs:
    file, images = decoded_images(joined.sources, options.image_size, options.cache_dir)

    def part(name: str) -> ImageRows:
        chosen = [of_source[rows] for of_source, rows in zip(images, joined.rows[name], strict=True)]
        return ImageRows(file, np.concatenate(chosen), joined.labels(name))

    column = joined.sources[0].options.inputs.image
    assert column is not None  # of sources of this kind
    kind = ImageInputs(column, options.image_size)
    return Inputs({name: part(name) for name in PARTS}, collate_images, kind, {"image_size": options.image_size})


def _text_inputs(joined: Joined, options: OwnDataOptions) -> Inputs:
    if options.tokenizer is None:
        raise OptionError("data.tokenizer: is required where no model says it, expected a name, such as "
                          "google-bert/bert-base-uncased")  # fmt: skip
    texts = [_checked_texts(joined, number) for number in range(len(joined.sources))]
    tokenizer = load_tokenizer(options.tokenizer, "data.tokenizer", any(one.are_words for one in texts))
    check_max_length(tokenizer, options.max_length, options.tokenizer)

    def part(name: str) -> TokenRows:
        of_sources = joined.labels_by_source(name)
        return TokenRows.concatenate(
            [
                tokenize_texts(tokenizer, texts[number], rows, labels, joined.tags(number), options.max_length)
                for number, (rows, labels) in enumerate(zip(joined.rows[name], of_sources, strict=True))
            ]
        )

    columns = tuple(dict.fromkeys(source.options.inputs.texts for source in joined.sources))
    pad_token_id = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id  # the attention mask hides it
    return Inputs(
        {name: part(name) for name in PARTS},
        PadTokens(pad_token_id),
        TextInputs(columns, options.max_length, any(one.are_words for one in texts)),
        {"vocab_size": len(tokenizer), "max_length": options.max_length},
        tokenizer,
    )


def _checked_texts(joined: Joined, number: int) -> Texts:
    """The texts of a source, whose words fit its tags."""
    source = joined.sources[number]
    tagged = [name for name in joined.tagged if joined.source_of[name] == number]
    texts = read_texts(source, need_words=bool(tagged))
    for name in tagged:
        tags = joined.tasks[name].tags
        assert tags is not None
        check_lengths(source, texts, tags, source.options.tasks[name].label_columns(name)[0])
    if texts.num_empty:
        logger.warning("%s: %d rows have no text at all", source.options.path, texts.num_empty)
    return texts


def _warn_of_unmeasured(joined: Joined) -> None:
    for name, part in itertools.product(joined.tasks, ("validation", "test")):
        if not joined.num_labelled(name, part):
            logger.warning("data.tasks.%s: no row of the %s part has a label; it is not measured there", name, part)


# --- what the Trainer needs ---------------------------------------------------------------------------------------


def _task_data(joined: Joined, inputs: Inputs, options: OwnDataOptions) -> TaskData:
    types = joined.types
    chosen = {name: task.metrics for name, task in options.tasks.items() if task.metrics is not None}
    names = (*([LABELS] if joined.width else []), *([TAG_LABELS] if joined.tagged else []))
    metrics = MixedMetrics(types, chosen, names)
    losses = MixedLosses(types)
    return TaskData(
        train=inputs.parts["train"],
        validation=inputs.parts["validation"],
        test=inputs.parts["test"],
        task_names=tuple(types),
        label_names=names,
        data_collator=inputs.collator,
        compute_metrics=metrics,
        metrics=metrics.infos,
        trivial_metrics=_trivial(joined, inputs, chosen),
        model_arguments={"tasks": types, **inputs.model_arguments},
        task_item_counts=losses.count,
        metrics_by_batch=True,
        trivial_predictor="constant predictor",
        processing_class=inputs.processing_class,
        task_loss_func=losses,
        format=_format(types, inputs.kind, options),
        summary=summary(joined),
    )


def _format(types: Mapping[str, TaskType], kind: InputKind, options: OwnDataOptions) -> DataFormat:
    places = {name: LabelColumns(task.label_columns(name), task.metrics) for name, task in options.tasks.items()}
    csv = next((task.csv for task in options.tasks.values() if task.csv is not None), options.csv)
    return DataFormat(kind, types, places, csv)


def _trivial(joined: Joined, inputs: Inputs, chosen: Mapping[str, Sequence[str]]) -> dict[str, float]:
    of_train, of_test = (joined.labels(part) if joined.width else None for part in ("train", "test"))
    train, test = inputs.parts["train"], inputs.parts["test"]
    tags: tuple[Any, Any] = (None, None)
    if isinstance(train, TokenRows) and isinstance(test, TokenRows) and joined.tagged:
        # Of the training part the order of the tokens does not matter: as one row, they need no padding.
        tags = (train.columns[TAG_LABELS][None], test.padded_tag_labels())
    return trivial_metrics(joined.types, of_train, of_test, *tags, chosen)


def _tokenizer_of_model(options: Mapping[str, Any]) -> dict[str, str]:
    """Texts alone need a tokenizer."""
    asked = [options["inputs"], *(task["inputs"] for task in options["tasks"].values())]
    return {"tokenizer": "encoder"} if any(inputs and inputs["text"] for inputs in asked) else {}


SPEC = DataSetSpec(options=OwnDataOptions, load=load_own_data, from_model=_tokenizer_of_model)
