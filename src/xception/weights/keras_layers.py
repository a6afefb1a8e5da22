"""What each Keras layer computes at inference, in one spelling, and what it is called where that is not known.

Keras has several spellings for one thing: a ReLU is a layer, an `Activation`, or an argument of the convolution before
it. `plain_graph` settles on one, and leaves out what does nothing at inference (dropout, augmentation).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from xception.weights.keras_graph import Graph, Layer, Node
from xception.weights.keras_settings import Unusable, activation, count, flag, need, number, numbers, pair

LEAKY_SLOPE = 0.2  # of Keras's activation "leaky_relu", and of ours

_IDLE = {
    "Dropout", "SpatialDropout1D", "SpatialDropout2D", "GaussianDropout", "GaussianNoise", "AlphaDropout",
    "ActivityRegularization", "Identity", "RandomFlip", "RandomRotation", "RandomZoom", "RandomTranslation",
    "RandomContrast", "RandomBrightness", "RandomHeight", "RandomWidth", "RandomShear", "RandomErasing",
    "RandomColorJitter", "RandomColorDegeneration", "RandomSaturation", "RandomHue", "RandomGrayscale",
    "RandomPosterization", "RandomSharpness", "RandomInvert", "RandomPerspective", "RandomElasticTransform",
    "RandomGaussianBlur", "RandAugment", "AugMix", "CutMix", "MixUp",
}  # fmt: skip
_CHANGED_BY_TRAINING = {
    "BatchNormalization", "Dropout", "SpatialDropout1D", "SpatialDropout2D", "GaussianDropout", "GaussianNoise",
    "AlphaDropout",
}  # fmt: skip
_WHY_NOT = {
    "Lambda": "a Lambda is code, and is not run",
    "PReLU": "its slope is trained",
}


@dataclass(frozen=True)
class Plain:
    """One operation: its kind, what decides what it computes, and the numbers of the operations it takes.

    `problem` says why the operation cannot be used, "" where it can.
    """

    kind: str
    settings: Mapping[str, Any]
    inputs: tuple[int, ...]
    layer: Layer
    problem: str = ""


@dataclass(frozen=True)
class PlainGraph:
    """Operations, each after those it takes. `dropouts` are rates, by the operation whose result they thin out.

    `idle` are the layers that do nothing at inference, whatever they keep.
    """

    nodes: tuple[Plain, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    consumers: tuple[tuple[int, ...], ...]
    dropouts: Mapping[int, float]
    idle: tuple[Layer, ...]


def plain_graph(graph: Graph) -> PlainGraph:
    """The graph in one spelling; a layer that is not understood is in it, with its problem, and raises nothing."""
    nodes: list[Plain] = []
    place: dict[int, int] = {}
    dropouts: dict[int, float] = {}
    idle: list[Layer] = []
    for call, node in enumerate(graph.nodes):
        inputs = tuple(place[source] for source in node.inputs)
        layer = node.layer
        if _is_idle(node) and len(inputs) == 1:
            place[call] = inputs[0]
            idle.append(layer)
            rate = layer.config.get("rate")
            if layer.kind == "Dropout" and isinstance(rate, int | float) and 0 <= rate < 1:
                dropouts[inputs[0]] = float(rate)
            continue
        problem, kind, behind = "", layer.kind, "none"
        settings: dict[str, Any] = {}
        try:
            if layer.foreign:
                raise Unusable("its class is not one of Keras's own, and code is not run")
            if _is_training(node):
                raise Unusable("it is called with training=True: its results depend on the batch, or on chance")
            kind, settings, behind = _READERS.get(layer.kind, _unknown)(layer, node)
        except Unusable as reason:
            problem = str(reason)
        nodes.append(Plain(kind, settings, inputs, layer, problem))
        if behind != "none":
            nodes.append(Plain("Activation", {"activation": behind}, (len(nodes) - 1,), layer))
        place[call] = len(nodes) - 1
    consumers: list[list[int]] = [[] for _ in nodes]
    for i, plain in enumerate(nodes):
        for source in dict.fromkeys(plain.inputs):
            consumers[source].append(i)
    return PlainGraph(
        nodes=tuple(nodes),
        inputs=tuple(place[i] for i in graph.inputs),
        outputs=tuple(place[i] for i in graph.outputs),
        consumers=tuple(map(tuple, consumers)),
        dropouts=dropouts,
        idle=tuple(idle),
    )


def _is_training(node: Node) -> bool:
    """Whether a layer was called to behave as in training, always.

    Keras 3 notes ``training=True`` at every layer for images, and means nothing by it.
    """
    return node.constants.get("training") is True and node.layer.kind in _CHANGED_BY_TRAINING


def _is_idle(node: Node) -> bool:
    if node.layer.foreign or _is_training(node):
        return False
    if node.layer.kind == "Activation":
        return node.layer.config.get("activation") in (None, "linear")
    return node.layer.kind in _IDLE


# ------------------------------------------------------------------------------------------------- what a layer is

_Read = tuple[str, dict[str, Any], str]  # kind, settings, and the activation behind it


def _unknown(layer: Layer, node: Node) -> _Read:
    raise Unusable(_WHY_NOT.get(layer.kind, "there is no counterpart for it"))


def _convolution(layer: Layer, node: Node) -> _Read:
    config = layer.config
    need(config, data_format="channels_last", dilation_rate=(1, 1), groups=1, depth_multiplier=1)
    kernel = pair(config, "kernel_size", (1, 1))
    settings: dict[str, Any] = {
        "kernel_size": kernel,
        "strides": pair(config, "strides", (1, 1)),
        "padding": padding_of(kernel, config.get("padding", "valid")),
        "use_bias": flag(config, "use_bias", True),
    }
    if layer.kind != "DepthwiseConv2D":
        settings["filters"] = count(config, "filters")
    return layer.kind, settings, activation(config)


def padding_of(kernel: tuple[int, int], padding: Any) -> Any:
    """The padding in one spelling: a 1x1 convolution has none, whatever it says."""
    return "valid" if kernel == (1, 1) and padding == "same" else padding


def _normalisation(layer: Layer, node: Node) -> _Read:
    axis = layer.config.get("axis", -1)
    if isinstance(axis, list) and len(axis) == 1:
        axis = axis[0]
    if layer.config.get("renorm") is True or type(axis) is not int:
        raise Unusable("it is a normalisation of a kind that is not known")
    settings = {
        "epsilon": number(layer.config, "epsilon", 1e-3),
        "center": flag(layer.config, "center", True),
        "scale": flag(layer.config, "scale", True),
        "axis": axis,
    }
    return "BatchNormalization", settings, "none"


def _pool(layer: Layer, node: Node) -> _Read:
    need(layer.config, data_format="channels_last")
    size = pair(layer.config, "pool_size", (2, 2))
    strides = pair(layer.config, "strides", size)
    return layer.kind, {"pool_size": size, "strides": strides, "padding": layer.config.get("padding", "valid")}, "none"


def _global_pool(layer: Layer, node: Node) -> _Read:
    need(layer.config, data_format="channels_last")
    return layer.kind, {"keepdims": flag(layer.config, "keepdims", False)}, "none"


def _dense(layer: Layer, node: Node) -> _Read:
    settings = {"units": count(layer.config, "units"), "use_bias": flag(layer.config, "use_bias", True)}
    return "Dense", settings, activation(layer.config)


def _activation_layer(layer: Layer, node: Node) -> _Read:
    return "Activation", {"activation": activation(layer.config)}, "none"


def _relu(layer: Layer, node: Node) -> _Read:
    config = layer.config
    slope = number(config, "negative_slope", config.get("alpha") or 0.0)
    if config.get("max_value") is not None or number(config, "threshold", 0.0) != 0:
        raise Unusable("only a ReLU without maximum and threshold has a counterpart")
    return "Activation", {"activation": "relu" if slope == 0 else _leaky(slope)}, "none"


def _leaky_relu(layer: Layer, node: Node) -> _Read:
    slope = number(layer.config, "negative_slope", layer.config.get("alpha", 0.3))
    return "Activation", {"activation": _leaky(slope)}, "none"


def _leaky(slope: float) -> str:
    if abs(slope - LEAKY_SLOPE) > 1e-7:
        raise Unusable(f"its slope is {slope:g}, and only {LEAKY_SLOPE} has a counterpart")
    return "leaky_relu"


def _elu(layer: Layer, node: Node) -> _Read:
    if number(layer.config, "alpha", 1.0) != 1:
        raise Unusable("only an ELU with alpha 1 has a counterpart")
    return "Activation", {"activation": "elu"}, "none"


def _softmax(layer: Layer, node: Node) -> _Read:
    if layer.config.get("axis", -1) not in (-1, 1):
        raise Unusable("it is not over the classes")
    return "Activation", {"activation": "softmax"}, "none"


def _merge(layer: Layer, node: Node) -> _Read:
    if layer.kind == "Concatenate":
        axis = layer.config.get("axis", -1)
        if axis not in (-1, 3):
            raise Unusable(f"it concatenates along axis {axis!r}")
        return "Concatenate", {}, "none"
    if len(node.inputs) == 1:  # the operator, of a number
        return _arithmetic(layer, node)
    return "Add", {}, "none"


def _flatten(layer: Layer, node: Node) -> _Read:
    return "Flatten", {}, "none"  # of a vector it does nothing


def _arithmetic(layer: Layer, node: Node) -> _Read:
    """An operator with a number: a * x + b, or what divides the number by x, which has no counterpart."""
    kind = layer.kind
    constants = {k: v for k, v in node.constants.items() if v is not None and k not in ("name", "training", "mask")}
    if kind == "TFOpLambda":
        function = str(layer.config.get("function", ""))
        kind = {
            "math.truediv": "TrueDivide", "math.divide": "TrueDivide", "math.multiply": "Multiply",
            "math.subtract": "Subtract", "math.add": "Add", "__operators__.add": "Add", "nn.bias_add": "Add",
        }.get(function, function or "TFOpLambda")  # fmt: skip
        constants.pop("data_format", None)
        if function == "cast":
            return "Affine", {"scale": 1.0, "offset": 0.0}, "none"
    names, values = list(constants), list(constants.values())
    if len(values) != 1 or len(node.inputs) != 1:
        raise Unusable("it is no operation of one input and one number")
    value = numbers(values[0])
    first = names[0] in ("0", "x", "x1")  # the number stands before the operator
    if kind in ("TrueDivide", "Divide") and not first and all(value):
        return "Affine", {"scale": [1 / v for v in value], "offset": 0.0}, "none"
    if kind == "Multiply":
        return "Affine", {"scale": value, "offset": 0.0}, "none"
    if kind == "Subtract" and not first:
        return "Affine", {"scale": 1.0, "offset": [-v for v in value]}, "none"
    if kind == "Add":
        return "Affine", {"scale": 1.0, "offset": value}, "none"
    raise Unusable("there is no counterpart for it")


def _rescaling(layer: Layer, node: Node) -> _Read:
    settings = {"scale": numbers(layer.config.get("scale")), "offset": numbers(layer.config.get("offset", 0.0))}
    return "Affine", settings, "none"


def _normalization(layer: Layer, node: Node) -> _Read:
    config = layer.config
    mean, variance = config.get("mean"), config.get("variance")
    settings: dict[str, Any] = {"invert": flag(config, "invert", False)}
    if mean is not None and variance is not None:
        settings |= {"mean": numbers(mean), "variance": numbers(variance)}
    axis = config.get("axis", -1)
    if (axis[0] if isinstance(axis, list) and len(axis) == 1 else axis) not in (-1, 3):
        raise Unusable(f"it normalises along axis {axis!r}")
    return "Normalization", settings, "none"


def _resizing(layer: Layer, node: Node) -> _Read:
    config = layer.config
    need(config, data_format="channels_last", pad_to_aspect_ratio=False)
    if config.get("interpolation", "bilinear") not in ("bilinear", "bicubic", "nearest"):
        raise Unusable(f"its interpolation {config.get('interpolation')!r} has no counterpart")
    settings = {
        "size": (count(config, "height"), count(config, "width")),
        "crop": flag(config, "crop_to_aspect_ratio", False),
        "interpolation": config.get("interpolation", "bilinear"),
    }
    return "Resizing", settings, "none"


def _input(layer: Layer, node: Node) -> _Read:
    shape = layer.config.get("batch_shape") or layer.config.get("batch_input_shape")
    return "InputLayer", {"shape": shape}, "none"


_READERS: dict[str, Callable[[Layer, Node], _Read]] = {
    "Conv2D": _convolution, "SeparableConv2D": _convolution, "DepthwiseConv2D": _convolution,
    "BatchNormalization": _normalisation, "MaxPooling2D": _pool, "AveragePooling2D": _pool,
    "GlobalAveragePooling2D": _global_pool, "GlobalMaxPooling2D": _global_pool, "Dense": _dense,
    "Activation": _activation_layer, "ReLU": _relu, "LeakyReLU": _leaky_relu, "ELU": _elu, "Softmax": _softmax,
    "Add": _merge, "Concatenate": _merge, "Flatten": _flatten, "Reshape": _unknown, "Rescaling": _rescaling,
    "Normalization": _normalization, "Resizing": _resizing, "InputLayer": _input, "TFOpLambda": _arithmetic,
    "TrueDivide": _arithmetic, "Divide": _arithmetic, "Multiply": _arithmetic, "Subtract": _arithmetic,
}  # fmt: skip
