"""Shows that a change of the library's inside changed nothing that it computes, byte for byte.

    python campaigns/same_numbers.py --before 09cd3ab                      this checkout against a revision
    python campaigns/same_numbers.py --before FOLDER --after FOLDER --only methods own_loop

Each side runs in processes of its own, from an empty folder with a cache of its own, with the same settings: three
recipes on real data, every method by the Trainer, two ranks, a loop without the Trainer, and the parity tests. Then
every file that one side wrote is compared with the other's. A third side, the changed library, goes on from checkpoints
that the unchanged one wrote, and has to end where that one ended. Writes `same_numbers.md`; ends with 1 where something
differs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from checkouts import ROOT, checkout, described, run_in

RUNS = Path(__file__).resolve().with_name("same_numbers_runs.py")
REPORT = Path(__file__).resolve().with_name("same_numbers.md")
#: The halves of `same_numbers_runs.py` and of the recipe that is resumed: the steps of the checkpoints.
HALF, RESUMED_AT = 12, 30

CLOCK = re.compile(r"runtime|per_second|seconds|peak_memory|^timed_|^saved$")
#: What says that a run was resumed; the comparison with one that was not leaves it out.
RESUMED_FROM = "resumed_from"
#: Drawn at random for each run, and hashes and sizes of files, which this script compares themselves.
OF_THE_RUN = ("run", "of_this")
#: Name of a file that may differ in its bytes -> why. Its contents are compared, without what is named here.
MAY_DIFFER = {
    "trainer_state.json": "times, speeds and peak memory stand between the logs",
    "results.json": "times and peak memory, and whether the run was resumed",
    "balancer.json": "the run's random identity",
    "checkpoint_complete.json": "the run's random identity, the hour, and hashes and sizes of the files in this list",
    "training_args.bin": "a pickle, which names modules: class and fields are compared, but for new ones that are off",
}


@dataclass(frozen=True)
class Part:
    """One kind of run.

    Attributes:
        title: in the report.
        folder: where it writes, within the side's own.
        job: of `same_numbers_runs.py`; `{library}` and `{data}` are put in.
        needs: a folder of ../shared/data without which it is left out.
        resumes: the checkpoints' step from which the third side goes on with `--resume`; None = it does not.
        ranks: processes that torchrun starts.
    """

    title: str
    folder: str
    job: tuple[str, ...]
    needs: str | None = None
    resumes: int | None = None
    ranks: int = 1


def recipe(path: str, folder: str, steps: int, **own: str) -> tuple[str, ...]:
    """`hf-bilb train`, with two evaluations and checkpoints on the way."""
    settings = {
        "trainer.output_dir": folder,
        "trainer.max_steps": steps,
        "trainer.eval_strategy": "steps",
        "trainer.eval_steps": steps // 2,
        "trainer.save_strategy": "steps",
        "trainer.save_steps": steps // 2,
        "trainer.save_total_limit": 5,
        "trainer.logging_steps": 1,
        **own,
    }
    return ("train", f"{{library}}/recipes/{path}", *(f"{key}={value}" for key, value in settings.items()))


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")
#: Real models on real data, as small as a comparison of bytes allows.
GLUE = {
    "data.folder": "{data}/glue",
    "data.max_train": "{{sst2: 1000}}",
    "data.max_validation": "20",
    "data.max_length": "48",
    "trainer.per_device_train_batch_size": "8",
    "evaluation.split": "validation",
}
NYUV2 = {"data.folder": "{data}/nyuv2", "data.num_validation": "16", "evaluation.split": "validation"}
FAMO = {"balancer.name": "famo"}
PARTS = {
    "qm9_bilb": Part(
        "QM9, MLP, `bilb`, 60 steps",
        "runs/qm9_bilb",
        recipe("qm9/mlp_bilb.yaml", "runs/qm9_bilb", 60),
        resumes=30,
    ),
    "qm9_ls": Part("QM9, MLP, `ls`, 60 steps", "runs/qm9_ls", recipe("qm9/mlp_ls.yaml", "runs/qm9_ls", 60)),
    "qm9_famo": Part(
        "QM9, MLP, `famo`, 60 steps", "runs/qm9_famo", recipe("qm9/mlp_ls.yaml", "runs/qm9_famo", 60, **FAMO)
    ),
    "glue_bilb": Part(
        "GLUE, MiniLM, `bilb`, 50 steps",
        "runs/glue_bilb",
        recipe("glue/minilm_bilb.yaml", "runs/glue_bilb", 50, **GLUE),
        needs="glue",
    ),
    "nyuv2_bilb": Part(
        "NYUv2, small SegNet, `bilb`, 20 steps",
        "runs/nyuv2_bilb",
        recipe("nyuv2/bilb_small.yaml", "runs/nyuv2_bilb", 20, **NYUV2),
        needs="nyuv2",
    ),
    "methods": Part("every method, and ways of accumulation", "methods", ("methods", "methods"), resumes=HALF),
    "ranks": Part("two ranks (gloo)", "ranks", ("ranks", "ranks"), resumes=HALF, ranks=2),
    "own_loop": Part("every method, a loop without the Trainer", "own_loop", ("own_loop", "own_loop")),
    "parity": Part("trajectories of the parity tests", "parity", ("parity", "parity", "{library}/{parity}")),
}
ARGUMENTS = "arguments.json"


# --- running ---------------------------------------------------------------------------------------------------------


@dataclass
class Side:
    """A checkout, and the empty folder that its runs are started in."""

    library: Path
    folder: Path
    data: Path

    def run(self, parts: list[Part], *more: str) -> None:
        """Run the parts, and read what their training_args.bin hold with the library that wrote them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        parity = next((path.relative_to(self.library) for path in self.library.glob("tests/**/test_parity.py")), "")
        jobs = {1: [], 2: []}
        for part in parts:
            job = [entry.format(library=self.library, data=self.data, parity=parity) for entry in part.job]
            jobs[part.ranks].append([*job, *more])
        jobs[1].append(["arguments", ".", ARGUMENTS])
        own = {"HF_DATASETS_CACHE": str(self.folder / "cache")}
        for ranks in (2, 1):  # the arguments are read last
            prefix = [*TORCHRUN, str(ranks)] if ranks > 1 else []
            if jobs[ranks]:
                run_in(self.library, [*prefix, str(RUNS), json.dumps(jobs[ranks])], self.folder, own)

    def arguments(self) -> dict[str, Any]:
        return json.loads((self.folder / ARGUMENTS).read_text())


