"""What a loaded model was measured at, as the table that a run prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hf_bilb.metrics.info import MetricInfo
from hf_bilb.reporting.grid import Cell, Column, Grid, number
from hf_bilb.reporting.results import finite


def measured_table(infos: Sequence[MetricInfo], measured: Mapping[str, float], title: str) -> str:
    """The metrics of `LoadedModel.evaluate`, as text; those that are not defined on these rows are a dash.

    Args:
        infos: of the metrics, in order.
        measured: metric -> value.
        title: of the column of values.
    """
    columns = (*(Column(heading, left=True) for heading in ("task", "metric", "unit")), Column(title))
    rows = [(info.task, info.name, info.unit, number(finite(measured.get(info.key)))) for info in infos]
    return Grid(columns, tuple(tuple(map(Cell, row)) for row in rows)).to_text()
