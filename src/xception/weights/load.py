"""Networks with trained weights: a whole one as it was saved, or a trunk under a new classifier."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from xception.errors import WeightsError
from xception.models import registry
from xception.ops.backend import active_backend, available_levels
from xception.weights.bundle import BundleInfo, allowance_of, declared, find_bundle, open_bundle, read_bundle_info
from xception.weights.container import Header, read_tensors
from xception.weights.detect import container_of
from xception.weights.files import shown
from xception.weights.imports import Imported, foreign_info, import_weights
from xception.weights.skeleton import build_skeleton, check_fit, signature, tensors_of


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """What became of a network's tensors: `loaded` from the bundle, `fresh` left at their random start."""

    info: BundleInfo
    loaded: tuple[str, ...]
    fresh: tuple[str, ...]


def load_model(source: str | os.PathLike[str]) -> tuple[nn.Module, BundleInfo]:
    """The trained network of a run folder, a bundle or any public checkpoint file, on the CPU and in eval mode.

    Raises `WeightsError` where `source` is none of these, or has a trunk only; a registry name is answered with what
    to give instead.
    """
    active_backend()  # says so, once, where only plain PyTorch is there
    available_levels()  # a wrong XCEPTION_MAX_ISA is a mistake here as it is anywhere
    _require_file(source)
    imported = import_weights(source)
    if imported.fresh:
        raise WeightsError(
            f"{shown(source)} holds a trunk without its classifier: train one on it (xception train DATA --weights FILE)"
        )
    return imported.model, imported.info


def read_info(source: str | os.PathLike[str], *, trunk_only: bool = False) -> BundleInfo:
    """What a run folder, bundle or public checkpoint file says about itself; its weights are not read."""
    _require_file(source)
    file = find_bundle(source)
    if container_of(file) == "bundle":
        return read_bundle_info(file)
    return foreign_info(file, trunk_only=trunk_only)


def _require_file(source: str | os.PathLike[str]) -> None:
    if os.path.lexists(find_bundle(source)):
        return
    if os.fspath(source) in registry.list_models():
        raise WeightsError(
            f"{os.fspath(source)!r} names a network, and its weights would be random: "
            "give a trained one, a bundle (model.safetensors), a run folder or a checkpoint file"
        )
    raise WeightsError(f"no such bundle, run folder or checkpoint file: {shown(source)}")


def create_model(
    name: str,
    *,
    weights: str | os.PathLike[str] | None = None,
    class_names: Sequence[str] | None = None,
    trunk_only: bool = False,
    **options: Any,
) -> nn.Module:
    """The network `name`; with `weights` (a bundle or run folder) trained, else with random weights.

    `options` replace fields of the config; with `weights` the config starts from the bundle's, so that
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

    The bundle must hold the network `name`. Every tensor of its trunk is used and none of the new trunk is
    left over. The classifier (auxiliary ones too) is loaded where it is the same one: as many classes and,
    if `class_names` is given, the same names in the same order; otherwise it stays fresh, drawn from torch's
    global random state. Raises `WeightsError` naming the tensors that do not fit, `ConfigError` for a wrong
    option.
    """
    file = find_bundle(weights)
    if os.path.lexists(file) and container_of(file) != "bundle":
        return _transfer(import_weights(file, trunk_only=trunk_only), name, class_names, options)
    with open_bundle(file) as (stream, header, info):
        if info.model != name:
            raise WeightsError(f"it holds weights of {info.model!r}, not of {name!r}")
        own = registry.config_to_dict(registry.config_from_dict(name, info.config))
        config = _with_options(name, own, options)
        if config["in_channels"] != own["in_channels"]:
            raise WeightsError(
                f"its network takes {own['in_channels']} input channels, not the {config['in_channels']} asked for"
            )
        source = signature(tensors_of(build_skeleton(name, own, allowance_of(header))))
        check_fit(source, declared(header))
        target = signature(tensors_of(build_skeleton(name, config)))
        same_classes = class_names is None or tuple(class_names) == info.class_names
        if same_classes and config["num_classes"] == own["num_classes"]:
            classifier: frozenset[str] = frozenset()
        else:
            classifier = classifier_tensors(name, own) | classifier_tensors(name, config)
        check_fit(_without(target, classifier), _without(source, classifier))
        model = registry.build(name, registry.config_from_dict(name, config))
        _read_trunk(stream, header, tensors_of(model), classifier)
    fresh = tuple(key for key in target if key in classifier)
    loaded = tuple(key for key in target if key not in classifier)
    return model, Transfer(info=info, loaded=loaded, fresh=fresh)


def _transfer(
    imported: Imported, name: str, class_names: Sequence[str] | None, options: dict[str, Any]
) -> tuple[nn.Module, Transfer]:
    """`create_with_transfer` for a network that is in memory already, as a public checkpoint's is."""
    info = imported.info
    if info.model != name:
        raise WeightsError(f"it holds weights of {info.model!r}, not of {name!r}")
    own = registry.config_to_dict(registry.config_from_dict(name, info.config))
    config = _with_options(name, own, options)
    if config["in_channels"] != own["in_channels"]:
        raise WeightsError(
            f"its network takes {own['in_channels']} input channels, not the {config['in_channels']} asked for"
        )
    fresh = set(imported.fresh)
    same_classes = class_names is None or tuple(class_names) == info.class_names
    if not (same_classes and config["num_classes"] == own["num_classes"]):
        fresh |= classifier_tensors(name, own) | classifier_tensors(name, config)
    source = imported.model.state_dict()
    model = registry.build(name, registry.config_from_dict(name, config))
    target = model.state_dict()
    kept = frozenset(fresh)
    check_fit(_without(signature(target), kept), _without(signature(source), kept))
    with torch.no_grad():
        for key, tensor in target.items():
            if key not in fresh:
                tensor.copy_(source[key])
    return model, Transfer(
        info=info,
        loaded=tuple(key for key in target if key not in fresh),
        fresh=tuple(key for key in target if key in fresh),
    )


def _read_trunk(stream: BinaryIO, header: Header, tensors: Mapping[str, Tensor], left_out: frozenset[str]) -> None:
    """Fill `tensors`, except those left out; a bundle in another precision is brought to the network's own."""
    read: dict[str, Tensor | None] = {}
    for entry in header.entries:
        if entry.name in left_out:
            read[entry.name] = None
        elif tensors[entry.name].dtype == entry.dtype:
            read[entry.name] = tensors[entry.name]
        else:
            read[entry.name] = torch.empty(entry.shape, dtype=entry.dtype)
    read_tensors(stream, header, read)
    with torch.no_grad():
        for name, source in read.items():
            if source is not None and source is not tensors[name]:
                tensors[name].copy_(source)


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
