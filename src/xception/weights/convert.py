"""Any weights file into any other: read by content, written by what the target's name or `to` asks for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from xception.errors import ConfigError, WeightsError
from xception.weights.bundle import BundleInfo, save_bundle
from xception.weights.files import shown
from xception.weights.imports import Imported, import_weights
from xception.weights.keras_write import KERAS_KINDS, write_keras
from xception.weights.skeleton import tensors_of
from xception.weights.torch_write import TORCH_FAMILIES, torch_families, write_torch

BUNDLE = "bundle"
# What a target's name asks for, the longest ending first.
_ENDINGS = {".weights.h5": "keras-weights", ".keras": "keras", ".h5": "keras-h5", ".safetensors": BUNDLE}
_TORCH_ENDINGS = (".pth", ".pt", ".bin")


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What was read, what was written, and what could be checked on the way.

    `checksum` is a SHA-256 over the source's tensors; `tensors_ignored` mean nothing to a network (counters,
    optimiser slots); `fresh` names tensors that the source did not have.
    """

    source: str
    target: str
    format: str
    to: str
    model: str
    num_classes: int
    input_size: int
    parameters: int
    tensors_used: int
    tensors_unused: int
    tensors_ignored: int
    checksum: str | None
    fresh: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return {**asdict(self), "fresh": list(self.fresh)}


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
    """Read `source`, whatever it is, and write its network to `target`.

    `to` is one of `targets()`; by default the target's name decides: .safetensors is our bundle, .keras, .weights.h5
    and .h5 are Keras's, .pth is the first family of timm's or torchvision's that can express the network exactly.
    `class_names` replace the file's own, which few formats hold. Raises `WeightsError` or `ConfigError` for what
    cannot be read or expressed; nothing is written then.
    """
    imported = import_weights(source, trunk_only=trunk_only)
    if class_names is not None:
        imported = replace(imported, info=_renamed(imported.info, class_names))
    kind = to or _kind_for(target, imported)
    if kind not in targets():
        raise ConfigError(f"cannot write {kind!r}: expected one of {', '.join(targets())}")
    if imported.fresh and kind != BUNDLE:
        raise WeightsError(f"{shown(source)} holds a trunk without its classifier, which only a bundle can hold")
    _write(target, imported, kind)
    tensors = tensors_of(imported.model)
    report = imported.report
    return Conversion(
        source=os.fspath(source),
        target=os.fspath(target),
        format=imported.format,
        to=kind,
        model=imported.info.model,
        num_classes=len(imported.info.class_names),
        input_size=imported.info.preprocess.size[0],
        parameters=sum(p.numel() for p in imported.model.parameters()),
        tensors_used=len(tensors) if report is None else report.tensors_used,
        tensors_unused=0 if report is None else report.tensors_unused,
        tensors_ignored=0 if report is None else report.tensors_ignored,
        checksum=None if report is None else report.checksum,
        fresh=imported.fresh,
    )


def _kind_for(target: str | os.PathLike[str], imported: Imported) -> str:
    name = os.fspath(target).lower()
    for ending, kind in _ENDINGS.items():
        if name.endswith(ending):
            return kind
    if name.endswith(_TORCH_ENDINGS):
        families = torch_families(imported.model)
        if not families:
            raise WeightsError(
                f"no network of timm or torchvision can express this {imported.info.model} exactly "
                "(its options or numerics differ): write a .safetensors bundle or a Keras file"
            )
        return families[0]
    raise ConfigError(
        f"cannot tell what {shown(target)} should be: expected a name in .safetensors, .keras, .weights.h5, .h5 or "
        ".pth, or --to"
    )


def _write(target: str | os.PathLike[str], imported: Imported, kind: str) -> None:
    if kind == BUNDLE:
        provenance = {**imported.info.provenance, "fresh": list(imported.fresh)}
        save_bundle(target, imported.model, replace(imported.info, provenance=provenance))
    elif kind in KERAS_KINDS:
        write_keras(target, imported.model, imported.info, kind)
    else:
        write_torch(target, imported.model, kind)


def _renamed(info: BundleInfo, class_names: Sequence[str]) -> BundleInfo:
    if len(class_names) != len(info.class_names):
        raise ConfigError(f"expected {len(info.class_names)} class names, got {len(class_names)}")
    return replace(info, class_names=tuple(class_names))
