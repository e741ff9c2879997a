"""The gradients of the K tasks: of which parameters, how they are found, and how they are added up.

    U_k = sum over this rank's micro-batches of N_k * grad l_k,   J_k = sum over ranks of U_k / N_k of the global batch

so that J is the Jacobian of the global losses, whatever rows and labels a rank has. It is reduced before anything that
is not linear is done to it. With respect to features, every example has entries of its own: there J is never put
together, and its Gramian is a sum over micro-batches and ranks.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import compress
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from hf_bilb.config.patterns import check_patterns, matches
from hf_bilb.engine.reduction import all_reduce_sum, data_parallel_size
from hf_bilb.engine.weighting import connected_losses
from hf_bilb.errors import OptionError, TaskLossError
from hf_bilb.losses.contract import TaskLosses

logger = logging.getLogger(__name__)

#: In `owners`: an entry that no task's loss has reached so far, and one of a parameter that several reach.
NOBODY, SHARED = -1, -2

#: Tasks go through the graph at once where parameters, or features, have no more entries on average than this; on
#: other devices than a CPU, where calling an operation takes as long as more work, than so many times this.
_SMALL_PARAMETERS, _SMALL_FEATURES, _LONGER_CALLS = 2**13, 2**15, 2**5
#: Gramians add up in float64 over blocks of so many columns.
_BLOCK = 2**16

#: What gradients are taken of: tensors, or places in the graph.
Inputs = Sequence[Any]


# --- which parameters ----------------------------------------------------------------------------------------------


class SharedParameters:
    """Finds the parameters that more than one task's loss reaches.

    A parameter whose entries each belong to one task (heads that are stacked in one tensor) is not shared. What a loss
    reaches is seen by sending a NaN back through the graph: a weight that is zero, or a gradient that is, hides nothing
    then. A batch in which a task is seen for the first time is looked at, once for each such task; later ones again, at
    growing intervals, as long as entries are there that nobody has reached (rows of an embedding, experts).

    State: `owners`, one int16 for every entry of the trainable parameters, once a model is bound; `known [K]`.

    Args:
        num_tasks: K.
        patterns: of the parameters whose gradients are looked at (`hf_bilb.config.patterns`); None: all shared ones.
        key: of the patterns, in messages.
    """

    def __init__(self, num_tasks: int, patterns: Sequence[str] | None, key: str = "shared_parameters") -> None:
        self._patterns, self._key = patterns, key
        self.parameters: list[nn.Parameter] = []
        #: Those whose gradients the method is given; all that are reached as long as none is known to be shared.
        self.looked_at: list[nn.Parameter] = []
        #: Those that the weighted gradients are for.
        self.of_several: list[nn.Parameter] = []
        #: The rest: parameters of one task alone, and such that nobody has reached.
        self.of_one: list[nn.Parameter] = []
        self._names: list[str] = []
        self._ids: frozenset[int] = frozenset()
        self._walked: list[int] = []
        self._owners: list[Tensor] = []
        self.known = torch.zeros(num_tasks, dtype=torch.bool)
        self.bound = self._said = False
        #: Whether a further look may find that more is shared.
        self.undecided = False
        self._of_several: list[int] = []

    def bind(self, model: nn.Module) -> bool:
        """Take the trainable parameters of `model`; the same ones keep what is known of them. Whether they are others.

        Raises:
            OptionError: a pattern that fits no parameter, or no trainable one.
        """
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._walked = _trained(model)
        if self.bound and [id(p) for p in named.values()] == [id(p) for p in self.parameters]:
            return False
        check_patterns(self._patterns or (), list(named), self._key)
        self._take(list(named.values()), list(named))
        self.bound = True
        return True

    def is_of(self, model: nn.Module) -> bool:
        """Whether `model` trains the parameters that it trained when it was bound, and no others."""
        return _trained(model) == self._walked

    def __getstate__(self) -> dict[str, Any]:
        """A copy, and what is read from a pickle, belongs to no model yet."""
        empty = SharedParameters(len(self.known), self._patterns, self._key)
        return dict(vars(empty))

    def take(self, parameters: Sequence[nn.Parameter]) -> None:
        """Take these parameters as the shared ones, all of them; those of one task alone are then not known."""
        self._take(list(parameters), [str(i) for i in range(len(parameters))])
        self._owners = [torch.full_like(owner, SHARED) for owner in self._owners]
        self.known.fill_(True)
        self.bound = True
        self._sort()

    def _take(self, parameters: list[nn.Parameter], names: list[str]) -> None:
        former = {id(p): owner for p, owner in zip(self.parameters, self._owners, strict=True)}
        self.parameters, self._names = parameters, names
        self._owners = [
            former[id(p)] if id(p) in former else torch.full((p.numel(),), NOBODY, dtype=torch.int16, device=p.device)
            for p in parameters
        ]
        self.known.zero_()
        self._sort()

    def look(
        self,
        losses: Tensor,
        here: Sequence[bool],
        present: Sequence[bool],
        group: Any,
        alone: bool,
        again: bool = False,
        task_names: Sequence[str] | None = None,
    ) -> None:
        """Look at the tasks that are seen for the first time.

        Args:
            losses: `[K]`, attached to the graph. here: which tasks have items on this rank.
            present: which have on any rank: the same on all.
            group, alone: the ranks, as in `reduce_losses`.
            again: look at all tasks.
            task_names: for messages.

        Raises:
            OptionError: on several ranks, or with patterns, where no model is bound.
            TaskLossError: there is nothing that is trained, or complex numbers are.

        Cost: nothing where every task is known; else a backward pass for each of the new ones, and on several ranks an
        all-reduce of three numbers for every trainable parameter.
        """
        ranks = 1 if alone else data_parallel_size(group)
        if not self.bound:
            self._look_for_parameters(losses, ranks)
        known = self.known.tolist()
        new = [k for k, there in enumerate(present) if there and (again or not known[k])]
        if not new:
            return
        self._check()
        for k in new:
            if here[k] and not self._mark(losses[k], k) and not alone and not known[k]:
                name = k if task_names is None else repr(task_names[k])
                logger.warning("the loss of task %s depends on no parameter that is trained", name)
        if ranks > 1:
            self._agree(group)
        self._owners = [torch.full_like(o, SHARED) if bool((o == SHARED).any()) else o for o in self._owners]
        self.known[new] = True
        self._sort()
        if not self._of_several and int(self.known.sum()) > 1 and not self._said:
            self._said = True
            logger.warning(
                "no parameter is reached by the losses of more than one task: the gradients of all parameters are "
                "looked at, and share no direction"
            )

    def _look_for_parameters(self, losses: Tensor, ranks: int) -> None:
        """Without a model: what the graph leads to; all tasks are looked at again where something is new."""
        if ranks > 1:
            raise OptionError("gradient methods on several ranks need balancer.bind(model)")
        if self._patterns is not None:
            raise OptionError(f"{self._key}: names of parameters need balancer.bind(model)")
        known = set(map(id, self.parameters))
        new = [leaf for leaf in leaves_of(losses) if id(leaf) not in known]
        kept = [parameter for parameter in self.parameters if parameter.requires_grad]
        if new or len(kept) < len(known):
            merged = [*kept, *new]
            self._take(merged, [str(i) for i in range(len(merged))])

    def _check(self) -> None:
        if not self.parameters:
            raise TaskLossError("the model has no parameter that is trained, expected one at least")
        for name, parameter in zip(self._names, self.parameters, strict=True):
            if parameter.is_complex():
                raise TaskLossError(f"parameter {name!r} is complex: gradient methods take real numbers only")

    def _mark(self, loss: Tensor, task: int) -> bool:
        """Note what the loss reaches; whether it is anything."""
        if not loss.requires_grad:
            return False
        with torch.autograd.set_detect_anomaly(False):  # which would stop at the NaN
            probe = torch.full_like(loss, torch.nan)
            found: tuple[Tensor | None, ...] = torch.autograd.grad(
                loss, self.parameters, probe, retain_graph=True, allow_unused=True
            )
        anything = False
        for i, gradient in enumerate(found):
            if gradient is None:
                continue
            reached = (gradient.to_dense() if gradient.is_sparse else gradient).isnan().reshape(-1)
            owner = self._owners[i]
            other = (owner != NOBODY) & (owner != task)
            self._owners[i] = torch.where(reached, torch.where(other, SHARED, task), owner).to(torch.int16)
            anything = anything or bool(reached.any())
        return anything

    def _agree(self, group: dist.ProcessGroup | None) -> None:
        owners = torch.cat(self._owners).int()
        far = 2**15
        numbers = torch.stack(
            [owners, torch.where(owners >= 0, -owners, -far), torch.where(owners == SHARED, 1, 0)]
        ).contiguous()
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=group)
        highest, lowest, shared = numbers[0], -numbers[1], numbers[2] > 0
        differs = (highest >= 0) & (lowest != highest)
        agreed = torch.where(shared | differs, SHARED, highest.clamp(min=NOBODY)).to(torch.int16)
        self._owners = list(agreed.split([p.numel() for p in self.parameters]))

    def _sort(self) -> None:
        """What follows from the owners, at hand for every step."""
        owned = list(zip(self.parameters, self._owners, strict=True))
        shared = [len(owner) > 0 and bool(owner[0] == SHARED) for owner in self._owners]
        chosen = shared
        if self._patterns is not None and self._names:
            chosen = [any(matches(name, pattern) for pattern in self._patterns) for name in self._names]
        self._of_several = [i for i in range(len(owned)) if shared[i] or chosen[i]]
        self.undecided = any(bool((owner == NOBODY).any()) for owner in self._owners)
        reached = [] if any(chosen) else [p for p, owner in owned if bool((owner != NOBODY).any())]
        self.looked_at = list(compress(self.parameters, chosen)) or reached
        self.of_several = [self.parameters[i] for i in self._of_several] or reached
        others = set(map(id, self.of_several))
        self.of_one = [parameter for parameter in self.parameters if id(parameter) not in others]
        self._ids = frozenset(map(id, self.parameters))

    def others(self, losses: Tensor) -> list[nn.Parameter]:
        """The parameters that the graph of `losses` leads to and that the bound model does not have."""
        return [leaf for leaf in leaves_of(losses) if id(leaf) not in self._ids]

    def knowledge(self) -> dict[str, Any]:
        """What is known now, for `restore`."""
        return {**vars(self), "known": self.known.clone(), "_owners": list(self._owners)}

    def restore(self, knowledge: Mapping[str, Any]) -> None:
        """Forget what was found since `knowledge`."""
        vars(self).update(knowledge)
        self.known = knowledge["known"].clone()

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Whatever is looked at inside, what is known is as before afterwards."""
        before = self.knowledge()
        try:
            yield
        finally:
            self.restore(before)

    def state_dict(self) -> dict[str, Tensor]:
        """`known` and, once a model is bound, `owners`."""
        if not self.bound:
            return {}
        owners = torch.cat(self._owners) if self._owners else torch.zeros(0, dtype=torch.int16)
        return {"known": self.known.clone(), "owners": owners.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore `state_dict()`."""
        self.known.copy_(state["known"])
        parts = state["owners"].split([p.numel() for p in self.parameters])
        self._owners = [part.to(owner.device).clone() for part, owner in zip(parts, self._owners, strict=True)]
        self._sort()


def _trained(model: nn.Module) -> list[int]:
    """Which parameters `model` trains, in some order; one that several modules have is there as often.

    In every step: `model.parameters()` would take several times as long.
    """
    found: list[int] = []
    modules: list[nn.Module | None] = [model]
    seen: set[int] = set()
    while modules:
        module = modules.pop()
        if module is not None and id(module) not in seen:
            seen.add(id(module))
            found += [id(p) for p in module._parameters.values() if p is not None and p.requires_grad]
            modules += module._modules.values()
    return found


def leaves_of(losses: Tensor) -> list[nn.Parameter]:
    """The tensors that need a gradient and that the graph of `losses` leads to, each once, in a fixed order."""
    if losses.grad_fn is None:  # the losses are what is trained
        return [losses] if losses.requires_grad else []  # type: ignore[list-item]
    found: list[nn.Parameter] = []
    stack: list[Any] = [losses.grad_fn]
    seen: set[Any] = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        following = node.next_functions
        if following:
            stack += [before for before, _ in reversed(following)]
        elif (variable := getattr(node, "variable", None)) is not None:
            found.append(variable)
    return found


# --- the gradients -------------------------------------------------------------------------------------------------


class RunningGradients:
    """What the micro-batches of a step on this rank add up to; one for each independent sample of the batch.

    Attributes:
        rows: for each parameter `[K, n]`: the gradients g of the only micro-batch, or U where there are several; empty
            with respect to features.
        gramian: with respect to features, sum over micro-batches of U U^T `[K, K]`; else None.
        num_items: `[K]`.
        several: whether `rows` are weighted by the items.
    """

    def __init__(self) -> None:
        self.rows = Rows([])
        self.gramian: Tensor | None = None
        self.num_items: Tensor | None = None
        self.several = False

    def add(
        self,
        batch: TaskLosses,
        inputs: Inputs,
        of_features: bool,
        tasks_per_pass: int | None,
        here: Sequence[bool] | None = None,
    ) -> None:
        """Take in a micro-batch; arguments as in `gradient_rows`."""
        rows = gradient_rows(batch, inputs, tasks_per_pass, here)
        items = batch.num_items.detach()
        if of_features:
            if not rows:
                raise TaskLossError("shared_features: no loss leads back to them; give what the heads are given itself")
            gramian = gramian_of(rows, rows) * items.double() * items.double()[:, None]
            self.gramian = gramian if self.gramian is None else self.gramian + gramian
        elif self.num_items is None:
            self.rows = rows  # a single micro-batch keeps its gradients to the last bit
        else:
            self.weigh()
            self.rows = self.rows.plus(rows.times(items))
        self.num_items = items.clone() if self.num_items is None else self.num_items + items

    def weigh(self) -> None:
        """Make g of a single micro-batch U."""
        if not self.several and self.num_items is not None:
            self.rows, self.several = self.rows.times(self.num_items), True


class Rows(Sequence[Tensor]):
    """The gradients of K tasks by parameter, `[K, n]` each.

    Attributes:
        sizes: n of each parameter.
        whole: where they lie side by side, the matrix `[K, d]` of which they are parts, and which is nobody else's.
    """

    def __init__(self, rows: Iterable[Tensor]) -> None:
        self.whole: Tensor | None = None
        self._rows = list(rows)
        self.sizes = [row.shape[1] for row in self._rows]

    @staticmethod
    def of(whole: Tensor, sizes: list[int]) -> Rows:
        """The parts of `whole [K, d]`."""
        rows = Rows([])
        rows.whole, rows.sizes = whole, sizes
        return rows

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: Any) -> Any:
        if self.whole is not None and not self._rows:
            self._rows = list(self.whole.split(self.sizes, dim=1))
        return self._rows[index]

    def times(self, factors: Tensor) -> Rows:
        """Each task's row times its factor."""
        if self.whole is not None:
            return Rows.of(self.whole * factors.to(self.whole)[:, None], self.sizes)
        return Rows(row * factors.to(row)[:, None] for row in self)

    def plus(self, other: Rows) -> Rows:
        """The sum of both."""
        if self.whole is not None and other.whole is not None:
            return Rows.of(self.whole + other.whole, self.sizes)
        # Not in place: a gradient may be a view of something smaller.
        return Rows(torch._foreach_add(list(self), list(other)))

    def weighted(self, weights: Tensor) -> list[Tensor]:
        """sum_k w_k g_k, by parameter `[n]`."""
        if self.whole is not None:
            return list((weights.to(self.whole) @ self.whole).split(self.sizes))
        return [weights.to(row) @ row for row in self]


def gradient_rows(
    batch: TaskLosses, inputs: Inputs, tasks_per_pass: int | None, here: Sequence[bool] | None = None
) -> Rows:
    """grad l_k for every task, for each input `[K, n]`, in float32 at least; zero for tasks without items here.

    Args:
        batch: losses, attached to the graph, and counts.
        inputs: the parameters or features.
        tasks_per_pass: so many tasks go through the graph at once; 1: one after the other; None: as `at_once` says.
        here: which tasks have items here, where that is known on the host; None: it is read.

    Cost: K backward passes through the graph from the losses to the inputs, which is kept.
    """
    if not inputs:  # no task has had a loss so far
        return Rows([])
    if not batch.losses.requires_grad:  # no task has a label here
        nothing = [_rows(None, x, len(batch.losses)) for x in inputs]
        return Rows(row for row in nothing if row is not None)
    size = at_once(inputs, len(batch.losses)) if tasks_per_pass is None else tasks_per_pass
    found = _batched(batch, inputs, size) if size > 1 else None
    if found is not None:
        return found
    return _one_by_one(batch, inputs, (batch.num_items > 0).tolist() if here is None else here)


def at_once(inputs: Inputs, num_tasks: int) -> int:
    """How many tasks go through the graph at once where nobody says it: all, or one after the other.

    All at once is faster while a pass is so short that calling its operations is most of it, up to eight times with
    layers of 16 units. With larger ones it is slower (on a CPU, convolutions a quarter, a message-passing network a
    half) and takes K times the memory. What is looked at are shapes alone: a resumed run does as the first one did.
    """
    if any(isinstance(x, GradientEdge) or x.ndim > 2 for x in inputs):
        return 1
    entries = sum(x.numel() for x in inputs) / len(inputs)
    features = any(x.grad_fn is not None for x in inputs)
    limit = _SMALL_FEATURES if features else _SMALL_PARAMETERS
    if inputs[0].device.type != "cpu":
        limit *= _LONGER_CALLS
    return num_tasks if entries <= limit else 1


def _batched(batch: TaskLosses, inputs: Inputs, size: int) -> Rows | None:
    """`size` tasks at once; None where an operation of the graph cannot do that."""
    losses = connected_losses(batch)
    one_hot = torch.eye(len(losses), dtype=losses.dtype, device=losses.device)
    parts = []
    try:
        for chosen in one_hot.split(size):
            batched = len(chosen) > 1
            found: tuple[Tensor | None, ...] = torch.autograd.grad(
                losses,
                inputs,
                chosen if batched else chosen[0],
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=batched,
            )
            parts.append([_rows(gradient, x, len(chosen)) for gradient, x in zip(found, inputs, strict=True)])
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        logger.info("the tasks go through the backward pass one after the other: %s", error)
        return None
    if len(parts) == 1:
        return Rows(row for row in parts[0] if row is not None)
    return Rows(_joined(rows) for rows in zip(*parts, strict=True) if any(row is not None for row in rows))


def _one_by_one(batch: TaskLosses, inputs: Inputs, here: Sequence[bool]) -> Rows:
    """A pass for each task, its gradients written where they stay."""
    starts = _starts(batch.losses)
    tensors = [x for x in inputs if not isinstance(x, GradientEdge) and x.grad_fn is None]
    kinds = {(torch.promote_types(dtype, torch.float32), device) for dtype, device in _kinds(tensors)}
    if len(tensors) < len(inputs) or len(kinds) > 1:
        passes = [
            _pass((loss, gradient if there else torch.zeros_like(gradient)), inputs)
            for (loss, gradient), there in zip(starts, here, strict=True)
        ]
        parts = [[_rows(gradient, x, 1) for gradient, x in zip(found, inputs, strict=True)] for found in passes]
        return Rows(_joined(rows) for rows in zip(*parts, strict=True) if any(row is not None for row in rows))
    sizes = [x.numel() for x in inputs]
    ((dtype, device),) = kinds
    whole = torch.empty(len(batch.losses), sum(sizes), dtype=dtype, device=device)
    for row, start, there in zip(whole.unbind(), starts, here, strict=True):
        if not there:
            row.zero_()
            continue
        found = zip(_pass(start, inputs), inputs, sizes, strict=True)
        torch.cat([x.new_zeros(n) if gradient is None else _flat(gradient) for gradient, x, n in found], out=row)
    return Rows.of(whole, sizes)


def _kinds(tensors: Iterable[Tensor]) -> set[tuple[torch.dtype, torch.device]]:
    return {(x.dtype, x.device) for x in tensors}


def _flat(gradient: Tensor) -> Tensor:
    return (gradient.to_dense() if gradient.is_sparse else gradient).reshape(-1)


def _starts(losses: Tensor) -> list[tuple[Tensor | GradientEdge | None, Tensor]]:
    """Where each task's pass begins, None for a constant, and with which gradient.

    Behind scalars that were stacked: a pass from the vector would go through the heads of all tasks, with zeros.
    """
    node = losses.grad_fn
    if node is None or type(node).__name__ != "StackBackward0":
        return [(losses, row) for row in _one_hot(len(losses), losses.dtype, losses.device)]
    one = losses.new_ones(())
    edges = node.next_functions
    return [(None if before is None else GradientEdge(before, number), one) for before, number in edges]


@functools.lru_cache
def _one_hot(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    return torch.eye(size, dtype=dtype, device=device).unbind()


def _pass(start: tuple[Tensor | GradientEdge | None, Tensor], inputs: Inputs) -> Sequence[Tensor | None]:
    loss, gradient = start
    if loss is None:
        return (None,) * len(inputs)
    found: tuple[Tensor | None, ...] = torch.autograd.grad(loss, inputs, gradient, retain_graph=True, allow_unused=True)
    return found


def _rows(gradient: Tensor | None, x: Tensor | GradientEdge, size: int) -> Tensor | None:
    """`[size, n]`; None for features that are not reached."""
    if gradient is not None:
        whole = gradient.to_dense() if gradient.is_sparse else gradient
        return whole.reshape(size, -1).to(torch.promote_types(whole.dtype, torch.float32))
    if isinstance(x, GradientEdge) or x.grad_fn is not None:  # features, to which no loss leads back
        return None
    return torch.zeros(size, x.numel(), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)


def _joined(rows: Sequence[Tensor | None]) -> Tensor:
    known = next(row for row in rows if row is not None)
    return torch.cat([known.new_zeros(1, known.shape[1]) if row is None else row for row in rows])


def gramian_of(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """J_left J_right^T `[K, K]`, float64, of Jacobians that are given by parameter."""
    if isinstance(left, Rows) and isinstance(right, Rows) and left.whole is not None and right.whole is not None:
        left, right = left.whole.split(_BLOCK, dim=1), right.whole.split(_BLOCK, dim=1)
    products = [(a @ b.T).double() for a, b in zip(left, right, strict=True)]
    if 0 < len(products) <= 2:
        return functools.reduce(torch.add, products)
    return torch.stack(products).sum(0) if products else torch.zeros((), dtype=torch.float64)


class GlobalGradients(NamedTuple):
    """The gradients of the global batch.

    Attributes:
        samples: for each independent sample J, by parameter `[K, n]`; empty with respect to features.
        gramian: J_a J_b^T `[K, K]`, float64: of the first two samples, or of the only one.
        sample_items: `[S, K]`, the items of each sample.
    """

    samples: list[Rows]
    gramian: Tensor
    sample_items: Tensor


def reduce_gradients(running: Sequence[RunningGradients], group: Any, alone: bool) -> GlobalGradients:
    """From this rank's sums to the global batch; see the top of the file.

    Cost: one all-reduce of S K (d + 1) numbers, with respect to features of K (K + 1).
    """
    alone = alone or data_parallel_size(group) == 1
    items = torch.stack([each.num_items for each in running if each.num_items is not None])
    if running[0].gramian is not None:
        gramian = torch.stack([each.gramian for each in running if each.gramian is not None]).sum(0)
        items = items.sum(0, keepdim=True).double()
        if not alone:
            gramian, items = all_reduce_sum(torch.cat([gramian, items.to(gramian.device)]), group).split(
                [len(gramian), 1]
            )
        scale = 1 / items[0].clamp(min=1)
        return GlobalGradients([], gramian * scale * scale[:, None], items)
    if alone and not any(each.several for each in running):
        samples = [each.rows for each in running]
    else:
        for each in running:
            each.weigh()
        samples, items = _reduced([each.rows for each in running], items, group, alone)
    gramian = gramian_of(samples[0], samples[min(1, len(samples) - 1)])
    if not samples[0]:
        gramian = torch.zeros(items.shape[1], items.shape[1], dtype=torch.float64, device=items.device)
    return GlobalGradients(samples, gramian, items)


def _reduced(sums: list[Rows], items: Tensor, group: Any, alone: bool) -> tuple[list[Rows], Tensor]:
    """J of each sample, and the items `[S, K]`, from this rank's U."""
    if not alone:
        like = sums[0][0] if sums[0] else items
        flat = torch.cat([items.reshape(-1).to(like.dtype), *(u.reshape(-1) for rows in sums for u in rows)])
        sizes = [items.numel(), *(u.numel() for rows in sums for u in rows)]
        counts, *parts = all_reduce_sum(flat, group).split(sizes)
        items = counts.reshape(items.shape)
        shapes = [u.shape for rows in sums for u in rows]
        whole = iter([part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)])
        sums = [Rows(next(whole) for _ in rows) for rows in sums]
    return [rows.times(1 / count.clamp(min=1)) for rows, count in zip(sums, items, strict=True)], items
