"""The classifier at the end of a foreign network: which of its layers are linear, and what stands between them.

A state dict says nothing of layers without numbers, so one linear layer is all that can be taken from it; what may
stand before it (dropout, a ReLU over pooled features, which are never negative) changes nothing. Of a whole pickled
module the classes of all layers are known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from xception.errors import WeightsError
from xception.weights.foreign import ForeignTensor

# Classes of torch.nn that are the same as ours, with the settings that make them so.
_ACTIVATIONS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "Identity": ("none", {}),
    "ReLU": ("relu", {}),
    "ELU": ("elu", {"alpha": 1.0}),
    "GELU": ("gelu", {"approximate": "none"}),
    "SiLU": ("silu", {}),
    "Tanh": ("tanh", {}),
    "Sigmoid": ("sigmoid", {}),
    "Softplus": ("softplus", {"beta": 1.0, "threshold": 20.0}),
    "LeakyReLU": ("leaky_relu", {"negative_slope": 0.2}),
    "SELU": ("selu", {}),
}
_PASSIVE = ("Flatten", "Sequential", "Identity")
_PROBABILITIES = ("Softmax", "LogSoftmax")  # what we compute of the logits ourselves
_LIBRARIES = ("torch.nn.modules.", "timm.layers.")


@dataclass(frozen=True, kw_only=True)
class ForeignHead:
    """`place` is the module that they call their classifier; `linear` its linear layers, the last one's output logits.

    `options` are those of our config that it sets, but for the number of classes.
    """

    place: str
    linear: tuple[str, ...]
    classes: int
    options: Mapping[str, Any]
    multi_label: bool = False

    def names(self) -> dict[str, str]:
        """Our module -> theirs."""
        *hidden, last = self.linear
        ours = {f"classifier.fully_connected.{i}": theirs for i, theirs in enumerate(hidden)}
        return {**ours, "classifier.linear": last}


def read_head(
    place: str, tensors: Mapping[str, ForeignTensor], modules: Mapping[str, Mapping[str, Any]]
) -> ForeignHead:
    """The classifier at `place`. Raises `WeightsError` naming the layer that ours cannot have."""
    inside = [name for name in tensors if name.startswith(f"{place}.")]
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in inside))
    if any({f"{layer}.weight", f"{layer}.bias"} - set(inside) for layer in layers) or len(inside) != 2 * len(layers):
        raise WeightsError(f"its classifier is not of linear layers with biases: {_some(inside)}; {HINT}")
    widths = [_width(tensors[f"{layer}.weight"], layer) for layer in layers]
    known = {path: known for path, known in modules.items() if path == place or path.startswith(f"{place}.")}
    if not known:
        inner = layers[0].removeprefix(place).removeprefix(".")
        if len(layers) > 1 or not (inner == "" or inner.isdigit()):
            raise WeightsError(
                f"its classifier has the layers {_some(layers)}, and a state dict does not say what stands between "
                f"them; {HINT}"
            )
        return ForeignHead(place=place, linear=(layers[0],), classes=widths[0], options={})
    return _of_modules(place, layers, widths, known)


def _of_modules(
    place: str, layers: list[str], widths: list[int], modules: Mapping[str, Mapping[str, Any]]
) -> ForeignHead:
    """The classifier of a whole module: an activation between every two linear layers, or none."""
    between: list[str] = []  # one for each linear layer: what follows it
    dropout = 0.0
    multi_label = False
    for path, attributes in modules.items():
        library, _, kind = str(attributes.get("class")).rpartition(".")
        if not f"{library}.".startswith(_LIBRARIES):
            raise _unknown(path, f"{library}.{kind}")
        last = len(between) == len(layers)
        if kind in ("Linear", "NonDynamicallyQuantizableLinear"):
            if path not in layers:
                raise _unknown(path, kind)
            between.append("none")
        elif kind == "Dropout":
            dropout = _rate(attributes.get("p"), dropout) if not last else dropout
        elif kind in _PASSIVE or (last and kind in _PROBABILITIES):
            pass
        elif last and kind == "Sigmoid" and between[-1] == "none":
            multi_label = True
        elif between and not last and between[-1] == "none" and _is_ours(kind, attributes):
            between[-1] = _ACTIVATIONS[kind][0]
        elif between or kind != "ReLU":  # pooled features are not negative: a ReLU before all else does nothing
            raise _unknown(path, kind)
    if len(between) != len(layers):
        raise WeightsError(f"its classifier {place!r:.90} has layers that are no linear ones; {HINT}")
    options: dict[str, Any] = {"dropout": dropout}
    if len(layers) > 1:
        options["fully_connected"] = tuple(widths[:-1])
        options["hidden_activations"] = tuple(between[:-1])
    return ForeignHead(place=place, linear=tuple(layers), classes=widths[-1], options=options, multi_label=multi_label)


HINT = "its trunk alone can be taken"


def _is_ours(kind: str, attributes: Mapping[str, Any]) -> bool:
    _, settings = _ACTIVATIONS.get(kind, ("", {"": None}))
    return kind in _ACTIVATIONS and all(attributes.get(name, value) == value for name, value in settings.items())


def _unknown(path: str, kind: str) -> WeightsError:
    return WeightsError(f"its classifier has the layer {path!r:.90} of class {kind!r:.90}, which ours has not; {HINT}")


def _rate(value: object, otherwise: float) -> float:
    return float(value) if isinstance(value, int | float) and 0 <= value < 1 else otherwise


def _width(tensor: ForeignTensor, layer: str) -> int:
    if len(tensor.shape) != 2 or not tensor.shape[0]:
        raise WeightsError(
            f"its classifier {layer!r:.90} has weights of shape {tensor.shape}, expected (classes, features)"
        )
    return tensor.shape[0]


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - 4} more" if len(ordered) > 4 else ""
    return ", ".join(f"{name!r:.90}" for name in ordered[:4]) + more
