"""Descriptions as other ages of Keras spell them, made from a genuine file: the same network is read from each."""

from __future__ import annotations

import copy
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import hostile_keras
import numpy as np
import pytest
import torch
from keras_models import L, imported, keras, narrow_trunk, randomised, save_bare_hdf5, save_quietly
from keras_networks import NARROW

from xception.errors import WeightsError
from xception.models.inception_v3 import InceptionV3Config
from xception.models.xception import XceptionConfig
from xception.weights.keras_file import read_keras_file
from xception.weights.keras_graph import snake_case
from xception.weights.keras_model import recognise_keras
from xception.weights.names_keras import Step, inception_steps, keras_order, xception_steps

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:keras")  # its own, of numpy

SIZE = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuned model with everything in it, as `m.keras` and `m.h5`, and a Sequential one as `s.h5`."""
    folder = tmp_path_factory.mktemp("spellings")
    trunk = narrow_trunk(folder)
    inputs = keras.Input((SIZE, SIZE, 3))
    x = L.GlobalAveragePooling2D()(trunk(L.Rescaling(1 / 127.5, offset=-1)(inputs)))
    x = L.Dropout(0.2)(L.Dense(6, activation="relu")(L.BatchNormalization()(x)))
    model = keras.Model(inputs, L.Dense(3, activation="softmax")(x))
    randomised(model)
    for ending in ("keras", "h5"):
        save_quietly(model, folder / f"m.{ending}")
    head = [L.GlobalAveragePooling2D(), L.Dense(6, activation="relu"), L.Dense(3, activation="softmax")]
    save_quietly(keras.Sequential([keras.Input((SIZE, SIZE, 3)), trunk, *head]), folder / "s.h5")
    return folder


def same_state(left: Path, right: Path) -> bool:
    one, other = imported(left)[0].state_dict(), imported(right)[0].state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def respelled(source: Path, target: Path, change: Callable[[dict[str, Any]], object], *, names: str = "{}") -> Path:
    """The HDF5 model with another description, and its weights under other names."""
    target.write_bytes(source.read_bytes())
    with h5py.File(target, "r+") as file:
        config = json.loads(file.attrs["model_config"])
        change(config)
        file.attrs["model_config"] = json.dumps(config).encode()
        for group in file["model_weights"].values():
            listed = [name.decode() if isinstance(name, bytes) else name for name in group.attrs["weight_names"]]
            for name in listed:
                if names.format(name) != name:
                    group.move(name, names.format(name))
            # Fixed-length texts, as numpy's arrays of bytes are stored.
            group.attrs["weight_names"] = np.array([names.format(name).encode() for name in listed], dtype="S")
    return target


def as_in_2020(model: dict[str, Any]) -> None:
    """As TensorFlow's Keras wrote it: calls as lists, a nested model's own definition counted as its first call."""
    model["class_name"] = {"Functional": "Functional"}.get(model["class_name"], model["class_name"])
    layers = model["config"]["layers"]
    nested = {layer["config"].get("name") for layer in layers if layer["class_name"] in ("Functional", "Sequential")}
    for layer in layers:
        if layer["class_name"] in ("Functional", "Sequential"):
            as_in_2020(layer)
        config = layer["config"]
        if "batch_shape" in config:
            config["batch_input_shape"] = config.pop("batch_shape")
        config["dtype"] = "float32"
        nodes = []
        for node in layer.get("inbound_nodes", []):
            tensors = node["args"][0] if isinstance(node["args"][0], list) else node["args"]
            found = [tensor["config"]["keras_history"] for tensor in tensors]
            nodes.append([[name, 1 if name in nested else call, result, {}] for name, call, result in found])
        if "inbound_nodes" in layer:
            layer["inbound_nodes"] = nodes
    for key in ("input_layers", "output_layers"):
        if isinstance(model["config"].get(key, [[]])[0], str):
            model["config"][key] = [model["config"][key]]


def test_as_tensorflow_wrote_it(folder: Path, tmp_path: Path) -> None:
    path = respelled(folder / "m.h5", tmp_path / "old.h5", as_in_2020, names="{}:0")
    assert same_state(path, folder / "m.h5")


def test_as_keras_wrote_it_in_its_first_years(folder: Path, tmp_path: Path) -> None:
    """`Model` for a model, a list for a Sequential's description, no version."""

    def change(config: dict[str, Any]) -> None:
        as_in_2020(config)
        for layer in config["config"]["layers"]:
            layer["class_name"] = layer["class_name"].replace("Functional", "Model")
        config["config"] = [layer for layer in config["config"]["layers"] if layer["class_name"] != "InputLayer"]
        for layer in config["config"]:
            layer.pop("name", None)
        config["config"][0]["config"]["layers"][0]["config"]["batch_input_shape"] = [None, SIZE, SIZE, 3]

    path = respelled(folder / "s.h5", tmp_path / "old.h5", change, names="{}:0")
    assert same_state(path, folder / "s.h5")
    found = recognise_keras(read_keras_file(path))
    assert found is not None
    assert found.config["input_size"] == SIZE


