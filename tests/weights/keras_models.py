"""Genuine Keras models and files for the tests, and what Keras itself computes with them.

Keras runs on its torch backend. Its own models have 22 million parameters; where a trunk's size does not matter, a
narrow one is used, which is written by this package and loaded and saved again by Keras.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from keras_networks import NARROW, info_of, our_network
from torch import Tensor, nn

from xception.weights.foreign import ForeignFile, ImportReport, Recognised, import_tensors
from xception.weights.keras_file import read_keras_file
from xception.weights.keras_model import recognise_keras
from xception.weights.keras_write import write_keras

os.environ.setdefault("KERAS_BACKEND", "torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import keras
L = keras.layers


def randomised(model: Any, seed: int = 0) -> Any:
    """The Keras model with weights that keep the signal's size, and batch statistics that are not the identity."""
    generator = np.random.default_rng(seed)
    for variable in model.weights:
        name, shape = variable.path.rpartition("/")[2], tuple(variable.shape)
        if "kernel" in name:
            fan_in = int(np.prod(shape[:2] if name == "depthwise_kernel" else shape[:-1]))
            value = generator.normal(0, np.sqrt(2 / fan_in), shape)
        elif name in ("gamma", "moving_variance", "variance"):
            value = generator.uniform(0.5, 1.5, shape)
        elif name in ("beta", "moving_mean", "mean", "bias"):
            value = generator.normal(0, 0.2, shape)
        else:
            continue
        variable.assign(value.astype(np.float32))
    return model


def narrow_trunk(folder: Path, **options: Any) -> Any:
    """A Keras model of a narrow Xception's features, by the name "xception", for models with heads of all kinds."""
    model = our_network(**{**NARROW, **options})
    path = folder / "narrow.keras"
    write_keras(path, model, info_of(model), "keras")
    loaded = keras.saving.load_model(path)
    features = next(layer for layer in loaded.layers if type(layer).__name__.startswith("Global")).input
    return keras.Model(loaded.inputs, features, name="xception")


def imported(path: Path, **options: Any) -> tuple[nn.Module, Recognised, ImportReport, ForeignFile]:
    """What this package makes of a Keras file."""
    file = read_keras_file(path)
    found = recognise_keras(file, **options)
    assert found is not None
    model, report = import_tensors(file, found)
    assert report.tensors_unused == 0
    return model, found, report, file


def save_bare_hdf5(model: Any, path: Path) -> None:
    """Weights alone, as Keras's `save_weights` wrote them into .h5 until its third version, by its own code."""
    import h5py
    from keras.src.legacy.saving import legacy_h5_format

    with h5py.File(path, "w") as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, model)


def save_quietly(model: Any, path: Path) -> None:
    """`model.save`, without the advice to use another format."""
    import logging

    logging.getLogger("absl").setLevel(logging.ERROR)
    model.save(path)


def keras_numbers(model: Any, x: Tensor) -> Tensor:
    """What Keras computes for N C H W images (it takes N H W C)."""
    with torch.no_grad():
        return torch.as_tensor(model(x.permute(0, 2, 3, 1).contiguous(), training=False)).cpu()


def keras_logits(model: Any, x: Tensor) -> Tensor:
    """As `keras_numbers`, without the activation of the last layer, which is a Dense."""
    last = model.layers[-1]
    kept, last.activation = last.activation, keras.activations.linear
    try:
        return keras_numbers(model, x)
    finally:
        last.activation = kept


def assert_equal_numbers(got: Tensor, expected: Tensor, tolerance: float = 1e-4) -> float:
    """The largest difference, relative to the largest number; it must be small beside what an image changes, too."""
    assert got.shape == expected.shape
    scale = expected.abs().max().item()
    spread = expected.std(dim=0).max().item() / scale
    assert spread > 1e-4, f"the numbers hardly depend on the image: {spread:.2g}"
    difference = (got - expected).abs().max().item() / scale
    assert difference <= min(tolerance, spread / 10), (difference, spread)
    return difference


def images(count: int, size: tuple[int, int], channels: int = 3, seed: int = 0) -> Tensor:
    """uint8 N C H W: clouds with some noise, each image of another brightness."""
    generator = torch.Generator().manual_seed(seed)
    clouds = torch.nn.functional.interpolate(
        torch.rand((count, channels, 5, 5), generator=generator), size=size, mode="bilinear"
    )
    brightness = torch.linspace(0.2, 1, count)[:, None, None, None]
    noise = 0.1 * torch.rand((count, channels, *size), generator=generator)
    return ((clouds * brightness + noise) / 1.1 * 255).to(torch.uint8)


def tempered(model: Any, x: Tensor) -> Any:
    """The Keras model, its last Dense scaled so that its numbers are about 1: no softmax is saturated then."""
    last = [layer for layer in model.layers if type(layer).__name__ == "Dense"][-1]
    before = keras.Model(model.inputs, last.output)
    kept, last.activation = last.activation, keras.activations.linear
    spread = keras_numbers(before, x).std().item()
    last.activation = kept
    for variable in last.weights:
        variable.assign(variable.value * (1 / spread))
    return model


def normalised(x: Tensor) -> Tensor:
    """0..255 to -1..1."""
    return x.float() / 127.5 - 1
