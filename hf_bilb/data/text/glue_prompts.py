"""GLUE's rows as prompts and responses in plain English (the wording is ours)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Wording:
    """How a task is asked.

    Attributes:
        prompt: with `{0}` and, for pairs, `{1}` where the texts stand.
        answers: one for each class, in the order of the labels; empty: the answer is the score with one decimal.
    """

    prompt: str
    answers: tuple[str, ...]


_YES_NO = ("yes", "no")
_NO_YES = ("no", "yes")
WORDINGS = {
    "cola": Wording("Sentence: {0}\nIs this sentence acceptable English?\nAnswer:", _NO_YES),
    "sst2": Wording("Review: {0}\nIs this review positive or negative?\nAnswer:", ("negative", "positive")),
    "mrpc": Wording("First: {0}\nSecond: {1}\nDo the two sentences say the same?\nAnswer:", _NO_YES),
    "stsb": Wording("First: {0}\nSecond: {1}\nHow similar are they, from 0 to 5?\nAnswer:", ()),
    "rte": Wording("Text: {0}\nClaim: {1}\nDoes the text imply the claim?\nAnswer:", _YES_NO),
    "wnli": Wording("Text: {0}\nReading: {1}\nIs this reading right?\nAnswer:", _NO_YES),
    "qnli": Wording("Question: {0}\nText: {1}\nDoes the text answer the question?\nAnswer:", _YES_NO),
    "qqp": Wording("First: {0}\nSecond: {1}\nDo the two questions ask the same?\nAnswer:", _NO_YES),
    "mnli": Wording("Text: {0}\nClaim: {1}\nDoes the text imply the claim?\nAnswer:", ("yes", "maybe", "no")),
}


def instruction(task: str, texts: tuple[str, ...], label: float) -> tuple[str, str]:
    """Prompt and response of one row; the response begins with a space, as a word after `Answer:` does."""
    wording = WORDINGS[task]
    answer = wording.answers[int(label)] if wording.answers else f"{label:.1f}"
    return wording.prompt.format(*texts), f" {answer}"
