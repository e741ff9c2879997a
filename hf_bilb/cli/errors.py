"""What the command line says of an error: one line on stderr, or a traceback where the fault is ours.

What a user gets wrong is one line and exit code 2, Ctrl-C is one line and exit code 130. What is said in addition to
our own errors: code that a recipe names, by file and line; memory and disks that are full, files and packages that are
missing. Anything else is a fault of this package or of a library, and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import IO, Any

import click

from hf_bilb.config.options import shown
from hf_bilb.config.user_code import own_code
from hf_bilb.errors import ExportError, HfBilbError, HubError, NonFiniteLossError, one_line


def speaks() -> bool:
    return os.environ.get("RANK", "0") == "0"


class UserError(click.ClickException):
    """A mistake in what was given: one line on stderr instead of a traceback, exit code 2."""

    exit_code = 2

    def __init__(self, error: Exception) -> None:
        super().__init__(one_line(error))

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the line; of several processes only the first one speaks."""
        if speaks():
            click.echo(f"hf-bilb: error: {self.format_message()}", err=True)


class Failed(UserError):
    """No mistake in what was given, but it came to an end that it cannot go on from; exit code 1."""

    exit_code = 1


TRACEBACK = "HF_BILB_TRACEBACK"
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def one_line_errors(interrupted: str = "interrupted") -> Iterator[None]:
    """Turns errors into lines; `interrupted` is that of Ctrl-C, unless the interrupt says more itself."""
    try:
        yield
    except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
        raise
    except KeyboardInterrupt as stopped:
        if speaks():
            click.echo(f"hf-bilb: {str(stopped) or interrupted}", err=True)
        raise click.exceptions.Exit(128 + signal.SIGINT) from None
    except Exception as error:
        said = _said(error)
        if said is None:
            raise
        if click.get_current_context().find_root().params.get("traceback"):
            traceback.print_exc()
        raise said from None


def _said(error: Exception) -> UserError | None:
    """The line for an error; None for one that is nobody's mistake but ours."""
    if isinstance(error, (NonFiniteLossError, HubError)):
        return Failed(error)
    if isinstance(error, ExportError):
        return Failed(error if error.__cause__ is None else _with_hint(str(error)))
    if isinstance(error, HfBilbError):
        return UserError(error if error.__cause__ is None else _with_hint(str(error)))
    if isinstance(error, BrokenProcessPool):
        killed = "a worker process was killed (no memory left?); the same command goes on from what is finished"
        return Failed(RuntimeError(killed))
    if _is_out_of_memory(error):
        less = "a smaller trainer.per_device_train_batch_size with more trainer.gradient_accumulation_steps takes less"
        return Failed(_with_hint(f"out of memory: {one_line(error, 200)}; {less}"))
    kind = type(error).__name__
    if (place := own_code(error)) is not None:
        return UserError(_with_hint(f"{place}: {kind}: {error}"))
    if isinstance(error, OSError):
        where = f": {shown(str(error.filename))}" if error.filename is not None else ""
        line = _with_hint(f"{error.strerror or error}{where}")
        return Failed(line) if error.errno in _FULL else UserError(line)
    return UserError(_with_hint(f"{kind}: {error}")) if isinstance(error, ImportError) else None


def _with_hint(message: str) -> Exception:
    return Exception(f"{one_line(message, 480)} ({TRACEBACK}=1 shows where it comes from)")


def _is_out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")  # where it is not loaded yet, nothing of it is raised
    of_device = torch is not None and isinstance(error, torch.OutOfMemoryError)
    return of_device or isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)


class OneLineUsage(click.Group):
    """A group whose usage errors are one line, too, instead of click's four."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Parse the arguments before the command's name."""
        with _one_line_usage():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Parse the command's own arguments and run it."""
        with _one_line_usage():
            return super().invoke(ctx)


@contextlib.contextmanager
def _one_line_usage() -> Iterator[None]:
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        command = "" if error.ctx is None else f" ({error.ctx.command_path} --help says more)"
        raise UserError(Exception(f"{one_line(error.format_message(), 480)}{command}")) from None