def test_preprocessing_by_operations_of_tensorflow(folder: Path, tmp_path: Path) -> None:
    """What `preprocess_input` left in a functional model of TensorFlow's Keras: operators as layers."""

    def change(config: dict[str, Any]) -> None:
        as_in_2020(config)
        layers = config["config"]["layers"]
        place = next(i for i, layer in enumerate(layers) if layer["class_name"] == "Rescaling")
        taken = layers[place]["inbound_nodes"][0][0][0]
        steps = (("math.truediv", "y", 127.5), ("math.subtract", "y", 1.0), ("nn.bias_add", "bias", [0.0, 0.0, 0.0]))
        made = []
        for function, argument, value in steps:
            name = f"tf.{function}"
            made.append(
                {
                    "class_name": "TFOpLambda",
                    "name": name,
                    "config": {"name": name, "trainable": True, "dtype": "float32", "function": function},
                    "inbound_nodes": [[taken, 0, 0, {argument: value, "name": None}]],
                }
            )
            taken = name
        old = layers[place]["name"]
        layers[place : place + 1] = made
        for layer in layers:
            for node in layer["inbound_nodes"]:
                for call in node if node and isinstance(node[0], list) else []:
                    call[0] = taken if call[0] == old else call[0]

    path = respelled(folder / "m.h5", tmp_path / "old.h5", change, names="{}:0")
    with h5py.File(path, "r+") as file:
        names = [n for n in file["model_weights"].attrs["layer_names"] if n != "rescaling"]
        file["model_weights"].attrs["layer_names"] = names
    assert same_state(path, folder / "m.h5")
    found = recognise_keras(read_keras_file(path))
    assert found is not None
    assert found.preprocess.mean == pytest.approx((0.5,) * 3)
    assert found.preprocess.std == pytest.approx((0.5,) * 3)


