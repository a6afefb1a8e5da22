"""What network a Keras file holds: its trunk by its topology, its head, its preprocessing, as a `Recognised`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xception.data.preprocess import Preprocess
from xception.errors import WeightsError
from xception.models import registry
from xception.weights.foreign import ForeignFile, ForeignTensor, Pair, Recognised
from xception.weights.keras_bare import Bare, is_state, read_bare
from xception.weights.keras_file import KerasContents, naming
from xception.weights.keras_graph import read_graph
from xception.weights.keras_head import Head, read_head
from xception.weights.keras_input import DEFAULT_SIZE, Inputs, default_preprocess, input_size, read_inputs
from xception.weights.keras_layers import PlainGraph, plain_graph
from xception.weights.keras_match import Trunk, find_trunk
from xception.weights.keras_weights import Finder, finder, layer_tensors
from xception.weights.names_keras import pairs

INCEPTION_FEATURES = 2048
_CLASSIFIER = ("classifier.linear.weight", "classifier.linear.bias")


def recognise_keras(file: ForeignFile, *, trunk_only: bool = False) -> Recognised | None:
    """The network that a Keras file holds; None where `file` is not Keras's.

    A model that ends in its features (``include_top=False``), and any with `trunk_only`, gets a fresh classifier: its
    tensors are in `fresh`. With `trunk_only` neither the head nor what stands before the trunk needs a counterpart.
    Raises `WeightsError` naming the file, and the layer that has none.
    """
    contents = file.facts.get("keras")
    if not isinstance(contents, KerasContents):
        return None
    with naming(file.path):
        if contents.description is None:
            return _recognise_bare(file, contents, trunk_only=trunk_only)
        return _recognise_described(file, contents, contents.description, trunk_only=trunk_only)


def _recognise_described(
    file: ForeignFile, contents: KerasContents, description: Mapping[str, Any], *, trunk_only: bool
) -> Recognised:
    graph = plain_graph(read_graph(description))
    trunk = find_trunk(graph)
    if isinstance(trunk, str):
        raise WeightsError(trunk)
    found = finder(contents, file.tensors)
    table: list[Pair] = []
    for step, number in zip(trunk.steps, trunk.nodes, strict=True):
        if step.variables():
            table += pairs(step, layer_tensors(found, graph.nodes[number].layer, step.kind, step.settings))
    channels = _in_channels(file.tensors, table[0].theirs)
    features = trunk.config["exit_widths"][-1] if trunk.model == "xception" else INCEPTION_FEATURES
    if trunk_only:
        head = None
        inputs = _inputs_or_default(graph, trunk, channels, found, file)
    else:
        _check_enclosed(graph, trunk)
        head = read_head(graph, trunk.end, features, found, file.tensors, contents.loss)
        inputs = read_inputs(graph, trunk.entry, channels, found, file.tensors)
    preprocess = inputs.preprocess
    if graph.nodes[trunk.entry].kind == "InputLayer":
        preprocess = _noted_preprocess(contents, preprocess)
    used = {pair.theirs for pair in table} | _used_by(head)
    ignored = set(file.tensors) if trunk_only else _ignored(file, contents, graph, found) | set(inputs.tensors)
    return _recognised(
        contents, trunk.model, {**trunk.config, "in_channels": channels}, preprocess, table, head, ignored - used
    )


def _recognise_bare(file: ForeignFile, contents: KerasContents, *, trunk_only: bool) -> Recognised:
    bare = read_bare(contents, file.tensors)
    if bare is None:
        raise WeightsError("weights without a description, and not those of Keras's own Xception or Inception v3")
    if bare.others and not trunk_only:
        raise WeightsError(
            f"tensor {bare.others[0][:80]!r} belongs to a layer beside the trunk, and the file does not describe how "
            "it is used: give the whole model, or take the trunk only"
        )
    channels = _in_channels(file.tensors, bare.first)
    head = None if trunk_only or bare.dense is None else _bare_head(file, bare)
    used = {pair.theirs for pair in bare.pairs} | _used_by(head)
    ignored = {name for name in file.tensors if trunk_only or is_state(contents, name)} - used
    preprocess = _noted_preprocess(contents, default_preprocess((DEFAULT_SIZE, DEFAULT_SIZE), channels))
    return _recognised(contents, bare.model, {"in_channels": channels}, preprocess, list(bare.pairs), head, ignored)


def _bare_head(file: ForeignFile, bare: Bare) -> Head:
    kernel, bias = bare.dense or ("", "")
    count = file.tensors[kernel].shape[1]
    table = (Pair("classifier.linear.weight", kernel, "dense"), Pair("classifier.linear.bias", bias))
    return Head({"num_classes": count}, count == 1, table, {})


def _recognised(
    contents: KerasContents,
    model: str,
    config: dict[str, Any],
    preprocess: Preprocess,
    table: list[Pair],
    head: Head | None,
    ignored: set[str],
) -> Recognised:
    size = preprocess.size
    fields = {**config, "input_size": max(size), **(head.config if head else {})}
    full = registry.config_to_dict(registry.config_from_dict(model, fields))
    classified = head is not None and bool(head.pairs or head.computed)
    return Recognised(
        format=contents.kind,
        model=model,
        config=full,
        preprocess=preprocess,
        pairs=(*table, *(head.pairs if head else ())),
        multi_label=head.multi_label if head else False,
        ignored=tuple(sorted(ignored)),
        computed=head.computed if head else {},
        class_names=_noted_names(contents, full["num_classes"]) if classified else None,
        fresh=() if classified else _CLASSIFIER,
    )


def _noted_preprocess(contents: KerasContents, otherwise: Preprocess) -> Preprocess:
    """What a file that was written here says of its preprocessing, where it is of as many channels."""
    if contents.notes is None:
        return otherwise
    noted = Preprocess.from_dict(contents.notes.get("preprocess"))
    return noted if noted.channels == otherwise.channels else otherwise


def _noted_names(contents: KerasContents, count: int) -> tuple[str, ...] | None:
    """The class names of a file that was written here, where they are as many as there are classes."""
    names = contents.notes.get("class_names") if contents.notes is not None else None
    fits = isinstance(names, list) and len(names) == count and all(isinstance(name, str) for name in names)
    return tuple(names or ()) if fits else None


def _in_channels(tensors: Mapping[str, ForeignTensor], first: str) -> int:
    shape = tensors[first].shape
    if len(shape) != 4:
        raise WeightsError(f"tensor {first!r} has shape {shape}, expected a convolution's")
    return shape[2]


def _inputs_or_default(graph: PlainGraph, trunk: Trunk, channels: int, found: Finder, file: ForeignFile) -> Inputs:
    """With the trunk alone: what stands before it where that has a counterpart, else what Keras's trunks expect."""
    try:
        return read_inputs(graph, trunk.entry, channels, found, file.tensors)
    except WeightsError:
        size = (DEFAULT_SIZE, DEFAULT_SIZE)
        if len(graph.inputs) == 1:
            size = input_size(graph, graph.nodes[graph.inputs[0]])
        return Inputs(default_preprocess(size, channels), ())


def _check_enclosed(graph: PlainGraph, trunk: Trunk) -> None:
    """Raise `WeightsError` where a layer outside takes a result from the trunk's inside."""
    inside = set(trunk.nodes)
    for number in trunk.nodes:
        for consumer in graph.consumers[number]:
            if number != trunk.end and consumer not in inside:
                raise WeightsError(
                    f"{graph.nodes[consumer].layer} cannot be represented: it takes a result from inside the trunk"
                )


def _ignored(file: ForeignFile, contents: KerasContents, graph: PlainGraph, found: Finder) -> set[str]:
    """Tensors that mean nothing at inference: optimisers' slots, seeds, what idle layers keep."""
    ignored = {name for name in file.tensors if is_state(contents, name)}
    for layer in graph.idle:
        ignored.update(found.of_layer(layer))
    return ignored


def _used_by(head: Head | None) -> set[str]:
    if head is None:
        return set()
    return {pair.theirs for pair in head.pairs} | {name for names, _ in head.computed.values() for name in names}
