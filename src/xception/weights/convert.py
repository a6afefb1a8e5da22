"""Any weights file into any other: read by content, written by what the target's name or `to` asks for, read back."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xception.errors import ConfigError, WeightsError
from xception.models import registry
from xception.weights.bundle import BundleInfo, save_bundle
from xception.weights.files import check_writable, shown
from xception.weights.imports import Imported, import_weights
from xception.weights.keras_write import KERAS_KINDS, write_keras
from xception.weights.skeleton import tensors_of
from xception.weights.torch_write import TORCH_FAMILIES, to_torch_state_dict, torch_families, write_torch

BUNDLE = "bundle"
_TORCH = "torch"  # stands for the first family that can express the network
# What a target's name asks for, the longest ending first.
_ENDINGS = {
    ".weights.h5": "keras-weights",
    ".keras": "keras",
    ".h5": "keras-h5",
    ".hdf5": "keras-h5",
    ".safetensors": BUNDLE,
    ".pth": _TORCH,
    ".pt": _TORCH,
    ".bin": _TORCH,
}
_NAMED = ("class_names", "multi_label", "preprocess")  # what a bundle says and other formats may have no place for


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What was read, what was written, and what could be checked on the way.

    `container` is how the source stores its tensors, `wrapper` the keys of a training checkpoint under which they lay,
    `average` whether they are a running average of the weights (EMA); of a bundle none of these is known. `checksum` is
    a SHA-256 over the source's tensors. `tensors_ignored` mean nothing to a network (counters, optimiser slots);
    `fresh` names tensors that the source did not have, such as those of a classifier of `num_classes`. `input_size` is
    the longer side of `image_size`, height and width. `not_kept` is what the target has no place for, found by reading
    it back.
    """

    source: str
    target: str
    format: str
    container: str | None
    wrapper: str | None
    average: bool | None
    to: str
    model: str
    num_classes: int
    input_size: int
    image_size: tuple[int, int]
    parameters: int
    tensors_used: int
    tensors_unused: int
    tensors_ignored: int
    checksum: str | None
    fresh: tuple[str, ...]
    not_kept: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def targets() -> tuple[str, ...]:
    """Everything that `convert` can write."""
    return (BUNDLE, *KERAS_KINDS, *TORCH_FAMILIES)


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    to: str | None = None,
    trunk_only: bool = False,
    class_names: Sequence[str] | None = None,
) -> Conversion:
    """Read `source`, whatever it is, write its network to `target`, and see that the same network comes back.

    `to` is one of `targets()`; by default the target's name decides: .safetensors is our bundle, .keras, .weights.h5
    and .h5 are Keras's, .pth is the first family of timm's or torchvision's that can express the network exactly.
    `class_names` replace the file's own, which few formats hold. `target` may be `source`: the new file is put in its
    place in one step, once it is whole. Raises `WeightsError` or `ConfigError` for what cannot be read or expressed;
    nothing is written then.
    """
    kind = _kind_of_request(target, to)
    check_writable(target)
    imported = import_weights(source, trunk_only=trunk_only)
    if class_names is not None:
        imported = replace(imported, info=_renamed(imported.info, class_names))
    if imported.fresh and kind != BUNDLE:
        raise WeightsError(
            f"{shown(source)} gives a trunk without its classifier, which only a bundle (.safetensors) can hold"
        )
    if kind == _TORCH:
        kind = _first_family(target, imported)
    if kind == BUNDLE and imported.fresh:
        provenance = {**imported.info.provenance, "fresh": list(imported.fresh)}
        imported = replace(imported, info=replace(imported.info, provenance=provenance))
    _write(target, imported, kind)
    not_kept = _read_back(target, imported)
    report, info = imported.report, imported.info
    origin: Any = {} if report is None else info.provenance.get("source", {})
    return Conversion(
        source=os.fspath(source),
        target=os.fspath(target),
        format=imported.format,
        container=origin.get("container"),
        wrapper=origin.get("wrapper") or None,
        average=None if report is None else bool(origin.get("average")),
        to=kind,
        model=info.model,
        num_classes=len(info.class_names),
        input_size=max(info.preprocess.size),
        image_size=info.preprocess.size,
        parameters=sum(p.numel() for p in imported.model.parameters()),
        tensors_used=len(tensors_of(imported.model)) if report is None else report.tensors_used,
        tensors_unused=0 if report is None else report.tensors_unused,
        tensors_ignored=0 if report is None else report.tensors_ignored,
        checksum=None if report is None else report.checksum,
        fresh=imported.fresh,
        not_kept=not_kept,
    )