def prepare_resuming(part: Part, before: Side, resumed: Side) -> None:
    """Copy what the unchanged library had written by the checkpoint in the middle."""
    kept = f"checkpoint-{part.resumes}"
    for checkpoint in sorted((before.folder / part.folder).rglob(kept)):
        target = resumed.folder / checkpoint.relative_to(before.folder)
        shutil.copytree(checkpoint, target)
        if (checkpoint.parent / "recipe.yaml").exists():
            shutil.copy(checkpoint.parent / "recipe.yaml", target.parent)


# --- comparing -------------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """What a comparison of two folders found; paths are relative to them."""

    same_bytes: list[str] = field(default_factory=list)
    same_contents: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)

    @property
    def files(self) -> int:
        return len(self.same_bytes) + len(self.same_contents) + len(self.different)


def compare_folders(part: str, roots: tuple[Path, Path], arguments: tuple[dict[str, Any], dict[str, Any]]) -> Found:
    """Every file below the folder `part` of either root; `arguments`: what each root's training_args.bin hold."""
    found = Found()
    for path in sorted({*_files(roots[0], part), *_files(roots[1], part)}):
        first, second = (root / path for root in roots)
        if not first.exists() or not second.exists():
            found.different.append(f"{path}: only {'after' if second.exists() else 'before'}")
        elif first.read_bytes() == second.read_bytes():
            found.same_bytes.append(path)
        elif first.name not in MAY_DIFFER:
            found.different.append(f"{path}: {_how_far(first, second)}")
        else:
            if first.suffix == ".json":
                contents = [_without_times(json.loads(file.read_text()), file.name) for file in (first, second)]
            else:
                contents = [side[path] for side in arguments]
            where = list(_differences(*contents))
            if where:
                found.different.append(f"{path}: {', '.join(where[:5])}")
            else:
                found.same_contents.append(path)
    return found


