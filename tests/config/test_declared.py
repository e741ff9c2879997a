"""What a recipe's options are, read from the source, is what the classes say once they are imported."""

from __future__ import annotations

import dataclasses
import re
import typing
from typing import Any, Literal

import pytest

from hf_bilb.balancers.registry import BUILT_IN, get_balancer_spec
from hf_bilb.config.declared import UNKNOWN, check_declared, declared_fields, options_of
from hf_bilb.config.options import parse_options
from hf_bilb.config.registry import DATA_SETS, MODELS, Registry
from hf_bilb.errors import OptionError
from hf_bilb.trainer.arguments import BilevelMTLTrainingArguments

ENTRIES = {
    **{f"data {name}": (DATA_SETS.modules[name], DATA_SETS[name].options) for name in DATA_SETS},
    **{f"model {name}": (MODELS.modules[name], MODELS[name].options) for name in MODELS},
    **{name: (get_balancer_spec(name).objective.__module__, get_balancer_spec(name).options) for name in BUILT_IN},
}


def same(declared: dict[str, Any], options: type[Any]) -> int:
    """Assert that fields and types agree; returns the number of types that the source tells."""
    hints = typing.get_type_hints(options)
    assert list(declared) == [field.name for field in dataclasses.fields(options) if field.init]
    told = {name: kind for name, kind in declared.items() if kind is not UNKNOWN}
    for name, kind in told.items():
        assert agree(kind, hints[name]), name
    return len(told)


def agree(declared: Any, kind: Any) -> bool:
    """Whether a type from the source is that of the class; options within options become classes of their own."""
    if dataclasses.is_dataclass(declared) and isinstance(kind, type):
        mine, theirs = typing.get_type_hints(declared), typing.get_type_hints(kind)
        required = [[f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
                    for cls in (declared, kind)]  # fmt: skip
        known = [f.name for f in dataclasses.fields(kind) if f.init]
        of_fields = all(mine[name] is Any or agree(mine[name], theirs[name]) for name in known)
        return list(mine) == known and required[0] == required[1] and of_fields
    inner, theirs_inner = typing.get_args(declared), typing.get_args(kind)
    if len(inner) != len(theirs_inner) or not inner or typing.get_origin(declared) is Literal:
        return bool(declared == kind)
    return all(map(agree, inner, theirs_inner))


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_entry_s_options_are_read_from_its_source(entry: str) -> None:
    module, options = ENTRIES[entry]
    found = options_of(module)
    assert found is not None
    told = same(declared_fields(*found), options)
    assert told >= len(dataclasses.fields(options)) / 2


def test_the_trainer_s_fields_are_read_from_the_installed_source() -> None:
    declared = declared_fields("hf_bilb.trainer.arguments", "BilevelMTLTrainingArguments")
    assert same(declared, BilevelMTLTrainingArguments) > 100


@pytest.mark.parametrize("entry", ENTRIES)
def test_errors_read_as_those_of_the_class_itself(entry: str) -> None:
    module, options = ENTRIES[entry]
    found = options_of(module)
    assert found is not None
    fields = declared_fields(*found)
    told = next(name for name, kind in fields.items() if kind is not UNKNOWN)
    for values in ({"nosuchthing": 1}, {f"{told}s": 1}, {told: object()}):
        with pytest.raises(OptionError) as by_source:
            check_declared(values, fields, "part")
        with pytest.raises(OptionError) as by_class:
            parse_options(options, values, "part")
        if "is required" not in str(by_class.value):
            assert str(by_source.value) == str(by_class.value)


def test_what_the_source_does_not_tell_is_left_to_the_class() -> None:
    assert options_of("hf_bilb.no_such_module") is None
    assert options_of("json") is None
    assert declared_fields("json", "NoSuchClass") == {}
    check_declared({"anything": 1}, {}, "part")


def test_options_within_options_are_checked_by_the_source() -> None:
    fields = declared_fields("hf_bilb.data.own.options", "OwnDataOptions")
    assert UNKNOWN not in fields.values()
    for values, line in (
        (
            {"tasks": {"a": {"type": "regression", "colum": 1}}},
            'tasks.a.colum: unknown option, value 1 (did you mean "column"?)',
        ),
        ({"tasks": {"a": {}}}, "tasks.a.type: is required, expected one of"),
        ({"split": {"seed": "x"}}, "split.seed: 'x' is not valid, expected an integer"),
    ):
        with pytest.raises(OptionError, match=re.escape(line)):
            check_declared(values, fields, "data")


def test_a_registry_imports_an_entry_when_it_is_taken() -> None:
    registry: Registry[Any] = Registry({"b": "no_such_module_here", "a": "json:dumps"})
    assert list(registry) == ["b", "a"] and "b" in registry and len(registry) == 2
    assert registry.unread("a") == "json:dumps"
    assert registry["a"]({}) == "{}" and registry.unread("a") is None
    registry["c"] = 3
    assert list(registry) == ["b", "a", "c"] and registry.unread("c") is None
    del registry["c"], registry["a"]
    assert list(registry) == ["b"] and registry.get("c") is None
    with pytest.raises(KeyError):
        registry["c"]
    with pytest.raises(ModuleNotFoundError):
        registry["b"]
