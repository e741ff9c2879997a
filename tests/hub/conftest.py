from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub.runs import run, use, write_recipe
from tests.hub.server import Hub


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; nobody changes it."""
    folder = tmp_path_factory.mktemp("trained")
    done = run("train", write_recipe(folder))
    assert done.exit_code == 0, done.output
    return folder / "run"


@pytest.fixture
def a_run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub, for which files of 1 kB are large ones."""
    with Hub(large=1000) as made:
        use(made, monkeypatch)
        yield made
        assert made.unanswered == []
