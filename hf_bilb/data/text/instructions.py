"""Instruction mixtures for causal language models: {task, prompt, response}, from JSONL files or from GLUE.

A line of a JSONL file is `{"task": "summary", "prompt": "...", "response": "..."}`; other keys are ignored. A task's
loss is the mean over the tokens of its responses (or, with `train_on_prompt`, over all tokens); its metric is the
perplexity. GLUE serves as real text: `data/glue_prompts.py` has the wording.
"""

from __future__ import annotations

import codecs
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hf_bilb.config.options import check_one_of, nearest
from hf_bilb.data.checks import check_at_least, check_fraction, check_tasks
from hf_bilb.data.inputs.format import DataFormat
from hf_bilb.data.inputs.kinds import PromptInputs
from hf_bilb.data.splits import PARTS, hold_out
from hf_bilb.data.task_data import DataSetSpec, MetricInfo, TaskData
from hf_bilb.data.text.glue import DEFAULT_TASKS, TASKS, GlueOptions, parts_of, read_task
from hf_bilb.data.text.glue_prompts import instruction
from hf_bilb.data.text.instruction_rows import InstructionRows, PackExamples, tokenize_instructions
from hf_bilb.data.text.rows import PadTokens
from hf_bilb.data.text.tokenization import check_max_length, load_tokenizer
from hf_bilb.errors import OptionError
from hf_bilb.losses.tokens import TOKEN_LABELS, TokenLosses
from hf_bilb.metrics.perplexity import Perplexity, perplexity

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

LABEL_NAMES = (TOKEN_LABELS, "task_ids")
_KEYS = ("task", "prompt", "response")
_SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}


@dataclass(frozen=True)
class JsonlFiles:
    """Files of instructions; a part without a file is held out of the training file's rows, task by task.

    Attributes:
        train, validation, test: a JSONL file each; the last two may be null.
    """

    train: str
    validation: str | None = None
    test: str | None = None


@dataclass(frozen=True)
class GlueFiles:
    """Where GLUE lies; exactly one is set. Its dev set is the test part.

    Attributes:
        folder: with the TSV files, as for the data set `glue`.
        hub: a name on the hub, or a folder laid out like it.
    """

    folder: str | None = None
    hub: str | None = None

    def __post_init__(self) -> None:
        check_one_of("folder (with TSV files) and hub (a name)", folder=self.folder, hub=self.hub)


@dataclass(frozen=True)
class NewTokenizer:
    """A byte-level BPE tokenizer that is trained on the training part, for a model with fresh weights.

    Attributes:
        vocab_size: at most so many entries, 300 or more.
    """

    vocab_size: int

    def __post_init__(self) -> None:
        check_at_least("vocab_size", self.vocab_size, 300)


@dataclass(frozen=True)
class InstructionOptions:
    """What a recipe's `data:` section may set. Exactly one of `jsonl` and `glue` is set.

    Attributes:
        jsonl: files of instructions.
        glue: GLUE, turned into instructions.
        tasks: which tasks, in the order of the loss vector; null = all of the training file in alphabetical order, or
            GLUE's six small ones. Rows of other tasks are left out.
        tokenizer: a name on the hub or a folder; `{vocab_size: 4000}` trains a new one; null = that of the model.
        max_length: tokens after which an example is cut, the beginning of its prompt first.
        train_on_prompt: the prompt's tokens count in the loss as well.
        packed: a batch is one row, its examples one after the other without padding (training only).
        chat: prompt and response stand in the tokenizer's chat template, as a user's and an assistant's turn.
        validation_fraction: the share of a task's training rows that is held out for validation, and once more for test
            where there is no part of its own.
        max_validation: at most so many rows of a task are held out for a part; null = no limit.
        max_train: at most so many training rows of a task; null = all. A smaller part is the beginning of a larger one.
        seed: of the choice of what is held out.

    Raises:
        OptionError: both or none of `jsonl` and `glue`, an unknown task, a number out of range.
    """

    jsonl: JsonlFiles | None = None
    glue: GlueFiles | None = None
    tasks: tuple[str, ...] | None = None
    tokenizer: str | NewTokenizer | None = None
    max_length: int = 512
    train_on_prompt: bool = False
    packed: bool = False
    chat: bool = False
    validation_fraction: float = 0.1
    max_validation: int | None = 1000
    max_train: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.jsonl is None) == (self.glue is None):
            given = "neither is set" if self.jsonl is None else "both are set"
            raise OptionError(f"jsonl: one of jsonl (files of instructions) and glue is needed, {given}")
        check_tasks(self.tasks, None if self.glue is None else TASKS)
        check_fraction("validation_fraction", self.validation_fraction, below=0.5)
        check_at_least("max_length", self.max_length, 8)
        check_at_least("max_validation", self.max_validation, 1)
        check_at_least("max_train", self.max_train, 1)
        check_at_least("seed", self.seed, 0)
        if self.chat and isinstance(self.tokenizer, NewTokenizer):
            raise OptionError("chat: a new tokenizer has no chat template, expected false")


