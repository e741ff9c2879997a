"""Checks of options and files that several data sets make."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from hf_bilb.config.options import unknown_name
from hf_bilb.errors import OptionError
from hf_bilb.losses.contract import check_task_names


def check_tasks(names: Sequence[str] | None, known: Collection[str] | None, path: str = "tasks") -> None:
    """Raise `OptionError` for a choice of tasks that is empty, repeats one or names one that there is not.

    Args:
        names: the choice; None: no choice was made.
        known: every task there is; None: it is not known yet.
        path: of the option, for the message.
    """
    for name in () if names is None else check_task_names(names, path):
        if known is not None and name not in known:
            raise unknown_name(path, name, known)


def check_at_least(key: str, value: int | None, minimum: int, otherwise: str = "") -> None:
    """Raise `OptionError` for a number below `minimum`; None is valid; `otherwise` says what else is: `, or null`."""
    if value is not None and value < minimum:
        raise OptionError(f"{key}: {value} is not valid, expected {minimum} or more{otherwise}")


def check_fraction(key: str, value: float, below: float = 1) -> None:
    """Raise `OptionError` unless the share is between 0 and `below`."""
    if not 0 < value < below:
        raise OptionError(f"{key}: {value} is not valid, expected a share between 0 and {below:g}")


def check_folder(folder: Path, expected: str) -> None:
    """Raise `OptionError` unless the folder is there; `expected` says what it should hold."""
    if not folder.is_dir():
        raise OptionError(f"data.folder: {str(folder)!r} is no folder, expected one with {expected}")


def missing_column(where: str, column: str, columns: Iterable[str]) -> OptionError:
    """The error for a table without a column, which is named as the message shall have it; lists those that it has."""
    return OptionError(f"{where}: has no column {column} (it has {', '.join(columns)})")


@contextlib.contextmanager
def loading_from_hub(name: str, what: str) -> Iterator[None]:
    """Turns what `datasets` raises while it loads the set `name` into an `OptionError` that begins with `what`.

    Where the Hub does not answer, `datasets` takes what it has in its cache at once, without half a minute of trying.
    """
    import datasets
    from huggingface_hub import get_token

    try:
        with _offline_where_nobody_answers(name):
            yield
    except OptionError:  # is a ValueError, and says it already
        raise
    except datasets.exceptions.DatasetNotFoundError as error:
        token = "" if get_token() else " A private one needs a token: set HF_TOKEN, or log in with `hf auth login`."
        raise OptionError(f"{what}: {' '.join(str(error).split())}{token}") from None
    except (OSError, ValueError, LookupError, datasets.exceptions.DatasetsError) as error:
        raise OptionError(f"{what}: {' '.join(str(error).split())}") from None


@contextlib.contextmanager
def _offline_where_nobody_answers(name: str) -> Iterator[None]:
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    before, cause = datasets.config.HF_HUB_OFFLINE, ""
    if not before and not Path(name).exists():
        try:
            HfApi(endpoint=datasets.config.HF_ENDPOINT).dataset_info(name, timeout=10)
        except HfHubHTTPError:  # an answer; `datasets` says what it means
            pass
        except (HTTPError, OSError) as error:
            cause, datasets.config.HF_HUB_OFFLINE = f"{type(error).__name__}: {error}", True
    try:
        yield
    except ConnectionError as error:
        if not cause:
            raise
        raise ConnectionError(
            f"the Hub cannot be reached ({cause}), and the cache of `datasets` has no copy"
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = before
