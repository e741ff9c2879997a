"""Any aggregator or weighting of the package torchjd (https://torchjd.org) by the name of its class.

    {name: torchjd, aggregator: ConFIG}       {name: torchjd, aggregator: Krum, options: {n_byzantine: 1}}

`options` are the arguments of the class; lists of numbers become tensors, and the name of a weighting stands for one
(`CRMOGMWeighting`). `n_tasks` is filled in. UPGrad and DualProj find their weights with our solver in place of
quadprog, which gives the same to rounding error and needs no package; it does not take a trace below 1e-4 for zero. A
class that needs more packages says which (CAGrad, NashMTL: cvxpy; `cagrad`, `nash_mtl` here do not).

Scales are torchjd's. A class that works on the Gramian is given it in float64 on the CPU; `MoDoWeighting` and
`SDMGradWeighting` get that of one sample (`modo`, `sdmgrad` have three). Random classes (PCGrad, GradVac, GradDrop,
Random) draw from torch's global generator, which is the same on all ranks only where they seed it alike.

What stateful classes remember (GradVac, PCD, ExcessMTL, NashMTL, CRMOGM, MoDo, SDMGrad) is not a part of the
balancer's state: it starts anew when a training is resumed, stays when an update is dropped, and starts anew when
other tasks are absent than before. Options with one number per task follow the tasks that are present.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_bilb.balancers.gradient.solvers import array, normalised, smallest_above
from hf_bilb.balancers.registry import Cost, register_balancer
from hf_bilb.config.options import nearest, shown, unknown_name
from hf_bilb.engine.gradient_method import Direction, GradientOptions, HeadWeights, JacobianMethod
from hf_bilb.errors import OptionError

_BASES = ("Aggregator", "WeightedAggregator", "GramianWeightedAggregator", "Weighting")
#: Weightings without an aggregator of their name whose argument is a matrix [K, K].
_OF_SAMPLES = ("MoDoWeighting", "SDMGradWeighting")
#: Filled in, where a class takes it.
_FILLED_IN = ("n_tasks",)
_REGULARIZATION = 1e-4
_BLOCK = 2**16


@dataclass(frozen=True, kw_only=True)
class TorchjdOptions(GradientOptions):
    """Options of `torchjd`.

    Attributes:
        aggregator: the name of a class of `torchjd.aggregation`, an aggregator or a weighting.
        options: the arguments of that class.
    """

    aggregator: str = "UPGrad"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    heads: HeadWeights = "sum"

    @classmethod
    def prepared(cls, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """The keys that are none of ours become arguments of the class."""
        return split_torchjd_options(options)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_arguments(self.aggregator, self.options)
        if kind_of(self.aggregator, self.options) == "vector":
            for name, value, only in (
                ("heads", self.heads, "sum"),
                ("every_n_steps", self.every_n_steps, 1),
                ("gradients", self.gradients, "parameters"),
            ):
                if value != only:
                    raise OptionError(
                        f"{name}: {value!r} is not valid, expected {only!r}: {self.aggregator} has no weights"
                    )


def split_torchjd_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's options of `torchjd`, with the keys that are none of ours moved into `options`.

    Raises:
        OptionError: a key is there and in `options`, too.
    """
    ours = {field.name for field in dataclasses.fields(TorchjdOptions)}
    moved = {key: value for key, value in given.items() if key not in ours}
    inner = given.get("options", {})
    if not moved or not isinstance(inner, Mapping):
        return dict(given)
    for key in moved:
        if key in inner:
            raise OptionError(f"options.{key}: is given twice, {shown(moved[key])} and {shown(inner[key])}")
    return {**{key: value for key, value in given.items() if key in ours}, "options": {**inner, **moved}}


def _torchjd() -> Any:
    try:
        return import_module("torchjd.aggregation")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "torchjd":
            raise
        raise OptionError(
            "name: 'torchjd' needs the package torchjd, which is not installed: pip install hf-bilb[gradient]"
        ) from None


def find_class(name: str) -> Any:
    """The class of `torchjd.aggregation`; raises `OptionError` with the nearest name where there is none."""
    module = _torchjd()
    known = [one for one in module.__all__ if one not in _BASES]
    if name not in known:
        raise OptionError(f"aggregator: {shown(name)} is not known{nearest(name, known)}; known: {', '.join(known)}")
    return getattr(module, name)


def check_arguments(name: str, arguments: Mapping[str, Any]) -> None:
    """Raise `OptionError` for an argument that the class does not take, or one that it needs and does not get."""
    parameters = dict(inspect.signature(find_class(name)).parameters)
    taken = [one for one in parameters if one not in _FILLED_IN]
    for key in arguments:
        if key not in taken:
            ours = [field.name for field in dataclasses.fields(GradientOptions)]
            hint = nearest(str(key), [*taken, *ours]) or f" (known: {', '.join(taken) or 'none'})"
            raise OptionError(f"options.{key}: {name} has no such argument, value {shown(arguments[key])}{hint}")
    for key in taken:
        if parameters[key].default is inspect.Parameter.empty and key not in arguments:
            raise OptionError(f"options.{key}: is required by {name}")
    if "weighting" in taken and isinstance(arguments["weighting"], str):
        weightings = [one for one in _torchjd().__all__ if one.endswith("Weighting") and one not in _BASES]
        if arguments["weighting"] not in weightings:
            raise unknown_name("options.weighting", arguments["weighting"], weightings)
        check_arguments(arguments["weighting"], {})


