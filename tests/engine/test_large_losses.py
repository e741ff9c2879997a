"""One loss of 1e30 amid ordinary ones: the state stays finite, the balancer goes on learning, a guard speaks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_bilb import build_balancer
from hf_bilb.balancers import LossBalancer
from hf_bilb.errors import NonFiniteLossError
from hf_bilb.losses.contract import TaskLosses
from tests.contract.cases import CASES, Case, Tilted, advance, random_losses
from tests.products import in_turn

K = 3
AT, LATER, END = 6, 20, 30
ORDINARY = torch.tensor([1.0, 0.5, 2.0])
#: What remembers nothing of a loss, so that there is nothing to say.
FORGETFUL = {"ls", "si", "gls", "rlw"}


def run(case: Case, dtype: torch.dtype, loss: float | None) -> tuple[LossBalancer, float, bool, list[str]]:
    """The balancer, how far its parameters come from update LATER to END, whether the loss is refused, its messages."""
    model = Tilted(K, dtype)
    balancer = case.build(K, dtype).bind(model, torch.optim.SGD(model.parameters(), lr=0.0))
    balancer.on_epoch_begin(0)
    refused, at_later = False, own_parameters(balancer)
    for t, row in enumerate(random_losses(K, END, dtype=dtype)):
        if t == LATER:
            balancer.on_epoch_begin(1)
            at_later = own_parameters(balancer)
        if t == AT and loss is not None:
            row[1] = loss
        before = balancer.state_dict()
        try:
            assert advance(balancer, row).isfinite().all()
        except NonFiniteLossError:
            # F itself overflows there: an error that names the task, and no trace of it.
            assert t == AT
            refused = True
            if not case.is_double_loop:
                assert all(torch.equal(before[key], value) for key, value in balancer.state_dict().items())
    return balancer, float((own_parameters(balancer) - at_later).norm()), refused, balancer.diagnose()


def own_parameters(balancer: LossBalancer) -> Tensor:
    parameters = [parameter.detach().flatten() for parameter in balancer.objective.parameters()]
    return torch.cat([*parameters, torch.zeros(1, dtype=balancer.dtype)])


#: Every method, every kind of record and step.
LABELS = {
    "default", "next_batch", "epoch", "sgd", "schedule", "groups_3", "lloyd", "exact", "lagged", "auxiliary",
    "features", "double_loop", "mean_of", "normalization_log", "celeba",
}  # fmt: skip


#: Half of the cases meet the largest number of float32.
MEASURES = [(torch.float32, 1e30), (torch.float32, 3e38), (torch.float64, 1e30), (torch.float32, 1e30)]


@pytest.mark.parametrize(
    ("case", "measure"), in_turn([case for case in CASES if case.label in LABELS], MEASURES, each=2), ids=str
)
@pytest.mark.slow
def test_one_loss_beyond_all_measure(case: Case, measure: tuple[torch.dtype, float]) -> None:
    dtype, loss = measure
    _, usual, _, said = run(case, dtype, None)
    assert not any("learned nothing" in message for message in said)
    balancer, moved, refused, said = run(case, dtype, loss)
    state = balancer.state_dict()
    assert [key for key, value in state.items() if not value.isfinite().all()] == []
    assert usual == 0 or 0.5 < moved / usual < 2
    spoke = any(f"'task_1' had a loss of size {loss:.3g}: the balancer learned nothing in " in text for text in said)
    # Without a schedule `stch` has no record either.
    forgets = case.name in FORGETFUL or (case.name == "stch" and case.option("warmup_epochs") is None)
    assert spoke or refused or forgets


@pytest.mark.parametrize("name", ["uw", "imtl_l", "bilb", "marigold"])
def test_what_a_step_that_taught_nothing_leaves(name: str) -> None:
    # By hand: Adam with a gradient of zero. Its moments fade, nothing else comes in.
    options: dict[str, Any] = {"mode": "lagged"} if name == "marigold" else {}
    balancer = build_balancer(name, K, **options)
    for _ in range(5):
        advance(balancer, ORDINARY)
    if name == "marigold":  # what is learned in this update is of the last one
        advance(balancer, torch.tensor([1.0, 1e25, 2.0]))
    before = balancer.state_dict()
    advance(balancer, torch.tensor([1.0, 1e25, 2.0]))
    after = balancer.state_dict()
    moments = [key for key in before if key.startswith("optimizer.") and key.endswith("exp_avg_sq")]
    assert moments
    for key in moments:
        torch.testing.assert_close(after[key], 0.999 * before[key], rtol=1e-6, atol=0.0)
        first = key.removesuffix("_sq")
        torch.testing.assert_close(after[first], 0.9 * before[first], rtol=1e-6, atol=0.0)


def test_sgd_stays_where_it_is() -> None:
    balancer = build_balancer("uw", K, optimizer="sgd", learning_rate=0.1)
    advance(balancer, ORDINARY)
    before = own_parameters(balancer)
    advance(balancer, torch.tensor([1.0, 1e20, 2.0]))
    assert torch.equal(own_parameters(balancer), before)
    advance(balancer, ORDINARY)
    # s <- s - 0.1 dF/ds,   dF/ds = 0.5 (1 - exp(-s) l)
    s = before[:K]
    expected = s - 0.1 * 0.5 * (1 - torch.exp(-s) * ORDINARY)
    torch.testing.assert_close(own_parameters(balancer)[:K], expected)


@pytest.mark.parametrize("absent_tasks", ["skip", "hold", "auto"])
def test_a_record_does_not_take_it_in(absent_tasks: Any) -> None:
    balancer = build_balancer("go4align", K, absent_tasks=absent_tasks)
    for losses in (ORDINARY, torch.tensor([1.0, 1e30, 2.0]), ORDINARY):
        advance(balancer, losses)
    assert torch.equal(balancer.objective.loss_sums, 2 * ORDINARY)


def test_losses_of_1e18_are_learned_from() -> None:
    # Someone's squared error; from the first step on Adam takes steps of its learning rate.
    balancer = build_balancer("uw", K)
    for _ in range(4):
        advance(balancer, torch.tensor([1e18, 1.5, 2e18]))
    assert balancer.diagnose() == []
    torch.testing.assert_close(own_parameters(balancer)[:K], torch.full((K,), 4 * 0.025), rtol=0.1, atol=0.0)


def test_said_once_and_counted_from_the_last_look() -> None:
    balancer = build_balancer("uw", task_names=["a", "b", "c"])
    for t in range(150):
        advance(balancer, torch.tensor([-1e21, 1e20, 2.0]) if t in (3, 100, 149) else ORDINARY)
    (message,) = balancer.diagnose()
    assert message == (
        "task 'a' had a loss of size 1e+21: the balancer learned nothing in 3 of the last 150 steps, whose losses or "
        "gradients were beyond 1e+19"
    )
    advance(balancer, torch.tensor([1.0, 1e20, 2.0]))
    assert balancer.diagnose() == []


@pytest.mark.parametrize(("before", "after"), [(1e25, 0.5), (0.5, 1e25)])
def test_a_comparison_names_the_larger_of_both(before: float, after: float) -> None:
    balancer = build_balancer("famo", K)
    balancer.backward(torch.tensor([1.0, before, 2.0], requires_grad=True))
    balancer.step(reevaluate=lambda: torch.tensor([1.0, after, 2.0]))
    (message,) = balancer.diagnose()
    assert message.startswith(
        "task 'task_1' had a loss of size 1e+25: the balancer learned nothing in 1 of the last 1 "
    )


def test_a_preview_is_no_lesson() -> None:
    for name in ("uw", "go4align"):
        balancer = build_balancer(name, K)
        advance(balancer, ORDINARY)
        balancer.preview(TaskLosses(torch.tensor([1.0, 1e30, 2.0]), torch.ones(K)))
        assert balancer.diagnose() == []


def test_a_loss_that_is_not_finite_is_another_matter() -> None:
    for name in ("famo", "uw", "go4align"):
        balancer = build_balancer(name, K, **({"reevaluate": "next_batch"} if name == "famo" else {}))
        advance(balancer, ORDINARY)
        for bad in (torch.nan, torch.inf):
            with pytest.raises(NonFiniteLossError):
                advance(balancer, torch.tensor([1.0, bad, 2.0]))
        advance(balancer, ORDINARY)
        assert not any("learned nothing" in message for message in balancer.diagnose())


def test_infinite_costs_stay_within_the_groups() -> None:
    # l / l0 overflows: an error that names the task, not an index out of range (which would end a GPU's process).
    balancer = build_balancer("go4align", K, num_groups=3, normalization="initial")
    advance(balancer, torch.tensor([1.0, 0.01, 2.0]))
    with pytest.raises(NonFiniteLossError):
        advance(balancer, torch.tensor([1.0, 3e38, 2.0]))
