"""The former place of `CheckpointError`; take it from `hf_bilb` itself."""

from __future__ import annotations

import warnings

from hf_bilb.errors import CheckpointError

__all__ = ["CheckpointError"]

warnings.warn("hf_bilb.checkpointing has moved: take CheckpointError from hf_bilb", DeprecationWarning, stacklevel=2)
