"""Auxiliary learning on real data: do two more tasks help the one that counts, and does MARIGOLD weigh them better?

    python examples/auxiliary_learning.py                     # five minutes on a CPU core; finished runs are kept
    python examples/auxiliary_learning.py --seeds 0,1 trainer.num_train_epochs=3 --output runs/short

Census income (UCI, the Current Population Surveys of 1994 and 1995): income above 50,000 dollars is the main task,
never married and some college are the helpers. What is compared is the main task's normalised entropy (NE, He et al.
2014) on the test part, as in Table 4 of "Feed m Birds with One Scone", whose gain is (NE_sum - NE) / NE_sum. The runs
are those of recipes/census/auxiliary_{ls,marigold}.yaml, which name their file from the project's root.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small batches: a second thread gains nothing

import click

from hf_bilb.errors import OptionError, one_line
from hf_bilb.experiments.recipe import read_recipe
from hf_bilb.reporting.results import FILE_NAME, RunResults, read_results

MAIN = "income"
RECIPES = Path("recipes/census")


@dataclass(frozen=True)
class Method:
    """A row of the table: a recipe with settings of its own."""

    title: str
    recipe: str
    settings: tuple[str, ...] = ()


SUM = "plain sum"
METHODS = (
    Method(SUM, "auxiliary_ls.yaml"),
    Method("no helpers", "auxiliary_ls.yaml", (f"data.tasks=[{MAIN}]",)),
    Method("MARIGOLD", "auxiliary_marigold.yaml"),
    Method(
        "MARIGOLD, two-point",
        "auxiliary_marigold.yaml",
        ("balancer.mode=exact", "balancer.estimator=two_point"),
    ),
)


def run_folder(output: Path, method: Method, seed: int) -> Path:
    """Where a run lies."""
    return output / method.title.replace(", ", "_").replace(" ", "_") / f"seed-{seed}"


def train(method: Method, seed: int, run: Path, overrides: Sequence[str]) -> RunResults:
    """Train one cell of the table into the folder `run`, unless that holds the results already."""
    settings = [*method.settings, f"trainer.seed={seed}", f"trainer.output_dir={run}", *overrides]
    recipe = read_recipe(RECIPES / method.recipe, settings)
    if not (run / FILE_NAME).is_file():
        from hf_bilb.experiments.train import run_recipe  # only now: takes ten seconds

        click.echo(f"{method.title}, seed {seed}")
        run_recipe(recipe, resume=any(run.glob("checkpoint-*")))
    return read_results(run)


def normalized_entropies(results: RunResults) -> dict[str, float]:
    """Task -> its NE on the test part."""
    found = {}
    for metric in results.metrics:
        if metric.key.endswith("_normalized_entropy"):
            if metric.value is None:
                raise OptionError(f"{metric.task}: its NE is no number; the test part holds one class alone")
            found[metric.task] = metric.value
    return found


def helper_weights(folder: Path) -> Mapping[str, float]:
    """The last logged weight of each helper."""
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    last = next(entry for entry in reversed(history) if "loss" in entry)
    prefix = "weight/"
    return {key.removeprefix(prefix): last[key] for key in last if key.startswith(prefix) and MAIN not in key}


def table(
    entropies: Mapping[str, Sequence[Mapping[str, float]]], weights: Mapping[str, Sequence[Mapping[str, float]]]
) -> str:
    """The main task's NE, every task's gain over the plain sum, seed by seed, and the helpers' last weights."""
    tasks = list(entropies[SUM][0])
    head = "".join(f"{'gain % ' + task:>24}" for task in tasks)
    lines = [f"{'method':22}{'NE of ' + MAIN:>20}{head}   weights of the helpers at the end (mean)"]
    for title, runs in entropies.items():
        values = [run[MAIN] for run in runs]
        gains = ""
        for task in tasks:
            shown = "" if title == SUM or task not in runs[0] else _gain(task, entropies[SUM], runs)
            gains += f"{shown:>24}"
        names = weights[title][0]
        learned = ", ".join(f"{name} {statistics.mean(run[name] for run in weights[title]):.2f}" for name in names)
        lines.append(
            f"{title:22}{statistics.mean(values):11.4f} ± {_deviation(values):.4f}{gains}   {learned}".rstrip()
        )
    return "\n".join(lines)


def _gain(task: str, base: Sequence[Mapping[str, float]], runs: Sequence[Mapping[str, float]]) -> str:
    gains = [100 * (one[task] - other[task]) / one[task] for one, other in zip(base, runs, strict=True)]
    return f"{statistics.mean(gains):+.2f} ± {_deviation(gains):.2f}"


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@click.option("--seeds", default="0,1,2", show_default=True, help="trainer.seed of the runs of each method.")
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), default=Path("runs/auxiliary_learning"))
def main(overrides: tuple[str, ...], seeds: str, output: Path) -> None:
    """Train every method with every seed, one run after the other, and print the table."""
    if not RECIPES.is_dir():
        raise click.UsageError(f"there is no folder {RECIPES} here; start it from the project's root")
    try:
        chosen = [int(seed) for seed in seeds.split(",")]
    except ValueError:
        raise click.BadParameter(
            f"{seeds!r} is not valid, expected numbers such as 0,1,2", param_hint="--seeds"
        ) from None
    entropies: dict[str, list[Mapping[str, float]]] = {}
    weights: dict[str, list[Mapping[str, float]]] = {}
    try:
        for seed in chosen:  # seed by seed: the table is fair whenever it is looked at
            for method in METHODS:
                run = run_folder(output, method, seed)
                results = train(method, seed, run, overrides)
                entropies.setdefault(method.title, []).append(normalized_entropies(results))
                weights.setdefault(method.title, []).append(helper_weights(run))
    except OptionError as error:
        raise click.ClickException(one_line(error)) from None
    text = table(entropies, weights)
    (output / "table.txt").write_text(text + "\n", encoding="utf-8")
    click.echo(
        f"\n{text}\n(mean ± standard deviation over seeds {seeds}; gains are taken seed by seed; above 0 is better)"
    )


if __name__ == "__main__":
    main()
