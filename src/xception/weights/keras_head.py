"""What stands behind the trunk of a Keras model, as our head: pool, dense layers with activations, dropout, classifier.

A batch normalisation there is linear, and so a part of the dense layer after it (or before it, with nothing but numbers
between): they are multiplied out in float64. What has no counterpart is an error that names the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from xception.errors import WeightsError
from xception.weights.foreign import ForeignTensor, Pair
from xception.weights.keras_layers import Plain, PlainGraph
from xception.weights.keras_weights import Finder, layer_tensors

Computed = dict[str, tuple[tuple[str, ...], Callable[[Sequence[Tensor]], Tensor]]]
_POOLS = {"GlobalAveragePooling2D": "avg", "GlobalMaxPooling2D": "max"}
_OUTPUTS = {"softmax": False, "sigmoid": True}  # whether a class excludes the others


@dataclass(frozen=True)
class Head:
    """A head: `config` has its fields of the network's config; `pairs` and `computed` are as in `Recognised`."""

    config: dict[str, Any]
    multi_label: bool
    pairs: tuple[Pair, ...]
    computed: Computed


@dataclass(frozen=True)
class _Norm:
    """A batch normalisation as y = scale * x + offset: its tensors (gamma, beta where they are), its epsilon."""

    node: Plain
    tensors: tuple[str, ...]


@dataclass
class _Dense:
    """A dense layer, the normalisations that are multiplied into it, and the activation behind."""

    node: Plain
    before: list[_Norm]
    after: list[_Norm] = field(default_factory=list)
    activation: str = "none"
    dropout: float = 0.0  # before it


def read_head(
    graph: PlainGraph, end: int, channels: int, finder: Finder, tensors: Mapping[str, ForeignTensor], loss: Any
) -> Head:
    """The head on features of `channels` channels; without tensors where the model ends in its features.

    `loss` is what the model was trained with, as its description has it: it tells what numbers without an activation
    mean. Raises `WeightsError` naming the layer that cannot be represented.
    """
    chain = _chain(graph, end)
    pooling, layers = _Reader(graph, finder).read(chain, end)
    config: dict[str, Any] = {"pooling": pooling} if pooling != "avg" else {}
    if not layers:
        return Head(config, False, (), {})
    width = channels
    for layer in layers:
        _check(layer, width, finder, tensors)
        width = layer.node.settings["units"]
    *hidden, last = layers
    for layer in hidden:
        if layer.activation == "softmax":
            raise _cannot(layer.node, "a softmax in the middle has no counterpart")
    if last.activation not in ("none", *_OUTPUTS):
        raise _cannot(last.node, f"the model ends in {last.activation}, expected softmax, sigmoid or nothing")
    single = last.activation == "none" and (width == 1 or _is_binary(loss))
    config |= {
        "num_classes": width,
        "dropout": last.dropout,
        "fully_connected": tuple(layer.node.settings["units"] for layer in hidden),
    }
    if any(layer.activation != "relu" for layer in hidden):
        config["hidden_activations"] = tuple(layer.activation for layer in hidden)
    pairs: list[Pair] = []
    computed: Computed = {}
    for i, layer in enumerate(layers):
        ours = "classifier.linear" if layer is last else f"classifier.fully_connected.{i}"
        _place(layer, ours, finder, pairs, computed)
    return Head(config, _OUTPUTS.get(last.activation, single), tuple(pairs), computed)


def _chain(graph: PlainGraph, end: int) -> list[int]:
    """The operations behind `end` up to the model's output, which must follow one another."""
    if len(set(graph.outputs)) != 1:
        raise WeightsError(f"the model has {len(graph.outputs)} outputs, expected one")
    chain, number = [], end
    while number != graph.outputs[0]:
        following = graph.consumers[number]
        if len(following) != 1:
            used = " and ".join(str(graph.nodes[i].layer) for i in following[:2]) or "nothing"
            raise WeightsError(
                f"behind the trunk, one layer's result goes to {used}: only a plain chain has a counterpart"
            )
        number = following[0]
        node = graph.nodes[number]
        if node.problem:
            raise _cannot(node, node.problem)
        if len(node.inputs) != 1:
            raise _cannot(node, "it joins several results")
        chain.append(number)
    return chain


