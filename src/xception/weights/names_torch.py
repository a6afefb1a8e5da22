"""Which network of timm, torchvision, Cadene or FaceForensics a state dict holds, told from names and shapes alone.

Each scheme of names is one table, from our modules to theirs, that serves to read and to write. Everything else comes
from the file (classes, channels, a padded stem) or is a fact of the family (epsilon, padding, preprocessing): the
figures of the published weights' own settings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xception.data.preprocess import Preprocess
from xception.errors import ConfigError, WeightsError
from xception.models import registry
from xception.models.layers import DepthwiseConv2d
from xception.weights.foreign import ForeignFile, ForeignTensor, Layout, Pair, Recognised
from xception.weights.lazy_file import problems
from xception.weights.names_aligned import aligned_names, which_aligned
from xception.weights.names_head import HINT, read_head
from xception.weights.names_inception import googlenet_names, inception_v3_names
from xception.weights.names_xception import padded_stem, xception_names
from xception.weights.skeleton import build_skeleton


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How one family of networks names its modules.

    `anchor` is a tensor that no other family has, `first` its first convolution; `heads` are the places of the
    classifier, of which the first is written; `auxiliary` are the modules of the auxiliary classifiers and
    `auxiliary_head` the last layer of one.
    """

    anchor: str
    first: str
    names: Callable[[Any], dict[str, str]]
    heads: tuple[str, ...]
    auxiliary: tuple[str, ...] = ()
    auxiliary_head: str = ""


XCEPTION = Scheme(anchor="block1.rep.0.conv1.weight", first="conv1", names=xception_names, heads=("fc", "last_linear"))
ALIGNED = Scheme(
    anchor="blocks.0.stack.conv1.conv_dw.weight", first="stem.0.conv", names=aligned_names, heads=("head.fc",)
)
INCEPTION_V3 = Scheme(
    anchor="Mixed_5b.branch5x5_1.conv.weight",
    first="Conv2d_1a_3x3.conv",
    names=inception_v3_names,
    heads=("fc",),
    auxiliary=("AuxLogits",),
    auxiliary_head="AuxLogits.fc",
)
GOOGLENET = Scheme(
    anchor="inception3a.branch1.conv.weight",
    first="conv1.conv",
    names=googlenet_names,
    heads=("fc",),
    auxiliary=("aux1", "aux2"),
    auxiliary_head="aux1.fc2",
)
SCHEMES = (XCEPTION, ALIGNED, INCEPTION_V3, GOOGLENET)

COUNTER = "num_batches_tracked"
# What stands beside a network in a training script's own module and takes no part in its answer.
_BESIDE = re.compile(r"criterion|loss|loss_\w+|metrics?|(train|val|valid|test)_\w+|n_averaged")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def recognise_torch(file: ForeignFile, *, trunk_only: bool = False) -> Recognised | None:
    """The network that a state dict holds, and where each of its tensors goes; None for no family known here.

    With `trunk_only` every classifier, and what stands outside of the network, is ignored, and ours stays fresh.
    Raises `WeightsError`, naming file and layer, for a network of a known family that ours cannot be: a missing or
    unknown classifier, a layer too many, another epsilon. Shapes are checked by `import_tensors`.
    """
    located = [(scheme, prefix) for scheme in SCHEMES for prefix in _prefixes(file.tensors, scheme.anchor)]
    if not located:
        return None
    with problems(file.path):
        if len(located) > 1:
            places = ", ".join(repr(prefix)[:60] for _, prefix in located[:4])
            raise WeightsError(f"it holds {len(located)} networks, under the prefixes {places}: give one of them")
        scheme, prefix = located[0]
        try:
            return _Reading(file, scheme, prefix, trunk_only=trunk_only).recognised()
        except ConfigError as error:
            raise WeightsError(f"no network of ours: {error}") from error


def _prefixes(names: Iterable[str], anchor: str) -> list[str]:
    """What stands before the anchor, such as "module.", for each time it is there."""
    return [name.removesuffix(anchor) for name in names if name == anchor or name.endswith("." + anchor)]


