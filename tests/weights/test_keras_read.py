"""Genuine files of Keras's own Xception and Inception v3, in every container, give Keras's logits here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from keras_models import (
    L,
    assert_equal_numbers,
    images,
    imported,
    keras,
    keras_logits,
    keras_numbers,
    narrow_trunk,
    normalised,
    randomised,
    save_bare_hdf5,
    save_quietly,
    tempered,
)

from xception.errors import WeightsError
from xception.weights.keras_file import read_keras_file
from xception.weights.keras_model import recognise_keras

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:keras")  # its own, of numpy

CLASSES = 7
APPLICATIONS = {"xception": "Xception", "inception_v3": "InceptionV3"}
CLASSIFIER = ("classifier.linear.weight", "classifier.linear.bias")


def application(name: str, **options: Any) -> Any:
    keras.utils.clear_session(free_memory=False)
    return randomised(getattr(keras.applications, APPLICATIONS[name])(weights=None, **options))


@pytest.fixture(scope="module", params=APPLICATIONS)
def with_top(request: pytest.FixtureRequest) -> tuple[str, Any]:
    """Keras's network with its classifier, for images of any size: its weights are what is saved."""
    name = request.param
    model = application(name, classes=CLASSES, input_tensor=keras.Input((None, None, 3)))
    return name, tempered(model, normalised(images(3, (100, 100))))


def save(model: Any, container: str, folder: Path) -> Path:
    path = folder / {"keras": "m.keras", "keras-weights": "m.weights.h5"}.get(container, "m.h5")
    if container == "keras-weights":
        model.save_weights(path)
    elif container == "keras-h5-weights":
        save_bare_hdf5(model, path)
    else:
        save_quietly(model, path)
    return path


@pytest.mark.parametrize("container", ["keras", "keras-weights", "keras-h5", "keras-h5-weights"])
def test_every_container(with_top: tuple[str, Any], container: str, tmp_path: Path) -> None:
    name, model = with_top
    path = save(model, container, tmp_path)
    ours, found, report, file = imported(path)
    assert (found.format, found.model, found.config["num_classes"]) == (container, name, CLASSES)
    assert found.config["numerics"] == "tf"
    assert (found.multi_label, found.fresh, found.class_names) == (False, (), None)
    assert found.preprocess.size == (299, 299)
    assert found.preprocess.mean == found.preprocess.std == (0.5, 0.5, 0.5)
    assert report.tensors_used == len(file.tensors) == len(model.weights)
    x = normalised(images(2, (96, 120)))
    assert_equal_numbers(ours(x).detach(), keras_logits(model, x))


