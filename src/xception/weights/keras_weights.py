"""Where a Keras file keeps a layer's variables.

New files number them below the layer's place; old ones list them, with names, under the top-level layer. Files of
weights alone have no description: their layers are told by the order in which Keras lists a network's layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from xception.errors import WeightsError
from xception.weights.foreign import ForeignTensor
from xception.weights.keras_file import KerasContents
from xception.weights.keras_graph import Layer
from xception.weights.names_keras import variables


class Finder(Protocol):
    """Finds the tensors of a layer."""

    def find(self, layer: Layer, names: Sequence[tuple[str, ...]]) -> list[str]:
        """The file's tensors that are a layer's variables, whose names (each with its variants) are in order."""
        ...

    def of_layer(self, layer: Layer) -> list[str]:
        """All the tensors that the file keeps for a layer, whatever they are."""
        ...


def finder(contents: KerasContents, tensors: Mapping[str, ForeignTensor]) -> Finder:
    """What finds the variables of the layers of a file with a description."""
    return _InGroups(contents.groups) if contents.kind == "keras-h5" else _InPlaces(tensors)


def layer_tensors(found: Finder, layer: Layer, kind: str, settings: Mapping[str, Any]) -> list[str]:
    """The tensors of a layer of this class and settings, in Keras's order."""
    return found.find(layer, [names for names, _, _ in variables(kind, settings)])


class _InPlaces:
    """New files: ``layers/conv2d_1/vars/0``, in the order in which the layer made its variables."""

    def __init__(self, tensors: Mapping[str, ForeignTensor]) -> None:
        self._tensors = tensors
        # Of Keras 2.13 alone: another name of the same list.
        old = "_layer_checkpoint_dependencies"
        self._other = old if any(name.startswith(f"{old}/") for name in tensors) else ""

    def find(self, layer: Layer, names: Sequence[tuple[str, ...]]) -> list[str]:
        place = self._place(layer)
        found = [f"{place}/vars/{i}" for i in range(len(names))]
        for name in found:
            if name not in self._tensors:
                raise WeightsError(f"{layer}: there is no tensor {name!r}")
        if f"{place}/vars/{len(names)}" in self._tensors:
            raise WeightsError(f"{layer}: it has more than {len(names)} variables")
        return found

    def of_layer(self, layer: Layer) -> list[str]:
        place = self._place(layer)
        return sorted(name for name in self._tensors if name.startswith(f"{place}/"))

    def _place(self, layer: Layer) -> str:
        return layer.place.replace("layers", self._other) if self._other else layer.place


class _InGroups:
    """Old files: lists of names, such as ``block1_conv1/kernel:0``, by top-level layer."""

    def __init__(self, groups: Mapping[str, Sequence[tuple[str, str]]]) -> None:
        self._groups = groups
        self._named: dict[str, dict[tuple[str, str], list[str]]] = {}
        for group, weights in groups.items():
            named = self._named.setdefault(group, {})
            for weight, tensor in weights:
                owner, _, variable = re.sub(r":\d+$", "", weight).rpartition("/")
                named.setdefault((owner.rpartition("/")[2], variable), []).append(tensor)

    def find(self, layer: Layer, names: Sequence[tuple[str, ...]]) -> list[str]:
        if layer.group == layer.name:  # the group is the layer's own: in order
            found = [tensor for _, tensor in self._groups.get(layer.group, ())]
            if len(found) != len(names):
                raise WeightsError(f"{layer}: it has {len(found)} variables, expected {len(names)}")
            return found
        named = self._named.get(layer.group, {})
        found = []
        for variants in names:
            matching = [tensor for variant in variants for tensor in named.get((layer.name, variant), [])]
            if len(matching) != 1:
                raise WeightsError(f"{layer}: there are {len(matching)} tensors for its {variants[0]}, expected one")
            found += matching
        return found

    def of_layer(self, layer: Layer) -> list[str]:
        if layer.group == layer.name:
            return [tensor for _, tensor in self._groups.get(layer.group, ())]
        named = self._named.get(layer.group, {})
        return [tensor for (owner, _), tensors in named.items() if owner == layer.name for tensor in tensors]
