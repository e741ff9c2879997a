"""BiLB4MTL written out once more, in plain torch with loops and end-to-end autograd: what `bilb` is compared with.

Nothing of `hf_bilb` is used here. One update is: the losses of a small model at parameters x, the router's weights, f
and g as in the paper (arXiv 2502.08585, eq. 1-2), the gradients of F = p g + lambda f with respect to the losses, the
features, x and W, the inner loop for z, and one step of the router.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

K, D, ROWS, P = 5, 3, 4, 6
#: Router logits on both sides of zero, and rows A with bias b of a feature router.
LOGITS = [0.8, -0.4, 0.1, 1.5, -1.1]


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Toy(nn.Module):
    """K losses of P parameters and `[ROWS, D]` router features; the batch is number t."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(drawn(P, seed=1))

    def forward(self, t: int) -> tuple[Tensor, Tensor]:
        sizes = torch.tensor([0.1, 3.0, 0.7, 1.4, 0.3], dtype=torch.float64)
        losses = sizes * (0.2 + torch.tanh(drawn(K, P, seed=10 + t) @ self.x - drawn(K, seed=20 + t)).square())
        features = torch.tanh((drawn(ROWS * D, P, seed=30 + t) @ self.x).reshape(ROWS, D))
        return losses, features


def by_hand(router: list[Tensor], options: Mapping[str, Any], epochs: tuple[int, int]) -> dict[str, Tensor]:
    """The second of two updates of `Toy`; the first one (batch 0) only gives references.

    Args:
        router: W before the update: `[logits]`, or `[A, b]`.
        options: those of `bilb`, complete.
        epochs: in which epoch each of the two updates lies.
    """
    o = dict(options)
    w = [parameter.detach().clone().requires_grad_() for parameter in router]
    model = Toy()
    (losses, features), references = model(1), _references(o, epochs)

    def levels(losses: Tensor, features: Tensor, w: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return _levels(losses, features, w, references, o)

    lam, penalty = _lambda(features, w, o), _inner(o)["penalty_weight"]
    of_losses, of_features = losses.detach().requires_grad_(), features.detach().requires_grad_()
    f, g, sigma = levels(of_losses, of_features, w)
    value = penalty * g + lam * f
    coefficients = torch.autograd.grad(value, of_losses, retain_graph=True)[0]
    feature_gradient = _gradient(value, [of_features])[0]
    gradient = _gradient(lam * f if o["router_gradient"] == "upper" else value, w)
    applied = _applied(coefficients, o)
    surrogate = (applied * losses).sum() + (feature_gradient * features).sum()
    z = model.x.detach().clone()
    if _inner(o)["inner_steps"] > 0:
        there = Toy()
        for _ in range(_inner(o)["inner_steps"]):
            (slope,) = torch.autograd.grad(levels(*there(1), w)[1], [there.x])
            there.x.data -= _inner(o)["inner_learning_rate"] * slope
        z = there.x.detach()
        gradient = [a - penalty * b for a, b in zip(gradient, _gradient(levels(*there(1), w)[1], w), strict=True)]
    return {
        "value": value.detach(),
        "weights": sigma.detach(),
        "discrepancy": f.detach(),
        "coefficients": applied,
        "feature_gradient": feature_gradient.sum(dim=0),
        "model_gradient": _gradient(surrogate, [model.x])[0],
        "router_step": _router_step(w, gradient, o),
        "reference_losses": references,
        "z": z,
    }


def end_to_end(router: list[Tensor], options: Mapping[str, Any], epochs: tuple[int, int]) -> Tensor:
    """The gradient of F with respect to x, straight through the model: no coefficients anywhere."""
    model = Toy()
    losses, features = model(1)
    f, g, _ = _levels(losses, features, router, _references(options, epochs), options)
    value = _inner(options)["penalty_weight"] * g + _lambda(features, router, options) * f
    return torch.autograd.grad(value, [model.x])[0]


def _inner(o: Mapping[str, Any]) -> dict[str, Any]:
    single = {"inner_steps": 0, "inner_learning_rate": 0.0, "penalty_weight": 1.0}
    return single if o["lower_level"] == "single_loop" else {**single, **o["lower_level"]}


def _references(o: Mapping[str, Any], epochs: tuple[int, int]) -> Tensor:
    first, second = Toy()(0)[0].detach(), Toy()(1)[0].detach()
    if isinstance(o["reference"], dict):
        return (first + second) / 2 if o["reference"]["mean_of"] > 1 else first
    return second if o["reference"] == "every_epoch" and epochs[0] != epochs[1] else first


def _normalised(losses: Tensor, references: Tensor, o: Mapping[str, Any]) -> Tensor:
    return {
        "none": lambda: losses,
        "initial": lambda: losses / references,
        "rescaled": lambda: losses * min(references.tolist()) / references,
        "log": lambda: losses.log() - references.log(),
        "power": lambda: (losses / references) ** o["power"] / o["power"],
    }[o["normalization"]]()


def _sigma(features: Tensor, w: list[Tensor], o: Mapping[str, Any]) -> Tensor:
    logits = w[0] if o["router"] == "parameter" else w[0] @ features.mean(dim=0) + w[1]
    if o["activation"] == "softmax":
        sigma = logits.exp() / logits.exp().sum()
    elif o["activation"] == "sigmoid":
        sigma = 1 / (1 + (-logits).exp())
    else:
        sigma = 1 / (1 + (-torch.where(logits > 0, logits, 0.0)).exp())
    if o["clamp"] is None:
        return sigma
    low, high = o["clamp"]
    return torch.stack([s if low < s < high else torch.full_like(s, low if s <= low else high) for s in sigma])


def _denominator(sigma: Tensor, o: Mapping[str, Any]) -> Tensor:
    total = sum(sigma.unbind(), torch.zeros((), dtype=torch.float64))
    return {"none": torch.ones_like(total), "sum": total, "detached_sum": total.detach()}[o["weight_denominator"]]


def _levels(
    losses: Tensor, features: Tensor, w: list[Tensor], references: Tensor, o: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """f, g, sigma."""
    sigma = _sigma(features.detach() if o["detach_features"] else features, w, o)
    normalised = _normalised(losses, references, o)
    values = sigma * normalised if o["tau"] == "weights" else normalised
    pairs = list(itertools.pairwise(range(K)) if o["pairs"] == "adjacent" else itertools.combinations(range(K), 2))
    # Over all pairs their mean, times the K - 1 of a chain.
    share = 1.0 if o["pairs"] == "adjacent" else (K - 1) / len(pairs)
    f = torch.zeros((), dtype=torch.float64)
    for i, j in pairs:
        gap = values[i] - values[j]
        f = f + share * (gap.abs() if o["smoothing"] == 0 else (gap * gap + o["smoothing"]).sqrt())
    g = sum((sigma[i] * normalised[i] for i in range(K)), torch.zeros((), dtype=torch.float64))
    return f, g / _denominator(sigma, o), sigma


def _lambda(features: Tensor, w: list[Tensor], o: Mapping[str, Any]) -> float:
    """A fraction a is a times the lambda at which p sigma_i / denominator = lambda tau_i s_i first holds for a task;
    s_i is its number of neighbours, or 2 (K - 1) / K over all pairs."""
    if not isinstance(o["discrepancy_weight"], dict):
        return float(o["discrepancy_weight"])
    sigma = _sigma(features, w, o).detach()
    edges = []
    for i in range(K):
        slope = 2 * (K - 1) / K if o["pairs"] == "all" else (1 if i in (0, K - 1) else 2)
        tau = float(sigma[i]) if o["tau"] == "weights" else 1.0
        edges.append(_inner(o)["penalty_weight"] * float(sigma[i]) / float(_denominator(sigma, o)) / (tau * slope))
    return o["discrepancy_weight"]["edge_fraction"] * min(edges)


def _applied(coefficients: Tensor, o: Mapping[str, Any]) -> Tensor:
    if o["coefficient_floor"] is not None:
        floor = o["coefficient_floor"] * float(coefficients.abs().mean())
        coefficients = torch.tensor([max(c, floor) for c in coefficients.tolist()], dtype=torch.float64)
    target = {"as_defined": None, "sum_to_one": 1, "sum_to_k": K}[o["coefficient_scale"]]
    return coefficients if target is None else coefficients * target / coefficients.abs().sum()


def _gradient(value: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(value, inputs, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def _router_step(w: list[Tensor], gradient: list[Tensor], o: Mapping[str, Any]) -> Tensor:
    parameters = [parameter.detach().clone().requires_grad_() for parameter in w]
    for parameter, g in zip(parameters, gradient, strict=True):
        parameter.grad = g
    cls = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[o["optimizer"]]
    cls(parameters, lr=MODEL_RATE if o["learning_rate"] == "follow_model" else o["learning_rate"]).step()
    return torch.cat([(new - old).detach().flatten() for new, old in zip(parameters, w, strict=True)])


#: The model optimizer's learning rate, which `follow_model` takes.
MODEL_RATE = 0.3
