"""One process of the campaign on every method: runs what is checked of the given cases and saves the results.

python -m tests.distributed.every_method FOLDER 1 CASE ...
python -m torch.distributed.run --nproc_per_node 2 -m tests.distributed.every_method FOLDER 2 CASE ...
"""

from __future__ import annotations

import sys

from tests.distributed.method_checks import checks_of, scenarios
from tests.distributed.methods import cases
from tests.distributed.worker import main

if __name__ == "__main__":
    chosen = [cases()[name] for name in sys.argv[3:]]
    main(
        sys.argv[1], int(sys.argv[2]), lambda: scenarios((case, check) for case in chosen for check in checks_of(case))
    )
