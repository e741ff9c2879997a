"""One process of the campaign on backends, or with `--few` of `test_backends.py`.

python -m tests.distributed.every_backend FOLDER SIZE [--few] [BACKEND ...]
"""

from __future__ import annotations

import sys

from tests.distributed.backend_runs import backend_scenarios, few_scenarios
from tests.distributed.backends import BACKENDS
from tests.distributed.worker import main

if __name__ == "__main__":
    few = "--few" in sys.argv
    named = [name for name in sys.argv[3:] if name != "--few"] or BACKENDS
    main(sys.argv[1], int(sys.argv[2]), lambda: (few_scenarios if few else backend_scenarios)(named))