def _kind_of_request(target: str | os.PathLike[str], to: str | None) -> str:
    """What is to be written; `ConfigError` where that is not known, or where its readers would not find it."""
    name = os.fspath(target).lower()
    kind = next((kind for ending, kind in _ENDINGS.items() if name.endswith(ending)), None)
    if to is None:
        if kind is None:
            raise ConfigError(
                f"cannot tell what {shown(target)} should be: expected a name in .safetensors, .keras, .weights.h5, "
                ".h5 or .pth, or --to"
            )
        return kind
    if to not in targets():
        raise ConfigError(f"cannot write {to!r}: expected one of {', '.join(targets())}")
    if to in KERAS_KINDS and kind != to:
        ending = next(ending for ending, written in _ENDINGS.items() if written == to)
        raise ConfigError(f"Keras tells its files by their names: one of the kind {to!r} must end in {ending}")
    return to


def _first_family(target: str | os.PathLike[str], imported: Imported) -> str:
    """The family for a .pth file; `WeightsError` telling what of the network the likeliest one does not have."""
    if families := torch_families(imported.model):
        return families[0]
    config: Any = imported.model.config
    alike = [
        name
        for name, family in TORCH_FAMILIES.items()
        if type(registry.get_config(family.model, **family.options)) is type(config)
    ]
    alike.sort(key=lambda name: TORCH_FAMILIES[name].model != imported.info.model)  # stable: its own model first
    reason = f"neither timm nor torchvision has a network of the kind of {imported.info.model!r}"
    if alike:
        try:
            to_torch_state_dict(imported.model, alike[0])
        except WeightsError as error:
            reason = str(error)
    raise WeightsError(f"cannot write {shown(target)}: {reason}; a bundle (.safetensors) can hold it")


def _write(target: str | os.PathLike[str], imported: Imported, kind: str) -> None:
    if kind == BUNDLE:
        save_bundle(target, imported.model, imported.info)
    elif kind in KERAS_KINDS:
        write_keras(target, imported.model, imported.info, kind)
    else:
        write_torch(target, imported.model, kind)


def _read_back(target: str | os.PathLike[str], written: Imported) -> tuple[str, ...]:
    """What the target does not keep. Raises `WeightsError` unless its tensors are, bit for bit, those written.

    Where the target has another precision, they must be what the written ones become in it.
    """
    try:
        again = import_weights(Path(target))  # a path, as a published name would mean something else
    except (ConfigError, WeightsError) as error:
        raise WeightsError(f"{shown(target)} was written, and cannot be read back: {error}") from error
    expected, found = tensors_of(written.model), tensors_of(again.model)
    # Keras has no counters of batches.
    names = [name for name in expected if not name.endswith("num_batches_tracked")]
    wrong = [name for name in names if name not in found or not _same_bits(expected[name], found[name])]
    if wrong or again.fresh != written.fresh:
        raise WeightsError(f"{shown(target)} was written, and reads back differently: {', '.join(wrong[:3])}")
    return tuple(name for name in _NAMED if getattr(again.info, name) != getattr(written.info, name))


def _same_bits(expected: Tensor, found: Tensor) -> bool:
    """Also of numbers that are none, which are not equal to themselves."""
    expected = expected.detach().to(found.dtype)
    if expected.shape != found.shape:
        return False
    return torch.equal(*(t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (expected, found)))


def _renamed(info: BundleInfo, class_names: Sequence[str]) -> BundleInfo:
    if len(class_names) != len(info.class_names):
        raise ConfigError(f"expected {len(info.class_names)} class names, got {len(class_names)}")
    return replace(info, class_names=tuple(class_names))