def kind_of(name: str, arguments: Mapping[str, Any]) -> str:
    """What the class works on: `gramian` or `jacobian`, of which it makes weights, or `vector`, without weights."""
    module, found = _torchjd(), find_class(name)
    inner = arguments.get("weighting")
    if inner is not None:
        return kind_of(inner if isinstance(inner, str) else type(inner).__name__, {})
    if name in _OF_SAMPLES or issubclass(found, module.GramianWeightedAggregator):
        return "gramian"
    # The weighting of an aggregator works on what that one does.
    of = getattr(module, name.removesuffix("Weighting"), None) if issubclass(found, module.Weighting) else found
    if of is not None and issubclass(of, module.GramianWeightedAggregator):
        return "gramian"
    return "jacobian" if of is None or issubclass(of, module.WeightedAggregator) else "vector"


@register_balancer(
    "torchjd",
    options=TorchjdOptions,
    paper="Quinton and Rey 2024 (arXiv 2406.16232), and that of each class",
    costs=(Cost(1, "K", memory="K d"),),
)
class Torchjd(JacobianMethod):
    """A class of torchjd. No state of ours."""

    def __init__(self, num_tasks: int, options: TorchjdOptions) -> None:
        super().__init__()
        self._options = options
        self._num_tasks = num_tasks
        self._kind = kind_of(options.aggregator, options.options)
        self.weighted = self._kind != "vector"
        # In a tuple: no submodule, whose buffers would appear in the state and vanish from it.
        self._built: tuple[Any, Any] = (None, None)
        self._try_out()

    @torch.no_grad()
    def direction(self, jacobian: Tensor, losses: Tensor, tasks: Tensor) -> Direction:
        """What the class makes of `jacobian`."""
        statistic = _gramian(jacobian) if self._kind == "gramian" else jacobian
        present = tasks.tolist()
        built_for = (present, statistic.dtype, statistic.device)
        if self._built[0] != built_for:
            self._built = (built_for, self._build(present, statistic))
        aggregator = self._built[1] if self.training else copy.deepcopy(self._built[1])
        if self._kind == "vector":
            return Direction(aggregator(statistic))
        weighting = getattr(aggregator, "gramian_weighting", None)
        if weighting is None:
            weighting = aggregator if not isinstance(aggregator, _torchjd().Aggregator) else aggregator.weighting
        weights = weighting(statistic)
        return Direction(weights.to(jacobian) @ jacobian, weights.to("cpu", torch.float64))

    def _build(self, present: list[int], like: Tensor) -> Any:
        """The object, its vectors where `like` is, those of one number per task restricted to the ones `present`."""
        name = self._options.aggregator
        arguments = {key: self._argument(value, present, like) for key, value in self._options.options.items()}
        if isinstance(arguments.get("weighting"), str):
            arguments["weighting"] = _construct(arguments["weighting"], {}, len(present))
        return _construct(name, arguments, len(present))

    def _argument(self, value: Any, present: list[int], like: Tensor) -> Any:
        if not isinstance(value, (list, tuple, Tensor)):
            return value
        vector = torch.as_tensor(value).to(like)
        return vector[present] if vector.shape == (self._num_tasks,) else vector

    def _try_out(self) -> None:
        """Raise `OptionError` now for what the class would refuse in the first step."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            try:
                self.direction(torch.eye(self._num_tasks), torch.ones(self._num_tasks), torch.arange(self._num_tasks))
            except (ValueError, TypeError, ImportError) as error:
                raise OptionError(f"options: {self._options.aggregator} refuses them: {error}") from None
        self._built = (None, None)


def _construct(name: str, arguments: dict[str, Any], num_tasks: int) -> Any:
    found = find_class(name)
    taken = inspect.signature(found).parameters
    if "n_tasks" in taken:
        arguments["n_tasks"] = num_tasks
    if "projector" in taken and arguments.get("projector") is None:
        arguments["projector"] = _project
    return found(**arguments)


def _project(bounds: Tensor, gramian: Tensor) -> Tensor:
    """torchjd's `DualConeProjector`: argmin of v^T G v over v >= u for each row u of `bounds`, or for it itself."""
    scaled, scale = normalised(array(gramian.double()))
    matrix = scaled / scaled.trace() if scale > 0 else scaled
    rows = array(bounds.double().reshape(-1, len(gramian)))
    found = smallest_above(matrix + _REGULARIZATION * np.eye(len(gramian)), rows)
    return torch.from_numpy(found).reshape(bounds.shape).to(bounds)


def _gramian(jacobian: Tensor) -> Tensor:
    """J J^T, float64 on the CPU, without a copy of J in double precision."""
    gramian = torch.zeros(len(jacobian), len(jacobian), dtype=torch.float64, device=jacobian.device)
    for block in jacobian.split(_BLOCK, dim=1):
        gramian += block.double() @ block.double().T
    return gramian.cpu()
