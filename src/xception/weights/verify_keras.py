"""What Keras itself computes with a Keras file. Keras builds and runs what the file describes: it must be trusted."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from xception.data.preprocess import Preprocess
from xception.errors import ConfigError, WeightsError
from xception.weights.files import shown
from xception.weights.foreign import ForeignFile
from xception.weights.keras_bare import read_bare
from xception.weights.keras_file import KerasContents, read_keras_file
from xception.weights.keras_graph import Layer, read_graph
from xception.weights.keras_layers import PlainGraph, plain_graph
from xception.weights.keras_match import find_trunk
from xception.weights.verify_torch import TheirNumbers, pictures

_NAMES = {"keras": "m.keras", "keras-weights": "m.weights.h5"}  # by which Keras knows what a file is; else m.h5


def run_keras(path: str, preprocess: Preprocess, *, trunk_only: bool) -> TheirNumbers:
    """The model of the file, or weights alone in the network of keras.applications, at the size of `preprocess`.

    The outputs are logits: a softmax or sigmoid at the end is left out; with `trunk_only` they are pooled features.
    Raises `ConfigError` where Keras cannot run the file, or would have to run code that is in it.
    """
    keras = _keras()
    file = read_keras_file(path)
    contents: KerasContents = file.facts["keras"]
    with _under_the_name(path, _NAMES.get(contents.kind, "m.h5")) as place:
        try:
            if contents.description is None:
                inputs, outputs = _run_bare(keras, place, file, preprocess, trunk_only=trunk_only)
            else:
                graph = plain_graph(read_graph(contents.description))
                _refuse_code(graph)
                model = keras.models.load_model(place, compile=False, safe_mode=True)
                inputs, outputs = _run_whole(keras, model, graph, preprocess, trunk_only=trunk_only)
        except (ConfigError, WeightsError, ImportError):
            raise
        except Exception as error:  # Keras raises anything
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = (lines or [type(error).__name__])[0][:300]
            raise ConfigError(f"keras {keras.__version__} cannot run {shown(path)}: {reason}") from error
    return TheirNumbers(framework=f"keras {keras.__version__}", inputs=inputs, outputs=outputs)


def _keras() -> Any:
    if importlib.util.find_spec("tensorflow") is None:
        os.environ.setdefault("KERAS_BACKEND", "torch")
    keras: Any = importlib.import_module("keras")
    if not hasattr(keras, "ops"):
        raise ConfigError(f"--verify needs Keras 3, found {keras.__version__} (pip install -U keras)")
    return keras


@contextlib.contextmanager
def _under_the_name(path: str, name: str) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        place = os.path.join(folder, name)
        try:
            os.symlink(os.path.abspath(path), place)
        except OSError:  # not every system lets everybody make links
            shutil.copyfile(path, place)
        yield place


def _refuse_code(graph: PlainGraph) -> None:
    """A Lambda, or a class that is not Keras's own, may stand behind a trunk that is taken alone; it is not run."""
    for node in graph.nodes:
        if node.layer.foreign or node.layer.kind == "Lambda":
            raise ConfigError(f"--verify would have to run {node.layer}, which is code")


def _run_whole(
    keras: Any, model: Any, graph: PlainGraph, preprocess: Preprocess, *, trunk_only: bool
) -> tuple[Tensor, Tensor]:
    trunk = find_trunk(graph)
    assert not isinstance(trunk, str)  # else there would be no target
    for layer in model._flatten_layers():
        if getattr(layer, "compute_dtype", "float32") != "float32":  # mixed precision is for training
            layer.dtype_policy = "float32"
    size = tuple(model.input_shape[1:3])
    raw = pictures(size if all(size) else preprocess.size, preprocess.channels)
    normalised = preprocess.normalize(raw)
    has_front = graph.nodes[trunk.entry].kind != "InputLayer"  # which then normalises by itself
    last = graph.nodes[graph.outputs[0]]
    while last.kind == "Flatten":  # of a vector it does nothing
        last = graph.nodes[last.inputs[0]]
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(_watched(_find(model, graph.nodes[trunk.nodes[0]].layer)))
        layer = _find(model, (graph.nodes[trunk.end] if trunk_only else last).layer)
        calls = stack.enter_context(_watched(layer))
        what = "output"
        if not trunk_only and last.kind == "Activation":  # of the classifier: logits are what it takes
            if last.layer.kind == "Dense":
                layer.activation = keras.activations.linear
            elif last.settings["activation"] in ("softmax", "sigmoid"):
                what = "input"
        _call(keras, model, raw if has_front else normalised)
    outputs = _tensor(keras, calls[-1][what])
    # Keras resizes in other ways than we do; what stands before a trunk that is taken alone may have no counterpart.
    if trunk_only or any(node.kind == "Resizing" for node in graph.nodes):
        normalised = _tensor(keras, first[-1]["input"]).permute(0, 3, 1, 2).contiguous()
    return normalised, outputs.mean((1, 2)) if trunk_only else outputs


def _find(model: Any, layer: Layer) -> Any:
    """Keras's layer that this one of the description is."""
    top = model.get_layer(layer.group)
    if layer.group == layer.name:
        return top
    return next(found for found in top._flatten_layers(include_self=False) if found.name == layer.name)


@contextlib.contextmanager
def _watched(layer: Any) -> Iterator[list[dict[str, Any]]]:
    """What the layer takes and gives, call by call, with whatever backend Keras has."""
    calls: list[dict[str, Any]] = []
    original: Callable[..., Any] = layer.call

    def call(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        calls.append({"input": args[0], "output": result})
        return result

    layer.call = call
    try:
        yield calls
    finally:
        del layer.call


def _run_bare(
    keras: Any, place: str, file: ForeignFile, preprocess: Preprocess, *, trunk_only: bool
) -> tuple[Tensor, Tensor]:
    """Weights alone: in the network of keras.applications, as it is or as one layer, under a dense layer or none."""
    contents: KerasContents = file.facts["keras"]
    bare = read_bare(contents, file.tensors)
    assert bare is not None  # else there would be no target
    if bare.others:
        raise ConfigError(
            f"--verify cannot know the layers around the trunk: {shown(file.path)} does not describe them"
        )
    make = {"xception": keras.applications.Xception, "inception_v3": keras.applications.InceptionV3}[bare.model]
    shape = (None, None, preprocess.channels)
    trunk = make(weights=None, include_top=False, input_tensor=keras.Input(shape))
    if contents.kind == "keras-weights":
        is_flat = "layers/conv2d/vars/0" in file.tensors
    else:
        is_flat = sum(bool(weights) for weights in contents.groups.values()) > 2
    inputs = trunk.input if is_flat else keras.Input(shape)
    pooled = keras.layers.GlobalAveragePooling2D()(trunk.output if is_flat else trunk(inputs))
    logits = pooled if bare.dense is None else keras.layers.Dense(file.tensors[bare.dense[0]].shape[1])(pooled)
    keras.Model(inputs, logits).load_weights(place)
    model = keras.Model(inputs, pooled if trunk_only else logits)
    x = preprocess.normalize(pictures(preprocess.size, preprocess.channels))
    return x, _tensor(keras, _call(keras, model, x))


def _call(keras: Any, model: Any, x: Tensor) -> Any:
    """What a model makes of N C H W images; Keras takes N H W C."""
    with torch.no_grad():
        return model(keras.ops.convert_to_tensor(x.permute(0, 2, 3, 1).contiguous().numpy()), training=False)


def _tensor(keras: Any, value: Any) -> Tensor:
    return torch.from_numpy(keras.ops.convert_to_numpy(value).copy()).float()
