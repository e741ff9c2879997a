"""What a model sees of each row, with its labels: numbers and categories, images, or tokens."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_bilb.data.inputs.kinds import ImageInputs, InputKind, PixelInputs, TextInputs
from hf_bilb.data.own.image_rows import OwnImageRows, PixelColumn
from hf_bilb.data.own.images import decoded_images
from hf_bilb.data.own.joined import Joined
from hf_bilb.data.own.table import Cells, Encoder, read_cells
from hf_bilb.data.own.text import Texts, check_lengths, read_texts, tokenize_texts
from hf_bilb.data.own.words import other_spelling
from hf_bilb.data.rows import Rows, VectorRows, collate_images, collate_vectors
from hf_bilb.data.splits import PARTS
from hf_bilb.data.text.rows import PadTokens, TokenRows
from hf_bilb.data.text.tokenization import check_max_length, load_tokenizer
from hf_bilb.errors import OptionError
from hf_bilb.losses.task_types import LABELS

logger = logging.getLogger(__name__)


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

    @classmethod
    def of(cls, joined: Joined, part: Callable[[str], Rows], *arguments: Any) -> Inputs:
        """With the rows that `part` makes of a part's name, which know their tasks; the other attributes in order."""
        parts = {name: part(name) for name in PARTS}
        for name, rows in parts.items():
            rows.task_ids = joined.task_ids(name)
        return cls(parts, *arguments)


def table_inputs(joined: Joined) -> Inputs:
    """`numeric` and `categorical`, see `Encoder`; raises as `read_cells`."""
    cells = list(map(read_cells, joined.sources))
    encoder = Encoder.fit(joined.sources[0].options.inputs, cells, joined.rows["train"])
    for column in encoder.empty:
        logger.warning("data.inputs: column %r has no value in the training part; it is the same in all rows", column)
    for column, known in zip(encoder.categorical, encoder.categories, strict=True):
        if pair := other_spelling(known):
            logger.warning("data.inputs.categorical: %r and %r of column %r are two categories", *pair, column)
    _warn_of_unknown(encoder, cells, joined)

    def part(name: str) -> VectorRows:
        encoded = [encoder.encode(of_source, rows) for of_source, rows in zip(cells, joined.rows[name], strict=True)]
        columns = {column: torch.cat([one[column] for one in encoded]) for column in encoded[0]}
        return VectorRows({**columns, LABELS: torch.from_numpy(joined.labels(name))})

    return Inputs.of(joined, part, collate_vectors, encoder.inputs, encoder.model_arguments)


def _warn_of_unknown(encoder: Encoder, cells: Sequence[Cells], joined: Joined) -> None:
    for place, column in enumerate(encoder.categorical):
        known = set(encoder.categories[place])
        for part in PARTS[1:]:
            found = [of_source.categorical[place].known_at(rows)
                     for of_source, rows in zip(cells, joined.rows[part], strict=True)]  # fmt: skip
            words = [word for of_source in found for word in of_source if word not in known]
            if words:
                logger.warning(
                    "data.inputs.categorical: %d of %d rows of the %s part have a value in column %r that no row of "
                    "the training part has, such as %r; the model sees it as missing",
                    len(words), sum(map(len, joined.rows[part])), part, column, words[0],
                )  # fmt: skip


def image_inputs(joined: Joined, image_size: int, cache_dir: str | None) -> Inputs:
    """`pixel_values`, and a column for each task of pixels; raises as `decoded_images`."""
    images = joined.images
    assert images is not None
    file = decoded_images(images, image_size, cache_dir)

    def part(name: str) -> OwnImageRows:
        chosen = [of_source[rows] for of_source, rows in zip(images.rows, joined.rows[name], strict=True)]
        pixels = {
            task: PixelColumn(labels.type, labels.pixels.file, joined.pixel_rows(task, name))
            for task, labels in joined.tasks.items()
            if labels.pixels is not None
        }
        return OwnImageRows(file, np.concatenate(chosen), joined.labels(name), pixels)

    return Inputs.of(joined, part, collate_images, _kind_of_images(joined, image_size), {"image_size": image_size})


def _kind_of_images(joined: Joined, image_size: int) -> InputKind:
    column = joined.sources[0].options.inputs.image
    assert column is not None  # of sources of this kind
    return (PixelInputs if joined.of_pixels else ImageInputs)(column, image_size)


def text_inputs(joined: Joined, tokenizer_name: str | None, max_length: int) -> Inputs:
    """The tokens of a text or a pair, labels of tokens too.

    Raises:
        OptionError: no tokenizer, or one that cannot be loaded or does not fit; see `read_texts`.
        MissingPackageError: its package is not installed.
    """
    if tokenizer_name is None:
        raise OptionError("data.tokenizer: is required where no model says it, expected a name, such as "
                          "google-bert/bert-base-uncased")  # fmt: skip
    texts = [_checked_texts(joined, number) for number in range(len(joined.sources))]
    tokenizer = load_tokenizer(tokenizer_name, "data.tokenizer", any(one.are_words for one in texts))
    check_max_length(tokenizer, max_length, tokenizer_name)

    def part(name: str) -> TokenRows:
        of_sources = joined.labels_by_source(name)
        return TokenRows.concatenate(
            [
                tokenize_texts(tokenizer, texts[number], rows, labels, joined.tags(number), max_length)
                for number, (rows, labels) in enumerate(zip(joined.rows[name], of_sources, strict=True))
            ]
        )

    columns = tuple(dict.fromkeys(source.options.inputs.texts for source in joined.sources))
    pad_token_id = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id  # the attention mask hides it
    return Inputs.of(
        joined,
        part,
        PadTokens(pad_token_id),
        TextInputs(columns, max_length, any(one.are_words for one in texts)),
        {"vocab_size": len(tokenizer), "max_length": max_length},
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
