"""The errors of this package. All are `HfBilbError`; each is also the builtin that fits, so that either can be caught.

The message of each is one line that names the thing that is wrong; the command line prints that line.
"""

from __future__ import annotations

LONGEST_MESSAGE = 560  # characters; what is cut out of a longer one is its middle


def one_line(message: object, longest: int = LONGEST_MESSAGE) -> str:
    """A message as one line that any terminal shows: line breaks become spaces, other signs that cannot be printed are
    written as Python writes them (`\\x00`), and what is longer than `longest` loses its middle."""
    text = str(message)
    if not text.isprintable():
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(text.split()))
    if len(text) <= longest:
        return text
    head = longest * 2 // 3
    return f"{text[:head]} ... {text[len(text) - (longest - head - 5) :]}"


class HfBilbError(Exception):
    """The base class of every error that this package raises for something that its user can mend.

    Whatever a message is put together from (a library's error, a key or a path of a user), it is one line (`one_line`).
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(message))


class OptionError(HfBilbError, ValueError):
    """An option that is unknown, of the wrong type or out of range. The message is one line and names the key path."""


class TaskLossError(HfBilbError, ValueError):
    """Losses, counts or features that do not keep the contract. The message names the task and what was expected."""


class MissingColumnError(HfBilbError, KeyError):
    """A function of the user's asks a batch for a column that it does not have. One line that says why."""

    __str__ = Exception.__str__  # that of KeyError quotes the message


class NonFiniteLossError(HfBilbError, ArithmeticError):
    """A loss with valid items is NaN, infinite or outside a logarithm's domain; the message names task and value."""


class TrainerError(HfBilbError, RuntimeError):
    """The Trainer was changed, or is used, in a way that balancing cannot follow. One line that says what to do."""


class CheckpointError(HfBilbError, ValueError):
    """A checkpoint that is incomplete, damaged, or belongs to another run. One line that names file and cause."""


class FolderInUseError(HfBilbError, RuntimeError):
    """Another run is writing into the output folder. One line that names the folder and, where known, the process."""


class MissingPackageError(HfBilbError, ImportError):
    """A package that is needed is not installed. The message is one line and says what to install."""


class MetricError(HfBilbError, ValueError):
    """Predictions, labels or figures that no metric can be computed from. The message is one line."""


class StorageError(HfBilbError, OSError):
    """A folder or file that cannot be written to. One line that names the option, the path and the cause."""


class ExportError(HfBilbError, RuntimeError):
    """A model that cannot be exported, or whose export computes something else. One line that names the cause."""


class HubError(HfBilbError, RuntimeError):
    """The Hub cannot be reached, or did not do what it was asked for. One line that names the cause."""
