"""Our networks into files that Keras loads: a whole `.keras` model, its weights alone, or a whole model in HDF5.

The same network gives the same bytes. What Keras's formats have no field for (class names, preprocessing) stands where
Keras does not look, and comes back when the file is read here.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO

import h5py
import torch
from torch import Tensor, nn

from xception.errors import ConfigError, WeightsError
from xception.weights.bundle import BundleInfo
from xception.weights.container import encode_json
from xception.weights.files import atomic_write, shown
from xception.weights.foreign import to_theirs
from xception.weights.keras_describe import Described, describe
from xception.weights.keras_file import NOTES

KERAS_KINDS = ("keras", "keras-weights", "keras-h5")
"""A `.keras` archive, a `.weights.h5` file, and a whole model in HDF5 (which `load_weights` takes as well)."""

_VERSION = "3.15.1"  # the release whose files these are like
_PIECE = 1 << 20


def write_keras(path: str | os.PathLike[str], model: nn.Module, info: BundleInfo, kind: str) -> None:
    """Write `model` to `path` as a Keras file of one of `KERAS_KINDS`, in one step.

    Its last layer has a softmax, or a sigmoid if `info` says that classes do not exclude each other. Images of any size
    are accepted, already normalised. Raises `WeightsError` for a network that Keras cannot express ("keras-weights":
    that keras.applications does not have, since weights alone do not tell which network they are of), and where the
    file cannot be written; nothing is written then.
    """
    if kind not in KERAS_KINDS:
        raise ConfigError(f"unknown kind of Keras file {kind!r}: expected one of {', '.join(KERAS_KINDS)}")
    try:
        described = describe(model, multi_label=info.multi_label)
        if kind == "keras-weights" and not described.published:
            raise WeightsError(
                "keras.applications has no such network, and weights alone do not describe it: write a .keras file"
            )
        tensors = _tensors(model, described)
    except WeightsError as error:
        raise WeightsError(f"cannot write {shown(path)}: {error}") from error
    notes = {"class_names": list(info.class_names), "preprocess": info.preprocess.to_dict()}
    if kind == "keras":
        atomic_write(path, lambda stream: _write_archive(stream, described, tensors, notes))
    elif kind == "keras-weights":
        atomic_write(path, lambda stream: _write_weights(stream, described, tensors, notes))
    else:
        atomic_write(path, lambda stream: _write_model(stream, described, tensors, notes))


def _tensors(model: nn.Module, described: Described) -> dict[str, Tensor]:
    """Our tensors by our names, each to be used exactly once."""
    tensors = {name: t for name, t in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    used = [pair.ours for layer in described.layers for pair in layer.pairs]
    assert sorted(used) == sorted(tensors), set(used) ^ set(tensors)
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise WeightsError(f"tensor {name!r} is of {tensor.dtype}, which the file's float32 cannot hold")
    return tensors


def _array(tensor: Tensor, layout: Any) -> Any:
    return to_theirs(tensor.detach().cpu().float(), layout).numpy()


def _write_archive(
    stream: BinaryIO, described: Described, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]
) -> None:
    metadata = encode_json({"keras_version": _VERSION, NOTES: notes})
    with tempfile.TemporaryFile() as weights, zipfile.ZipFile(stream, "w") as archive:
        _write_weights(weights, described, tensors, None)
        _add(archive, "metadata.json", metadata.encode())
        _add(archive, "config.json", encode_json(described.description(legacy=False)).encode())
        weights.seek(0)
        with archive.open(_entry("model.weights.h5"), "w") as member:
            while piece := weights.read(_PIECE):
                member.write(piece)


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    archive.writestr(_entry(name), data)


def _entry(name: str) -> zipfile.ZipInfo:
    """A stored member without a time, so that the same network gives the same bytes."""
    return zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))


def _write_weights(
    stream: BinaryIO, described: Described, tensors: Mapping[str, Tensor], notes: Mapping[str, Any] | None
) -> None:
    with h5py.File(stream, "w") as file:
        if notes is not None:
            file.attrs[NOTES] = encode_json(notes).encode()
        for layer in described.layers:
            variables = file.create_group(f"{layer.place}/vars")
            variables.attrs["name"] = layer.name
            for i, pair in enumerate(layer.pairs):
                variables.create_dataset(str(i), data=_array(tensors[pair.ours], pair.layout))


def _write_model(
    stream: BinaryIO, described: Described, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]
) -> None:
    with h5py.File(stream, "w") as file:
        file.attrs["backend"] = b"tensorflow"
        file.attrs["keras_version"] = _VERSION.encode()
        file.attrs["model_config"] = encode_json(described.description(legacy=True)).encode()
        file.attrs[NOTES] = encode_json(notes).encode()
        weights = file.create_group("model_weights")
        weights.attrs["backend"] = b"tensorflow"
        weights.attrs["keras_version"] = _VERSION.encode()
        weights.attrs["layer_names"] = [layer.name.encode() for layer in described.layers]
        for layer in described.layers:
            group = weights.create_group(layer.name)
            names = [f"{layer.name}/{pair.theirs}" for pair in layer.pairs]
            group.attrs["weight_names"] = [name.encode() for name in names]
            for name, pair in zip(names, layer.pairs, strict=True):
                group.create_dataset(name, data=_array(tensors[pair.ours], pair.layout))
        weights.create_group("top_level_model_weights").attrs["weight_names"] = []
