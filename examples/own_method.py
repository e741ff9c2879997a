"""A balancing method of one's own in one file, tried on a small real problem. docs/own_method.md goes through it.

    python examples/own_method.py           # ls, si and catch_up on handwritten digits, seconds; needs scikit-learn
    hf-bilb train recipe.yaml 'imports=[examples/own_method.py]' balancer=catch_up        # and so in any recipe

Catch-up weighting: the tasks that have come down least, from where they began, get the most weight.

    m_k <- 0.9 m_k + 0.1 l_k,   m_k = l_k when first seen
    w = K softmax(gamma log m),   so that w_k is proportional to m_k^gamma and the weights add up to K
    F = sum_k w_k l_k

    gamma -> focus, m -> averages, w -> weights, l_k -> losses (after `normalization`: by default over their first
    values, so that units do not matter), K -> the number of active tasks

gamma = 0 is `ls`; gamma < 0 is for the tasks that are ahead (-1: weights of one over the loss, like `si`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_bilb import OptionError, build_balancer, register_balancer
from hf_bilb.engine.objective import HistoryObjective, ObjectiveValue
from hf_bilb.engine.options import BalancerOptions, masked_softmax, masked_sum
from hf_bilb.engine.records import NormalizationKind

MOMENTUM = 0.9


@dataclass(frozen=True, kw_only=True)
class CatchUpOptions(BalancerOptions):
    """Options of `catch_up`.

    Attributes:
        focus: gamma; the larger, the more the tasks that are behind count.
    """

    normalization: NormalizationKind = "initial"
    focus: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive_normalization("catch_up")
        if math.isinf(self.focus):
            raise OptionError(f"focus: {self.focus} is not valid, expected a finite number")


@register_balancer("catch_up", options=CatchUpOptions, paper="examples/own_method.py (ours, a worked example)")
class CatchUp(HistoryObjective):
    """Catch-up weighting. State: `averages [K]`, and `seen [K]`, which of them have begun. Cost: one forward and one
    backward of the model."""

    takes_logarithm = True
    averages: Tensor
    seen: Tensor

    def __init__(self, num_tasks: int, options: CatchUpOptions) -> None:
        super().__init__()
        self._focus = options.focus
        self.register_buffer("averages", torch.ones(num_tasks, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(num_tasks, dtype=torch.bool))

    @torch.no_grad()
    def observe(self, losses: Tensor, num_items: Tensor, active: Tensor, epoch: int) -> None:
        """Take the active tasks' losses into their averages."""
        moved = MOMENTUM * self.averages + (1 - MOMENTUM) * losses
        self.averages.copy_(torch.where(active, torch.where(self.seen, moved, losses), self.averages))
        self.seen.logical_or_(active)

    def forward(self, losses: Tensor, active: Tensor, features: Tensor | None) -> ObjectiveValue:
        """F over the `active` tasks; the weights do not depend on this batch but through the averages."""
        weights = active.sum() * masked_softmax(self._focus * self.averages.log(), active)
        return ObjectiveValue(masked_sum(weights * losses, active), weights=weights)


# ---------------------------------------------------------------------------------------------------- tried


class Digits:
    """1,797 handwritten digits of 8 x 8 pixels (UCI): which digit it is, and how much ink, a grey level up to 255.

    Cross-entropy and squared error: one loss of about 2 and one of about 70.
    """

    task_names = ("digit", "ink")

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        pixels, digits = load_digits(return_X_y=True)
        self.features = torch.tensor(pixels / 16, dtype=torch.float32)
        self.digits = torch.tensor(digits)
        self.ink = 255 * self.features.mean(dim=1)
        rows = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
        self.training, self.test = rows[:1400], rows[1400:]

    def losses(self, outputs: Tensor, rows: Tensor) -> Tensor:
        """`[2]`."""
        ink = (outputs[:, 10] - self.ink[rows]).square().mean()
        return torch.stack([nn.functional.cross_entropy(outputs[:, :10], self.digits[rows]), ink])

    def measure(self, model: nn.Module) -> tuple[float, float]:
        """Accuracy, and mean absolute error of the ink, on the 397 test rows."""
        with torch.no_grad():
            outputs = model(self.features[self.test])
        right = outputs[:, :10].argmax(dim=1) == self.digits[self.test]
        return float(right.float().mean()), float((outputs[:, 10] - self.ink[self.test]).abs().mean())


def train(balancer_name: str, data: Digits, epochs: int = 20) -> nn.Module:
    """A small network, trained in a plain loop."""
    torch.manual_seed(0)
    head = nn.Linear(16, 11)
    with torch.no_grad():
        head.bias[10] = data.ink[data.training].mean()  # begins with knowing the mean
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), head)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    balancer = build_balancer(balancer_name, task_names=data.task_names)
    for _ in range(epochs):
        for rows in data.training[torch.randperm(len(data.training))].split(64):
            optimizer.zero_grad()
            balancer.backward(data.losses(model(data.features[rows]), rows))
            optimizer.step()
            balancer.step()
    return model


def main() -> None:
    """Train with three methods and print what each has learned."""
    data = Digits()
    print(f"{'':10}{'digit: accuracy':>18}{'ink: mean error':>18}")
    for name in ("ls", "si", "catch_up"):
        accuracy, error = data.measure(train(name, data))
        print(f"{name:10}{accuracy:18.3f}{error:18.2f}")
    mean = data.ink[data.training].mean()
    print(f"{'(mean)':10}{'':18}{float((data.ink[data.test] - mean).abs().mean()):18.2f}")


if __name__ == "__main__":
    main()
