"""What the campaign on backends has found, as `backends.json`, and the tables of `docs/backends.md` made from it.

python -m campaigns.backend_report     write the tables anew
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tests.distributed.backend_runs import MORE, cells, precision_of
from tests.distributed.backends import BACKENDS
from tests.distributed.checks import TOLERANCE
from tests.distributed.conftest import ROOT, Runs
from tests.synthetic import relative_difference

FOUND = Path(__file__).with_name("backends.json")
PAGE = ROOT / "docs" / "backends.md"
BEGIN, END = "<!-- made by campaigns/backend_report.py from campaigns/backends.json -->", "<!-- end -->"
TITLES = {"ddp": "DDP", "fsdp2": "FSDP2", **{f"zero{n}": f"ZeRO-{n}" for n in range(4)}}


def findings(backend: str, runs: Runs) -> dict[str, Any]:
    """Of one backend: case or setting -> its cells, the largest difference, what was refused, what failed."""
    kinds: dict[str, list[tuple[str, str]]] = {}
    for cell in cells():
        kinds.setdefault(cell.case, []).append((cell.key(backend), cell.key(precision_of(backend))))
    for name in MORE:
        kinds[f"more/{name}"] = [(f"{backend}/more/{name}", f"{precision_of(backend)}/more/{name}")]
    found: dict[str, Any] = {kind: _of_cells(runs, keys, backend) for kind, keys in kinds.items()}
    first = runs.ranks[0]
    sabotage = [name for name in first if name.endswith("/sabotage")]
    return {
        "cases": found,
        "sharding": next(held for one in first.values() if (held := one.get("watched"))),
        "sabotage": min(_difference(runs, name, _alone(name, backend)) for name in sabotage),
        "refused": {name.split("/", 2)[2]: one.get("refused") for name, one in first.items() if "/refused/" in name},
        "tolerance": TOLERANCE[precision_of(backend)],
    }


def _alone(name: str, backend: str) -> str:
    return name.replace(backend, precision_of(backend), 1).removesuffix("/sabotage")


def _of_cells(runs: Runs, keys: list[tuple[str, str]], backend: str) -> dict[str, Any]:
    found: dict[str, Any] = {"cells": 0, "largest": 0.0, "refused": [], "failed": []}
    for name, alone in keys:
        one, expected = runs.ranks[0][name], runs.one[alone]
        if "refused" in one:
            found["refused"] += [one["refused"]] if one["refused"] not in found["refused"] else []
            continue
        found["cells"] += 1
        if "error" in one or "parameters" not in expected:
            found["failed"].append(f"{name}: {one.get('error', 'one process does not run')}")
            continue
        difference = _difference(runs, name, alone)
        found["largest"] = max(found["largest"], difference)
        same = one["parameters"].equal(runs.ranks[1][name]["parameters"])
        if not same or not difference <= TOLERANCE[precision_of(backend)]:
            found["failed"].append(f"{name}: {difference:.1e}" + ("" if same else ", the ranks differ"))
    return found


def _difference(runs: Runs, name: str, alone: str) -> float:
    one, expected = runs.ranks[0][name].get("parameters"), runs.one[alone].get("parameters")
    return math.nan if one is None or expected is None else relative_difference(one, expected)


def about() -> dict[str, str]:
    """Date, commit, machine and versions."""
    packages = ("torch", "transformers", "accelerate", "deepspeed")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, two processes, gloo",
        **{package: _version(package) for package in packages},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


# --- the page -----------------------------------------------------------------------------------------------------


def tables(found: dict[str, Any]) -> str:
    """The generated part of the page."""
    backends = [name for name in BACKENDS if name in found["backends"]]
    versions = ", ".join(
        f"{name} {found['about'][name]}" for name in ("torch", "transformers", "accelerate", "deepspeed")
    )
    lines = [
        f"Measured {found['about']['date']} at {found['about']['commit']}, {found['about']['machine']}; {versions}.",
        "",
        *_table("method or setting", backends, found, [k for k in _kinds(found) if not k.startswith("more/")]),
        "",
        "And with other settings of the Trainer:",
        "",
        *_table("setting", backends, found, [k for k in _kinds(found) if k.startswith("more/")]),
        "",
        "How the numbers of one rank of two, of 164 parameters, and a wrong denominator:",
        "",
        "| | " + " | ".join(TITLES[name] for name in backends) + " |",
        "|---" * (len(backends) + 1) + "|",
    ]
    of = found["backends"]
    lines.append(_row("parameters held", [str(of[name]["sharding"]["parameters"]) for name in backends]))
    # ZeRO-3 gives its optimizer the parts one after the other, and none outside of a step.
    updated = [str(of[name]["sharding"]["updated"] or "-") for name in backends]
    lines.append(_row("parameters its optimizer steps", updated))
    lines.append(_row("error of a local denominator", [f"{of[name]['sabotage']:.0e}" for name in backends]))
    refusals = dict.fromkeys(line for name in backends for line in _refusals(of[name]))
    lines += ["", "The lines of what is refused:", "", *(f"* `{line}`" for line in refusals)]
    return "\n".join(lines)


def _kinds(found: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(kind for one in found["backends"].values() for kind in one["cases"]))


def _table(title: str, backends: list[str], found: dict[str, Any], kinds: list[str]) -> list[str]:
    rows = [
        _row(
            f"`{kind.removeprefix('more/')}`", [_cell(found["backends"][name]["cases"].get(kind)) for name in backends]
        )
        for kind in kinds
    ]
    head = _row(title, [TITLES[name] for name in backends])
    return [head, "|---" * (len(backends) + 1) + "|", *rows]


def _row(name: str, values: list[str]) -> str:
    return "| " + " | ".join([name, *values]) + " |"


def _cell(one: dict[str, Any] | None) -> str:
    if one is None:
        return ""
    if one["failed"]:
        return f"**{len(one['failed'])} of {one['cells']} not within**, {one['largest']:.0e}"
    if one["cells"] == 0:
        return "refused"
    return f"exact, {one['largest']:.0e}" + (" (1)" if one["refused"] else "")


def _refusals(one: dict[str, Any]) -> list[str]:
    by_method = [line for case in one["cases"].values() for line in case["refused"]]
    return [*by_method, *(line for line in one["refused"].values() if line)]


def write_page() -> None:
    """Put the tables into the page."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    found = json.loads(FOUND.read_text(encoding="utf-8"))
    PAGE.write_text(f"{before}{BEGIN}\n\n{tables(found)}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    write_page()
