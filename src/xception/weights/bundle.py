"""The bundle: one .safetensors file with the weights and all that is needed to use them.

Its metadata holds ``format`` ("xception-bundle"), ``version`` ("1"), ``bundle`` (JSON: network, config, class
names, preprocessing, provenance) and two SHA-256 digests, of the header and of the tensors, so that every
flipped bit is found. Any safetensors reader can open it. Nothing in a file is believed before it was checked:
the header against the file's size, the tensors against the network that the config describes, and only then
is memory taken. No code from a file is ever run.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from xception.data.preprocess import Preprocess
from xception.errors import ConfigError, WeightsError
from xception.weights.container import (
    Header,
    encode_json,
    parse_json_object,
    read_header,
    read_tensors,
    write_container,
)
from xception.weights.files import atomic_write, open_regular, shown
from xception.weights.skeleton import Allowance, build_skeleton, check_fit, materialise, signature, tensors_of

BUNDLE_NAME = "model.safetensors"
_FORMAT = "xception-bundle"
_VERSION = "1"
# Above any network's input; a file must not make `predict` resize to gigabytes.
_MAX_SIDE = 4096


@dataclass(frozen=True, kw_only=True)
class BundleInfo:
    """What a bundle says about its weights.

    `model` is a registry name and `config` its full config as JSON values; `class_names` has one name a
    logit, in order; `preprocess` turns an image into the network's input; `provenance` is free JSON (data,
    recipe, figures, versions). Config and provenance are kept as JSON gives them back: tuples become lists, and
    in the provenance NaN and infinity become None, lest a diverged loss keep weights from being saved.
    Raises `ConfigError` for values that JSON cannot hold, or that contradict each other.
    """

    model: str
    config: dict[str, Any]
    class_names: tuple[str, ...]
    multi_label: bool
    preprocess: Preprocess
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names: Any = self.class_names
        if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"class_names must be a tuple of texts, got {str(names)!r:.80}")
        provenance = _without_infinities(self.provenance)
        for name, value in (("class_names", names), ("config", self.config), ("provenance", provenance)):
            object.__setattr__(self, name, _as_json(name, value))
        object.__setattr__(self, "class_names", tuple(self.class_names))
        num_classes = self.config.get("num_classes")
        if num_classes != len(self.class_names):
            raise ConfigError(f"{len(self.class_names)} class names for a network of {num_classes} classes")
        channels = self.config.get("in_channels", self.preprocess.channels)
        if channels != self.preprocess.channels:
            raise ConfigError(
                f"the preprocessing gives {self.preprocess.channels} channels, the network takes {channels}"
            )
        side = max(self.preprocess.size) / self.preprocess.crop_fraction
        if side > _MAX_SIDE:
            raise ConfigError(f"preprocessing to {side:,.0f} pixels a side; at most {_MAX_SIDE:,} are accepted")

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "config": self.config,
            "class_names": list(self.class_names),
            "multi_label": self.multi_label,
            "preprocess": self.preprocess.to_dict(),
            "provenance": self.provenance,
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> BundleInfo:
        """The inverse of `to_dict`; raises `ConfigError` for an unknown, missing or ill-typed field."""
        types = {
            "model": str,
            "config": dict,
            "class_names": list,
            "multi_label": bool,
            "preprocess": dict,
            "provenance": dict,
        }
        if wrong := types.keys() ^ fields.keys():
            raise ConfigError(f"unknown or missing field {sorted(wrong)[0][:80]!r}")
        for name, kind in types.items():
            if not isinstance(fields[name], kind):
                raise ConfigError(f"{name} must be {kind.__name__}, got {type(fields[name]).__name__}")
        return cls(**{**fields, "preprocess": Preprocess.from_dict(fields["preprocess"])})


def save_bundle(path: str | os.PathLike[str], model: nn.Module, info: BundleInfo) -> None:
    """Write `model` and `info` to `path` in one step; the same weights and info give the same bytes.

    Every tensor keeps its dtype. A failed write leaves the old file. Raises `WeightsError` where the file
    cannot be written, or where it could not be loaded again because `info` does not describe `model`.
    """
    tensors = tensors_of(model)
    with _problems(f"cannot save {shown(path)}"):
        expected = tensors_of(build_skeleton(info.model, info.config, Allowance.of(tensors)))
        check_fit(signature(expected), signature(tensors))
    metadata = {"format": _FORMAT, "version": _VERSION, "bundle": encode_json(info.to_dict())}
    atomic_write(path, lambda stream: write_container(stream, tensors, metadata))


def read_bundle_info(path: str | os.PathLike[str]) -> BundleInfo:
    """What the bundle, or the run folder that holds it, says about itself; the weights are not read.

    Raises `WeightsError` as `load_bundle` does, except for damage inside the tensors.
    """
    with open_bundle(path) as (_, _, info):
        return info


def load_bundle(path: str | os.PathLike[str]) -> tuple[nn.Module, BundleInfo]:
    """The network, on the CPU and in eval mode, and what its bundle says; `path` may be a run folder.

    Weights come back bit for bit, in the dtypes they were saved in. Raises `WeightsError`, naming the file
    and the problem, for a missing, damaged or foreign file; no memory is taken for weights before the whole
    header was found to describe the network that its config gives.
    """
    with open_bundle(path) as (stream, header, info):
        skeleton = build_skeleton(info.model, info.config, allowance_of(header))
        check_fit(signature(tensors_of(skeleton)), declared(header))
        model = materialise(skeleton, info.model, info.config)
        destinations = tensors_of(model)
        for entry in header.entries:
            destination = destinations[entry.name]
            if destination.dtype != entry.dtype:
                destination.data = torch.empty(entry.shape, dtype=entry.dtype)
        read_tensors(stream, header, destinations)
    return model.eval(), info


@contextlib.contextmanager
def open_bundle(path: str | os.PathLike[str]) -> Iterator[tuple[BinaryIO, Header, BundleInfo]]:
    """Open a bundle (or a run folder's) with its header checked, the stream at the first tensor.

    What goes wrong inside the ``with`` block is reported with the file's name before it.
    """
    file = find_bundle(path)
    with open_regular(file) as stream, _problems(f"cannot load {shown(file)}"):
        header = read_header(stream)
        yield stream, header, _info_of(header)


def find_bundle(path: str | os.PathLike[str]) -> Path:
    """The bundle's file: `path` itself, or ``model.safetensors`` where `path` is a run folder."""
    if not os.fspath(path):
        raise WeightsError("expected a bundle or a run folder, got an empty name")
    file = Path(path)
    if not os.path.isdir(file):
        return file
    if not os.path.lexists(file / BUNDLE_NAME):
        raise WeightsError(f"cannot load {shown(file)}: the folder holds no {BUNDLE_NAME}")
    return file / BUNDLE_NAME


def declared(header: Header) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The header's tensors in the form that `check_fit` compares."""
    return {entry.name: (entry.dtype, entry.shape) for entry in header.entries}


def allowance_of(header: Header) -> Allowance:
    """The size that the header declares, and that the file was found to have."""
    elements = sum(math.prod(entry.shape) for entry in header.entries)
    return Allowance(tensors=len(header.entries), elements=elements)


def _info_of(header: Header) -> BundleInfo:
    metadata = header.metadata
    if metadata.get("format") != _FORMAT:
        raise WeightsError(f"a safetensors file, but no bundle: its metadata lacks format {_FORMAT!r}")
    if metadata.get("version") != _VERSION:
        version = metadata.get("version", "")[:20]
        raise WeightsError(f"bundle version {version!r}; this xception reads version {_VERSION!r}")
    header.check_digest()
    return BundleInfo.from_dict(parse_json_object(metadata.get("bundle", ""), "the bundle's description"))


def _without_infinities(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _without_infinities(item) for key, item in value.items()}
    return [_without_infinities(item) for item in value] if isinstance(value, list | tuple) else value


def _as_json(name: str, value: object) -> Any:
    try:
        text = encode_json({name: value})
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{name} must hold only JSON values: {error}") from None
    return parse_json_object(text, name)[name]


@contextlib.contextmanager
def _problems(doing: str) -> Iterator[None]:
    """Put the file's name before what is wrong with it; a config that came from a file is its problem too."""
    try:
        yield
    except (ConfigError, WeightsError) as error:
        text = str(error)  # may quote what the file holds, which can be long
        raise WeightsError(f"{doing}: {text if len(text) <= 500 else text[:500] + '...'}") from error
