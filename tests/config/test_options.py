"""Options: every kind of mistake is one line that names the key path, the value and what was expected."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from hf_bilb import OptionError, build_balancer
from hf_bilb.balancers import resolve_options
from hf_bilb.balancers.bilb import EdgeFraction
from hf_bilb.balancers.router import UniformLogits
from hf_bilb.config.options import bounded, check_bounds, check_value, nearest, parse_options, unknown_name
from hf_bilb.engine.records import MeanOf


@dataclass(frozen=True)
class Inner:
    low: float
    high: float = 1.0


@dataclass(frozen=True)
class Outer:
    rate: float = 1e-3
    count: int = 1
    flag: bool = False
    kind: Literal["adam", "sgd"] = "adam"
    limits: tuple[float, float] | None = None
    names: list[str] = field(default_factory=list)
    table: dict[str, int] = field(default_factory=dict)
    either: float | Literal["auto"] = "auto"
    inner: Inner | None = None
    weight: float | Inner = 0.0


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (1, float, 1.0),
        ("1e-3", float, 1e-3),
        ("-2.5", float, -2.5),
        ("7", int, 7),
        (3.0, int, 3),
        ("1e3", int, 1000),
        (2**60 + 1, int, 2**60 + 1),
        (True, bool, True),
        (None, float | None, None),
        ("1e-3", float | None, 1e-3),
        ("1e-3", float | str, "1e-3"),
        (1, str | float, 1.0),
        ("auto", float | Literal["auto"], "auto"),
        ("0.5", float | Literal["auto"], 0.5),
        ([1, "2"], list[float], [1.0, 2.0]),
        ([0.2, 1], tuple[float, float], (0.2, 1.0)),
        ([1, 2, 3], tuple[int, ...], (1, 2, 3)),
        ({"a": "1"}, dict[str, int], {"a": 1}),
        ({"low": 1}, Inner, Inner(1.0)),
        (Inner(1.0), Inner, Inner(1.0)),
        ({"low": "1e-1"}, float | Inner, Inner(0.1)),
        (1, Literal[1, 2], 1),
        (float("inf"), float, float("inf")),
    ],
)
def test_accepted(value: Any, annotation: Any, expected: Any) -> None:
    result = check_value(value, annotation, "x")
    assert result == expected and type(result) is type(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"raet": 1}, 'path.raet: unknown option, value 1 (did you mean "rate"?)'),
        ({"qqq": 1}, "path.qqq: unknown option, value 1 (known: rate, count, flag, kind, limits, names, table, either"),
        ({"rate": "fast"}, "path.rate: 'fast' is not valid, expected a number"),
        ({"rate": True}, "path.rate: True is not valid, expected a number"),
        ({"rate": None}, "path.rate: None is not valid, expected a number"),
        ({"rate": "nan"}, "path.rate: 'nan' is not valid, expected a number"),
        ({"rate": [1]}, "path.rate: [1] is not valid, expected a number"),
        ({"count": 1.5}, "path.count: 1.5 is not valid, expected an integer"),
        ({"count": "inf"}, "path.count: 'inf' is not valid, expected an integer"),
        ({"count": False}, "path.count: False is not valid, expected an integer"),
        ({"flag": 1}, "path.flag: 1 is not valid, expected true or false"),
        ({"flag": "true"}, "path.flag: 'true' is not valid, expected true or false"),
        ({"kind": "adm"}, 'path.kind: \'adm\' is not valid, expected one of "adam", "sgd" (did you mean "adam"?)'),
        ({"kind": 3}, 'path.kind: 3 is not valid, expected one of "adam", "sgd"'),
        ({"limits": [1]}, "path.limits: [1] is not valid, expected a list of 2 values (a number, a number) or null"),
        ({"limits": 1}, "path.limits: 1 is not valid, expected a list of 2 values (a number, a number) or null"),
        ({"names": ["a", 2]}, "path.names[1]: 2 is not valid, expected a string"),
        ({"names": "a"}, "path.names: 'a' is not valid, expected a list (a string each)"),
        ({"table": {"a": "x"}}, "path.table.a: 'x' is not valid, expected an integer"),
        ({"table": [1]}, "path.table: [1] is not valid, expected a mapping"),
        (
            {"either": "atuo"},
            'path.either: \'atuo\' is not valid, expected a number or one of "auto" (did you mean "auto"?)',
        ),
        ({"inner": {"hihg": 1, "low": 0}}, 'path.inner.hihg: unknown option, value 1 (did you mean "high"?)'),
        ({"inner": {"high": 1}}, "path.inner.low: is required, expected a number"),
        ({"weight": {"low": "x"}}, "path.weight.low: 'x' is not valid, expected a number"),
        ({"weight": "x"}, "path.weight: 'x' is not valid, expected a number or a mapping with low, high"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_options(Outer, options, "path")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_values_are_no_mapping() -> None:
    with pytest.raises(OptionError, match=r"^path: \[1\] is not a mapping of options$"):
        parse_options(Outer, [1], "path")  # type: ignore[arg-type]


def test_nearest_ignores_case_and_is_silent_when_nothing_is_near() -> None:
    assert nearest("BILB", ["bilb", "ls"]) == ' (did you mean "bilb"?)'
    assert nearest("xyz", ["bilb", "ls"]) == ""
    assert "known: a, b" in str(unknown_name("thing", "q", ["b", "a"]))
    assert "; known:" not in str(unknown_name("thing", "q", [f"n{i}" for i in range(31)]))


# --- the balancers' options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("blib", {}, "balancer: 'blib' is not known (did you mean \"bilb\"?); known: "),
        (3, {}, "balancer: 3 is not known"),
        ("bilb", {"presett": "celeba"}, "balancer.presett: unknown option, value 'celeba' (did you mean \"preset\"?)"),
        ("bilb", {"preset": "celebA"}, "balancer.preset: 'celebA' is not valid, expected one of "),
        ("ls", {"preset": "celeba"}, "balancer.preset: unknown option"),
        (
            "bilb",
            {"learning_rate": "follow"},
            "balancer.learning_rate: 'follow' is not valid, expected a number or one of",
        ),
        ("bilb", {"learning_rate": -1}, "balancer.learning_rate: -1.0 is not valid, expected a number >= 0"),
        ("bilb", {"normalization": "logg"}, "balancer.normalization: 'logg' is not valid, expected one of"),
        ("bilb", {"power": 0}, "balancer.power: 0.0 is not valid, expected a number > 0"),
        ("bilb", {"reference": "first_stpe"}, "balancer.reference: 'first_stpe' is not valid"),
        ("bilb", {"reference": {"mean_of": 0}}, "balancer.reference.mean_of: 0 is not valid, expected an integer >= 1"),
        (
            "bilb",
            {"coefficient_floor": 1.5},
            "balancer.coefficient_floor: 1.5 is not valid, expected a share in [0, 1]",
        ),
        ("bilb", {"coefficient_scale": "sum"}, "balancer.coefficient_scale: 'sum' is not valid, expected one of"),
        ("bilb", {"smoothing": -1}, "balancer.smoothing: -1.0 is not valid, expected a number >= 0"),
        ("bilb", {"clamp": [0.8, 0.2]}, "balancer.clamp: [0.8, 0.2] is not valid, expected [low, high]"),
        (
            "bilb",
            {"discrepancy_weight": -0.1},
            "balancer.discrepancy_weight: -0.1 is not valid, expected a number >= 0",
        ),
        (
            "bilb",
            {"discrepancy_weight": {"edge_fracton": 0.4}},
            'balancer.discrepancy_weight.edge_fracton: unknown option, value 0.4 (did you mean "edge_fraction"?)',
        ),
        (
            "bilb",
            {"discrepancy_weight": {"edge_fraction": -0.4}},
            "balancer.discrepancy_weight.edge_fraction: -0.4 is not valid, expected a number >= 0",
        ),
        ("bilb", {"initial_logits": {"uniform": [1, 0]}}, "balancer.initial_logits.uniform: [1.0, 0.0] is not valid"),
        ("si", {"normalization": "log"}, "balancer.normalization: 'log' is not valid, expected another one: si takes"),
        ("uw", {"initial_log_variance": "x"}, "balancer.initial_log_variance: 'x' is not valid, expected a number or"),
    ],
)
def test_balancer_option_errors(name: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        resolve_options(name, options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    with pytest.raises(OptionError) as again:
        build_balancer(name, 3, **options)
    assert str(again.value) == str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"balancer": {"preset": "celeba"}}, "balancer.name: is required, expected one of "),
        ({"balancer": "ls", "num_tasks": 0}, "num_tasks: 0 is not valid, expected an integer >= 1"),
        ({"balancer": "ls"}, "num_tasks: None is not valid"),
        ({"balancer": "ls", "num_tasks": True}, "num_tasks: True is not valid"),
        (
            {"balancer": "ls", "num_tasks": 3, "task_names": ["a", "b"]},
            "task_names: got 2 names, expected 3 (num_tasks)",
        ),
        ({"balancer": "ls", "task_names": ["a", "a"]}, "task_names: 'a' stands twice, expected K different names"),
        ({"balancer": "ls", "task_names": ["a", ""]}, "task_names: '' is not valid, expected a non-empty string"),
        ({"balancer": "ls", "task_names": []}, "task_names: is empty"),
        ({"balancer": "bilb", "num_tasks": 3, "initial_logits": [1.0, 2.0]}, "balancer.initial_logits: got 2 values"),
        (
            {"balancer": "uw", "num_tasks": 3, "initial_log_variance": [1.0]},
            "balancer.initial_log_variance: got 1 values",
        ),
        ({"balancer": "ls", "num_tasks": 3, "task_priors": [1.0]}, "task_priors: got 1 values, expected one for"),
        ({"balancer": "ls", "num_tasks": 2, "task_priors": [1.0, -1]}, "task_priors: [1.0, -1.0] is not valid"),
        ({"balancer": "ls", "num_tasks": 2, "absent_tasks": "drop"}, "absent_tasks: 'drop' is not valid"),
    ],
)
def test_build_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        build_balancer(**arguments)
    assert str(caught.value).startswith(message)


def test_resolved_options_have_types_presets_and_overrides() -> None:
    options: Any = resolve_options("bilb", {"preset": "qm9", "discrepancy_weight": "5e-2", "pairs": "all"})
    assert options.initial_logits == UniformLogits((0.2, 1.0)) and options.normalization == "log"
    assert options.discrepancy_weight == 0.05 and isinstance(options.discrepancy_weight, float)
    assert options.pairs == "all"
    default: Any = resolve_options("bilb", {})
    # ALGORITHMS, end of section 7.
    assert (default.normalization, default.power, default.reference) == ("power", 0.5, "first_step")
    assert (default.router, default.activation, default.initial_logits) == ("parameter", "sigmoid", 1.0)
    assert (default.learning_rate, default.tau, default.weight_denominator) == (1e-3, "weights", "detached_sum")
    assert (default.pairs, default.discrepancy_weight) == ("all", EdgeFraction(0.4))
    assert resolve_options("ls", {"reference": {"mean_of": 3}}).reference == MeanOf(3)


def test_a_mapping_as_in_a_recipe_is_the_same_as_keywords() -> None:
    mapping = {"name": "bilb", "preset": "celeba", "discrepancy_weight": 0.02}
    one, other = build_balancer(mapping, 4), build_balancer("bilb", 4, preset="celeba", discrepancy_weight=0.02)
    assert repr(one) == repr(other) and one.options == other.options
    assert mapping["name"] == "bilb"


@dataclass(frozen=True)
class Bounded:
    steps: int = bounded(at_least=1)
    rate: float | None = bounded(None, above=0)
    share: float = bounded(0.5, at_least=0, below=1)
    factor: float = bounded(1.0, above=0, at_most=1, expected="0 < factor <= 1")


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"steps": 0}, "steps: 0 is not valid, expected an integer >= 1"),
        ({"rate": 0.0}, "rate: 0.0 is not valid, expected a number > 0"),
        ({"rate": float("nan")}, "rate: nan is not valid, expected a number > 0"),
        ({"share": 1.0}, "share: 1.0 is not valid, expected a number >= 0 and < 1"),
        ({"share": -1e-9}, "share: -1e-09 is not valid, expected a number >= 0 and < 1"),
        ({"factor": 1.5}, "factor: 1.5 is not valid, expected 0 < factor <= 1"),
    ],
)
def test_a_declared_range_is_checked(values: dict[str, Any], line: str) -> None:
    with pytest.raises(OptionError) as built:
        check_bounds(Bounded(**{"steps": 1, **values}))
    assert str(built.value) == line
    if values != {"rate": pytest.approx(float("nan"), nan_ok=True)}:  # NaN is no number to parse_options
        with pytest.raises(OptionError) as parsed:
            parse_options(Bounded, {"steps": 1, **values}, "part")
        assert str(parsed.value) == f"part.{line}"


def test_the_ends_of_a_declared_range() -> None:
    check_bounds(Bounded(1, None, 0.0, 1.0))
    assert parse_options(Bounded, {"steps": 1}, "part") == Bounded(1, None, 0.5, 1.0)
    with pytest.raises(OptionError, match=r"part\.steps: is required, expected an integer"):
        parse_options(Bounded, {}, "part")
