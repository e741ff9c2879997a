"""What the distributed tests run, on one rank and on two: name -> function that returns what is compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import IterableDataset

from hf_bilb import BilevelMTLTrainer
from hf_bilb.engine import reduction
from hf_bilb.engine.balancer import LossBalancer
from hf_bilb.engine.weighting import WindowShare
from hf_bilb.errors import NonFiniteLossError
from hf_bilb.losses.masked import masked_mse
from tests.distributed.absent_tasks import absent_task_scenarios
from tests.distributed.double_loop import double_loop_scenarios
from tests.distributed.feature_routers import feature_router_scenarios
from tests.distributed.item_counts import item_count_scenarios
from tests.distributed.method_checks import sample, scenarios
from tests.distributed.mixture_evaluation import mixture_scenarios
from tests.distributed.restored import restored_scenarios
from tests.distributed.sharded import sharded_scenarios
from tests.distributed.streams import stream_scenarios
from tests.distributed.training import (
    SmallestGap,
    arguments,
    optimizer_settings,
    rank,
    train,
    train_plain,
    train_standalone,
    uneven_data,
    world_size,
)
from tests.distributed.windows import window_scenarios
from tests.products import ALL_CASES
from tests.synthetic import TASK_NAMES, SyntheticData, SyntheticModel, SyntheticOutput, build_data, build_model

BALANCERS: dict[str, dict[str, Any]] = {
    "ls": {"name": "ls"},
    "si": {"name": "si"},
    "uw": {"name": "uw"},
    "bilb": {"name": "bilb", "learning_rate": 0.05},
    "bilb-celeba": {"name": "bilb", "preset": "celeba", "learning_rate": 0.05},
    "bilb-qm9": {"name": "bilb", "preset": "qm9", "learning_rate": 0.05},
}
SABOTAGE = [
    "local_denominator/ls",
    "local_denominator/bilb",
    "local_objective/si",
    "local_objective/uw",
    "local_objective/bilb",
    "no_factor_ranks/ls",
]
EQUALITY = [
    f"{balancer}/{absent}/{precision}"
    for balancer in BALANCERS
    for absent, precision in (("skip", "float64"), ("hold", "float64"), ("skip", "float32"))
] + ["bilb/hold/float32"]
#: Coefficients 1 / l, up to 5000 in this data: a large step would amplify rounding errors.
STEEP = {"si", "bilb-qm9"}
DTYPES = {"float64": torch.float64, "float32": torch.float32}
Scenario = Callable[[], dict[str, Any]]


# --- equality with one process ------------------------------------------------------------------------------------


def equality(balancer: str, absent: str, dtype: torch.dtype) -> dict[str, Any]:
    with SmallestGap() as gap:
        result = train(
            build_model(dtype),
            uneven_data(dtype),
            balancer=BALANCERS[balancer],
            absent_tasks=absent,
            num_train_epochs=2,
            **optimizer_settings(dtype, steep=balancer in STEEP),
        )
    return {**result, "smallest_gap": gap.value}


def standalone(balancer: str) -> dict[str, Any]:
    return train_standalone(BALANCERS[balancer], build_model(torch.float64), uneven_data(torch.float64), steps=50)


# --- sabotage: the same, broken in one place ----------------------------------------------------------------------


@contextmanager
def sabotaged(kind: str) -> Iterator[None]:
    original = LossBalancer.surrogate

    def surrogate(self: LossBalancer, batch: Any, process_group: Any = None, share: Any = None) -> Any:
        ranks = reduction.data_parallel_size(process_group)
        here = (batch.num_items > 0).to(batch.num_items.dtype)
        everywhere = reduction.all_reduce_sum(batch.num_items, process_group).clamp(min=1)
        exact = batch.num_items / everywhere
        local = {"local_denominator": here / ranks, "local_objective": exact, "no_factor_ranks": exact / ranks}[kind]
        return original(
            self, batch, process_group, WindowShare(local, torch.ones_like(local), torch.ones(()), torch.ones(()), 1)
        )

    def reduce_locally(micro_batches: Any, with_features: bool = False, group: Any = None, alone: bool = False) -> Any:
        (batch,) = micro_batches
        here = batch.num_items > 0
        losses = torch.where(here, batch.losses.detach(), torch.zeros_like(batch.num_items))
        zero = batch.num_items.new_zeros(())
        return reduction.GlobalBatch(losses, batch.num_items, here, zero, None, zero, reduction.data_parallel_size())

    reduce = reduction.reduce_losses
    LossBalancer.surrogate = surrogate
    if kind == "local_objective":
        reduction.reduce_losses = reduce_locally
    try:
        yield
    finally:
        LossBalancer.surrogate = original
        reduction.reduce_losses = reduce


def sabotage(kind: str, balancer: str) -> dict[str, Any]:
    """To be compared with the scenario `equality` of one process, in which nothing is broken."""
    with sabotaged(kind):
        return equality(balancer, "skip", torch.float32)


# --- heads that are not connected on one rank ---------------------------------------------------------------------


class SeparateHeads(SyntheticModel):
    """One module per head, each used only where its task has labels; losses and counts are dicts of what there is."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.heads = nn.ModuleList(nn.Linear(config.hidden_size, 1) for _ in config.task_names)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> SyntheticOutput:
        hidden = self.trunk(features)
        losses, num_items = {}, {}
        for k, name in enumerate(self.config.task_names):
            if labels[:, k].isfinite().any():
                loss, count = masked_mse(self.heads[k](hidden), labels[:, k : k + 1])
                losses[name], num_items[name] = loss[0], count[0]
        return SyntheticOutput(losses=losses, num_items=num_items, logits=hidden)


