"""Short training runs for the distributed tests, by the Trainer and by plain loops; the same code on one and two ranks.

A rank's micro-batches are `per_rank` rows; accelerate deals the micro-batches of the sequential order out in turn, so
that a global batch is the same contiguous block of rows whatever the number of ranks.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from hf_bilb import BilevelMTLTrainer, BilevelMTLTrainingArguments, build_balancer
from hf_bilb.balancers import bilb
from hf_bilb.engine.balancer import LossBalancer
from hf_bilb.losses.contract import TaskLosses, as_task_losses
from tests.synthetic import SyntheticData, build_data, flat_parameters

#: Rows of a global batch, whatever the number of ranks.
GLOBAL_BATCH = 8
STEPS_PER_EPOCH = 25
NOT_COMPARED = ("runtime", "per_second", "flos")


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def shared_folder() -> Path:
    """A new folder, the same on every rank."""
    name = [tempfile.mkdtemp() if rank() == 0 else ""]
    if world_size() > 1:
        dist.broadcast_object_list(name)
    return Path(name[0])


def uneven_data(dtype: torch.dtype) -> SyntheticData:
    """25 global batches of 8 rows; the first 4 rows of each are rank 0's, the others rank 1's, when there are two.

    A third of the labels is missing at random, and beyond that: a task absent on one rank, on the other, on both, a
    rank without any label, and a task that is first seen in step 6.
    """
    data = build_data(STEPS_PER_EPOCH * GLOBAL_BATCH, dtype=dtype, missing=0.3)
    steps = data.labels.view(STEPS_PER_EPOCH, 2, GLOBAL_BATCH // 2, -1)
    steps[3, 1, :, 2] = torch.nan
    steps[4, 0, :, 0] = torch.nan
    steps[5, :, :, 1] = torch.nan
    steps[7, 1] = torch.nan
    steps[8, 0] = torch.nan
    steps[:5, :, :, 3] = torch.nan
    counts = steps.isfinite().sum(dim=2)
    assert (counts[:, 0] != counts[:, 1]).any(dim=1).sum() > 20, "the ranks' counts are to differ"
    return data


class Recorder(TrainerCallback):
    """Keeps the coefficients of every step."""

    def __init__(self) -> None:
        self.coefficients: list[Tensor] = []

    def on_step_end(self, *args: Any, balancer: Any = None, **kwargs: Any) -> None:
        self.coefficients.append(balancer.coefficients.clone())


def arguments(**settings: Any) -> BilevelMTLTrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 10,
        "disable_tqdm": True,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "weight_decay": 0.0,
        "dataloader_pin_memory": False,
        "train_sampling_strategy": "sequential",
        "ddp_backend": "gloo" if world_size() > 1 else None,
        "seed": 3,
    }
    return BilevelMTLTrainingArguments(**{**defaults, **settings})


def logged(trainer: BilevelMTLTrainer) -> list[dict[str, float]]:
    return [
        {key: value for key, value in entry.items() if not any(word in key for word in NOT_COMPARED)}
        for entry in trainer.state.log_history
    ]


def train(
    model: nn.Module,
    data: SyntheticData,
    *,
    accumulation: int = 1,
    global_batch: int = GLOBAL_BATCH,
    task_loss_func: Callable[..., Any] | None = None,
    resume_from: Path | None = None,
    wrapper: type = DistributedDataParallel,
    trainer_class: type[BilevelMTLTrainer] = BilevelMTLTrainer,
    watch: Callable[[BilevelMTLTrainer], Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Train with the Trainer on global batches of `global_batch` rows in all, and return what is compared, and what
    `watch` makes of the trainer afterwards."""
    per_rank, rest = divmod(global_batch, accumulation * world_size())
    assert rest == 0
    args = arguments(per_device_train_batch_size=per_rank, gradient_accumulation_steps=accumulation, **settings)
    assert args.world_size == world_size()
    recorder = Recorder()
    trainer = trainer_class(
        model=model, args=args, train_dataset=data, callbacks=[recorder], task_loss_func=task_loss_func
    )
    trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    wrapped = isinstance(trainer.model_wrapped, wrapper)
    assert wrapped == (world_size() > 1), f"two ranks without {wrapper.__name__} would train apart"
    return {
        "steps": trainer.state.global_step,
        "parameters": whole_parameters(model),
        "buffers": buffers_of(model),
        "balancer": trainer.balancer.state_dict(),
        "coefficients": torch.stack(recorder.coefficients),
        "logs": logged(trainer),
        "watched": None if watch is None else watch(trainer),
    }


def whole_parameters(model: nn.Module) -> Tensor:
    """As `flat_parameters`, gathered where they are sharded."""
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return torch.cat([parameter.detach().double().flatten() for parameter in whole])


