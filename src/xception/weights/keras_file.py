"""Keras's weights files, whole and partial, old and new, opened as data.

Four kinds, told apart by their content:

- "keras": a `.keras` archive (config.json, metadata.json, model.weights.h5);
- "keras-weights": a `.weights.h5` file, variables under ``layers/conv2d_1/vars/0``, without a description;
- "keras-h5": a whole model in HDF5, its description in the attribute ``model_config``;
- "keras-h5-weights": weights alone in HDF5, listed in the attributes ``layer_names`` and ``weight_names``.

The description is read as JSON and stays data: nothing that it names is imported or called.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from torch import Tensor

from xception.errors import ConfigError, WeightsError
from xception.weights.container import parse_json_object
from xception.weights.files import open_regular, shown
from xception.weights.foreign import ForeignFile, ForeignTensor
from xception.weights.hdf5 import SIGNATURE, Hdf5, read_hdf5
from xception.weights.keras_zip import member_region, read_members, read_small
from xception.weights.regions import FileRegion, Window

Kind = Literal["keras", "keras-weights", "keras-h5", "keras-h5-weights"]

NOTES = "xception"  # where our own files say what Keras has no field for; Keras does not look there
MAX_DESCRIPTION_BYTES = 8 << 20  # that of Inception v3 has a quarter of a megabyte
_MAX_BRACKETS = 3 << 16
_MAX_NAMES = 20_000


@dataclass(frozen=True, kw_only=True)
class KerasContents:
    """What a Keras file holds besides its tensors; `ForeignFile.facts` has it under "keras".

    `description` is the model's own, as JSON; `loss` what it was trained with, as Keras spells it. `groups` are an old
    HDF5 file's lists: top-level layer, in the file's order -> (weight's name, tensor's path), in the file's order.
    `notes` are our own, in a file that was written here: class names and preprocessing.
    """

    kind: Kind
    version: str = ""
    description: Mapping[str, Any] | None = None
    loss: Any = None
    groups: Mapping[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    notes: Mapping[str, Any] | None = None


def read_keras_file(path: str | os.PathLike[str]) -> ForeignFile:
    """The tensors of a Keras file, still on the disk, and in `facts` its `KerasContents`.

    Raises `WeightsError`, naming the file, for one that is damaged, hostile, or not Keras's.
    """
    path = os.fspath(path)
    with naming(path), open_regular(path) as stream:
        region = FileRegion.of(path, stream)
        window = Window(stream, 0, region.size)
        start = window.read(0, min(8, region.size))
        if start.startswith(b"PK"):
            container, tensors, contents = "keras-zip", *_read_archive(region, window)
        elif start == SIGNATURE:
            container, tensors, contents = "hdf5", *_read_hdf5_file(read_hdf5(region))
        else:
            raise WeightsError("neither an HDF5 file nor a .keras archive")
    named = {name: replace(t, read=partial(_read_named, path, name, t.read)) for name, t in tensors.items()}
    return ForeignFile(path=path, container=container, tensors=named, facts={"keras": contents})


def _read_named(path: str, name: str, read: Callable[[], Tensor]) -> Tensor:
    with naming(path):
        try:
            return read()
        except WeightsError as error:
            raise WeightsError(f"tensor {name[:80]!r}: {error}") from error


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Put the file's name before what is wrong with it, once; too deep a nesting is wrong as well."""
    try:
        yield
    except RecursionError:
        raise WeightsError(f"cannot load {shown(path)}: its description is nested too deeply") from None
    except (ConfigError, WeightsError) as error:  # a config that came from a file is the file's problem
        text = str(error)
        if isinstance(error, WeightsError) and shown(path) in text:
            raise
        raise WeightsError(f"cannot load {shown(path)}: {text if len(text) <= 500 else text[:500] + '...'}") from error


