"""Networks with trained weights: a whole one as it was saved, or a trunk under a new classifier."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from xception.errors import WeightsError
from xception.models import registry
from xception.ops.backend import active_backend, available_levels
from xception.weights.bundle import BundleInfo
from xception.weights.files import shown
from xception.weights.imports import import_weights
from xception.weights.skeleton import build_skeleton, check_fit, signature, tensors_of


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """What became of a network's tensors: `loaded` from the file, `fresh` left at their random start."""

    info: BundleInfo
    loaded: tuple[str, ...]
    fresh: tuple[str, ...]


def load_model(source: str | os.PathLike[str]) -> tuple[nn.Module, BundleInfo]:
    """The trained network of a run folder, a bundle, any public checkpoint file or a published name.

    On the CPU and in eval mode. Raises `WeightsError` where `source` is none of these, or has a trunk only; a
    registry name is answered with what to give instead.
    """
    active_backend()  # says so, once, where only plain PyTorch is there
    available_levels()  # a wrong XCEPTION_MAX_ISA is a mistake here as it is anywhere
    imported = import_weights(source)
    if imported.fresh:
        raise WeightsError(
            f"{shown(source)} holds a trunk without its classifier: train one on it "
            "(xception train DATA --recipe finetune --weights FILE)"
        )
    return imported.model, imported.info


def create_model(
    name: str,
    *,
    weights: str | os.PathLike[str] | None = None,
    class_names: Sequence[str] | None = None,
    trunk_only: bool = False,
    **options: Any,
) -> nn.Module:
    """The network `name`; with `weights` (a file of any kind, a run folder, "imagenet") trained, else random.

    `options` replace fields of the config; with `weights` the config starts from the file's, so that
    ``create_model("xception", weights=path)`` is the saved network and ``num_classes=7`` puts a fresh
    classifier for 7 classes on its trunk. See `create_with_transfer`, which also tells what was loaded.
    """
    if weights is None:
        return registry.create_model(name, **options)
    return create_with_transfer(name, weights=weights, class_names=class_names, trunk_only=trunk_only, **options)[0]


def create_with_transfer(
    name: str,
    *,
    weights: str | os.PathLike[str],
    class_names: Sequence[str] | None = None,
    trunk_only: bool = False,
    **options: Any,
) -> tuple[nn.Module, Transfer]:
    """As `create_model` with `weights`, and a record of what was loaded and what is fresh.

    `weights` are those of the network `name`: a bundle, run folder, public checkpoint file, or a published name, such
    as ``"imagenet"``. Every tensor of their trunk is used and none of the new trunk is left over; with `trunk_only`, a
    head that cannot be represented is left out. The classifier (auxiliary ones too) is loaded where it is the same
    one: as many classes and, if `class_names` is given, the same names in the same order; otherwise it stays fresh,
    drawn from torch's global random state. Raises `WeightsError` naming the tensors that do not fit, `ConfigError`
    for a wrong option.
    """
    imported = import_weights(weights, model=name, trunk_only=trunk_only)
    info = imported.info
    own = registry.config_to_dict(registry.config_from_dict(name, info.config))
    config = _with_options(name, own, options)
    if config["in_channels"] != own["in_channels"]:
        raise WeightsError(
            f"{shown(weights)}: its network takes {own['in_channels']} input channels, "
            f"not the {config['in_channels']} asked for"
        )
    fresh = frozenset(imported.fresh)
    same_classes = class_names is None or tuple(class_names) == info.class_names
    if not (same_classes and config["num_classes"] == own["num_classes"]):
        fresh |= classifier_tensors(name, own) | classifier_tensors(name, config)
    source = tensors_of(imported.model)
    try:
        target = signature(tensors_of(build_skeleton(name, config)))
        check_fit(_without(target, fresh), _without(signature(source), fresh))
    except WeightsError as error:
        raise WeightsError(f"cannot load {shown(weights)}: {error}") from None
    model = registry.build(name, registry.config_from_dict(name, config))
    with torch.no_grad():
        for key, tensor in tensors_of(model).items():
            if key not in fresh:
                tensor.copy_(source[key])  # in another precision: brought to the network's own
    loaded = tuple(key for key in target if key not in fresh)
    return model, Transfer(info=info, loaded=loaded, fresh=tuple(key for key in target if key in fresh))


def classifier_tensors(name: str, config: dict[str, Any]) -> frozenset[str]:
    """The tensors of a network that depend on the number of classes, found by asking for one class more.

    This holds for every network of the registry, whatever it calls its classifiers.
    """
    one_more = {**config, "num_classes": config["num_classes"] + 1}
    tensors = signature(tensors_of(build_skeleton(name, config)))
    others = signature(tensors_of(build_skeleton(name, one_more)))
    return frozenset(key for key in tensors if tensors[key] != others.get(key))


def _with_options(name: str, config: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """The full config with `options`, which are checked and brought to their stored form, in their places."""
    asked = registry.config_to_dict(registry.get_config(name, **options))
    changed = {**config, **{key: asked[key] for key in options}}
    return registry.config_to_dict(registry.config_from_dict(name, changed))


def _without(
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]], names: frozenset[str]
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {key: value for key, value in tensors.items() if key not in names}