@dataclass(frozen=True)
class Instructions:
    """N examples: prompts, responses, and `task_ids [N]` int64."""

    prompts: list[str]
    responses: list[str]
    task_ids: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, rows: NDArray[np.int64]) -> Instructions:
        """The rows of these numbers, in their order."""
        return Instructions(
            [self.prompts[row] for row in rows], [self.responses[row] for row in rows], self.task_ids[rows]
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Instructions]) -> Instructions:
        """The rows of all `parts`, one part after the other."""
        prompts = [prompt for part in parts for prompt in part.prompts]
        responses = [response for part in parts for response in part.responses]
        return cls(prompts, responses, np.concatenate([part.task_ids for part in parts]))


def load_instructions(options: InstructionOptions) -> TaskData:
    """The mixture, tokenized, in memory (about 4 bytes a token).

    Raises:
        OptionError: a file that is missing or holds something else: names file, line and key; a task without rows; a
            tokenizer that cannot be loaded or does not fit.

    Cost: about 20,000 short rows a second on one core, at every start, in every process.
    """
    tasks, parts = _read_glue(options) if options.glue is not None else _read_jsonl(options)
    tokenizer = _tokenizer(options, parts["train"])
    check_max_length(tokenizer, options.max_length)
    if options.chat:
        parts = {part: _in_template(tokenizer, examples) for part, examples in parts.items()}
    rows = {part: _tokenized(part, examples, tokenizer, options) for part, examples in parts.items()}
    return _task_data(tasks, rows, tokenizer, options)


def _tokenized(
    part: str, examples: Instructions, tokenizer: PreTrainedTokenizerBase, options: InstructionOptions
) -> InstructionRows:
    rows, cut = tokenize_instructions(
        tokenizer,
        examples.prompts,
        examples.responses,
        examples.task_ids,
        options.max_length,
        options.train_on_prompt,
        packed=options.packed and part == "train",
        in_template=options.chat,
    )
    if cut.rows:
        logger.warning(
            "%s: %d of %d examples have more than max_length %d tokens and are cut at the beginning of the prompt; "
            "%d of them lose the end of the response as well",
            part, cut.rows, len(rows), options.max_length, cut.responses,
        )  # fmt: skip
    return rows


def _task_data(
    tasks: tuple[str, ...],
    rows: Mapping[str, InstructionRows],
    tokenizer: PreTrainedTokenizerBase,
    options: InstructionOptions,
) -> TaskData:
    special = {f"{name}_id": getattr(tokenizer, f"{name}_id") for name in _SPECIAL}
    pad = special["eos_token_id"] if special["pad_token_id"] is None else special["pad_token_id"]
    losses = TokenLosses(len(tasks))
    return TaskData(
        train=rows["train"],
        validation=rows["validation"],
        test=rows["test"],
        task_names=tasks,
        label_names=LABEL_NAMES,
        data_collator=PackExamples(pad) if options.packed else PadTokens(pad),
        compute_metrics=Perplexity(),
        metrics=tuple(MetricInfo(f"perplexity_{t}", t, "perplexity", "", higher_is_better=False) for t in tasks),
        trivial_metrics=unigram_perplexity(rows["train"], rows["test"], tasks, len(tokenizer)),
        model_arguments={
            "vocab_size": len(tokenizer),
            "max_length": options.max_length,
            "packed": options.packed,
            "special_tokens": {**special, "pad_token_id": pad},
        },
        task_item_counts=losses.count,
        trivial_predictor="token frequencies",
        processing_class=tokenizer,
        task_loss_func=losses,
        format=DataFormat(PromptInputs("prompt", options.max_length, options.chat), {}),
    )


