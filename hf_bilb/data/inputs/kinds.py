"""The kinds of inputs: rows of a user's become what a model takes, as they did for training.

Each is a dataclass of plain values, which is saved with the model. Its `encode` gives the rows of a data set
(`hf_bilb.data.rows`) and what makes batches of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from hf_bilb.config.options import nearest, shown
from hf_bilb.data.inputs.given import as_table, check_column, is_file
from hf_bilb.data.inputs.images import GivenImages, LazyImages, image_bytes
from hf_bilb.data.inputs.labels import LabelColumns, Labels, read_known_labels
from hf_bilb.data.images.files import ImageSource
from hf_bilb.data.molecules.features import (
    SMILES_ATOM_FEATURES,
    SMILES_BOND_FEATURES,
    check_rdkit,
    join_graphs,
    quiet_rdkit,
    smiles_graph,
)
from hf_bilb.data.molecules.graphs import GraphRows, MoleculeGraphs, collate_graphs
from hf_bilb.data.own import columns
from hf_bilb.data.own.files import Table
from hf_bilb.data.own.images import HeldImages, named_images
from hf_bilb.data.own.options import CsvOptions, InputOptions, SourceOptions, SplitOptions
from hf_bilb.data.own.source import Source
from hf_bilb.data.own.table import Encoder, read_cells
from hf_bilb.data.own.text import check_lengths, first_tokens, labelled_tokens, read_texts
from hf_bilb.data.rows import Rows, VectorRows, collate_images, collate_vectors
from hf_bilb.data.splits import Split
from hf_bilb.data.tables.binary import OneHotRows
from hf_bilb.data.task_data import Standardizer
from hf_bilb.data.text.rows import PadTokens
from hf_bilb.data.text.tokenization import encode
from hf_bilb.errors import OptionError
from hf_bilb.losses.task_types import LABELS, TaskType


@dataclass(frozen=True)
class Wanted:
    """What is to be read besides the inputs: nothing, or the labels of these tasks.

    Attributes:
        csv: how text files are read.
        tasks, places: of the labels; empty: none are read.
    """

    csv: CsvOptions
    tasks: Mapping[str, TaskType]
    places: Mapping[str, LabelColumns]

    def labels(self, table: Table) -> Labels | None:
        """Those of the table's rows."""
        return read_known_labels(table, self.tasks, self.places) if self.places else None


