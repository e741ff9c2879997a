"""Kill and resume of every balancer, for the campaign.

    python -m tests.checkpoints.every_method kill FOLDER CASE ...
    python -m tests.checkpoints.every_method resume FOLDER CASE ...

Results as in `tests.checkpoints.runs`; the runs of a case are FOLDER/<case>.<kind>.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

from tests.checkpoints.runs import WINDOW, Run, kill_and_finish, resume
from tests.contract.cases import Case
from tests.distributed.methods import NAMES, balancer_of, cases, compares_updates, looks_again, only_normalizes

#: What two processes, and a window, do for a method is mostly not a matter of its options.
KINDS = ("plain", "window", "micro_batch", "two_ranks")


def kinds_of(case: Case) -> tuple[str, ...]:
    """What is killed and resumed: every case, and under accumulation and on two ranks the methods' main ones."""
    if only_normalizes(case):
        return ()
    if looks_again(case):
        return ("plain", "window", "two_ranks")
    return KINDS if case.label == "default" or compares_updates(case) else ("plain",)


def run_of(case: Case, kind: str) -> Run:
    """The run: killed within an epoch, in the second one; in the third where a record needs two."""
    kill_at, resumes_from = (29, 25) if case.name == "dwa" else (18, 15)
    routed = case.build(len(NAMES)).objective.num_features > 0
    has_features = routed or case.option("gradients") == "features"
    given: dict[str, Any] = {"task_names": NAMES, "features": has_features, "dropout": 0.3}
    settings: dict[str, Any] = {"balancer": balancer_of(case)}
    if routed:
        settings["balancer"]["num_features"] = 8
    if kind == "window":
        settings["balance_over"] = "window"
        given.update(WINDOW)
    elif kind == "micro_batch":
        given.update(rows=84, batch=4, accumulation=2)
    elif kind == "two_ranks":
        given.update(batch=4, num_ranks=2)
    return Run(kill_at, resumes_from, settings, **given)


def main(mode: str, folder: Path, names: list[str]) -> None:
    gc.freeze()  # as in `tests.checkpoints.runs`
    for name in names:
        case = cases()[name]
        for kind in kinds_of(case):
            place = folder / f"{name}.{kind}"
            place.mkdir(exist_ok=True)
            (kill_and_finish if mode == "kill" else resume)(place, f"{name}.{kind}", run_of(case, kind))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
