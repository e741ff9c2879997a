"""Algorithm 2 of BiLB4MTL (arXiv 2502.08585) written out for a whole run, in plain torch: the double loop's reference.

Nothing of `hf_bilb` is used here. z is a second model (a deep copy), every derivative is end-to-end autograd:

    z_0 = z_N of the update before (x_0 at first),   z_{n+1} = z_n - beta grad_z g(W, z_n)
    W descends grad_W F(W, x) - p grad_W g(W, z_N),  x descends grad_x F(W, x),   F = lambda f + p g
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

K, D, INPUTS = 3, 4, 5
X_RATE = 0.05


@dataclass
class Part:
    """A micro-batch; NaN in `labels` = missing."""

    inputs: Tensor
    labels: Tensor


class Network(nn.Module):
    """K masked mean losses over 0.05, so that logarithms can be taken; the trunk's output is the router's features."""

    def __init__(self, dropout: float = 0.0, norm: bool = False, tied: bool = False, frozen: bool = False) -> None:
        super().__init__()
        self.trunk = nn.Linear(INPUTS, D)
        self.norm = nn.BatchNorm1d(D) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.middle = nn.Linear(D, D)
        self.again = nn.Linear(D, D)
        self.heads = nn.Linear(D, K)
        self.double()
        generator = torch.Generator().manual_seed(3)
        for parameter in self.parameters():
            parameter.data = 0.7 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        if tied:
            self.again.weight = self.middle.weight
        if frozen:
            self.trunk.requires_grad_(False)
        self.calls = 0
        self.masks: list[Tensor] = []

    def forward(self, part: Part) -> tuple[Tensor, Tensor, Tensor]:
        """Losses `[K]`, counts `[K]`, features `[B, D]`."""
        self.calls += 1
        features = torch.tanh(self.norm(self.trunk(part.inputs)))
        dropped = self.dropout(features)
        self.masks.append(dropped.detach() == 0)
        hidden = torch.tanh(self.again(torch.tanh(self.middle(dropped))))
        valid = ~part.labels.isnan()
        labels = torch.where(valid, part.labels, 0.0)
        squares = torch.where(valid, (self.heads(hidden) - labels).square() + 0.05, 0.0)
        count = valid.sum(dim=0).double()
        return squares.sum(dim=0) / count.clamp(min=1), count, features


def part(t: int, rows: int = 8, missing: Sequence[int] = ()) -> Part:
    """Batch number t, in which the tasks `missing` have no label."""
    generator = torch.Generator().manual_seed(100 + t)
    inputs = torch.randn(rows, INPUTS, dtype=torch.float64, generator=generator)
    labels = torch.randn(rows, K, dtype=torch.float64, generator=generator) * torch.tensor([0.3, 1.0, 2.0])
    labels[:, list(missing)] = torch.nan
    return Part(inputs, labels)


@dataclass
class Run:
    """Where a run has got to: x, z and W after each update, the losses' f and g on the way."""

    x: list[Tensor] = field(default_factory=list)
    z: list[Tensor] = field(default_factory=list)
    w: list[Tensor] = field(default_factory=list)
    lower_at_x: list[float] = field(default_factory=list)
    lower_at_z: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)
    norms: list[tuple[float, float, float]] = field(default_factory=list)


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class Reference:
    """Runs the algorithm by hand.

    Args:
        model: x.
        w: the router's parameters.
        options: of `bilb`, those that matter here: activation, normalization, power, discrepancy_weight (a number),
            learning_rate, optimizer, lower_level; adjacent pairs, tau = weights, detached sum.
        hold: whether the last losses of absent tasks are compared with.
    """

    def __init__(self, model: nn.Module, w: Sequence[Tensor], options: Mapping[str, Any], hold: bool = False) -> None:
        self.x, self.z = model, copy.deepcopy(model)
        self.w = [parameter.detach().clone().requires_grad_() for parameter in w]
        self.o = options
        self.hold = hold
        self.references: dict[int, float] = {}
        self.last: dict[int, Tensor] = {}
        self.optimizer = torch.optim.SGD(trainable(model), lr=X_RATE)
        cls = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[options["optimizer"]]
        self.router = cls(self.w, lr=options["learning_rate"])
        self.run = Run()

    def update(self, parts: Sequence[Part]) -> None:
        loop = self.o["lower_level"]
        losses, features = self.losses(self.x, parts)
        for k, loss in losses.items():
            self.references.setdefault(k, float(loss.detach()))
            self.last[k] = loss.detach()
        f, g = self.levels(losses, features)
        value = self.o["discrepancy_weight"] * f + loop["penalty_weight"] * g
        xs = trainable(self.x)
        slopes = torch.autograd.grad(value, [*xs, *self.w], retain_graph=True, allow_unused=True)
        upper, lower = (torch.autograd.grad(level, self.w, retain_graph=True) for level in (f, g))
        for parameter, slope in zip(xs, slopes[: len(xs)], strict=True):
            parameter.grad = slope
        self.optimizer.step()

        random = torch.get_rng_state()
        for _ in range(loop["inner_steps"]):
            torch.set_rng_state(random)
            zs = trainable(self.z)
            descent = torch.autograd.grad(self.levels(*self.losses(self.z, parts))[1], zs, allow_unused=True)
            for parameter, slope in zip(zs, descent, strict=True):
                if slope is not None:
                    parameter.data -= loop["inner_learning_rate"] * slope
        torch.set_rng_state(random)
        there = self.levels(*self.losses(self.z, parts))[1]
        torch.set_rng_state(random)
        at_z = torch.autograd.grad(there, self.w)

        for parameter, slope, correction in zip(self.w, slopes[len(xs) :], at_z, strict=True):
            parameter.grad = slope - loop["penalty_weight"] * correction
        self.router.step()
        run = self.run
        run.x.append(flat(trainable(self.x)))
        run.z.append(flat(trainable(self.z)))
        run.w.append(flat(self.w))
        run.lower_at_x.append(float(g.detach()))
        run.lower_at_z.append(float(there.detach()))
        run.upper.append(float(f.detach()))
        run.norms.append((float(flat(at_z).norm()), float(flat(lower).norm()), float(flat(upper).norm())))

    def losses(self, model: nn.Module, parts: Sequence[Part]) -> tuple[dict[int, Tensor], Tensor]:
        """The losses of the tasks that are there, over all parts, and the mean features."""
        found = [model(part) for part in parts]
        counts = sum(items for _, items, _ in found)
        sums = sum(losses * items for losses, items, _ in found)
        rows = torch.cat([features for _, _, features in found])
        return {k: sums[k] / counts[k] for k in range(K) if counts[k] > 0}, rows.mean(dim=0)

    def levels(self, losses: dict[int, Tensor], features: Tensor) -> tuple[Tensor, Tensor]:
        """f and g."""
        if self.hold:
            losses = {**{k: self.last[k] for k in self.last}, **losses}
        logits = self.w[0] if len(self.w) == 1 else self.w[0] @ features + self.w[1]
        sigma = torch.sigmoid(logits) if self.o["activation"] == "sigmoid" else torch.softmax(logits, dim=0)
        values = {k: sigma[k] * self.normalised(losses[k], self.references[k]) for k in sorted(losses)}
        f = sum((values[i] - values[j]).abs() for i, j in itertools.pairwise(values))
        g = sum(values.values()) / sum(sigma[k].detach() for k in values)
        return torch.as_tensor(f, dtype=torch.float64) + 0 * sigma.sum(), g

    def normalised(self, loss: Tensor, reference: float) -> Tensor:
        kind, power = self.o["normalization"], self.o.get("power", 0.5)
        if kind == "none":
            return loss
        return torch.log(loss / reference) if kind == "log" else (loss / reference) ** power / power
