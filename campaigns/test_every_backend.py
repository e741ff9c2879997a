"""Every backend: two ranks of DDP, FSDP2 and DeepSpeed's ZeRO 0 to 3 against one process with the whole batch.

    python -m pytest campaigns/test_every_backend.py               all, backends.json and the tables of docs/backends.md
    python -m pytest campaigns/test_every_backend.py -k zero2      one, without a report

What is run stands in `tests/distributed/backend_runs.py`. Half an hour on two idle cores.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from campaigns.backend_report import FOUND, about, findings, write_page
from tests.distributed.backends import BACKENDS, ZERO, has_deepspeed
from tests.distributed.conftest import launch

TIMEOUT = 7200


@pytest.fixture(scope="module")
def found() -> Iterator[dict[str, Any]]:
    results: dict[str, Any] = {}
    yield results
    if len(results) == len(BACKENDS):
        FOUND.write_text(json.dumps({"about": about(), "backends": results}, indent=1) + "\n", encoding="utf-8")
        write_page()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_as_one_process(backend: str, found: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    if backend in ZERO and not has_deepspeed():
        pytest.skip("needs the package deepspeed")
    folder = tmp_path_factory.mktemp(backend)
    runs = launch(folder, "tests.distributed.every_backend", [backend], timeout=TIMEOUT)
    found[backend] = one = findings(backend, runs)
    failed = [line for case in one["cases"].values() for line in case["failed"]]
    assert not failed, "\n".join(failed)
    assert one["sabotage"] > 1e-4