def unigram_perplexity(
    train: InstructionRows, test: InstructionRows, tasks: Sequence[str], vocab_size: int
) -> dict[str, float]:
    """The perplexities on `test` of the predictor that knows how often each token is an item of the task in `train`;
    one count more is shared evenly by the `vocab_size` tokens, so that none is impossible."""
    found = {}
    for task_id, task in enumerate(tasks):
        counts = np.bincount(train.items(task_id), minlength=vocab_size) + 1.0 / vocab_size
        items = test.items(task_id)
        if len(items):
            found[f"perplexity_{task}"] = perplexity(-float(np.log(counts / counts.sum())[items].mean()))
    return found


# --- tokenizers ---------------------------------------------------------------------------------------------------


def _tokenizer(options: InstructionOptions, train: Instructions) -> PreTrainedTokenizerBase:
    if options.tokenizer is None:
        raise OptionError(
            "data.tokenizer: is required where the model has no name, expected a name, a folder, or {vocab_size: 4000} "
            "for a new one"
        )
    if isinstance(options.tokenizer, NewTokenizer):
        return new_tokenizer([*train.prompts, *train.responses], options.tokenizer.vocab_size)
    return load_tokenizer(options.tokenizer, "data.tokenizer")


def new_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer trained on `texts`; it puts `<bos>` in front. The same texts give the same one."""
    from tokenizers import ByteLevelBPETokenizer, processors
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        texts, vocab_size=vocab_size, min_frequency=2, special_tokens=list(_SPECIAL.values()), show_progress=False
    )
    bos = _SPECIAL["bos_token"]
    trained.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, trained.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, **_SPECIAL)


def _in_template(tokenizer: PreTrainedTokenizerBase, examples: Instructions) -> Instructions:
    """The same examples as turns of a chat: what the template says before the answer, and the answer to the end."""
    if tokenizer.chat_template is None:
        raise OptionError("data.chat: the tokenizer has no chat template, expected false")
    from jinja2 import TemplateError

    prompts, responses = [], []
    for prompt, response in zip(examples.prompts, examples.responses, strict=True):
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        try:
            asked = str(tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True))
            whole = str(tokenizer.apply_chat_template(turns, tokenize=False))
        except TemplateError as error:
            raise OptionError(f"data.chat: the tokenizer's chat template fails: {error}") from None
        if not whole.startswith(asked):
            raise OptionError("data.chat: the tokenizer's chat template changes a prompt once it is answered")
        if response.strip() not in whole[len(asked) :]:
            raise OptionError(f"data.chat: the tokenizer's chat template leaves out the response {response!r}")
        prompts.append(asked)
        responses.append(whole[len(asked) :])
    return Instructions(prompts, responses, examples.task_ids)


# --- JSONL --------------------------------------------------------------------------------------------------------


def _read_jsonl(options: InstructionOptions) -> tuple[tuple[str, ...], dict[str, Instructions]]:
    files = options.jsonl
    assert files is not None  # InstructionOptions asks for one of the two
    named = {"train": files.train, "validation": files.validation, "test": files.test}
    read = {part: read_jsonl(Path(file)) for part, file in named.items() if file is not None}
    there = {part: Counter(task for task, _, _ in rows) for part, rows in read.items()}
    tasks = sorted(there["train"]) if options.tasks is None else list(options.tasks)
    for part, counts in there.items():
        for task in tasks:
            if task not in counts:
                near = nearest(task, there["train"])
                raise OptionError(f"data.tasks: {named[part]} has no row of task {task!r}{near}")
        if others := sorted(counts.keys() - set(tasks)):
            left_out, first = sum(counts[task] for task in others), ", ".join(others[:3])
            logger.warning("%s: %d rows of other tasks are left out (%s)", named[part], left_out, first)
    examples = {part: _numbered(rows, tasks) for part, rows in read.items()}
    return tuple(tasks), _hold_out(examples, tasks, options)


def read_jsonl(file: Path) -> list[tuple[str, str, str]]:
    """Task, prompt and response of every line; empty lines are passed over.

    Raises:
        OptionError: names the file, the line (from 1) and the key.
    """
    rows = []
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                line = line.removeprefix(codecs.BOM_UTF8)  # some programs put it in front of the first one
                if line.strip():
                    rows.append(_row(line, f"{file}, line {number}"))
    except OSError as error:
        raise OptionError(f"{file}: cannot be read: {error}") from None
    if not rows:
        raise OptionError(f"{file}: has no rows")
    return rows


def _row(line: bytes, where: str) -> tuple[str, str, str]:
    try:
        row: Any = json.loads(line.decode())
    except UnicodeError as error:
        raise OptionError(f"{where}: is no UTF-8: {error}") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets a thousand deep
        raise OptionError(f"{where}: is no JSON: {error}") from None
    if not isinstance(row, dict):
        raise OptionError(f"{where}: is no object, expected one with {', '.join(_KEYS)}")
    for key in _KEYS:
        if key not in row:
            raise OptionError(f"{where}: has no key {key!r} (it has {', '.join(row) or 'none'}){nearest(key, row)}")
        if not isinstance(row[key], str):
            raise OptionError(f"{where}: {key} is {row[key]!r}, expected a text")
        if any("\ud800" <= sign <= "\udfff" for sign in row[key]):
            raise OptionError(f"{where}: {key} holds half of a character, {row[key]!r}, expected a text")
    for key in ("task", "response"):
        if not row[key]:
            raise OptionError(f"{where}: {key} is empty")
    task = row["task"]
    if task != task.strip() or not task.isprintable():  # `copy ` would be one more task
        raise OptionError(f"{where}: task is {task!r}, expected a name without spaces around it and line breaks")
    return task, row["prompt"], row["response"]


def _numbered(rows: Sequence[tuple[str, str, str]], tasks: Sequence[str]) -> Instructions:
    numbers = {task: number for number, task in enumerate(tasks)}
    kept = [row for row in rows if row[0] in numbers]
    task_ids = np.array([numbers[task] for task, _, _ in kept], np.int64)
    return Instructions([row[1] for row in kept], [row[2] for row in kept], task_ids)


def _hold_out(
    examples: Mapping[str, Instructions], tasks: Sequence[str], options: InstructionOptions
) -> dict[str, Instructions]:
    """The three parts; those without a file of their own are taken from the training rows of each task."""
    train = examples["train"]
    wanted = [part for part in ("test", "validation") if part not in examples]
    taken: dict[str, list[NDArray[np.int64]]] = {part: [] for part in ("train", *wanted)}
    for task_id, task in enumerate(tasks):
        own = np.flatnonzero(train.task_ids == task_id)
        pieces = hold_out(
            len(own),
            # A seed of each task's own: what is held out of one does not depend on which others there are.
            [options.seed, *task.encode()],
            options.validation_fraction,
            options.max_validation,
            options.max_train,
            num_parts=len(wanted),
            owner=f" of {task!r}",
        )
        for rows, piece in zip(taken.values(), pieces, strict=True):
            rows.append(own[piece])
    held = {part: train.take(np.concatenate(rows)) for part, rows in taken.items()}
    return {part: held[part] if part in held else examples[part] for part in PARTS}


# --- GLUE ---------------------------------------------------------------------------------------------------------


def _read_glue(options: InstructionOptions) -> tuple[tuple[str, ...], dict[str, Instructions]]:
    assert options.glue is not None
    tasks = DEFAULT_TASKS if options.tasks is None else options.tasks
    glue = GlueOptions(
        folder=options.glue.folder,
        hub=options.glue.hub,
        tasks=tasks,
        validation_fraction=options.validation_fraction,
        max_validation=options.max_validation,
        max_train=options.max_train,
        seed=options.seed,
    )
    parts: dict[str, list[Instructions]] = {part: [] for part in PARTS}
    for task_id, name in enumerate(tasks):
        try:
            train, test = read_task(TASKS[name], glue)
        except OptionError as error:
            raise OptionError(str(error).replace("data.", "data.glue.", 1)) from None
        for part, labelled in parts_of(TASKS[name], train, test, glue).items():
            columns = zip(*labelled.texts, strict=True)
            asked = [instruction(name, tuple(t), float(y)) for t, y in zip(columns, labelled.labels, strict=True)]
            prompts, responses = [prompt for prompt, _ in asked], [response for _, response in asked]
            parts[part].append(Instructions(prompts, responses, np.full(len(asked), task_id, np.int64)))
    return tasks, {part: Instructions.concatenate(examples) for part, examples in parts.items()}


SPEC = DataSetSpec(options=InstructionOptions, load=load_instructions, from_model={"tokenizer": "model"})
