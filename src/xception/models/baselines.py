"""Networks to compare with, from torchvision and timm, behind the interface of ours.

They are taken as they are, with random weights: only the first convolution (for `in_channels`), the number of
classes and the dropout are set. Either library is imported when a network of its is asked for; timm is optional.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from xception.errors import ConfigError, MissingPackageError
from xception.models.cost import stage_costs, without_storage
from xception.models.entry import ModelEntry
from xception.models.fields import (
    MAX_CLASSES,
    MAX_SIDE,
    check_common,
    check_dropout,
    check_fields,
    check_range,
    unknown_name,
)
from xception.models.layers import check_input

LIBRARIES = ("torchvision", "timm")
# Sides that `baseline_entry` tries, in order, to learn the smallest that a network takes.
TRIED_SIZES = (8, 16, 24, 28, 32, 48, 64, 75, 96, 112, 128, 160, 192, 224, 256, 299, 384)


@dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """The settings of another library's network.

    dropout: rate of the classifier's dropout layers, or of one before its last linear layer where it has none;
        None is the library's own rate.
    minimum_size: smallest side in pixels; where `fixed_size` is set, images have sides of `input_size` exactly.
    """

    num_classes: int = 1000
    in_channels: int = 3
    dropout: float | None = None
    input_size: int = 224
    minimum_size: int = 32
    fixed_size: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        check_range("num_classes", self.num_classes, 1, MAX_CLASSES)
        check_dropout(self.dropout or 0.0)
        check_common(self.in_channels, self.input_size)
        check_range("minimum_size", self.minimum_size, 1, MAX_SIDE)
        check_range("input_size", self.input_size, self.minimum_size)
        if self.fixed_size and self.input_size != self.minimum_size:
            raise ConfigError(f"input_size is fixed to {self.minimum_size}; got {self.input_size}")


class Baseline(nn.Module):
    """A classification network of another library: N C H W -> N `num_classes`; its modules are in `network`.

    `feature_info` and `num_features` as in our own networks. Wrong input raises `ConfigError`.
    """

    network: nn.Module
    classifier: nn.Module  # the last layers, which depend on `num_classes`
    feature_info: list[dict[str, Any]]
    num_features: int

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__()
        self.config = config

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to features before pooling: N C' H' W', or N L C' for a network of tokens."""
        raise NotImplementedError

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Features to logits N `num_classes`, or to what the last layer reads: N C'."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def check(self, x: Tensor) -> None:
        """Raise `ConfigError` where the network cannot take `x`."""
        config = self.config
        check_input(x, in_channels=config.in_channels, minimum_size=config.minimum_size)
        if config.fixed_size and tuple(x.shape[2:]) != (config.input_size, config.input_size):
            raise ConfigError(
                f"expected images of exactly {config.input_size}x{config.input_size} pixels, "
                f"got {x.shape[2]}x{x.shape[3]}"
            )


