"""Orders and seeds: complete, balanced, repeatable, and without relation between neighbours."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from xception.data.sampling import balanced_order, batch_seed, epoch_order, occurrences, sample_seed

counts = st.integers(0, 300)
seeds = st.integers(0, 2**63 - 1)


@given(counts, seeds, st.integers(0, 1000))
def test_an_epoch_has_every_sample_once(count: int, seed: int, epoch: int) -> None:
    order = epoch_order(count, seed=seed, epoch=epoch, shuffle=True)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(count))
    assert np.array_equal(order, epoch_order(count, seed=seed, epoch=epoch, shuffle=True))
    assert epoch_order(count, seed=seed, epoch=epoch, shuffle=False).tolist() == list(range(count))


def test_seeds_and_epochs_give_other_orders() -> None:
    orders = {tuple(epoch_order(50, seed=s, epoch=e, shuffle=True)) for s in range(6) for e in range(6)}
    assert len(orders) == 36


def test_every_place_is_equally_likely() -> None:
    """1,000 shuffles of 8: each sample is in each place about 125 times (standard deviation 10.5)."""
    places = np.zeros((8, 8), int)
    for epoch in range(1000):
        places[np.arange(8), epoch_order(8, seed=0, epoch=epoch, shuffle=True)] += 1
    assert np.abs(places - 125).max() < 50


def test_orders_are_pinned() -> None:
    """Golden numbers: another order in a later version would break resumed runs."""
    assert epoch_order(8, seed=1, epoch=2, shuffle=True).tolist() == [7, 4, 6, 2, 0, 5, 3, 1]
    assert balanced_order([0, 0, 0, 0, 1, 1], seed=1, epoch=2).tolist() == [4, 4, 5, 1, 3, 0]
    assert sample_seed(1, 2, 3) == 5394557053432161172


def test_the_generator_s_state_is_its_own() -> None:
    np.random.seed(0)  # noqa: NPY002 - the global state is what must not matter
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    epoch_order(100, seed=0, epoch=0, shuffle=True)
    balanced_order([0, 1] * 50, seed=0, epoch=0)
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002


labels = st.lists(st.integers(0, 9), min_size=1, max_size=200)


@given(labels, seeds, st.integers(0, 100))
def test_balanced_epochs_draw_every_class_alike(targets: list[int], seed: int, epoch: int) -> None:
    order = balanced_order(targets, seed=seed, epoch=epoch)
    assert len(order) == len(targets)
    drawn = Counter(targets[i] for i in order)
    assert max(drawn.values()) - min((drawn[label] for label in set(targets)), default=0) <= 1
    for label in set(targets):
        members = [i for i, target in enumerate(targets) if target == label]
        times = Counter(i for i in order.tolist() if targets[i] == label)
        assert max((times[i] for i in members), default=0) - min(times[i] for i in members) <= 1
    assert np.array_equal(order, balanced_order(targets, seed=seed, epoch=epoch))


def test_balanced_epochs_are_shuffled_and_differ() -> None:
    targets = [0] * 90 + [1] * 10
    first, second = (balanced_order(targets, seed=0, epoch=epoch) for epoch in (0, 1))
    assert not np.array_equal(first, second)
    drawn = np.array(targets)[first]
    assert 15 < drawn[:50].sum() < 35, "the classes are mixed"


@given(st.lists(st.integers(0, 5), max_size=60))
def test_occurrences_count_earlier_draws(order: list[int]) -> None:
    got = occurrences(np.array(order, np.int64))
    assert got.tolist() == [order[:place].count(index) for place, index in enumerate(order)]


def test_sample_seeds_are_all_different_and_well_mixed() -> None:
    seeds = [sample_seed(s, e, i, d) for s in range(3) for e in range(10) for i in range(200) for d in range(2)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**64 for seed in seeds)
    ones = np.mean([seed.bit_count() for seed in seeds])
    assert abs(ones - 32) < 0.3
    neighbours = [(sample_seed(0, 0, i) ^ sample_seed(0, 0, i + 1)).bit_count() for i in range(500)]
    assert abs(np.mean(neighbours) - 32) < 1.5


def test_batch_seeds_depend_on_the_samples_and_their_order() -> None:
    some = np.array([1, 2, 3])
    seeds = {
        batch_seed(0, 0, some),
        batch_seed(0, 1, some),
        batch_seed(1, 0, some),
        batch_seed(0, 0, some[::-1]),
        batch_seed(0, 0, some[:2]),
    }
    assert len(seeds) == 5
    assert batch_seed(0, 0, some) == batch_seed(0, 0, np.array([1, 9, 2, 9, 3, 9])[::2])
