"""The errors of this package. All are `HfBilbError`; each is also the builtin that fits, so that either can be caught.

The message of each is one line that names the thing that is wrong; the command line prints that line.
"""

from __future__ import annotations


class HfBilbError(Exception):
    """The base class of every error that this package raises for something that its user can mend."""


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
