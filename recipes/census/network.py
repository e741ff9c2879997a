"""A multi-gate mixture of experts (Ma et al., KDD 2018) for the census data: plain torch, nothing of hf_bilb."""

import torch
from torch import nn


class MixtureOfExperts(nn.Module):
    """E experts of one layer; each task weighs them by a gate of its own (equations 6 and 7), then has a tower."""

    def __init__(self, num_features: int, num_tasks: int, num_experts: int, expert_size: int, tower_size: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.experts = nn.Linear(num_features, num_experts * expert_size)
        self.gates = nn.ModuleList(nn.Linear(num_features, num_experts, bias=False) for _ in range(num_tasks))
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(expert_size, tower_size), nn.ReLU(), nn.Linear(tower_size, 1))
            for _ in range(num_tasks)
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`[B, num_features] -> [B, num_tasks]`, one logit for each task."""
        experts = self.experts(features).relu().unflatten(1, (self.num_experts, -1))
        logits = []
        for gate, tower in zip(self.gates, self.towers, strict=True):
            weights = gate(features).softmax(dim=1)
            logits.append(tower(torch.einsum("be,beh->bh", weights, experts)))
        return torch.cat(logits, dim=1)


def build(
    num_features: int, num_tasks: int, num_experts: int = 8, expert_size: int = 16, tower_size: int = 8
) -> nn.Module:
    """Called with the recipe's arguments; the first two come from the data."""
    return MixtureOfExperts(num_features, num_tasks, num_experts, expert_size, tower_size)
