"""Other people's files as data, and how their tensors become ours: the types that readers and adapters share.

A reader (`pytorch`, `keras`) turns a file into a `ForeignFile`: names, shapes and dtypes, with the numbers still on
the disk. A family's table of `Pair`s says which of its tensors is which of ours, in which layout; the same table
serves to read and to write. `import_tensors` then holds every shape against the network before memory is taken, and
sees to it that each tensor is used exactly once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from xception.data.preprocess import Preprocess
from xception.errors import WeightsError
from xception.models import registry
from xception.weights.skeleton import materialise

Layout = Literal["same", "hwio", "hwcm", "dense", "matrix"]

# Of each layout: the order of axes that brings theirs to ours. `matrix` is a 1x1 convolution stored as O I.
_TO_OURS: dict[Layout, tuple[int, ...]] = {
    "hwio": (3, 2, 0, 1),  # Keras convolution, H W I O -> O I H W
    "hwcm": (2, 3, 0, 1),  # Keras depthwise filter, H W C M -> C M H W (M is 1)
    "dense": (1, 0),  # Keras dense kernel, I O -> O I
}


def to_ours(tensor: Tensor, layout: Layout) -> Tensor:
    """Their tensor in our layout; values are moved, never changed."""
    if layout == "matrix":
        return tensor[:, :, None, None]
    return tensor if layout == "same" else tensor.permute(_TO_OURS[layout])


def to_theirs(tensor: Tensor, layout: Layout) -> Tensor:
    """The inverse of `to_ours`, contiguous."""
    if layout == "matrix":
        return tensor[:, :, 0, 0].contiguous()
    if layout == "same":
        return tensor.contiguous()
    order = _TO_OURS[layout]
    return tensor.permute([order.index(i) for i in range(len(order))]).contiguous()


def their_shape(shape: Sequence[int], layout: Layout) -> tuple[int, ...]:
    """The shape that a tensor of ours has in their layout."""
    if layout == "matrix":
        return tuple(shape[:2])
    if layout == "same":
        return tuple(shape)
    order = _TO_OURS[layout]
    return tuple(shape[order.index(i)] for i in range(len(order)))


@dataclass(frozen=True, kw_only=True)
class ForeignTensor:
    """A tensor that is still in its file. `read` takes memory for it, and for nothing else."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class ForeignFile:
    """What a reader found: tensors by name, and `facts` such as a Keras model's own description.

    `container` says how it is stored: "safetensors", "torch-zip", "torch-legacy", "hdf5", "keras-zip".
    """

    path: str
    container: str
    tensors: Mapping[str, ForeignTensor]
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """One tensor of ours, its name in a family, and the layout it has there."""

    ours: str
    theirs: str
    layout: Layout = "same"


@dataclass(frozen=True, kw_only=True)
class Recognised:
    """A foreign file that was understood: the network it holds, and where each tensor goes.

    `ignored` are tensors that mean nothing here (counters, optimiser slots, an average's twin), named; `computed`
    are tensors of ours that are worked out of several of theirs (a normalisation folded into a dense layer), each
    with the names it uses; `fresh` are tensors of ours that the file does not have (the head under trunk_only).
    """

    format: str
    model: str
    config: dict[str, Any]
    preprocess: Preprocess
    pairs: tuple[Pair, ...]
    class_names: tuple[str, ...] | None = None
    multi_label: bool = False
    ignored: tuple[str, ...] = ()
    computed: Mapping[str, tuple[tuple[str, ...], Callable[[Sequence[Tensor]], Tensor]]] = field(default_factory=dict)
    fresh: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ImportReport:
    """What can be checked without the source framework."""

    tensors_used: int
    tensors_unused: int
    tensors_ignored: int
    parameters: int
    checksum: str
    fresh: tuple[str, ...]


def import_tensors(file: ForeignFile, found: Recognised) -> tuple[nn.Module, ImportReport]:
    """The network with the file's numbers, in eval mode, and the report on it.

    Raises `WeightsError` naming the tensor where one is missing, left over, used twice, or of the wrong shape; all of
    this is decided before any tensor is read.
    """
    config = registry.config_from_dict(found.model, found.config)
    skeleton = registry.build_without_storage(found.model, config)
    targets = dict(skeleton.state_dict())
    counters = {name for name in targets if name.endswith("num_batches_tracked")}
    _check(file, found, targets, counters)
    # A whole network's random start would be overwritten: only a fresh head is worth drawing.
    model = registry.build(found.model, config) if found.fresh else materialise(skeleton, found.model, found.config)
    ours = model.state_dict()
    digest = hashlib.sha256()
    with torch.no_grad():
        for name in counters:
            ours[name].zero_()
        for pair in sorted(found.pairs, key=lambda p: p.theirs):
            tensor = file.tensors[pair.theirs].read()
            digest.update(pair.theirs.encode("utf-8", "surrogateescape"))
            digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            ours[pair.ours].copy_(to_ours(tensor, pair.layout))
        for name, (sources, compute) in found.computed.items():
            ours[name].copy_(compute([file.tensors[s].read() for s in sources]))
    used = {p.theirs for p in found.pairs} | {s for sources, _ in found.computed.values() for s in sources}
    report = ImportReport(
        tensors_used=len(used),
        tensors_unused=len(file.tensors.keys() - used - set(found.ignored)),
        tensors_ignored=len(found.ignored),
        parameters=sum(p.numel() for p in model.parameters()),
        checksum=digest.hexdigest(),
        fresh=found.fresh,
    )
    return model.eval(), report


def _check(file: ForeignFile, found: Recognised, targets: Mapping[str, Tensor], counters: Iterable[str]) -> None:
    seen_theirs: set[str] = set()
    for pair in found.pairs:
        if pair.theirs not in file.tensors:
            raise WeightsError(f"{found.format}: tensor {pair.theirs!r} is missing")
        if pair.theirs in seen_theirs:
            raise WeightsError(f"{found.format}: tensor {pair.theirs!r} is used twice")
        seen_theirs.add(pair.theirs)
        if pair.ours not in targets:
            raise WeightsError(f"{found.format}: {found.model} has no tensor {pair.ours!r}")
        expected, got = their_shape(targets[pair.ours].shape, pair.layout), file.tensors[pair.theirs].shape
        if got != expected:
            raise WeightsError(f"{found.format}: tensor {pair.theirs!r} has shape {got}, expected {expected}")
        if not file.tensors[pair.theirs].dtype.is_floating_point:
            raise WeightsError(
                f"{found.format}: tensor {pair.theirs!r} has dtype {file.tensors[pair.theirs].dtype}, expected floats"
            )
    for name, (sources, _) in found.computed.items():
        if name not in targets:
            raise WeightsError(f"{found.format}: {found.model} has no tensor {name!r}")
        for source in sources:
            if source not in file.tensors:
                raise WeightsError(f"{found.format}: tensor {source!r} is missing")
            seen_theirs.add(source)
    filled = [p.ours for p in found.pairs] + list(found.computed)
    if len(set(filled)) != len(filled):
        twice = next(name for name in filled if filled.count(name) > 1)
        raise WeightsError(f"{found.format}: {twice!r} would be filled twice")
    lacking = targets.keys() - set(filled) - set(found.fresh) - set(counters)
    if lacking:
        raise WeightsError(f"{found.format}: nothing in the file for {_some(lacking)}")
    unused = file.tensors.keys() - seen_theirs - set(found.ignored)
    if unused:
        raise WeightsError(f"{found.format}: tensors that have no place in {found.model}: {_some(unused)}")


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(map(repr, ordered[:4])) + (f" and {len(ordered) - 4} more" if len(ordered) > 4 else "")
