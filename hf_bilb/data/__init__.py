"""The data sets that a recipe can name.

`DATA_SETS[name].options` is the dataclass of what a recipe's `data:` section may set, `DATA_SETS[name].load(options)`
gives the `TaskData`. A data set is imported when it is asked for; its packages (extras) when it is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_bilb.config.lazy import lazy_attribute
from hf_bilb.config.registry import DATA_SETS

if TYPE_CHECKING:
    from hf_bilb.data.task_data import DataSetSpec, MetricInfo, TaskData

__all__ = ["DATA_SETS", "DataSetSpec", "MetricInfo", "TaskData"]

_MODULES = dict.fromkeys(("DataSetSpec", "MetricInfo", "TaskData"), "hf_bilb.data.task_data")


def __getattr__(name: str) -> Any:
    return lazy_attribute(__name__, name, _MODULES)
