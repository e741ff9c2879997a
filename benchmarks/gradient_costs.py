"""What a training step costs under each gradient method: against `ls`, and against torchjd's own ways.

    python benchmarks/gradient_costs.py [--models mlp mpnn celeba_cnn] [--methods mgda ...] [--repeats 5]
                                        [--output benchmarks/results]

A step is forward, backward, SGD and the balancer's step, without a Trainer; CPU time of this process on one thread. The
first pass finds which of torchjd's ways is its fastest on each model: `autojac.backward`, `autojac.mtl_backward` (both
with all tasks at once and one by one) and `autogram.Engine`, with the aggregator `Mean`, which has nothing to solve.
Then each method takes turns with `ls` and with that way (ls, theirs, ours, ls, ...), there with torchjd's class of the
same name, or with `Mean` where it has none or one that needs a package that is not installed. `ls` again (A/A) shows
the noise. Memory is the peak of what torch allocates during a step above what it holds before (torch.profiler).
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torchjd.aggregation
from alternating import Block, alternate
from output import write_results
from torch import Tensor, nn
from torchjd.autogram import Engine
from torchjd.autojac import backward, jac_to_grad, mtl_backward

import hf_bilb
from hf_bilb import build_balancer
from hf_bilb.balancers.registry import GRADIENT_METHODS
from hf_bilb.losses.masked import masked_mse
from hf_bilb.models import MpnnConfig, MpnnModel
from hf_bilb.models.celeba_cnn import CelebaCnnConfig, CelebaCnnModel
from hf_bilb.models.outputs import MultiTaskOutput

#: Blocks last about so long at least (seconds).
BLOCK = 0.08
CONTROL = "ls again"
#: torchjd's class for a method: an aggregator, or what stands for one.
AGGREGATORS = {
    "aligned_mtl": "AlignedMTL",
    "cagrad": "CAGrad",
    "fairgrad": "FairGrad",
    "graddrop": "GradDrop",
    "gradvac": "GradVac",
    "imtl_g": "IMTLG",
    "mgda": "MGDA",
    "nash_mtl": "NashMTL",
    "pcgrad": "PCGrad",
    "torchjd": "UPGrad",
    "upgrad": "UPGrad",
}
OPTIONS: dict[str, dict[str, Any]] = {"CAGrad": {"c": 0.5}, "FairGrad": {"alpha": 1.0}}
#: What else is measured: title -> method, options, the models it is for.
MORE: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "mgda, gradients: features": ("mgda", {"gradients": "features"}, ("mlp", "mpnn", "celeba_cnn")),
    "mgda, every_n_steps: 20": ("mgda", {"every_n_steps": 20}, ("mlp", "mpnn")),
}
#: Bounds on the ratio to `ls`: model, title -> at most.
BOUNDS = {("celeba_cnn", "mgda, gradients: features"): 2.0, ("mpnn", "mgda, every_n_steps: 20"): 1.3}

Batch = dict[str, Any]
Step = Callable[[], object]


class Mlp(nn.Module):
    """A trunk and K = 3 heads of one layer."""

    def __init__(self) -> None:
        super().__init__()
        layers = [m for size in (64, 192, 192) for m in (nn.Linear(size, 192), nn.ReLU())]
        self.trunk = nn.Sequential(*layers)
        self.heads = nn.ModuleList(nn.Linear(192, 1) for _ in range(3))

    def forward(self, inputs: Tensor, labels: Tensor) -> MultiTaskOutput:
        features = self.trunk(inputs)
        logits = torch.cat([head(features) for head in self.heads], dim=1)
        return MultiTaskOutput(*masked_mse(logits, labels), logits, shared_features=features)


def mlp() -> tuple[nn.Module, Batch]:
    return Mlp(), {"inputs": torch.randn(256, 64), "labels": torch.randn(256, 3)}


def mpnn() -> tuple[nn.Module, Batch]:
    """The QM9 network and 24 random molecules of QM9's sizes."""
    model = MpnnModel(MpnnConfig(task_names=[f"task_{k}" for k in range(11)]))
    sizes = torch.randint(12, 25, (24,)).tolist()
    mask = torch.zeros(len(sizes), max(sizes), max(sizes), dtype=torch.bool)
    for of_one, n in zip(mask, sizes, strict=True):
        of_one[:n, :n] = ~torch.eye(n, dtype=torch.bool)
    return model, {
        "nodes": torch.randn(len(sizes), max(sizes), 11),
        "edges": torch.randn(*mask.shape, 5) * mask[..., None],
        "edge_mask": mask,
        "num_nodes": sizes,
        "labels": torch.randn(len(sizes), 11),
    }


