"""Layers of message-passing networks on small dense graphs (molecules), without a matrix per edge and without padding.

Gilmer, Schoenholz, Riley, Vinyals, Dahl: Neural Message Passing for Quantum Chemistry, ICML 2017 (arXiv 1704.01212):
the edge network of section 5.1 and the set2set readout of section 5.2. Symbols: h -> nodes, A(e_vw) -> what the edge
network makes of an edge, m -> messages, q* -> readout.

Graphs of one size are computed together, so that a batch of molecules of 4 to 29 atoms costs what its atoms cost. The
sizes come from the host, so nothing here waits for a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn import functional


class GraphSizes:
    """Which graphs of a padded batch have the same size, and where their nodes are.

    The order of "ragged" tensors `[A, ...]` (A: nodes of all graphs) is by size, graphs of one size in the batch's
    order, the nodes of a graph one after the other.

    Args:
        num_nodes: nodes of each of the B graphs.
        max_nodes: what the batch is padded to.
        device: of the batch.

    Attributes:
        groups: per size, smallest first: its nodes n, and which graphs `[b]` have it.
        positions: `[A]`, where in the flattened padded batch `[B * max_nodes, ...]` each node stands.

    Raises:
        ValueError: a size that is not 1 to `max_nodes`.
    """

    def __init__(self, num_nodes: Sequence[int], max_nodes: int, device: torch.device) -> None:
        wrong = next((n for n in num_nodes if not 1 <= n <= max_nodes), None)
        if wrong is not None:
            raise ValueError(f"num_nodes: {wrong} is not valid, expected 1 to {max_nodes} (the size of the batch)")
        self.shape = (len(num_nodes), max_nodes)
        order = sorted(range(len(num_nodes)), key=num_nodes.__getitem__)
        by_size = [(n, torch.tensor(list(graphs))) for n, graphs in groupby(order, key=num_nodes.__getitem__)]
        positions = [(graphs[:, None] * max_nodes + torch.arange(n)).flatten() for n, graphs in by_size]
        self.groups = [(n, graphs.to(device, non_blocking=True)) for n, graphs in by_size]
        self.positions = torch.cat(positions).to(device, non_blocking=True)

    def ragged(self, padded: Tensor) -> Tensor:
        """`[B, max_nodes, ...]` -> `[A, ...]`."""
        return padded.flatten(0, 1).index_select(0, self.positions)

    def padded(self, ragged: Tensor) -> Tensor:
        """`[A, C]` -> `[B, max_nodes, C]`, zero where padded."""
        size, max_nodes = self.shape
        flat = ragged.new_zeros(size * max_nodes, ragged.shape[1])
        return flat.index_copy(0, self.positions, ragged).view(size, max_nodes, -1)

    def mask(self) -> Tensor:
        """Bool `[B, max_nodes]`, True where a node is."""
        size, max_nodes = self.shape
        flat = torch.zeros(size * max_nodes, dtype=torch.bool, device=self.positions.device)
        return flat.index_fill(0, self.positions, True).view(size, max_nodes)


class EdgeConditionedMessage(nn.Module):
    """Mean over the neighbours of A(e_ij) h_j, with A a two-layer network that gives a matrix per edge.

        m_i = 1/|N(i)| sum_{j in N(i)} A(e_ij) h_j + W h_i + b        A(e) = reshape(U relu(V e + c) + d)

    which is NNConv of PyTorch Geometric with `aggr="mean"`. A is linear in g_ij = relu(V e_ij + c), so the sum over j
    comes first:

        m_i = U : (1/|N(i)| sum_j (g_ij, 1) h_j^T) + W h_i + b

    and no matrix per edge is built: with n nodes a graph, C channels and H hidden units, n H C^2 + n^2 H C
    multiplications take the place of n^2 H C^2. `edge_hidden` computes g once; every round of messages uses it again.

    Args:
        num_channels: C of the nodes.
        num_edge_features: E.
        hidden_size: H.

    Attributes:
        weight: `[H + 1, C, C]`, U and (last) its offset d: hidden unit, input channel, output channel.
    """

    def __init__(self, num_channels: int, num_edge_features: int, hidden_size: int) -> None:
        super().__init__()
        self.edge = nn.Linear(num_edge_features, hidden_size)
        self.weight = nn.Parameter(torch.empty(hidden_size + 1, num_channels, num_channels))
        self.root = nn.Linear(num_channels, num_channels)
        self.reset_matrices()

    def reset_matrices(self) -> None:
        """As the papers' model begins: torch's default for both layers of A, and for W; b = 0."""
        nn.init.uniform_(self.weight, -((len(self.weight) - 1) ** -0.5), (len(self.weight) - 1) ** -0.5)
        nn.init.uniform_(self.root.weight, -(self.root.in_features**-0.5), self.root.in_features**-0.5)
        nn.init.zeros_(self.root.bias)

    def edge_hidden(self, edges: Tensor, edge_mask: Tensor, sizes: GraphSizes) -> list[Tensor]:
        """g of every edge, divided by the receiving node's number of neighbours: what all rounds of messages share.

        Args:
            edges: `[B, N, N, E]`, features of the edge from node j to node i at `[b, i, j]`.
            edge_mask: bool `[B, N, N]`, True where that edge is.
            sizes: of the B graphs.

        Returns:
            per size n with b graphs `[b, n * (H + 1), n]`: receiver and hidden unit, sender.
        """
        return [self._hidden_of_size(edges[graphs, :n, :n], edge_mask[graphs, :n, :n]) for n, graphs in sizes.groups]

    def _hidden_of_size(self, edges: Tensor, edge_mask: Tensor) -> Tensor:
        hidden = functional.pad(functional.relu(self.edge(edges)), (0, 1), value=1.0)
        is_edge = edge_mask.to(hidden.dtype)
        shares = is_edge / is_edge.sum(dim=2, keepdim=True).clamp(min=1)  # a node without neighbours gets no message
        return (hidden * shares[..., None]).transpose(2, 3).flatten(1, 2)

    def forward(self, nodes: Tensor, hidden: Sequence[Tensor]) -> Tensor:
        """One round of messages.

        Args:
            nodes: `[A, C]`, ragged.
            hidden: from `edge_hidden`.

        Returns:
            `[A, C]`.
        """
        matrices = self.weight.flatten(0, 1)
        counts = [len(of_size) * of_size.shape[2] for of_size in hidden]
        messages = [
            torch.bmm(of_size, part.view(len(of_size), of_size.shape[2], -1)).view(len(part), -1) @ matrices
            for of_size, part in zip(hidden, nodes.split(counts), strict=True)
        ]
        return torch.cat(messages) + self.root(nodes)


class Set2Set(nn.Module):
    """Reads a set of nodes several times and gives a vector that does not depend on their order.

    Vinyals, Bengio, Kudlur: Order Matters: Sequence to Sequence for Sets, ICLR 2016 (arXiv 1511.06391), equations 3-7:
    q_t = LSTM(q*_{t-1}), a = softmax over the nodes of x_i . q_t, r_t = sum a_i x_i, q*_t = (q_t, r_t), from zeros.

    Args:
        num_channels: C.
        num_steps: T.
    """

    def __init__(self, num_channels: int, num_steps: int) -> None:
        super().__init__()
        self.num_steps = num_steps
        self.lstm = nn.LSTMCell(2 * num_channels, num_channels)

    def forward(self, nodes: Tensor, mask: Tensor) -> Tensor:
        """`nodes [B, N, C]`, `mask [B, N]` (True where a node is, in every graph somewhere) -> `[B, 2 C]`."""
        size, _, channels = nodes.shape
        state = (nodes.new_zeros(size, channels), nodes.new_zeros(size, channels))
        readout = nodes.new_zeros(size, 2 * channels)
        for _ in range(self.num_steps):
            state = self.lstm(readout, state)
            scores = torch.einsum("bnc,bc->bn", nodes, state[0]).masked_fill(~mask, -torch.inf)
            read = torch.einsum("bn,bnc->bc", scores.softmax(dim=1), nodes)
            readout = torch.cat([state[0], read], dim=1)
        return readout
