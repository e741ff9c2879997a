"""What a command leaves out of the terminal."""

from __future__ import annotations


def quieten() -> None:
    """Leave out a bar per file that is read, in this process."""
    import datasets
    from transformers.utils import logging as transformers_logging

    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
