"""The gradients of the K tasks: of which parameters, how they are found, and how they are added up.

    U_k = sum over this rank's micro-batches of N_k * grad l_k,   J_k = sum over ranks of U_k / N_k of the global batch

so that J is the Jacobian of the global losses, whatever rows and labels a rank has. It is reduced before anything that
is not linear is done to it. With respect to features, every example has entries of its own: there J is never put
together, and its Gramian is a sum over micro-batches and ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
        self._names: list[str] = []
        self._owners: list[Tensor] = []
        self.known = torch.zeros(num_tasks, dtype=torch.bool)
        self.bound = self._said = False
        #: Whether a further look may find that more is shared.
        self.undecided = False
        self._looked_at: list[int] = []
        self._of_several: list[int] = []

    def bind(self, model: nn.Module) -> bool:
        """Take the trainable parameters of `model`; the same ones keep what is known of them. Whether they are others.

        Raises:
            OptionError: a pattern that fits no parameter, or no trainable one.
        """
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        if self.bound and [id(p) for p in named.values()] == [id(p) for p in self.parameters]:
            return False
        check_patterns(self._patterns or (), list(named), self._key)
        self._take(list(named.values()), list(named))
        self.bound = True
        return True

    def is_of(self, model: nn.Module) -> bool:
        """Whether `model` trains the parameters that are known, and no others."""
        return [id(p) for p in model.parameters() if p.requires_grad] == [id(p) for p in self.parameters]

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
        new = [k for k, there in enumerate(present) if there and (again or not self.known[k])]
        if not new:
            return
        self._check()
        for k in new:
            if here[k] and not self._mark(losses[k], k) and not alone and not self.known[k]:
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
        self._of_several = [i for i, owner in enumerate(self._owners) if len(owner) and bool(owner[0] == SHARED)]
        self.undecided = any(bool((owner == NOBODY).any()) for owner in self._owners)
        if self._patterns is None or not self._names:
            self._looked_at = self._of_several
            return
        chosen = [any(matches(name, pattern) for pattern in self._patterns) for name in self._names]
        self._looked_at = [i for i, here in enumerate(chosen) if here]
        self._of_several = [i for i in range(len(chosen)) if chosen[i] or i in self._of_several]

    @property
    def looked_at(self) -> list[nn.Parameter]:
        """Those whose gradients the method is given; all that are reached as long as none is known to be shared."""
        return [self.parameters[i] for i in self._looked_at] or self._reached()

    @property
    def of_several(self) -> list[nn.Parameter]:
        """Those that the weighted gradients are for."""
        return [self.parameters[i] for i in self._of_several] or self._reached()

    @property
    def of_one(self) -> list[nn.Parameter]:
        """The rest: parameters of one task alone, and such that nobody has reached."""
        several = {id(parameter) for parameter in self.of_several}
        return [parameter for parameter in self.parameters if id(parameter) not in several]

    def _reached(self) -> list[nn.Parameter]:
        return [p for p, o in zip(self.parameters, self._owners, strict=True) if bool((o != NOBODY).any())]

    def knowledge(self) -> dict[str, Any]:
        """What is known now, for `restore`."""
        names = ("parameters", "_names", "_looked_at", "_of_several", "_said", "undecided", "bound")
        return {
            "known": self.known.clone(),
            "_owners": list(self._owners),
            **{name: vars(self)[name] for name in names},
        }

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
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.append(variable)
        stack.extend(following for following, _ in reversed(node.next_functions))
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

    def add(self, batch: TaskLosses, inputs: Inputs, of_features: bool, tasks_per_pass: int | None) -> None:
        """Take in a micro-batch."""
        rows = gradient_rows(batch, inputs, tasks_per_pass)
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


class Rows(list[Tensor]):
    """The gradients of K tasks by parameter, `[K, n]` each.

    Attributes:
        whole: where they lie side by side, the matrix `[K, d]` of which they are parts, and which is nobody else's.
    """

    def __init__(self, rows: Iterable[Tensor], whole: Tensor | None = None) -> None:
        super().__init__(rows)
        self.whole = whole

    @staticmethod
    def of(whole: Tensor, sizes: Sequence[int]) -> Rows:
        """The parts of `whole [K, d]`."""
        return Rows(whole.split(list(sizes), dim=1), whole)

    def times(self, factors: Tensor) -> Rows:
        """Each task's row times its factor."""
        if self.whole is not None:
            return Rows.of(self.whole * factors.to(self.whole)[:, None], [row.shape[1] for row in self])
        return Rows(row * factors.to(row)[:, None] for row in self)

    def plus(self, other: Rows) -> Rows:
        """The sum of both."""
        if self.whole is not None and other.whole is not None:
            return Rows.of(self.whole + other.whole, [row.shape[1] for row in self])
        # Not in place: a gradient may be a view of something smaller.
        return Rows(torch._foreach_add(self, other))

    def weighted(self, weights: Tensor) -> list[Tensor]:
        """sum_k w_k g_k, by parameter `[n]`."""
        if self.whole is not None:
            return list((weights.to(self.whole) @ self.whole).split([row.shape[1] for row in self]))
        return [weights.to(row) @ row for row in self]


