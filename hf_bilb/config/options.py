"""Strict options: a mapping from a YAML file, a command line or Python becomes a dataclass, or one clear line of error.

Used by the balancers (`build_balancer("bilb", edge_fraction=...)`) and by recipes alike, so that a mistyped key is
answered in the same words everywhere. Standard library only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union

from hf_bilb.errors import OptionError

T = TypeVar("T")

_SHOWN = 80  # characters of a value in a message
_INT64 = range(-(2**63), 2**63)


class _Repr(reprlib.Repr):
    """`repr` at a bounded cost, whatever the value: nested without end, a string of megabytes, a number of pages."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 4
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdeque = _SHOWN // 4
        self.maxstring = self.maxlong = self.maxother = _SHOWN

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        if level <= 0:
            return "{...}"
        items = [
            f"{self.repr1(key, level - 1)}: {self.repr1(value, level - 1)}"
            for key, value in list(x.items())[: self.maxdict]
        ]
        return "{" + ", ".join(items) + "}"

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write a number of more than 4,300 digits.
        return repr(x) if x.bit_length() <= 1000 else f"a number of about {int(x.bit_length() * 0.30103)} digits"


def shown(value: object) -> str:
    """`repr(value)` for a message, cut to 80 characters."""
    text = _Repr().repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Return ` (did you mean "x"?)` for the candidate nearest to `name`, or an empty string when none is near."""
    names = {candidate.lower(): candidate for candidate in candidates}
    matches = difflib.get_close_matches(str(name)[:100].lower(), names, n=1, cutoff=0.55)
    return f' (did you mean "{names[matches[0]]}"?)' if matches else ""


def unknown_name(kind: str, name: object, candidates: Iterable[str]) -> OptionError:
    """The error for a name that is not among `candidates`: names the nearest one and lists them when they are few."""
    known = sorted(candidates)
    listed = f"; known: {', '.join(known)}" if len(known) <= 30 else ""
    return OptionError(f"{kind}: {shown(name)} is not known{nearest(str(name), known)}{listed}")


def check_one_of(asked: str, **values: object) -> None:
    """Raise `OptionError` unless exactly one of two options is set; `asked` says what each of them is."""
    given = [shown(value) for value in values.values() if value is not None]
    if len(given) != 1:
        said = f"both are set ({', '.join(given)})" if given else "neither is set"
        raise OptionError(f"{next(iter(values))}: one of {asked} is needed, {said}")


def parse_options(cls: type[T], values: Mapping[str, Any], path: str) -> T:
    """Build the dataclass `cls` from `values`.

    Args:
        cls: a dataclass; its field annotations are the accepted types.
        values: option name -> value, as read from YAML or given as keyword arguments.
        path: what the options belong to (`"balancer"`), the first part of the key path in messages.

    Raises:
        OptionError: for an unknown key, a missing key or a value that does not fit its annotation.
    """
    if not isinstance(values, Mapping):
        raise OptionError(f"{path}: {shown(values)} is not a mapping of options")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            hint = nearest(str(key), fields) or f" (known: {', '.join(fields) or 'none'})"
            raise OptionError(f"{path}.{key}: unknown option, value {shown(values[key])}{hint}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise OptionError(f"{path}.{name}: is required, expected {describe_type(hints[name])}")
    checked = {key: check_value(value, hints[key], f"{path}.{key}") for key, value in values.items()}
    try:
        options = cls(**checked)
        check_bounds(options)
    except OptionError as error:
        raise OptionError(f"{path}.{error}") from None
    return options


# ---------------------------------------------------------------------------------------------------- ranges

_BOUNDS = "bounds"  # in the metadata of a field


@dataclasses.dataclass(frozen=True)
class _Bounds:
    above: float | None
    at_least: float | None
    below: float | None
    at_most: float | None
    expected: str | None

    def hold(self, value: float) -> bool:
        """NaN is above and below nothing."""
        return not (
            (self.above is not None and not value > self.above)
            or (self.at_least is not None and value < self.at_least)
            or (self.below is not None and not value < self.below)
            or (self.at_most is not None and not value <= self.at_most)
        )

    def in_words(self, annotation: Any) -> str:
        """What is expected: `an integer >= 1`."""
        if self.expected is not None:
            return self.expected
        kind = "an integer" if int in (annotation, *typing.get_args(annotation)) else "a number"
        signs = {">": self.above, ">=": self.at_least, "<": self.below, "<=": self.at_most}
        return f"{kind} {' and '.join(f'{sign} {bound:g}' for sign, bound in signs.items() if bound is not None)}"


def bounded(
    default: Any = dataclasses.MISSING,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    expected: str | None = None,
) -> Any:
    """A field of an options class, a number or null, that declares its range: `mu: float = bounded(1.0, above=0)`.

    The range is checked by `parse_options`, and wherever else the class is built if its `__post_init__` calls
    `check_bounds(self)`.

    Args:
        default: of the field, which is required without one.
        above, at_least, below, at_most: the range.
        expected: what the message says instead of `a number > 0`, which is made from type and range.
    """
    return dataclasses.field(default=default, metadata={_BOUNDS: _Bounds(above, at_least, below, at_most, expected)})


def check_bounds(options: Any) -> None:
    """Raise `OptionError` for the first field of a dataclass that is not in the range that it declares; null is, where
    it is the default."""
    for field in dataclasses.fields(options):
        bounds, value = field.metadata.get(_BOUNDS), getattr(options, field.name)
        if bounds is None or (value is None and field.default is None):
            continue
        if not bounds.hold(value):
            expected = bounds.in_words(typing.get_type_hints(type(options))[field.name])
            raise OptionError(f"{field.name}: {value} is not valid, expected {expected}")


# ---------------------------------------------------------------------------------------------------- types


def check_value(value: Any, annotation: Any, path: str) -> Any:
    """Return `value` as the type that `annotation` asks for.

    Numbers written as strings (`"1e-3"`, which YAML 1.1 does not read as a number) become numbers; an int serves as a
    float, a list as a tuple; a bool never serves as a number. Integers have 64 bits at most.

    Raises:
        OptionError: naming `path`, the value and what was expected.
    """
    accepted, result = _convert(value, annotation, path)
    if not accepted:
        expected = describe_type(annotation)
        limit = " of at most 64 bits" if type(value) is int and value not in _INT64 and "integer" in expected else ""
        raise OptionError(f"{path}: {shown(value)} is not valid, expected {expected}{limit}")
    return result


def _convert(value: Any, annotation: Any, path: str) -> tuple[bool, Any]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return True, value
    if annotation is None or annotation is type(None):
        return value is None, None
    if origin is Callable:
        return callable(value), value
    if origin in (Union, types.UnionType):
        return _convert_union(value, arguments, path)
    if origin is Literal:
        if isinstance(value, str) and value not in arguments:
            hint = nearest(value, [a for a in arguments if isinstance(a, str)])
            raise OptionError(f"{path}: {shown(value)} is not valid, expected {describe_type(annotation)}{hint}")
        return any(value == a and type(value) is type(a) for a in arguments), value
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        if isinstance(value, annotation):
            return True, value
        return (True, parse_options(annotation, value, path)) if isinstance(value, Mapping) else (False, None)
    if origin in (list, tuple, Sequence) or annotation in (list, tuple):
        return _convert_sequence(value, origin or annotation, arguments, path)
    if origin in (dict, Mapping) or annotation is dict:
        return _convert_mapping(value, arguments, path)
    return _convert_scalar(value, annotation)


def _convert_union(value: Any, alternatives: tuple[Any, ...], path: str) -> tuple[bool, Any]:
    # An exact match goes before a conversion: "1e-3" stays a string where strings are accepted.
    for alternative in alternatives:
        if isinstance(alternative, type) and type(value) is alternative:
            return _convert(value, alternative, path)
    nested: OptionError | None = None
    for alternative in alternatives:
        try:
            accepted, result = _convert(value, alternative, path)
        except OptionError as error:
            # A mapping's own error ("path.key: unknown option") says more than "does not fit the union".
            nested = error if isinstance(value, Mapping) else nested
            continue
        if accepted:
            return True, result
    if nested is not None:
        raise nested
    if isinstance(value, str):
        names = [a for alt in alternatives if typing.get_origin(alt) is Literal for a in typing.get_args(alt)]
        expected = " or ".join(describe_type(alternative) for alternative in alternatives)
        raise OptionError(f"{path}: {shown(value)} is not valid, expected {expected}{nearest(value, names)}")
    return False, None


def _convert_sequence(value: Any, origin: Any, arguments: tuple[Any, ...], path: str) -> tuple[bool, Any]:
    if not isinstance(value, (list, tuple)):
        return False, None
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        if len(value) != len(arguments):
            return False, None
        return True, tuple(
            check_value(v, a, f"{path}[{i}]") for i, (v, a) in enumerate(zip(value, arguments, strict=True))
        )
    element = arguments[0] if arguments else Any
    items = [check_value(v, element, f"{path}[{i}]") for i, v in enumerate(value)]
    return True, tuple(items) if origin is tuple else items


def _convert_mapping(value: Any, arguments: tuple[Any, ...], path: str) -> tuple[bool, Any]:
    if not isinstance(value, Mapping):
        return False, None
    if not arguments:
        return True, dict(value)
    return True, {
        check_value(k, arguments[0], path): check_value(v, arguments[1], f"{path}.{k}") for k, v in value.items()
    }


def _convert_scalar(value: Any, annotation: Any) -> tuple[bool, Any]:
    if annotation is bool or isinstance(value, bool):
        return annotation is bool and isinstance(value, bool), value
    if annotation in (int, float) and isinstance(value, (int, float, str)):
        return _convert_number(value, annotation)
    return isinstance(annotation, type) and isinstance(value, annotation), value


def _convert_number(value: int | float | str, annotation: type[int] | type[float]) -> tuple[bool, Any]:
    try:
        number = float(value)
    except (ValueError, OverflowError):  # no number, or an integer beyond all floats
        return False, None
    if isinstance(value, str) and math.isinf(number) and "inf" not in value.lower():
        return False, None  # "1e400"
    if annotation is float:
        return not math.isnan(number), number
    if not math.isfinite(number) or number != int(number):
        return False, None
    whole = int(number)
    if not isinstance(value, float):
        with contextlib.suppress(ValueError):  # "1e3"; all digits of the others, of which a float has 53 bits
            whole = int(value)
    return whole in _INT64, whole


def describe_type(annotation: Any) -> str:
    """Say in words what values `annotation` accepts: `one of "none", "log"`, `a number`, `a list of 2 numbers`, ..."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(f'"{a}"' if isinstance(a, str) else repr(a) for a in arguments)
    if origin is Callable:
        return "a function"
    if origin in (Union, types.UnionType):
        return " or ".join(describe_type(a) for a in arguments)
    if annotation is None or annotation is type(None):
        return "null"
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        return "a list of " + str(len(arguments)) + " values (" + ", ".join(describe_type(a) for a in arguments) + ")"
    if origin in (list, tuple, Sequence) or annotation in (list, tuple):
        return f"a list ({describe_type(arguments[0])} each)" if arguments else "a list"
    if dataclasses.is_dataclass(annotation):
        names = [field.name for field in dataclasses.fields(annotation)]
        return "a mapping with " + ", ".join(names)
    names_of = {int: "an integer", float: "a number", bool: "true or false", str: "a string", dict: "a mapping"}
    return names_of.get(
        annotation, "a mapping" if origin in (dict, Mapping) else getattr(annotation, "__name__", str(annotation))
    )
