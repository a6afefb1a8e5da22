"""Our networks as Keras spells them: the graph of a trunk, and which of its tensors is which of ours.

One `Step` is one Keras layer. The same steps serve to read (a file's graph is held against them), and to write (they
become its description). They stand in the order in which keras.applications makes its layers, under the names that it
gives them; a layer that it leaves unnamed (the four shortcuts of Xception, every layer of Inception v3) has none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from xception.models.inception_layers import Conv, Layer, Pool
from xception.models.inception_v3 import InceptionV3Config
from xception.models.inception_v3 import stages as inception_stages
from xception.models.layers import NORM_EPS
from xception.models.xception import XceptionConfig
from xception.weights.foreign import Layout, Pair

NORM_EPSILON = NORM_EPS["tf"]

# Of each class of layers: its variables in Keras's order, our name of each, and its layout there. A variable that has
# had two names has both. `center`, `scale` and `use_bias` of a layer's settings say whether the optional ones exist.
_Variable = tuple[tuple[str, ...], str, Layout]
_VARIABLES: dict[str, tuple[_Variable, ...]] = {
    "Conv2D": ((("kernel",), "weight", "hwio"), (("bias",), "bias", "same")),
    "DepthwiseConv2D": ((("kernel", "depthwise_kernel"), "weight", "hwcm"), (("bias",), "bias", "same")),
    "SeparableConv2D": (
        (("depthwise_kernel",), "depthwise.weight", "hwcm"),
        (("pointwise_kernel",), "pointwise.weight", "hwio"),
        (("bias",), "pointwise.bias", "same"),
    ),
    "BatchNormalization": (
        (("gamma",), "weight", "same"),
        (("beta",), "bias", "same"),
        (("moving_mean",), "running_mean", "same"),
        (("moving_variance",), "running_var", "same"),
    ),
    "Dense": ((("kernel",), "weight", "dense"), (("bias",), "bias", "same")),
}
_OPTIONAL = {"gamma": "scale", "beta": "center", "bias": "use_bias"}


@dataclass(frozen=True)
class Step:
    """A layer of a trunk: its class, what decides what it computes, and the steps whose results it takes.

    -1 among `inputs` is the trunk's own input. `ours` is what our names of its tensors begin with, "" without any;
    `name` what keras.applications calls it, "" where it leaves that to Keras.
    """

    kind: str
    settings: Mapping[str, Any]
    inputs: tuple[int, ...]
    ours: str = ""
    name: str = ""

    def variables(self) -> tuple[_Variable, ...]:
        """The variables that the layer has, in Keras's order: its names, ours, and its layout in Keras."""
        return variables(self.kind, self.settings)


def variables(kind: str, settings: Mapping[str, Any]) -> tuple[_Variable, ...]:
    """The variables of a layer of this class with these settings; see `Step.variables`."""
    return tuple(v for v in _VARIABLES.get(kind, ()) if settings.get(_OPTIONAL.get(v[0][0], ""), True))


def pairs(step: Step, tensors: Sequence[str]) -> Iterator[Pair]:
    """Our tensors of a step, whose variables a file has under the names `tensors`."""
    for (_, ours, layout), theirs in zip(step.variables(), tensors, strict=True):
        yield Pair(f"{step.ours}.{ours}", theirs, layout)


@dataclass
class _Trunk:
    """Steps as they are added; each method returns the number of the step whose result it stands for."""

    steps: list[Step] = field(default_factory=list)

    def add(self, kind: str, settings: Mapping[str, Any], *inputs: int, ours: str = "", name: str = "") -> int:
        self.steps.append(Step(kind, settings, inputs, ours, name))
        return len(self.steps) - 1

    def conv(
        self,
        x: int,
        filters: int,
        kernel: tuple[int, int],
        *,
        stride: int = 1,
        padding: str = "same",
        bias: bool = False,
        ours: str,
        name: str = "",
    ) -> int:
        settings = {
            "filters": filters, "kernel_size": kernel, "strides": (stride, stride), "padding": padding, "use_bias": bias
        }  # fmt: skip
        return self.add("Conv2D", settings, x, ours=ours, name=name)

    def norm(self, x: int, *, scale: bool = True, ours: str, name: str = "") -> int:
        settings = {"epsilon": NORM_EPSILON, "center": True, "scale": scale}
        return self.add("BatchNormalization", settings, x, ours=ours, name=name)

    def activation(self, x: int, kind: str = "relu", *, name: str = "") -> int:
        return self.add("Activation", {"activation": kind}, x, name=name)

    def pool(self, x: int, kind: str, stride: int, padding: str, *, name: str = "") -> int:
        settings = {"pool_size": (3, 3), "strides": (stride, stride), "padding": padding}
        return self.add(kind, settings, x, name=name)


# ----------------------------------------------------------------------------------------------------- Xception


def xception_steps(config: XceptionConfig) -> list[Step]:
    """The trunk of an Xception with `numerics` "tf", without segments, tied modules and dilation."""
    trunk = _Trunk()
    padding = "valid" if config.stem == "valid" else "same"
    x = -1
    for i, width in enumerate(config.stem_widths, 1):
        ours, name = f"entry_flow.stem.conv{i}", f"block1_conv{i}"
        stride = config.reduction if i == 1 else 1
        x = trunk.conv(x, width, (3, 3), stride=stride, padding=padding, ours=f"{ours}.conv", name=name)
        x = trunk.norm(x, ours=f"{ours}.norm", name=f"{name}_bn")
        x = trunk.activation(x, name=f"{name}_act")
    block = 1
    for i, width in enumerate(config.entry_widths, 1):
        block += 1
        x = _module(trunk, config, x, (width, width), f"entry_flow.block{i}", block, pool=True, leading=i > 1)
    for i in range(config.middle_modules):
        block += 1
        widths = (config.entry_widths[-1],) * config.middle_units
        x = _module(trunk, config, x, widths, f"middle_flow.{i}", block, pool=False)
    block += 1
    widths = (config.entry_widths[-1], config.exit_widths[0])
    x = _module(trunk, config, x, widths, "exit_flow.block", block, pool=True)
    block += 1
    for i, width in enumerate(config.exit_widths[1:]):
        name = f"block{block}_sepconv{i + 1}"
        x = _unit(trunk, config, x, width, f"exit_flow.separable.{i}", name)
        x = trunk.activation(x, name=f"{name}_act")
    if len(config.exit_widths) == 1:
        trunk.activation(x, name=f"block{block}_act")
    return trunk.steps


