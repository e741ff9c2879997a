"""The data sets that a recipe can name.

`DATA_SETS[name].options` is the dataclass of what a recipe's `data:` section may set, `DATA_SETS[name].load(options)`
gives the `TaskData`. Importing this package needs none of the data packages.
"""

from __future__ import annotations

from hf_bilb.data.base import DataSetSpec, MetricInfo, MissingPackageError, TaskData
from hf_bilb.data.glue import GlueOptions, load_glue
from hf_bilb.data.qm9 import Qm9Options, load_qm9

DATA_SETS: dict[str, DataSetSpec] = {
    "glue": DataSetSpec(options=GlueOptions, load=load_glue, from_model={"tokenizer": "encoder"}),
    "qm9": DataSetSpec(options=Qm9Options, load=load_qm9),
}

__all__ = ["DATA_SETS", "DataSetSpec", "MetricInfo", "MissingPackageError", "TaskData"]
