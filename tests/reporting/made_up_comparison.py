"""Results of made-up cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hf_bilb.reporting.results import MetricResult, RunResults

TASKS = ("homo", "U0", "U")
BASE = {"homo": 50.0, "U0": 20.0, "U": 10.0}
GROUPS = {"U0": "energy", "U": "energy"}


def cell(
    balancer: str,
    values: Sequence[float | None],
    base: Mapping[str, float] = BASE,
    tasks: Sequence[str] = TASKS,
    **facts,
) -> RunResults:
    """The results of one run; `facts` go into `training`."""
    metrics = [
        MetricResult(
            f"mae_{task}", task, "MAE", "meV", False, value, 500.0, base=base.get(task), group=GROUPS.get(task, "")
        )
        for task, value in zip(tasks, values, strict=True)
    ]
    settings = {"trainer": {"load_best_model_at_end": True, "metric_for_best_model": "loss"}, "data": {"seed": 3}}
    training = {"epochs": 20.0, "steps": 400, "step_seconds": 0.02, "peak_memory_bytes": 1000, "device": "cpu", **facts}
    return RunResults(
        recipe="small", model="mlp", data="made_up", balancer=balancer, split="test", metrics=metrics,
        training=training, settings=settings, base_source="the paper" if base else "",
    )  # fmt: skip


def runs(base: Mapping[str, float] = BASE) -> dict[str, dict[int, RunResults]]:
    """ls with three seeds, near with about the same errors, half with half of them."""
    errors = {0: [100.0, 40.0, 30.0], 1: [110.0, 42.0, 28.0], 2: [90.0, 38.0, 32.0]}
    near = {0: [101.0, 39.0, 30.5], 1: [108.0, 43.0, 28.0], 2: [91.0, 37.0, 31.0]}
    return {
        "ls": {s: cell("ls", e, base) for s, e in errors.items()},
        "near": {s: cell("near", e, base, step_seconds=0.03, peak_memory_bytes=1500) for s, e in near.items()},
        "half": {s: cell("half", [v / 2 for v in e], base) for s, e in errors.items()},
    }
