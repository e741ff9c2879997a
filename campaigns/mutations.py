"""Break the package in many small ways, one at a time, and see whether the tests notice.

    python campaigns/mutations.py --tests HEAD --results thinned.json
    python campaigns/mutations.py --tests d511419 --results full.json --known thinned.json
    python campaigns/mutations.py --table full.json thinned.json

`--tests REV` takes the tests as they are at a commit (and the rest from the working tree), `WORKTREE` (the default) as
they lie here; with `HF_BILB_ALL_CASES=1` these are the whole products of `tests/products.py`. Each mutation of
`mutation_list.py` is applied in a temporary copy of the tree, and the tests that could notice run there in a forked
process until the first that fails. With `--known`, a test that failed under another set of tests is tried first: one
that fails is enough. `--most N` runs only N of the files that could notice, the cheapest ones. `-k WORD` takes the
mutations whose names hold it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from campaigns.mutation_list import MUTATIONS, Mutation  # noqa: E402

TIMEOUT = 900


def copy_tree(folder: Path, revision: str) -> None:
    """The tree that git knows, with the tests of `revision`."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.splitlines():
        source = ROOT / name
        if source.is_file() and (revision == "WORKTREE" or not name.startswith("tests/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, folder / name)
    if revision != "WORKTREE":
        archive = subprocess.run(["git", "archive", revision, "tests"], cwd=ROOT, capture_output=True, check=True)
        with tarfile.open(fileobj=BytesIO(archive.stdout)) as tests:
            tests.extractall(folder, filter="data")


def find(folder: Path, mutation: Mutation) -> Path | None:
    """The file whose text `mutation` changes; None where it does not stand exactly once below the package."""
    found = [
        (path, count)
        for path in sorted((folder / "hf_bilb").rglob("*.py"))
        if (count := path.read_text().count(mutation.old))
    ]
    return found[0][0] if len(found) == 1 and found[0][1] == 1 else None


def import_what_is_slow() -> None:
    """What every fork would import again; nothing of the package itself, which is what is mutated."""
    os.environ["OMP_NUM_THREADS"] = "1"
    wanted = "import sys, pytest, hf_bilb.trainer.trainer, hf_bilb.experiments.recipe, torchjd; print(*sys.modules)"
    listed = subprocess.run([sys.executable, "-c", wanted], cwd=ROOT, capture_output=True, text=True, check=True)
    own = ("hf_bilb", "tests", "campaigns", "__main__")
    for name in listed.stdout.split():
        if name.split(".")[0] not in own:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    torch.set_num_threads(1)
    gc.freeze()  # no fork looks through what was imported here
    assert not any(name.split(".")[0] == "hf_bilb" for name in sys.modules)


def run_tests(folder: Path, tests: Sequence[str], log: Path) -> dict[str, Any]:
    """Run `tests` in `folder` in a forked process until one fails; returns that one and the seconds it took."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)

    def child() -> None:
        os.setsid()
        with log.open("w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        os.chdir(folder)
        os.environ["PYTHONPATH"] = str(folder)
        sys.path[:] = [str(folder), *(path for path in sys.path if path != str(ROOT))]
        for name in [name for name in sys.modules if name.split(".")[0] in ("campaigns", "tests")]:
            del sys.modules[name]
        import pytest

        class First:
            failed = ""

            def pytest_runtest_logreport(self, report: Any) -> None:
                if report.failed and not self.failed:
                    self.failed = report.nodeid

            def pytest_collectreport(self, report: Any) -> None:
                if report.failed and not self.failed:
                    self.failed = f"{report.nodeid} (collection)"

        first = First()
        options = ["-x", "-q", "-p", "no:cacheprovider", "--rootdir", str(folder)]
        code = pytest.main([*options, *tests], plugins=[first])
        sending.send({"code": int(code), "failed": first.failed})
        os._exit(0)

    start = time.perf_counter()
    process = context.Process(target=child)
    process.start()
    found: dict[str, Any] = {"code": -1, "failed": "ended without a result, or after too long"}
    if receiving.poll(TIMEOUT):
        with contextlib.suppress(EOFError):
            found = receiving.recv()
    process.kill()
    process.join()
    return {**found, "seconds": round(time.perf_counter() - start, 1)}


def try_mutation(folder: Path, mutation: Mutation, known: str | None, most: int) -> dict[str, Any]:
    """Apply `mutation` in `folder`, run its tests, and take it back."""
    path = find(folder, mutation)
    if path is None:
        return {"state": "the text is not there"}
    original = path.read_text()
    path.write_text(original.replace(mutation.old, mutation.new))
    try:
        if known:
            # All cases of the test: under another set of tests this one may have another name.
            found = run_tests(folder, [known.split("[")[0]], folder / "known.log")
            if found["code"] == 1 and found["failed"]:
                return {"state": "caught", "by": found["failed"], "seconds": found["seconds"]}
        seconds = 0.0
        for tests in list(dict.fromkeys(mutation.tests))[:most]:
            found = run_tests(folder, [f"tests/{tests}"], folder / "tests.log")
            seconds += found["seconds"]
            if found["failed"]:
                return {"state": "caught", "by": found["failed"], "seconds": round(seconds, 1)}
            if found["code"] not in (0, 5):
                tail = (folder / "tests.log").read_text()[-2000:]
                return {"state": f"pytest ended with {found['code']}: {tail}"}
        return {"state": "not caught", "seconds": round(seconds, 1)}
    finally:
        path.write_text(original)


def table(results: Sequence[Path]) -> str:
    """Results side by side, as Markdown."""
    read = [json.loads(path.read_text()) for path in results]
    names = [path.stem for path in results]
    lines = ["| what is broken | " + " | ".join(names) + " | caught by |", "|---|" + "---|" * (len(names) + 1)]
    for mutation in MUTATIONS:
        found = [one["mutations"].get(mutation.name, {"state": "not run"}) for one in read]
        test = str(found[-1].get("by", "")).removeprefix("tests/").split("[")[0]
        cells = " | ".join(one["state"] for one in found)
        lines.append(f"| {mutation.name} | {cells} | {f'`{test}`' if test else ''} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", default="WORKTREE")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--known", type=Path)
    parser.add_argument("--table", type=Path, nargs="+")
    parser.add_argument("-k", default="")
    parser.add_argument("--most", type=int, default=99)
    given = parser.parse_args()
    if given.table:
        print(table(given.table))
        return
    known = json.loads(given.known.read_text())["mutations"] if given.known else {}
    results: dict[str, Any] = {"tests": given.tests, "mutations": {}}
    if given.results and given.results.is_file():
        results = json.loads(given.results.read_text())  # goes on where it was stopped
    import_what_is_slow()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copy_tree(folder, given.tests)
        for mutation in sorted(MUTATIONS, key=lambda one: one.tests[0].startswith("distributed")):
            if given.k not in mutation.name or mutation.name in results["mutations"]:
                continue
            found = try_mutation(folder, mutation, known.get(mutation.name, {}).get("by"), given.most)
            results["mutations"][mutation.name] = found
            print(f"{mutation.name}: {found['state']} {found.get('by', '')} ({found.get('seconds', 0)} s)", flush=True)
            if given.results:
                given.results.write_text(json.dumps(results, indent=1))
    states = [found["state"] for found in results["mutations"].values()]
    print({state: states.count(state) for state in dict.fromkeys(states)})


if __name__ == "__main__":
    main()
