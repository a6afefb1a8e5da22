"""Targets change, images and keys do not."""

from __future__ import annotations

import numpy as np
import pytest

from xception.data.relabel import as_label_sets, with_labels_of, with_targets
from xception.data.split import ArraySplit
from xception.errors import DataError


def split(targets: tuple[object, ...]) -> ArraySplit:
    n = len(targets)
    array = np.arange(n, dtype=np.uint8).reshape(n, 1, 1, 1)
    return ArraySplit(array, np.arange(n), tuple(f"k{i}" for i in range(n)), targets)  # type: ignore[arg-type]


def test_label_sets() -> None:
    sets = as_label_sets(split((2, 0, 1)))
    assert sets.targets == ((2,), (0,), (1,))
    assert as_label_sets(sets).targets == sets.targets


def test_classes_are_found_by_name() -> None:
    original = split((0, 1, 0))
    other = with_labels_of(original, ["cat", "dog"], ["ant", "dog", "cat"])
    assert list(other.targets) == [2, 1, 2]
    assert other.keys == original.keys
    assert all(np.array_equal(other.image(i), original.image(i)) for i in range(3))
    assert with_labels_of(original, ["cat", "dog"], ["cat", "dog"]) is original


def test_several_labels_stay_sorted() -> None:
    other = with_labels_of(split(((0, 1), (), (1,))), ["cat", "dog"], ["dog", "cat"])
    assert list(other.targets) == [(0, 1), (), (0,)]


def test_only_classes_that_occur_must_be_known() -> None:
    assert list(with_labels_of(split((0, 0)), ["cat", "dog"], ["cat"]).targets) == [0, 0]
    with pytest.raises(DataError, match="dog"):
        with_labels_of(split((0, 1)), ["cat", "dog"], ["cat"])


def test_any_split_can_be_relabelled() -> None:
    class Foreign:
        keys = ("a", "b")
        targets = (0, 1)

        def __len__(self) -> int:
            return 2

        def image(self, index: int) -> np.ndarray:
            return np.full((1, 1, 3), index, np.uint8)

    other = with_targets(Foreign(), (5, 6))
    assert (list(other.targets), list(other.keys), int(other.image(1)[0, 0, 0])) == ([5, 6], ["a", "b"], 1)


def test_imagenets_folders_are_in_the_order_of_its_classes() -> None:
    ids = [f"n{1440764 + 7 * k:08d}" for k in range(1000)]
    words = ["tench", "goldfish", *(f"class {k}" for k in range(2, 1000))]
    shuffled = [*ids[500:], *ids[:500]]
    split = ArraySplit(np.zeros((2, 1, 1, 1), np.uint8), np.arange(2), ("a", "b"), (0, 999))
    assert with_labels_of(split, shuffled, words).targets == (500, 499)
    with pytest.raises(DataError, match="does not know"):  # some of them have no order
        with_labels_of(split, [*ids[1:], "other"], words)
    with pytest.raises(DataError, match="does not know"):  # and another network's classes another
        with_labels_of(split, ids, ["one", "two", *words[2:]])