@pytest.fixture(scope="module")
def both(with_top: tuple[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A network here and in Keras."""
    return imported(save(with_top[1], "keras", tmp_path_factory.mktemp("both")))[0], with_top[1]


@pytest.mark.parametrize("size", [150, 224])
def test_sizes(both: tuple[Any, Any], size: int) -> None:
    """At 224 the pools meet maps of even sides, where TensorFlow pads to one side."""
    ours, model = both
    x = normalised(images(2, (size, size)))
    assert_equal_numbers(ours(x).detach(), keras_logits(model, x))


@pytest.mark.slow
@pytest.mark.parametrize("size", [150, 224, 256, 299, 320])
def test_all_sizes(both: tuple[Any, Any], size: int) -> None:
    ours, model = both
    x = normalised(images(3, (size, size)))
    got = ours(x).detach()
    assert_equal_numbers(got, keras_logits(model, x))
    assert_equal_numbers(got.softmax(-1), keras_numbers(model, x))


@pytest.fixture(scope="module")
def without_top() -> Any:
    return application("xception", include_top=False, input_shape=(96, 96, 3))


@pytest.mark.parametrize("container", ["keras", "keras-weights", "keras-h5", "keras-h5-weights"])
def test_without_top(without_top: Any, container: str, tmp_path: Path) -> None:
    ours, found, _, file = imported(save(without_top, container, tmp_path))
    assert found.fresh == CLASSIFIER
    assert len(found.pairs) == len(file.tensors) == len(without_top.weights)
    x = normalised(images(2, (96, 96)))
    features = ours.forward_features(x).detach()
    assert_equal_numbers(features.permute(0, 2, 3, 1), keras_numbers(without_top, x))


@pytest.mark.parametrize("container", ["keras-weights", "keras-h5-weights"])
def test_weights_alone_of_a_fine_tuned_model(without_top: Any, container: str, tmp_path: Path) -> None:
    """The trunk as one layer of a larger model, under one dense layer."""
    inputs = keras.Input((96, 96, 3))
    x = L.GlobalAveragePooling2D()(without_top(inputs, training=False))
    model = keras.Model(inputs, L.Dense(4)(L.Dropout(0.2)(x)))
    randomised(model, seed=3)
    ours, found, *_ = imported(save(model, container, tmp_path))
    assert (found.model, found.config["num_classes"], found.fresh) == ("xception", 4, ())
    x = normalised(images(2, (96, 96)))
    assert_equal_numbers(ours(x).detach(), keras_numbers(model, x))


@pytest.mark.parametrize("container", ["keras-weights", "keras-h5-weights"])
def test_weights_alone_cannot_tell_how_two_layers_are_connected(
    without_top: Any, container: str, tmp_path: Path
) -> None:
    inputs = keras.Input((96, 96, 3))
    x = L.GlobalAveragePooling2D()(without_top(inputs))
    model = keras.Model(inputs, L.Dense(4)(L.Dense(9, activation="relu")(x)))
    path = save(model, container, tmp_path)
    with pytest.raises(WeightsError, match="does not describe how it is used"):
        recognise_keras(read_keras_file(path))
    found = recognise_keras(read_keras_file(path), trunk_only=True)
    assert found is not None
    assert found.fresh == CLASSIFIER


def test_a_frozen_trunk_that_is_thawed_in_part(without_top: Any, tmp_path: Path) -> None:
    """Old files list what is trained before what is frozen: names, not places, tell whose a variable is."""
    inputs = keras.Input((96, 96, 3))
    model = keras.Model(inputs, L.Dense(3)(L.GlobalMaxPooling2D()(without_top(inputs))))
    randomised(model, seed=5)
    states = [layer.trainable for layer in without_top.layers]
    try:
        for i, layer in enumerate(without_top.layers):
            layer.trainable = i % 3 == 0
        x = normalised(images(2, (96, 96)))
        for container in ("keras-h5", "keras-h5-weights"):
            ours, found, *_ = imported(save(model, container, tmp_path))
            if container == "keras-h5":
                assert found.config["pooling"] == "max"
                assert_equal_numbers(ours(x).detach(), keras_numbers(model, x))
            features = ours.forward_features(x).detach()
            assert_equal_numbers(features.permute(0, 2, 3, 1), keras_numbers(without_top, x))
    finally:
        for layer, state in zip(without_top.layers, states, strict=True):
            layer.trainable = state


def test_a_trained_model_brings_its_optimiser(tmp_path: Path) -> None:
    """What an optimiser, its metrics and the layers' random numbers keep is known to mean nothing here."""
    keras.utils.clear_session(free_memory=False)
    trunk = narrow_trunk(tmp_path)
    trunk.trainable = False
    model = keras.Sequential(
        [
            keras.Input((75, 75, 3)),
            L.RandomFlip("horizontal"),
            L.RandomRotation(0.1),
            L.Rescaling(1 / 127.5, offset=-1),
            trunk,
            L.GlobalAveragePooling2D(),
            L.Dropout(0.3),
            L.Dense(3, activation="softmax"),
        ]
    )
    model.compile(optimizer="adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    x = images(3, (75, 75))
    raw = x.permute(0, 2, 3, 1).float().numpy()
    model.fit(raw, np.array([0, 1, 2]), verbose=0)
    tempered(model, x.float())
    for container in ("keras", "keras-h5"):
        ours, found, report, _ = imported(save(model, container, tmp_path))
        assert report.tensors_ignored >= 4, container
        assert found.config["num_classes"] == 3
        got = ours(normalised(x)).detach().softmax(-1)
        assert_equal_numbers(got, keras_numbers(model, x.float()))