def test_an_unknown_operation_of_tensorflow_is_named(folder: Path, tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        as_in_2020(config)
        layer = next(layer for layer in config["config"]["layers"] if layer["class_name"] == "Rescaling")
        layer["class_name"] = "TFOpLambda"
        layer["config"]["function"] = "image.adjust_hue"
        layer["inbound_nodes"][0][0][3] = {"delta": 0.1}

    path = respelled(folder / "m.h5", tmp_path / "old.h5", change)
    with pytest.raises(WeightsError, match="of class TFOpLambda, before the trunk, cannot be represented"):
        recognise_keras(read_keras_file(path))


def test_names_that_are_continued(folder: Path, tmp_path: Path) -> None:
    """A list that is too long for one attribute is split into name0, name1, ..."""
    path = tmp_path / "split.h5"
    path.write_bytes((folder / "m.h5").read_bytes())
    with h5py.File(path, "r+") as file:
        for group, name in ((file["model_weights"], "layer_names"), (file["model_weights/xception"], "weight_names")):
            listed = list(group.attrs[name])
            del group.attrs[name]
            for i, part in enumerate((listed[:2], listed[2:3], listed[3:])):
                group.attrs[f"{name}{i}"] = part
    assert same_state(path, folder / "m.h5")


def test_an_archive_that_was_packed_again(folder: Path, tmp_path: Path) -> None:
    """Deflated, in another order, with assets."""
    members = hostile_keras.unzipped((folder / "m.keras").read_bytes())
    pairs = [("assets/words.txt", b"x" * 5000), *reversed(list(members.items()))]
    path = tmp_path / "packed.keras"
    path.write_bytes(hostile_keras.zipped(pairs, zipfile.ZIP_DEFLATED))
    assert same_state(path, folder / "m.keras")


def test_the_release_with_another_name_for_layers(folder: Path, tmp_path: Path) -> None:
    """Keras 2.13 alone kept variables under `_layer_checkpoint_dependencies`."""
    members = hostile_keras.unzipped((folder / "m.keras").read_bytes())
    weights = tmp_path / "weights.h5"
    weights.write_bytes(members["model.weights.h5"])
    with h5py.File(weights, "r+") as file:
        file["layers/functional"].move("layers", "_layer_checkpoint_dependencies")
        file.move("layers", "_layer_checkpoint_dependencies")
    members["model.weights.h5"] = weights.read_bytes()
    path = tmp_path / "m.keras"
    path.write_bytes(hostile_keras.zipped(list(members.items())))
    assert same_state(path, folder / "m.keras")


def test_other_spellings_of_the_same_layers(folder: Path, tmp_path: Path) -> None:
    """A ReLU as a layer of its own, a sum the other way round, sizes as single numbers, settings left out."""

    def change(config: dict[str, Any]) -> None:
        trunk = next(layer for layer in config["config"]["layers"] if layer["class_name"] == "Functional")
        for layer in trunk["config"]["layers"]:
            settings = layer["config"]
            if layer["class_name"] == "Activation":
                layer["class_name"] = "ReLU"
                settings.pop("activation")
            if layer["class_name"] == "Add":
                layer["inbound_nodes"][0]["args"][0].reverse()
            if layer["class_name"] == "BatchNormalization":
                settings["axis"] = [3]
                settings.pop("epsilon")
            if layer["class_name"] == "SeparableConv2D":
                settings.update(kernel_size=3, strides=1)
                settings.pop("dilation_rate", None)

    path = respelled(folder / "m.h5", tmp_path / "old.h5", change)
    assert same_state(path, folder / "m.h5")


def test_an_activation_before_the_normalisation_is_another_network(folder: Path, tmp_path: Path) -> None:

    def change(config: dict[str, Any]) -> None:
        trunk = next(layer for layer in config["config"]["layers"] if layer["class_name"] == "Functional")
        layer = next(layer for layer in trunk["config"]["layers"] if layer["name"] == "block5_sepconv1")
        layer["config"]["activation"] = "relu"

    path = respelled(folder / "m.h5", tmp_path / "old.h5", change)
    with pytest.raises(WeightsError, match="'block5_sepconv1' of class SeparableConv2D stands where an Xception has"):
        recognise_keras(read_keras_file(path))


# ---------------------------------------------------------------------------------------------- Keras's own order


@pytest.mark.parametrize("name", ["Xception", "InceptionV3"])
def test_layers_in_keras_order_and_in_the_order_of_their_making(name: str) -> None:
    """All files without a description rest on these two orders: 4 layers of the one have no names, 94 of the other."""
    keras.utils.clear_session(free_memory=False)
    model = getattr(keras.applications, name)(weights=None, include_top=False)
    steps = xception_steps(XceptionConfig()) if name == "Xception" else inception_steps(InceptionV3Config())
    numbers: dict[int, str] = {}
    counts: dict[str, int] = {}
    for i, step in enumerate(steps):
        if not step.name:
            stem = snake_case(step.kind)
            counts[stem] = counts.get(stem, -1) + 1
            numbers[i] = f"{stem}_{counts[stem]}" if counts[stem] else stem
    theirs = [(type(layer).__name__, layer.name) for layer in model.layers[1:]]
    order = keras_order([step.inputs for step in steps])
    ours = [(steps[i].kind, steps[i].name or numbers[i]) for i in order]
    joins = {"Concatenate"}  # Keras names two of them that stand inside modules, and we none
    assert [x for x in ours if x[0] not in joins] == [x for x in theirs if x[0] not in joins]
    assert [kind for kind, _ in ours] == [kind for kind, _ in theirs]


def test_the_order_is_keras_own_for_graphs_of_many_shapes() -> None:
    """Random graphs of sums: Keras lists their layers as `keras_order` does."""
    generator = np.random.default_rng(0)
    for _ in range(20):
        keras.utils.clear_session(free_memory=False)
        tensors, inputs = [keras.Input((2,), name="n0")], [()]
        for i in range(1, 14):
            count = int(generator.integers(1, min(i, 3) + 1))
            taken = [int(k) for k in generator.choice(i, count, replace=False)]
            layer = L.ReLU(name=f"n{i}") if count == 1 else L.Add(name=f"n{i}")
            tensors.append(layer(tensors[taken[0]] if count == 1 else [tensors[k] for k in taken]))
            inputs.append(tuple(taken))
        model = keras.Model(tensors[0], tensors[-1])
        assert [layer.name for layer in model.layers] == [f"n{i}" for i in keras_order(inputs)]


def test_each_tensor_of_ours_has_one_variable_of_theirs() -> None:
    """The tables name every parameter and statistic of the trunks, once."""
    from xception.models.registry import build_without_storage, get_config

    for name, steps in (
        ("xception", xception_steps(XceptionConfig())),
        ("inception_v3", inception_steps(InceptionV3Config())),
    ):
        state = build_without_storage(name, get_config(name)).state_dict()
        named = [f"{step.ours}.{ours}" for step in steps for _, ours, _ in step.variables()]
        expected = {key for key in state if not key.startswith("classifier.") and "batches" not in key}
        assert len(named) == len(set(named)) == len(expected)
        assert set(named) == expected


def test_the_shared_narrow_network_is_what_the_tests_say() -> None:
    config = XceptionConfig(**copy.deepcopy(NARROW))
    assert len([step for step in xception_steps(config) if isinstance(step, Step) and step.kind == "Add"]) == 6


def test_bare_weights_that_are_of_no_known_network(tmp_path: Path) -> None:
    small = keras.Sequential([keras.Input((8, 8, 3)), L.Conv2D(4, 3), L.GlobalAveragePooling2D(), L.Dense(2)])
    small.save_weights(tmp_path / "m.weights.h5")
    save_bare_hdf5(small, tmp_path / "m.h5")
    for name in ("m.weights.h5", "m.h5"):
        with pytest.raises(WeightsError, match="weights without a description"):
            recognise_keras(read_keras_file(tmp_path / name))
