"""Heads in one matrix product: what a loop over them gives, and what is called as a module."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from hf_bilb.models.heads import joined_outputs


def heads_of(*sizes: int) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(6, size).double() for size in sizes]


def one_by_one(heads: list[nn.Linear], features: Tensor) -> Tensor:
    return torch.cat([nn.functional.linear(features, head.weight, head.bias) for head in heads], dim=-1)


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6)])
def test_one_product_equals_a_loop(shape: tuple[int, ...]) -> None:
    heads, features = heads_of(1, 3, 4), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    found, expected = joined_outputs(heads, features), one_by_one(heads, features)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
    inputs = [features, *(parameter for head in heads for parameter in head.parameters())]
    upstream = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "own_forward", "subclass"])
def test_a_head_that_is_more_than_its_weights_is_called(kind: str) -> None:
    heads, features = heads_of(2, 3), torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    calls: list[str] = []
    if kind == "own_forward":  # what accelerate does
        forward = heads[1].forward
        heads[1].forward = lambda inputs: calls.append(kind) or forward(inputs)  # type: ignore[method-assign]
    elif kind == "subclass":

        class Halved(nn.Linear):
            def forward(self, inputs: Tensor) -> Tensor:
                calls.append(kind)
                return super().forward(inputs)

        heads[1].__class__ = Halved
    else:
        getattr(heads[1], f"register_{kind}")(lambda *_: calls.append(kind))
    outputs = joined_outputs(heads, features)
    outputs.sum().backward()
    assert calls == [kind]
    torch.testing.assert_close(outputs, one_by_one(heads, features))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(6, 6)
        self.head_a, self.head_b = nn.Linear(6, 2), nn.Linear(6, 3)

    def forward(self, features: Tensor) -> Tensor:
        return joined_outputs([self.head_a, self.head_b], self.trunk(features))


@pytest.mark.parametrize(
    "settings", [{"modules_to_save": ["head_a"]}, {"target_modules": ["trunk", "head_a"]}], ids=str
)
def test_what_peft_puts_into_a_head_is_trained(settings: dict[str, list[str]]) -> None:
    torch.manual_seed(0)
    model = get_peft_model(Two(), LoraConfig(r=2, **{"target_modules": ["trunk"], **settings}))
    features, labels = torch.randn(16, 6), torch.randn(16, 5)
    head = model.base_model.model.head_a
    trained = [p for p in head.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        losses.append((model(features)[:, :2] - labels[:, :2]).square().mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1].item() < 0.8 * losses[0].item()
    assert trained and all(not torch.equal(p, old) for p, old in zip(trained, before, strict=True))
    torch.testing.assert_close(model(features)[:, :2], head(model.base_model.model.trunk(features)))
