"""fashion-composites: the same bits always, no garment in two parts, labels that are true of the canvas."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xception.data.builtin import FASHION_CLASSES, fashion_arrays
from xception.data.composites import CANVAS, SIDES, compose, open_composites, resample
from xception.data.sources import DataSource, open_source
from xception.data.tar_shards import write_shards
from xception.errors import DataError


@pytest.fixture(scope="module")
def source() -> DataSource:
    return open_source("fashion-composites")


def test_what_there_is(source: DataSource) -> None:
    assert source.multi_label
    assert source.channels == 1
    assert {part: len(split) for part, split in source.splits.items()} == {"train": 12_000, "val": 1_500, "test": 3_000}
    assert set(source.split_origin.values()) == {"given"}
    assert len(source.class_names) == 325
    assert {"Bag", "Bag, small", "Bag, top left", "Bag with Coat", "Bag left of Coat", "Bag above Coat"} <= set(
        source.class_names
    )
    assert 12 < np.mean([len(target) for target in source.splits["train"].targets]) < 14
    assert len(open_composites(seed=1).class_names) == 325


def test_frequencies_have_a_long_tail_and_are_the_weights(source: DataSource) -> None:
    counts = source.counts()["train"]
    shares = {name: n / 12_000 for name, n in counts.items()}
    assert dict(zip(source.class_names, source.importance or (), strict=True)) == shares
    assert shares["T-shirt/top"] > 0.6
    assert 0.001 < min(shares.values()) < 0.003
    order = [shares[name] for name in FASHION_CLASSES]
    assert order == sorted(order, reverse=True)


def test_the_same_bits_always(source: DataSource) -> None:
    """Found once and written down here: other bits would be another data set, and old results of no use."""
    digest = hashlib.sha256()
    for part in ("train", "val", "test"):
        digest.update(source.splits[part].array.tobytes())
    assert digest.hexdigest() == "c6cac72edfbf6588c5a92552061776ea06c5f3573b4c6db32a2c49b44430bcfe"
    assert source.fingerprint == "8ae89345655669cb64f6c2bc5632d0df83223e0f8a1c71edef6762f66e210907"


def test_fewer_are_the_first_of_more(source: DataSource) -> None:
    few = open_source("fashion-composites:800", val_fraction=0)
    assert {part: len(split) for part, split in few.splits.items()} == {"train": 800, "test": 200}
    assert 200 < len(few.class_names) < 325
    for part, split in few.splits.items():
        assert np.array_equal(split.array, source.splits[part].array[: len(split)])
        for index in (0, len(split) - 1):
            known = {few.class_names[k] for k in split.targets[index]}
            everything = {source.class_names[k] for k in source.splits[part].targets[index]}
            assert known == everything & set(few.class_names)


def test_a_composite_depends_on_seed_part_and_number_alone() -> None:
    images, kinds = fashion_arrays(root=None, download=False)["test"]
    a, labels = compose(images, kinds, count=50, seed=5, part=1)
    b, more = compose(images, kinds, count=80, seed=5, part=1)
    assert np.array_equal(a, b[:50])
    assert labels == more[:50]
    for seed, part in ((6, 1), (5, 2)):
        other, _ = compose(images, kinds, count=50, seed=seed, part=part)
        assert not (a == other).all(axis=(1, 2, 3)).any()


def test_labels_are_true_and_garments_lie_in_their_quarters() -> None:
    """Garments of one grey value a class, so that what lies where can be read off the canvas again."""
    kinds = np.arange(10, dtype=np.uint8).repeat(3)
    images = np.full((30, 28, 28), 10, np.uint8) + 20 * kinds[:, None, None]
    canvases, labels = compose(images, kinds, count=400, seed=0, part=0)
    assert canvases.shape == (400, CANVAS, CANVAS, 1)
    for canvas, own in zip(canvases[..., 0], labels, strict=True):
        lying = []
        for quarter, name in enumerate(("top left", "top right", "bottom left", "bottom right")):
            cell = canvas[quarter // 2 * 24 :, quarter % 2 * 24 :][:24, :24]
            values = np.unique(cell[cell > 0])
            if len(values):
                assert len(values) == 1
                side = round(float(np.sqrt((cell > 0).sum())))
                assert side in SIDES
                kind = FASHION_CLASSES[(int(values[0]) - 10) // 20]
                lying.append((kind, "large" if side == SIDES[0] else "small", name))
        assert 1 <= len(lying) <= 4
        expected = {k for k, _, _ in lying} | {f"{k}, {s}" for k, s, _ in lying} | {f"{k}, {q}" for k, _, q in lying}
        for i, (a, _, here) in enumerate(lying):
            for j, (b, _, there) in enumerate(lying):
                if i < j:
                    expected.add(" with ".join(sorted([a, b])))
                if "left" in here and "right" in there:
                    expected.add(f"{a} left of {b}")
                if "top" in here and "bottom" in there:
                    expected.add(f"{a} above {b}")
        assert set(own) == expected


def test_parts_share_no_garment(source: DataSource) -> None:
    """The garments of each part, by where they were taken from: the pools do not overlap, and nor do the canvases."""
    train, _ = fashion_arrays(root=None, download=False)["train"]
    first = compose(
        train[:54_000], fashion_arrays(root=None, download=False)["train"][1][:54_000], count=5, seed=0, part=0
    )
    assert np.array_equal(first[0], source.splits["train"].array[:5])
    labels = fashion_arrays(root=None, download=False)["train"][1]
    last = compose(train[54_000:], labels[54_000:], count=5, seed=0, part=1)
    assert np.array_equal(last[0], source.splits["val"].array[:5])
    test = compose(*fashion_arrays(root=None, download=False)["test"], count=5, seed=0, part=2)
    assert np.array_equal(test[0], source.splits["test"].array[:5])


@given(st.integers(1, 28), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_resampling_is_the_mean_of_the_area(side: int, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (1, 28, 28), np.uint8)
    fine = image[0].repeat(side, 0).repeat(side, 1).astype(np.int64)  # each pixel as side x side parts
    sums = fine.reshape(side, 28, side, 28).sum(axis=(1, 3))
    expected = np.floor(sums / 28**2 + 0.5)
    assert np.array_equal(resample(image, side)[0], expected)


def test_as_shards_they_are_the_same(tmp_path: Path) -> None:
    source = open_source("fashion-composites:100")
    write_shards(source, tmp_path / "shards", images_per_shard=40)
    again = open_source(tmp_path / "shards")
    assert [path.name for path in sorted((tmp_path / "shards").iterdir())] == [
        "class_weights.json", "test-000000.tar", "train-000000.tar", "train-000001.tar", "train-000002.tar",
        "val-000000.tar",
    ]  # fmt: skip
    assert (again.class_names, again.importance, again.multi_label) == (source.class_names, source.importance, True)
    for part, split in source.splits.items():
        assert again.splits[part].targets == split.targets
        for index in range(len(split)):
            assert np.array_equal(again.splits[part].image(index)[..., :1], split.image(index))


@pytest.mark.parametrize(
    "text", ["", "99", "200001", "-5", "1e3", "\u0661\u0660\u0660\u0660", "1_000", " 500", "9" * 5000]
)
def test_numbers_out_of_range(text: str) -> None:
    with pytest.raises(DataError, match="a number of training images from 100 to 200,000") as caught:
        open_source(f"fashion-composites:{text}")
    assert len(str(caught.value)) < 200


def test_without_fashion_mnist_it_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"fashion-mnist: no files in .*dataset-fashion-mnist"):
        open_source("fashion-composites", root=tmp_path)
