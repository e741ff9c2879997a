"""The error of all metrics, apart from them so that those without tensors need no torch."""

from __future__ import annotations


class MetricError(ValueError):
    """Predictions, labels or figures that no metric can be computed from. The message is one line."""
