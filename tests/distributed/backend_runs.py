"""What is run on every backend: two ranks of it, and one process with the whole batch, which knows no backend."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch

from hf_bilb.errors import HfBilbError, OptionError
from hf_bilb.trainer import trainer as trainer_module
from tests.contract.cases import Case
from tests.distributed.backends import BACKENDS, ZERO, gathered, on_backend, shares
from tests.distributed.methods import NAMES, balancer_of, cases
from tests.distributed.models import FeatureModel, FeatureOutput, build_feature_model
from tests.distributed.scenarios import SeparateHeads, build_separate_heads, data_for_dicts, sabotaged
from tests.distributed.training import SmallestGap, optimizer_settings, train, world_size
from tests.products import in_turn
from tests.synthetic import SyntheticData, build_data

GLOBAL_BATCH = 16
STEPS_PER_EPOCH = 25
EPOCHS = 2
STEPS = STEPS_PER_EPOCH * EPOCHS
LABELS = ("complete", "missing", "sparse")
#: Micro-batches of an update on each rank, and what a decision is taken over.
WINDOWS = ((1, "micro_batch"), (4, "micro_batch"), (4, "window"))
#: In the whole product with `LABELS` and `WINDOWS`.
MAIN = ("ls-default", "uw-default", "bilb-default", "famo-default")
#: In all `WINDOWS`, whose labels take turns; with `make campaign` in the whole product, too.
OTHERS = (
    "bilb-celeba", "bilb-cityscapes", "bilb-double_loop", "bilb-features", "bilb-nyuv2", "bilb-qm9", "dwa-default",
    "dwa-epoch", "famo-next_batch", "gls-default", "go4align-default", "go4align-groups_2", "imtl_l-default",
    "marigold-default", "marigold-exact", "marigold-lagged", "rlw-default", "si-default", "stch-default",
    "stch-schedule",
)  # fmt: skip
#: Gradient methods, which sharded parameters do not allow: one for each way to take in the gradients.
GRADIENT = ("mgda-default", "imtl_g-features", "gradnorm-default")
#: Coefficients up to 1 / l: in float32 a large step would amplify rounding.
STEEP = ("si-default", "bilb-qm9", "gls-default", "imtl_l-default", "go4align-default", "go4align-groups_2")


class CastingModel(FeatureModel):
    """Casts its inputs: under DeepSpeed the Trainer casts all floating ones to the precision of its config."""

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> FeatureOutput:
        dtype = next(self.parameters()).dtype
        return super().forward(features.to(dtype), labels.to(dtype))


class Cell(NamedTuple):
    """A run, but for the backend."""

    case: str
    labels: str
    accumulation: int
    over: str

    def key(self, backend: str) -> str:
        """Of a run among the results; of one process `backend` is a number type."""
        return f"{backend}/{self.case}/{self.labels}/{self.accumulation}/{self.over}"


def precision_of(backend: str) -> str:
    """DeepSpeed holds its own copy of the parameters in float32."""
    return "float32" if backend in ZERO else "float64"


def cells() -> list[Cell]:
    whole = [Cell(case, labels, *window) for case in MAIN for labels in LABELS for window in WINDOWS]
    others = in_turn([(case, window) for case in (*OTHERS, *GRADIENT) for window in WINDOWS], LABELS)
    return whole + [Cell(case, labels, *window) for (case, window), labels in others]


def labels_of(kind: str) -> SyntheticData:
    """`complete`; `missing`: 40 % at random; `sparse`: a row has one label or none, so that ranks, micro-batches and
    whole batches go without a task, and one is seen late."""
    rows = STEPS_PER_EPOCH * GLOBAL_BATCH
    data = build_data(rows, dtype=torch.float32, missing=0.4 if kind == "missing" else 0.0)
    if kind == "sparse":
        only = torch.randint(0, 5, (rows,), generator=torch.Generator().manual_seed(7))  # 4: none at all
        data.labels[torch.arange(4).unsqueeze(0) != only.unsqueeze(1)] = torch.nan
        steps = data.labels.view(STEPS_PER_EPOCH, GLOBAL_BATCH, 4)
        steps[3, ::2, 0] = torch.nan
        steps[5, :, 1] = torch.nan
        steps[:4, :, 3] = torch.nan
        steps[9, :4] = torch.nan
    return data


def run(cell: Cell, backend: str, **settings: Any) -> dict[str, Any]:
    """Train on a backend, or, where `backend` is a number type, in one process: a window as one batch, micro-batches
    one by one. A setting that is refused gives the error."""
    alone = world_size() == 1
    precision = backend if alone else precision_of(backend)
    dtype = getattr(torch, precision)
    case = cases()[cell.case]
    model = build_feature_model(torch.float64, auxiliary_weight=0.1, model_class=CastingModel, task_names=NAMES).to(
        dtype
    )
    options: dict[str, Any] = {
        "balancer": balancer_of(case),
        "balance_over": cell.over,
        "accumulation": 1 if alone and as_one_batch(cell, case) else cell.accumulation,
        "global_batch": GLOBAL_BATCH,
        "num_train_epochs": EPOCHS,
        **optimizer_settings(dtype, steep=cell.case in STEEP),
        **settings,
    }
    try:
        with SmallestGap() as gap, nullcontext({}) if alone else on_backend(backend) as of_backend:
            found = train(model, labels_of(cell.labels), watch=None if alone else shares, **options, **of_backend)
            found["parameters"] = gathered(model)
    except OptionError as error:
        return {"refused": str(error)}
    except HfBilbError as error:
        return {"error": str(error)}
    return {**found, "smallest_gap": gap.value}


def as_one_batch(cell: Cell, case: Case) -> bool:
    return cell.over == "window"


# --- sabotage ---------------------------------------------------------------------------------------------------------


@contextmanager
def local_denominator() -> Iterator[None]:
    """Each rank divides by its own items: of the batch, of the micro-batch, and of the window."""
    original = trainer_module.share_of_window

    def share_of_window(batch: Any, weighting: Any, number: int, *rest: Any) -> Any:
        share = original(batch, weighting, number, *rest)
        local = (batch.num_items > 0).to(share.local.dtype) / (number * weighting.ranks)
        return share._replace(local=local)

    trainer_module.share_of_window = share_of_window
    try:
        with sabotaged("local_denominator"):
            yield
    finally:
        trainer_module.share_of_window = original


def run_sabotaged(cell: Cell, backend: str) -> dict[str, Any]:
    with local_denominator():
        return run(cell, backend)


SABOTAGED = tuple(Cell("uw-default", "missing", *window) for window in WINDOWS)
_SETTING = Cell("uw-default", "missing", 4, "window")
#: Settings in addition to the default ones, on one cell.
MORE: dict[str, tuple[Cell, dict[str, Any]]] = {
    "clipped": (Cell("bilb-default", "missing", 4, "window"), {"max_grad_norm": 0.3}),
    "adam": (_SETTING, {"optim": "adamw_torch", "learning_rate": 1e-3, "adam_epsilon": 1e-2}),
    "momentum": (
        _SETTING._replace(labels="sparse"),
        {"optim_args": "momentum=0.9", "optim": "sgd", "learning_rate": 5e-3},
    ),
    "warmup": (_SETTING._replace(over="micro_batch"), {"balancer_warmup_steps": 10, "balancer_freeze_after": 30}),
    "schedule": (
        Cell("ls-default", "missing", 1, "micro_batch"),
        {"lr_scheduler_type": "linear", "warmup_steps": 7},
    ),
    "hold": (Cell("bilb-default", "sparse", 1, "micro_batch"), {"absent_tasks": "hold"}),
}
_REFUSED = Cell("bilb-default", "missing", 1, "micro_batch")
REFUSED: dict[str, dict[str, Any]] = {
    "diagnostics.lower_level": {"diagnostics": {"lower_level": {}}},
    "diagnostics.gradients": {"diagnostics": {"gradients": {}}},
    "nonfinite_loss": {"nonfinite_loss": "skip"},
}


# --- heads that one rank does not run -----------------------------------------------------------------------------


class SomeHeads(SeparateHeads):
    """Runs the heads of tasks with labels alone; casts its inputs."""

    def get_input_embeddings(self) -> None:
        """There are none; accelerate asks, under FSDP."""

    def get_output_embeddings(self) -> None:
        """There are none."""

    def forward(self, features: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        dtype = self.heads[0].weight.dtype
        return super().forward(features.to(dtype), None if labels is None else labels.to(dtype))


def heads_of_some(backend: str) -> dict[str, Any]:
    """Zeros for heads that no rank reaches, as under FSDP2: `ddp_find_unused_parameters: false` in one process."""
    dtype = getattr(torch, backend if world_size() == 1 else precision_of(backend))
    model, data = build_separate_heads(SomeHeads).to(dtype), data_for_dicts()
    data.features, data.labels = data.features.float(), data.labels.float()
    try:
        with nullcontext({}) if world_size() == 1 else on_backend(backend) as of_backend:
            found = train(
                model,
                data,
                balancer="uw",
                num_train_epochs=1,
                ddp_find_unused_parameters=False,
                **optimizer_settings(dtype),
                **of_backend,
            )
            return {**found, "parameters": gathered(model)}
    except HfBilbError as error:
        return {"error": str(error)}


# --- what is run --------------------------------------------------------------------------------------------------

#: In `make test`.
FEW = (
    Cell("bilb-default", "missing", 4, "micro_batch"),
    Cell("bilb-default", "missing", 4, "window"),
    Cell("famo-default", "sparse", 4, "window"),
)
FEW_REFUSED = ("marigold-exact", "mgda-default", "bilb-double_loop")


def few_scenarios(backends: Iterable[str]) -> dict[str, Callable[[], dict[str, Any]]]:
    """What `make test` runs of one backend."""
    (backend,) = backends
    name = precision_of(backend) if world_size() == 1 else backend
    found: dict[str, Callable[[], dict[str, Any]]] = {cell.key(name): partial(run, cell, name) for cell in FEW}
    if world_size() > 1:
        found[f"{FEW[1].key(name)}/sabotage"] = partial(run_sabotaged, FEW[1], name)
        for case in FEW_REFUSED:
            found[f"{name}/{case}/refused"] = partial(run, Cell(case, "complete", 1, "micro_batch"), name)
    return {**found, "heads": partial(heads_of_some, name)}


def backend_scenarios(backends: Iterable[str] = BACKENDS) -> dict[str, Callable[[], dict[str, Any]]]:
    """What this number of ranks runs; one process once for each number type."""
    alone = world_size() == 1
    on = list(dict.fromkeys(map(precision_of, backends))) if alone else list(backends)
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for name in on:
        found.update({cell.key(name): partial(run, cell, name) for cell in cells()})
        for key, (cell, more) in MORE.items():
            found[f"{name}/more/{key}"] = partial(run, cell, name, **more)
        if alone:
            continue
        found.update({f"{cell.key(name)}/sabotage": partial(run_sabotaged, cell, name) for cell in SABOTAGED})
        for key, more in REFUSED.items():
            found[f"{name}/refused/{key}"] = partial(run, _REFUSED, name, num_train_epochs=1, **more)
    return found
