"""How the Trainer gets to FSDP2 and to DeepSpeed on CPUs, with gloo between the ranks; the sharding is real.

accelerate takes FSDP for kinds of accelerators alone (`AcceleratorState.__init__` lists them, without `MULTI_CPU`), so
that on CPUs `fsdp` silently is DistributedDataParallel: its state is told otherwise here. DeepSpeed needs no such
trick, but must be asked for as `accelerate launch` does (ACCELERATE_USE_DEEPSPEED), with `use_cpu: false` and
`ddp_backend: gloo`: under `use_cpu: true` it is silently left out, and with `deepspeed=...` alone each rank takes
itself for the only one.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hf_bilb.trainer.sharded import local_part

FSDP2 = {"version": 2, "auto_wrap_policy": "NO_WRAP", "cpu_ram_efficient_loading": False}
ZERO = ("zero0", "zero1", "zero2", "zero3")
BACKENDS = ("ddp", "fsdp2", *ZERO)


def has_deepspeed() -> bool:
    return find_spec("deepspeed") is not None


@contextmanager
def fsdp_on_cpu() -> Iterator[None]:
    """accelerate takes a CPU's plugin for FSDP, too."""
    original = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            # From here every later `AcceleratorState()` takes its kind.
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init
    try:
        yield
    finally:
        AcceleratorState.__init__ = original
        AcceleratorState._reset_state(reset_partial_state=True)


def without_compiler() -> None:
    """Keep DeepSpeed from compiling its reduction over shared memory, for a minute or two, when it first starts: it
    takes gloo's then. Whoever is killed meanwhile leaves a lock on which all later starts wait for ever."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def zero_config(stage: int, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        **more,
    }


@contextmanager
def deepspeed_on_cpu(config: dict[str, Any]) -> Iterator[None]:
    """As `accelerate launch --use_deepspeed --deepspeed_config_file` of two processes, which takes no CPUs."""
    without_compiler()
    file = Path(tempfile.mkdtemp()) / "deepspeed.json"
    file.write_text(json.dumps(config))
    wanted = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file),
        "DS_ACCELERATOR": "cpu",
    }
    before = {key: os.environ.get(key) for key in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})
        AcceleratorState._reset_state()


@contextmanager
def on_backend(name: str, **config: Any) -> Iterator[dict[str, Any]]:
    """Inside, two ranks train by the backend of that name; gives settings for `training.train`."""
    if name == "ddp":
        yield {"wrapper": DistributedDataParallel}
    elif name == "fsdp2":
        with fsdp_on_cpu():
            yield {"fsdp": True, "fsdp_config": {**FSDP2, **config}, "wrapper": FSDPModule}
    else:
        from deepspeed import DeepSpeedEngine

        with deepspeed_on_cpu(zero_config(int(name.removeprefix("zero")), **config)):
            yield {"use_cpu": False, "wrapper": DeepSpeedEngine}


def gathered(model: nn.Module) -> Tensor:
    """All parameters as one vector in float64, on every rank."""
    parts = []
    for parameter in model.parameters():
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                parts.append(parameter.detach().clone())
        else:
            parts.append(parameter.full_tensor() if isinstance(parameter, DTensor) else parameter)
    return torch.cat([part.detach().double().flatten() for part in parts])


def shares(trainer: Any) -> dict[str, Any]:
    """How much this rank holds of the parameters and of the optimizer's state, and how they are placed: FSDP2 has them
    as DTensors in shards, ZeRO-3 in pieces of its own, ZeRO 1 to 3 has one flat part of the optimizer's state."""
    parameters = list(trainer.model.parameters())
    inner = trainer.optimizer
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer
    updated = [p for group in inner.param_groups for p in group["params"]]
    return {
        "whole": sum(getattr(p, "ds_numel", p.numel()) for p in parameters),
        "parameters": sum(local_part(p).numel() for p in parameters),
        "updated": sum(local_part(p).numel() for p in updated),
        "placements": sorted({str(one) for p in parameters if isinstance(p, DTensor) for one in p.placements}),
    }
