"""One process of the campaign on backends: `python -m tests.distributed.every_backend FOLDER SIZE [BACKEND ...]`."""

from __future__ import annotations

import sys

from tests.distributed.backend_runs import backend_scenarios
from tests.distributed.backends import BACKENDS
from tests.distributed.worker import main

if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), lambda: backend_scenarios(sys.argv[3:] or BACKENDS))
