"""The settings of a Keras layer, each checked to be what it should be: they come from a stranger's file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ACTIVATIONS = {
    "linear": "none", "relu": "relu", "elu": "elu", "gelu": "gelu", "silu": "silu", "swish": "silu", "tanh": "tanh",
    "sigmoid": "sigmoid", "softplus": "softplus", "leaky_relu": "leaky_relu", "selu": "selu", "softmax": "softmax",
}  # fmt: skip
"""Keras's names of activations, and ours; `softmax` is the classifier's."""


class Unusable(Exception):
    """Why a layer cannot be used."""


def need(config: Mapping[str, Any], **expected: Any) -> None:
    """Raise `Unusable` where a setting is there and is not as expected."""
    for name, value in expected.items():
        found = config.get(name)
        same = pair(config, name, (1, 1)) if isinstance(value, tuple) else found
        if found is not None and same != value:
            raise Unusable(f"its {name} is {str(found)[:40]}, expected {value}")


def pair(config: Mapping[str, Any], name: str, default: tuple[int, int]) -> tuple[int, int]:
    """Two sizes, of which one may stand for both."""
    value = config.get(name)
    if value is None:
        return default
    both = (value, value) if type(value) is int else tuple(value) if isinstance(value, list) else ()
    if len(both) != 2 or not all(type(v) is int and 0 < v < 1 << 16 for v in both):
        raise Unusable(f"its {name} is {str(value)[:40]}, expected two sizes")
    return both[0], both[1]


def count(config: Mapping[str, Any], name: str) -> int:
    """A number of things."""
    value = config.get(name)
    if type(value) is not int or not 0 < value < 1 << 24:
        raise Unusable(f"its {name} is {str(value)[:40]}, expected a number of them")
    return value


def flag(config: Mapping[str, Any], name: str, default: bool) -> bool:
    """True or false."""
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise Unusable(f"its {name} is {str(value)[:40]}, expected true or false")
    return value


def number(config: Mapping[str, Any], name: str, default: float) -> float:
    """A number."""
    value = config.get(name, default)
    if not _is_number(value):
        raise Unusable(f"its {name} is {str(value)[:40]}, expected a number")
    return float(value)


def numbers(value: Any) -> list[float]:
    """A number, or some in nested lists of one (such as 1 x 1 x 1 x C), as a flat list."""
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    items = value if isinstance(value, list) else [value]
    if not 0 < len(items) <= 16 or not all(map(_is_number, items)):
        raise Unusable("it has something else where numbers are expected")
    return [float(v) for v in items]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def activation(config: Mapping[str, Any]) -> str:
    """Our name of the setting `activation`."""
    value = config.get("activation")
    if value is None:
        return "none"
    if not isinstance(value, str):
        raise Unusable("its activation is not one of Keras's own, and code is not run")
    if value not in ACTIVATIONS:
        raise Unusable(f"its activation {value[:40]!r} has no counterpart")
    return ACTIVATIONS[value]
