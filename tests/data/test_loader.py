"""The contract of batches: complete, in order, the same wherever and however they are made, bad samples left out."""

from __future__ import annotations

import itertools
import os
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import picture, write_classes

from xception.data.augment import Augment
from xception.data.builtin import array_split
from xception.data.check import clean_source
from xception.data.loader import Batch, Loader
from xception.data.preprocess import Preprocess
from xception.data.sources import ArraySplit, BadImage, all_samples, open_source
from xception.data.split import Subset, select
from xception.errors import ConfigError, DataError, ImageError

GREY = Preprocess(size=(8, 8), channels=1)
FULL = Augment(
    random_resized_crop=(0.4, 1.0), translate_pixels=1, horizontal_flip=0.5, rand_augment=2, random_erasing=0.5
)
LIGHT = Augment(translate_pixels=1, horizontal_flip=0.5)


def arrays(count: int, size: int = 8, channels: int = 1, classes: int = 3) -> ArraySplit:
    pixels = np.random.default_rng(0).integers(0, 256, (count, size, size, channels), dtype=np.uint8)
    return array_split(pixels, [n % classes for n in range(count)], "a")


def loader(split=None, preprocess: Preprocess = GREY, **options) -> Loader:
    options = {"num_classes": 3, "batch_size": 8, **options}
    return Loader(arrays(50) if split is None else split, preprocess, **options)


def same(one: Batch, two: Batch) -> bool:
    tensors = all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one[:3], two[:3], strict=True))
    return tensors and one.bad == two.bad


def all_same(one, two) -> bool:
    return all(same(a, b) for a, b in zip(one, two, strict=True))


def test_plain_batches_are_the_split_in_order() -> None:
    split = arrays(50)
    batches = list(loader(split).epoch(0))
    assert len(batches) == len(loader(split)) == 7
    assert [len(batch.images) for batch in batches] == [8] * 6 + [2]
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(50))
    assert torch.cat([batch.targets for batch in batches]).tolist() == list(split.targets)
    expected = torch.stack([GREY(split.image(index)) for index in range(50)])
    assert torch.equal(torch.cat([batch.images for batch in batches]), expected)
    first = batches[0]
    assert first.images.shape == (8, 1, 8, 8)
    assert (first.images.dtype, first.targets.dtype, first.indices.dtype) == (torch.float32, torch.int64, torch.int64)
    assert first.images.is_contiguous()
    assert first.bad == ()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.booleans(), st.booleans(), st.integers(0, 5))
