"""A shared-bottom network for Adult: plain torch, nothing of hf_bilb."""

import torch
from torch import nn


class SharedBottom(nn.Module):
    """One shared layer, one tower of a hidden layer for each task."""

    def __init__(self, num_features: int, num_tasks: int, hidden_size: int, tower_size: int, dropout: float) -> None:
        super().__init__()
        self.bottom = nn.Sequential(nn.Linear(num_features, hidden_size), nn.ReLU(), nn.Dropout(dropout))
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(hidden_size, tower_size), nn.ReLU(), nn.Linear(tower_size, 1))
            for _ in range(num_tasks)
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`[B, num_features] -> [B, num_tasks]`, one logit for each task."""
        shared = self.bottom(features)
        return torch.cat([tower(shared) for tower in self.towers], dim=1)


def build(
    num_features: int, num_tasks: int, hidden_size: int = 64, tower_size: int = 16, dropout: float = 0.1
) -> nn.Module:
    """Called with the recipe's arguments; the first two come from the data."""
    return SharedBottom(num_features, num_tasks, hidden_size, tower_size, dropout)
