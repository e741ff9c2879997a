"""QM9 as graphs: how long the preparation takes, and how many molecules a second a loader serves.

    python benchmarks/molecule_preparation.py [--output benchmarks/results] [--workers 1 2] [--cache-dir FOLDER]

The preparation is that of a first training run, reading the package's files included, into an empty folder. The loader
serves shuffled batches of 120 molecules of the training part, and is compared with one that makes the same batches
from molecules one by one (the usual `Dataset.__getitem__` and a collator that pads).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from output import write_results
from torch.utils.data import DataLoader, Dataset

import hf_bilb
from hf_bilb.data.cache import Arrays
from hf_bilb.data.molecules.graphs import GraphBatch, GraphRows, collate_graphs
from hf_bilb.data.molecules.qm9_graphs import Qm9GraphsOptions, prepare_qm9_graphs, task_data

BATCH = 120


@dataclass(frozen=True)
class Preparation:
    """Seconds of a whole preparation with so many processes."""

    processes: int
    seconds: float
    molecules_per_second: float


@dataclass(frozen=True)
class Throughput:
    """Molecules a second of a loader, median of the rounds."""

    loader: str
    workers: int
    molecules_per_second: float


class OneByOne(Dataset[GraphBatch]):
    """The same molecules as one writes it down first: a DataLoader asks for one after the other."""

    def __init__(self, rows: GraphRows, arrays: Arrays) -> None:
        self.rows, self.arrays = rows, arrays
        self.first_atom = np.cumsum(arrays["num_nodes"], dtype=np.int64) - arrays["num_nodes"]
        self.first_bond = np.cumsum(arrays["num_bonds"], dtype=np.int64) - arrays["num_bonds"]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> GraphBatch:
        row = int(self.rows.rows[index])
        n, first_atom, first_bond = int(self.arrays["num_nodes"][row]), self.first_atom[row], self.first_bond[row]
        positions = torch.from_numpy(np.array(self.arrays["positions"][first_atom : first_atom + n]))
        bonds = slice(first_bond, first_bond + self.arrays["num_bonds"][row])
        i, j = torch.from_numpy(self.arrays["bonds"][bonds].astype(np.int64)).T
        edges = torch.zeros(n, n, 5)
        edges[i, j, :4] = edges[j, i, :4] = torch.from_numpy(self.arrays["bond_features"][bonds].astype(np.float32))
        edges[..., 4] = (positions[:, None] - positions[None]).norm(dim=-1)
        return {
            "nodes": torch.from_numpy(self.arrays["nodes"][first_atom : first_atom + n].astype(np.float32)),
            "edges": edges,
            "edge_mask": ~torch.eye(n, dtype=torch.bool),
            "num_nodes": n,
            "labels": self.rows.labels[index],
        }


def measure_preparation(processes: int) -> Preparation:
    """Prepare all of QM9 in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        arrays, _ = prepare_qm9_graphs(folder, num_workers=processes)
        seconds = time.perf_counter() - started
    return Preparation(processes, seconds, len(arrays["index"]) / seconds)


def measure_loader(name: str, rows: Dataset[GraphBatch], workers: int, batches: int, rounds: int) -> Throughput:
    """Molecules a second over the first batches of an epoch, the start of the workers left out."""
    rates = []
    for seed in range(rounds):
        generator = torch.Generator().manual_seed(seed)
        loader = iter(
            DataLoader(rows, BATCH, shuffle=True, num_workers=workers, collate_fn=collate_graphs, generator=generator)
        )
        next(loader)
        started = time.perf_counter()
        served = sum(len(next(loader)["num_nodes"]) for _ in range(batches))
        rates.append(served / (time.perf_counter() - started))
    return Throughput(name, workers, statistics.median(rates))


def measure_throughput(arrays: Arrays, rounds: int) -> list[Throughput]:
    """Both loaders, in this process and with two workers."""
    rows = task_data(arrays, Qm9GraphsOptions()).train
    assert isinstance(rows, GraphRows)
    single = OneByOne(rows, arrays)
    same_batches(rows, single)
    results = []
    for workers in (0, 2):
        results.append(measure_loader("a batch at once", rows, workers, 300, rounds))
        results.append(measure_loader("molecule by molecule", single, workers, 30, rounds))
    return results


def same_batches(rows: GraphRows, single: OneByOne) -> None:
    """Both ways have to serve the same."""
    indices = list(range(BATCH))
    first, second = collate_graphs(rows.__getitems__(indices)), collate_graphs([single[index] for index in indices])
    for name in ("nodes", "edges", "edge_mask", "labels"):
        np.testing.assert_allclose(first[name], second[name], rtol=1e-6, err_msg=name)


def as_markdown(preparations: list[Preparation], throughputs: list[Throughput]) -> str:
    lines = ["| preparation of QM9, processes | seconds | molecules a second |", "|---|---|---|"]
    lines += [f"| {p.processes} | {p.seconds:.0f} | {p.molecules_per_second:,.0f} |" for p in preparations]
    lines += ["", "| loader, batches of 120 | workers | molecules a second |", "|---|---|---|"]
    lines += [f"| {t.loader} | {t.workers} | {t.molecules_per_second:,.0f} |" for t in throughputs]
    return "\n".join(lines)


def notes() -> str:
    import rdkit

    processor = platform.processor() or platform.machine()
    return (
        f"{processor}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}, RDKit {rdkit.__version__}, "
        f"hf_bilb {hf_bilb.__version__}. Wall-clock times; other work on the machine was not kept away. Workers hand "
        "each batch over through shared memory (2 MB), which costs more than making it: leave dataloader_num_workers "
        "at 0."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--output", type=Path, help="folder for molecule_preparation.json and .md")
    parser.add_argument("--workers", nargs="*", type=int, default=[1, 2], help="processes; none: only the loader")
    parser.add_argument("--rounds", type=int, default=5, help="of each loader")
    parser.add_argument("--cache-dir", help="of the prepared molecules for the loader")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    preparations = [measure_preparation(processes) for processes in arguments.workers]
    arrays, meta = prepare_qm9_graphs(arguments.cache_dir)
    throughputs = measure_throughput(arrays, arguments.rounds)
    table = as_markdown(preparations, throughputs)
    print(f"\n{table}\n\n{notes()}\n{json.dumps(meta['counts'], indent=1)}")
    content = {
        "notes": notes(),
        "counts": meta["counts"],
        "preparation": [asdict(one) for one in preparations],
        "loader": [asdict(one) for one in throughputs],
    }
    page = f"# Preparing and serving QM9 as graphs\n\n{table}\n\n{notes()}\n"
    write_results(arguments.output, "molecule_preparation", page, content)


if __name__ == "__main__":
    main()
