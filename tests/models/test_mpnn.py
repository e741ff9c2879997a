"""The message-passing network equals PyTorch Geometric's; graphs, batches and order do not disturb each other."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModel

from hf_bilb.errors import OptionError
from hf_bilb.losses.masked import masked_bce_with_logits, masked_mse
from hf_bilb.models import MpnnConfig, MpnnModel
from hf_bilb.models.graph.layers import EdgeConditionedMessage, GraphSizes
from tests.models.pyg_mpnn import gradients, ragged, with_weights_of

SIZES = [4, 7, 1, 7, 5, 2]
TASKS = [f"task_{k}" for k in range(11)]


def batch(sizes=SIZES, features=11, edge_features=5, tasks=11, dtype=torch.float64, complete=True, seed=0):
    """Random molecules, padded; pairs without an edge hold numbers that must not matter."""
    generator = torch.Generator().manual_seed(seed)
    size, longest = len(sizes), max(sizes)
    inside = torch.arange(longest) < torch.tensor(sizes)[:, None]
    mask = inside[:, :, None] & inside[:, None, :] & ~torch.eye(longest, dtype=torch.bool)
    if not complete:
        mask &= torch.rand(mask.shape, generator=generator) < 0.4
    return {
        "nodes": torch.randn(size, longest, features, generator=generator, dtype=dtype),
        "edges": torch.randn(size, longest, longest, edge_features, generator=generator, dtype=dtype),
        "edge_mask": mask,
        "num_nodes": list(sizes),
        "labels": torch.randn(size, tasks, generator=generator, dtype=dtype),
    }


def model(dtype=torch.float64, **changes):
    torch.manual_seed(1)
    return MpnnModel(MpnnConfig(**{"task_names": TASKS, **changes})).to(dtype)


def inputs(examples):
    return [examples[key] for key in ("nodes", "edges", "edge_mask", "num_nodes")]


def relative(own, reference):
    return ((own - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("complete", [True, False], ids=["complete graphs", "some edges"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_outputs_and_gradients_equal_the_model_of_pytorch_geometric(complete, dtype, tolerance):
    ours = model(dtype)
    theirs = with_weights_of(ours)
    examples = batch(complete=complete, dtype=dtype)
    output = ours(**examples)
    expected = theirs(*ragged(*inputs(examples)))
    assert relative(output.logits, expected) < tolerance
    output.losses.sum().backward()
    (expected - examples["labels"]).square().mean(dim=0).sum().backward()
    for own, reference in gradients(ours, theirs):
        assert relative(own, reference) < tolerance


def test_sizes_are_the_papers():
    parameters = dict(model(torch.float32).named_parameters())
    assert parameters["message.edge.weight"].shape == (128, 5)
    assert parameters["message.weight"].shape == (128 + 1, 64, 64)  # 128 -> 4096 with its bias
    assert parameters["heads.weight"].shape == (11, 64)
    reference = with_weights_of(model(torch.float32))
    assert sum(p.numel() for p in parameters.values()) == sum(p.numel() for p in reference.parameters())


def test_no_tensor_with_a_matrix_per_edge_is_built():
    ours, examples, largest = model(), batch([9, 9, 8, 9]), 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                largest = max(largest, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
            return out

    with Watch():
        ours(**examples).losses.sum().backward()
    edges = int(examples["edge_mask"].sum())
    assert 0 < largest < edges * 64 * 64


def test_a_molecule_is_predicted_alike_in_any_company():
    ours = model()
    examples = batch(complete=False)
    together = ours(*inputs(examples)).logits
    for b, n in enumerate(SIZES):
        alone = [examples[key][b : b + 1, :n] for key in ("nodes", "edges", "edge_mask")]
        alone[1], alone[2] = alone[1][:, :, :n], alone[2][:, :, :n]
        torch.testing.assert_close(ours(*alone, [n]).logits[0], together[b], rtol=1e-10, atol=1e-12)


def test_the_order_of_atoms_does_not_matter():
    ours, examples = model(), batch([6], complete=False)
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    moved = [
        examples["nodes"][:, order],
        examples["edges"][:, order][:, :, order],
        examples["edge_mask"][:, order][:, :, order],
        [6],
    ]
    torch.testing.assert_close(ours(*moved).logits, ours(*inputs(examples)).logits, rtol=1e-10, atol=1e-12)


def test_an_edge_carries_from_its_second_index_to_its_first():
    layer = EdgeConditionedMessage(3, 2, 4).double()
    mask = torch.zeros(1, 3, 3, dtype=torch.bool)
    mask[0, 0, 1] = True
    nodes = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    hidden = layer.edge_hidden(torch.randn(1, 3, 3, 2, dtype=torch.float64), mask, GraphSizes([3], 3, nodes.device))
    (gradient,) = torch.autograd.grad(layer(nodes, hidden)[0].sum(), nodes)
    reached = gradient.abs().sum(dim=1) > 0
    assert reached.tolist() == [True, True, False]


def test_ragged_and_padded_are_inverse():
    sizes = GraphSizes([2, 4, 1, 4], 4, torch.device("cpu"))
    padded = torch.arange(32.0).view(4, 4, 2)
    kept = padded * sizes.mask()[..., None]
    assert torch.equal(sizes.padded(sizes.ragged(padded)), kept)
    assert sizes.mask().sum(dim=1).tolist() == [2, 4, 1, 4]
    assert [n for n, _ in sizes.groups] == [1, 2, 4]  # graphs of one size are computed together


@pytest.mark.parametrize("sizes", [[2, 0], [2, 5], [2]])
def test_wrong_sizes_are_refused(sizes):
    examples = batch([2, 4])
    with pytest.raises(ValueError, match="num_nodes: "):
        model()(examples["nodes"], examples["edges"], examples["edge_mask"], sizes)


def test_losses_are_those_of_the_problem_and_missing_labels_count_for_nothing():
    examples = batch()
    examples["labels"][1:, 3] = torch.nan
    output = model()(**examples)
    losses, counts = masked_mse(output.logits, examples["labels"])
    assert torch.equal(output.losses, losses)
    assert output.num_items.tolist() == counts.tolist() == [6, 6, 6, 1, *[6] * 7]
    binary = model(problem="binary_classification")
    examples["labels"] = (examples["labels"] > 0).double()
    output = binary(**examples)
    assert torch.equal(output.losses, masked_bce_with_logits(output.logits, examples["labels"])[0])
    assert output.router_features.shape == (6, 64) == (6, binary.config.num_router_features)


def test_saved_and_loaded_it_predicts_in_units(tmp_path):
    ours = model(torch.float32, label_means=[2.0] * 11, label_stds=[3.0] * 11)
    ours.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    examples = batch(dtype=torch.float32)
    assert torch.equal(again.predict(*inputs(examples)), ours(*inputs(examples)).logits * 3 + 2)
    assert AutoConfig.from_pretrained(tmp_path).task_names == TASKS
    with pytest.raises(ValueError, match="label scales"):
        model(torch.float32).predict(*inputs(examples))


def test_probabilities_of_a_classification():
    ours, examples = model(problem="binary_classification"), batch()
    assert torch.equal(ours.predict(*inputs(examples)), ours(*inputs(examples)).logits.sigmoid())


@pytest.mark.parametrize(
    ("option", "value"), [("hidden_size", 0), ("num_messages", 0), ("dropout", 1.0), ("problem", "regresion")]
)
def test_options_out_of_range_are_named(option, value):
    with pytest.raises(OptionError, match=rf"^{option}: "):
        MpnnConfig(**{option: value})
