"""The papers' QM9 network from PyTorch Geometric's layers, and its weights from ours: the reference of `MpnnModel`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch_geometric.nn import NNConv
from torch_geometric.nn.aggr import Set2Set

from hf_bilb.models import MpnnModel


class PygMpnn(nn.Module):
    """Edge-conditioned messages with a matrix per edge, a GRU, Set2Set: sizes as `config` says."""

    def __init__(self, config) -> None:
        super().__init__()
        width, hidden = config.hidden_size, config.edge_hidden_size
        network = nn.Sequential(
            nn.Linear(config.num_edge_features, hidden), nn.ReLU(), nn.Linear(hidden, width * width)
        )
        self.num_messages = config.num_messages
        self.embedding = nn.Linear(config.num_node_features, width)
        self.conv = NNConv(width, width, network, aggr="mean")
        self.gru = nn.GRU(width, width)
        self.set2set = Set2Set(width, processing_steps=config.num_readout_steps)
        self.shared = nn.Linear(2 * width, width)
        self.heads = nn.ModuleList([nn.Linear(width, 1) for _ in config.task_names])

    def forward(self, nodes: Tensor, edge_index: Tensor, edge_attr: Tensor, graph: Tensor) -> Tensor:
        out = self.embedding(nodes).relu()
        state = out[None]
        for _ in range(self.num_messages):
            message = self.conv(out, edge_index, edge_attr).relu()
            out, state = self.gru(message[None], state)
            out = out[0]
        features = self.shared(self.set2set(out, graph)).relu()
        return torch.cat([head(features) for head in self.heads], dim=1)


def ragged(nodes: Tensor, edges: Tensor, edge_mask: Tensor, num_nodes: Sequence[int]) -> tuple[Tensor, ...]:
    """A padded batch as PyTorch Geometric wants it: nodes `[A, F]`, edge_index `[2, Q]`, edge_attr, graph `[A]`."""
    starts = torch.tensor([0, *num_nodes]).cumsum(0)[:-1]
    parts = [nodes[b, :n] for b, n in enumerate(num_nodes)]
    pairs = [edge_mask[b].nonzero() for b in range(len(nodes))]  # (receiver, sender)
    index = torch.cat([pair.flip(1) + start for pair, start in zip(pairs, starts, strict=True)]).T
    features = torch.cat([edges[b, pair[:, 0], pair[:, 1]] for b, pair in enumerate(pairs)])
    return torch.cat(parts), index, features, torch.arange(len(nodes)).repeat_interleave(torch.tensor(num_nodes))


def _pairs(ours: MpnnModel, theirs: PygMpnn) -> list[tuple[Tensor, Tensor]]:
    """Our tensors, in the shape of theirs, beside theirs; of one model the values, of another the gradients."""
    width = ours.config.hidden_size
    return [
        (ours.embedding.weight, theirs.embedding.weight),
        (ours.embedding.bias, theirs.embedding.bias),
        (ours.message.edge.weight, theirs.conv.nn[0].weight),
        (ours.message.edge.bias, theirs.conv.nn[0].bias),
        # theirs: [in * out, H] and [in * out]; ours: [H + 1, in, out]
        (ours.message.weight[:-1].permute(1, 2, 0).reshape(width * width, -1), theirs.conv.nn[2].weight),
        (ours.message.weight[-1].reshape(-1), theirs.conv.nn[2].bias),
        (ours.message.root.weight, theirs.conv.lin.weight),
        (ours.message.root.bias, theirs.conv.bias),
        *zip(
            [ours.update.weight_ih, ours.update.weight_hh, ours.update.bias_ih, ours.update.bias_hh],
            theirs.gru.parameters(),
            strict=True,
        ),
        *zip(
            [
                ours.readout.lstm.weight_ih,
                ours.readout.lstm.weight_hh,
                ours.readout.lstm.bias_ih,
                ours.readout.lstm.bias_hh,
            ],
            theirs.set2set.lstm.parameters(),
            strict=True,
        ),
        (ours.shared.weight, theirs.shared.weight),
        (ours.shared.bias, theirs.shared.bias),
        *((ours.heads.weight[k : k + 1], head.weight) for k, head in enumerate(theirs.heads)),
        *((ours.heads.bias[k : k + 1], head.bias) for k, head in enumerate(theirs.heads)),
    ]


def with_weights_of(ours: MpnnModel) -> PygMpnn:
    """The reference with our weights, every one of its parameters set."""
    theirs = PygMpnn(ours.config).to(ours.dtype)
    pairs = _pairs(ours, theirs)
    assert {id(parameter) for parameter in theirs.parameters()} == {id(parameter) for _, parameter in pairs}
    with torch.no_grad():
        for own, reference in pairs:
            reference.copy_(own)
    return theirs


def gradients(ours: MpnnModel, theirs: PygMpnn) -> list[tuple[Tensor, Tensor]]:
    """Gradients of both, in the shape of theirs."""
    holder = MpnnModel(ours.config).to(ours.dtype)
    for own, parameter in zip(holder.parameters(), ours.parameters(), strict=True):
        own.data = parameter.grad.clone()
    return [(own.detach(), reference.grad) for own, reference in _pairs(holder, theirs)]
