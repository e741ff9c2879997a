"""The message-passing network of the multi-task papers' QM9 runs, for any set of molecular graphs.

Gilmer et al., ICML 2017 (arXiv 1704.01212), in the sizes of Nash-MTL, FAMO and LDC-MTL: one linear layer to C = 64
channels, three rounds of edge-conditioned messages (edge network E - 128 - C^2) with one GRU for all rounds, Set2Set
with three steps, one shared linear layer, a linear output a task.

    h = relu(W_0 x);  three times: h = GRU(relu(m(h, e)), h);  z = relu(W_1 Set2Set(h));  y_k = w_k . z + b_k

The K outputs are one linear map, the K losses one masked expression.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig

from hf_bilb.config.options import nearest
from hf_bilb.errors import OptionError
from hf_bilb.losses.contract import check_task_names
from hf_bilb.losses.masked import masked_bce_with_logits, masked_mse
from hf_bilb.models.base import MultiTaskModel, check_dropout, check_size
from hf_bilb.models.graph.layers import EdgeConditionedMessage, GraphSizes, Set2Set
from hf_bilb.models.outputs import KEYS_TO_IGNORE_AT_INFERENCE, MultiTaskOutput
from hf_bilb.models.spec import ModelSpec

Problem = Literal["regression", "binary_classification"]
_LOSSES = {"regression": masked_mse, "binary_classification": masked_bce_with_logits}


@dataclass(frozen=True)
class MpnnOptions:
    """What a recipe's `model:` section may set; the defaults are the papers'.

    Attributes:
        hidden_size: channels of a node.
        edge_hidden_size: hidden units of the edge network.
        num_messages: rounds of messages.
        num_readout_steps: steps of Set2Set.
        dropout: before the outputs, in [0, 1); the papers have none.
    """

    hidden_size: int = 64
    edge_hidden_size: int = 128
    num_messages: int = 3
    num_readout_steps: int = 3
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for key in ("hidden_size", "edge_hidden_size", "num_messages", "num_readout_steps"):
            check_size(key, getattr(self, key))
        check_dropout(self.dropout)


class MpnnConfig(PretrainedConfig):
    """Sizes of `MpnnModel`; the defaults are the papers'.

    Args:
        num_node_features: F of a node (11 for QM9).
        num_edge_features: E of an edge (5 for QM9: four bond types and the distance).
        task_names: the K tasks, in the order of the labels' columns.
        problem: of all tasks: `regression` (mean squared error) or `binary_classification` (cross-entropy of a logit).
        label_means, label_stds: of the training rows, K each, in the data set's units; None where labels are no
            standardised numbers.
        node_feature_names, edge_feature_names: what the features are, for the record.
        hidden_size: channels C of a node.
        edge_hidden_size: hidden units of the edge network.
        num_messages: rounds of messages.
        num_readout_steps: steps of Set2Set.
        dropout: before the outputs, in [0, 1); the papers have none.
        kwargs: what `PretrainedConfig` takes.

    Attributes:
        num_router_features: width of `router_features`, equal to `hidden_size`.

    Raises:
        OptionError: a size below 1, a dropout outside [0, 1), an unknown problem, task names that are empty or stand
            twice.
    """

    model_type = "mpnn"
    keys_to_ignore_at_inference: ClassVar[list[str]] = list(KEYS_TO_IGNORE_AT_INFERENCE)

    def __init__(
        self,
        num_node_features: int = 11,
        num_edge_features: int = 5,
        task_names: Sequence[str] = ("task",),
        problem: str = "regression",
        label_means: Sequence[float] | None = None,
        label_stds: Sequence[float] | None = None,
        node_feature_names: Sequence[str] | None = None,
        edge_feature_names: Sequence[str] | None = None,
        hidden_size: int = MpnnOptions.hidden_size,
        edge_hidden_size: int = MpnnOptions.edge_hidden_size,
        num_messages: int = MpnnOptions.num_messages,
        num_readout_steps: int = MpnnOptions.num_readout_steps,
        dropout: float = MpnnOptions.dropout,
        **kwargs: Any,
    ) -> None:
        sizes = {
            "num_node_features": num_node_features,
            "num_edge_features": num_edge_features,
            "hidden_size": hidden_size,
            "edge_hidden_size": edge_hidden_size,
            "num_messages": num_messages,
            "num_readout_steps": num_readout_steps,
        }
        for key, value in sizes.items():
            check_size(key, value)
            setattr(self, key, value)
        check_dropout(dropout)
        if problem not in get_args(Problem):
            known = get_args(Problem)
            raise OptionError(
                f"problem: {problem!r} is not valid, expected {' or '.join(known)}{nearest(problem, known)}"
            )
        self.dropout = dropout
        self.problem = problem
        self.task_names = list(check_task_names(task_names))
        self.label_means, self.label_stds = label_means, label_stds
        self.node_feature_names, self.edge_feature_names = node_feature_names, edge_feature_names
        self.num_router_features = hidden_size
        super().__init__(**kwargs)


class MpnnModel(MultiTaskModel):
    """Predicts K numbers or logits of a graph.

    Cost: one forward and one backward whatever K is. With batches of 120 molecules of QM9 on one CPU core a training
    step takes about 1/14 of the time of the same model built from PyTorch Geometric's layers, which build a 64 x 64
    matrix per edge (`benchmarks/mpnn.py`).
    """

    config_class = MpnnConfig
    base_model_prefix = "mpnn"
    main_input_name = "nodes"

    def __init__(self, config: MpnnConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.embedding = nn.Linear(config.num_node_features, width)
        self.message = EdgeConditionedMessage(width, config.num_edge_features, config.edge_hidden_size)
        self.update = nn.GRUCell(width, width)
        self.readout = Set2Set(width, config.num_readout_steps)
        self.shared = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(config.dropout)
        self.heads = nn.Linear(width, len(config.task_names))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # torch's own defaults, as the papers have them; transformers' would be a normal distribution.
        if isinstance(module, (nn.Linear, nn.GRUCell, nn.LSTMCell)):
            module.reset_parameters()
        elif isinstance(module, EdgeConditionedMessage):
            module.reset_matrices()

    def forward(
        self,
        nodes: Tensor,
        edges: Tensor,
        edge_mask: Tensor,
        num_nodes: Sequence[int],
        labels: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> MultiTaskOutput | tuple[Tensor, ...]:
        """Predictions, and with labels the loss of each task.

        Args:
            nodes: `[B, N, F]`, padded to the largest graph of the batch.
            edges: `[B, N, N, E]`, features of the edge from node j to node i at `[b, i, j]`.
            edge_mask: bool `[B, N, N]`, True where that edge is.
            num_nodes: nodes of each of the B graphs; integers on the host, so that no device is waited for.
            labels: `[B, K]`, NaN where missing; None for predictions alone.
            return_dict: False for a plain tuple of what is there; None follows the config.

        Returns:
            `MultiTaskOutput`: `logits [B, K]`, and with labels `losses [K]`, `num_items [K]` and `router_features
            [B, hidden_size]` (what all heads read).

        Raises:
            ValueError: `num_nodes` that are not 1 to N, one a graph.
        """
        if len(num_nodes) != len(nodes):
            raise ValueError(f"num_nodes: got {len(num_nodes)}, expected one for each of {len(nodes)} graphs")
        hidden = self._graph_features(nodes, edges, edge_mask, GraphSizes(num_nodes, nodes.shape[1], nodes.device))
        logits = self.heads(self.dropout(hidden))
        losses = None if labels is None else _LOSSES[self.config.problem](logits, labels)
        return self._output(logits, losses, hidden, return_dict)

    def _graph_features(self, nodes: Tensor, edges: Tensor, edge_mask: Tensor, sizes: GraphSizes) -> Tensor:
        """`[B, hidden_size]`, what all heads read."""
        states = functional.relu(self.embedding(sizes.ragged(nodes)))
        edge_hidden = self.message.edge_hidden(edges, edge_mask, sizes)
        for _ in range(self.config.num_messages):
            states = self.update(functional.relu(self.message(states, edge_hidden)), states)
        return functional.relu(self.shared(self.readout(sizes.padded(states), sizes.mask())))

    @torch.no_grad()
    def predict(self, nodes: Tensor, edges: Tensor, edge_mask: Tensor, num_nodes: Sequence[int]) -> Tensor:
        """Properties `[B, K]` in the data set's units, or probabilities; arguments as in `forward`.

        Raises:
            ValueError: a regression whose config has no label scales (the model was not trained by a recipe).
        """
        logits = self(nodes, edges, edge_mask, num_nodes).logits
        config = self.config
        if config.problem == "binary_classification":
            return logits.sigmoid()
        if config.label_means is None or config.label_stds is None:
            raise ValueError("the config holds no label scales; call the model for standardised predictions")
        return logits * logits.new_tensor(config.label_stds) + logits.new_tensor(config.label_means)


SPEC = ModelSpec(MpnnConfig, MpnnModel, options=MpnnOptions)
