"""Are the lower bounds of pyproject.toml true? The quick tests, run with the lowest versions that it names.

    python campaigns/lowest_versions.py FOLDER     builds FOLDER/env (gigabytes: torch comes with CUDA)

What is named gets its lowest version, what those need in turn its newest one that fits: that is what a user has who
pins the packages of pyproject.toml alone. Writes `lowest_versions.md`; ends with 1 where a test fails. A folder that
already has the environment of the same bounds is used again.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parents[1]
REPORT = Path(__file__).resolve().with_name("lowest_versions.md")
EXTRAS = ("qm9", "glue", "vision", "nyuv2", "gradient", "tensorboard")
#: What touches most of the packages in some minutes: engine, Trainer, checkpoints, recipes, command line, data.
QUICK = (
    "tests/trainer/test_compat.py",
    "tests/cli/test_cli.py",
    "tests/recipe/test_recipe.py",
    "tests/trainer/test_losses.py",
    "tests/trainer/test_evaluation.py",
    "tests/trainer/test_window.py",
    "tests/trainer/test_settings.py",
    "tests/checkpoints/test_weights.py",
    "tests/engine/test_standalone.py",
    "tests/engine/test_task_gradients.py",
    "tests/trainer/test_gradient_methods.py",
    "tests/engine/test_double_loop.py",
    "tests/engine/test_token_losses.py",
    "tests/engine/test_masked_losses.py",
    "tests/engine/test_feature_router.py",
    "tests/balancers/test_parity.py",
    "tests/data/test_qm9.py",
)


def project() -> dict:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)["project"]


def bounds() -> dict[str, str]:
    """Package -> the lowest version that pyproject.toml names, of the package itself and of the extras that run."""
    named = project()
    listed = [*named["dependencies"], *(line for extra in EXTRAS for line in named["optional-dependencies"][extra])]
    listed += named["optional-dependencies"]["molecules"]  # part of qm9
    return dict(line.split(">=") for line in listed if ">=" in line)


def pytest_bound() -> str:
    return next(line for line in project()["optional-dependencies"]["dev"] if line.startswith("pytest>=")).replace(
        ">=", "=="
    )


def build(folder: Path) -> Path:
    """The environment's python."""
    folder.mkdir(parents=True, exist_ok=True)
    uv, python, wanted = folder / "tools" / "bin" / "uv", folder / "env" / "bin" / "python", folder / "lowest.txt"
    if not uv.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder / "tools")], check=True)
        subprocess.run([str(folder / "tools" / "bin" / "pip"), "install", "-q", "uv"], check=True)
    chosen = subprocess.run(
        [
            *(str(uv), "pip", "compile", "-q", "--no-header", "--no-annotate", "--resolution", "lowest-direct"),
            *("--python-version", f"{sys.version_info.major}.{sys.version_info.minor}"),
            *(part for extra in EXTRAS for part in ("--extra", extra)),
            str(ROOT / "pyproject.toml"),
        ],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    if not python.exists():
        subprocess.run([str(uv), "venv", "-q", "--python", sys.executable, str(folder / "env")], check=True)
    if not wanted.exists() or wanted.read_text() != chosen:
        wanted.write_text(chosen)
        install = [str(uv), "pip", "install", "-q", "--python", str(python)]
        # The library itself, for its metadata and its command; what the tests import is this checkout.
        itself = [*install, "--no-deps", str(ROOT)]
        if any(subprocess.run(c).returncode for c in ([*install, "-r", str(wanted), pytest_bound()], itself)):
            wanted.unlink()
            raise SystemExit("the lowest versions cannot be installed together")
    return python


def installed(python: Path, names: list[str]) -> dict[str, str]:
    code = "import sys; from importlib.metadata import version; print(*(version(n) for n in sys.argv[1:]), sep='\\n')"
    found = subprocess.run([str(python), "-c", code, *names], check=True, capture_output=True, text=True).stdout
    return dict(zip(names, found.split(), strict=True))


def run_tests(python: Path) -> tuple[int, str]:
    """Exit status, and the lines that pytest ends with."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *QUICK]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    print("\n".join(lines[-40:]), done.stderr[-2000:])
    kept = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return done.returncode, "\n".join([*kept, re.sub(r" in [\d.]+s.*", "", lines[-1]).strip("= ")])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.resolve()
    began = time.monotonic()
    python = build(folder)
    named = bounds()
    found = installed(python, list(named))
    status, ended = run_tests(python)
    rows = [f"| {name} | {lowest} | {found[name]} |" for name, lowest in named.items()]
    quick = textwrap.fill(", ".join(f"`{path.removeprefix('tests/')}`" for path in QUICK), 118)
    page = f"""# The lowest versions

{datetime.date.today().isoformat()}; {platform.machine()}, no accelerator; Python {platform.python_version()}.
Command: `python campaigns/lowest_versions.py FOLDER`; {(time.monotonic() - began) / 60:.0f} minutes.

| package | lower bound in pyproject.toml | tested with |
|---|---|---|
{chr(10).join(rows)}

Where the tested version is above the bound, other packages of the list ask for it. Quick tests:
{quick}.

    {ended.replace(chr(10), chr(10) + "    ")}
"""
    REPORT.write_text(page, encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
