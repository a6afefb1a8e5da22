"""Our networks under the names of timm, torchvision and Cadene, in files that those load strictly."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from xception.errors import WeightsError
from xception.models import registry
from xception.weights.container import write_container
from xception.weights.files import atomic_write, shown
from xception.weights.foreign import to_theirs
from xception.weights.names_torch import ALIGNED, GOOGLENET, INCEPTION_V3, XCEPTION, Scheme


@dataclass(frozen=True, kw_only=True)
class TorchFamily:
    """A network of another library: ours of the registry's `model` with `options`, its classifier at `head`."""

    model: str
    scheme: Scheme
    head: str
    options: Mapping[str, Any] = field(default_factory=dict)
    in_channels: int | None = None  # None: as many as one likes


_PORT = {"numerics": "torch"}
TORCH_FAMILIES: Mapping[str, TorchFamily] = {
    "timm/legacy_xception": TorchFamily(model="xception", scheme=XCEPTION, head="fc", options=_PORT),
    "cadene/xception": TorchFamily(model="xception", scheme=XCEPTION, head="last_linear", options=_PORT, in_channels=3),
    **{
        f"timm/{name}": TorchFamily(model=name, scheme=ALIGNED, head="head.fc")
        for name in ("xception41", "xception65", "xception71", "xception41p", "xception65p")
    },
    "torchvision/inception_v3": TorchFamily(
        model="inception_v3_torchvision", scheme=INCEPTION_V3, head="fc", in_channels=3
    ),
    "timm/inception_v3": TorchFamily(model="inception_v3_torchvision", scheme=INCEPTION_V3, head="fc"),
    "torchvision/googlenet": TorchFamily(model="googlenet", scheme=GOOGLENET, head="fc", in_channels=3),
}
# Settings that change neither a tensor's meaning nor what the network computes from an image.
_FREE = {
    "num_classes",
    "in_channels",
    "input_size",
    "dropout",
    "auxiliary",
    "auxiliary_dropout",
    "gradient_checkpointing",
}


def torch_families(model: nn.Module) -> tuple[str, ...]:
    """The families that can express `model` exactly, for `to_torch_state_dict`."""
    return tuple(name for name, family in TORCH_FAMILIES.items() if not _obstacles(model, family))


def to_torch_state_dict(model: nn.Module, family: str) -> dict[str, Tensor]:
    """The model's tensors under the names of `family`, on the CPU; nothing is changed but names.

    The other library's network of as many classes and channels loads them with ``strict=True`` (with
    ``aux_logits=True`` if ours has auxiliary classifiers) and gives the same logits for the same input; torchvision's
    with ``transform_input=False``. Raises `WeightsError` for an unknown family, and for a model that the family
    cannot express, naming the setting.
    """
    if family not in TORCH_FAMILIES:
        close = get_close_matches(family, TORCH_FAMILIES, n=3)
        raise WeightsError(
            f"unknown family {family!r}: "
            + (f"did you mean {' or '.join(close)}?" if close else f"choose from {', '.join(TORCH_FAMILIES)}")
        )
    spec = TORCH_FAMILIES[family]
    if obstacles := _obstacles(model, spec):
        able = torch_families(model)
        hint = f"; {', '.join(able)} can" if able else ""
        raise WeightsError(f"{family} cannot express this network: {', '.join(obstacles[:4])}{hint}")
    config: Any = model.config
    names = {**spec.scheme.names(config), "classifier.linear": spec.head}
    tensors = {}
    for ours, tensor in model.state_dict().items():
        module, _, leaf = ours.rpartition(".")
        theirs = to_theirs(tensor.detach().cpu(), "same")
        if theirs.untyped_storage().nbytes() != theirs.nbytes:
            theirs = theirs.clone()  # `torch.save` would write all of the storage that this is a part of
        tensors[f"{names[module]}.{leaf}"] = theirs
    return tensors


def write_torch(path: str | os.PathLike[str], model: nn.Module, family: str) -> None:
    """Write `to_torch_state_dict` to `path` in one step: a name that ends in ".safetensors" gives such a file,
    any other what `torch.save` makes of a dict. Raises `WeightsError` as that does, and where it cannot be written.
    """
    try:
        tensors = to_torch_state_dict(model, family)
    except WeightsError as error:
        raise WeightsError(f"cannot write {shown(path)}: {error}") from None
    if os.fspath(path).lower().endswith(".safetensors"):
        atomic_write(path, lambda stream: write_container(stream, tensors, {"format": "pt"}))
    else:
        atomic_write(path, lambda stream: torch.save(tensors, stream))


def _obstacles(model: nn.Module, family: TorchFamily) -> list[str]:
    """What of the model's settings the family does not have."""
    config: Any = getattr(model, "config", None)
    expected = registry.get_config(family.model, **family.options)
    if type(config) is not type(expected):
        return [f"it is a {type(model).__name__}, not of the kind of {family.model!r}"]
    ours, theirs = registry.config_to_dict(config), registry.config_to_dict(expected)
    found = [
        f"{name} is {ours[name]!r}, not {theirs[name]!r}"
        for name in ours
        if name not in _FREE and ours[name] != theirs[name]
    ]
    if family.in_channels not in (None, config.in_channels):
        found.append(f"in_channels is {config.in_channels}, not {family.in_channels}")
    return found
