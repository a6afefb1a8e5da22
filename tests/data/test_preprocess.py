"""Geometry and normalisation, checked against Pillow's resampling and the definitions."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from image_files import picture
from PIL import Image

from xception.data.preprocess import Preprocess, _centre
from xception.errors import ConfigError

sizes = st.integers(1, 80)


@settings(max_examples=150, deadline=None)
@given(
    sizes,
    sizes,
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.sampled_from([1.0, 0.9, 0.5, 299 / 333]),
    st.sampled_from(["crop", "squash"]),
    st.sampled_from(["bilinear", "bicubic", "nearest"]),
    st.sampled_from([1, 3]),
    st.sampled_from([1, 3]),
)
def test_any_image_becomes_the_input_s_size(
    height, width, size, fraction, resize, interpolation, source, channels
) -> None:
    preprocess = Preprocess(
        size=size, crop_fraction=fraction, resize=resize, interpolation=interpolation, channels=channels
    )
    image = picture(height, width, channels=source)
    before = image.copy()
    fitted = preprocess.geometry(image)
    assert fitted.shape == (channels, *size)
    assert fitted.dtype == torch.uint8
    tensor = preprocess(image)
    assert tensor.shape == (channels, *size)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    assert -1 <= float(tensor.min()) <= float(tensor.max()) <= 1
    assert torch.equal(tensor, preprocess.normalize(fitted))
    assert np.array_equal(image, before)


def test_the_default_is_minus_one_to_one() -> None:
    values = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    tensor = Preprocess(size=(16, 16))(values)
    expected = torch.arange(256, dtype=torch.float64).reshape(16, 16) / 127.5 - 1
    assert (tensor[0].double() - expected).abs().max() < 1e-6
    assert torch.equal(tensor[0], tensor[2])


def test_normalisation_is_by_channel_and_takes_batches() -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    preprocess = Preprocess(size=(4, 5), mean=mean, std=std)
    images = torch.randint(0, 256, (2, 6, 3, 4, 5), dtype=torch.uint8)
    got = preprocess.normalize(images)
    expected = (images.double() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert got.dtype == torch.float32
    assert (got - expected).abs().max() < 1e-5
    assert torch.equal(got[1, 2], preprocess.normalize(images[1, 2]))


@pytest.mark.parametrize(
    ("interpolation", "filter"), [("bilinear", Image.BILINEAR), ("bicubic", Image.BICUBIC), ("nearest", Image.NEAREST)]
)
@pytest.mark.parametrize(("height", "width"), [(61, 91), (91, 61), (21, 31), (333, 333)])
def test_crop_is_pillow_s_resize_and_the_centre(interpolation, filter, height: int, width: int) -> None:
    """The shorter side goes to size / crop_fraction, the longer one with it, and the middle is cut out.

    With odd sizes no output pixel lies halfway between two, which the nearest one could be.
    """
    size, fraction = 40, 0.8
    preprocess = Preprocess(size=(size, size), crop_fraction=fraction, interpolation=interpolation)
    image = picture(height, width)
    scale = (size / fraction) / min(height, width)
    resized = (math.floor(height * scale + 0.5), math.floor(width * scale + 0.5))
    assert 50 in resized
    reference = np.asarray(Image.fromarray(image).resize(resized[::-1], filter))
    top, left = (round((side - size) / 2) for side in resized)
    reference = reference[top : top + size, left : left + size]
    got = preprocess.geometry(image).permute(1, 2, 0).numpy()
    assert np.abs(got.astype(int) - reference).max() <= (0 if interpolation == "nearest" else 1)


@pytest.mark.parametrize("capability", [None, "DEFAULT"], ids=["vectors", "no vectors"])
@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 3), max_size=2),
    st.tuples(sizes, sizes),
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.sampled_from(["bilinear", "bicubic", "nearest"]),
    st.sampled_from([1, 3]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_resize_and_crop_are_torchvisions(
    capability: str | None, many, given_size, size, interpolation, channels: int, channels_last: bool, seed: int
) -> None:
    """Bit for bit those of the functions whose place they take, whatever lies beside what in memory."""
    from torchvision.transforms.v2 import functional

    if capability is not None:  # the float kernels that torchvision then takes give wrong numbers for single columns
        assume(min(*given_size, *size) > 1)
    numbers = np.random.default_rng(seed).integers(0, 256, (*many, channels, *given_size), np.uint8)
    images = torch.from_numpy(numbers)
    if channels_last:
        images = images.movedim(-3, -1).contiguous().movedim(-1, -3)
    preprocess = Preprocess(size=size, resize="squash", interpolation=interpolation, channels=channels)
    options = {"interpolation": preprocess.interpolation_mode, "antialias": interpolation != "nearest"}
    with pytest.MonkeyPatch.context() as patch:
        if capability is not None:
            patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        fitted = preprocess.fit(images)
        # Theirs fails where 3 x H x W, lying so, becomes one pixel.
        theirs = images.movedim(-3, -1).contiguous().movedim(-1, -3) if size == (1, 1) else images
        assert torch.equal(fitted, functional.resize(theirs, list(size), **options))
    least = tuple(map(min, given_size, size))
    assert torch.equal(_centre(images, least), functional.center_crop(images, list(least)))


def test_squash_ignores_the_shape() -> None:
    image = picture(60, 90)
    reference = np.asarray(Image.fromarray(image).resize((20, 40), Image.BILINEAR))
    got = Preprocess(size=(40, 20), resize="squash").geometry(image).permute(1, 2, 0).numpy()
    assert np.abs(got.astype(int) - reference).max() <= 1


def test_an_image_of_the_right_size_is_left_alone() -> None:
    image = picture(21, 34)
    for resize in ("crop", "squash"):
        for interpolation in ("bilinear", "bicubic", "nearest"):
            got = Preprocess(size=(21, 34), resize=resize, interpolation=interpolation).geometry(image)
            assert np.array_equal(got.permute(1, 2, 0).numpy(), image)


def test_centre_crop_without_resize() -> None:
    image = picture(50, 50)
    got = Preprocess(size=(40, 40), crop_fraction=0.8).geometry(image)
    assert np.array_equal(got.permute(1, 2, 0).numpy(), image[5:45, 5:45])


def test_grey_and_colour() -> None:
    colour = picture(20, 20)
    luma = np.asarray(Image.fromarray(colour).convert("L"))
    assert np.array_equal(Preprocess(size=(20, 20), channels=1).geometry(colour)[0].numpy(), luma)
    grey = luma[..., None]
    tripled = Preprocess(size=(20, 20)).geometry(grey)
    assert np.array_equal(tripled.numpy(), np.stack([luma] * 3))
    every = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, 2)
    assert np.array_equal(Preprocess(size=(16, 16), channels=1).geometry(every)[0].numpy(), every[..., 0])


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
def test_fitting_many_at_once_equals_one_by_one(interpolation) -> None:
    images = torch.randint(0, 256, (9, 3, 13, 17), dtype=torch.uint8)
    preprocess = Preprocess(size=(24, 20), interpolation=interpolation)
    together = preprocess.fit(images)
    assert torch.equal(together, torch.stack([preprocess.fit(image) for image in images]))


@pytest.mark.parametrize("shape", [(1, 4_000_000, 3), (4_000_000, 1, 3), (2, 900_000, 1)])
def test_lines_of_millions_of_pixels_take_no_more_than_themselves(shape: tuple[int, int, int]) -> None:
    image = np.zeros(shape, np.uint8)
    assert Preprocess(size=(299, 299)).geometry(image).shape == (3, 299, 299)


def test_arrays_that_torch_does_not_take_as_they_are() -> None:
    image = picture(20, 20)
    expected = Preprocess(size=(10, 10)).geometry(image[::-1, ::-1].copy())
    frozen = image[::-1, ::-1]
    assert torch.equal(Preprocess(size=(10, 10)).geometry(frozen), expected)
    fixed = image.copy()
    fixed.flags.writeable = False
    Preprocess(size=(10, 10))(fixed)


@pytest.mark.parametrize(
    "image",
    [
        picture()[..., 0],
        picture().astype(np.float32),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        torch.zeros(4, 4, 3, dtype=torch.uint8),
        None,
    ],
)
def test_what_is_not_an_image_is_refused(image: object) -> None:
    with pytest.raises(ConfigError, match="expected an image"):
        Preprocess(size=(8, 8))(image)  # type: ignore[arg-type]


def test_it_is_frozen_and_hashable() -> None:
    preprocess = Preprocess(size=(8, 8))
    with pytest.raises(FrozenInstanceError):
        preprocess.size = (9, 9)  # type: ignore[misc]
    assert hash(preprocess) == hash(Preprocess(size=(8, 8)))


def test_one_value_stands_for_all_channels() -> None:
    grey = Preprocess(size=(8, 8), channels=1)
    assert (grey.mean, grey.std) == ((0.5,), (0.5,))
    assert Preprocess(size=(8, 8), mean=(0,), std=(1,)).mean == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    "preprocess",
    [
        Preprocess(size=(299, 299), crop_fraction=299 / 333, interpolation="bicubic"),
        Preprocess(size=(28, 30), channels=1, mean=(0.286,), std=(0.353,)),
        Preprocess(size=(8, 8), resize="squash", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    ],
)
def test_it_survives_json(preprocess: Preprocess) -> None:
    again = Preprocess.from_dict(json.loads(json.dumps(preprocess.to_dict())))
    assert again == preprocess


GOOD = Preprocess(size=(8, 9)).to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "unknown field colour"),
        ({1: 1}, "unknown field 1"),
        ({"size": [8]}, "size"),
        ({"size": [8, 8, 8]}, "size"),
        ({"size": [8, 0]}, "size"),
        ({"size": [8, 8.0]}, "size"),
        ({"size": [8, True]}, "size"),
        ({"size": 8}, "size"),
        ({"size": [8, 10**9]}, "size"),
        ({"resize": "stretch"}, "resize"),
        ({"resize": None}, "resize"),
        ({"resize": ["crop"]}, "resize"),
        ({"interpolation": "lanczos"}, "interpolation"),
        ({"interpolation": {}}, "interpolation"),
        ({"crop_fraction": 0}, "crop_fraction"),
        ({"crop_fraction": 1.01}, "crop_fraction"),
        ({"crop_fraction": "1"}, "crop_fraction"),
        ({"crop_fraction": True}, "crop_fraction"),
        ({"crop_fraction": float("nan")}, "crop_fraction"),
        ({"channels": 2}, "channels"),
        ({"channels": 3.0}, "channels"),
        ({"channels": True}, "channels"),
        ({"mean": [0.5, 0.4]}, "mean"),
        ({"mean": []}, "mean"),
        ({"mean": 0.5}, "mean"),
        ({"mean": ["a", "b", "c"]}, "mean"),
        ({"mean": [0.5, 0.5, float("inf")]}, "mean"),
        ({"std": [0.5, 0.5, 0]}, "std"),
        ({"std": [0.5, -0.5, 0.5]}, "std"),
        ({"std": [[0.5], 0.5, 0.5]}, "std"),
    ],
)
def test_damaged_settings_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Preprocess.from_dict({**GOOD, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", GOOD)
def test_missing_fields_are_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"field {name} is missing"):
        Preprocess.from_dict({key: value for key, value in GOOD.items() if key != name})


@pytest.mark.parametrize("values", [None, [], "x", 3])
def test_settings_must_be_an_object(values: object) -> None:
    with pytest.raises(ConfigError, match="expected an object"):
        Preprocess.from_dict(values)