def celeba_cnn() -> tuple[nn.Module, Batch]:
    model = CelebaCnnModel(CelebaCnnConfig(width=16, image_size=32))
    return model, {"pixel_values": torch.rand(128, 3, 32, 32), "labels": (torch.rand(128, 40) > 0.5).float()}


MODELS = {"mlp": mlp, "mpnn": mpnn, "celeba_cnn": celeba_cnn}


@dataclass(frozen=True)
class Case:
    """A model with its batch, its optimizer, and the parameters of its trunk and of its heads."""

    name: str
    model: nn.Module
    batch: Batch
    optimizer: torch.optim.Optimizer
    shared: list[nn.Parameter]
    heads: list[nn.Parameter]
    num_tasks: int

    @staticmethod
    def of(name: str) -> Case:
        torch.manual_seed(0)
        model, batch = MODELS[name]()
        named = dict(model.named_parameters())
        heads = [p for key, p in named.items() if key.startswith("heads.")]
        shared = [p for key, p in named.items() if not key.startswith("heads.")]
        # So small a step that the losses stay what they are, however long it takes.
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
        return Case(name, model, batch, optimizer, shared, heads, batch["labels"].shape[1])

    def ours(self, method: str, options: dict[str, Any]) -> Step:
        balancer = build_balancer(method, self.num_tasks, **options).bind(self.model, self.optimizer)
        balancer.on_epoch_begin(0)

        def step() -> None:
            self.optimizer.zero_grad()
            output = self.model(**self.batch)
            balancer.backward(output.losses, output.num_items, shared_features=output.shared_features)
            self.optimizer.step()
            balancer.step()

        return step

    def theirs(self, way: str, aggregator: Any) -> Step:
        """A step of torchjd's `way`, one of `ways`."""
        find = self.ways(aggregator)[way]

        def step() -> None:
            self.optimizer.zero_grad()
            find(self.model(**self.batch))
            self.optimizer.step()

        return step

    def ways(self, aggregator: Any) -> dict[str, Callable[[Any], object]]:
        optimized = isinstance(aggregator, torchjd.aggregation.GramianWeightedAggregator)

        def combine() -> None:
            jac_to_grad(self.shared, aggregator, optimize_gramian_computation=optimized)

        def by_backward(chunk: int | None) -> Callable[[Any], None]:
            def run(output: Any) -> None:
                backward(output.losses, inputs=self.shared, retain_graph=True, parallel_chunk_size=chunk)
                output.losses.sum().backward(inputs=self.heads)
                combine()

            return run

        def by_mtl_backward(chunk: int | None) -> Callable[[Any], None]:
            def run(output: Any) -> None:
                features = output.shared_features  # the losses share a part of the graph behind them
                mtl_backward(list(output.losses), features, retain_graph=True, parallel_chunk_size=chunk)
                combine()

            return run

        return {
            "backward": by_backward(None),
            "backward, one by one": by_backward(1),
            "mtl_backward": by_mtl_backward(None),
            "mtl_backward, one by one": by_mtl_backward(1),
        }

    def autogram(self, weighting: Any) -> Step:
        """Its hooks stay on the model, so it has a case of its own."""
        heads = {id(p) for p in self.heads}
        trunk = [m for m in self.model.children() if any(id(p) not in heads for p in m.parameters())]
        engine = Engine(*trunk, batch_dim=None)

        def step() -> None:
            self.optimizer.zero_grad()
            losses = self.model(**self.batch).losses
            losses.backward(weighting(engine.compute_gramian(losses)))
            self.optimizer.step()

        return step


def their_aggregator(method: str, num_tasks: int) -> tuple[str, Any]:
    """torchjd's class for a method, and its name; `Mean` where there is none."""
    name = AGGREGATORS.get(method, "Mean")
    options = {"n_tasks": num_tasks} if name == "NashMTL" else OPTIONS.get(name, {})
    try:
        found = getattr(torchjd.aggregation, name)(**options)
        found(torch.eye(num_tasks))
    except (ImportError, TypeError, ValueError, NameError) as error:
        print(f"torchjd's {name}: {str(error).splitlines()[0]}: Mean", flush=True)
        name, found = "Mean", torchjd.aggregation.Mean()
    return name, found