class _Reader:
    def __init__(self, graph: PlainGraph, finder: Finder) -> None:
        self._graph = graph
        self._finder = finder
        self._waiting: list[_Norm] = []  # normalisations for the next dense layer
        self._layers: list[_Dense] = []
        self._pooling = ""
        self._dropout = 0.0

    def read(self, chain: Sequence[int], end: int) -> tuple[str, list[_Dense]]:
        """The pool, and the dense layers with what belongs to each."""
        self._dropout = self._graph.dropouts.get(end, 0.0)
        for number in chain:
            node = self._graph.nodes[number]
            read = {
                "BatchNormalization": self._norm,
                "Dense": self._dense,
                "Activation": self._activation,
                "Flatten": self._flatten,
                **dict.fromkeys(_POOLS, self._pool),
            }.get(node.kind)
            if read is None:
                raise _cannot(node, "there is no counterpart for it behind the trunk")
            read(node)
            self._dropout = self._graph.dropouts.get(number, self._dropout)
        if self._waiting:
            raise _cannot(self._waiting[0].node, "no dense layer follows that it could become a part of")
        return self._pooling or "avg", self._layers

    def _pool(self, node: Plain) -> None:
        if self._pooling:
            raise _cannot(node, "there is a pool before it")
        self._pooling = _POOLS[node.kind]
        if self._pooling == "max" and self._waiting:
            raise _cannot(self._waiting[0].node, "it stands before a maximum, which does not let it pass")

    def _flatten(self, node: Plain) -> None:
        if not self._pooling:
            raise _cannot(node, "it would tie the network to one image size; only a global pool has a counterpart")

    def _norm(self, node: Plain) -> None:
        if node.settings["axis"] not in (-1, 1 if self._pooling else 3):
            raise _cannot(node, f"it normalises along axis {node.settings['axis']}")
        found = layer_tensors(self._finder, node.layer, node.kind, node.settings)
        norm = _Norm(node, tuple(found))
        if self._layers and self._layers[-1].activation == "none":
            self._layers[-1].after.append(norm)
        else:
            self._waiting.append(norm)

    def _dense(self, node: Plain) -> None:
        if not self._pooling:
            raise _cannot(node, "it stands before the pool")
        if self._layers and self._layers[-1].activation == "softmax":
            raise _cannot(self._layers[-1].node, "a softmax in the middle has no counterpart")
        self._layers.append(_Dense(node, self._waiting, dropout=self._dropout))
        self._waiting, self._dropout = [], 0.0

    def _activation(self, node: Plain) -> None:
        name = node.settings["activation"]
        before = self._layers[-1].activation if self._layers else "relu"  # the trunk ends in a ReLU
        if self._waiting:
            raise _cannot(self._waiting[0].node, "it stands between two activations")
        if self._layers and before == "none":
            self._layers[-1].activation = name
        elif (before, name) != ("relu", "relu"):  # which changes nothing
            raise _cannot(node, f"it follows another activation, {before}")


def _check(layer: _Dense, width: int, finder: Finder, tensors: Mapping[str, ForeignTensor]) -> None:
    """Raise `WeightsError` unless the tensors of a dense layer and its normalisations have the shapes they must."""
    units = layer.node.settings["units"]
    shapes = {name: (width,) for norm in layer.before for name in norm.tensors}
    shapes |= {name: (units,) for norm in layer.after for name in norm.tensors}
    kernel, *bias = layer_tensors(finder, layer.node.layer, "Dense", layer.node.settings)
    expected: dict[str, tuple[int, ...]] = {kernel: (width, units), **dict.fromkeys(bias, (units,)), **shapes}
    for name, shape in expected.items():
        if tensors[name].shape != shape or not tensors[name].dtype.is_floating_point:
            found = f"{tensors[name].dtype}, shape {tensors[name].shape}"
            raise WeightsError(f"tensor {name!r} is of {found}; expected floats, shape {shape}")


def _place(layer: _Dense, ours: str, finder: Finder, pairs: list[Pair], computed: Computed) -> None:
    kernel, *bias = layer_tensors(finder, layer.node.layer, "Dense", layer.node.settings)
    norms = [*layer.before, *layer.after]
    if not norms:
        pairs.append(Pair(f"{ours}.weight", kernel, "dense"))
        if bias:
            pairs.append(Pair(f"{ours}.bias", bias[0]))
        else:
            units = layer.node.settings["units"]
            computed[f"{ours}.bias"] = (), lambda _: torch.zeros(units)
        return
    sources = (kernel, *bias, *(name for norm in norms for name in norm.tensors))

    def folded(values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return _multiplied_out(layer, dict(zip(sources, values, strict=True)), kernel, bias)

    computed[f"{ours}.weight"] = sources, lambda values: folded(values)[0]
    computed[f"{ours}.bias"] = sources, lambda values: folded(values)[1]


def _multiplied_out(
    layer: _Dense, values: Mapping[str, Tensor], kernel: str, bias: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Weight O I and bias O, in float64, of a dense layer and the normalisations around it."""
    weight = values[kernel].double()
    offset = values[bias[0]].double() if bias else torch.zeros(weight.shape[1], dtype=torch.float64)
    for norm in reversed(layer.before):
        scale, shift = _scale_and_shift(norm, values)
        offset = offset + shift @ weight
        weight = scale[:, None] * weight
    for norm in layer.after:
        scale, shift = _scale_and_shift(norm, values)
        weight, offset = weight * scale, offset * scale + shift
    return weight.T, offset


def _scale_and_shift(norm: _Norm, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    *optional, mean, variance = (values[name].double() for name in norm.tensors)
    settings = norm.node.settings
    scale = torch.rsqrt(variance + settings["epsilon"])
    if settings["scale"]:
        scale = scale * optional[0]
    shift = -mean * scale
    return scale, shift + optional[-1] if settings["center"] else shift


def _is_binary(loss: Any) -> bool:
    """Whether a loss asks of each class by itself, as Keras spells losses: a name, or an object with one."""
    name = loss.get("class_name") if isinstance(loss, dict) else loss
    return isinstance(name, str) and name.lower().replace("_", "").startswith(("binarycrossentropy", "binaryfocal"))


def _cannot(node: Plain, why: str) -> WeightsError:
    return WeightsError(f"{node.layer} cannot be represented: {why}")
