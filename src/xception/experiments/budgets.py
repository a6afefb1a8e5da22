"""Networks of one cost: by how much to multiply the widths so that parameters, or multiply-adds, are as many as asked.

Widths are whole numbers, so that a budget is met nearly; `fit` says by how much it is missed, and refuses more than 2 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

from xception.errors import ConfigError
from xception.models import registry
from xception.models.cost import count_parameters, stage_costs

Cost = Literal["parameters", "multiply_adds"]
Options = Mapping[str, Any]
TOLERANCE = 0.02
_STEPS = 60  # of the search around the crossing


def cost_of(model: str, options: Options, cost: Cost) -> int:
    """The trainable parameters of a network, or its multiply-adds for one image of its `input_size`."""
    return _cost(model, registry.get_config(model, **options), cost)


def fit(model: str, options_at: Callable[[float], Options], *, cost: Cost, budget: float) -> dict[str, Any]:
    """The options at that width for which the network's cost is nearest to `budget`.

    `options_at` gives the options at a multiple of the widths; more must cost more. Raises `ConfigError` where no
    multiple from 1/64 to 64 comes within 2 % of the budget.
    """

    def cost_at(multiple: float) -> int | None:
        try:
            return cost_of(model, options_at(multiple), cost)
        except ConfigError:  # too narrow to be built, such as fewer channels than segments
            return None

    low, high = 1 / 64, 64.0
    for _ in range(20):
        middle = math.sqrt(low * high)
        found = cost_at(middle)
        low, high = (middle, high) if found is None or found < budget else (low, middle)
    tried = {multiple: cost_at(multiple) for multiple in _around(math.sqrt(low * high))}
    costs = {multiple: found for multiple, found in tried.items() if found is not None}
    best = min(costs, key=lambda multiple: abs(costs[multiple] - budget), default=None)
    if best is None or abs(costs[best] / budget - 1) > TOLERANCE:
        near = "" if best is None else f"; the nearest has {costs[best]:,}"
        raise ConfigError(f"no width of {model} has about {budget:,.0f} {cost.replace('_', '-')}{near}")
    return dict(options_at(best))


def widths(values: Sequence[int], multiple: float) -> tuple[int, ...]:
    """Each width times `multiple`, rounded, at least 1."""
    return tuple(max(1, round(multiple * value)) for value in values)


def _around(multiple: float) -> list[float]:
    return [multiple * (1 + 0.12 * (step / _STEPS - 0.5)) for step in range(_STEPS + 1)]


@lru_cache(maxsize=4096)
def _cost(model: str, config: Any, cost: Cost) -> int:
    network = registry.build_without_storage(model, config)
    if cost == "parameters":
        return count_parameters(network)
    shape = (1, config.in_channels, config.input_size, config.input_size)
    return sum(stage.multiply_adds for stage in stage_costs(network, shape))
