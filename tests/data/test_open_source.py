"""What a word on the command line is taken for, what opening costs, and what a source says about itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from image_files import write_classes

from xception.data.builtin import array_split
from xception.data.sources import ArraySplit, DataSource, SplitPlan, all_samples, drop_samples, open_source, without
from xception.data.split import Concatenation, Subset, build_source, concatenate, select
from xception.errors import ConfigError, DataError


def test_words_for_built_in_sets_win_and_paths_are_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_classes(tmp_path / "digits", {"dog": 3, "cat": 3})
    write_classes(tmp_path / "cifar10", {"dog": 3, "cat": 3})
    assert len(open_source("digits").class_names) == 10
    for spec in ("./digits", Path("digits"), tmp_path / "digits", "cifar10", "digits/"):
        assert open_source(spec).class_names == ("cat", "dog"), spec


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("digit", "did you mean digits"),
        ("fashionmnst", "FashionMNIST"),
        ("imagse", "did you mean images"),
        ("", ""),
        ("a\0b", ""),
    ],
)
def test_unknown_words_get_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, hint: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    with pytest.raises(
        DataError, match=r"expected a folder of class folders, a \.csv file, \.tar or \.parquet shards, 'digits'"
    ) as caught:
        open_source(spec)
    assert hint in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_path_that_is_missing_is_not_taken_for_a_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data at"):
        open_source(Path("mnist"))
    with pytest.raises(DataError, match="no data at"):
        open_source(tmp_path / "none.csv")


def test_special_files_are_refused() -> None:
    with pytest.raises(DataError, match="expected a folder"):
        open_source("/dev/null")


def test_looking_at_data_needs_neither_torch_nor_pillow(tmp_path: Path) -> None:
    write_classes(tmp_path / "data", {"dog": 3, "cat": 3})
    (tmp_path / "data.csv").write_text("a.png,x\nb.png,y\n")
    code = """
import sys
from xception.data import augment, check, labels, preprocess, sampling, sources, split
augment.Augment(mixup=0.2), preprocess.Preprocess(size=(8, 8)).to_dict()
for spec in ("data", "data.csv", "digits"):
    sources.open_source(spec).counts()
print(sorted({"torch", "torchvision", "PIL"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize(
    "options", [{"val_fraction": 1.5}, {"test_fraction": -1}, {"val_fraction": 0.5, "test_fraction": 0.5}]
)
def test_fractions_are_checked_before_anything_else(options: dict) -> None:
    with pytest.raises(ConfigError, match="fraction"):
        open_source("nothing there", **options)


def arrays(count: int, prefix: str = "a", seed: int = 0) -> ArraySplit:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 4, 5, 1), dtype=np.uint8)
    return array_split(pixels, [n % 2 for n in range(count)], prefix)


def test_selecting_keeps_images_keys_and_targets_together() -> None:
    base = arrays(9)
    for split in (base, Subset(base, range(9), base.keys, base.targets)):
        some = select(split, [7, 2, 2, 0])
        assert list(some.keys) == ["a/0007", "a/0002", "a/0002", "a/0000"]
        assert list(some.targets) == [1, 0, 0, 0]
        assert np.array_equal(some.image(1), base.array[2])
        again = without(some, {0})
        assert len(again) == 3
        assert np.array_equal(again.image(2), base.array[0])
    assert without(base, ()) is base


def test_concatenating_keeps_order() -> None:
    one, two = arrays(4), arrays(3, "b", seed=1)
    both = concatenate([one, two])
    assert isinstance(both, Concatenation)
    assert list(both.keys) == [*one.keys, *two.keys]
    assert np.array_equal(both.image(3), one.array[3])
    assert np.array_equal(both.image(4), two.array[0])
    with pytest.raises(IndexError):
        both.image(7)
    parts = [select(one, [3, 1]), select(one, [0])]
    joined = concatenate(parts)
    assert isinstance(joined, ArraySplit)
    assert joined.array is one.array
    assert list(joined.keys) == ["a/0003", "a/0001", "a/0000"]


def test_parts_of_one_array_share_it() -> None:
    source = open_source("digits")
    arrays = {id(split.array) for split in source.splits.values() if isinstance(split, ArraySplit)}
    assert len(arrays) == 1
    assert isinstance(all_samples(source), ArraySplit)


def test_a_source_refuses_what_cannot_be_trained_on() -> None:
    split = arrays(6)
    plan = SplitPlan()
    with pytest.raises(DataError, match="no samples"):
        build_source("x", ("a", "b"), {"all": select(split, [])}, plan=plan)
    with pytest.raises(DataError, match="'c' has no sample to train on"):
        build_source("x", ("a", "b", "c"), {"all": split}, plan=plan)
    with pytest.raises(DataError, match="more than once"):
        build_source("x", ("a", "b"), {"train": split, "test": split}, plan=plan)
    with pytest.raises(DataError, match="two classes"):
        build_source("x", ("a",), {"all": select(split, [0, 2])}, plan=plan)


def test_dropping_samples_equals_never_having_had_them(tmp_path: Path) -> None:
    counts = {"dog": 30, "cat": 20}
    whole = open_source(write_classes(tmp_path / "whole", counts), seed=5)
    write_classes(tmp_path / "fewer", counts)
    gone = [key for number, key in enumerate(all_samples(whole).keys) if number % 7 == 0]
    for key in gone:
        (tmp_path / "fewer" / key).unlink()
    cleaned, reference = drop_samples(whole, gone), open_source(tmp_path / "fewer", seed=5)
    assert cleaned.fingerprint == reference.fingerprint
    assert cleaned.counts() == reference.counts()
    for part, split in reference.splits.items():
        assert split.keys == cleaned.splits[part].keys
        assert split.targets == cleaned.splits[part].targets
    assert drop_samples(whole, []) is whole


def test_one_class_is_enough_to_evaluate_on(tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "data", {"dog": 9})
    with pytest.raises(DataError, match="at least two classes"):
        open_source(folder)
    source = open_source(folder, min_classes=1)
    assert source.class_names == ("dog",)
    assert drop_samples(source, [source.splits["train"].keys[0]]).class_names == ("dog",)


def test_a_path_may_be_bytes(tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "data", {"dog": 3, "cat": 3})
    assert open_source(os.fsencode(folder)).fingerprint == open_source(folder).fingerprint


def test_a_source_can_be_put_together_by_hand() -> None:
    split = arrays(4)
    source = DataSource("mine", ("a", "b"), False, 1, {"train": split}, {"train": "given"}, "f")
    assert source.counts() == {"train": {"a": 2, "b": 2}}
    assert len(drop_samples(source, ["a/0000"]).splits["train"]) == 3
