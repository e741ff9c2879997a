"""Which rows become the validation and the test part where no files say it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from hf_bilb.data.own.columns import Words
from hf_bilb.data.splits import draw_rows, held_out_count
from hf_bilb.errors import OptionError

Rows = NDArray[np.int64]


def draw_parts(num_rows: int, shares: Sequence[float], seed: int) -> list[Rows]:
    """Row numbers of each part that is held out, in the order of `shares`, and then those that are left.

    Raises:
        OptionError: none is left.
    """
    return draw_rows(num_rows, seed, *_counts(num_rows, shares), None)


def draw_groups(groups: Rows, shares: Sequence[float], seed: int) -> list[Rows]:
    """The same, so that rows of one group lie in one part; a part has at most the rows of its share, but one group.

    Args:
        groups: `[N]`, the number of each row's group, 0 to G - 1.
        shares: of the rows, for each part.
        seed: of the order in which the groups are taken.

    Raises:
        OptionError: there are too few groups.
    """
    sizes = np.bincount(groups)
    if len(sizes) <= len(shares):
        raise OptionError(f"{len(sizes)} groups are too few for {len(shares) + 1} parts")
    part_of = np.full(len(sizes), len(shares))
    order = draw_rows(len(sizes), seed, None)[0]
    for part, count in enumerate(_counts(len(groups), shares)):
        free = order[part_of[order] == len(shares)]
        part_of[_fitting(free, sizes, count)] = part
    if not (part_of == len(shares)).any():
        raise OptionError(f"{len(sizes)} groups are too few, or too large, for {len(shares) + 1} parts")
    of_rows = part_of[groups]
    return [np.flatnonzero(of_rows == part) for part in range(len(shares) + 1)]


def _fitting(groups: Rows, sizes: Rows, count: int) -> list[int]:
    """The groups that fit into `count` rows, taken in their order; the smallest one where none does."""
    chosen, left = [], count
    for group in groups.tolist():
        if sizes[group] <= left:
            chosen.append(group)
            left -= sizes[group]
    return chosen or [int(groups[np.argmin(sizes[groups])])]


def draw_named_groups(groups: Words, parts: Sequence[str], shares: Mapping[str, float], seed: int) -> list[Rows]:
    """The same, but that the name of a group and the seed say its part, which so is the same in all sets of rows.

    Args:
        groups: `[N]`, the name of each row's group.
        parts: those that are drawn; the groups of others stay with those that are left.
        shares: of the groups, of all parts that may be drawn. Whether a group is drawn does not depend on the others,
            so a part of few groups may be larger or smaller.
        seed: of the choice.

    Raises:
        OptionError: a part gets no group.
    """
    names = list(shares)
    drawn = np.searchsorted(np.cumsum(list(shares.values())), [_draw(name, seed) for name in groups.known], "right")
    part_of = [(*names, "")[number] for number in drawn]
    chosen = [[name == part for name in part_of] for part in parts]
    chosen.append((~np.any(chosen, axis=0)).tolist())
    found = [np.flatnonzero(np.array(of_part, bool)[groups.codes]) for of_part in chosen]
    for part, rows in zip((*parts, "train"), found, strict=True):
        if not len(rows):
            raise OptionError(
                f"none of the {len(groups.known)} groups falls into the {part} part; set another seed, or larger shares"
            )
    return found


def _draw(name: str, seed: int) -> float:
    """Evenly distributed from 0 to 1."""
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def draw_strata(strata: Rows, shares: Sequence[float], seed: int) -> list[Rows]:
    """The same, so that every part has each stratum in the same share, as near as whole rows allow.

    Args:
        strata: `[N]`, the number of each row's stratum, 0 to S - 1.
        shares: of the rows, for each part.
        seed: of the choice.

    Raises:
        OptionError: no row is left.
    """
    sizes = np.bincount(strata)
    counts, left = [], sizes
    for count in _counts(len(strata), shares):
        counts.append(_apportioned(left, count, seed))
        left = left - counts[-1]
    pieces: list[list[Rows]] = [[] for _ in range(len(shares) + 1)]
    by_stratum = np.split(np.argsort(strata, kind="stable"), np.cumsum(sizes)[:-1])
    for stratum, rows in enumerate(by_stratum):
        drawn = draw_rows(len(rows), (seed, stratum), *(int(of_part[stratum]) for of_part in counts), None)
        for piece, places in zip(pieces, drawn, strict=True):
            piece.append(rows[places])
    return [np.sort(np.concatenate(piece)) for piece in pieces]


def _apportioned(sizes: Rows, total: int, seed: int) -> Rows:
    """`total` rows over the strata in proportion to their sizes, by the largest remainders, equal ones by lot."""
    exact = sizes * (total / sizes.sum())
    counts = np.floor(exact).astype(np.int64)
    lot = draw_rows(len(sizes), seed, None)[0]
    most = lot[np.argsort(-(exact - counts)[lot], kind="stable")]
    counts[most[: total - counts.sum()]] += 1
    return counts


def _counts(num_rows: int, shares: Sequence[float]) -> list[int]:
    counts = [held_out_count(num_rows, share) for share in shares]
    if sum(counts) >= num_rows:
        raise OptionError(f"{num_rows} training rows are too few to split")
    return counts
