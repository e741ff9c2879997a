"""A process in which hf_bilb is not installed; it knows repositories of the test's Hub, from `HF_ENDPOINT`.

python remote_worker.py FOLDER

FOLDER/wanted.json: repository -> whether peft is installed. Each is loaded with `trust_remote_code=True`; its outputs
for FOLDER/<name>.pt, or the message of the error, are saved to FOLDER/found.pt.
"""

from __future__ import annotations

import importlib.abc
import json
import re
import sys
from pathlib import Path
from typing import Any


class NotInstalled(importlib.abc.MetaPathFinder):
    """Packages that are not there."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


sys.meta_path.insert(0, NotInstalled("hf_bilb"))

import torch  # noqa: E402
from huggingface_hub import file_exists, hf_hub_download, snapshot_download  # noqa: E402
from transformers import AutoConfig, AutoModel  # noqa: E402


def outputs(repo: str, folder: Path) -> Any:
    try:
        config = AutoConfig.from_pretrained(repo, trust_remote_code=True)
        model = by_card(repo) if file_exists(repo, "results.json") else by_name(repo)
    except (ValueError, ImportError) as error:
        return f"{type(error).__name__}: {error}"
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    assert all(type(one).__module__.startswith("transformers_modules.") for one in (config, bare))
    found = computed(model, folder / f"{repo.partition('/')[2]}.pt")
    if repo == "somebody/multi_task_text":  # it can be saved and loaded as any other model
        model.save_pretrained(folder / "again")
        again = AutoModel.from_pretrained(folder / "again", trust_remote_code=True)
        assert torch.equal(computed(again, folder / "multi_task_text.pt")["losses"], found["losses"])
    return found


def by_name(repo: str) -> Any:
    name = snapshot_download(repo) if file_exists(repo, "adapter_config.json") else repo
    return AutoModel.from_pretrained(name, trust_remote_code=True)


def by_card(repo: str) -> Any:
    """By the code of the card, as it stands: the last block."""
    card = Path(hf_hub_download(repo, "README.md")).read_text(encoding="utf-8")
    *_, code = re.findall(r"^```python\n(.*?)^```", card, re.M | re.S)
    names: dict[str, Any] = {}
    exec(code, names)
    return names["network"]


def computed(model: torch.nn.Module, batch: Path) -> dict[str, Any]:
    with torch.no_grad():
        return dict(model(**torch.load(batch)))


def main(folder: Path) -> None:
    try:
        import hf_bilb  # noqa: F401
    except ModuleNotFoundError:
        pass
    else:
        raise AssertionError("it is installed")
    found = {}
    for repo, has_peft in json.loads((folder / "wanted.json").read_text()).items():
        hidden = NotInstalled() if has_peft else NotInstalled("peft")
        sys.meta_path.insert(0, hidden)
        held = {} if has_peft else {n: sys.modules.pop(n) for n in list(sys.modules) if n.partition(".")[0] == "peft"}
        found[repo] = outputs(repo, folder)
        sys.modules.update(held)
        sys.meta_path.remove(hidden)
    assert not [name for name in sys.modules if name.partition(".")[0] == "hf_bilb"]
    torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