class TorchvisionBaseline(Baseline):
    """A torchvision network. Features are what its children give one after the other, up to those of the head."""

    HEAD = ("avgpool", "flatten", "dropout", "classifier", "fc", "head", "heads")
    KEEPS_MAP = ("ConvNeXt", "MaxVit", "SqueezeNet")  # their classifiers flatten by themselves

    def __init__(self, architecture: str, config: BaselineConfig) -> None:
        super().__init__(config)
        from torchvision import models

        # These two would build auxiliary towers, and warn about how long they take to draw weights.
        inception = architecture in ("googlenet", "inception_v3")
        options = {"aux_logits": False, "init_weights": True} if inception else {}
        self.architecture = architecture
        self.network = models.get_model(architecture, weights=None, num_classes=config.num_classes, **options)
        self.kind = type(self.network).__name__
        _set_in_channels(self.network, config.in_channels)
        self.dropout = nn.Dropout(0.0)
        if config.dropout is not None:
            own = [
                module
                for name, child in self.network.named_children()
                if name in self.HEAD
                for module in child.modules()
                if isinstance(module, nn.Dropout)
            ]
            for module in own or [self.dropout]:
                module.p = config.dropout

    @property
    def classifier(self) -> nn.Module:  # type: ignore[override]
        named = dict(self.network.named_children())
        return next(named[name] for name in ("classifier", "fc", "head", "heads") if name in named)

    def forward_features(self, x: Tensor) -> Tensor:
        self.check(x)
        network: Any = self.network
        if self.kind == "VisionTransformer":
            tokens = network._process_input(x)
            tokens = torch.cat([network.class_token.expand(len(x), -1, -1), tokens], dim=1)
            encoded: Tensor = network.encoder(tokens)
            return encoded
        for layer in self._trunk():
            x = layer(x)
        return torch.relu(x) if self.kind == "DenseNet" else x

    def _trunk(self) -> Iterator[nn.Module]:
        for name, child in self.network.named_children():
            if name not in self.HEAD:
                yield from child if isinstance(child, nn.ModuleList) else (child,)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        classifier, network = self.classifier, self.network
        if self.kind == "SqueezeNet":  # it classifies each position, then averages
            if pre_logits:
                return features.mean(dim=(2, 3))
            logits: Tensor = classifier(self.dropout(features)).flatten(1)
            return logits
        x = self._pool(features)
        if hasattr(network, "dropout") and isinstance(network.dropout, nn.Dropout):
            x = network.dropout(x)
        *hidden, last = classifier if isinstance(classifier, nn.Sequential) else (classifier,)
        for layer in hidden:
            x = layer(x)
        return x if pre_logits else last(self.dropout(x))

    def _pool(self, features: Tensor) -> Tensor:
        if self.kind == "VisionTransformer":
            return features[:, 0]
        pool = getattr(self.network, "avgpool", None)
        if pool is not None:
            features = pool(features)
        elif self.kind not in self.KEEPS_MAP:
            features = features.mean(dim=(2, 3))
        return features if self.kind in self.KEEPS_MAP else features.flatten(1)

    @cached_property
    def feature_info(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Module, channels and reduction of the last stage at each reduction, from a run without storage."""
        config, last_at = self.config, {}
        twin = without_storage(partial(TorchvisionBaseline, self.architecture, config))
        shape = (1, config.in_channels, config.input_size, config.input_size)
        for stage in stage_costs(twin, shape):
            child = stage.name.removeprefix("network.").partition(".")[0]
            channels_last = self.kind == "SwinTransformer" and child != "permute"
            if child in self.HEAD or channels_last or len(stage.output_shape or ()) != 4:
                continue
            _, channels, height, _ = stage.output_shape or ()
            reduction = 2 ** round(math.log2(config.input_size / height))
            last_at[reduction] = {"module": stage.name, "channels": channels, "reduction": reduction}
        return list(last_at.values())

    @property
    def num_features(self) -> int:  # type: ignore[override]
        channels: int = self.feature_info[-1]["channels"]
        return channels


class TimmBaseline(Baseline):
    """A timm network, whose own interface ours resembles; features come in timm's own layout."""

    def __init__(self, architecture: str, config: BaselineConfig) -> None:
        super().__init__(config)
        options = {} if config.dropout is None else {"drop_rate": config.dropout}
        try:
            self.network = import_timm().create_model(
                architecture,
                pretrained=False,
                num_classes=config.num_classes,
                in_chans=config.in_channels,
                **options,
            )
        except TypeError as error:
            raise ConfigError(f"timm/{architecture} does not take these options: {error}") from error
        network: Any = self.network
        self.num_features = int(network.num_features)
        self.feature_info = [
            {
                "module": f"network.{info['module']}",
                "channels": info["num_chs"],
                "reduction": info["reduction"],
            }
            for info in getattr(network, "feature_info", ())
        ]

    @property
    def classifier(self) -> nn.Module:  # type: ignore[override]
        network: Any = self.network
        classifier: nn.Module = network.get_classifier()
        return classifier

    def forward_features(self, x: Tensor) -> Tensor:
        self.check(x)
        network: Any = self.network
        features: Tensor = network.forward_features(x)
        return features

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        network: Any = self.network
        logits: Tensor = network.forward_head(features, pre_logits=pre_logits)
        return logits


KINDS: dict[str, Callable[[str, BaselineConfig], Baseline]] = {
    "torchvision": TorchvisionBaseline,
    "timm": TimmBaseline,
}


def import_timm() -> ModuleType:
    """The timm package; `MissingPackageError` says how to get it where it is missing."""
    try:
        import timm
    except ImportError as error:
        raise MissingPackageError("this network needs timm: pip install 'xception[hub]'") from error
    return timm


def _set_in_channels(network: nn.Module, in_channels: int) -> None:
    """Put a fresh first convolution into `network` where it does not take `in_channels`."""
    name, old = next((n, m) for n, m in network.named_modules() if isinstance(m, nn.Conv2d))
    if old.in_channels == in_channels:
        return
    new = nn.Conv2d(
        in_channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        bias=old.bias is not None,
    )
    parent, _, attribute = name.rpartition(".")
    setattr(network.get_submodule(parent), attribute, new)


@cache
def baseline_entry(library: str, architecture: str) -> ModelEntry:
    """The entry of any classification network of torchvision or timm; `ConfigError` if it has no such name.

    The sizes that the network takes are found by trying some on the meta device.
    """
    if library == "timm":
        timm = import_timm()
        known, size = timm.list_models(), None
    else:
        from torchvision import models

        known, size = models.list_models(module=models), 224
    if architecture not in known:  # in particular, no name that would make the library download something
        raise unknown_name(f"{library} network", architecture, known)
    build = partial(KINDS[library], architecture)
    network: Any = without_storage(lambda: build(BaselineConfig()))
    if size is None:
        size = max(network.network.default_cfg["input_size"][1:])
    smallest = next((tried for tried in TRIED_SIZES if tried < size and _takes(network, tried)), size)
    fixed = smallest == size and not _takes(network, size + 32)
    return ModelEntry(
        name=f"{library}/{architecture}",
        config=BaselineConfig(input_size=size, minimum_size=smallest, fixed_size=fixed),
        build=build,
        description=f"{architecture} of {library}",
        source=library,
    )


def _takes(model: Baseline, size: int) -> bool:
    """Whether a model on the meta device runs at this size; what it raises if not is its library's affair."""
    model.config = BaselineConfig(input_size=size, minimum_size=size)
    try:
        model.eval()(torch.empty(1, 3, size, size, device="meta"))
    except Exception:
        return False
    return True


def _entry(
    architecture: str,
    library: str,
    config: BaselineConfig,
    source: str,
    parameters: int,
    top1: float,
    top5: float,
) -> ModelEntry:
    return ModelEntry(
        name=architecture,
        config=config,
        build=partial(KINDS[library], architecture),
        description=f"{architecture} of {library}, to compare with",
        source=source,
        published={"parameters": parameters, "top1": top1, "top5": top5},
    )


TABLE_1 = "figures of the Xception paper, Table 1"
SMALL_MINIMUM = BaselineConfig(minimum_size=8)

ENTRIES: tuple[ModelEntry, ...] = (
    _entry(
        "alexnet",
        "torchvision",
        BaselineConfig(minimum_size=63),
        "figures of torchvision's weights",
        61_100_840,
        0.56522,
        0.79066,
    ),
    _entry("vgg16", "torchvision", BaselineConfig(), TABLE_1, 138_357_544, 0.715, 0.901),
    _entry(
        "resnet50",
        "torchvision",
        SMALL_MINIMUM,
        "figures of torchvision's weights",
        25_557_032,
        0.76130,
        0.92862,
    ),
    _entry("resnet152", "torchvision", SMALL_MINIMUM, TABLE_1, 60_192_808, 0.770, 0.933),
    _entry(
        "mobilenet_v2",
        "torchvision",
        SMALL_MINIMUM,
        "figures of torchvision's weights",
        3_504_872,
        0.71878,
        0.90286,
    ),
    _entry(
        "inception_resnet_v2",
        "timm",
        BaselineConfig(input_size=299, minimum_size=75),
        "C. Szegedy et al., arXiv 1602.07261, Table 2",
        55_843_464,
        0.801,
        0.951,
    ),
)
