"""Folders of made-up runs, and their pages."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hf_bilb.reporting.comparison import compare_methods
from hf_bilb.reporting.html_page import write_methods_page
from hf_bilb.reporting.results import RunResults
from tests.reporting.made_up_comparison import cell


def decay(k: int, step: int) -> float:
    """The loss of task k, which falls."""
    return (1 + k) * math.exp(-step / 200)


def history(
    tasks: Sequence[str], steps: Sequence[int], loss: Callable[[int, int], float] = decay
) -> list[dict[str, Any]]:
    """What the Trainer logs: losses, weights and coefficients at each step, an evaluation at the last one."""
    entries: list[dict[str, Any]] = [
        {
            "step": step,
            **{f"loss/{task}": loss(k, step) for k, task in enumerate(tasks)},
            **{f"weight/{task}": 1 / (1 + k) for k, task in enumerate(tasks)},
            **{f"coefficient/{task}": 1.0 for task in tasks},
        }
        for step in steps
    ]
    validation = {f"eval_loss_{task}": decay(k, steps[-1]) for k, task in enumerate(tasks)}
    return [*entries, {"step": steps[-1], "eval_loss": 1.0, **validation}]


def write_history(folder: Path, entries: Sequence[dict[str, Any]]) -> Path:
    """A run's folder with its log."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": list(entries)}), encoding="utf-8")
    return folder


def write_vectors(folder: Path, entries: Sequence[dict[str, Any]], tasks: Sequence[str]) -> None:
    """The same log as whole vectors, as of a run with more than 32 tasks."""
    rows = [
        {"step": entry["step"], **{key: [entry[f"{key}/{task}"] for task in tasks] for key in ("loss", "weight")}}
        for entry in entries
        if f"loss/{tasks[0]}" in entry
    ]
    (folder / "task_vectors.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def results(balancer: str, tasks: Sequence[str], values: Sequence[float | None], seed: int = 0) -> RunResults:
    """Of one run, with the losses of its tasks and its seed."""
    made = cell(balancer, values, base={}, tasks=tasks)
    losses = {"test": {"mean": 1.0, **dict.fromkeys(tasks, 1.0)}}
    return dataclasses.replace(made, losses=losses, settings={"trainer": {"seed": seed}})


def write_methods(
    folder: Path,
    methods: Sequence[str],
    seeds: Sequence[int],
    tasks: Sequence[str],
    steps: Sequence[int] = tuple(range(10, 401, 10)),
    loss: Callable[[int, int], float] = decay,
) -> Path:
    """Runs of all methods and seeds, and the page of their comparison; method i has the errors 100 + k - 20 i."""
    runs: dict[str, dict[int, RunResults]] = {}
    folders: dict[str, dict[int, Path]] = {}
    entries = history(tasks, steps, loss)
    for i, method in enumerate(methods):
        for seed in seeds:
            values = [100 + k - 20 * i + seed / 10 for k in range(len(tasks))]
            runs.setdefault(method, {})[seed] = results(method, tasks, values, seed)
            run_dir = write_history(folder / f"method-{i}" / f"seed-{seed}", entries)
            if len(tasks) > 32:
                write_vectors(run_dir, entries, tasks)
            folders.setdefault(method, {})[seed] = run_dir
    comparison = compare_methods(runs, {}, methods[0])
    return write_methods_page(folder / "comparison.html", comparison, folders, [])
