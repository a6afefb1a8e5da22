"""Type checks for config dataclasses: a config may come from a file that someone else wrote."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from xception.errors import ConfigError

Config = TypeVar("Config")

# What a field may hold at most: far above any real network, and low enough that a config read from a file
# cannot ask for endless work before its weights are looked at.
MAX_WIDTH = 1 << 14
MAX_MODULES = 1 << 10
MAX_CLASSES = 1 << 20
MAX_SIDE = 1 << 14


def unknown_name(kind: str, name: object, known: Iterable[str]) -> ConfigError:
    """The error for a name that is not among `known`: it names close matches, or else all of them if few."""
    names = list(known)
    by_lower = {known_name.lower(): known_name for known_name in names}
    close = [by_lower[match] for match in get_close_matches(str(name).lower(), by_lower, n=3, cutoff=0.5)]
    if close:
        hint = f"did you mean {' or '.join(close)}?"
    else:
        hint = f"choose from {', '.join(names)}" if len(names) <= 50 else f"none of {len(names)} is near it"
    return ConfigError(f"unknown {kind} {name!r}: {hint}")


def field_types(config_type: type[Any]) -> dict[str, Any]:
    """Field name -> resolved annotation, of the fields that `config_type` is built with."""
    hints = get_type_hints(config_type)
    return {field.name: hints[field.name] for field in fields(config_type) if field.init}


def check_fields(config: Any) -> None:
    """Raise `ConfigError` where a field does not hold what its annotation says (for `__post_init__`)."""
    for name, annotation in field_types(type(config)).items():
        value = getattr(config, name)
        if not matches(value, annotation):
            raise ConfigError(f"{name} must be {spell(annotation)}; got {value!r}")


def checked_values(config_type: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` as keyword arguments for `config_type`: lists become tuples, anything else must fit as it is.

    Raises `ConfigError` on a name that is no field and on a value that its annotation does not allow.
    """
    annotations = field_types(config_type)
    checked = {}
    for name, value in values.items():
        if name not in annotations:
            raise unknown_name("option", name, annotations)
        value = to_tuples(value)
        if not matches(value, annotations[name]):
            raise ConfigError(f"{name} must be {spell(annotations[name])}; got {value!r}")
        checked[name] = value
    return checked


def to_tuples(value: Any) -> Any:
    """JSON has no tuples: lists become tuples, at every depth."""
    return tuple(to_tuples(item) for item in value) if isinstance(value, list | tuple) else value


def to_lists(value: Any) -> Any:
    """Plain values for JSON: tuples become lists, mappings dicts, at every depth."""
    if isinstance(value, Mapping):
        return {key: to_lists(item) for key, item in value.items()}
    return [to_lists(item) for item in value] if isinstance(value, list | tuple) else value


def matches(value: Any, annotation: Any) -> bool:
    """Whether `value` is of the annotated type. A bool is no number; an int may stand for a float."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in args)
    if origin in (Union, types.UnionType):
        return any(matches(value, choice) for choice in args)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(args) == 2 and args[1] is Ellipsis:
            return all(matches(item, args[0]) for item in value)
        return len(value) == len(args) and all(map(matches, value, args))
    if annotation is type(None):
        return value is None
    if annotation is float:
        return type(value) in (int, float)
    return type(value) is annotation


def spell(annotation: Any) -> str:
    """An annotation in a reader's words."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(repr(choice) for choice in args)
    if origin in (Union, types.UnionType):
        return " or ".join(spell(choice) for choice in args)
    if origin is tuple:
        if len(args) == 2 and args[1] is Ellipsis:
            return f"a list of {spell(args[0])}"
        return f"a list ({', '.join(spell(item) for item in args)})"
    if annotation is type(None):
        return "None"
    return {int: "int", float: "float", bool: "true or false", str: "text"}.get(annotation, str(annotation))


def check_range(name: str, value: float, low: float, high: float | None = None) -> None:
    """Raise `ConfigError` unless low <= value <= high (which also refuses not-a-number)."""
    if not low <= value <= (value if high is None else high):
        limits = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ConfigError(f"{name} must be {limits}; got {value}")


def check_widths(name: str, widths: tuple[int, ...]) -> None:
    """Raise `ConfigError` unless each width is a possible number of channels."""
    for width in widths:
        check_range(f"each of {name}", width, 1, MAX_WIDTH)


def check_dropout(rate: float) -> None:
    """Raise `ConfigError` unless 0 <= rate < 1."""
    if not 0 <= rate < 1:
        raise ConfigError(f"dropout must be at least 0 and less than 1; got {rate}")


def check_common(in_channels: int, input_size: int) -> None:
    """The ranges of what every config has of its input."""
    check_range("in_channels", in_channels, 1, MAX_WIDTH)
    check_range("input_size", input_size, 1, MAX_SIDE)