def peak_megabytes(step: Step) -> float:
    """The most that torch has allocated during a step, above what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    held = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20


def block_of(step: Step, period: int = 1) -> Block:
    """A block of `step` that takes a while, whole periods of it; returns the milliseconds of one step."""
    step()
    started = time.process_time()
    step()
    count = period * max(1, round(BLOCK / max(time.process_time() - started, 1e-4) / period))

    def block() -> float:
        gc.collect()
        started = time.process_time()
        for _ in range(count):
            step()
        return 1e3 * (time.process_time() - started) / count

    return block


@dataclass
class Result:
    """A method on a model: milliseconds of CPU time a step, peak memory, and ratios with their middle half."""

    model: str
    num_tasks: int
    title: str
    ours_ms: float
    to_ls: tuple[float, float, float]
    megabytes: float
    way: str = ""
    aggregator: str = ""
    to_theirs: tuple[float, float, float] | None = None
    their_megabytes: float | None = None
    verdicts: list[str] = field(default_factory=list)


@dataclass
class Model:
    """What is said of a model: `ls`, its noise, torchjd's ways (milliseconds and peak memory)."""

    name: str
    num_tasks: int
    ls_ms: float
    ls_megabytes: float
    noise: tuple[float, float, float]
    ways: dict[str, tuple[float, float]]
    refused: dict[str, str]


def survey(name: str, case: Case, repeats: int) -> Model:
    """torchjd's ways, each with `Mean`, and `ls` twice."""
    steps = {way: case.theirs(way, torchjd.aggregation.Mean()) for way in case.ways(torchjd.aggregation.Mean())}
    steps["autogram"] = Case.of(name).autogram(torchjd.aggregation.MeanWeighting())
    ls, again = case.ours("ls", {}), case.ours("ls", {})
    blocks, refused = {"ls": block_of(ls), CONTROL: block_of(again)}, {}
    for way, step in steps.items():
        try:
            blocks[way] = block_of(step)
        except Exception as error:
            refused[way] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    order = [one for other in blocks if other != "ls" for one in ("ls", other)]
    pairs, base = alternate(blocks, order, repeats)
    ways = {way: (statistics.median(pairs[way].own), peak_megabytes(steps[way])) for way in steps if way in blocks}
    noise = pairs[CONTROL].ratio()
    return Model(name, case.num_tasks, statistics.median(base), peak_megabytes(ls), noise, ways, refused)


def measure(model: Model, case: Case, methods: Sequence[str], repeats: int) -> list[Result]:
    """Every method beside `ls` and torchjd's fastest way."""
    way = min(model.ways, key=lambda one: model.ways[one][0])
    titles = {method: (method, {}, (model.name,)) for method in methods}
    titles |= {title: more for title, more in MORE.items() if more[0] in methods and model.name in more[2]}
    results, ls = [], case.ours("ls", {})
    for title, (method, options, _) in titles.items():
        period = options.get("every_n_steps", 1)
        own, blocks, theirs = case.ours(method, options), {"ls": block_of(ls)}, None
        blocks["ours"] = block_of(own, period)
        name = ""
        if not options:
            name, aggregator = their_aggregator(method, case.num_tasks)
            if way == "autogram":
                weighting = getattr(aggregator, "gramian_weighting", torchjd.aggregation.MeanWeighting())
                theirs = Case.of(model.name).autogram(weighting)
            else:
                theirs = case.theirs(way, aggregator)
            blocks["theirs"] = block_of(theirs)
        rounds = [{one: block() for one, block in blocks.items()} for _ in range(repeats)]
        last = blocks["ls"]()
        bases = [*(one["ls"] for one in rounds), last]
        around = [(a + b) / 2 for a, b in itertools.pairwise(bases)]
        result = Result(
            model.name,
            model.num_tasks,
            title,
            statistics.median(one["ours"] for one in rounds),
            middle([one["ours"] / base for one, base in zip(rounds, around, strict=True)]),
            peak_megabytes(own),
        )
        if theirs is not None:
            result.way, result.aggregator = way, name
            result.to_theirs = middle([one["ours"] / one["theirs"] for one in rounds])
            result.their_megabytes = peak_megabytes(theirs)
        result.verdicts = judge(result, model)
        results.append(result)
        print(row(result), flush=True)
    return results


