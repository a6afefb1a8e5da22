"""Confidence and verdicts: known cases, and intervals that cover what they should."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from xception.experiments.experiment import Contrast
from xception.experiments.judge import Sample, interval, judge, overall, redraw_seeds
from xception.experiments.measure import PerImage

BETTER = Contrast(says="a is better", weights={"a": 1.0, "b": -1.0})


def per_image(values: Any) -> PerImage:
    gained = np.asarray(values, np.float64)
    return PerImage(gained=gained, possible=np.ones(len(gained)))


def line(arm: str, seed: int, values: Any, *, images: str = "all", curve: Any = ()) -> dict[str, Any]:
    return {
        "arm": arm,
        "seed": seed,
        "images": images,
        "per_image": {"top1": per_image(values).to_dict()},
        "history": [{"epoch": k + 1, "val_top1": value} for k, value in enumerate(curve)],
    }


def right(share: float, *, images: int = 400, seed: int = 0) -> Any:
    return (np.random.default_rng(seed).random(images) < share).astype(float)


def lines(a: float, b: float, *, seeds: int = 3, **changes: Any) -> dict[str, list[dict[str, Any]]]:
    return {
        "a": [line("a", s, right(a, seed=s), **changes) for s in range(seeds)],
        "b": [line("b", s, right(b, seed=s + 100), **changes) for s in range(seeds)],
    }


def test_a_clear_difference_holds_and_its_opposite_does_not() -> None:
    judged = judge(BETTER, lines(0.9, 0.6), "top1")
    assert judged.verdict == "held"
    assert judged.low is not None
    assert 0.15 < judged.low < 0.3 < judged.high < 0.45  # type: ignore[operator]
    assert judge(BETTER, lines(0.6, 0.9), "top1").verdict == "not held"


def test_no_difference_is_open() -> None:
    judged = judge(BETTER, lines(0.8, 0.8), "top1")
    assert judged.verdict == "open"
    assert "more seeds or images" in judged.why


def test_the_same_answers_differ_by_exactly_nothing() -> None:
    same = {name: [line(name, s, right(0.7, seed=s)) for s in range(3)] for name in "ab"}
    judged = judge(BETTER, same, "top1")
    assert (judged.value, judged.low, judged.high, judged.verdict) == (0.0, 0.0, 0.0, "open")
    alike = Contrast(says="alike", weights=BETTER.weights, within=0.01)
    assert judge(alike, same, "top1").verdict == "held"
    assert judge(alike, lines(0.9, 0.5), "top1").verdict == "not held"


def test_a_single_seed_is_open_unless_nothing_was_trained() -> None:
    one = lines(0.95, 0.5, seeds=1)
    judged = judge(BETTER, one, "top1")
    assert (judged.verdict, judged.why) == ("open", "a single seed says nothing about other seeds")
    assert judged.value is not None
    published = {arm: [{**found, "weights": "some"} for found in of_arm] for arm, of_arm in one.items()}
    assert judge(BETTER, published, "top1").verdict == "held"


def test_seeds_that_an_arm_lacks_are_left_out_and_nothing_finished_is_open() -> None:
    some = lines(0.9, 0.6)
    some["a"] = some["a"][:2]
    assert judge(BETTER, some, "top1").value == pytest.approx(
        np.mean([right(0.9, seed=s).mean() - right(0.6, seed=s + 100).mean() for s in range(2)])
    )
    some["a"] = []
    assert judge(BETTER, some, "top1").why == "nothing is finished of a"
    some["a"] = [line("a", 7, right(0.9))]
    assert judge(BETTER, some, "top1").why == "no seed is finished for all of its arms"


def test_learning_is_judged_by_the_mean_over_epochs() -> None:
    faster = Contrast(says="a learns faster", weights=BETTER.weights, of="learning")
    found = {
        "a": [line("a", s, right(0.9), curve=(0.5 + s / 100, 0.9)) for s in range(3)],
        "b": [line("b", s, right(0.9), curve=(0.3, 0.9)) for s in range(3)],
    }
    judged = judge(faster, found, "top1")
    assert judged.value == pytest.approx(0.105)
    assert judged.verdict == "held"
    found["b"][0]["history"][0]["val_top1"] = None
    assert judge(faster, found, "top1").why == "there is no validation figure of every epoch"


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    """Images alone: one published network, 80 times; 95 % intervals must neither miss often nor always hit."""
    hits, widths = 0, []
    for seed in range(80):
        sample = Sample(per_seed=(per_image(right(0.8, images=300, seed=seed)),), images=("all",))
        _, low, high = interval([(1.0, sample)], seed=seed)
        hits += low <= 0.8 <= high
        widths.append(high - low)
    assert 70 <= hits <= 79
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.sqrt(0.8 * 0.2 / 300), rel=0.1)


def test_few_seeds_keep_the_variance_of_seeds() -> None:
    """The replicates' variance is that of a mean over seeds, s^2 / n with the n - 1 of a sample."""
    values = np.array([0.1, 0.4, 0.2])
    drawn = redraw_seeds(np.tile(values, (100_000, 1)), np.random.default_rng(0))
    assert drawn.mean() == pytest.approx(values.mean(), abs=1e-3)
    assert drawn.var() == pytest.approx(values.var(ddof=1) / 3, rel=0.03)


def test_a_quotient_of_sums_is_drawn_as_one() -> None:
    gained, possible = np.array([1.0, 0.0, 3.0]), np.array([2.0, 0.0, 4.0])
    figure = PerImage(gained=gained, possible=possible)
    assert figure.figure == pytest.approx(4 / 6)
    value, low, high = interval([(1.0, Sample(per_seed=(figure,), images=("x",)))])
    assert low == pytest.approx(0.5)
    assert high == pytest.approx(0.75)
    assert value == pytest.approx(4 / 6)


def test_the_whole_claim() -> None:
    held, open_, lost = (judge(BETTER, found, "top1") for found in (lines(0.9, 0.5), lines(0.8, 0.8), lines(0.5, 0.9)))
    beside = judge(Contrast(says="x", weights=BETTER.weights, decides=False), lines(0.5, 0.9), "top1")
    assert overall([held, beside])[0] is True
    assert overall([held, open_])[0] is None
    assert overall([held, open_])[1].startswith("a is better")
    assert overall([held, open_, lost])[0] is False
    assert "not so: a is better" in overall([lost])[1]