@dataclass(frozen=True)
class Encoded:
    """Rows as a model takes them.

    Attributes:
        rows: a map-style data set.
        collator: makes batches of them.
        words: for tasks of tokens, of each row where its words begin: `[words]` places of their first tokens, -1 of
            those that were cut off.
    """

    rows: Rows
    collator: Callable[[list[Any]], dict[str, Any]]
    words: list[NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return len(self.rows)  # type: ignore[arg-type]  # map-style


class InputKind(Protocol):
    """One of the kinds below; `kind` is its name in a file."""

    kind: ClassVar[str]

    def encode(self, inputs: Any, tokenizer: Any, wanted: Wanted) -> Encoded:
        """The rows of what a user hands over; raises `OptionError` in one line, with file, row and column."""


# --- texts --------------------------------------------------------------------------------------------------------


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

    def encode(self, inputs: Any, tokenizer: Any, wanted: Wanted) -> Encoded:
        """See `InputKind`."""
        table = as_table(inputs, wanted.csv, self._unnamed(inputs))
        chosen = self._choose(table)
        source = _source(table, InputOptions(text=chosen))
        texts = read_texts(source, need_words=self.are_words)
        labels = wanted.labels(table)
        for name, tags in ({} if labels is None else labels.tags).items():
            check_lengths(source, texts, tags, wanted.places[name].columns[0])
        tokens = encode(tokenizer, texts.columns, self.max_length, texts.are_words)
        every = np.arange(len(table.rows))
        values = np.empty((len(every), 0), np.float32) if labels is None else labels.values
        rows = labelled_tokens(tokens, every, values, [] if labels is None else list(labels.tags.values()))
        words = _word_places(tokens, texts.columns[0]) if self.are_words else None
        pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        return Encoded(rows, PadTokens(pad), words)

    def _choose(self, table: Table) -> tuple[str, ...]:
        known = table.rows.column_names
        for names in sorted(self.columns, key=len, reverse=True):
            if all(name in known for name in names):
                return names
        # Of several choices the one that is most of it there says what is missing.
        nearest_choice = max(self.columns, key=lambda names: sum(name in known for name in names))
        for name in nearest_choice:
            check_column(table, name)
        raise AssertionError

    def _unnamed(self, inputs: Any) -> tuple[str, ...]:
        """What a list of texts, or of pairs, is called."""
        first = inputs[0] if isinstance(inputs, Sequence) and not isinstance(inputs, str) and len(inputs) else None
        is_pair = isinstance(first, tuple | list) and not self.are_words
        size = 2 if is_pair else 1
        found = next((names for names in self.columns if len(names) == size), None)
        if found is None and first is not None and not isinstance(first, Mapping):
            what = "one text a row, not pairs" if is_pair else "pairs of texts"
            raise OptionError(f"the inputs: the model reads {what} ({', '.join(self.columns[0])})")
        return found or self.columns[0]


def _word_places(tokens: Any, words: Sequence[Sequence[str]]) -> list[NDArray[np.int64]]:
    first, starts = first_tokens(tokens), np.concatenate([[0], np.cumsum(tokens.lengths)])
    found = []
    for row, own in enumerate(words):
        span = slice(starts[row], starts[row + 1])
        places = np.full(len(own), -1, np.int64)
        at = np.flatnonzero(first[span])
        places[tokens.word_ids[span][at]] = at
        found.append(places)
    return found


# --- images -------------------------------------------------------------------------------------------------------


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

    def encode(self, inputs: Any, tokenizer: Any, wanted: Wanted) -> Encoded:
        """See `InputKind`."""
        values = self._values(inputs)
        table = None
        if values is None:
            table = as_table(inputs, wanted.csv, (self.column,))
            check_column(table, self.column)
        labels = None
        if wanted.places:
            labels = wanted.labels(as_table(inputs, wanted.csv, (self.column,)) if table is None else table)
        source, places = self._source(table, values)
        rows = LazyImages(source, places, self.image_size, None if labels is None else labels.values)
        return Encoded(rows, collate_images)

    def _source(self, table: Table | None, values: list[Any] | None) -> tuple[ImageSource, NDArray[np.int64]]:
        if table is None:
            assert values is not None
            return GivenImages(values), np.arange(len(values))
        if columns.holds_images(table, self.column):
            return HeldImages([(table, self.column)]), np.arange(len(table.rows))
        return named_images([(table, self.column)])

    def _values(self, inputs: Any) -> list[Any] | None:
        """The images of a list, or of a column in memory; None for files and data sets, which hold them encoded."""
        import pandas as pd

        if isinstance(inputs, pd.DataFrame | Mapping):
            if self.column not in inputs:
                known = [str(name) for name in inputs]
                hint = nearest(self.column, known) or f" (it has {', '.join(known)})"
                raise OptionError(f"the inputs: has no column {self.column!r}, which the model reads{hint}")
            return [image_bytes(value) for value in inputs[self.column]]
        if is_file(inputs) or not isinstance(inputs, Sequence) or isinstance(inputs, str):
            return None
        return [image_bytes(self._of_row(row, number)) for number, row in enumerate(inputs, 1)]

    def _of_row(self, row: Any, number: int) -> Any:
        if not isinstance(row, Mapping):
            return row
        if self.column not in row:
            hint = nearest(self.column, row) or f" (it has {', '.join(map(str, row))})"
            raise OptionError(f"the inputs, row {number}: has no column {self.column!r}, which the model reads{hint}")
        return row[self.column]


# --- tables -------------------------------------------------------------------------------------------------------


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

    @classmethod
    def of(cls, encoder: Encoder) -> TableInputs:
        """What was learned from the training rows."""
        scale = encoder.scale
        return cls(
            encoder.numeric, tuple(scale.means.tolist()), tuple(scale.stds.tolist()), encoder.categorical,
            encoder.categories,
        )  # fmt: skip

    def encode(self, inputs: Any, tokenizer: Any, wanted: Wanted) -> Encoded:
        """See `InputKind`."""
        names = (*self.numeric, *self.categorical)
        table = as_table(inputs, wanted.csv, names)
        for name in names:
            check_column(table, name)
        source = _source(table, InputOptions(numeric=self.numeric, categorical=self.categorical))
        scale = Standardizer(np.array(self.means), np.array(self.stds))
        encoder = Encoder(self.numeric, self.categorical, scale, self.categories)
        found = encoder.encode(read_cells(source), np.arange(len(table.rows)))
        labels = wanted.labels(table)
        if labels is not None:
            found[LABELS] = torch.from_numpy(labels.values)
        return Encoded(VectorRows(found), collate_vectors)


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

    def encode(self, inputs: Any, tokenizer: Any, wanted: Wanted) -> Encoded:
        """See `InputKind`."""
        names = (*self.numeric, *self.categorical)
        table = as_table(inputs, wanted.csv, names)
        for name in names:
            check_column(table, name)
        numbers = [columns.numbers(table, name) for name in self.numeric]
        for name, values in zip(self.numeric, numbers, strict=True):
            if (empty := np.flatnonzero(np.isnan(values))).size:
                raise OptionError(f"{table.place(int(empty[0]))}: column {name!r} is empty, expected a number")
        matrix = np.stack(numbers, axis=1) if numbers else np.empty((len(table.rows), 0))
        scaled = Standardizer(np.array(self.means), np.array(self.stds)).tensor(matrix)
        sizes = [len(known) for known in self.categories]
        return Encoded(OneHotRows(scaled, self._codes(table), sizes, None), collate_vectors)

    def _codes(self, table: Table) -> torch.Tensor:
        found = [
            columns.words(table, name, kept=known).positions_in(known)
            for name, known in zip(self.categorical, self.categories, strict=True)
        ]
        return torch.from_numpy(np.stack(found, axis=1) if found else np.empty((len(table.rows), 0), np.int64))


# --- molecules ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MoleculeInputs:
    """Molecules as SMILES, which become graphs of their heavy atoms.

    Attributes:
        column: of a table.
    """

    column: str = "smiles"
    kind: ClassVar[str] = "smiles"

    def encode(self, inputs: Any, tokenizer: Any, wanted: Wanted) -> Encoded:
        """See `InputKind`; raises `MissingPackageError` where RDKit is not installed."""
        check_rdkit("smiles")
        table = as_table(inputs, wanted.csv, (self.column,))
        check_column(table, self.column)
        with quiet_rdkit():
            graphs = [_graph(text, table, row) for row, text in enumerate(columns.texts(table, self.column))]
        arrays = join_graphs(graphs, len(SMILES_ATOM_FEATURES), len(SMILES_BOND_FEATURES))
        return Encoded(GraphRows(MoleculeGraphs(**arrays), np.arange(len(graphs)), None), collate_graphs)


def _graph(text: str, table: Table, row: int) -> Any:
    from rdkit import Chem

    molecule: Any = Chem.MolFromSmiles(text)  # None, which the stubs of RDKit do not say, where it is no SMILES
    if molecule is None or not molecule.GetNumAtoms():
        raise OptionError(f"{table.place(row)}: {shown(text)} is no SMILES that RDKit can read")
    return smiles_graph(molecule)


# --- others -------------------------------------------------------------------------------------------------------


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

    def encode(self, inputs: Any, tokenizer: Any, wanted: Wanted) -> Encoded:
        """Prompts are not encoded ahead: see `prompts`."""
        raise OptionError("a language model generates: it has no outputs of tasks")

    def prompts(self, inputs: Any, csv: CsvOptions) -> list[str]:
        """N texts."""
        table = as_table(inputs, csv, (self.column,))
        check_column(table, self.column)
        return columns.texts(table, self.column)


@dataclass(frozen=True)
class NoInputs:
    """Inputs that are not made from what a user has at hand.

    Attributes:
        reason: why, as the end of a sentence.
    """

    reason: str
    kind: ClassVar[str] = "none"

    def encode(self, inputs: Any, tokenizer: Any, wanted: Wanted) -> Encoded:
        """Raises `OptionError`."""
        raise OptionError(f"predict: {self.reason}; the model itself is `loaded.model`")


KINDS: dict[str, Any] = {
    one.kind: one
    for one in (TextInputs, ImageInputs, TableInputs, FeatureInputs, MoleculeInputs, PromptInputs, NoInputs)
}


def _source(table: Table, inputs: InputOptions) -> Source:
    """All rows of a table."""
    every, none = np.arange(len(table.rows)), np.arange(0)
    options = SourceOptions("data", None, None, CsvOptions(), inputs, SplitOptions(), {})
    return Source(options, (table,), Split(every, none, none))