def middle(ratios: Sequence[float]) -> tuple[float, float, float]:
    """The median, and the ends of the middle half."""
    ranked = sorted(ratios)
    return statistics.median(ranked), ranked[len(ranked) // 4], ranked[-1 - len(ranked) // 4]


def judge(result: Result, model: Model) -> list[str]:
    """Whether the bounds hold, within what `ls` differs from itself."""
    noise = max(abs(model.noise[0] - 1), (model.noise[2] - model.noise[1]) / 2)
    found = []
    if result.to_theirs is not None:
        found.append(f"<= 1 x torchjd: {'holds' if result.to_theirs[0] <= 1 + noise else 'FAILS'}")
    bound = BOUNDS.get((result.model, result.title))
    if bound is not None:
        found.append(f"<= {bound:g} x ls: {'holds' if result.to_ls[0] <= bound else 'FAILS'}")
    return found


def row(one: Result) -> str:
    def three(ratio: tuple[float, float, float]) -> str:
        return f"{ratio[0]:.2f} ({ratio[1]:.2f} - {ratio[2]:.2f})"

    theirs = "" if one.to_theirs is None else three(one.to_theirs)
    memory = "" if one.their_megabytes is None else f"{one.their_megabytes:.1f}"
    return (
        f"| {one.title} | {one.ours_ms:.1f} | {three(one.to_ls)} | {theirs} | {one.aggregator} | {one.megabytes:.1f} | "
        f"{memory} | {'; '.join(one.verdicts)} |"
    )


def page(models: Sequence[Model], results: Sequence[Result], seconds: float, repeats: int) -> str:
    parts = [
        f"""# What a step costs under the gradient methods

CPU time on one thread ({platform.processor() or platform.machine()}, torch {torch.__version__}, torchjd 0.18, hf_bilb
{hf_bilb.__version__}), in one run of {seconds:.0f} s, {repeats} pairs of each; in brackets the middle half. Forward,
backward, SGD, the balancer's step. Memory: the peak of what torch allocates in a step, above what it held before, MiB.
`Mean` stands for a class that torchjd does not have, or that needs a package that is not installed (CAGrad, NashMTL:
cvxpy and ecos; UPGrad: quadprog): it has nothing to solve."""
    ]
    for model in models:
        fastest = min(model.ways, key=lambda one: model.ways[one][0])
        ways = "\n".join(f"| {way} | {ms:.1f} | {mb:.1f} |" for way, (ms, mb) in model.ways.items())
        ways += "".join(f"\n| {way} | {why} | |" for way, why in model.refused.items())
        rows = "\n".join(row(one) for one in results if one.model == model.name)
        noise = f"{model.noise[0]:.2f} ({model.noise[1]:.2f} - {model.noise[2]:.2f})"
        parts.append(
            f"""## {model.name}, K = {model.num_tasks}

A step of `ls`: {model.ls_ms:.1f} ms, {model.ls_megabytes:.1f} MiB; `ls` against itself {noise}.

| torchjd (Mean) | ms | MiB |
|---|---|---|
{ways}

Against its fastest, {fastest}:

| method | ms | / ls | / torchjd | torchjd's class | MiB | torchjd MiB | bounds |
|---|---|---|---|---|---|---|---|
{rows}"""
        )
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--output", type=Path, help="folder for gradient_costs.json and .md")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--methods", nargs="+", choices=list(GRADIENT_METHODS), default=list(GRADIENT_METHODS))
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # torchjd's, once a step
    gc.collect()
    gc.freeze()
    models, results, started = [], [], time.perf_counter()
    for name in arguments.models:
        case = Case.of(name)
        models.append(survey(name, case, arguments.repeats))
        print(f"{models[-1]}: {time.perf_counter() - started:.0f} s", flush=True)
        results += measure(models[-1], case, arguments.methods, arguments.repeats)
    text = page(models, results, time.perf_counter() - started, arguments.repeats)
    print(f"\n{text}")
    content = {"models": [asdict(one) for one in models], "results": [asdict(one) for one in results]}
    write_results(arguments.output, "gradient_costs", text, content)


if __name__ == "__main__":
    main()
