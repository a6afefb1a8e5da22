"""Networks of one cost: by how much to multiply the widths so that parameters, or multiply-adds, are as many as asked.

Widths are whole numbers, so that a budget is met nearly: within 2 %, or nothing is built.
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
SMOKE_TOLERANCE = 0.15
"""Of networks so tiny that a channel more is a tenth of them; their figures are no evidence anyway."""
_STEPS = 24  # of the search around the crossing
_FINE = 12  # channels more or less
_Point = tuple[float, int]


def cost_of(model: str, options: Options, cost: Cost) -> int:
    """The trainable parameters of a network, or its multiply-adds for one image of its `input_size`."""
    return _cost(model, registry.get_config(model, **options), cost)


def fit(
    model: str,
    options_at: Callable[[float], Options],
    *,
    cost: Cost,
    budget: float,
    tolerance: float = TOLERANCE,
    finer: Callable[[Options, int], Options] | None = None,
) -> dict[str, Any]:
    """The options at that width for which the network's cost is nearest to `budget`.

    `options_at` gives the options at a multiple of the widths; more must cost more. `finer` adds so many channels (or
    takes them away) where one more costs little, to come nearer than a multiple of all widths can. Raises
    `ConfigError` where no multiple from 1/64 to 64 comes within `tolerance` of the budget.
    """

    def cost_at(multiple: float, channels: int = 0) -> int | None:
        try:
            options = options_at(multiple)
            return cost_of(model, finer(options, channels) if finer and channels else options, cost)
        except ConfigError:  # too narrow to be built, such as fewer channels than segments
            return None

    low, high = 1 / 64, 64.0
    for _ in range(12):
        middle = math.sqrt(low * high)
        found = cost_at(middle)
        low, high = (middle, high) if found is None or found < budget else (low, middle)
    tried = {(multiple, 0): cost_at(multiple) for multiple in _around(math.sqrt(low * high))}
    best = _nearest(tried, budget)
    if best is not None and finer is not None:
        tried |= {(best[0], channels): cost_at(best[0], channels) for channels in range(-_FINE, _FINE + 1)}
        best = _nearest(tried, budget)
    costs = {point: found for point, found in tried.items() if found is not None}
    if best is None or abs(costs[best] / budget - 1) > tolerance:
        near = "" if best is None else f"; the nearest has {costs[best]:,}"
        raise ConfigError(f"no width of {model} has about {budget:,.0f} {cost.replace('_', '-')}{near}")
    multiple, channels = best
    options = options_at(multiple)
    return dict(finer(options, channels) if finer and channels else options)


def _nearest(tried: Mapping[_Point, int | None], budget: float) -> _Point | None:
    """Where the cost is nearest to the budget; of equals the one with fewest channels added or taken away."""
    costs = {point: found for point, found in tried.items() if found is not None}
    return min(costs, key=lambda point: (abs(costs[point] - budget), abs(point[1])), default=None)


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
