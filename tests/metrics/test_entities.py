"""F1 of entities: cases worked out by hand, and sets of spans made by a loop over tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hf_bilb.errors import MetricError, OptionError
from hf_bilb.metrics.entities import EntityF1, are_bio_tags

TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


def numbers(words: str) -> list[int]:
    """`B-PER`, ... as numbers; `_` for a token without a tag."""
    return [-100 if word == "_" else TAGS.index(word) for word in words.split()]


def logits(tags: Tensor) -> Tensor:
    return functional.one_hot(tags.clamp(min=0), len(TAGS)).float()


def score(actual: str, predicted: str) -> float:
    metric = EntityF1(TAGS)
    metric.update(logits(torch.tensor([numbers(predicted)])), torch.tensor([numbers(actual)]))
    return metric.compute()["f1_entity"]


@pytest.mark.parametrize(
    ("actual", "predicted", "expected"),
    [
        ("B-PER I-PER O B-LOC", "B-PER I-PER O B-LOC", 1.0),
        ("B-PER I-PER O B-LOC", "B-PER I-PER O O", 2 / 3),  # one of two found
        ("B-PER I-PER O", "B-PER O O", 0.0),  # ends too early
        ("B-PER O O", "B-PER I-PER O", 0.0),  # ends too late
        ("O B-PER I-PER", "B-PER I-PER I-PER", 0.0),  # starts too early
        ("B-PER I-PER O", "B-LOC I-LOC O", 0.0),  # another type
        ("B-PER B-PER O", "B-PER I-PER O", 0.0),  # two entities are not one
        ("B-PER I-PER O B-LOC", "I-PER I-PER O I-LOC", 1.0),  # I- that continues nothing begins an entity
        ("B-PER B-LOC", "B-PER I-LOC", 1.0),  # so does one of another type
        ("B-PER I-PER I-LOC", "B-PER I-PER B-LOC", 1.0),
        ("B-PER I-PER B-PER", "B-PER I-PER I-PER", 0.0),
        ("O O O", "O O O", 0.0),  # 0 / 0
        ("O O O", "O B-LOC O", 0.0),
        ("B-PER O B-PER O B-PER O", "B-PER O B-PER O O B-LOC", 4 / 6),
        # Tokens without a tag (pieces of a word) count for nothing, whatever is predicted there.
        ("_ B-PER _ I-PER _", "B-LOC B-PER B-LOC I-PER O", 1.0),
        ("B-PER _ O", "B-PER I-PER O", 1.0),
        ("B-PER I-PER _ _", "B-PER I-PER I-PER I-PER", 1.0),
    ],
)
def test_cases_worked_out_by_hand(actual: str, predicted: str, expected: float) -> None:
    assert score(actual, predicted) == pytest.approx(expected, abs=1e-15)


def spans(tags: list[int]) -> set[tuple[str, int, int]]:
    """(type, first, last) of a sequence without missing tags, token by token."""
    found, kind, first = set(), "", 0
    for place, tag in enumerate([*tags, 0]):
        name = TAGS[tag]
        goes_on = name.startswith("I-") and name[2:] == kind
        if kind and not goes_on:
            found.add((kind, first, place - 1))
            kind = ""
        if name != "O" and not goes_on:
            kind, first = name[2:], place
    return found


@pytest.mark.parametrize("size", [3, 40])
def test_random_tags_against_sets_of_spans(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    actual = torch.randint(0, 5, (40, 13), generator=generator)
    predicted = torch.where(torch.rand(40, 13, generator=generator) < 0.7, actual, actual.roll(1, 0))
    actual[torch.rand(40, 13, generator=generator) < 0.2] = -100
    metric = EntityF1(TAGS)
    for rows in torch.arange(40).split(size):
        metric.update(logits(predicted[rows]), actual[rows])
    hits = total = 0
    for row_actual, row_predicted in zip(actual.tolist(), predicted.tolist(), strict=True):
        kept = [(a, p) for a, p in zip(row_actual, row_predicted, strict=True) if a != -100]
        there, guessed = (spans([pair[i] for pair in kept]) for i in (0, 1))
        hits, total = hits + len(there & guessed), total + len(there) + len(guessed)
    assert 0.2 < 2 * hits / total < 0.9
    assert metric.compute() == {"f1_entity": pytest.approx(2 * hits / total, rel=1e-15)}


def test_an_entity_does_not_go_on_in_the_next_row() -> None:
    metric = EntityF1(TAGS)
    actual = torch.tensor([numbers("O B-PER"), numbers("I-PER O")])
    metric.update(logits(actual), actual)
    hits, predicted, there, *_ = metric._counts.tolist()
    assert (hits, predicted, there) == (2, 2, 2)


def test_nan_logits_empty_batches_and_merging() -> None:
    metric, other = EntityF1(TAGS), EntityF1(TAGS)
    assert metric.compute() == {}
    actual = torch.tensor([numbers("B-PER I-PER")])
    metric.update(torch.full((1, 2, 5), torch.nan), actual)
    assert metric.compute() == {"f1_entity": 0.0}
    metric.update(torch.zeros(0, 4, 5), torch.zeros(0, 4, dtype=torch.int64))
    other.update(logits(actual), actual)
    metric.merge(other)
    assert metric.compute() == {"f1_entity": pytest.approx(2 / 3)}
    metric.reset()
    metric.update(logits(actual), torch.full((1, 2), -100))
    assert metric.compute() == {}


def test_what_is_refused() -> None:
    with pytest.raises(MetricError, match=r"expected \[B, T, 5\] and \[B, T\]$"):
        EntityF1(TAGS).update(torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64))
    metric = EntityF1(TAGS)
    metric.update(torch.zeros(1, 2, 5), torch.tensor([[5, 0]]))
    with pytest.raises(MetricError, match=r"^labels: 1 are not valid, expected tags 0 to 4"):
        metric.compute()
    with pytest.raises(OptionError, match=r"^tags: NOUN, VERB are not valid"):
        EntityF1(("NOUN", "VERB"))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (TAGS, True),
        (("O", "I-PER"), True),
        (("O",), False),
        (("O", "B-"), False),
        ((), False),
        (("B-x", "NOUN"), False),
    ],
)
def test_which_names_are_bio_tags(names: tuple[str, ...], expected: bool) -> None:
    assert are_bio_tags(names) is expected
