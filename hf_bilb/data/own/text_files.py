"""Text files as they lie on the disk: packed or not, in whichever encoding."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import csv
import gzip
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from hf_bilb.data.cache import short_hash
from hf_bilb.errors import OptionError

_OPENERS: dict[str, Callable[..., IO[Any]]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
#: What files that are damaged, or of another kind than their names say, raise.
UNREADABLE = (OSError, EOFError, ValueError, LookupError, NotImplementedError, StopIteration, lzma.LZMAError)
_LONGEST_CELL = 2**31 - 1  # that `csv` takes on every system
_OF_PANDAS = "Error tokenizing data. C error: "
_AT_ONCE = 2**20  # bytes
_LEAST_ZEROS = 0.01  # of the bytes of text in UTF-16; one alone is a stray one


def ending(file: Path) -> str:
    """What a file's name ends with, before the ending that says that it is packed."""
    name = Path(file.stem) if file.suffix in _OPENERS else file
    return name.suffix.lower()


def open_text(file: Path, newline: str = "", encoding: str = "utf-8") -> IO[str]:
    """The file's text, without the mark that may stand in front of it."""
    opener: Callable[..., IO[str]] = _OPENERS.get(file.suffix, open)
    return opener(file, "rt", encoding=without_mark(encoding), newline=newline)


def without_mark(encoding: str) -> str:
    """The name of the encoding that passes over a mark in front of the text."""
    return "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding


@contextlib.contextmanager
def reading(file: Path, encoding: str | None = None) -> Iterator[None]:
    """Turns an error of reading into one line; `datasets` would also write some of its own.

    `encoding` is what `data.csv.encoding` says; None: the file is none that it is about.
    """
    import datasets

    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    limit = csv.field_size_limit(_LONGEST_CELL)
    try:
        yield
    except OptionError:
        raise
    except (*UNREADABLE, csv.Error, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        said = " ".join(str(cause).split()).removeprefix(_OF_PANDAS) or type(error).__name__
        advice = ""
        if isinstance(cause, UnicodeError):
            advice = "; save it as UTF-8" if encoding is None else encoding_hint(file, encoding)
        raise OptionError(f"data: {file} cannot be read: {said}{advice}") from None
    finally:
        csv.field_size_limit(limit)
        datasets.logging.set_verbosity(verbosity)


def state(file: Path) -> str:
    """Names the rows of a file in the cache of `datasets`, which by itself takes a file for unchanged whose path and
    time of change are the same: so they are after `rsync -t` and `cp -p`."""
    facts = file.stat()
    return short_hash(f"{facts.st_size} {facts.st_ctime_ns} {facts.st_ino}")


# --- encodings ----------------------------------------------------------------------------------------------------


def encoding_hint(file: Path, encoding: str) -> str:
    """The end of an error of a file that is not in the encoding that is set."""
    guess = guess_encoding(file)
    return f"; is data.csv.encoding {guess!r}?" if guess else f"; data.csv.encoding is {encoding!r}, set the file's own"


def guess_encoding(file: Path) -> str | None:
    """`utf-8`, `utf-16` (or `-le`, `-be`), or `cp1252`, as Western European Windows saves text; None: none of these.

    Cost: reads the whole file, about 0.3 GB a second.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    counts, zeros, head, is_utf8 = np.zeros(256, np.int64), np.zeros(2, np.int64), b"", True
    with _OPENERS.get(file.suffix, open)(file, "rb") as stream:
        while chunk := stream.read(_AT_ONCE):
            head = head or chunk[:4]
            found = np.frombuffer(chunk, np.uint8)
            counts += np.bincount(found, minlength=256)
            zeros += [int((found[place::2] == 0).sum()) for place in (0, 1)]
            is_utf8 = is_utf8 and _decodes(decoder, chunk)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if _LEAST_ZEROS * counts.sum() < counts[0]:
        return "utf-16-le" if zeros[1] > zeros[0] else "utf-16-be"
    if is_utf8 and _decodes(decoder, b"", final=True):
        return "utf-8"
    return "cp1252" if _is_western(counts) else None


def looks_like_utf8(file: Path) -> bool:
    """Whether the beginning of a file holds more than ASCII, and is UTF-8: hardly any text of another encoding is."""
    with _OPENERS.get(file.suffix, open)(file, "rb") as stream:
        head = stream.read(_AT_ONCE)
    return not head.isascii() and _decodes(codecs.getincrementaldecoder("utf-8")(), head)


def _decodes(decoder: codecs.IncrementalDecoder, data: bytes, final: bool = False) -> bool:
    try:
        decoder.decode(data, final)
    except UnicodeDecodeError:
        return False
    return True


def _is_western(counts: NDArray[np.int64]) -> bool:
    """Whether bytes, `counts [256]` of each value, are text in cp1252: no character that it lacks, and some letters
    with accents among many without."""
    letters = signs = others = plain = 0
    for value, count in enumerate(counts.tolist()):
        char = bytes([value]).decode("cp1252", "replace")
        if value < 128:
            plain += count * char.isalpha()
            others += count * (value < 32 and char not in "\t\n\v\f\r")
        elif char.isalpha():
            letters += count
        elif char in "\xa0€‚„…†‡‰‹›‘’“”•–—™¡¢£§¨©«¬®¯°±²³´µ¶·¸¹»¼½¾¿×÷":
            signs += count
        else:
            others += count
    return others == 0 and 4 * letters <= plain and letters + signs > 0
