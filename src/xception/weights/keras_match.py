"""Finding Xception or Inception v3 in the graph of a Keras model, by its topology alone.

The few things that can differ (widths, numbers of modules, ...) are first read off the graph without much care; the
network that they describe is then laid over the graph, operation by operation, from its end to its input. Names decide
nothing, with one exception: without shortcuts, where one middle module ends and the next begins is only a name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from xception.errors import ConfigError
from xception.models.inception_v3 import InceptionV3Config
from xception.models.xception import XceptionConfig
from xception.weights.keras_layers import Plain, PlainGraph, padding_of
from xception.weights.names_keras import Step, inception_steps, xception_steps

_MAX_BEGINNINGS = 8
_RELU = {"activation": "relu"}
_KINDS = {
    "Conv2D", "SeparableConv2D", "DepthwiseConv2D", "BatchNormalization", "Activation", "MaxPooling2D", "Add"
}  # fmt: skip


@dataclass(frozen=True)
class Trunk:
    """A trunk that was found: `config` has the fields that were read off, `nodes` the operation of each step.

    `entry` is the operation whose result the trunk takes, `end` the one that gives its features.
    """

    model: str
    config: dict[str, Any]
    steps: list[Step]
    nodes: tuple[int, ...]
    entry: int
    end: int


class _Mismatch(Exception):
    """What differs from the network that was expected; `matched` operations were as they should be."""

    def __init__(self, what: str, matched: int = 0) -> None:
        super().__init__(what)
        self.matched = matched


def find_trunk(graph: PlainGraph) -> Trunk | str:
    """The first trunk in the graph; where there is none, what is different in what comes closest to one."""
    closest = _Mismatch(_nothing(graph))
    beginnings = [i for i, node in enumerate(graph.nodes) if node.kind == "Conv2D" and not node.problem]
    for start in beginnings[:_MAX_BEGINNINGS]:
        for model, read in (("xception", _read_xception), ("inception_v3", _read_inception)):
            try:
                config, steps, end = read(graph, start)
                nodes, entry = _lay_over(graph, steps, end)
            except _Mismatch as mismatch:
                closest = max(closest, mismatch, key=lambda m: m.matched)
                continue
            return Trunk(model, config, steps, nodes, entry, end)
    return str(closest)


def _nothing(graph: PlainGraph) -> str:
    """What to say where nothing in the graph comes close."""
    for node in graph.nodes:
        if node.kind == "Conv2D" and node.problem:
            return f"{node.layer} cannot be represented: {node.problem}"
    return "there is no Xception or Inception v3 in it"


def _lay_over(graph: PlainGraph, steps: list[Step], end: int) -> tuple[tuple[int, ...], int]:
    """The operation of each step, and the one before the first; `_Mismatch` unless all are as they should be."""
    found: dict[int, int] = {}
    taken: set[int] = set()
    entry: int | None = None
    pairs = [(len(steps) - 1, end)]
    while pairs:
        step_number, number = pairs.pop()
        if step_number < 0:
            if entry not in (None, number):
                raise _Mismatch("its input is read in two places", len(found))
            entry = number
        elif step_number not in found:
            step, node = steps[step_number], graph.nodes[number]
            if number in taken:
                raise _Mismatch(f"{node.layer} is connected in another way", len(found))
            if different := _difference(step, node):
                raise _Mismatch(f"{node.layer} {different}", len(found))
            found[step_number] = number
            taken.add(number)
            inputs = node.inputs
            if step.kind == "Add" and graph.nodes[inputs[0]].kind != steps[step.inputs[0]].kind:
                inputs = inputs[::-1]  # a sum is the same either way
            pairs += zip(step.inputs, inputs, strict=True)
        elif found[step_number] != number:
            raise _Mismatch(f"{graph.nodes[number].layer} is connected in another way", len(found))
    weighted = [number for step_number, number in found.items() if steps[step_number].ours]
    if entry is None or len(found) != len(steps):
        raise _Mismatch("it is connected in another way", len(found))
    if len({id(graph.nodes[number].layer) for number in weighted}) != len(weighted):
        raise _Mismatch("a layer of it is used twice", len(found))
    return tuple(found[i] for i in range(len(steps))), entry


def _difference(step: Step, node: Plain) -> str:
    """What is different between what was expected and what is there, "" for nothing."""
    if node.problem:
        return f"cannot be represented: {node.problem}"
    if node.kind != step.kind:
        return f"stands where {step.kind} was expected"
    if len(node.inputs) != len(step.inputs):
        return f"takes {len(node.inputs)} inputs, expected {len(step.inputs)}"
    expected = dict(step.settings)
    if "padding" in expected and "kernel_size" in expected:
        expected["padding"] = padding_of(expected["kernel_size"], expected["padding"])
    got = dict(node.settings)
    if got.pop("axis", -1) not in (-1, 3):
        return f"normalises along axis {node.settings['axis']}, expected the last"
    for name in expected.keys() | got.keys():
        if expected.get(name) != got.get(name):
            return f"has {name} {got.get(name)}, expected {expected.get(name)}"
    return ""


# ------------------------------------------------------------------------------------------------------ Xception


@dataclass(frozen=True)
class _Unit:
    width: int
    between: str
    order: str
    name: str


def _read_xception(graph: PlainGraph, start: int) -> tuple[dict[str, Any], list[Step], int]:
    path, blocked = _main_path(graph, start)
    if [graph.nodes[i].kind for i in path[:6]] != ["Conv2D", "BatchNormalization", "Activation"] * 2:
        if blocked is None:
            raise _Mismatch("there is no Xception or Inception v3 in it")
        raise _Mismatch(f"{blocked.layer} cannot be represented: {blocked.problem}", len(path))
    events, end, odd = _events(graph, path[6:])
    try:
        config, steps = _read_events(graph, path, events, end)
        _lay_over(graph, steps, end)
    except _Mismatch:
        if blocked is not None:
            raise _Mismatch(f"{blocked.layer} cannot be represented: {blocked.problem}", len(path)) from None
        if odd is not None:
            raise _Mismatch(f"{odd.layer} stands where an Xception has nothing of its kind", len(path)) from None
        raise
    return config, steps, end


def _read_events(
    graph: PlainGraph, path: list[int], events: list[_Unit | str], end: int
) -> tuple[dict[str, Any], list[Step]]:
    first, second = graph.nodes[path[0]].settings, graph.nodes[path[3]].settings
    stem = "valid" if first["padding"] == "valid" else "small"
    pools = [i for i, event in enumerate(events) if event == "pool"]
    if len(pools) < 2 or end < 0:
        raise _Mismatch("there is no Xception in it: it should have two pools or more, and end in a ReLU", matched=6)
    stretches = pairwise([-1, *pools, len(events)])
    units = [[event for event in events[a + 1 : b] if isinstance(event, _Unit)] for a, b in stretches]
    if any(len(group) != 2 for group in units[:-2]) or len(units[-2]) < 2:
        raise _Mismatch("there is no Xception in it: two separable convolutions should stand before a pool", matched=6)
    middle = units[-2][:-2]
    shortcuts = events[pools[-2] + 1 : pools[-1]].count("add") - 1 if "add" in events else 0
    modules, size = _middle(middle, shortcuts if "add" in events else None)
    example = units[0][0]
    config: dict[str, Any] = {
        "stem": stem,
        "stem_stride": first["strides"][0],
        "stem_widths": (first["filters"], second["filters"]),
        "entry_widths": tuple(group[-1].width for group in units[:-2]),
        "middle_modules": modules,
        "middle_units": size,
        "exit_widths": (units[-2][-1].width, *(unit.width for unit in units[-1])),
        "residual": "add" in events,
        "intermediate_activation": example.between,
        "order": "pointwise_depthwise" if example.order == "pointwise_depthwise" else None,
    }
    if config["stem_stride"] == (2 if stem == "valid" else 1):
        config["stem_stride"] = None
    if first["strides"][0] != first["strides"][1]:
        raise _Mismatch("there is no Xception in it: its first convolution has two strides", matched=6)
    try:
        full = XceptionConfig(**config)
    except ConfigError as error:
        raise _Mismatch(f"its Xception is none of ours: {error}", matched=6) from None
    return config, xception_steps(full)


def _main_path(graph: PlainGraph, start: int) -> tuple[list[int], Plain | None]:
    """The operations from `start` on, past the shortcuts, until something else than a trunk's comes.

    And, where it is one of a kind that could be a trunk's and has a problem, that one.
    """
    path = [start]
    while True:
        following = [i for i in graph.consumers[path[-1]] if graph.nodes[i].kind in _KINDS]
        main = [i for i in following if graph.nodes[i].kind != "Add" and not _is_projection(graph.nodes[i])]
        choice = main or [i for i in following if graph.nodes[i].kind == "Add"]
        blocked = next((graph.nodes[i] for i in following if graph.nodes[i].problem), None)
        if len(choice) != 1 or blocked is not None:
            return path, blocked
        path.append(choice[0])


def _is_projection(node: Plain) -> bool:
    settings = node.settings
    return node.kind == "Conv2D" and settings.get("kernel_size") == (1, 1) and settings.get("strides") == (2, 2)


def _events(graph: PlainGraph, path: list[int]) -> tuple[list[_Unit | str], int, Plain | None]:
    """Units, pools and sums along the path, and the number of the last operation: a ReLU.

    And, where something else came before the path's end, what that is: the first of the head, or a mistake.
    """
    events: list[_Unit | str] = []
    end, place = -1, 0
    while place < len(path):
        node = graph.nodes[path[place]]
        if node.kind in ("MaxPooling2D", "Add"):
            if not events or events[-1] in ("relu", "add"):
                break  # behind the trunk
            events.append("pool" if node.kind == "MaxPooling2D" else "add")
            place, end = place + 1, -1
        elif node.kind == "Activation" and node.settings == _RELU:
            if end < 0 or isinstance(events[-1], _Unit):
                end = path[place]
            elif events[-1] == "relu":
                break  # behind the trunk
            events.append("relu")
            place += 1
        else:
            unit, length = _unit([graph.nodes[i] for i in path[place : place + 4]])
            if unit is None:
                break
            events.append(unit)
            place += length
    while events and isinstance(events[-1], _Unit):
        events.pop()  # no ReLU follows: no part of the trunk
    return events, end, graph.nodes[path[place]] if place < len(path) else None


def _unit(nodes: list[Plain]) -> tuple[_Unit | None, int]:
    """The separable convolution, in one layer or two, and its normalisation that these operations begin with."""
    kinds = [node.kind for node in nodes]
    if kinds[:2] == ["SeparableConv2D", "BatchNormalization"]:
        return _Unit(nodes[0].settings["filters"], "none", "depthwise_pointwise", nodes[0].layer.name), 2
    between, parts = "none", [*nodes]
    if kinds[1:2] == ["Activation"]:
        between = parts.pop(1).settings["activation"]
    kinds = [node.kind for node in parts[:3]]
    for order in ("depthwise_pointwise", "pointwise_depthwise"):
        expected = [{"depthwise": "DepthwiseConv2D", "pointwise": "Conv2D"}[part] for part in order.split("_")]
        if kinds == [*expected, "BatchNormalization"]:
            width = parts[expected.index("Conv2D")].settings["filters"]
            return _Unit(width, between, order, parts[0].layer.name), 3 + (between != "none")
    return None, 0


def _middle(units: list[_Unit], shortcuts: int | None) -> tuple[int, int]:
    """How many modules the middle flow has, and units in each; `shortcuts` is None where there are none."""
    if not units:
        return 0, 3
    if shortcuts is not None:
        if shortcuts < 1 or len(units) % shortcuts:
            raise _Mismatch("there is no Xception in it: its middle modules differ", matched=6)
        return shortcuts, len(units) // shortcuts
    blocks = [re.match(r"(block\d+)_sepconv\d+", unit.name) for unit in units]
    named = len({match.group(1) for match in blocks if match})
    if all(blocks) and len(units) % named == 0:
        return named, len(units) // named
    return (len(units) // 3, 3) if len(units) % 3 == 0 else (len(units), 1)


# -------------------------------------------------------------------------------------------------- Inception v3

_CONCATENATIONS = 15  # one a module, and two inside each of the last two


def _read_inception(graph: PlainGraph, start: int) -> tuple[dict[str, Any], list[Step], int]:
    joins = [i for i, node in enumerate(graph.nodes) if i > start and node.kind == "Concatenate"]
    if len(joins) < _CONCATENATIONS:
        raise _Mismatch("there is no Xception or Inception v3 in it")
    following = [graph.nodes[i] for i in graph.consumers[start]]
    norms = [node for node in graph.nodes[start:] if node.kind == "BatchNormalization"]
    config = {
        "norm_scale": bool(norms) and norms[0].settings.get("scale") is True,
        "conv_bias": graph.nodes[start].settings["use_bias"],
        "activation_first": [node.kind for node in following] == ["Activation"],
        "pool_projections": tuple(_width_before(graph, joins[i], branch=-1, back=0) for i in range(3)),
        "last_7x7_reduce": _width_before(graph, joins[7], branch=2, back=4),
    }
    try:
        full = InceptionV3Config(**config)
    except ConfigError as error:
        raise _Mismatch(f"its Inception v3 is none of ours: {error}") from None
    return config, inception_steps(full), joins[_CONCATENATIONS - 1]


def _width_before(graph: PlainGraph, join: int, *, branch: int, back: int) -> int:
    """The filters of the convolution that is `back` convolutions before the last of a concatenation's branch."""
    inputs = graph.nodes[join].inputs
    number = inputs[branch] if -len(inputs) <= branch < len(inputs) else -1
    while number >= 0:
        node = graph.nodes[number]
        if node.kind == "Conv2D" and not node.problem:
            if back == 0:
                return int(node.settings["filters"])
            back -= 1
        number = node.inputs[0] if len(node.inputs) == 1 else -1
    raise _Mismatch("there is no Xception or Inception v3 in it")
