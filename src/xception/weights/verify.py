"""The same images through the source's own framework and through the network that was made of it, compared.

This is the one place where another framework runs, and only when it is asked to. Keras builds and runs what a file
describes, so the file must be trusted. For PyTorch files that is not needed: their tensors, read as data, are loaded
into timm's or torchvision's own network.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from xception.errors import ConfigError, WeightsError
from xception.weights.detect import container_of
from xception.weights.files import shown
from xception.weights.imports import import_weights, imported_info
from xception.weights.locate import locate
from xception.weights.verify_keras import run_keras
from xception.weights.verify_torch import run_torch

TOLERANCE = 1e-4  # of the largest number, in fp32
_NO_NUMBER = 1e30  # stands for a difference that is none, as JSON has no word for it


def check_verifiable(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Raise `ConfigError` where `verify` could not be run once `source` was converted to `target`."""
    file = locate(source).path
    container = container_of(file)
    if container == "bundle":
        raise ConfigError(f"{shown(source)} is a bundle already: there is no other framework to compare it with")
    if os.path.exists(target) and os.path.samefile(file, target):
        raise ConfigError("--verify compares the target with its source: give the target another name")
    for name in ("keras",) if _is_keras(container) else ("timm", "torchvision"):
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"--verify needs {name} (pip install {name})")


def verify(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> dict[str, Any]:
    """Run `source` in its own framework, and the network that `target` holds here, on the same images of its size.

    Returns ``framework``, ``inputs`` (N C H W), ``compared`` ("logits", or "pooled features" of a trunk alone),
    ``outputs`` (their shape) and ``max_relative_difference``: the largest difference as a share of the largest number.
    Everything runs in fp32 on the CPU. Raises `ConfigError` where the framework is not installed or cannot run the
    file, and `WeightsError` for a file that cannot be read.
    """
    check_verifiable(source, target)
    file = locate(source).path
    ours = import_weights(Path(target))
    trunk_only = bool(ours.fresh)
    preprocess = imported_info(source, trunk_only=trunk_only).preprocess
    run = run_keras if _is_keras(container_of(file)) else run_torch
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what other libraries have to say of their own
            theirs = run(os.fspath(file), preprocess, trunk_only=trunk_only)
    except ImportError as error:
        raise ConfigError(f"--verify cannot use what is installed: {error}") from error
    network: Any = ours.model.float().eval()
    with torch.no_grad():
        x = theirs.inputs
        found = network.forward_features(x).mean((2, 3)) if trunk_only else network(x)
    expected = theirs.outputs
    if found.shape != expected.shape:
        raise WeightsError(
            f"{theirs.framework} gives numbers of shape {tuple(expected.shape)}, not {tuple(found.shape)}"
        )
    if not expected.isfinite().all():
        raise WeightsError(f"{theirs.framework} itself gives numbers that are not finite for {shown(source)}")
    largest = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    return {
        "framework": theirs.framework,
        "inputs": list(x.shape),
        "compared": "pooled features" if trunk_only else "logits",
        "outputs": list(expected.shape),
        "max_relative_difference": float(((found - expected).abs().max() / largest).nan_to_num(_NO_NUMBER, _NO_NUMBER)),
    }


def is_close(verified: Mapping[str, Any]) -> bool:
    """Whether what `verify` found is a difference of rounding alone."""
    return bool(verified["max_relative_difference"] <= TOLERANCE)


def _is_keras(container: str) -> bool:
    return container in ("hdf5", "keras-zip")
