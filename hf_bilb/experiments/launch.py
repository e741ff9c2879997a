"""`hf-bilb train --accelerate NAME`: the same run in several processes, started by accelerate."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from hf_bilb.config.options import unknown_name
from hf_bilb.errors import OptionError
from hf_bilb.experiments.packaged import ACCELERATE, recipes_folder


def configurations() -> dict[str, Path]:
    """The package's configurations of accelerate by name."""
    return {file.stem: file for file in sorted((recipes_folder() / ACCELERATE).glob("*.yaml"))}


def launch_command(name: str, arguments: Sequence[str], processes: int | None) -> list[str]:
    """The command that runs `hf-bilb train *arguments` by accelerate.

    Args:
        name: of one of `configurations`, or the path of a file of one's own.
        processes: how many; None: one for each accelerator of this machine, or as the file says.

    Raises:
        OptionError: no such configuration; or one that needs accelerators, on a machine without any.
    """
    known = configurations()
    file = known.get(name) or Path(name)
    if not file.is_file():
        raise unknown_name("--accelerate", name, list(known))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    if name in known:
        devices = _devices()
        if devices == 0:
            # accelerate would start one process on a CPU, whatever number it is asked for, and say nothing.
            raise OptionError(
                f"--accelerate: {name!r} needs GPUs, and this machine has none; on CPUs `torchrun --nproc_per_node 2 "
                "-m hf_bilb train RECIPE trainer.use_cpu=true` runs DistributedDataParallel"
            )
        if processes is None and name != "multi_node":
            processes = devices
    number = [] if processes is None else ["--num_processes", str(processes)]
    return [*command, *number, "-m", "hf_bilb", "train", *arguments]


def _devices() -> int:
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0
