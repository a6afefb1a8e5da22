"""Interleaved rounds: everyone in every round, in turns, and ratios inside a round only."""

from __future__ import annotations

from xception.benchmark.rounds import against_best, interleave, median_ratio, order_of


def test_every_round_visits_everyone_once_in_another_order() -> None:
    visited: list[str] = []
    keys = "abcd"
    rates = interleave({key: lambda key=key: float(len(visited.append(key) or visited)) for key in keys}, 6)  # type: ignore[misc]
    rounds = [visited[start : start + 4] for start in range(0, 24, 4)]
    assert all(sorted(order) == sorted(keys) for order in rounds)
    assert len({tuple(order) for order in rounds[:4]}) == 4
    assert {order[0] for order in rounds} == set(keys)
    assert {key: len(found) for key, found in rates.items()} == dict.fromkeys(keys, 6)


def test_the_order_is_rotated_and_turned_around() -> None:
    assert [order_of("abc", turn) for turn in range(3)] == [["a", "b", "c"], ["b", "a", "c"], ["c", "a", "b"]]
    assert order_of([], 3) == []


def test_a_visit_that_fails_is_not_repeated() -> None:
    calls = []
    numbers = iter([1.0, None])

    def fails() -> float | None:
        calls.append(1)
        return next(numbers)

    complete: list[int] = []
    assert interleave({"bad": fails, "good": lambda: 2.0}, 4, complete.append) == {"good": [2.0] * 4}
    assert len(calls) == 2
    assert complete == [0, 1, 2, 3]


def test_a_machine_that_slows_down_does_not_change_ratios() -> None:
    """Twice as fast in every round, whatever the round's speed is; medians of times would tell another story."""
    speed = [1.0, 10.0, 3.0, 0.1, 7.0]
    assert median_ratio([2 * s for s in speed], speed) == 2.0


def test_the_best_peer_is_the_one_least_favourable_to_us() -> None:
    rates = {"ours": [4.0, 4.0, 4.0], "slow": [1.0, 1.0, 1.0], "fast": [2.0, 2.0, 8.0]}
    assert against_best("ours", ["slow", "fast"], rates) == ("fast", 2.0)
    assert against_best("ours", [], rates) == (None, None)
    assert against_best("ours", ["failed"], rates) == (None, None)
    assert against_best("failed", ["slow"], rates) == (None, None)
