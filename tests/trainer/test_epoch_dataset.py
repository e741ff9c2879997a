"""Data that are others in every epoch: the Trainer says which one it is, also when it resumes in the middle of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hf_bilb import BilevelMTLTrainer
from hf_bilb.trainer.epochs import EpochDataset
from tests.synthetic import build_data, build_model, flat_parameters
from tests.trainer.harness import BATCH, FLOAT, arguments

EPOCHS, STEPS = 3, 4


class Shifted(Dataset[dict[str, Tensor]], EpochDataset):
    """Features shifted by an amount of each epoch's own, which lies where worker processes see it."""

    def __init__(self) -> None:
        self.rows = build_data(STEPS * BATCH, dtype=FLOAT)
        self.epoch = torch.full((), -1).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = dict(self.rows[index])
        assert int(self.epoch) >= 0, "nobody has told the epoch"
        return {**row, "features": row["features"] + 0.1 * int(self.epoch)}


def trainer(folder: Path, **settings: Any) -> BilevelMTLTrainer:
    args = arguments(folder, num_train_epochs=EPOCHS, balancer="ls", learning_rate=0.01, **settings)
    return BilevelMTLTrainer(model=build_model(FLOAT), args=args, train_dataset=Shifted())


@pytest.mark.parametrize(("order", "workers"), [("sequential", 0), ("random", 0), ("random", 2)])
def test_a_run_that_goes_on_in_mid_epoch_sees_the_rows_of_that_epoch(order: str, workers: int, tmp_path: Path) -> None:
    loading = {"dataloader_num_workers": workers, "dataloader_persistent_workers": workers > 0}
    loading["train_sampling_strategy"] = order
    whole = trainer(tmp_path, save_strategy="steps", save_steps=STEPS + 2, **loading)
    whole.train()
    resumed = trainer(tmp_path / "other", **loading)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS + 2}"))
    assert torch.equal(flat_parameters(resumed.model), flat_parameters(whole.model))


def test_every_epoch_has_its_own_rows(tmp_path: Path) -> None:
    whole = trainer(tmp_path)
    whole.train()
    # By hand, plain descent on the sum.
    model, rows = build_model(FLOAT), build_data(STEPS * BATCH, dtype=FLOAT)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for epoch in range(EPOCHS):
        for start in range(0, STEPS * BATCH, BATCH):
            batch = [rows[i] for i in range(start, start + BATCH)]
            columns = {key: torch.stack([row[key] for row in batch]) for key in batch[0]}
            optimizer.zero_grad()
            model(**{**columns, "features": columns["features"] + 0.1 * epoch}).losses.sum().backward()
            optimizer.step()
    torch.testing.assert_close(flat_parameters(whole.model), flat_parameters(model), rtol=1e-12, atol=0)