def _read_archive(region: FileRegion, window: Window) -> tuple[dict[str, ForeignTensor], KerasContents]:
    members = read_members(window)
    lacking = {"config.json", "model.weights.h5"} - members.keys()
    if lacking:
        raise WeightsError(f"a zip archive without {sorted(lacking)[0]}: no Keras file")
    description = _description(read_small(window, members["config.json"], MAX_DESCRIPTION_BYTES), "config.json")
    metadata: dict[str, Any] = {}
    if "metadata.json" in members:
        metadata = _description(read_small(window, members["metadata.json"], 1 << 20), "metadata.json")
    hdf5 = read_hdf5(member_region(region, window, members["model.weights.h5"]))
    training, notes = description.get("compile_config"), metadata.get(NOTES)
    contents = KerasContents(
        kind="keras",
        version=str(metadata.get("keras_version", ""))[:40],
        description=description,
        loss=training.get("loss") if isinstance(training, dict) else None,
        notes=notes if isinstance(notes, dict) else None,
    )
    return hdf5.tensors, contents


def _read_hdf5_file(hdf5: Hdf5) -> tuple[dict[str, ForeignTensor], KerasContents]:
    root = hdf5.texts.get("", {})
    shared: dict[str, Any] = {
        "version": str(root.get("keras_version", ""))[:40],
        "notes": _json_text(root, NOTES) if NOTES in root else None,
    }
    if "model_config" in root:
        contents = KerasContents(
            kind="keras-h5",
            description=_json_text(root, "model_config"),
            loss=_json_text(root, "training_config").get("loss"),
            groups=_groups(hdf5, "model_weights/"),
            **shared,
        )
    elif groups := _groups(hdf5, "") or _groups(hdf5, "model_weights/"):
        contents = KerasContents(kind="keras-h5-weights", groups=groups, **shared)
    elif any(name.endswith("/vars/0") for name in hdf5.tensors):
        contents = KerasContents(kind="keras-weights", **shared)
    else:
        raise WeightsError("an HDF5 file without a Keras model: no layer_names, and no layers/.../vars")
    return hdf5.tensors, contents


def _groups(hdf5: Hdf5, prefix: str) -> dict[str, tuple[tuple[str, str], ...]]:
    groups: dict[str, tuple[tuple[str, str], ...]] = {}
    for layer in _names(hdf5.texts.get(prefix.rstrip("/"), {}), "layer_names"):
        path = prefix + layer
        if path not in hdf5.texts or layer in groups:
            raise WeightsError(f"layer {layer[:80]!r} is listed, and is not there once")
        weights = _names(hdf5.texts[path], "weight_names")
        for weight in weights:
            if f"{path}/{weight}" not in hdf5.tensors:
                raise WeightsError(f"weight {weight[:80]!r} of layer {layer[:80]!r} is listed, and is not there")
        groups[layer] = tuple((weight, f"{path}/{weight}") for weight in weights)
    return groups


def _names(texts: Mapping[str, str | list[str]], name: str) -> list[str]:
    """A list of names; one that is too long for an attribute is continued under name0, name1, ..."""
    parts = [texts[name]] if name in texts else []
    while name not in texts and f"{name}{len(parts)}" in texts:
        parts.append(texts[f"{name}{len(parts)}"])
    names = [item for part in parts for item in (part if isinstance(part, list) else [part])]
    if len(names) > _MAX_NAMES:
        raise WeightsError(f"more than {_MAX_NAMES:,} names in a list")
    return names


def _json_text(texts: Mapping[str, str | list[str]], name: str) -> dict[str, Any]:
    text = texts.get(name, "{}")
    if not isinstance(text, str):
        raise WeightsError(f"attribute {name} is a list, expected a text")
    return _description(text.encode("utf-8", "surrogateescape"), name)


def _description(data: bytes, what: str) -> dict[str, Any]:
    if len(data) > MAX_DESCRIPTION_BYTES or data.count(b"{") + data.count(b"[") > _MAX_BRACKETS:
        raise WeightsError(f"{what} is too large: {len(data):,} bytes")
    return parse_json_object(data, what)
