"""What stands before the trunk of a Keras model: resizing and normalisation, which become a `Preprocess`.

Keras's images have values of 0 to 255. Each layer there is x -> a * x + b, channel by channel; all of them together
are one such step, which is (x / 255 - mean) / std with std = 1 / (255 a) and mean = -b / (255 a).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xception.data.preprocess import MAX_SIZE, Preprocess
from xception.errors import ConfigError, WeightsError
from xception.weights.foreign import ForeignTensor
from xception.weights.keras_layers import Plain, PlainGraph
from xception.weights.keras_weights import Finder

DEFAULT_SIZE = 299  # of Xception and Inception v3, where the file leaves the size open
_NORMALIZATION_EPSILON = 1e-7  # keras.config.epsilon()


@dataclass(frozen=True)
class Inputs:
    """`preprocess`, and the tensors that went into it, with those that say nothing."""

    preprocess: Preprocess
    tensors: tuple[str, ...]


def default_preprocess(size: tuple[int, int], channels: int) -> Preprocess:
    """What Keras's own Xception and Inception v3 expect: a straight resize, and values of -1 to 1."""
    try:
        return Preprocess(size=size, resize="squash", channels=channels, mean=(0.5,) * channels, std=(0.5,) * channels)
    except ConfigError as error:
        raise WeightsError(f"images of {size[0]}x{size[1]} with {channels} channels: {error}") from None


def read_inputs(
    graph: PlainGraph, entry: int, channels: int, finder: Finder, tensors: Mapping[str, ForeignTensor]
) -> Inputs:
    """The preprocessing before the operation that takes the result of `entry`.

    Raises `WeightsError` naming a layer there that cannot be represented.
    """
    chain = _chain(graph, entry)
    size, resize, interpolation = input_size(graph, chain[0]), "squash", "bilinear"
    scale, offset, used = [1.0], [0.0], list[str]()
    for node in chain[1:]:
        if node.kind == "Resizing":
            size, interpolation = node.settings["size"], node.settings["interpolation"]
            resize = "crop" if node.settings["crop"] else "squash"
            continue
        if node.kind == "Affine":
            a, b = _list(node.settings["scale"]), _list(node.settings["offset"])
        elif node.kind == "Normalization":
            a, b, names = _normalisation(node, finder, tensors)
            used += names
        else:
            raise _unrepresentable(node)
        scale = _combine(scale, a, lambda s, t: s * t)
        offset = _combine(_combine(offset, a, lambda s, t: s * t), b, lambda s, t: s + t)
    plain = default_preprocess(size, channels).to_dict()
    fields: dict[str, Any] = {"resize": resize, "interpolation": interpolation}
    if any(node.kind != "Resizing" for node in chain[1:]):
        if len(scale) not in (1, channels) or len(offset) not in (1, channels) or min(scale) <= 0:
            raise WeightsError(f"the layers before the trunk scale {channels} channels in a way that is none")
        both = zip(_spread(offset, channels), _spread(scale, channels), strict=True)
        fields["mean"] = [-b / (255 * a) for b, a in both]
        fields["std"] = [1 / (255 * a) for a in _spread(scale, channels)]
    try:
        return Inputs(Preprocess.from_dict({**plain, **fields}), tuple(used))
    except ConfigError as error:
        raise WeightsError(f"the layers before the trunk cannot be represented: {error}") from None


def input_size(graph: PlainGraph, node: Plain) -> tuple[int, int]:
    """Height and width that the model's input says, `DEFAULT_SIZE` where it leaves them open."""
    shape = node.settings.get("shape") if node.kind == "InputLayer" else None
    sides = shape[1:3] if isinstance(shape, list) and len(shape) == 4 else [None, None] if shape is None else [0]
    found = [DEFAULT_SIZE if side is None else side for side in sides]
    if not all(type(side) is int and 0 < side <= MAX_SIZE for side in found):
        raise WeightsError(f"the model's input has the shape {str(shape)[:60]}, expected images")
    return found[0], found[1]


def _chain(graph: PlainGraph, entry: int) -> list[Plain]:
    """The operations from the model's input to `entry`, which must follow one another."""
    chain = [graph.nodes[entry]]
    while chain[-1].kind != "InputLayer":
        node = chain[-1]
        if node.problem or len(node.inputs) != 1:
            raise _unrepresentable(node)
        chain.append(graph.nodes[node.inputs[0]])
    if len(graph.inputs) != 1:
        raise WeightsError(f"the model has {len(graph.inputs)} inputs, expected one of images")
    return chain[::-1]


def _normalisation(
    node: Plain, finder: Finder, tensors: Mapping[str, ForeignTensor]
) -> tuple[list[float], list[float], list[str]]:
    """Scale and offset of a `Normalization`, whose mean and variance are settings, or were measured and are tensors."""
    used: list[str] = []
    if "mean" in node.settings:
        mean, variance = node.settings["mean"], node.settings["variance"]
    else:
        used = finder.of_layer(node.layer)
        found = [tensors[name] for name in used if math.prod(tensors[name].shape) <= 16]
        if len(used) not in (2, 3) or len(found) != len(used):
            raise WeightsError(f"{node.layer}: it has {len(used)} variables, expected a mean and a variance")
        mean, variance = (t.read().double().flatten().tolist() for t in found[:2])
    deviation = [max(math.sqrt(max(v, 0.0)), _NORMALIZATION_EPSILON) for v in variance]
    if len(mean) != len(deviation):
        raise WeightsError(f"{node.layer}: its mean and variance have different shapes")
    if node.settings["invert"]:
        return deviation, mean, used
    return [1 / d for d in deviation], [-m / d for m, d in zip(mean, deviation, strict=True)], used


def _unrepresentable(node: Plain) -> WeightsError:
    reason = node.problem or "only rescaling, normalisation and resizing have a counterpart"
    return WeightsError(f"{node.layer}, before the trunk, cannot be represented: {reason}")


def _list(value: float | Sequence[float]) -> list[float]:
    return [value] if isinstance(value, float) else list(value)


def _spread(values: list[float], count: int) -> list[float]:
    return values * count if len(values) == 1 else values


def _combine(left: list[float], right: list[float], operation: Any) -> list[float]:
    count = max(len(left), len(right))
    if len(left) not in (1, count) or len(right) not in (1, count):
        raise WeightsError("the layers before the trunk disagree about the number of channels")
    return [operation(a, b) for a, b in zip(_spread(left, count), _spread(right, count), strict=True)]