class ConstantZeros(SeparateHeads):
    """Hands over a zero that is connected to nothing for a task without labels."""

    def forward(self, features: Tensor, labels: Tensor | None = None) -> SyntheticOutput:
        found = super().forward(features, labels)
        for name in self.config.task_names:
            found.losses.setdefault(name, features.new_zeros(()))
            found.num_items.setdefault(name, features.new_zeros(()))
        return found


class DictOfHeads(SeparateHeads):
    """Runs every head, but hands over the losses of the tasks with labels only: through `task_loss_func`."""

    def forward(self, features: Tensor, labels: Tensor | None = None) -> SyntheticOutput:
        hidden = self.trunk(features)
        return SyntheticOutput(logits=torch.cat([head(hidden) for head in self.heads], dim=1))


class Checkpointed(SeparateHeads):
    """A trunk under reentrant checkpointing, whose parameters no graph shows before the backward pass is there."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        trunk = self.trunk.forward
        self.trunk.forward = lambda features: checkpoint(trunk, features.requires_grad_(), use_reentrant=True)


def dict_losses(outputs: Any, batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    losses, num_items = masked_mse(outputs.logits, batch["labels"])
    given = [k for k in range(len(num_items)) if num_items[k] > 0]
    return {TASK_NAMES[k]: losses[k] for k in given}, {TASK_NAMES[k]: num_items[k] for k in given}


HEADS: dict[str, type[SeparateHeads]] = {
    "unused": SeparateHeads,
    "constant": ConstantZeros,
    "dropped": DictOfHeads,
    "checkpointed": Checkpointed,
}
#: Several losses in one backward pass or not, and of how many heads; of two, two losses leave no rest.
RESTS = [(False, 4), (True, 4), (True, 2)]
#: Every kind in every way, with and without find_unused_parameters (which reentrant checkpointing does not go with).
MISSING_HEADS = [
    (over, kind, find_unused)
    for over, with_unused in (
        ("heads", ("constant", "dropped")),
        ("heads_over_micro_batch", ("unused",)),
        ("heads_over_window", ("constant",)),
    )
    for kind in HEADS
    for find_unused in (False, True)
    if (kind != "checkpointed" or not find_unused) and (ALL_CASES or find_unused == (kind in with_unused))
]


def data_for_dicts() -> SyntheticData:
    """As `uneven_data`, but every rank has a label at least, as an empty dict of losses is an error.

    Some tasks are absent on both ranks: Adam moves their heads by its momentum, on any number of ranks alike.
    """
    data = uneven_data(torch.float64)
    steps = data.labels.view(25, 2, 4, -1)
    steps[7, 1, 0, 2] = 0.25
    steps[8, 0, 1, 1] = -0.5
    return data


def missing_heads(kind: str, find_unused: bool) -> dict[str, Any]:
    return train(
        build_separate_heads(HEADS[kind]),
        data_for_dicts(),
        balancer=BALANCERS["bilb"],
        num_train_epochs=1,
        ddp_find_unused_parameters=find_unused,
        task_loss_func=dict_losses if kind == "dropped" else None,
        **optimizer_settings(torch.float64),
    )


def missing_heads_in_windows(kind: str, find_unused: bool, balance_over: str) -> dict[str, Any]:
    """Two micro-batches in a window, each with heads that are missing on one rank; `alpha` is always there."""
    # Where the decision is the window's, one process has it in one batch.
    accumulation = 1 if balance_over == "window" and world_size() == 1 else 2
    data = build_data(80, dtype=torch.float64, missing=0.6)
    data.labels[:, 0] = data.labels[:, 0].nan_to_num(0.1)
    windows = data.labels.view(10, 8, -1)
    assert windows.isfinite().any(dim=1).all(), "every task is to be somewhere in every window"
    return train(
        build_separate_heads(HEADS[kind]),
        data,
        balancer=BALANCERS["bilb"],
        accumulation=accumulation,
        balance_over=balance_over,
        num_train_epochs=2,
        ddp_find_unused_parameters=find_unused,
        task_loss_func=dict_losses if kind == "dropped" else None,
        **optimizer_settings(torch.float64),
    )


def rest_reached(several: bool, number_of_heads: int) -> dict[str, Any]:
    """Three backward passes with one head or several, others on each rank; one process takes what both take."""
    trunk, heads = nn.Linear(3, 4).double(), nn.ModuleList(nn.Linear(4, 1) for _ in range(number_of_heads)).double()
    model = nn.ModuleDict({"trunk": trunk, "heads": heads})
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.linspace(-1, 1, parameter.numel(), dtype=torch.float64).view_as(parameter) + number)
    model.forward = lambda row, k: heads[k](trunk(row)).square().sum()
    ranks = world_size()
    wrapped = nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
    found = []
    for step in range(3):
        row = torch.arange(3, dtype=torch.float64) + step
        losses = []
        for number in [dist.get_rank()] if ranks > 1 else [0, 1]:
            for k in (number, (number + 1) % number_of_heads) if several else (number,):
                loss = wrapped(row, k)
                losses.append(reduction.reach_rest(loss, model.parameters()) if ranks > 1 else loss / 2)
        sum(losses).backward()
        found += [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
        model.zero_grad()
    return {"gradients": torch.cat([gradient.flatten() for gradient in found])}


def build_separate_heads(cls: type[SeparateHeads]) -> SeparateHeads:
    reference = build_model(torch.float64)
    model = cls(reference.config).double()
    with torch.no_grad():
        model.trunk.load_state_dict(reference.trunk.state_dict())
        for k, head in enumerate(model.heads):
            head.weight.copy_(reference.heads.weight[k : k + 1])
            head.bias.copy_(reference.heads.bias[k : k + 1])
    return model


# --- no factor of 2, 4 or 8 ---------------------------------------------------------------------------------------


def no_factor(kwargs_forward: bool, accumulation: int) -> dict[str, Any]:
    data = build_data(192, dtype=torch.float64, missing=0.3)
    batch = 4 * accumulation * world_size()
    steps = 6
    found = train(
        build_model(torch.float64, kwargs_forward=kwargs_forward),
        data,
        balancer="ls",
        accumulation=accumulation,
        global_batch=batch,
        max_steps=steps,
        optim="sgd",
        learning_rate=5e-2,
    )
    return {**found, "plain": train_plain(build_model(torch.float64), data, batch, steps, 5e-2)}


def accumulated(accumulation: int, balancer: str = "ls", **settings: Any) -> dict[str, Any]:
    # 44 rows in windows of 8: the last one has 4, which is fewer micro-batches of the same size.
    return train(
        build_model(torch.float64, auxiliary_weight=0.1),
        build_data(44, dtype=torch.float64, missing=0.4),
        balancer=balancer,
        accumulation=accumulation,
        num_train_epochs=3,
        optim="adamw_torch",
        learning_rate=1e-2,
        logging_steps=6,
        **settings,
    )


# --- a loss that is not finite on one rank ------------------------------------------------------------------------


def poisoned(policy: str) -> dict[str, Any]:
    data = uneven_data(torch.float64)
    # The last four rows of batch 9: rank 1's.
    data.features[9 * 8 + 5] = torch.inf
    data.labels[9 * 8 + 5] = 1.0
    try:
        return train(
            build_model(torch.float64),
            data,
            balancer=BALANCERS["bilb"],
            num_train_epochs=1,
            nonfinite_loss=policy,
            **optimizer_settings(torch.float64),
        )
    except NonFiniteLossError as error:
        return {"error": str(error)}


MARK = 7.0


def steep(outputs: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The model's losses; a marked row gives the third one the root of a sum that is 0: no value, an infinite slope."""
    marked = outputs.logits[batch["features"][:, 0] == MARK]
    root = (marked * 0).square().sum().sqrt()
    third = torch.eye(len(TASK_NAMES), dtype=root.dtype)[2]
    return torch.where(third > 0, outputs.losses + root, outputs.losses), outputs.num_items


