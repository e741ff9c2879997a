"""Two states of the library side by side: a folder, or a git revision unpacked aside, and child processes in each."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Fails where the library would come from elsewhere, an editable install say: both sides would run the same code.
FROM_HERE = (
    "import importlib.util, pathlib, sys; "
    "sys.exit(pathlib.Path(importlib.util.find_spec('hf_bilb').origin).parents[1] != pathlib.Path.cwd())"
)


@contextmanager
def checkout(which: str) -> Iterator[Path]:
    """The folder `which`, or, where there is none of that name, the git revision in a folder that goes afterwards.

    Raises:
        SystemExit: neither a folder with the library nor a revision.
    """
    if (Path(which) / "hf_bilb").is_dir():
        yield _checked(Path(which).resolve())
        return
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", "--format=tar", which], capture_output=True)
    if archive.returncode:
        raise SystemExit(f"{which} is neither a folder with hf_bilb nor a revision: {archive.stderr.decode().strip()}")
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=BytesIO(archive.stdout)) as files:
            files.extractall(folder, filter="data")
        yield _checked(Path(folder).resolve())


def _checked(folder: Path) -> Path:
    if subprocess.run([sys.executable, "-c", FROM_HERE], cwd=folder, env=environment(folder)).returncode:
        raise SystemExit(f"a process in {folder} imports another hf_bilb than the one that lies there")
    return folder


def described(which: str) -> str:
    """The revision's short hash and date; of a folder, those of what is checked out there, `+` where it was changed."""
    folder, revision = (Path(which), "HEAD") if (Path(which) / "hf_bilb").is_dir() else (ROOT, which)
    shown = _git(folder, "log", "-1", "--format=%h of %cs", revision)
    if not shown:
        return "a folder without history"
    changed = revision == "HEAD" and _git(folder, "status", "--porcelain", "--", "hf_bilb")
    return f"{shown}+" if changed else shown


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True).stdout.strip()


def environment(folder: Path, own: Mapping[str, str] | None = None) -> dict[str, str]:
    """For a child process that imports the library of `folder`: one thread, nothing from outside."""
    return {
        **os.environ,
        "PYTHONPATH": str(folder),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **(own or {}),
    }


def run_in(folder: Path, arguments: Sequence[str], cwd: Path, own: Mapping[str, str] | None = None) -> str:
    """Run `python arguments` with the library of `folder`; returns what it printed.

    Raises:
        SystemExit: it failed; with the end of what it said.
    """
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment(folder, own), capture_output=True, text=True
    )
    if done.returncode:
        said = f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}".strip()
        raise SystemExit(f"python {' '.join(arguments)}\nwith the library of {folder} failed:\n{said}")
    return done.stdout
