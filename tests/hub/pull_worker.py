"""A fresh process that knows a repository's name alone, and the test's Hub from `HF_ENDPOINT`.

python -m tests.hub.pull_worker REPO FOLDER

In FOLDER: run the Python code of the card of REPO as it stands, save what it predicts to found.json, and download the
repository into `pulled`.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download


def run_card(repo: str, folder: Path) -> None:
    os.chdir(folder)
    card = Path(hf_hub_download(repo, "README.md")).read_text(encoding="utf-8")
    code, _ = re.findall(r"^```python\n(.*?)^```", card, re.M | re.S)  # the other one is for whom has no hf_bilb
    names: dict[str, Any] = {}
    exec(code, names)
    (folder / "found.json").write_text(json.dumps(names["predictions"].to_columns(all_classes=True)))
    snapshot_download(repo, local_dir=folder / "pulled")


if __name__ == "__main__":
    run_card(sys.argv[1], Path(sys.argv[2]))