def optimizer_settings(dtype: torch.dtype, steep: bool = False) -> dict[str, Any]:
    """Adam in float64; SGD in float32, as Adam divides rounding errors by small numbers; `steep`: smaller steps."""
    if dtype == torch.float64:
        return {"optim": "adamw_torch", "learning_rate": 1e-2}
    return {"optim": "sgd", "learning_rate": 1e-3 if steep else 5e-2}


def train_standalone(
    balancer_options: dict[str, Any],
    model: nn.Module,
    data: SyntheticData,
    steps: int,
    *,
    first_rank_rows: int = GLOBAL_BATCH // 2,
    before_step: Callable[[LossBalancer, int], None] | None = None,
    reevaluate_wrapped: bool = False,
    groups: Sequence[Sequence[int]] = (),
    **balancer_settings: Any,
) -> dict[str, Any]:
    """The same by hand: plain DistributedDataParallel, `balancer.backward`, `balancer.step`, float64 and Adam.

    Of two ranks the first takes `first_rank_rows` rows of each global batch, the second the others. `groups`: of ranks
    that train together, where it is not all of them; a rank in a group of its own takes whole batches.
    """
    ours = [group for ranks in groups if (group := dist.new_group(list(ranks))) != dist.GroupMember.NON_GROUP_MEMBER]
    group = ours[0] if ours else None
    together = dist.is_initialized() and dist.get_world_size(group) > 1
    balancer = build_balancer(
        balancer_options, num_tasks=data.labels.shape[1], dtype=torch.float64, **balancer_settings
    )
    wrapped = DistributedDataParallel(model, process_group=group) if together else model
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    balancer.bind(wrapped, optimizer)
    bounds = [0, first_rank_rows, GLOBAL_BATCH] if together else [0, GLOBAL_BATCH]
    place = rank() if together else 0
    values = []
    for step in range(steps):
        if step % STEPS_PER_EPOCH == 0:
            balancer.on_epoch_begin(step // STEPS_PER_EPOCH)
        if before_step is not None:
            before_step(balancer, step)
        start = step % STEPS_PER_EPOCH * GLOBAL_BATCH
        rows = slice(start + bounds[place], start + bounds[place + 1])
        batch = (data.features[rows], data.labels[rows])
        again = wrapped if reevaluate_wrapped else model
        rerun = partial(_rerun, again, batch, balancer.task_names)
        balancer.look_ahead(rerun, process_group=group)
        found = losses_of(wrapped(*batch), balancer.task_names)
        optimizer.zero_grad()
        features = {"router_features": found.router_features, "shared_features": found.shared_features}
        values.append(balancer.backward(found.losses, found.num_items, process_group=group, **features))
        optimizer.step()
        balancer.step(reevaluate=rerun, process_group=group)
    return {
        "steps": steps,
        "parameters": flat_parameters(model),
        "buffers": buffers_of(model),
        "balancer": balancer.state_dict(),
        "values": torch.stack(values),
    }


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def _rerun(model: nn.Module, batch: tuple[Tensor, Tensor], task_names: Sequence[str]) -> TaskLosses:
    return losses_of(model(*batch), task_names)


def losses_of(outputs: Any, task_names: Sequence[str]) -> TaskLosses:
    features = {name: outputs.get(name) for name in ("router_features", "shared_features")}
    return as_task_losses(outputs.losses, outputs.num_items, task_names, **features)


def train_plain(model: nn.Module, data: SyntheticData, global_batch: int, steps: int, learning_rate: float) -> Tensor:
    """A hand-written loop without Trainer, balancer or ranks: SGD on the sum of the tasks' losses, whole batches."""
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    for step in range(steps):
        rows = slice(step * global_batch, (step + 1) * global_batch)
        predictions, labels = model(data.features[rows]).logits, data.labels[rows]
        losses = []
        for k in range(labels.shape[1]):
            there = labels[:, k].isfinite()
            losses.append((predictions[there, k] - labels[there, k]).square().mean())
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
    return flat_parameters(model)


class SmallestGap:
    """Context that records the smallest |d| > 0 that BiLB's discrepancy sees: near zero, rounding decides its sign."""

    def __enter__(self) -> SmallestGap:
        self.value = math.inf
        # With its slopes in the closed form, which smoothing has none of.
        self._originals = {name: getattr(bilb, name) for name in ("discrepancy", "with_slopes")}
        for name, original in self._originals.items():
            setattr(bilb, name, partial(self._record, original))
        return self

    def __exit__(self, *exception: object) -> None:
        for name, original in self._originals.items():
            setattr(bilb, name, original)

    def _record(self, original: Callable[..., Any], values: Tensor, active: Tensor, *args: Any) -> Any:
        there = values.detach()[active]
        gaps = (there.unsqueeze(0) - there.unsqueeze(1)).abs()
        # Equal to the last bit (all l / l0 = 1 when references are taken) is equal in both ways to compute it.
        gaps = gaps[gaps > 0]
        if gaps.numel():
            self.value = min(self.value, float(gaps.min()))
        return original(values, active, *args)