def _files(root: Path, part: str) -> list[str]:
    return [str(path.relative_to(root)) for path in (root / part).rglob("*") if path.is_file()]


def _without_times(value: Any, file: str) -> Any:
    if isinstance(value, dict):
        if file == "checkpoint_complete.json" and not value.keys() - MAY_DIFFER.keys() - _hashed(value):
            return {key: one for key, one in value.items() if key not in MAY_DIFFER}
        return {
            key: _without_times(one, file)
            for key, one in value.items()
            if not CLOCK.search(key)
            and key != RESUMED_FROM
            and not (key in OF_THE_RUN and file in ("balancer.json", "checkpoint_complete.json"))
        }
    if isinstance(value, list):
        return [_without_times(one, file) for one in value]
    return value


def _hashed(value: dict[str, Any]) -> set[str]:
    """The keys of a mapping from files to sizes or hashes."""
    return {key for key, one in value.items() if "." in key and isinstance(one, str | int)}


def _differences(one: Any, other: Any, path: str = "") -> Iterator[str]:
    """Where two JSON values differ; numbers have to be the same, and NaN is NaN."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in {**one, **other}:
            if key in one and key in other:
                yield from _differences(one[key], other[key], f"{path}.{key}")
            elif key in one or other[key] not in (None, "None"):  # a new option that is off is no difference
                yield f"{path}.{key} only {'before' if key in one else 'after'}"
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            yield from _differences(a, b, f"{path}[{i}]")
    elif repr(one) != repr(other):
        yield f"{path}: {str(one)[:40]} -> {str(other)[:40]}"


def _how_far(one: Path, other: Path) -> str:
    """The largest absolute difference of two files of tensors or arrays."""
    if one.suffix == ".safetensors":
        from safetensors.numpy import load_file

        arrays = (load_file(one), load_file(other))
    elif one.suffix == ".npz":
        arrays = (dict(np.load(one)), dict(np.load(other)))
    else:
        return "other bytes"
    if arrays[0].keys() != arrays[1].keys():
        return f"other names: {sorted(arrays[0].keys() ^ arrays[1].keys())[:5]}"
    worst = {name: _distance(array, arrays[1][name]) for name, array in arrays[0].items()}
    name = max(worst, key=lambda key: worst[key])
    return f"{name} by {worst[name]:.1e}" if worst[name] else "the same numbers in other bytes"


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    if one.shape != other.shape:
        return float("inf")
    return 0.0 if one.size == 0 else float(np.abs(one.astype(np.float64) - other.astype(np.float64)).max())


# --- the campaign ----------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    title: str
    found: Found


def campaign(names: list[str], libraries: tuple[Path, Path], work: Path, data: Path) -> tuple[list[Outcome], list[str]]:
    """Run and compare the parts; also returns what was left out."""
    parts, left_out = [], []
    for part in (PARTS[name] for name in names):
        if part.needs is None or (data / part.needs).is_dir():
            parts.append(part)
        else:
            left_out.append(f"{part.title} (no folder {part.needs} in the data)")
    before, after = Side(libraries[0], work / "before", data), Side(libraries[1], work / "after", data)
    resumed = Side(libraries[1], work / "resumed", data)
    before.run(parts)
    after.run(parts)
    outcomes = [Outcome(part.title, compare_sides(part, before, after)) for part in parts]
    resumable = [part for part in parts if part.resumes is not None]
    if resumable:
        for part in resumable:
            prepare_resuming(part, before, resumed)
        resumed.run(resumable, "--resume")
    for part in resumable:
        title = f"{part.title}: after goes on from step {part.resumes} of before"
        outcomes.append(Outcome(title, compare_sides(part, before, resumed)))
    return outcomes, left_out


def compare_sides(part: Part, one: Side, other: Side) -> Found:
    return compare_folders(part.folder, (one.folder, other.folder), (one.arguments(), other.arguments()))


def row(outcome: Outcome) -> str:
    found = outcome.found
    verdict = "the same" if not found.different and found.files else "NOT the same"
    return (
        f"| {outcome.title} | {found.files} | {len(found.same_bytes)} | {len(found.same_contents)} "
        f"| {len(found.different)} | {verdict} |"
    )


def page(outcomes: list[Outcome], left_out: list[str], sides: tuple[str, str], minutes: float) -> str:
    different = [f"* {outcome.title}: {line}" for outcome in outcomes for line in outcome.found.different]
    contents = {Path(path).name for outcome in outcomes for path in outcome.found.same_contents}
    models = sum(Path(p).name == "model.safetensors" for outcome in outcomes for p in outcome.found.same_bytes)
    lines = [
        "# The same numbers before and after",
        "",
        f"{datetime.date.today().isoformat()}; {len(os.sched_getaffinity(0))} cores ({platform.machine()});",
        f"Python {platform.python_version()}, torch {version('torch')}, transformers {version('transformers')}, "
        f"accelerate {version('accelerate')}.",
        f"Before: {sides[0]}; after: {sides[1]}.",
        f"Command: `python campaigns/same_numbers.py --before {sides[0].split()[0]}`; {minutes:.0f} minutes.",
        "",
        "| run | files | same bytes | same contents | different | |",
        "|---" * 6 + "|",
        *(row(outcome) for outcome in outcomes),
        "",
        "Trajectories and numbers of the own loop are files, too. Of runs that go on, the checkpoint that was copied",
        "counts among the same bytes.",
        "",
        f"`model.safetensors` with the same bytes: {models}. Files whose bytes may differ, and why:",
        "",
        *(
            f"* `{name}`: {why}{'' if name in contents else ' (their bytes were the same)'}."
            for name, why in MAY_DIFFER.items()
        ),
        "",
        "Left out: " + ("; ".join(left_out) if left_out else "nothing") + ".",
        "",
        *(["Different:", "", *different] if different else ["Nothing differs."]),
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--before", required=True, help="folder or git revision")
    parser.add_argument("--after", default=str(ROOT), help="folder or git revision (default: this checkout)")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="with glue/ and unpack.py")
    parser.add_argument("--work", type=Path, help="an empty folder that is kept (default: a temporary one)")
    parser.add_argument("--report", type=Path, default=REPORT)
    asked = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary, checkout(asked.before) as before, checkout(asked.after) as after:
        work = (asked.work or Path(temporary)).resolve()
        data = unpacked(asked.data.resolve(), work / "data", asked.only)
        outcomes, left_out = campaign(asked.only, (before, after), work, data)
    sides = (described(asked.before), described(asked.after))
    asked.report.write_text(page(outcomes, left_out, sides, (time.monotonic() - began) / 60), encoding="utf-8")
    print(asked.report.read_text(encoding="utf-8"))
    return int(not outcomes or any(outcome.found.different or not outcome.found.files for outcome in outcomes))


def unpacked(source: Path, target: Path, names: list[str]) -> Path:
    """The folder with the data sets in the layout that users have; empty where there is no source."""
    target.mkdir(parents=True, exist_ok=True)
    wanted = sorted({part.needs for name in names if (part := PARTS[name]).needs is not None})
    if wanted and (source / "unpack.py").exists():
        run_in(ROOT, [str(source / "unpack.py"), str(target), "--only", *wanted], target)
    return target


if __name__ == "__main__":
    sys.exit(main())