def test_every_sample_comes_once(count: int, size: int, shuffle: bool, drop_last: bool, epoch: int) -> None:
    made = loader(arrays(count), batch_size=size, shuffle=shuffle, drop_last=drop_last, augment=LIGHT)
    batches = list(made.epoch(epoch))
    assert len(batches) == len(made)
    seen = [index for batch in batches for index in batch.indices.tolist()]
    assert len(set(seen)) == len(seen) == (count // size * size if drop_last else count)


@pytest.mark.parametrize("augment", [None, LIGHT, FULL, Augment(mixup=0.4, cutmix=0.4, horizontal_flip=0.5)])
@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("balanced", [False, True])
def test_the_tail_of_an_epoch_is_the_same_from_any_start_and_any_workers(augment, workers: int, balanced: bool) -> None:
    split = arrays(45, size=10, channels=3)
    options = {"augment": augment, "seed": 3, "shuffle": True, "balanced": balanced}
    preprocess = Preprocess(size=(8, 9))
    whole = list(loader(split, preprocess, **options).epoch(2))
    with loader(split, preprocess, workers=workers, **options) as made:
        for start in (0, 1, 4, len(made)):
            assert all_same(made.epoch(2, start_batch=start), whole[start:])


def test_workers_and_threads_do_not_change_large_images() -> None:
    """RandAugment's contrast sums over the image, which torch does in another order on more threads."""
    split = select(array_split(np.stack([picture(300, 300, seed=n) for n in range(6)]), [0, 1, 2] * 2, "a"), range(6))
    options = {"augment": Augment(rand_augment=4, rand_augment_magnitude=20), "batch_size": 3}
    preprocess = Preprocess(size=(256, 256))
    before = torch.get_num_threads()
    results = []
    try:
        for threads, workers in ((1, 0), (4, 0), (4, 2)):
            torch.set_num_threads(threads)
            with loader(split, preprocess, workers=workers, **options) as made:
                results.append([batch for epoch in range(4) for batch in made.epoch(epoch)])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all_same(results[0], results[1])
    assert all_same(results[0], results[2])


def test_a_sample_does_not_depend_on_its_company() -> None:
    """Whatever the batch size and the order, sample 17 of epoch 4 looks the same."""
    split = arrays(50)
    looks = []
    for size, shuffle in itertools.product((1, 7, 50), (False, True)):
        for batch in loader(split, batch_size=size, shuffle=shuffle, augment=FULL, seed=9).epoch(4):
            where = (batch.indices == 17).nonzero()
            looks += [batch.images[int(where[0])]] if len(where) else []
    assert len(looks) == 6
    assert all(torch.equal(look, looks[0]) for look in looks)


def test_memory_and_files_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast path for arrays fits and pads all at once; it must not show."""
    split = arrays(30, size=9, channels=3)
    indirect = Subset(split, range(30), split.keys, split.targets)
    for preprocess in (
        GREY,
        Preprocess(size=(12, 7)),
        Preprocess(size=(9, 9)),
        Preprocess(size=(12, 12), resize="squash"),
    ):
        for augment in (None, LIGHT, FULL):
            direct = list(loader(split, preprocess, augment=augment, shuffle=True).epoch(1))
            assert all_same(direct, loader(indirect, preprocess, augment=augment, shuffle=True).epoch(1))
            with monkeypatch.context() as patch:
                patch.setattr("xception.data.loader._MAX_CACHE_BYTES", 0)
                assert all_same(direct, loader(split, preprocess, augment=augment, shuffle=True).epoch(1))


def test_parts_of_an_array_are_their_own_samples() -> None:
    base = arrays(30)
    part = select(base, [4, 21, 7])
    (batch,) = loader(part).epoch(0)
    assert torch.equal(batch.images, torch.stack([GREY(base.image(index)) for index in (4, 21, 7)]))
    assert batch.targets.tolist() == [1, 0, 1]


def test_batches_belong_to_the_caller() -> None:
    made = loader()
    for batch in made.epoch(0):
        batch.images.zero_()
        batch.targets.zero_()
    assert all_same(made.epoch(0), loader().epoch(0))


def test_epochs_and_seeds_differ_in_order_and_augmentation() -> None:
    split = arrays(40)
    orders, looks = set(), set()
    for seed, epoch in itertools.product((0, 1), (0, 1, 2)):
        (batch,) = loader(split, batch_size=40, shuffle=True, seed=seed).epoch(epoch)
        orders.add(tuple(batch.indices.tolist()))
        (batch,) = loader(split, batch_size=40, augment=FULL, seed=seed).epoch(epoch)
        looks.add(batch.images.numpy().tobytes())
    assert len(orders) == len(looks) == 6


def test_the_caller_s_random_numbers_are_left_alone() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    epoch = loader(augment=Augment(horizontal_flip=0.5, mixup=0.5), shuffle=True).epoch(0)
    first = next(epoch)
    assert torch.equal(torch.get_rng_state(), state), "between batches too"
    torch.manual_seed(6)
    rest = list(epoch)
    assert torch.initial_seed() == 6
    again = list(loader(augment=Augment(horizontal_flip=0.5, mixup=0.5), shuffle=True).epoch(0))
    assert all_same([first, *rest], again)


def test_balanced_epochs_draw_every_class_alike_and_never_the_same_picture_twice() -> None:
    targets = [0] * 40 + [1] * 8
    split = array_split(np.stack([picture(24, 24, seed=n) for n in range(48)]), targets, "a")
    augment = Augment(random_resized_crop=(0.3, 0.9))
    batches = list(loader(split, Preprocess(size=(8, 8)), num_classes=2, balanced=True, augment=augment).epoch(0))
    indices = torch.cat([batch.indices for batch in batches]).tolist()
    assert Counter(targets[index] for index in indices) == {0: 24, 1: 24}
    looks = {image.numpy().tobytes() for batch in batches for image in batch.images}
    assert len(looks) == 48, "a sample that is drawn again is augmented anew"


def test_targets_of_several_labels() -> None:
    base = arrays(4)
    split = ArraySplit(base.array, base.rows, base.keys, ((0, 2), (), (1,), (0, 1, 2)))
    (batch,) = loader(split, multi_label=True).epoch(0)
    assert batch.targets.dtype == torch.float32
    assert batch.targets.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]]
    (mixed,) = loader(split, multi_label=True, augment=Augment(mixup=1.0)).epoch(0)
    assert torch.allclose(mixed.targets.sum(0), batch.targets.sum(0))


def test_mixing_gives_soft_targets_that_depend_on_the_batch() -> None:
    augment = Augment(mixup=0.5)
    first = list(loader(augment=augment).epoch(0))
    assert all(batch.targets.shape == (len(batch.images), 3) for batch in first)
    assert all(torch.allclose(batch.targets.sum(1), torch.ones(len(batch.images))) for batch in first)
    shares = {round(float(batch.targets.max()), 4) for batch in first}
    assert len(shares) > 1, "each batch has its own"
    assert all_same(first, loader(augment=augment).epoch(0))
    assert not same(first[0], next(loader(augment=augment).epoch(1)))


class Flawed:
    """Samples 3, 4, 5 and 9 cannot be decoded."""

    keys = tuple(f"k{index}" for index in range(12))
    targets = (0, 1, 2) * 4

    def __len__(self) -> int:
        return 12

    def image(self, index: int) -> np.ndarray:
        if index in (3, 4, 5, 9):
            raise ImageError(f"flaw {index}")
        return picture(10, 10, seed=index)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("augment", [None, FULL, Augment(mixup=0.5), Augment(cutmix=0.5)])
def test_bad_samples_are_left_out_of_their_batch_and_reported(workers: int, augment) -> None:
    preprocess = Preprocess(size=(8, 8))
    with loader(Flawed(), preprocess, batch_size=3, workers=workers, augment=augment) as made:
        batches = list(made.epoch(0))
    assert [batch.indices.tolist() for batch in batches] == [[0, 1, 2], [], [6, 7, 8], [10, 11]]
    assert [batch.bad for batch in batches] == [
        (),
        (BadImage("k3", "flaw 3"), BadImage("k4", "flaw 4"), BadImage("k5", "flaw 5")),
        (),
        (BadImage("k9", "flaw 9"),),
    ]
    assert batches[1].images.shape == (0, 3, 8, 8)
    assert batches[1].images.dtype == torch.float32
    assert batches[1].targets.shape[0] == 0
    assert batches[1].targets.dtype == batches[0].targets.dtype
    for batch in batches:
        assert len(batch.images) == len(batch.targets) == len(batch.indices)


def test_a_sample_looks_the_same_with_or_without_bad_ones_beside_it() -> None:
    class Sound(Flawed):
        def image(self, index: int) -> np.ndarray:
            return picture(10, 10, seed=index)

    flawed = {
        int(i): image
        for b in loader(Flawed(), Preprocess(size=(8, 8)), augment=FULL).epoch(0)
        for i, image in zip(b.indices, b.images, strict=True)
    }
    sound = {
        int(i): image
        for b in loader(Sound(), Preprocess(size=(8, 8)), augment=FULL).epoch(0)
        for i, image in zip(b.indices, b.images, strict=True)
    }
    assert len(flawed) == 8
    assert all(torch.equal(image, sound[index]) for index, image in flawed.items())


def test_a_cleaned_folder_gives_the_batches_of_one_without_the_bad_files(tmp_path: Path) -> None:
    counts = {"cat": 30, "dog": 30}
    damaged, cleaned = write_classes(tmp_path / "damaged", counts), write_classes(tmp_path / "cleaned", counts)
    for name in ("cat/007.png", "dog/020.png"):
        (damaged / name).write_bytes(b"broken")
        (cleaned / name).unlink()
    source, _ = clean_source(open_source(damaged), max_bad_share=0.1)
    options = {"num_classes": 2, "batch_size": 7, "augment": FULL, "shuffle": True}
    preprocess = Preprocess(size=(10, 10))
    for part, split in open_source(cleaned).splits.items():
        for epoch in (0, 1):
            ours = Loader(source.splits[part], preprocess, **options).epoch(epoch)
            assert all_same(ours, Loader(split, preprocess, **options).epoch(epoch))


def test_a_file_that_goes_bad_later_is_reported(tmp_path: Path) -> None:
    split = all_samples(open_source(write_classes(tmp_path, {"cat": 4, "dog": 4})))
    with Loader(split, Preprocess(size=(8, 8)), num_classes=2, batch_size=8, workers=1) as made:
        assert len(next(made.epoch(0)).images) == 8
        (tmp_path / split.keys[2]).unlink()
        batch = next(made.epoch(1))
    assert batch.bad == (BadImage(split.keys[2], "cannot be read: No such file or directory"),)
    assert len(batch.images) == 7


def test_other_errors_are_not_taken_for_bad_images() -> None:
    class Broken(Flawed):
        def image(self, index: int) -> np.ndarray:
            return np.zeros((4, 4, 7), np.uint8)

    for workers in (0, 1):
        with loader(Broken(), workers=workers) as made, pytest.raises(ConfigError, match="1 or 3 channels"):
            list(made.epoch(0))


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_worker_that_is_killed_changes_nothing() -> None:
    split, preprocess = arrays(60, size=10, channels=3), Preprocess(size=(8, 9))
    options = {"augment": FULL, "shuffle": True, "batch_size": 2}
    expected = list(loader(split, preprocess, **options).epoch(0))
    with loader(split, preprocess, workers=2, **options) as made:
        got = []
        for number, batch in enumerate(made.epoch(0)):
            got.append(batch)
            if number in (2, 9, 10, 20):
                assert made._pool is not None
                os.kill(made._pool.pids()[number % 2], signal.SIGKILL)
    assert all_same(expected, got)


def test_an_epoch_that_is_left_early_does_not_disturb_the_next() -> None:
    with loader(workers=2, shuffle=True) as made:
        next(made.epoch(0))
        half = made.epoch(0)
        next(half)
        other = list(made.epoch(1))
        assert all_same(other, loader(shuffle=True).epoch(1))
        assert all_same(half, list(loader(shuffle=True).epoch(0))[1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 2.0}, "batch_size"),
        ({"num_classes": 0}, "num_classes"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"workers": -1}, "workers"),
        ({"workers": True}, "workers"),
        ({"balanced": True, "multi_label": True}, "balanced"),
    ],
)
def test_settings_are_checked(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loader(**options)


@pytest.mark.parametrize(
    ("targets", "multi_label", "message"),
    [
        ([0, 3], False, "from 0 to 2"),
        ([0, -1], False, "from 0 to 2"),
        ([(0, 1), (2, 3)], True, "from 0 to 2, got 3"),
        ([0, 1], True, "tuples of class indices"),
        ([(0,), (1, 2)], False, "class indices"),
        ([(0, 1), (1, 2)], False, "class indices"),
        ([0], False, "a target for each of 2"),
    ],
)
def test_targets_are_checked(targets: list, multi_label: bool, message: str) -> None:
    base = arrays(2)
    with pytest.raises(DataError, match=message):
        loader(ArraySplit(base.array, base.rows, base.keys, targets), multi_label=multi_label)


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(DataError, match="empty"):
        loader(select(arrays(3), []))


@pytest.mark.parametrize(("epoch", "start"), [(-1, 0), (0.5, 0), (0, -1), (0, 8), (0, True)])
def test_places_are_checked_at_once(epoch, start) -> None:
    with pytest.raises(ConfigError, match=r"epoch|start_batch"):
        loader().epoch(epoch, start)


@pytest.mark.slow
def test_small_images_in_memory_are_augmented_fast() -> None:
    """5,000 a second on one core; about 9,000 were measured on a shared machine."""
    import time

    split = arrays(20_000, size=28)
    made = loader(
        split,
        Preprocess(size=(28, 28), channels=1),
        batch_size=128,
        augment=Augment(translate_pixels=2, horizontal_flip=0.5),
    )
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        next(made.epoch(0))
        start = time.process_time()
        for _ in made.epoch(1):
            pass
        assert len(split) / (time.process_time() - start) > 5000
    finally:
        torch.set_num_threads(before)


def test_label_sets_as_vectors_are_made_a_batch_at_a_time() -> None:
    """As many samples and classes as the paper's evaluation set has; all vectors together would be 0.95 GB."""
    count, classes = 14_000, 17_000
    rng = np.random.default_rng(0)
    targets = tuple(tuple(sorted(set(rng.integers(0, classes, size).tolist()))) for size in rng.integers(0, 70, count))
    base = ArraySplit(
        np.zeros((1, 8, 8, 1), np.uint8), np.zeros(count, np.int64), tuple(map(str, range(count))), targets
    )
    made = loader(base, num_classes=classes, multi_label=True, batch_size=50, shuffle=True)
    for batch in itertools.islice(made.epoch(0), 3):
        assert batch.targets.shape == (50, classes)
        assert batch.targets.dtype == torch.float32
        for index, row in zip(batch.indices.tolist(), batch.targets, strict=True):
            assert tuple(row.nonzero().flatten().tolist()) == targets[index]
            assert set(row.tolist()) <= {0.0, 1.0}
    assert sum(t.numel() * t.itemsize for t in vars(made._targets).values() if isinstance(t, torch.Tensor)) < 8 << 20
