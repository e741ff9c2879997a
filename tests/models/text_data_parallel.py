"""One process of `test_text_data_parallel`: each rank trains on batches of another task.

python -m tests.models.text_data_parallel FILE 1
python -m torch.distributed.run --nproc_per_node 2 -m tests.models.text_data_parallel FILE 2
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from hf_bilb import build_balancer
from tests.models.test_text_encoder import TASKS, batch_of, model_of

STEPS = 4


def joined(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def train(rank: int, world_size: int) -> dict[str, dict[str, Tensor]]:
    model = model_of().double()
    # Every parameter must be reached on every rank in every step.
    wrapped = DistributedDataParallel(model, find_unused_parameters=False) if world_size > 1 else model
    balancer = build_balancer("bilb", task_names=list(TASKS), dtype=torch.float64, absent_tasks="hold")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for step in range(STEPS):
        of_ranks = [
            batch_of([step % 3] * 5, (1,), torch.float64),
            batch_of([(step + 1) % 3] * 3, dtype=torch.float64),
        ]
        batch = of_ranks[rank] if world_size > 1 else joined(of_ranks)
        optimizer.zero_grad()
        output = wrapped(**batch)
        balancer.backward(output.losses, num_items=output.num_items)
        optimizer.step()
        balancer.step()
    return {"model": model.state_dict(), "balancer": balancer.state_dict()}


def main(file: str, world_size: int) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo")
        assert dist.get_world_size() == world_size
    rank = dist.get_rank() if world_size > 1 else 0
    # The wrapped model is gone before the process group is: of the two, torch's reducer must not be the last to hold
    # the group, whose threads it would wait for with the interpreter's lock that one of them may want.
    states = train(rank, world_size)
    if rank == 0:
        torch.save(states, file)
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
