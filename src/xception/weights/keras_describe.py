"""Our networks as Keras models: the description that Keras builds the model from, and where it looks for the weights.

Only Keras's own plain layers are used, each with the settings that decide what it computes; for the rest Keras has
defaults. Layers stand in the order in which Keras itself would list them, which decides the places of their variables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from xception.errors import WeightsError
from xception.models.head import Classifier
from xception.models.inception_v3 import InceptionV3
from xception.models.xception import Xception
from xception.weights.foreign import Pair
from xception.weights.keras_graph import snake_case
from xception.weights.keras_settings import ACTIVATIONS
from xception.weights.names_keras import Step, inception_steps, keras_order, pairs, xception_steps

_KERAS_NAMES = {ours: theirs for theirs, ours in ACTIVATIONS.items() if theirs != "swish"}


@dataclass(frozen=True)
class DescribedLayer:
    """A layer with its name, where new files keep its variables, and its pairs (theirs: the variables' names).

    `shape` is that of its result, N H W C or N C, None for what is open.
    """

    step: Step
    name: str
    place: str
    inputs: tuple[str, ...]
    pairs: tuple[Pair, ...]
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Described:
    """A network for Keras: its name, its layers in Keras's order, the input first.

    `published` says whether keras.applications has this very network, at any number of classes and channels.
    """

    name: str
    layers: tuple[DescribedLayer, ...]
    published: bool

    def description(self, *, legacy: bool) -> dict[str, Any]:
        """The model as JSON: for a `.keras` archive, or, `legacy`, for HDF5."""
        shapes = {layer.name: list(layer.shape) for layer in self.layers}
        layers = [_layer(layer, shapes, legacy=legacy) for layer in self.layers]
        first, last = self.layers[0].name, self.layers[-1].name
        config = {
            "name": self.name,
            "trainable": True,
            "layers": layers,
            "input_layers": [[first, 0, 0]],
            "output_layers": [[last, 0, 0]],
        }
        plain = {"class_name": "Functional", "config": config}
        origin = {"module": "keras.src.models.functional", "registered_name": "Functional"}
        return plain if legacy else {**plain, **origin, "build_config": {"input_shape": None}}


def describe(model: nn.Module, *, multi_label: bool) -> Described:
    """The Keras model that computes what `model` does, with a softmax behind it, or a sigmoid if `multi_label`.

    Raises `WeightsError` naming what in `model` has no counterpart in Keras.
    """
    trunk, name, published = _trunk(model)
    head: Any = model.classifier
    config: Any = model.config
    steps = [Step("InputLayer", {"batch_shape": (None, None, None, config.in_channels)}, ())]
    steps += [_moved(step) for step in trunk]
    steps += _head(head, len(steps) - 1, "sigmoid" if multi_label else "softmax")
    names = _names(steps)
    shapes = _shapes(steps)
    order = keras_order([step.inputs for step in steps])
    places = _numbered(snake_case(steps[i].kind) for i in order)
    layers = []
    for i, place in zip(order, places, strict=True):
        step = steps[i]
        found = tuple(pairs(step, [variants[0] for variants, _, _ in step.variables()]))
        inputs = tuple(names[k] for k in step.inputs)
        layers.append(DescribedLayer(step, names[i], f"layers/{place}", inputs, found, shapes[i]))
    plain_head = head.pooling == "avg" and len(head.fully_connected) == 0
    return Described(name, tuple(layers), published and plain_head)


def _shapes(steps: list[Step]) -> list[tuple[int | None, ...]]:
    """The shape of each step's result."""
    shapes: list[tuple[int | None, ...]] = []
    for step in steps:
        before = [shapes[i] for i in step.inputs]
        if step.kind == "InputLayer":
            shape = step.settings["batch_shape"]
        elif step.kind == "Concatenate":
            shape = (*before[0][:3], sum(part[3] or 0 for part in before))
        elif step.kind.startswith("Global"):
            shape = (None, before[0][3])
        else:
            width = step.settings.get("filters") or step.settings.get("units") or before[0][-1]
            shape = (*before[0][:-1], width)
        shapes.append(shape)
    return shapes


def _trunk(model: nn.Module) -> tuple[list[Step], str, bool]:
    """The trunk's steps, what Keras calls the network, and whether it has this very trunk."""
    if isinstance(model, Xception):
        config = model.config
        if config.numerics != "tf":
            raise WeightsError("Keras pads and normalises as TensorFlow does: it cannot express numerics 'torch'")
        for what, used in (
            ("segments", config.segments is not None),
            ("a tied middle flow", config.tied_middle and config.middle_modules > 1),
            ("dilated pools (output_stride)", any(stage.dense for stage in config.stages()[0])),
        ):
            if used:
                raise WeightsError(f"Keras has no layer for this network's {what}")
        steps = xception_steps(config)
        return steps, "xception", steps == xception_steps(type(config)())
    if isinstance(model, InceptionV3):
        if model.config.numerics != "tf":
            raise WeightsError("Keras's average pools leave out the padding: it cannot express numerics 'torch'")
        if model.config.auxiliary:
            raise WeightsError("a Keras model of one output has no place for the auxiliary tower")
        inception = inception_steps(model.config)
        return inception, "inception_v3", inception == inception_steps(type(model.config)())
    raise WeightsError(f"only Xception and Inception v3 can be written for Keras, not {type(model).__name__}")


def _moved(step: Step) -> Step:
    """The step behind an input layer."""
    return Step(step.kind, step.settings, tuple(i + 1 for i in step.inputs), step.ours, step.name)


def _head(head: Classifier, features: int, output: str) -> list[Step]:
    pool = {"avg": "GlobalAveragePooling2D", "max": "GlobalMaxPooling2D"}[head.pooling]
    steps = [Step(pool, {}, (features,), "", f"{head.pooling}_pool")]

    def add(kind: str, settings: Mapping[str, Any], ours: str, name: str) -> None:
        steps.append(Step(kind, settings, (features + len(steps),), ours, name))

    for i, layer in enumerate(head.fully_connected):
        activation = _KERAS_NAMES[head.hidden_activations[i]]
        settings: dict[str, Any] = {"units": layer.out_features, "activation": activation, "use_bias": True}
        add("Dense", settings, f"classifier.fully_connected.{i}", f"fc{i + 1}")
    if head.dropout.p > 0:
        add("Dropout", {"rate": head.dropout.p}, "", "top_dropout")
    settings = {"units": head.linear.out_features, "activation": output, "use_bias": True}
    add("Dense", settings, "classifier.linear", "predictions")
    return steps


def _names(steps: list[Step]) -> list[str]:
    """Each step's name; those without one are numbered by class, as Keras does, in the order of their making."""
    numbered = iter(_numbered(snake_case(step.kind) for step in steps if not step.name))
    return [step.name or next(numbered) for step in steps]


def _numbered(stems: Any) -> list[str]:
    counts: dict[str, int] = {}
    names = []
    for stem in stems:
        number = counts[stem] = counts.get(stem, -1) + 1
        names.append(f"{stem}_{number}" if number else stem)
    return names


def _layer(layer: DescribedLayer, shapes: Mapping[str, Any], *, legacy: bool) -> dict[str, Any]:
    step = layer.step
    settings = {key: list(value) if isinstance(value, tuple) else value for key, value in step.settings.items()}
    config: dict[str, Any] = {"name": layer.name, "dtype": "float32", **settings}
    if step.kind != "InputLayer":
        config["trainable"] = True
    if step.kind == "Concatenate":
        config["axis"] = -1
    described: dict[str, Any] = {"class_name": step.kind, "config": config, "name": layer.name}
    if legacy:
        described["inbound_nodes"] = [[[name, 0, 0, {}] for name in layer.inputs]] if layer.inputs else []
        return described
    tensors: list[Any] = [
        {
            "class_name": "__keras_tensor__",
            "config": {"shape": shapes[name], "dtype": "float32", "keras_history": [name, 0, 0]},
        }
        for name in layer.inputs
    ]
    arguments = [tensors] if step.kind in ("Add", "Concatenate") else tensors
    node: dict[str, Any] = {"args": arguments, "kwargs": {}}
    described |= {"module": "keras.layers", "registered_name": None, "inbound_nodes": [node] if tensors else []}
    return described