def steep_on_one_rank(policy: str) -> dict[str, Any]:
    data = uneven_data(torch.float64)
    data.features[9 * 8 + 5, 0] = MARK
    try:
        return train(
            build_model(torch.float64),
            data,
            balancer=BALANCERS["bilb"],
            num_train_epochs=1,
            nonfinite_loss=policy,
            task_loss_func=steep,
            **optimizer_settings(torch.float64),
        )
    except NonFiniteLossError as error:
        return {"error": str(error)}


# --- a look at the loss by one rank alone -------------------------------------------------------------------------


class LookOnOneRank(BilevelMTLTrainer):
    """Rank 0 looks at the loss of its batch before each step; the other one does not, and must not be waited for."""

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        if rank() == 0:
            assert self.compute_loss(self.model.train(), {k: v * 100 for k, v in inputs.items()}).isfinite()
        return super().training_step(model, inputs, num_items_in_batch)


def looked_at() -> dict[str, Any]:
    return train(
        build_model(torch.float64),
        uneven_data(torch.float64),
        trainer_class=LookOnOneRank,
        balancer=BALANCERS["bilb"],
        num_train_epochs=1,
        **optimizer_settings(torch.float64),
    )


# --- evaluation ---------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    """The rows of a data set, without its length."""

    def __init__(self, data: SyntheticData) -> None:
        self.data = data

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self.data[i] for i in range(len(self.data)))


