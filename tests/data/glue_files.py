"""Made-up files in GLUE's layouts, and a tokenizer and encoder of a few kilobytes to read them with."""

from __future__ import annotations

import lzma
from pathlib import Path

import numpy as np

WORDS = (
    "the a cat dog sat ran on under mat tree big small not is it was who what good bad film plot . ? , ' \" !".split()
)
HEADERS = {
    "SST-2": ("sentence", "label"),
    "MRPC": ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"),
    "STS-B": (
        "index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2", "score",
    ),
    "RTE": ("index", "sentence1", "sentence2", "label"),
    "WNLI": ("index", "sentence1", "sentence2", "label"),
    "QNLI": ("index", "question", "sentence", "label"),
    "QQP": ("id", "qid1", "qid2", "question1", "question2", "is_duplicate"),
    "MNLI": (
        "index", "promptID", "pairID", "genre", "sentence1_binary_parse", "sentence2_binary_parse", "sentence1_parse",
        "sentence2_parse", "sentence1", "sentence2", "label1", "gold_label",
    ),
}  # fmt: skip
LABELS = {
    "CoLA": "01", "SST-2": "01", "MRPC": "01", "WNLI": "01", "QQP": "01",
    "RTE": ("entailment", "not_entailment"), "QNLI": ("entailment", "not_entailment"),
    "MNLI": ("entailment", "neutral", "contradiction"), "STS-B": ("0.000", "2.500", "3.800", "5.000"),
}  # fmt: skip
FOLDERS = {"cola": "CoLA", "sst2": "SST-2", "mrpc": "MRPC", "stsb": "STS-B", "rte": "RTE", "wnli": "WNLI",
           "qnli": "QNLI", "qqp": "QQP", "mnli": "MNLI"}  # fmt: skip


def sentence(generator: np.random.Generator) -> str:
    return " ".join(generator.choice(WORDS, generator.integers(2, 12)))


def rows(folder: str, count: int, seed: int = 0) -> list[list[str]]:
    """Cells of `count` rows of a task, as its TSV file has them; the labels go round the classes."""
    generator = np.random.default_rng([seed, list(FOLDERS.values()).index(folder)])
    made = []
    for number in range(count):
        label = LABELS[folder][number % len(LABELS[folder])]
        first, second = sentence(generator), sentence(generator)
        if folder == "CoLA":
            made.append(["gj04", label, "" if label == "1" else "*", first])
            continue
        known = {
            "index": str(number), "label": label, "gold_label": label, "Quality": label, "score": label,
            "is_duplicate": label, "sentence": second if folder == "QNLI" else first, "question": first,
            "sentence1": first, "sentence2": second, "question1": first, "question2": second,
            "#1 String": first, "#2 String": second,
        }  # fmt: skip
        made.append([known.get(column, "x") for column in HEADERS[folder]])
    return made


def write_tsv(file: Path, folder: str, cells: list[list[str]]) -> None:
    """One TSV file, with a header where the task has one, packed where its name says so."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [*([HEADERS[folder]] if folder in HEADERS else []), *cells]
    text = "".join("\t".join(line) + "\n" for line in lines)
    # The files of MRPC begin with a byte order mark.
    data = text.encode("utf-8-sig" if folder == "MRPC" else "utf-8")
    file.write_bytes(lzma.compress(data) if file.suffix == ".xz" else data)


def write_glue(root: Path, tasks: tuple[str, ...] = tuple(FOLDERS), num_train: int = 40, num_dev: int = 10) -> Path:
    """A folder with the tasks' TSV files, training files packed."""
    for task in tasks:
        folder = FOLDERS[task]
        dev = "dev_matched.tsv" if task == "mnli" else "dev.tsv"
        write_tsv(root / folder / "train.tsv.xz", folder, rows(folder, num_train))
        write_tsv(root / folder / dev, folder, rows(folder, num_dev, seed=1))
    return root


def write_encoder(folder: Path, vocab_size: int | None = None, hidden_size: int = 16, layers: int = 2) -> Path:
    """A BERT with random weights and its tokenizer, loadable by the Auto classes."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, BertTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: number for number, word in enumerate([*special, *dict.fromkeys(WORDS)])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    names = {f"{word.strip('[]').lower()}_token": word for word in special}
    BertTokenizerFast(tokenizer_object=backend, model_max_length=128, **names).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary) if vocab_size is None else vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * hidden_size,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    return folder
