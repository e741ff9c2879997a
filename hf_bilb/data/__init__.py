"""The data sets that a recipe can name.

`DATA_SETS[name].options` is the dataclass of what a recipe's `data:` section may set, `DATA_SETS[name].load(options)`
gives the `TaskData`. Importing this package needs none of the data packages.
"""

from __future__ import annotations

from hf_bilb.data.dense.cityscapes import CityscapesOptions, load_cityscapes
from hf_bilb.data.dense.nyuv2 import Nyuv2Options, load_nyuv2
from hf_bilb.data.images.celeba import CelebaOptions, load_celeba
from hf_bilb.data.molecules.molecule_net import MoleculeNetOptions, load_sider, load_tox21
from hf_bilb.data.molecules.qm9 import Qm9Options, load_qm9
from hf_bilb.data.molecules.qm9_graphs import Qm9GraphsOptions, load_qm9_graphs
from hf_bilb.data.tables.adult import AdultOptions, load_adult
from hf_bilb.data.tables.census import CensusOptions, load_census
from hf_bilb.data.tables.sarcos import SarcosOptions, load_sarcos
from hf_bilb.data.task_data import DataSetSpec, MetricInfo, TaskData
from hf_bilb.data.text.glue import GlueOptions, load_glue
from hf_bilb.data.text.instructions import InstructionOptions, load_instructions

DATA_SETS: dict[str, DataSetSpec] = {
    "adult": DataSetSpec(options=AdultOptions, load=load_adult),
    "celeba": DataSetSpec(options=CelebaOptions, load=load_celeba),
    "census_income": DataSetSpec(options=CensusOptions, load=load_census),
    "cityscapes": DataSetSpec(
        options=CityscapesOptions, load=load_cityscapes, model_needs={"image_labels": "image_tasks"}
    ),
    "glue": DataSetSpec(options=GlueOptions, load=load_glue, from_model={"tokenizer": "encoder"}),
    "instructions": DataSetSpec(options=InstructionOptions, load=load_instructions, from_model={"tokenizer": "model"}),
    "nyuv2": DataSetSpec(options=Nyuv2Options, load=load_nyuv2, model_needs={"image_labels": "image_tasks"}),
    "qm9": DataSetSpec(options=Qm9Options, load=load_qm9),
    "qm9_graphs": DataSetSpec(options=Qm9GraphsOptions, load=load_qm9_graphs),
    "sarcos": DataSetSpec(options=SarcosOptions, load=load_sarcos),
    "sider": DataSetSpec(options=MoleculeNetOptions, load=load_sider),
    "tox21": DataSetSpec(options=MoleculeNetOptions, load=load_tox21),
}

__all__ = ["DATA_SETS", "DataSetSpec", "MetricInfo", "TaskData"]