def gradient_rows(batch: TaskLosses, inputs: Inputs, tasks_per_pass: int | None) -> Rows:
    """grad l_k for every task, for each input `[K, n]`, in float32 at least; zero for tasks without items here.

    Args:
        batch: losses, attached to the graph, and counts.
        inputs: the parameters or features.
        tasks_per_pass: so many tasks go through the graph at once; 1: one after the other; None: as `at_once` says.

    Cost: K backward passes through the graph from the losses to the inputs, which is kept.
    """
    if not inputs:  # no task has had a loss so far
        return Rows([])
    if not batch.losses.requires_grad:  # no task has a label here
        nothing = [_rows(None, x, len(batch.losses)) for x in inputs]
        return Rows(row for row in nothing if row is not None)
    size = at_once(inputs, len(batch.losses)) if tasks_per_pass is None else tasks_per_pass
    found = _batched(batch, inputs, size) if size > 1 else None
    return _one_by_one(batch, inputs) if found is None else found


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


def _one_by_one(batch: TaskLosses, inputs: Inputs) -> Rows:
    """A pass for each task, its gradients written where they stay."""
    tensors = [x for x in inputs if not isinstance(x, GradientEdge) and x.grad_fn is None]
    kinds = {(torch.promote_types(x.dtype, torch.float32), x.device) for x in tensors}
    if len(tensors) < len(inputs) or len(kinds) > 1:
        passes = [_pass(loss, inputs) for loss in connected_losses(batch).unbind()]
        parts = [[_rows(gradient, x, 1) for gradient, x in zip(found, inputs, strict=True)] for found in passes]
        return Rows(_joined(rows) for rows in zip(*parts, strict=True) if any(row is not None for row in rows))
    sizes = [x.numel() for x in inputs]
    ((dtype, device),) = kinds
    whole = torch.empty(len(batch.losses), sum(sizes), dtype=dtype, device=device)
    here = (batch.num_items > 0).tolist()
    for row, loss, there in zip(whole, _each_loss(batch.losses), here, strict=True):
        found = _pass(loss, inputs) if there and loss is not None else [None] * len(inputs)
        places = [place.view(x.shape) for place, x in zip(row.split(sizes), inputs, strict=True)]
        for place, gradient in zip(places, found, strict=True):
            if gradient is None:
                place.zero_()
            else:
                place.copy_(gradient.to_dense() if gradient.is_sparse else gradient)
    return Rows.of(whole, sizes)


def _each_loss(losses: Tensor) -> Sequence[Tensor | GradientEdge | None]:
    """Each task's loss, or its place in the graph; None for a constant.

    Behind scalars that were stacked: a pass from the vector would go through the heads of all tasks, with zeros.
    """
    node = losses.grad_fn
    if node is None or type(node).__name__ != "StackBackward0":
        return losses.unbind()
    return [None if before is None else GradientEdge(before, number) for before, number in node.next_functions]


def _pass(loss: Tensor | GradientEdge, inputs: Inputs) -> Sequence[Tensor | None]:
    one = torch.ones((), device=inputs[0].device) if isinstance(loss, GradientEdge) else None
    found: tuple[Tensor | None, ...] = torch.autograd.grad(loss, inputs, one, retain_graph=True, allow_unused=True)
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


# --- how the result reaches the parameters -------------------------------------------------------------------------


class _Given(torch.autograd.Function):
    """A value whose backward pass gives each parameter the gradient that was found for it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.gradients
        if any(gradient.is_sparse for gradient in gradients):
            return (None, None, *(gradient * incoming[0].to(gradient.dtype) for gradient in gradients))
        return (None, None, *torch._foreach_mul(gradients, incoming[0])) if gradients else (None, None)


def given_gradients(value: Tensor, found: Iterable[tuple[nn.Parameter, Tensor | None]]) -> Tensor:
    """The scalar `value` whose backward pass adds to each parameter's `.grad` what was `found`, times what comes in.

    So accelerate's scaling, the hooks of DistributedDataParallel and accumulation see an ordinary backward pass.
    """
    pairs = [(parameter, gradient) for parameter, gradient in found if gradient is not None]
    parameters = [parameter for parameter, _ in pairs]
    gradients = [gradient if gradient.is_sparse else gradient.reshape(p.shape).to(p.dtype) for p, gradient in pairs]
    return _Given.apply(value, gradients, *parameters)
