"""Interleaved rounds: a machine that changes its speed within seconds changes it for every system alike.

In each round every system is visited once, in an order that is rotated from round to round. Two systems are compared
by the median over rounds of the ratio inside a round, never by times of different rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from statistics import median
from typing import TypeVar

K = TypeVar("K", bound=Hashable)


def order_of(keys: Sequence[K], turn: int) -> list[K]:
    """The keys in the order of round number `turn`: from the key of that number on, every other round backwards.

    So over the rounds each system follows different others.
    """
    step = -1 if turn % 2 else 1
    return [keys[(turn + step * place) % len(keys)] for place in range(len(keys))]


def interleave(
    visits: Mapping[K, Callable[[], float | None]],
    rounds: int,
    after: Callable[[int], None] = lambda turn: None,
) -> dict[K, list[float]]:
    """What each visit returned in each of `rounds` rounds.

    A visit that returns None has failed: it is not repeated and not in the result. `after` is told the number of each
    round that is complete.
    """
    measured: dict[K, list[float]] = {key: [] for key in visits}
    for turn in range(rounds):
        for key in order_of(list(visits), turn):
            if key in measured:
                value = visits[key]()
                if value is None:
                    del measured[key]
                else:
                    measured[key].append(value)
        after(turn)
    return measured


def median_ratio(rates: Sequence[float], others: Sequence[float]) -> float:
    """The median over rounds of `rates` / `others`, both with one number a round."""
    return median(rate / other for rate, other in zip(rates, others, strict=True))


def against_best(key: K, peers: Iterable[K], rates: Mapping[K, Sequence[float]]) -> tuple[K, float] | tuple[None, None]:
    """The peer that compares best with `key`, and the median ratio of `key` to it; None, None without peers.

    The best peer is the one with the smallest such ratio: no other peer's would be more favourable to the peers.
    """
    there = [peer for peer in peers if peer in rates]
    if key not in rates or not there:
        return None, None
    ratios = [(median_ratio(rates[key], rates[peer]), peer) for peer in there]
    ratio, best = min(ratios, key=lambda pair: pair[0])
    return best, ratio
