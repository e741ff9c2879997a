"""A fresh process that pulls what was pushed, and predicts; it knows repositories of the test's Hub alone.

python -m tests.hub.share_worker FOLDER

FOLDER/rows.json: run -> its file of rows; None: it reads none. FOLDER/<run>.pt: a batch, of a language model
`input_ids`. Saved to FOLDER/pulled.pt: run -> outputs by task for the rows, else for the batch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM

import hf_bilb
from hf_bilb.errors import OptionError

ANSWERED = {"prompts": ["say good ", "say a longer one "], "max_new_tokens": 5}


def pulled(name: str, rows: str | None, batch: dict[str, Any]) -> dict[str, Any]:
    repo = f"somebody/{name}"
    if name == "module":
        try:
            hf_bilb.load(repo, device="cpu")
        except OptionError as error:
            refusal = str(error)
        return {**of_rows(hf_bilb.load(repo, device="cpu", trust_remote_code=True), rows), "refusal": refusal}
    loaded = hf_bilb.load(repo, device="cpu")
    if name.startswith("language"):
        auto = AutoModelForCausalLM.from_pretrained(repo).eval()
        with torch.no_grad():
            logits = {"logits": loaded.model(**batch).logits, "without hf_bilb": auto(**batch).logits}
        answers = loaded.predict(ANSWERED["prompts"], batch_size=1, max_new_tokens=ANSWERED["max_new_tokens"])
        return {**logits, "answers": list(answers)}
    if name == "table":  # its class is that of the package, where the package is imported
        network = AutoModel.from_pretrained(repo, trust_remote_code=True)
        assert type(network).__module__ == "hf_bilb.models.tabular_mlp"
    if rows is None:
        with torch.inference_mode():
            return {"logits": loaded.model(**batch)["logits"].clone()}
    return of_rows(loaded, rows)


def of_rows(loaded: Any, rows: str | None) -> dict[str, Any]:
    found = loaded.predict(rows, batch_size=8)
    return {task: torch.as_tensor(found.outputs[task]) for task in found}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    runs = json.loads((folder / "rows.json").read_text())
    found = {name: pulled(name, rows, torch.load(folder / f"{name}.pt")) for name, rows in runs.items()}
    torch.save(found, folder / "pulled.pt")
