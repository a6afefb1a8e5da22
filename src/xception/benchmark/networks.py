"""The networks that are measured: one set of random weights, in the file of each engine.

`xception` here has PyTorch's padding and epsilon (``numerics="torch"``), which is timm's `legacy_xception` exactly;
`xception_tf` has TensorFlow's, which is what Keras has. Batch statistics are those of the images that are measured, so
that activations neither vanish nor grow through 36 layers and errors of the logits mean something.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import nn

from xception.benchmark.catalog import CATALOG
from xception.data.preprocess import Preprocess
from xception.errors import ConfigError, MissingPackageError
from xception.models import registry
from xception.models.baselines import import_timm
from xception.weights.bundle import BundleInfo, load_bundle, save_bundle
from xception.weights.keras_write import write_keras
from xception.weights.torch_write import write_torch

BUNDLE, TIMM, ONNX, KERAS = "network.safetensors", "timm.safetensors", "network.onnx", "network.keras"
INT8 = "network.int8.onnx"
CALIBRATION = 8
"""Batches of two images that activations are ranged by."""

IMAGES, EXPECTED = "images.npy", "expected.npy"


@dataclass(frozen=True, kw_only=True)
class Work:
    """A network of `catalog.CATALOG`, and the images it is given; `options` are fields of its config."""

    model: str
    batch: int
    size: int
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def multiply_adds(self) -> int:
        """Of one image."""
        published = CATALOG[self.model]
        options = {**published.options, **self.options, "input_size": self.size}
        return registry.describe(published.registry, **options).multiply_adds


def pictures(count: int, size: int, seed: int = 1) -> NDArray[np.float32]:
    """Smooth random images with some noise, N C H W, from -1 to 1."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 10, 10, generator=generator) * 2 - 1
    smooth = nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")
    noisy = smooth + 0.2 * torch.randn(count, 3, size, size, generator=generator)
    found: NDArray[np.float32] = noisy.clamp(-1, 1).numpy()
    return found


def random_network(work: Work, seed: int = 0) -> nn.Module:
    """The network of `work` in eval mode, its weights and the affine part of its normalisations random."""
    published = CATALOG[work.model]
    torch.manual_seed(seed)
    model = registry.create_model(published.registry, **published.options, **work.options)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        if norm.affine:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, 0, 0.3)
        norm.reset_running_stats()
        norm.momentum = None  # of all batches, equally
    with torch.no_grad():
        model.train()(torch.from_numpy(pictures(4, work.size, seed=seed + 2)))
    return model.eval()


def write_work(work: Work, folder: Path, files: set[str]) -> None:
    """Write the network into `folder` as each of `files`, with the images and the logits that PyTorch gives for them.

    Raises `XceptionError` where a format cannot express the network.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = random_network(work)
    config: Any = model.config
    info = BundleInfo(
        model=CATALOG[work.model].registry,
        config=registry.config_to_dict(config),
        class_names=tuple(map(str, range(config.num_classes))),
        multi_label=False,
        preprocess=Preprocess(size=(work.size, work.size)),
    )
    save_bundle(folder / BUNDLE, model, info)
    images = pictures(work.batch, work.size)
    with torch.inference_mode():
        expected = model(torch.from_numpy(images)).numpy()
    np.save(folder / IMAGES, images)
    np.save(folder / EXPECTED, expected)
    if files & {TIMM, ONNX} and not work.options:
        write_torch(folder / TIMM, model, CATALOG[work.model].family)
    if KERAS in files:
        write_keras(folder / KERAS, model, info, "keras")
    if ONNX in files:
        _write_onnx(folder, work, model)
    if INT8 in files:
        _write_int8(folder, work)


def calibration_pictures(size: int) -> NDArray[Any]:
    """Other pictures than those of the benchmark, for who has to know how large numbers become: N C H W."""
    return np.concatenate([pictures(2, size, seed=100 + seed) for seed in range(CALIBRATION)])


def torch_network(folder: Path, case_model: str) -> nn.Module:
    """timm's network with the weights of `folder`; ours where that has none for it, as with options of our own."""
    if not (folder / TIMM).exists():
        return load_bundle(folder / BUNDLE)[0]
    name = CATALOG[case_model].family.removeprefix("timm/")
    model: nn.Module = import_timm().create_model(name, pretrained=False)
    model.load_state_dict(load_file(folder / TIMM))
    return model.eval()


def _write_onnx(folder: Path, work: Work, ours: nn.Module) -> None:
    """timm's network (ours where timm is not installed), the number of images left open."""
    try:
        model = torch_network(folder, work.model)
    except MissingPackageError:
        model = ours
    dimensions: Any = torch.export.Dim
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                model,
                (torch.from_numpy(pictures(2, work.size)),),
                folder / ONNX,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: dimensions("batch", min=1, max=4096)},),
                external_data=False,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"{work.model} cannot be written as ONNX at {work.size} pixels: {reason}") from error


def _write_int8(folder: Path, work: Work) -> None:
    """The ONNX file in 8-bit integers, by ONNX Runtime: weights by channel, activations by other images' ranges."""
    tools: Any = import_module("onnxruntime.quantization")
    shapes: Any = import_module("onnxruntime.quantization.shape_inference")

    class Pictures(tools.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = np.split(calibration_pictures(work.size), CALIBRATION)

        def get_next(self) -> dict[str, NDArray[Any]] | None:
            return {"images": self.left.pop()} if self.left else None

    folded = folder / "folded.onnx"  # normalisations into convolutions, which are quantised then
    logging.disable(logging.WARNING)
    try:
        shapes.quant_pre_process(folder / ONNX, folded, skip_symbolic_shape=True)
        tools.quantize_static(folded, folder / INT8, Pictures(), per_channel=True)
    finally:
        logging.disable(logging.NOTSET)
