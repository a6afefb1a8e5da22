"""Keras files of weights alone: which network they are of, from the order in which Keras lists a network's layers.

Without a description only the networks of keras.applications can be told, with one dense layer behind them or none,
flat or as one layer of a larger model. Every shape is checked before anything is read, by `import_tensors`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xception.errors import WeightsError
from xception.models.inception_v3 import InceptionV3Config
from xception.models.xception import XceptionConfig
from xception.weights.foreign import ForeignTensor, Pair
from xception.weights.keras_file import KerasContents
from xception.weights.keras_graph import snake_case
from xception.weights.names_keras import Step, inception_steps, keras_order, pairs, xception_steps


@dataclass(frozen=True)
class Bare:
    """A network's trunk, and the dense layer behind it: kernel and bias, None where there is none.

    `others` are tensors of other layers behind or before the trunk, whose use is not known.
    """

    model: str
    pairs: tuple[Pair, ...]
    first: str
    dense: tuple[str, str] | None
    others: tuple[str, ...]


def read_bare(contents: KerasContents, tensors: Mapping[str, ForeignTensor]) -> Bare | None:
    """The network in a file of weights alone, None where it is none that is known."""
    for model, steps in (("xception", _XCEPTION), ("inception_v3", _INCEPTION)):
        if contents.kind == "keras-weights":
            found = _in_places(contents, tensors, steps)
        else:
            found = _in_groups(contents, steps)
        if found is None:
            continue
        trunk, rest = found
        dense = None
        if len(rest) == 2 and [len(tensors[name].shape) for name in rest] == [2, 1]:
            dense, rest = (rest[0], rest[1]), []
        table = tuple(pair for step, names in trunk for pair in pairs(step, names))
        first = next(names[0] for step, names in trunk if step is steps[0])
        return Bare(model, table, first, dense, tuple(rest))
    return None


_Found = tuple[list[tuple[Step, Sequence[str]]], list[str]]  # each step's tensors, and those of other layers


def _ordered(steps: list[Step]) -> list[Step]:
    return [steps[i] for i in keras_order([step.inputs for step in steps])]


_XCEPTION = xception_steps(XceptionConfig())
_INCEPTION = inception_steps(InceptionV3Config())


def _in_places(contents: KerasContents, tensors: Mapping[str, ForeignTensor], steps: list[Step]) -> _Found | None:
    """New files: layers numbered class by class, below ``layers``, or below the layer that is the trunk."""
    for parent in _parents(tensors):
        counts: dict[str, int] = {}
        trunk: list[tuple[Step, Sequence[str]]] = []
        for step in _ordered(steps):
            stem = snake_case(step.kind)
            number = counts[stem] = counts.get(stem, -1) + 1
            place = f"{parent}/{stem}_{number}" if number else f"{parent}/{stem}"
            names = [f"{place}/vars/{i}" for i in range(len(step.variables()))]
            if any(name not in tensors for name in names) or f"{place}/vars/{len(names)}" in tensors:
                break
            if names:
                trunk.append((step, names))
        else:
            used = {name for _, names in trunk for name in names}
            return trunk, sorted(name for name in tensors if name not in used and not is_state(contents, name))
    return None


def _parents(tensors: Mapping[str, ForeignTensor]) -> Iterator[str]:
    seen = dict.fromkeys(name.removesuffix("/conv2d/vars/0") for name in tensors if name.endswith("/conv2d/vars/0"))
    yield from list(seen)[:8]


def is_state(contents: KerasContents, name: str) -> bool:
    """Whether a tensor is what layers and optimisers keep for training alone: counters, seeds, slots."""
    parts = name.split("/")
    if "seed_generator" in parts or "top_level_model_weights" in parts[:2]:
        return True
    if contents.kind == "keras-h5":
        return parts[0] != "model_weights"
    if contents.kind == "keras-h5-weights":
        return parts[0] == "optimizer_weights"
    return parts[0] not in ("layers", "_layer_checkpoint_dependencies")


def _in_groups(contents: KerasContents, steps: list[Step]) -> _Found | None:
    """Old files: a list of layers with lists of variables; the trunk is a stretch of the list, or one of its layers."""
    groups = [weights for weights in contents.groups.values() if weights]
    expected = [step for step in _ordered(steps) if step.variables()]
    sizes = [len(step.variables()) for step in expected]
    if [len(weights) for weights in groups[: len(sizes)]] == sizes:
        trunk: list[tuple[Step, Sequence[str]]] = [
            (step, [tensor for _, tensor in weights]) for step, weights in zip(expected, groups, strict=False)
        ]
        return trunk, [tensor for weights in groups[len(sizes) :] for _, tensor in weights]
    for weights in groups:
        if len(weights) == sum(sizes):
            rest = [tensor for others in groups if others is not weights for _, tensor in others]
            return _by_names(weights, steps), rest
    return None


def _by_names(weights: Sequence[tuple[str, str]], steps: list[Step]) -> list[tuple[Step, Sequence[str]]]:
    """Each step's tensors out of one long list: by the layer's name, or by its number where Keras numbered it."""
    layers: dict[str, dict[str, str]] = {}
    for weight, tensor in weights:
        owner, _, variable = re.sub(r":\d+$", "", weight).rpartition("/")
        layers.setdefault(owner.rpartition("/")[2], {})[variable] = tensor
    given = {step.name for step in steps}
    numbered: dict[str, list[str]] = {"Conv2D": [], "BatchNormalization": []}
    for name in sorted((name for name in layers if name not in given), key=_number):
        numbered["Conv2D" if "kernel" in layers[name] else "BatchNormalization"].append(name)
    queues = {kind: iter(names) for kind, names in numbered.items()}
    trunk: list[tuple[Step, Sequence[str]]] = []
    for step in steps:
        if not step.variables():
            continue
        name = step.name or next(queues.get(step.kind, iter(())), "")
        own = layers.get(name, {})
        names = [own[variants[0]] for variants, _, _ in step.variables() if variants[0] in own]
        if len(names) != len(step.variables()) or len(own) != len(names):
            raise WeightsError(f"layer {name[:80]!r} of class {step.kind}: its variables are not all there")
        trunk.append((step, names))
    return trunk


def _number(name: str) -> tuple[int, str]:
    """`conv2d_12` -> 12; Keras's counters begin without a number."""
    match: Any = re.search(r"_(\d{1,9})$", name)
    return (int(match.group(1)) if match else 0), name
