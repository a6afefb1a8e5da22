"""Any weights file in, by its content: our bundle, or one of the families that others published.

What is known of a foreign file comes from the file: network, class count, input size, head, numerics. What it cannot
say (the names of its classes) is filled in only where it is certain: ImageNet's thousand, else their numbers.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from xception.errors import ConfigError, WeightsError
from xception.weights.bundle import BundleInfo, load_bundle, read_bundle_info
from xception.weights.catalog import Checkpoint
from xception.weights.detect import Container, container_of
from xception.weights.files import shown
from xception.weights.foreign import ForeignFile, ImportReport, Recognised, import_tensors
from xception.weights.keras_file import read_keras_file
from xception.weights.keras_model import recognise_keras
from xception.weights.locate import locate
from xception.weights.names_torch import recognise_torch
from xception.weights.names_torchvision import recognise_torchvision
from xception.weights.torch_file import read_torch_file


@dataclass(frozen=True, kw_only=True)
class Imported:
    """A network with its weights, what is known of them, and how they came in.

    `fresh` names the tensors that the file does not have: not empty for a trunk without its classifier. `report` is
    None for our own bundle, whose checks are its reader's.
    """

    model: nn.Module
    info: BundleInfo
    format: str
    fresh: tuple[str, ...] = ()
    report: ImportReport | None = None


def import_weights(source: str | os.PathLike[str], *, model: str | None = None, trunk_only: bool = False) -> Imported:
    """The network in a bundle, a run folder, any public checkpoint file, or of a published name.

    On the CPU and in eval mode. `model` is the network that it has to be, and that ``"imagenet"`` is meant for (None:
    any). With `trunk_only` a head that cannot be represented is left out, and stays fresh. Raises `WeightsError` naming
    the file and what in it cannot be used; nothing in the file is ever run.
    """
    located = locate(source, model=model)
    container = container_of(located.path)
    if container == "bundle":
        network, info = load_bundle(located.path)
        _require_network(source, info.model, model)
        return Imported(model=network, info=info, format="bundle", fresh=fresh_in(info))
    with _named(located.path):
        foreign = _read(os.fspath(located.path), container)
        found = _recognise(foreign, trunk_only=trunk_only)
        _require_network(source, found.model, model)
        network, report = import_tensors(foreign, found)
        info = _info(found, foreign, located.checkpoint)
        return Imported(model=network, info=info, format=found.format, fresh=found.fresh, report=report)


def imported_info(source: str | os.PathLike[str], *, model: str | None = None, trunk_only: bool = False) -> BundleInfo:
    """What `import_weights` would say of the network, without reading its weights."""
    located = locate(source, model=model)
    container = container_of(located.path)
    if container == "bundle":
        info = read_bundle_info(located.path)
    else:
        with _named(located.path):
            foreign = _read(os.fspath(located.path), container)
            info = _info(_recognise(foreign, trunk_only=trunk_only), foreign, located.checkpoint)
    _require_network(source, info.model, model)
    return info


def _require_network(source: str | os.PathLike[str], found: str, wanted: str | None) -> None:
    if wanted is not None and found != wanted:
        raise WeightsError(f"{shown(source)} holds weights of {found!r}, not of {wanted!r}")


def fresh_in(info: BundleInfo) -> tuple[str, ...]:
    """The tensors of a bundle that were never trained: those of the head, where only a trunk was converted."""
    fresh = info.provenance.get("fresh")
    return tuple(map(str, fresh)) if isinstance(fresh, list) else ()


def _read(path: str, container: Container) -> ForeignFile:
    if container in ("hdf5", "keras-zip"):
        return read_keras_file(path)
    return read_torch_file(path)


def _recognise(foreign: ForeignFile, *, trunk_only: bool) -> Recognised:
    for recognise in (recognise_keras, recognise_torch, recognise_torchvision):
        found = recognise(foreign, trunk_only=trunk_only)
        if found is not None:
            return found
    names = sorted(foreign.tensors)[:3]
    some = ", ".join(repr(name[:60]) for name in names) or "none"
    raise WeightsError(
        f"{len(foreign.tensors)} tensors ({some}, ...) that are no Xception, aligned Xception, Inception v3, "
        "GoogLeNet, VGG-16 or ResNet-152"
    )


def _info(found: Recognised, foreign: ForeignFile, checkpoint: Checkpoint | None) -> BundleInfo:
    """Where the file came by its name, how images are prepared for it is known from its publisher."""
    count = found.config["num_classes"]
    names = found.class_names
    if names is None and count == IMAGENET_CLASSES and not found.fresh:
        names = imagenet_names()
    source: dict[str, Any] = {"format": found.format, "container": foreign.container}
    # In what a training script wrapped the tensors, and whether they are the average that it kept of them.
    source |= {key: foreign.facts[key] for key in ("wrapper", "average") if foreign.facts.get(key)}
    if checkpoint is not None:
        source |= {"name": checkpoint.name, "url": checkpoint.url, "license": checkpoint.license}
    return BundleInfo(
        model=found.model,
        config=found.config,
        class_names=names or tuple(str(k) for k in range(count)),
        multi_label=found.multi_label,
        preprocess=found.preprocess if checkpoint is None else checkpoint.preprocess,
        provenance={"source": source},
    )


IMAGENET_CLASSES = 1000


def imagenet_names() -> tuple[str, ...]:
    """The names of ImageNet's 1,000 classes in the order of their synset numbers, as every family has them."""
    from torchvision.models import Inception_V3_Weights

    names: Any = Inception_V3_Weights.IMAGENET1K_V1.meta["categories"]
    return tuple(names)


@contextlib.contextmanager
def _named(path: str | os.PathLike[str]) -> Iterator[None]:
    """Put the file's name before what is wrong with it, once."""
    try:
        yield
    except (ConfigError, WeightsError) as error:
        if shown(path) in str(error):
            raise
        raise WeightsError(f"cannot load {shown(path)}: {error}") from error
