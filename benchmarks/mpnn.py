"""The QM9 network against the same model from PyTorch Geometric's layers: equal numbers, and what a step costs.

    python benchmarks/mpnn.py [--output benchmarks/results] [--quick]

Real batches of 120 molecules of QM9 (data set `qm9_graphs`), one thread, float32. Runs alternate (ours, theirs, ours,
theirs, ...), each pair on a batch of its own; what is compared are the two of a pair. `message` is three rounds of
edge-conditioned messages with their edge network, forward and backward; `step` is forward, losses, backward and Adam of
the whole model. Theirs builds a 64 x 64 matrix per edge, as the papers' runs do.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))  # the reference model is that of the tests

import torch
import torch_geometric
from output import write_results
from torch import Tensor

from hf_bilb.data import DATA_SETS, TaskData
from hf_bilb.losses.masked import masked_mse
from hf_bilb.models import MpnnConfig, MpnnModel
from hf_bilb.models.graph.layers import GraphSizes
from tests.models.pyg_mpnn import PygMpnn, gradients, ragged, with_weights_of

BATCH = 120
Batch = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """Seconds of CPU time, medians over the pairs, and the ratio theirs / ours with its middle half."""

    what: str
    ours: float
    theirs: float
    ratio: float
    ratio_low: float
    ratio_high: float
    pairs: int


def batches(data: TaskData, count: int) -> list[Batch]:
    """Shuffled batches, as training sees them."""
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0)).tolist()  # type: ignore[arg-type]
    assert data.data_collator is not None
    rows = [data.train.__getitems__(order[i * BATCH : (i + 1) * BATCH]) for i in range(count)]  # type: ignore[union-attr]
    return [data.data_collator(row) for row in rows]


def graphs(batch: Batch) -> tuple[Tensor, ...]:
    return ragged(batch["nodes"], batch["edges"], batch["edge_mask"], batch["num_nodes"])


def seconds(work: Callable[[], Any]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def message_steps(ours: MpnnModel, theirs: PygMpnn, batch: Batch) -> tuple[Callable[[], None], Callable[[], None]]:
    """Three rounds of messages of both, forward and backward."""
    nodes, edge_index, edge_attr, _ = graphs(batch)
    states = torch.randn(len(nodes), ours.config.hidden_size, requires_grad=True)

    def our_message() -> None:
        sizes = GraphSizes(batch["num_nodes"], batch["nodes"].shape[1], states.device)
        hidden, out = ours.message.edge_hidden(batch["edges"], batch["edge_mask"], sizes), states
        for _ in range(ours.config.num_messages):
            out = ours.message(out, hidden)
        out.square().sum().backward()

    def their_message() -> None:
        out = states
        for _ in range(ours.config.num_messages):
            out = theirs.conv(out, edge_index, edge_attr)
        out.square().sum().backward()

    return our_message, their_message


def training_steps(ours: MpnnModel, theirs: PygMpnn, batch: Batch) -> tuple[Callable[[], None], Callable[[], None]]:
    """A training step of both; what theirs is given is laid out beforehand."""
    optimizers = [torch.optim.Adam(model.parameters(), lr=1e-3) for model in (ours, theirs)]
    inputs = graphs(batch)

    def our_step() -> None:
        optimizers[0].zero_grad()
        ours(**batch).losses.sum().backward()
        optimizers[0].step()

    def their_step() -> None:
        optimizers[1].zero_grad()
        masked_mse(theirs(*inputs), batch["labels"])[0].sum().backward()
        optimizers[1].step()

    return our_step, their_step


def largest_deviation(ours: MpnnModel, theirs: PygMpnn, batch: Batch) -> tuple[float, float]:
    """Relative L2 of the outputs, and the largest relative L2 of any parameter's gradient."""
    output, expected = ours(**batch), theirs(*graphs(batch))
    ours.zero_grad()
    theirs.zero_grad()
    output.losses.sum().backward()
    masked_mse(expected, batch["labels"])[0].sum().backward()
    of_gradients = max(_relative(own, reference) for own, reference in gradients(ours, theirs))
    return _relative(output.logits.detach(), expected.detach()), of_gradients


def _relative(own: Tensor, reference: Tensor) -> float:
    return ((own - reference).norm() / reference.norm()).item()


def measure(
    what: str, steps: Callable[..., tuple[Callable[[], None], Callable[[], None]]], models: Any, data: list[Batch]
) -> Result:
    """Alternate both over the batches; the first batch warms up and does not count."""
    pairs = [tuple(seconds(work) for work in steps(*models, batch)) for batch in data][1:]
    ratios = sorted(theirs / ours for ours, theirs in pairs)
    return Result(
        what=what,
        ours=statistics.median(pair[0] for pair in pairs),
        theirs=statistics.median(pair[1] for pair in pairs),
        ratio=statistics.median(ratios),
        ratio_low=ratios[len(ratios) // 4],
        ratio_high=ratios[-1 - len(ratios) // 4],
        pairs=len(pairs),
    )


def as_markdown(results: list[Result]) -> str:
    lines = ["| | ours (s) | PyTorch Geometric (s) | ratio | middle half of the ratios | pairs |", "|---" * 6 + "|"]
    lines += [
        f"| {r.what} | {r.ours:.3f} | {r.theirs:.3f} | {r.ratio:.1f} | {r.ratio_low:.1f} - {r.ratio_high:.1f} "
        f"| {r.pairs} |"
        for r in results
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--output", type=Path, help="folder for mpnn.json and .md")
    parser.add_argument("--quick", action="store_true", help="three pairs: to see that it runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    spec = DATA_SETS["qm9_graphs"]
    data = spec.load(spec.options(num_train=12_000))
    torch.manual_seed(0)
    ours = MpnnModel(MpnnConfig(**data.model_arguments))
    models = (ours, with_weights_of(ours))
    parts = batches(data, (3 if arguments.quick else 12) + 1)
    deviations = largest_deviation(*models, parts[0])
    edges = statistics.mean(int(part["edge_mask"].sum()) for part in parts)
    notes = (
        f"CPU time on one thread ({platform.processor() or platform.machine()}, torch {torch.__version__}, "
        f"torch_geometric {torch_geometric.__version__}); batches of {BATCH} molecules, {edges:.0f} edges on average. "
        f"On the first batch the outputs differ by {deviations[0]:.1e} (relative L2), the gradient of no parameter by "
        f"more than {deviations[1]:.1e}."
    )
    results = [measure("message", message_steps, models, parts), measure("step", training_steps, models, parts)]
    table = as_markdown(results)
    print(f"{table}\n\n{notes}")
    content = {"notes": notes, "deviations": deviations, "results": [asdict(result) for result in results]}
    page = f"# The QM9 network against PyTorch Geometric's layers\n\n{table}\n\n{notes}\n"
    write_results(arguments.output, "mpnn", page, content)


if __name__ == "__main__":
    main()