def evaluated(rows: int, stream: bool = False) -> dict[str, Any]:
    args = arguments(per_device_eval_batch_size=8 // world_size(), balancer="ls")
    data = build_data(rows, dtype=torch.float64, missing=0.3)
    dataset = Stream(data) if stream else data
    trainer = BilevelMTLTrainer(model=build_model(torch.float64), args=args, eval_dataset=dataset)
    return {"metrics": {k: v for k, v in trainer.evaluate().items() if "loss" in k}}


def all_scenarios() -> dict[str, Scenario]:
    """Every scenario by name; the name is what the tests ask for."""
    from tests.distributed.gradient_methods import gradient_scenarios  # which takes models from here

    found: dict[str, Scenario] = {}
    for balancer in BALANCERS:
        found[f"standalone/{balancer}"] = partial(standalone, balancer)
    for name in EQUALITY:
        balancer, absent, precision = name.split("/")
        found[f"equality/{name}"] = partial(equality, balancer, absent, DTYPES[precision])
    for over, kind, find_unused in MISSING_HEADS:
        name = f"{over}/{kind}/{find_unused}"
        if over == "heads":
            found[name] = partial(missing_heads, kind, find_unused)
        else:
            found[name] = partial(missing_heads_in_windows, kind, find_unused, over.removeprefix("heads_over_"))
    for several, heads in RESTS:
        found[f"rest/{several}/{heads}"] = partial(rest_reached, several, heads)
    for kwargs_forward in (False, True):
        for accumulation in (1, 4):
            found[f"factor/{kwargs_forward}/{accumulation}"] = partial(no_factor, kwargs_forward, accumulation)
    # Whole batches on one rank only: a last batch of 4 rows would be filled up to 4 rows on each of two ranks.
    for accumulation in (1, 2, 4) if world_size() == 1 else (2, 4):
        found[f"accumulated/ls/{accumulation}"] = partial(accumulated, accumulation)
    found["accumulated/bilb/2"] = partial(accumulated, 2, BALANCERS["bilb"])
    for policy in ("skip", "raise"):
        found[f"poisoned/{policy}"] = partial(poisoned, policy)
        found[f"steep/{policy}"] = partial(steep_on_one_rank, policy)
    found["looked_at"] = looked_at
    for rows in (3, 13, 16, 21):
        found[f"evaluated/{rows}"] = partial(evaluated, rows)
        found[f"evaluated_stream/{rows}"] = partial(evaluated, rows, stream=True)
    found.update(mixture_scenarios())
    found.update(stream_scenarios())
    found.update(feature_router_scenarios())
    found.update(window_scenarios())
    found.update(double_loop_scenarios())
    found.update(absent_task_scenarios())
    found.update(item_count_scenarios())
    found.update(sharded_scenarios())
    found.update(restored_scenarios())
    found.update(scenarios(sample()))
    found.update(gradient_scenarios())
    if world_size() > 1:
        for name in SABOTAGE:
            found[f"sabotage/{name}"] = partial(sabotage, *name.split("/"))
    return found
