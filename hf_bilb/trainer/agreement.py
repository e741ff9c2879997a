"""All ranks of a run do the same: what one of them finds out, or fails at, is said to the others.

An error on one rank alone would leave the others waiting for it until the process group's timeout (ten minutes or
more), with nothing said.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from hf_bilb.engine.reduction import data_parallel_size
from hf_bilb.errors import HfBilbError, TrainerError

T = TypeVar("T")


def from_first_rank(action: Callable[[], T]) -> T:
    """Do `action` on the first rank of the default process group only; every rank gets its result.

    Args:
        action: without arguments; its result is pickled.

    Raises:
        HfBilbError: what `action` raised, on every rank. Another kind of error is raised as it is on the first rank,
            and as `TrainerError` with its text on the others.

    Cost: one broadcast; none without a process group.
    """
    if data_parallel_size() == 1:
        return action()
    result, failure = _attempt(action) if dist.get_rank() == 0 else (None, None)
    said: list[Any] = [result, _portable(failure)]
    dist.broadcast_object_list(said, src=0)
    _raise(failure, [said[1]])
    return said[0]


def together(action: Callable[[], T]) -> T:
    """Do `action` on every rank; when it fails on one, every rank raises, the first failing rank's error.

    `action` may not communicate: ranks that fail would leave it early.

    Raises:
        HfBilbError: as `from_first_rank` does.

    Cost: one gathering of a small object from each rank; none without a process group.
    """
    ranks = data_parallel_size()
    if ranks == 1:
        return action()
    result, failure = _attempt(action)
    said: list[Any] = [None] * ranks
    dist.all_gather_object(said, _portable(failure))
    _raise(failure, said)
    return result  # type: ignore[return-value]


def _attempt(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return action(), None
    except Exception as error:
        return None, error


def _portable(error: Exception | None) -> HfBilbError | None:
    if error is None or isinstance(error, HfBilbError):
        return error
    return TrainerError(f"another process of this run failed: {type(error).__name__}: {error}")


def _raise(own: Exception | None, said: list[HfBilbError | None]) -> None:
    if own is not None:
        raise own
    for error in said:
        if error is not None:
            raise error
