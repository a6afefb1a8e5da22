"""torchvision's VGG-16 and ResNet-152, which are in the registry as torchvision's own: their names are its names.

They are here for the comparison of the paper's Table 1; a file is one of them where its tensors are exactly theirs.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from xception.data.preprocess import Preprocess
from xception.errors import ConfigError, WeightsError
from xception.models import registry
from xception.weights.foreign import ForeignFile, Pair, Recognised
from xception.weights.lazy_file import problems

# Of each network a tensor that tells it, its first convolution, and its last layer.
NETWORKS = {
    "vgg16": ("features.28.weight", "features.0.weight", "classifier.6"),
    "resnet152": ("layer3.35.conv3.weight", "conv1.weight", "fc"),
}
PREPROCESS = Preprocess(size=(224, 224), crop_fraction=224 / 256, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
_INSIDE = "network."  # where a registry's baseline keeps the library's network
_COUNTER = "num_batches_tracked"


def recognise_torchvision(file: ForeignFile, *, trunk_only: bool = False) -> Recognised | None:
    """The network that a state dict holds; None where its tensors are not exactly those of one of `NETWORKS`.

    With `trunk_only` the last layer stays fresh. Raises `WeightsError` for shapes that no such network has.
    """
    for model, (anchor, first, head) in NETWORKS.items():
        if anchor not in file.tensors or not {first, f"{head}.weight"} <= set(file.tensors):
            continue
        with problems(file.path):
            return _recognised(file, model, first, head, trunk_only=trunk_only)
    return None


def _recognised(file: ForeignFile, model: str, first: str, head: str, *, trunk_only: bool) -> Recognised | None:
    stem, last = file.tensors[first].shape, file.tensors[f"{head}.weight"].shape
    if len(stem) != 4 or len(last) != 2:
        raise WeightsError(
            f"its first convolution and last layer have shapes {stem} and {last}, which {model}'s have not"
        )
    if stem[1] != 3:
        raise WeightsError(f"its first convolution takes {stem[1]} channels; {model}'s weights are for 3")
    try:
        config = registry.get_config(model, num_classes=last[0])
    except ConfigError as error:
        raise WeightsError(f"no {model} of ours: {error}") from error
    ours = registry.build_without_storage(model, config).state_dict()
    theirs = {name: name.removeprefix(_INSIDE) for name in ours}
    needed = {name for name in theirs.values() if not name.endswith(_COUNTER)}
    counters = {name for name in theirs.values() if name.endswith(_COUNTER)}
    if not needed <= set(file.tensors) <= needed | counters:
        return None
    fresh = tuple(name for name, name_there in theirs.items() if trunk_only and name_there.startswith(f"{head}."))
    there = {name: inner for name, inner in theirs.items() if inner in file.tensors and name not in fresh}
    return Recognised(
        format=f"torchvision {model}",
        model=model,
        config=registry.config_to_dict(config),
        preprocess=PREPROCESS,
        pairs=tuple(Pair(name, inner) for name, inner in there.items() if not inner.endswith(_COUNTER)),
        computed={name: ((inner,), _only) for name, inner in there.items() if inner.endswith(_COUNTER)},
        ignored=tuple(theirs[name] for name in fresh),
        fresh=fresh,
    )


def _only(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0]
