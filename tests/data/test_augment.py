"""Each augmentation does what its name says, within its bounds, and only random numbers of its own are used."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import picture

from xception.data.augment import Augment, SampleAugmenter, isolated_rng, mix_batch
from xception.data.preprocess import Preprocess
from xception.errors import ConfigError

SQUARE = Preprocess(size=(20, 20))


def run(augment: Augment, image: np.ndarray, seed: int, preprocess: Preprocess = SQUARE) -> torch.Tensor:
    with isolated_rng() as reseed:
        reseed(seed)
        return SampleAugmenter(augment, preprocess)(image)


every = st.builds(
    Augment,
    random_resized_crop=st.sampled_from([None, (0.2, 0.9), (1.0, 1.0)]),
    translate_pixels=st.sampled_from([0, 1, 5, 30]),
    horizontal_flip=st.sampled_from([0.0, 0.5, 1.0]),
    rand_augment=st.sampled_from([0, 1, 3]),
    rand_augment_magnitude=st.sampled_from([0, 9, 30]),
    random_erasing=st.sampled_from([0.0, 0.5, 1.0]),
)


@settings(max_examples=150, deadline=None)
@given(every, st.sampled_from([(20, 20), (9, 40), (64, 48)]), st.sampled_from([1, 3]), st.integers(0, 2**64 - 1))
def test_any_combination_gives_an_input_and_repeats(augment: Augment, shape, channels: int, seed: int) -> None:
    preprocess = Preprocess(size=(20, 24), channels=channels)
    image = picture(*shape)
    first = run(augment, image, seed, preprocess)
    assert first.shape == (channels, 20, 24)
    assert first.dtype == torch.uint8
    assert torch.equal(first, run(augment, image, seed, preprocess))


@pytest.mark.parametrize("channels", [1, 3])
def test_other_random_numbers_are_neither_used_nor_moved(channels: int) -> None:
    augment = Augment(
        random_resized_crop=(0.3, 1), translate_pixels=3, horizontal_flip=0.5, rand_augment=3, random_erasing=0.5
    )
    preprocess = Preprocess(size=(20, 20), channels=channels)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
        results.append(torch.stack([run(augment, picture(30, 30), n, preprocess) for n in range(60)]))
        assert torch.equal(torch.get_rng_state(), states[0])
        assert random.getstate() == states[1]
        assert np.array_equal(np.random.get_state()[1], states[2])  # noqa: NPY002
    assert torch.equal(*results)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([0, 1, 2, 7]),
    st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    st.sampled_from([0.0, 0.25, 1.0]),
    st.sampled_from([(20, 20), (28, 17), (3, 2), (1, 1)]),
    st.integers(0, 2**64 - 1),
)
def test_shift_flip_and_erasing_are_torchvisions(
    margin: int, flip: float, erasing: float, size: tuple[int, int], seed: int
) -> None:
    """The same draws and the same pixels as the transforms whose place they take."""
    from torchvision.transforms import v2

    preprocess = Preprocess(size=size, mean=(0.1, 0.5, 0.9))
    augment = Augment(translate_pixels=margin, horizontal_flip=flip, random_erasing=erasing)
    augmenter = SampleAugmenter(augment, preprocess)
    fitted = preprocess.geometry(picture(40, 31))
    padded = augmenter.pad(fitted)
    assert torch.equal(padded, v2.functional.pad(fitted, [margin] * 4, padding_mode="edge"))
    theirs = [v2.RandomCrop(size)] if margin else []
    theirs += [v2.RandomHorizontalFlip(flip)] if flip else []
    theirs += [v2.RandomErasing(erasing, value=[26, 128, 230])] if erasing else []
    with isolated_rng() as reseed:
        reseed(seed)
        expected = padded
        for transform in theirs:
            expected = transform(expected)
        after = torch.get_rng_state()
        reseed(seed)
        assert torch.equal(augmenter.from_padded(padded), expected)
        assert torch.equal(torch.get_rng_state(), after)


def test_the_generator_comes_back_after_an_error() -> None:
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), isolated_rng() as reseed:
        reseed(1) or 1 // 0
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_is_done_unless_asked_for() -> None:
    assert not Augment().changes_samples
    assert not Augment().mixes
    assert torch.equal(run(Augment(), picture(33, 20), 0), SQUARE.geometry(picture(33, 20)))
    assert Augment(mixup=0.1).mixes
    assert not Augment(mixup=0.1).changes_samples


def test_flips() -> None:
    image = picture(20, 20)
    plain = SQUARE.geometry(image)
    assert torch.equal(run(Augment(horizontal_flip=1.0), image, 0), plain.flip(-1))
    flipped = sum(torch.equal(run(Augment(horizontal_flip=0.3), image, n), plain.flip(-1)) for n in range(400))
    assert 80 < flipped < 160


def test_shifts_reach_every_offset_and_repeat_the_edge() -> None:
    image = picture(20, 20)
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="edge").transpose(2, 0, 1)
    seen = set()
    for seed in range(400):
        got = run(Augment(translate_pixels=2), image, seed).numpy()
        places = [
            (top, left)
            for top in range(5)
            for left in range(5)
            if np.array_equal(got, padded[:, top : top + 20, left : left + 20])
        ]
        assert len(places) == 1
        seen.add(places[0])
    assert len(seen) == 25


def test_random_resized_crop_stays_within_its_bounds() -> None:
    """On a ramp the box can be read off the values: width and height, and with them area and shape."""
    ramp = np.zeros((100, 100, 3), np.uint8)
    ramp[..., 0] = np.arange(100)[None, :] * 2
    ramp[..., 1] = np.arange(100)[:, None] * 2
    areas = []
    for seed in range(200):
        got = run(Augment(random_resized_crop=(0.25, 0.5)), ramp, seed).float()
        width = (got[0, 10, 15] - got[0, 10, 5]) / 2 / 10 * 20
        height = (got[1, 15, 10] - got[1, 5, 10]) / 2 / 10 * 20
        areas.append(float(width * height))
        assert 0.65 < float(width / height) < 1.5
    assert 2200 < min(areas) < 2900
    assert 4500 < max(areas) < 5500


def test_erasing_leaves_a_box_of_the_mean() -> None:
    preprocess = Preprocess(size=(20, 20), mean=(0.2, 0.4, 0.6), std=(1.0, 1.0, 1.0))
    image = np.full((20, 20, 3), 255, np.uint8)
    got = run(Augment(random_erasing=1.0), image, 3, preprocess)
    box = (got != 255).all(0).nonzero()
    (top, left), (bottom, right) = box.min(0).values.tolist(), box.max(0).values.tolist()
    inside = got[:, top : bottom + 1, left : right + 1]
    assert torch.equal(inside, torch.tensor([51, 102, 153], dtype=torch.uint8)[:, None, None].expand_as(inside))
    assert int((got != 255).all(0).sum()) == inside[0].numel()
    assert preprocess.normalize(got)[:, top, left].abs().max() < 1e-6


def test_rand_augment_changes_more_with_more_operations() -> None:
    image = picture(20, 20)
    plain = SQUARE.geometry(image).float()

    def change(operations: int) -> float:
        augment = Augment(rand_augment=operations, rand_augment_magnitude=15)
        return float(np.mean([(run(augment, image, n).float() - plain).abs().mean() for n in range(60)]))

    assert 1 < change(1) < change(4)


def test_padding_many_at_once_equals_one_by_one() -> None:
    augmenter = SampleAugmenter(Augment(translate_pixels=3), SQUARE)
    images = torch.randint(0, 256, (5, 3, 20, 20), dtype=torch.uint8)
    assert torch.equal(augmenter.pad(images), torch.stack([augmenter.pad(image) for image in images]))


def batch(count: int = 8, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.arange(count, dtype=torch.float32)[:, None, None, None].expand(-1, 3, 16, 16).contiguous()
    return images, torch.arange(count) % classes


@pytest.mark.parametrize("augment", [Augment(mixup=0.4), Augment(cutmix=1.0), Augment(mixup=0.4, cutmix=1.0)])
@pytest.mark.parametrize("count", [0, 1, 2, 8])
def test_mixing_keeps_the_sum_of_targets_and_repeats(augment: Augment, count: int) -> None:
    images, targets = batch(count)
    state = torch.get_rng_state()
    for seed in range(20):
        mixed, soft = mix_batch(augment, images, targets, num_classes=4, seed=seed)
        assert mixed.shape == images.shape
        assert soft.shape == (count, 4)
        assert soft.dtype == torch.float32
        assert torch.allclose(soft.sum(1), torch.ones(count))
        again = mix_batch(augment, images, targets, num_classes=4, seed=seed)
        assert torch.equal(mixed, again[0])
        assert torch.equal(soft, again[1])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(images, batch(count)[0]), "the input is left alone"


def test_mixup_mixes_images_as_it_mixes_targets() -> None:
    """Sample n is filled with n, so the share of its neighbour can be read from image and target alike."""
    images, targets = batch(8, 8)
    shares = []
    for seed in range(100):
        mixed, soft = mix_batch(Augment(mixup=1.0), images, targets, num_classes=8, seed=seed)
        values = torch.arange(8.0)
        assert torch.allclose(mixed[:, 0, 0, 0], soft @ values, atol=1e-5)
        shares.append(float(soft[3, 3]))
    assert min(shares) < 0.2
    assert max(shares) > 0.8


def test_cutmix_gives_each_target_its_share_of_the_area() -> None:
    images, targets = batch(8, 8)
    for seed in range(50):
        mixed, soft = mix_batch(Augment(cutmix=1.0), images, targets, num_classes=8, seed=seed)
        own = (mixed[:, 0] == torch.arange(8.0)[:, None, None]).float().mean((1, 2))
        assert torch.allclose(own, soft[torch.arange(8), targets], atol=1e-5)


def test_with_both_each_gets_its_turn() -> None:
    images, targets = batch(8, 8)
    mixed = [mix_batch(Augment(mixup=1.0, cutmix=1.0), images, targets, num_classes=8, seed=n)[0] for n in range(60)]
    cut = sum(bool((image == image.round()).all()) for image in mixed)
    assert 15 < cut < 45


def test_label_sets_mix_too() -> None:
    images, _ = batch(4)
    targets = torch.tensor([[1.0, 1, 0], [0, 0, 0], [0, 1, 0], [0, 0, 1]])
    _, soft = mix_batch(Augment(mixup=1.0), images, targets, num_classes=3, seed=5)
    assert torch.allclose(soft.sum(0), targets.sum(0))


def test_without_mixing_targets_become_vectors() -> None:
    images, targets = batch(3)
    same, hot = mix_batch(Augment(), images, targets, num_classes=4, seed=0)
    assert same is images
    assert torch.equal(hot, torch.eye(4)[:3])


@pytest.mark.parametrize(
    "options",
    [
        {"random_resized_crop": (0, 1)},
        {"random_resized_crop": (0.9, 0.5)},
        {"random_resized_crop": (0.5, 1.5)},
        {"random_resized_crop": 0.5},
        {"random_resized_crop": [0.5, 1.0]},
        {"translate_pixels": -1},
        {"translate_pixels": 1.5},
        {"translate_pixels": True},
        {"horizontal_flip": 1.1},
        {"horizontal_flip": True},
        {"horizontal_flip": "x"},
        {"rand_augment": -1},
        {"rand_augment_magnitude": 31},
        {"random_erasing": -0.1},
        {"random_erasing": float("nan")},
        {"mixup": -1},
        {"cutmix": float("inf")},
    ],
)
def test_settings_are_checked(options: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        Augment(**options)
