"""YAML into frozen dataclasses, strictly: an unknown key, a wrong type or a wrong unit is an error that names the key and the mend.

A field made with `key(...)` carries its help text and its unit; `describe` prints them.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar

from .errors import UsageError, nearest

T = TypeVar("T")
MULTIPLES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
Unit = Literal["", "tokens", "bytes", "sequences", "steps", "share"]


def key(help: str, default: Any = dataclasses.MISSING, unit: Unit = "", low: float | None = None, high: float | None = None) -> Any:
    """A documented field. `low` and `high` bound a number, both included; a `share` lies between 0 and 1."""
    if unit == "share":
        low, high = 0.0, 1.0
    elif unit and low is None:
        low = 0
    metadata = {"help": help, "unit": unit, "low": low, "high": high}
    if isinstance(default, (dict, list)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse(kind: type[T], value: Any, where: str) -> T:
    """`value` (from YAML) as the dataclass `kind`; `where` is the key path for messages. Raises `UsageError`."""
    if not isinstance(value, Mapping):
        raise UsageError(f"{where or 'recipe'}: expected keys and values, found {value!r}")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    annotations = typing.get_type_hints(kind)
    for name in value:
        if name not in fields:
            raise UsageError(f"{path(where, str(name))}: unknown key; {nearest(str(name), key_names(kind))}")
    chosen = {}
    for name, field in fields.items():
        if name in value:
            chosen[name] = convert(annotations[name], value[name], path(where, name), field.metadata)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UsageError(f"{path(where, name)}: missing; {field.metadata.get('help', 'give a value')}")
    return kind(**chosen)


def key_names(kind: Any) -> Iterator[str]:
    """Names of a dataclass's keys, and those of dataclasses directly in it as `outer.inner`."""
    annotations = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        yield field.name
        if dataclasses.is_dataclass(annotations[field.name]):
            yield from (f"{field.name}.{name}" for name in key_names(annotations[field.name]))


def path(where: str, name: str) -> str:
    """`where.name`, without a leading dot."""
    return f"{where}.{name}" if where else name


def convert(kind: Any, value: Any, where: str, metadata: Mapping[str, Any]) -> Any:
    """One value by its annotation: dataclasses, optionals, literals, tuples, dictionaries, numbers with units, text."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return convert(next(a for a in arguments if a is not type(None)), value, where, metadata)
    if dataclasses.is_dataclass(kind):
        return parse(typing.cast(type[Any], kind), value, where)
    if origin is Literal:
        if value not in arguments:
            raise UsageError(f"{where}: '{value}' is not a choice; use one of {', '.join(str(a) for a in arguments)}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise UsageError(f"{where}: expected a list, found {value!r}; write [{value}]")
        return tuple(convert(arguments[0], item, f"{where}[{n}]", metadata) for n, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise UsageError(f"{where}: expected keys and values, found {value!r}")
        return {str(k): convert(arguments[1], v, path(where, str(k)), metadata) for k, v in value.items()}
    if kind in (int, float):
        return number(kind, value, where, metadata)
    if kind is Any:
        return value
    if not isinstance(value, kind):
        raise UsageError(f"{where}: {value!r} is not {'text; put it in quotes' if kind is str else 'true or false'}")
    return value


def number(kind: type, value: Any, where: str, metadata: Mapping[str, Any]) -> int | float:
    """A number, written plainly or with a multiple of its own unit: `1.5M` tokens, `8MB` bytes."""
    unit = metadata.get("unit", "")
    if isinstance(value, str):
        value = with_multiple(value, unit, where)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UsageError(f"{where}: {value!r} is not a number")
    if not math.isfinite(value):
        raise UsageError(f"{where}: {value} is not a number that can be counted with; write a finite one")
    if kind is int:
        if value != int(value):
            raise UsageError(f"{where}: {value} is not a whole number of {unit or 'units'}")
        value = int(value)
    low, high = metadata.get("low"), metadata.get("high")
    if (low is not None and value < low) or (high is not None and value > high):
        raise UsageError(f"{where}: {value} is outside the allowed range, {low} to {'any' if high is None else high}")
    return float(value) if kind is float else int(value)


def with_multiple(text: str, unit: str, where: str) -> float:
    """`12`, `1.2M`, `3e-4` as a number; bytes need a byte unit and nothing else may have one."""
    match = re.fullmatch(r"\s*([-+]?[0-9._]+(?:[eE][-+]?[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if match is None:
        raise UsageError(f"{where}: '{text}' is not a number")
    try:
        amount = float(match[1].replace("_", ""))
    except ValueError:
        raise UsageError(f"{where}: '{text}' is not a number") from None
    suffix = match[2].upper()
    if unit == "bytes":
        if suffix not in BYTES:
            unit_meant = {"K": "KB", "G": "GB", "T": "TB"}.get(suffix, "MB")
            raise UsageError(f"{where}: '{text}' has no unit of bytes; write {match[1]}{unit_meant}")
        return amount * BYTES[suffix]
    if suffix in MULTIPLES:
        return amount * MULTIPLES[suffix]
    if suffix in BYTES:
        raise UsageError(f"{where}: '{text}' is in bytes, this key counts {unit or 'plain numbers'}; write {match[1]}{suffix[0]}")
    raise UsageError(f"{where}: '{text}' has an unknown unit; write K, M, B or T for thousands to trillions")


def describe(kind: Any, indent: int = 0) -> Iterator[str]:
    """Lines that document every key of a dataclass, nested ones indented."""
    annotations = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        unit = field.metadata.get("unit")
        yield f"{'  ' * indent}{field.name}: {field.metadata.get('help', '')} [{unit + ', ' if unit else ''}{default_of(field)}]"
        inner = inner_dataclass(annotations[field.name])
        if inner is not None:
            yield from describe(inner, indent + 1)


def default_of(field: dataclasses.Field[Any]) -> str:
    """A field's default in words."""
    if field.default_factory is not dataclasses.MISSING:
        return "default none"
    if field.default is dataclasses.MISSING:
        return "required"
    if dataclasses.is_dataclass(field.default):
        return "see below"
    return "default none" if field.default in (None, ()) else f"default {field.default!r}"


def inner_dataclass(kind: Any) -> Any:
    """The dataclass inside an annotation (optional, tuple or dict of it), or None."""
    if dataclasses.is_dataclass(kind):
        return kind
    hits = [inner for inner in map(inner_dataclass, typing.get_args(kind)) if inner is not None]
    return hits[0] if len(hits) == 1 else None
