"""Splits are fair, complete and indifferent to order; names fit for print; fingerprints tell samples apart."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xception.data.labels import (
    count_classes,
    display_names,
    fingerprint,
    name_classes,
    printable,
    stratified_split,
)
from xception.errors import ConfigError, DataError

single = st.lists(st.integers(0, 6), min_size=1, max_size=120)
multiple = st.lists(st.sets(st.integers(0, 5), max_size=4).map(lambda s: tuple(sorted(s))), min_size=1, max_size=80)
fraction = st.sampled_from([0.0, 0.05, 0.1, 0.2, 0.33, 0.45])


def keys_of(targets: list) -> list[str]:
    return [f"image-{index}.png" for index in range(len(targets))]


def deal(targets, seed: int = 0, **fractions: float) -> dict[str, list[int]]:
    return stratified_split(keys_of(targets), targets, fractions=fractions, seed=seed)


@given(st.one_of(single, multiple), fraction, fraction, st.integers(0, 3))
def test_every_sample_is_in_exactly_one_part(targets: list, val: float, test: float, seed: int) -> None:
    parts = deal(targets, seed, val=val, test=test)
    assert list(parts) == ["train", "val", "test"]
    assert sorted(i for part in parts.values() for i in part) == list(range(len(targets)))
    assert all(part == sorted(part) for part in parts.values())


@given(st.one_of(single, multiple), fraction, fraction, st.integers(0, 3))
def test_every_class_keeps_a_training_sample(targets: list, val: float, test: float, seed: int) -> None:
    def classes(indices) -> set[int]:
        chosen = (targets[i] for i in indices)
        return {label for t in chosen for label in ((t,) if isinstance(t, int) else t)}

    parts = deal(targets, seed, val=val, test=test)
    assert classes(parts["train"]) == classes(range(len(targets)))


@given(single, fraction, fraction, st.integers(0, 3))
def test_each_class_is_dealt_in_proportion(targets: list[int], val: float, test: float, seed: int) -> None:
    parts = deal(targets, seed, val=val, test=test)
    sizes = Counter(targets)
    for name, share in (("val", val), ("test", test)):
        counts = Counter(targets[i] for i in parts[name])
        for label, size in sizes.items():
            assert counts[label] <= size * share + 1
            if size * (1 - val - test) >= 2:  # nothing was held back for training
                assert counts[label] > size * share - 1


@given(st.lists(st.integers(0, 3), min_size=60, max_size=200), st.sampled_from([0.1, 0.25]))
def test_parts_have_the_size_that_was_asked_for(targets: list[int], share: float) -> None:
    parts = deal(targets, val=share, test=share)
    if min(Counter(targets).values()) >= 10:
        for name in ("val", "test"):
            assert abs(len(parts[name]) - len(targets) * share) <= 0.5


def test_a_part_that_is_asked_for_is_not_empty_while_there_is_room() -> None:
    assert {name: len(part) for name, part in deal([0, 0, 1, 1], val=0.1, test=0.1).items()} == {
        "train": 2,
        "val": 1,
        "test": 1,
    }
    assert deal([0, 1, 2], val=0.3, test=0.3) == {"train": [0, 1, 2], "val": [], "test": []}
    assert deal([0] * 10, val=0.0, test=0.0)["val"] == []


@given(st.one_of(single, multiple), st.integers(0, 3), st.randoms(use_true_random=False))
def test_the_order_of_the_samples_does_not_matter(targets: list, seed: int, chance: random.Random) -> None:
    keys = keys_of(targets)
    order = list(range(len(targets)))
    chance.shuffle(order)
    fractions = {"val": 0.2, "test": 0.1}
    plain = stratified_split(keys, targets, fractions=fractions, seed=seed)
    mixed = stratified_split([keys[i] for i in order], [targets[i] for i in order], fractions=fractions, seed=seed)
    for name, part in plain.items():
        assert {keys[i] for i in part} == {keys[order[i]] for i in mixed[name]}


def test_the_seed_decides() -> None:
    targets = [0, 1] * 200
    first, again, other = (deal(targets, seed, val=0.2) for seed in (0, 0, 1))
    assert first == again
    assert first["val"] != other["val"]
    common = set(first["val"]) & set(other["val"])
    assert len(common) < 35, "two seeds should agree on about 16 of 80"


def test_the_split_is_pinned() -> None:
    """A golden number: a later version that deals differently would break resumed runs."""
    assert deal([0, 1] * 10, seed=7, val=0.2, test=0.1) == {
        "train": [0, 1, 2, 4, 5, 6, 7, 8, 9, 11, 12, 13, 15, 16],
        "val": [3, 14, 17, 18],
        "test": [10, 19],
    }


@given(single, st.integers(0, 3))
def test_removing_a_sample_moves_few_others(targets: list[int], seed: int) -> None:
    keys = keys_of(targets)

    def part_of(chosen: list[int]) -> dict[str, str]:
        parts = stratified_split(
            [keys[i] for i in chosen], [targets[i] for i in chosen], fractions={"val": 0.2}, seed=seed
        )
        return {keys[chosen[i]]: name for name, part in parts.items() for i in part}

    everything = part_of(list(range(len(targets))))
    fewer = part_of(list(range(1, len(targets)))) if len(targets) > 1 else {}
    moved = sum(everything[key] != part for key, part in fewer.items())
    assert moved <= 2 + 2 * len(set(targets)), "only quotas may shift, by one a class"


@pytest.mark.parametrize(
    "fractions", [{"val": -0.1}, {"val": 1.0}, {"val": 0.5, "test": 0.5}, {"val": "x"}, {"val": float("nan")}]
)
def test_fractions_are_checked(fractions: dict) -> None:
    with pytest.raises(ConfigError, match="fraction"):
        stratified_split(["a"], [0], fractions=fractions, seed=0)


@given(st.text(st.characters(codec=None), max_size=30))
def test_printable_fits_on_one_line_of_any_stream(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert len(shown.splitlines()) <= 1
    assert shown.encode("utf-8").decode() == shown
    assert json.loads(json.dumps(shown)) == shown
    assert printable(shown) == shown


def test_printable_leaves_readable_names_alone_and_shows_bytes() -> None:
    assert printable("Größe/猫 1.jpg") == "Größe/猫 1.jpg"
    assert printable(b"caf\xe9\n.png".decode("utf-8", "surrogateescape")) == "caf\\xe9\\n.png"
    assert printable("\x1b[31mred") == "\\x1b[31mred"
    assert printable("\ud800") == "\\ud800"


def test_class_names_are_sorted_plainly_and_told_apart() -> None:
    assert name_classes(["b", "10", "a", "2", "b"]) == ("10", "2", "a", "b")
    assert display_names(["caf\udce9", "dog"]) == ("caf\\xe9", "dog")
    with pytest.raises(DataError, match=r"caf\\\\xe9"):
        display_names(["caf\udce9", "caf\\xe9"])


def test_counts() -> None:
    assert count_classes([0, 2, 2], 4) == [1, 0, 2, 0]
    assert count_classes([(0, 2), (), (2,)], 3) == [1, 0, 2]


def test_fingerprints_depend_on_everything_but_order() -> None:
    base = {"train": (["a", "b"], [0, 1]), "val": (["c"], [1])}
    same = {"val": (["c"], [1]), "train": (["b", "a"], [1, 0])}
    print_of = fingerprint(base, ("x", "y"))
    assert fingerprint(same, ("x", "y")) == print_of
    assert len(print_of) == 64
    changed = [
        fingerprint(base, ("x", "z")),
        fingerprint({**base, "val": (["d"], [1])}, ("x", "y")),
        fingerprint({**base, "val": (["c"], [0])}, ("x", "y")),
        fingerprint({"train": base["train"], "test": base["val"]}, ("x", "y")),
        fingerprint({"train": base["train"]}, ("x", "y")),
        fingerprint({"train": (["a", "b"], [(0,), (0, 1)]), "val": (["c"], [(1,)])}, ("x", "y")),
    ]
    assert len({print_of, *changed}) == len(changed) + 1


@settings(max_examples=20)
@given(st.lists(st.sampled_from([(0, 1), (0, 2), (1, 2), (0,), ()]), min_size=4, max_size=40))
def test_multi_label_samples_without_labels_are_dealt_too(targets: list[tuple[int, ...]]) -> None:
    parts = deal(targets, val=0.25)
    assert len(parts["train"]) + len(parts["val"]) == len(targets)
