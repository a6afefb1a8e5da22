"""A Keras model's description as a plain graph of calls: models inside models are unfolded, nothing is built or run.

Keras describes a model as JSON: a `Functional` lists layers with the calls that were made of each, a `Sequential` lists
them in order, and either may stand as a layer in another. Here each call of each plain layer becomes a `Node`. What a
layer does is not asked: a class of somebody's own, or a Lambda, is a node like any other, and harmless as such.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from xception.errors import WeightsError

MAX_NODES = 5_000  # Inception v3 has 313 layers
MAX_DEPTH = 8
_MAX_CALLS = 4 * MAX_NODES  # calls of models included, which may be of nothing but models
_MAX_ARGUMENTS = 64
_MODELS = ("Functional", "Model", "Sequential")
# Where Keras's own classes come from, by the names of its ages; anything else is somebody's own.
_OWN_MODULES = re.compile(r"(keras|tf_keras|tensorflow\.keras|tensorflow\.python\.keras)(\.\w+)*")


@dataclass(frozen=True)
class Layer:
    """A layer of the description.

    `place` is where new files keep its variables ("layers/functional/layers/conv2d_3"), `group` the top-level layer
    under which old files list them. `foreign` layers are of a class that is not Keras's own.
    """

    name: str
    kind: str
    config: Mapping[str, Any]
    place: str
    group: str
    foreign: bool = False

    def __str__(self) -> str:
        return f"layer {self.name[:80]!r} of class {self.kind[:80]}"


@dataclass(frozen=True)
class Node:
    """One call of a layer: `inputs` are numbers of nodes, `constants` the other arguments, by name or by position."""

    layer: Layer
    inputs: tuple[int, ...]
    constants: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Graph:
    """All calls, each after those whose results it takes; the model's own inputs and outputs among them."""

    nodes: tuple[Node, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def consumers(self) -> tuple[tuple[int, ...], ...]:
        """Of each node, those that take its result."""
        found: list[list[int]] = [[] for _ in self.nodes]
        for number, node in enumerate(self.nodes):
            for source in dict.fromkeys(node.inputs):
                found[source].append(number)
        return tuple(map(tuple, found))


def read_graph(description: Mapping[str, Any]) -> Graph:
    """The graph of a model's description; `WeightsError` where it describes no model, or one of absurd size."""
    builder = _Builder()
    kind = description.get("class_name")
    if kind not in _MODELS or _is_foreign(description):
        raise WeightsError(f"the model is of class {str(kind)[:80]}: only Functional and Sequential can be read")
    outputs = builder.model(description, place="", group=None, inputs=None, depth=0)
    return Graph(tuple(builder.nodes), tuple(builder.inputs), tuple(outputs))


_Reference = tuple[str, int, int]  # a layer's name, which of its calls, which of that call's results


@dataclass
class _Call:
    layer: Mapping[str, Any]
    key: tuple[str, int]
    references: list[_Reference]
    constants: dict[str, Any]


class _Builder:
    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.inputs: list[int] = []
        self._calls = 0

    def model(
        self,
        description: Mapping[str, Any],
        *,
        place: str,
        group: str | None,
        inputs: Sequence[int] | None,
        depth: int,
        training: bool = False,
    ) -> list[int]:
        """Add a model's calls; `inputs` are what it is called with, None for the outermost. Returns its outputs.

        `training` is whether it was called with ``training=True``, which then holds for all of its layers.
        """
        if depth > MAX_DEPTH:
            raise WeightsError(f"models nested deeper than {MAX_DEPTH}")
        config = description.get("config")
        layers = config if isinstance(config, list) else _get(config, "layers", list)
        if not all(isinstance(layer, dict) for layer in layers):
            raise WeightsError("a model's description lists something that is no layer")
        places = _places(layers, place)
        sequential = description["class_name"] == "Sequential"
        calls = _sequential_calls(layers) if sequential else _functional_calls(layers)
        self._calls += len(calls)
        if self._calls > _MAX_CALLS:
            raise WeightsError(f"a model of more than {MAX_NODES:,} layers")
        values: dict[tuple[str, int], list[int]] = {}
        feeds = list(inputs) if inputs is not None else None
        named_inputs = _references(config.get("input_layers")) if isinstance(config, dict) else []
        for call in _in_order(calls):
            sources = [_result(values, reference) for reference in call.references]
            kind, name = _get(call.layer, "class_name", str), call.key[0]
            if not sources and kind != "InputLayer" and not sequential:
                raise WeightsError(f"the description's {kind[:80]} {name[:80]!r} takes no input")
            top = group if group is not None else name
            constants = {**({"training": True} if training else {}), **call.constants}
            if kind == "InputLayer" and feeds is not None:
                position = next((i for i, reference in enumerate(named_inputs) if reference[0] == name), 0)
                if position >= len(feeds):
                    raise WeightsError(f"model {_name(description)!r} is called with too few inputs")
                values[call.key] = [feeds[position]]
            elif kind in _MODELS and not _is_foreign(call.layer):
                always = constants.get("training") is True
                taken = sources or feeds  # a Sequential without an InputLayer begins with its own input
                values[call.key] = self.model(
                    call.layer, place=places[name], group=top, inputs=taken, depth=depth + 1, training=always
                )
            else:
                if not sources and kind != "InputLayer":
                    sources = feeds if feeds is not None else [self._implied_input(call.layer)]
                layer = Layer(name, kind, _config(call.layer), places[name], top, _is_foreign(call.layer))
                values[call.key] = [self._add(Node(layer, tuple(sources), constants))]
                if kind == "InputLayer":
                    self.inputs += values[call.key]
        if isinstance(config, dict) and "output_layers" in config:
            return [_result(values, reference) for reference in _references(config["output_layers"])]
        if not calls:
            raise WeightsError(f"model {_name(description)!r} is empty")
        return values[calls[-1].key]

    def _implied_input(self, layer: Mapping[str, Any]) -> int:
        config = _config(layer)
        shape = config.get("batch_input_shape") or config.get("batch_shape")
        node = self._add(Node(Layer("input", "InputLayer", {"batch_shape": shape}, "", ""), ()))
        self.inputs.append(node)
        return node

    def _add(self, node: Node) -> int:
        if len(self.nodes) >= MAX_NODES:
            raise WeightsError(f"a model of more than {MAX_NODES:,} layers")
        self.nodes.append(node)
        return len(self.nodes) - 1


# -------------------------------------------------------------------------------------------------------- calls


def _sequential_calls(layers: Sequence[Mapping[str, Any]]) -> list[_Call]:
    calls: list[_Call] = []
    for layer in layers:
        before = [(*calls[-1].key, 0)] if calls else []
        calls.append(_Call(layer, (_name(layer), 0), [(n, k, t) for n, k, t in before], {}))
    if len({call.key for call in calls}) != len(calls):
        raise WeightsError("a model's description has two layers of one name")
    return calls


def _functional_calls(layers: Sequence[Mapping[str, Any]]) -> list[_Call]:
    calls: list[_Call] = []
    for layer in layers:
        name, nodes = _name(layer), _get(layer, "inbound_nodes", list)
        if not nodes:
            calls.append(_Call(layer, (name, 0), [], {}))
        for number, node in enumerate(nodes):
            references, constants = _arguments(node)
            calls.append(_Call(layer, (name, number), references, constants))
    if len({call.key for call in calls}) != len(calls):
        raise WeightsError("a model's description has two layers of one name")
    # Old files count a model's own definition as its first call.
    last = {call.key[0]: call.key[1] for call in calls}
    for call in calls:
        call.references = [(n, min(k, last.get(n, k)), t) for n, k, t in call.references]
    return calls


def _arguments(node: object) -> tuple[list[_Reference], dict[str, Any]]:
    """Of a call: the results it takes, in order, and its other arguments, by name or by position ("0", "1")."""
    references: list[_Reference] = []
    constants: dict[str, Any] = {}
    if isinstance(node, dict):
        arguments, named = node.get("args", []), node.get("kwargs", {})
        if not isinstance(arguments, list) or not isinstance(named, dict):
            raise WeightsError("a model's description has a call without arguments")
        for key, value in [*((str(i), v) for i, v in enumerate(arguments)), *named.items()]:
            found = list(_tensors(value))
            references += found
            if not found:
                constants[key] = value
    elif isinstance(node, list):
        # Old: a list of [layer, call, result, named arguments]; of one such call, sometimes without the outer list.
        for item in [node] if node and isinstance(node[0], str) else node:
            if not isinstance(item, list) or len(item) not in (3, 4):
                raise WeightsError("a model's description has a call without arguments")
            references.append(_reference(item[:3]))
            if len(item) == 4 and isinstance(item[3], dict):
                constants.update(item[3])
    if len(references) > _MAX_ARGUMENTS or not isinstance(node, (dict, list)):
        raise WeightsError("a model's description has a call without arguments, or with too many")
    return references, constants


def _tensors(value: object, depth: int = 0) -> Iterator[_Reference]:
    """The results named in an argument, which may be a list of them."""
    if isinstance(value, dict) and value.get("class_name") == "__keras_tensor__":
        yield _reference(_get(value.get("config"), "keras_history", list))
    elif isinstance(value, list) and depth < 3:
        for item in value:
            yield from _tensors(item, depth + 1)


def _references(value: object) -> list[_Reference]:
    """`[name, call, result]`, or a list or an object of such."""
    if isinstance(value, list) and len(value) == 3 and isinstance(value[0], str):
        return [_reference(value)]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [_reference(item) for item in items]


def _reference(value: object) -> _Reference:
    if not isinstance(value, list) or len(value) != 3 or not isinstance(value[0], str):
        raise WeightsError("a model's description refers to a layer in a way that is none")
    name, call, result = value
    if type(call) is not int or type(result) is not int or not (0 <= call < MAX_NODES and 0 <= result < MAX_NODES):
        raise WeightsError("a model's description refers to a layer in a way that is none")
    return name, call, result


def _result(values: Mapping[tuple[str, int], list[int]], reference: _Reference) -> int:
    results = values.get(reference[:2], [])
    if reference[2] >= len(results):
        raise WeightsError(f"the description takes a result of {reference[0][:80]!r} that it does not have")
    return results[reference[2]]


def _in_order(calls: Sequence[_Call]) -> list[_Call]:
    """The calls, each after those it depends on; `WeightsError` for a cycle or a layer that is not there."""
    known = {call.key for call in calls}
    waiting: dict[tuple[str, int], set[tuple[str, int]]] = {}
    dependents: dict[tuple[str, int], list[_Call]] = {}
    ready: list[_Call] = []
    for call in calls:
        needed = {reference[:2] for reference in call.references}
        for name, number in needed:
            if (name, number) not in known:
                raise WeightsError(f"the description refers to a layer {name[:80]!r} that it does not have")
        waiting[call.key] = needed
        for key in needed:
            dependents.setdefault(key, []).append(call)
        if not needed:
            ready.append(call)
    order: list[_Call] = []
    for call in ready:  # grows while it is walked
        order.append(call)
        for dependent in dependents.get(call.key, []):
            waiting[dependent.key].discard(call.key)
            if not waiting[dependent.key]:
                ready.append(dependent)
    if len(order) != len(calls):
        raise WeightsError("the description's layers depend on each other in a cycle")
    return order


# -------------------------------------------------------------------------------------------------------- layers


def _places(layers: Sequence[Mapping[str, Any]], place: str) -> dict[str, str]:
    """Where new files keep each layer's variables: under its class, numbered in the order of the list."""
    counts: dict[str, int] = {}
    places = {}
    for layer in layers:
        stem = snake_case(_get(layer, "class_name", str))
        number = counts[stem] = counts.get(stem, -1) + 1
        prefix = f"{place}/layers" if place else "layers"
        places[_name(layer)] = f"{prefix}/{stem}_{number}" if number else f"{prefix}/{stem}"
    return places


def snake_case(name: str) -> str:
    """`SeparableConv2D` -> `separable_conv2d`, as Keras names groups after classes."""
    name = re.sub(r"\W+", "", name)
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


def _name(layer: Mapping[str, Any]) -> str:
    name = layer.get("name") or _config(layer).get("name")
    if not isinstance(name, str) or not name:
        raise WeightsError("a model's description has a layer without a name")
    return name


def _config(layer: Mapping[str, Any]) -> Mapping[str, Any]:
    config = layer.get("config")
    return config if isinstance(config, dict) else {}


def _is_foreign(layer: Mapping[str, Any]) -> bool:
    module, registered = layer.get("module"), layer.get("registered_name")
    return (module is not None and not (isinstance(module, str) and _OWN_MODULES.fullmatch(module))) or (
        registered is not None and registered != layer.get("class_name")
    )


def _get(value: object, name: str, kind: type) -> Any:
    found = value.get(name) if isinstance(value, dict) else None
    if not isinstance(found, kind):
        raise WeightsError(f"a model's description lacks {name}")
    return found
