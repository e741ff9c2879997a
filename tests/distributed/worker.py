"""One process of a distributed test: runs the scenarios and saves what they return.

python -m tests.distributed.worker FOLDER 1 [PREFIX ...]
python -m torch.distributed.run --nproc_per_node 2 -m tests.distributed.worker FOLDER 2 [PREFIX ...]
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.distributed.scenarios import Scenario, all_scenarios
from tests.distributed.training import rank, world_size


def main(folder: str, expected_world_size: int, scenarios: Callable[[], Mapping[str, Scenario]]) -> None:
    """Run the `scenarios`, which are asked for once the number of ranks is known."""
    torch.set_num_threads(1)
    gc.freeze()  # Trainer collects garbage whenever it begins: not what the imports have left, every time
    if expected_world_size > 1:
        dist.init_process_group("gloo")
    # Launchers that silently start one process exist (`accelerate launch --cpu`).
    assert world_size() == expected_world_size == int(os.environ.get("WORLD_SIZE", "1"))
    results: dict[str, dict[str, Any]] = {}
    for name, run in scenarios().items():
        start = time.perf_counter()
        results[name] = {**run(), "world_size": world_size(), "seconds": time.perf_counter() - start}
        print(f"{name}: {results[name]['seconds']:.1f} s", flush=True)
    torch.save(results, Path(folder) / f"world{expected_world_size}-rank{rank()}.pt")
    if expected_world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    prefixes = tuple(sys.argv[3:])
    main(
        sys.argv[1],
        int(sys.argv[2]),
        lambda: {name: run for name, run in all_scenarios().items() if not prefixes or name.startswith(prefixes)},
    )
