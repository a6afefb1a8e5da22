"""Names to networks: what there is, how it is configured, built, stored and described.

Importing this file imports PyTorch; the command line does so only where it needs a network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from xception.errors import ConfigError
from xception.models import (
    baselines,
    inception_v1,
    inception_v2,
    inception_v3,
    resnet,
    vgg,
    xception,
    xception_aligned,
)
from xception.models.cost import (
    StageCost,
    count_parameters,
    count_statistics,
    stage_costs,
    without_storage,
)
from xception.models.entry import ModelEntry
from xception.models.fields import checked_values, to_lists, unknown_name

ENTRIES: dict[str, ModelEntry] = {
    entry.name: entry
    for room in (xception, xception_aligned, inception_v1, inception_v2, inception_v3, vgg, resnet, baselines)
    for entry in room.ENTRIES
}


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """What a network is and costs, for one image of `input_size` pixels a side.

    `parameters` are trainable elements, those of auxiliary towers included; `statistics` the elements of batch
    normalisation's running means and variances. `multiply_adds` are a plain forward pass's. `published` holds
    figures from the literature, where there are any for this very config.
    """

    name: str
    description: str
    source: str
    parameters: int
    statistics: int
    multiply_adds: int
    input_size: int
    minimum_size: int
    published: Mapping[str, float]
    config: Mapping[str, Any]
    stages: tuple[StageCost, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, ready for JSON."""
        plain: dict[str, Any] = to_lists(asdict(replace(self, published=dict(self.published))))
        return plain


def list_models(pattern: str = "*") -> list[str]:
    """The named networks that match a shell-style pattern, in alphabetical order.

    `torchvision/NAME` and `timm/NAME` exist besides, for any classification network of those libraries.
    """
    return sorted(name for name in ENTRIES if fnmatchcase(name, pattern))


def find_entry(name: str) -> ModelEntry:
    """The entry of a named network or of `torchvision/NAME`, `timm/NAME`; `ConfigError` if there is none."""
    if name in ENTRIES:
        return ENTRIES[name]
    library, slash, architecture = str(name).partition("/")
    if slash and library in baselines.LIBRARIES:
        return baselines.baseline_entry(library, architecture)
    raise unknown_name("model", name, list_models())


def get_config(name: str, **options: Any) -> Any:
    """The named network's frozen config, with `options` in place of its fields.

    Raises `ConfigError` on an unknown name or option, and on a value of the wrong type or out of range.
    """
    config = find_entry(name).config
    return replace(config, **checked_values(type(config), options))


def build(name: str, config: Any) -> nn.Module:
    """The named network with this config and random weights; `config` must be of the network's own kind."""
    entry = find_entry(name)
    if type(config) is not type(entry.config):
        raise ConfigError(f"{name} is built from {type(entry.config).__name__}; got {type(config).__name__}")
    return entry.build(config)


def create_model(name: str, **options: Any) -> nn.Module:
    """The named network with `options` in place of its config's fields, and random weights.

    Raises `ConfigError` as `get_config` does.
    """
    return build(name, get_config(name, **options))


def build_without_storage(name: str, config: Any) -> nn.Module:
    """As `build`, on the meta device: names and shapes of all tensors, before any memory is taken for them."""
    return without_storage(lambda: build(name, config))


def config_to_dict(config: Any) -> dict[str, Any]:
    """Every field of a config as plain values, ready for JSON."""
    plain: dict[str, Any] = to_lists(asdict(config))
    return plain


def config_from_dict(name: str, values: Mapping[str, Any]) -> Any:
    """The named network's config from what `config_to_dict` gave; fields that are missing keep their values.

    The values may come from a file that someone else wrote: `ConfigError` on a field that is unknown, of the
    wrong type or out of range.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"expected the fields of a config; got {type(values).__name__}")
    return get_config(name, **{str(field): value for field, value in values.items()})


def describe(name: str, **options: Any) -> ModelDescription:
    """What the named network with `options` is and costs at its config's `input_size`."""
    entry = find_entry(name)
    config = get_config(name, **options)
    model = build_without_storage(name, config)
    stages = stage_costs(model, (1, config.in_channels, config.input_size, config.input_size))
    return ModelDescription(
        name=name,
        description=entry.description,
        source=entry.source,
        parameters=count_parameters(model),
        statistics=count_statistics(model),
        multiply_adds=sum(stage.multiply_adds for stage in stages),
        input_size=config.input_size,
        minimum_size=config.minimum_size,
        published=entry.published if config == entry.config else {},
        config=config_to_dict(config),
        stages=tuple(stages),
    )