def _module(
    trunk: _Trunk,
    config: XceptionConfig,
    x: int,
    widths: Sequence[int],
    ours: str,
    block: int,
    *,
    pool: bool,
    leading: bool = True,
) -> int:
    """A residual module: the shortcut first, as Keras does."""
    shortcut = x
    if pool and config.residual:
        shortcut = trunk.conv(x, widths[-1], (1, 1), stride=2, ours=f"{ours}.shortcut.conv")
        shortcut = trunk.norm(shortcut, ours=f"{ours}.shortcut.norm")
    for i, width in enumerate(widths):
        name = f"block{block}_sepconv{i + 1}"
        if leading or i:
            x = trunk.activation(x, name=f"{name}_act")
        x = _unit(trunk, config, x, width, f"{ours}.units.{i}", name)
    if pool:
        x = trunk.pool(x, "MaxPooling2D", 2, "same", name=f"block{block}_pool")
    return trunk.add("Add", {}, x, shortcut) if config.residual else x


def _unit(trunk: _Trunk, config: XceptionConfig, x: int, width: int, ours: str, name: str) -> int:
    """A separable convolution and its normalisation; in two layers where Keras has no single one for it."""
    between, order = config.intermediate_activation, config.order or "depthwise_pointwise"
    depthwise = {"kernel_size": (3, 3), "strides": (1, 1), "padding": "same", "use_bias": False}
    if between == "none" and order == "depthwise_pointwise":
        x = trunk.add("SeparableConv2D", {"filters": width, **depthwise}, x, ours=f"{ours}.conv", name=name)
    else:
        for i, part in enumerate(order.split("_")):
            if i and between != "none":
                x = trunk.activation(x, between, name=f"{name}_inner")
            if part == "depthwise":
                part_ours = f"{ours}.conv.depthwise"
                x = trunk.add("DepthwiseConv2D", depthwise, x, ours=part_ours, name=f"{name}_depthwise")
            else:
                x = trunk.conv(x, width, (1, 1), ours=f"{ours}.conv.pointwise", name=f"{name}_pointwise")
    return trunk.norm(x, ours=f"{ours}.norm", name=f"{name}_bn")


# -------------------------------------------------------------------------------------------------- Inception v3


def inception_steps(config: InceptionV3Config) -> list[Step]:
    """The trunk of an Inception v3 with `numerics` "tf"; an auxiliary tower has no place in it."""
    trunk = _Trunk()
    x, mixed = -1, 0
    for stage, layer in inception_stages(config).items():
        name = ""
        if isinstance(layer, Mapping):
            name, mixed = f"mixed{mixed}", mixed + 1
        x = _layer(trunk, config, x, layer, f"features.{stage}", name)
    return trunk.steps


def _layer(trunk: _Trunk, config: InceptionV3Config, x: int, layer: Layer, ours: str, name: str) -> int:
    if isinstance(layer, Conv):
        kernel = (layer.kernel, layer.kernel) if isinstance(layer.kernel, int) else layer.kernel
        x = trunk.conv(
            x, layer.width, kernel, stride=layer.stride, padding=layer.padding, bias=config.conv_bias,
            ours=f"{ours}.conv",
        )  # fmt: skip
        if config.activation_first:
            return trunk.norm(trunk.activation(x), scale=config.norm_scale, ours=f"{ours}.norm")
        return trunk.activation(trunk.norm(x, scale=config.norm_scale, ours=f"{ours}.norm"))
    if isinstance(layer, Pool):
        kind = "MaxPooling2D" if layer.kind == "max" else "AveragePooling2D"
        return trunk.pool(x, kind, layer.stride, layer.padding)
    assert isinstance(layer, Mapping), layer  # Inception v3 has nothing else
    ends = []
    for branch, layers in layer.items():
        y = x
        for i, inner in enumerate(layers):
            y = _layer(trunk, config, y, inner, f"{ours}.{branch}.{i}", "")
        ends.append(y)
    return trunk.add("Concatenate", {}, *ends, name=name)


# -------------------------------------------------------------------------------------------------- Keras's order


def keras_order(inputs: Sequence[Sequence[int]]) -> list[int]:
    """The order in which Keras lists a graph's layers, whose last node is its output: by depth, then by discovery.

    `inputs` are the nodes whose results each node takes (-1 is ignored). The depth is the longest way to the output,
    and the discovery a walk from the output that goes to a node's inputs in their order.
    """
    last = len(inputs) - 1
    found: dict[int, int] = {}
    stack = [last]
    while stack:
        node = stack.pop()
        if node >= 0 and node not in found:
            found[node] = len(found)
            stack += reversed(inputs[node])
    depth = dict.fromkeys(found, 0)
    for node in range(last, -1, -1):  # inputs have lower numbers
        for source in inputs[node] if node in depth else ():
            if source >= 0:
                depth[source] = max(depth[source], depth[node] + 1)
    return sorted(found, key=lambda node: (-depth[node], found[node]))
