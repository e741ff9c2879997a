"""Pixel-wise and image-level tasks with partial labels on two ranks, with accumulation, end where a plain loop does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.distributed.conftest import Runs, launch
from tests.distributed.dense_mixture import KINDS, STEPS, UPDATE, model_of, rows
from tests.synthetic import flat_parameters, relative_difference

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return launch(tmp_path_factory.mktemp("mixtures"), "tests.distributed.dense_mixture")


def losses_by_hand(predictions: tuple[Tensor, ...], labels: dict[str, Tensor]) -> list[Tensor | None]:
    """Of segmentation, depth, scene, normals; None for a task without a label among all images of an update."""
    segmentation, depth, scene, normals = predictions
    measured = labels["depth"] > 0
    known = labels["normals"].abs().sum(dim=1) > 0
    cosines = functional.cosine_similarity(normals, labels["normals"], dim=1)
    there = [labels["segmentation"] >= 0, measured, labels["image_labels"] >= 0, known]
    losses = [
        functional.cross_entropy(segmentation, labels["segmentation"], ignore_index=-1),
        (depth - labels["depth"])[measured].abs().mean(),
        functional.cross_entropy(scene, labels["image_labels"][:, 0], ignore_index=-1),
        1 - cosines[known].mean(),
    ]
    return [loss if mask.any() else None for loss, mask in zip(losses, there, strict=True)]


def by_hand() -> tuple[Tensor, list[list[float | None]]]:
    """Parameters and losses of the plain sum of the tasks that are there, update by update."""
    model, data = model_of(), rows()
    seen: list[list[float | None]] = []
    for step in range(STEPS):
        part = data[step * UPDATE : (step + 1) * UPDATE]
        batch = {name: torch.stack([row[name] for row in part]) for name in part[0]}
        losses = losses_by_hand(model(batch.pop("pixel_values")).logits, batch)
        seen.append([None if loss is None else loss.item() for loss in losses])
        gradients = torch.autograd.grad(
            sum(loss for loss in losses if loss is not None), list(model.parameters()), allow_unused=True
        )
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                if gradient is not None:
                    parameter -= 0.1 * gradient
    return flat_parameters(model), seen


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_equal_one_process(mixtures: Runs, kind: str) -> None:
    one, ranks = mixtures.one[kind], [rank[kind] for rank in mixtures.ranks]
    assert one["world_size"] == 1 and one["steps"] == STEPS
    assert relative_difference(one["parameters"], one["before"]) > 0.01
    for rank in ranks:
        assert rank["world_size"] == 2 and rank["steps"] == STEPS
        assert relative_difference(rank["parameters"], one["parameters"]) <= 1e-12
        for name, value in one["balancer"].items() if KINDS[kind][1] == "window" else ():
            torch.testing.assert_close(rank["balancer"][name], value, rtol=1e-10, atol=1e-12, msg=name)
    assert torch.equal(ranks[0]["parameters"], ranks[1]["parameters"])


def test_the_plain_sum_is_that_of_a_plain_loop(mixtures: Runs) -> None:
    parameters, losses = by_hand()
    assert [loss is None for loss in losses[2]] == [False, True, False, False]  # as the data are meant to be
    for run in (mixtures.one["ls"], mixtures.ranks[0]["ls"]):
        assert relative_difference(run["parameters"], parameters) <= 1e-12
        for found, expected in zip(run["losses"], losses, strict=True):
            assert [loss is None for loss in found] == [loss is None for loss in expected]
            assert [loss for loss in found if loss] == pytest.approx([loss for loss in expected if loss], rel=1e-9)
