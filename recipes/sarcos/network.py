"""A network for SARCOS as anybody would write it: plain torch, nothing of hf_bilb."""

import torch
from torch import nn


class Arm(nn.Module):
    """A shared trunk; the last layer's rows are the joints' heads."""

    def __init__(self, num_features: int, num_tasks: int, hidden_size: int, num_layers: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for layer in range(num_layers):
            layers += [nn.Linear(hidden_size if layer else num_features, hidden_size), nn.SiLU()]
        self.trunk = nn.Sequential(*layers)
        self.heads = nn.Linear(hidden_size, num_tasks)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`[B, num_features] -> [B, num_tasks]`, standardised torques."""
        return self.heads(self.trunk(features))


def build(num_features: int, num_tasks: int, hidden_size: int = 64, num_layers: int = 2) -> nn.Module:
    """Called with the recipe's arguments; the first two come from the data."""
    return Arm(num_features, num_tasks, hidden_size, num_layers)
