"""One process of a distributed test: runs the scenarios and saves what they return.

python -m tests.distributed.worker FOLDER 1
python -m torch.distributed.run --nproc_per_node 2 -m tests.distributed.worker FOLDER 2
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from tests.distributed.scenarios import all_scenarios
from tests.distributed.training import rank, world_size


def main(folder: str, expected_world_size: int, *prefixes: str) -> None:
    torch.set_num_threads(1)
    if expected_world_size > 1:
        dist.init_process_group("gloo")
    # Launchers that silently start one process exist (`accelerate launch --cpu`).
    assert world_size() == expected_world_size == int(os.environ.get("WORLD_SIZE", "1"))
    results = {}
    for name, run in all_scenarios().items():
        if prefixes and not name.startswith(prefixes):
            continue
        start = time.perf_counter()
        results[name] = {**run(), "world_size": world_size(), "seconds": time.perf_counter() - start}
        print(f"{name}: {results[name]['seconds']:.1f} s", flush=True)
    torch.save(results, Path(folder) / f"world{expected_world_size}-rank{rank()}.pt")
    if expected_world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