class _Reading:
    """One state dict of a known scheme, whose names begin with `prefix`."""

    def __init__(self, file: ForeignFile, scheme: Scheme, prefix: str, *, trunk_only: bool) -> None:
        self.scheme = scheme
        self.prefix = prefix
        self.trunk_only = trunk_only
        self.outside = [name for name in file.tensors if not name.startswith(prefix)]
        # From here on names are those inside of the prefix.
        self.tensors = {name[len(prefix) :]: tensor for name, tensor in file.tensors.items() if name.startswith(prefix)}
        modules: Mapping[str, dict[str, Any]] = file.facts.get("modules", {})
        self.modules = {path[len(prefix) :]: known for path, known in modules.items() if path.startswith(prefix)}
        self.own = modules.get(prefix.removesuffix("."), {})  # the network among them
        around = [known for path, known in modules.items() if prefix.startswith(f"{path}." if path else "")]
        self.is_detector = any(str(known.get("class")).endswith(".TransferModel") for known in around)
        self.class_names: tuple[str, ...] | None = file.facts.get("class_names")

    def recognised(self) -> Recognised:
        place = self._place_of_head()
        head = None if self.trunk_only else read_head(place, self.tensors, self.modules)
        options: dict[str, Any] = {"in_channels": self._in_channels()}
        if head is not None:
            options |= {"num_classes": head.classes, **head.options}
        model, origin, options = self._network(place, options)
        config = registry.get_config(model, **options)
        skeleton = build_skeleton(model, registry.config_to_dict(config))
        names = self.scheme.names(config) | ({} if head is None else head.names())
        self._check_modules(names, skeleton)
        pairs, counters, fresh = self._pairs(names, skeleton)
        ignored = self._ignored(names, {pair.theirs for pair in pairs} | set(counters.values()))
        return Recognised(
            format=origin,
            model=model,
            config=registry.config_to_dict(config),
            preprocess=self._preprocess(origin, config),
            pairs=tuple(pairs),
            class_names=self._class_names(None if head is None else head.classes),
            # One logit can only mean yes or no.
            multi_label=head is not None and (head.multi_label or head.classes == 1),
            ignored=tuple(ignored),
            computed={ours: ((theirs,), _only) for ours, theirs in counters.items()},
            fresh=tuple(fresh),
        )

    # ------------------------------------------------------------------------------------------------- the network

    def _place_of_head(self) -> str:
        """Where the classifier stands in theirs."""
        places = [head for head in self.scheme.heads if any(name.startswith(f"{head}.") for name in self.tensors)]
        if not self.trunk_only and not places:
            raise WeightsError(f"it has no classifier ({' or '.join(self.scheme.heads)}); {HINT}")
        if not self.trunk_only and len(places) > 1:
            raise WeightsError(f"it has two classifiers, {' and '.join(places)}; {HINT}")
        return (places or self.scheme.heads)[0]

    def _in_channels(self) -> int:
        first = self.tensors.get(f"{self.scheme.first}.weight")
        if first is None or len(first.shape) != 4 or not first.shape[1]:
            raise WeightsError(f"its first convolution {self.scheme.first!r} is missing, or none")
        return first.shape[1]

    def _network(self, place: str, options: dict[str, Any]) -> tuple[str, str, dict[str, Any]]:
        """The registry's name, the name of the format, and all options."""
        options["pooling"] = self._pooling()
        if self.scheme is XCEPTION:
            options["numerics"] = "torch"
            if self._padded_stem():
                options |= {"stem": "small", "stem_stride": 2}
                return "xception", "segmentation_models_pytorch xception", options
            if self.is_detector or (place == "last_linear" and self.prefix == "model."):
                return "xception", "FaceForensics xception", options
            first = self.tensors.get("block1.rep.0.pointwise.weight")
            is_timm = place == "fc" and (first is None or len(first.shape) == 4)
            return "xception", "timm legacy_xception" if is_timm else "Cadene xception", options
        if self.scheme is ALIGNED:
            model = which_aligned(self.tensors, "")
            return model, f"timm {model}", options
        has_tower = any(name.startswith(f"{module}.") for name in self.tensors for module in self.scheme.auxiliary)
        options["auxiliary"] = has_tower and self._tower_fits(options)
        if self.scheme is GOOGLENET:
            return "googlenet", "torchvision googlenet", options
        # Both have the same names; torchvision's come with the tower, timm's without.
        library = str(self.own.get("class")).partition(".")[0]
        if library not in ("torchvision", "timm"):
            library = "torchvision" if has_tower else "timm"
        return "inception_v3_torchvision", f"{library} inception_v3", options

    def _tower_fits(self, options: Mapping[str, Any]) -> bool:
        """Whether the auxiliary classifiers have the main one's classes: who exchanges one often keeps the other."""
        last = self.tensors.get(f"{self.scheme.auxiliary_head}.weight")
        return not self.trunk_only and last is not None and last.shape[:1] == (options.get("num_classes"),)

    def _pooling(self) -> str:
        """Of timm's whole modules the only ones that may pool otherwise, and say so."""
        kinds = {attributes.get("pool_type") for attributes in self.modules.values()} - {None}
        if kinds <= {"", "avg", "fast", "fastavg"}:
            return "avg"
        if kinds <= {"max", "fastmax"}:
            return "max"
        raise WeightsError(f"it pools its features by {_some(map(str, kinds))}, which ours does not")

    def _padded_stem(self) -> bool:
        padding = [self.modules.get(name, {}).get("padding") for name in ("conv1", "conv2")]
        return padding == [(1, 1), (1, 1)] or padded_stem(self.outside, self.prefix)

    def _check_modules(self, names: Mapping[str, str], skeleton: nn.Module) -> None:
        """Of a whole pickled module: raise `WeightsError` where a layer computes something else than ours does."""
        for path, attributes in self.modules.items():
            library, _, kind = str(attributes.get("class")).rpartition(".")
            if library == "torch.nn.modules.activation" and kind != "ReLU" and not path.startswith(self.scheme.heads):
                raise WeightsError(f"its layer {path!r:.90} is of class {kind!r:.90}, expected 'ReLU'")
        layers = dict(skeleton.named_modules())
        for ours, theirs in names.items():
            attributes, module = self.modules.get(theirs, {}), layers.get(ours)
            expected: dict[str, Any] = {}
            if isinstance(module, nn.BatchNorm2d):
                expected = {"eps": module.eps}
            elif isinstance(module, DepthwiseConv2d):  # 3x3, padded by as much as it is dilated
                stride, dilation = module.sampling["stride"], module.sampling["dilation"]
                expected = {"stride": (stride,) * 2, "padding": (dilation,) * 2, "dilation": (dilation,) * 2}
            elif isinstance(module, nn.Conv2d):
                expected = {name: getattr(module, name) for name in ("stride", "padding", "dilation", "groups")}
            for name, value in expected.items():
                if attributes.get(name, value) != value:
                    raise WeightsError(
                        f"its layer {theirs!r:.90} has {name} {attributes[name]!r:.40}, expected {value!r}"
                    )

    # ------------------------------------------------------------------------------------------------- the tensors

    def _pairs(self, names: Mapping[str, str], skeleton: nn.Module) -> tuple[list[Pair], dict[str, str], list[str]]:
        """A pair for each tensor of ours; their counters of batches, ours -> theirs; and what of ours stays fresh."""
        pairs: list[Pair] = []
        counters: dict[str, str] = {}
        fresh: list[str] = []
        for ours, tensor in skeleton.state_dict().items():
            module, _, leaf = ours.rpartition(".")
            if self.trunk_only and ours.startswith("classifier."):
                fresh.append(ours)
                continue
            inner = f"{names[module]}.{leaf}"
            found = self.tensors.get(inner)
            if leaf != COUNTER:
                pairs.append(Pair(ours, self.prefix + inner, _layout(tensor, found)))
            elif found is not None and found.dtype == torch.int64 and found.shape == ():
                counters[ours] = self.prefix + inner
        return pairs, counters, fresh

    def _ignored(self, names: Mapping[str, str], used: set[str]) -> list[str]:
        """What is left over and may be; raises `WeightsError` naming the layers that may not."""
        trunk = {
            theirs.partition(".")[0] for ours, theirs in names.items() if not ours.startswith(("classifier", "aux"))
        }
        counters = {f"{theirs}.{COUNTER}" for theirs in names.values()}
        heads = tuple(f"{head}." for head in self.scheme.heads)
        ignored, foreign = [], []
        for inner in self.tensors:
            first = inner.partition(".")[0]
            if self.prefix + inner in used:
                continue
            beside = first in self.scheme.auxiliary or _BESIDE.fullmatch(first) is not None
            apart = self.trunk_only and (first not in trunk or inner.startswith(heads))
            if inner in counters or beside or apart:
                ignored.append(self.prefix + inner)
            else:
                foreign.append(inner.rpartition(".")[0] or inner)
        for name in self.outside:
            if self.trunk_only or _BESIDE.fullmatch(name.partition(".")[0]):
                ignored.append(name)
            else:
                foreign.append(name.rpartition(".")[0] or name)
        if foreign:
            hint = "" if self.trunk_only else f"; if they follow it, {HINT}"
            raise WeightsError(f"it has layers that this network has not: {_some(set(foreign))}{hint}")
        return ignored

    # ---------------------------------------------------------------------------------------------- what goes with it

    def _preprocess(self, origin: str, config: Any) -> Preprocess:
        if config.in_channels not in (1, 3):
            raise WeightsError(f"its first convolution takes {config.in_channels} channels; images have 1 or 3")
        size = config.input_size
        values: dict[str, Any] = {"size": (size, size), "channels": config.in_channels, **PREPROCESS[origin]}
        # torchvision normalises by ImageNet's mean and deviation; `transform_input` makes x / 127.5 - 1 of that.
        if str(self.own.get("class")).startswith("torchvision.") and self.own.get("transform_input") is False:
            values |= {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
        return Preprocess(**values)

    def _class_names(self, classes: int | None) -> tuple[str, ...] | None:
        if self.class_names is not None and len(self.class_names) == classes:
            return self.class_names
        return ("real", "fake") if self.is_detector and classes == 2 else None


# The settings published with the weights; all but one normalise by x / 127.5 - 1, which is Preprocess's default.
PREPROCESS: Mapping[str, Mapping[str, Any]] = {
    "timm legacy_xception": {"crop_fraction": 0.8975, "interpolation": "bicubic"},
    "Cadene xception": {"crop_fraction": 0.8975},
    "segmentation_models_pytorch xception": {"crop_fraction": 0.8975},
    "FaceForensics xception": {"resize": "squash"},
    **{f"timm xception{n}": {"crop_fraction": 0.903, "interpolation": "bicubic"} for n in (41, 65, 71)},
    **{f"timm xception{n}p": {"crop_fraction": 0.94, "interpolation": "bicubic"} for n in (41, 65)},
    "torchvision inception_v3": {"crop_fraction": 299 / 342},
    "timm inception_v3": {"crop_fraction": 299 / 341, "interpolation": "bicubic"},
    "torchvision googlenet": {"crop_fraction": 224 / 256},
}


def _layout(ours: Tensor, theirs: ForeignTensor | None) -> Layout:
    """Cadene's first file keeps 1x1 convolutions as matrices."""
    is_matrix = theirs is not None and len(theirs.shape) == 2 and ours.dim() == 4 and ours.shape[2:] == (1, 1)
    return "matrix" if is_matrix else "same"


def _only(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0]


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(f"{name!r:.90}" for name in ordered[:4]) + (
        f" and {len(ordered) - 4} more" if len(ordered) > 4 else ""
    )
