"""Where a search looks: fields of the recipe with a range or a few values each.

    learning_rate=0.01..0.5,log      between two numbers, here evenly over their logarithm
    batch_size=64|128                one of some values
    label_smoothing=0..0.2           evenly; of a field that holds whole numbers, whole numbers

What decides how figures are compared is not for search: epochs, seed, and which images are kept apart.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xception.errors import ConfigError
from xception.models.fields import unknown_name
from xception.training.recipe import FREE_FIELDS, Recipe, flat_values, override, recipe_fields

FIXED = frozenset({"epochs", "seed", "val_fraction", "test_fraction", "check_images", "max_bad_share"} | FREE_FIELDS)


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """A field to search: one of `choices`, or a number from `low` to `high`, whole or `log` where it says so."""

    name: str
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False

    def holds(self, value: Any) -> bool:
        """Whether `value` is a point of it."""
        if self.choices:
            return value in self.choices
        return isinstance(value, (int, float)) and self.low <= value <= self.high

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        if self.choices:
            return {"choices": list(self.choices)}
        return {"low": self.low, "high": self.high, "log": self.log, "whole": self.whole}


def default_space(recipe: Recipe) -> tuple[Dimension, ...]:
    """A tenth to ten times the recipe's rate and weight decay; momentum, label smoothing and dropout."""
    rate, decay = recipe.optimizer.learning_rate, recipe.optimizer.weight_decay
    return (
        Dimension(name="learning_rate", low=rate / 10, high=rate * 10, log=True),
        Dimension(name="weight_decay", low=(decay or 1e-5) / 10, high=(decay or 1e-5) * 10, log=True),
        Dimension(name="momentum", low=0.8, high=0.98),
        Dimension(name="label_smoothing", low=0.0, high=0.2),
        Dimension(name="dropout", low=0.0, high=0.5),
    )


def parse_space(texts: Sequence[str], recipe: Recipe) -> tuple[Dimension, ...]:
    """The dimensions that ``NAME=...`` texts ask for; none asks for `default_space`.

    Raises `ConfigError` with one line for what is no field, no range, or out of the field's own bounds.
    """
    if not texts:
        return default_space(recipe)
    found: dict[str, Dimension] = {}
    for text in texts:
        name, equals, spec = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not spec.strip():
            raise ConfigError(f"--search must be NAME=LOW..HIGH, NAME=LOW..HIGH,log or NAME=A|B|C; got {text!r:.80}")
        known = [field for field in recipe_fields() if field not in FIXED]
        if name in FIXED:
            raise ConfigError(f"{name} is not for search: it decides how trials are compared")
        if name not in known:
            raise unknown_name("recipe field", name, known)
        if name in found:
            raise ConfigError(f"{name} is given twice")
        found[name] = _dimension(name, spec.strip(), recipe)
    return tuple(found.values())


def _dimension(name: str, spec: str, recipe: Recipe) -> Dimension:
    if ".." in spec:
        spread, _, kind = spec.partition(",")
        low, _, high = spread.partition("..")
        try:
            ends = float(low), float(high)
        except ValueError:
            ends = math.nan, math.nan
        if not (ends[0] < ends[1] and all(map(math.isfinite, ends))) or kind not in ("", "log"):
            raise ConfigError(
                f"{name} must be LOW..HIGH or LOW..HIGH,log with numbers, the lower first; got {spec!r:.60}"
            )
        if kind and ends[0] <= 0:
            raise ConfigError(f"{name}: a logarithm needs numbers above 0; got {spec!r:.60}")
        whole = type(flat_values(recipe)[name]) is int
        if whole and not all(end.is_integer() for end in ends):
            raise ConfigError(f"{name} must be between whole numbers; got {spec!r:.60}")
        for end in ends:
            override(recipe, **{name: int(end) if whole else end})  # within the field's own bounds
        return Dimension(name=name, low=ends[0], high=ends[1], log=bool(kind), whole=whole)
    choices = tuple(_value(text.strip()) for text in spec.split("|"))
    if len(choices) < 2 or len(set(map(str, choices))) < len(choices):
        raise ConfigError(f"{name} must be LOW..HIGH or two or more different values A|B; got {spec!r:.60}")
    for choice in choices:
        if isinstance(choice, (list, dict)):
            raise ConfigError(f"{name}: a list cannot be searched; got {spec!r:.60}")
        override(recipe, **{name: choice})
    return Dimension(name=name, choices=choices)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def suggest(trial: Any, space: Sequence[Dimension]) -> dict[str, Any]:
    """The point that an optuna trial takes."""
    point: dict[str, Any] = {}
    for dimension in space:
        name = dimension.name
        if dimension.choices:
            point[name] = trial.suggest_categorical(name, list(dimension.choices))
        elif dimension.whole:
            point[name] = trial.suggest_int(name, int(dimension.low), int(dimension.high), log=dimension.log)
        else:
            point[name] = trial.suggest_float(name, dimension.low, dimension.high, log=dimension.log)
    return point


def own_point(recipe: Recipe, space: Sequence[Dimension]) -> dict[str, Any] | None:
    """Where the recipe itself stands in the space; None where it is outside of it."""
    values: Mapping[str, Any] = flat_values(recipe)
    point = {d.name: (0.0 if d.name == "dropout" and values[d.name] is None else values[d.name]) for d in space}
    return point if all(d.holds(point[d.name]) for d in space) else None
