"""The kinds of inputs: what a saved model knows of the rows that it reads, as plain values.

The modules of this folder read rows of a user's as these say, by the functions that made the inputs for training.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from hf_bilb.config.registry import Registry
from hf_bilb.errors import OptionError


@dataclass(frozen=True)
class TextInputs:
    """Texts, pairs of texts, or lists of words.

    Attributes:
        columns: the one or two columns; several such choices where tasks had files of their own, of which the longest
            one is taken whose columns are there.
        max_length: tokens after which a row is cut.
        are_words: rows are lists of words.
    """

    columns: tuple[tuple[str, ...], ...]
    max_length: int
    are_words: bool = False
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class ImageInputs:
    """Images: paths, or images themselves.

    Attributes:
        column: of a table.
        image_size: height and width that the whole frame is resized to.
    """

    column: str
    image_size: int
    kind: ClassVar[str] = "image"


@dataclass(frozen=True)
class PixelInputs(ImageInputs):
    """The same, of a model with tasks of pixels."""

    kind: ClassVar[str] = "pixels"


@dataclass(frozen=True)
class SceneInputs:
    """Images of a packaged set of dense prediction, of a model with the papers' tasks (`hf_bilb.losses.dense`).

    Attributes:
        size: height and width that the whole frame is resized to.
        column: of a table.
    """

    size: tuple[int, int]
    column: str = "image"
    kind: ClassVar[str] = "scenes"


@dataclass(frozen=True)
class TableInputs:
    """Numbers and categories: `numeric [B, D]` and `categorical [B, C]`. Missing and unknown ones are as in training.

    Attributes:
        numeric: names of the D columns of numbers.
        means, stds: `[D]`, of the training rows.
        categorical: names of the C columns of words.
        categories: of each of them its words, in order.
    """

    numeric: tuple[str, ...]
    means: tuple[float, ...]
    stds: tuple[float, ...]
    categorical: tuple[str, ...]
    categories: tuple[tuple[str, ...], ...]
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class FeatureInputs:
    """Numbers and one-hot categories in one vector, `features [B, F]`; an unknown category is all zeros.

    Attributes:
        numeric, means, stds, categorical, categories: as of `TableInputs`; numbers may not be missing.
    """

    numeric: tuple[str, ...]
    means: tuple[float, ...]
    stds: tuple[float, ...]
    categorical: tuple[str, ...] = ()
    categories: tuple[tuple[str, ...], ...] = ()
    kind: ClassVar[str] = "features"


@dataclass(frozen=True)
class MoleculeInputs:
    """Molecules as SMILES, which become graphs of their heavy atoms.

    Attributes:
        column: of a table.
    """

    column: str = "smiles"
    kind: ClassVar[str] = "smiles"


@dataclass(frozen=True)
class PromptInputs:
    """Prompts of a language model, which goes on with them.

    Attributes:
        column: of a table.
        max_length: tokens of prompt and response together, as in training.
        in_template: prompts stand in the tokenizer's chat template.
    """

    column: str
    max_length: int
    in_template: bool = False
    kind: ClassVar[str] = "prompt"


@dataclass(frozen=True)
class NoInputs:
    """Inputs that are not made from what a user has at hand.

    Attributes:
        reason: why, as the end of a sentence.
    """

    reason: str
    kind: ClassVar[str] = "none"

    def refusal(self) -> OptionError:
        """The error for rows that are handed over all the same."""
        return OptionError(
            f"the model reads no rows: {self.reason}; the model itself is the attribute `model` of what was loaded"
        )


@dataclass(frozen=True)
class LabelColumns:
    """Where a task's labels stand, and what measures it.

    Attributes:
        columns: of the table.
        metrics: names of metrics; None: those that are usual for the type.
        class_words: class -> the words that mean it; None: each means itself.
        ignore_index: of masks, the number of a pixel without a label; None: there is none.
        missing: of arrays, the number of a pixel without a label, in addition to NaN; None: there is none.
    """

    columns: tuple[str, ...]
    metrics: tuple[str, ...] | None = None
    class_words: dict[str, tuple[str, ...]] | None = None
    ignore_index: int | None = None
    missing: float | None = None


@dataclass(frozen=True)
class DenseMeasurement:
    """How a model with the papers' tasks is measured: arguments of `hf_bilb.metrics.dense.DenseMetrics`.

    Attributes:
        batch_size: images of a batch whose figures are averaged.
        delta_m_average: which form of a metric Delta_m takes.
        delta_m_base: metric -> result of a model trained on its task alone; None: there is no Delta_m.
    """

    batch_size: int
    delta_m_average: Literal["batch_mean", "exact"] = "batch_mean"
    delta_m_base: dict[str, float] | None = None


InputKind = (
    TextInputs
    | ImageInputs
    | PixelInputs
    | SceneInputs
    | TableInputs
    | FeatureInputs
    | MoleculeInputs
    | PromptInputs
    | NoInputs
)
KINDS: dict[str, type[InputKind]] = {one.kind: one for one in typing.get_args(InputKind)}
#: Kind -> function (the dataclass, what a user hands over, tokenizer, `Wanted`) -> `Encoded`; `OptionError` in one
#: line, with file, row and column.
ENCODERS: Registry[Any] = Registry(
    {
        "text": "hf_bilb.data.inputs.text:encode_texts",
        "image": "hf_bilb.data.inputs.images:encode_images",
        "pixels": "hf_bilb.data.inputs.pixels:encode_pixels",
        "scenes": "hf_bilb.data.inputs.pixels:encode_scenes",
        "table": "hf_bilb.data.inputs.tables:encode_table",
        "features": "hf_bilb.data.inputs.tables:encode_features",
        "smiles": "hf_bilb.data.inputs.molecules:encode_molecules",
        "prompt": "hf_bilb.data.inputs.prompts:encode_prompts",
        "none": "hf_bilb.data.inputs.prompts:encode_nothing",
    }
)
