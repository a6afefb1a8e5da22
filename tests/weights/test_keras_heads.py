"""Fine-tuned Keras models on a narrow trunk: what is understood gives Keras's numbers, the rest is an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from keras_models import (
    L,
    assert_equal_numbers,
    images,
    imported,
    keras,
    keras_numbers,
    narrow_trunk,
    normalised,
    randomised,
    save_quietly,
    tempered,
)

from xception.errors import WeightsError
from xception.weights.keras_file import read_keras_file
from xception.weights.keras_model import recognise_keras

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:keras")  # its own, of numpy

SIZE = 48
# The smallest trunk that has a module of each kind.
SMALLEST: dict[str, Any] = {"entry_widths": (8,), "middle_modules": 1, "middle_units": 1, "exit_widths": (14, 18)}
Layers = Callable[[], list[Any]]


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return narrow_trunk(tmp_path_factory.mktemp("trunk"), **SMALLEST)


def norm(name: str = "head_norm", **options: Any) -> Any:
    return L.BatchNormalization(name=name, **options)


def average() -> Any:
    return L.GlobalAveragePooling2D()


HEADS: dict[str, tuple[Layers, dict[str, Any]]] = {
    "plain": (lambda: [average(), L.Dense(4, activation="softmax")], {}),
    "maximum": (lambda: [L.GlobalMaxPooling2D(), L.Dense(4)], {"pooling": "max"}),
    "softmax layer": (lambda: [average(), L.Dense(4), L.Softmax()], {}),
    "softmax activation": (lambda: [average(), L.Dense(4), L.Activation("softmax")], {}),
    "hidden": (
        lambda: [average(), L.Dense(6, activation="relu"), L.Dropout(0.4), L.Dense(4)],
        {"fully_connected": [6], "hidden_activations": [], "dropout": 0.4},
    ),
    "kitchenware": (
        lambda: [average(), L.Dense(9, activation="relu"), L.Dense(7), L.ReLU(), L.Dropout(0.1), L.Dense(4)],
        {"fully_connected": [9, 7], "hidden_activations": [], "dropout": 0.1},
    ),
    "norm before the dense layer": (lambda: [average(), norm(), L.Dense(4)], {"fully_connected": []}),
    "norm before the pool": (lambda: [norm(center=False), L.SpatialDropout2D(0.2), average(), L.Dense(4)], {}),
    "norm after the dense layer": (
        lambda: [average(), L.Dense(6), norm(epsilon=0.01), L.ReLU(), L.Dense(4)],
        {"fully_connected": [6], "hidden_activations": []},
    ),
    "norm after the activation": (
        lambda: [average(), L.Dense(6, activation="tanh"), norm(scale=False), L.Dropout(0.3), L.Dense(4)],
        {"fully_connected": [6], "hidden_activations": ["tanh"], "dropout": 0.3},
    ),
    "two norms around a layer without bias": (
        lambda: [average(), norm("a"), norm("b", scale=False), L.Dense(4, use_bias=False), norm("c"), norm("d")],
        {"fully_connected": []},
    ),
    "norm at the end": (lambda: [average(), L.Dense(4), norm(), L.Activation("sigmoid")], {}),
    "without biases": (
        lambda: [average(), L.Dense(6, use_bias=False, activation="elu"), L.Dense(4, use_bias=False)],
        {"fully_connected": [6], "hidden_activations": ["elu"]},
    ),
    "linear layers": (
        lambda: [average(), L.Dense(6), L.Activation("linear"), L.Dense(5), L.Dense(4)],
        {"fully_connected": [6, 5], "hidden_activations": ["none", "none"]},
    ),
    "smooth activations": (
        lambda: [average(), L.Dense(9, activation="gelu"), L.Dense(8, activation="silu"), L.Dense(4)],
        {"fully_connected": [9, 8], "hidden_activations": ["gelu", "silu"]},
    ),
    "more activations": (
        lambda: [average(), L.Dense(9, activation="selu"), L.Dense(8, activation="softplus"), L.Dense(4)],
        {"hidden_activations": ["selu", "softplus"]},
    ),
    "leaky activations": (
        lambda: [
            average(),
            L.Dense(9, activation="leaky_relu"),
            L.Dense(8),
            L.LeakyReLU(negative_slope=0.2),
            L.Dense(8),
            L.ReLU(negative_slope=0.2),
            L.Dense(6),
            L.ELU(),
            L.Dense(4),
        ],
        {"hidden_activations": ["leaky_relu", "leaky_relu", "leaky_relu", "elu"]},
    ),
    "idle layers": (
        lambda: [
            L.ReLU(),
            average(),
            L.Flatten(),
            L.GaussianNoise(0.1),
            L.AlphaDropout(0.1),
            L.Identity(),
            L.ActivityRegularization(0.1),
            L.Dense(4),
        ],
        {"fully_connected": []},
    ),
    "flattened after the pool": (lambda: [L.GlobalAveragePooling2D(keepdims=True), L.Flatten(), L.Dense(4)], {}),
    "one unit": (lambda: [average(), L.Dense(1, activation="sigmoid")], {"num_classes": 1}),
    "many labels": (lambda: [average(), L.Dense(4, activation="sigmoid")], {}),
}
MULTI_LABEL = {"one unit", "many labels", "norm at the end"}


def built(trunk: Any, style: str, head: list[Any], front: list[Any] | None = None) -> Any:
    """A model of a front, the trunk and a head: nested, flat, or Sequential."""
    inputs = keras.Input((SIZE, SIZE, 3))
    if style == "sequential":
        return keras.Sequential([inputs, *(front or []), trunk, *head])
    x = inputs
    for layer in front or []:
        x = layer(x)
    if style == "nested":
        x = trunk(x, training=False)
    else:
        copies = {}
        for layer in trunk.layers[1:]:  # under other names, which decide nothing
            copies[layer.name] = type(layer).from_config({**layer.get_config(), "name": f"flat_{layer.name}"})
        results = {trunk.layers[0].name: x}
        for layer in trunk.layers[1:]:
            sources = [t._keras_history.operation.name for t in layer._inbound_nodes[-1].input_tensors]
            taken = [results[name] for name in sources]
            results[layer.name] = copies[layer.name](taken if len(taken) > 1 else taken[0])
        x = results[trunk.layers[-1].name]
    for layer in head:
        x = layer(x)
    return keras.Model(inputs, x)


@pytest.mark.parametrize("style", ["nested", "flat", "sequential"])
@pytest.mark.parametrize("name", HEADS)
def test_heads(trunk: Any, name: str, style: str, tmp_path: Path) -> None:
    make, expected = HEADS[name]
    model = built(trunk, style, make())
    x = normalised(images(3, (SIZE, SIZE)))
    tempered(randomised(model, seed=1), x)
    for ending in {"nested": ("keras", "h5"), "flat": ("keras",), "sequential": ("h5",)}[style]:
        path = tmp_path / f"model.{ending}"
        save_quietly(model, path)
        ours, found, *_ = imported(path)
        assert {key: found.config[key] for key in expected} == expected
        assert found.multi_label == (name in MULTI_LABEL)
        assert (found.fresh, found.config["input_size"]) == ((), SIZE)
        logits, numbers = ours(x).detach(), keras_numbers(model, x)
        if "softmax" in name or name == "plain":
            logits = logits.softmax(-1)
        elif name in MULTI_LABEL:
            logits = logits.sigmoid()
        assert_equal_numbers(logits, numbers)


def test_the_loss_tells_what_bare_numbers_mean(trunk: Any, tmp_path: Path) -> None:
    for units, loss, multi_label in (
        (4, "categorical_crossentropy", False),
        (4, "binary_crossentropy", True),
        (4, keras.losses.BinaryCrossentropy(from_logits=True), True),
        (4, keras.losses.BinaryFocalCrossentropy(from_logits=True), True),
        (4, keras.losses.CategoricalCrossentropy(from_logits=True), False),
        (1, "mse", True),
    ):
        model = built(trunk, "nested", [average(), L.Dense(units)])
        model.compile(loss=loss)
        for ending in ("keras", "h5"):
            save_quietly(model, tmp_path / f"m.{ending}")
            found = recognise_keras(read_keras_file(tmp_path / f"m.{ending}"))
            assert found is not None
            assert found.multi_label == multi_label, (units, loss, ending)


# ------------------------------------------------------------------------------------------------ before the trunk


def adapted() -> Any:
    layer = L.Normalization()
    layer.adapt(images(8, (20, 20), seed=9).permute(0, 2, 3, 1).numpy())
    return layer


class _Divide:
    """`x / 127.5 - 1` as operators, which is what Keras's own preprocess_input leaves in a model."""

    def __call__(self, x: Any) -> Any:
        return keras.applications.xception.preprocess_input(x)


class _Arithmetic:
    def __call__(self, x: Any) -> Any:
        return 0.5 * (x * 2.0 / 255.0) + (-0.5)


FRONTS: dict[str, tuple[Layers, dict[str, Any]]] = {
    "rescaling": (lambda: [L.Rescaling(1 / 127.5, offset=-1)], {"mean": (0.5,) * 3, "std": (0.5,) * 3}),
    "to 0..1": (lambda: [L.Rescaling(1 / 255)], {"mean": (0.0,) * 3, "std": (1.0,) * 3}),
    "twice": (lambda: [L.Rescaling(1 / 255), L.Rescaling(2.0, offset=-1.0)], {"mean": (0.5,) * 3, "std": (0.5,) * 3}),
    "by channel": (
        lambda: [L.Rescaling([1 / 50, 1 / 60, 1 / 70], offset=[-1.0, -2.0, -3.0])],
        {"std": (50 / 255, 60 / 255, 70 / 255)},
    ),
    "normalisation by given numbers": (
        lambda: [L.Normalization(mean=[120.0, 110.0, 100.0], variance=[3600.0, 3000.0, 2500.0])],
        {"mean": (120 / 255, 110 / 255, 100 / 255)},
    ),
    "measured normalisation": (lambda: [adapted()], {}),
    "augmentation, then rescaling": (
        lambda: [
            keras.Sequential([L.RandomFlip("horizontal"), L.RandomRotation(0.1), L.RandomZoom(0.2)]),
            L.RandomContrast(0.1),
            L.Rescaling(1 / 127.5, offset=-1),
        ],
        {"mean": (0.5,) * 3},
    ),
    "operators": (lambda: [_Divide()], {"mean": (0.5,) * 3, "std": (0.5,) * 3}),
    "more operators": (lambda: [_Arithmetic()], {"mean": (0.5,) * 3, "std": (1.0,) * 3}),
}


@pytest.mark.parametrize("name", FRONTS)
def test_what_stands_before_the_trunk(trunk: Any, name: str, tmp_path: Path) -> None:
    make, expected = FRONTS[name]
    x = images(3, (SIZE, SIZE))
    for style in ("nested", "flat"):
        model = built(trunk, style, [average(), L.Dense(4)], make())
        for layer in model.layers:
            if type(layer).__name__ == "Dense":
                layer.kernel.assign(np.random.default_rng(0).normal(size=layer.kernel.shape))
        for ending in ("keras",) if style == "flat" else ("h5",):
            save_quietly(model, tmp_path / f"m.{ending}")
            ours, found, *_ = imported(tmp_path / f"m.{ending}")
            for field, value in expected.items():
                assert getattr(found.preprocess, field) == pytest.approx(value, abs=1e-6)
            assert found.preprocess.size == (SIZE, SIZE)
            assert found.preprocess.resize == "squash"
            got = ours(found.preprocess.normalize(x)).detach()
            assert_equal_numbers(got, keras_numbers(model, x.float()))


def test_a_resize_in_the_model_is_the_preprocessings(trunk: Any, tmp_path: Path) -> None:
    inputs = keras.Input((None, None, 3))
    x = L.Resizing(64, 72, crop_to_aspect_ratio=True, interpolation="bicubic")(inputs)
    model = keras.Model(inputs, L.Dense(3)(average()(trunk(x))))
    save_quietly(model, tmp_path / "m.keras")
    found = recognise_keras(read_keras_file(tmp_path / "m.keras"))
    assert found is not None
    preprocess = found.preprocess
    assert (preprocess.size, preprocess.resize, preprocess.interpolation) == ((64, 72), "crop", "bicubic")
    assert preprocess.mean == (0.5, 0.5, 0.5)


def test_grey_images(tmp_path: Path) -> None:
    trunk = narrow_trunk(tmp_path, in_channels=1, **SMALLEST)
    inputs = keras.Input((48, 48, 1))
    model = keras.Model(inputs, L.Dense(3)(average()(trunk(L.Rescaling(1 / 255)(inputs)))))
    save_quietly(model, tmp_path / "m.keras")
    ours, found, *_ = imported(tmp_path / "m.keras")
    assert (found.config["in_channels"], found.preprocess.channels) == (1, 1)
    x = images(3, (48, 48), channels=1)
    assert_equal_numbers(ours(found.preprocess.normalize(x)).detach(), keras_numbers(model, x.float()))


# ---------------------------------------------------------------------------------------- what has no counterpart

NO_HEADS: dict[str, tuple[Layers, str]] = {
    "Lambda": (lambda: [average(), L.Lambda(lambda x: x * 2, output_shape=(18,)), L.Dense(3)], "a Lambda is code"),
    "Flatten": (lambda: [L.Flatten(), L.Dense(3)], "tie the network to one image size"),
    "Conv2D": (lambda: [L.Conv2D(8, 1, name="extra"), average(), L.Dense(3)], "'extra' of class Conv2D"),
    "SeparableConv2D": (lambda: [L.SeparableConv2D(8, 3), average(), L.Dense(3)], "of class SeparableConv2D"),
    "MaxPooling2D": (lambda: [L.MaxPooling2D(), average(), L.Dense(3)], "of class MaxPooling2D"),
    "Dense first": (lambda: [L.Dense(8), average(), L.Dense(3)], "it stands before the pool"),
    "softmax in the middle": (lambda: [average(), L.Dense(8, activation="softmax"), L.Dense(3)], "in the middle"),
    "relu at the end": (lambda: [average(), L.Dense(3, activation="relu")], "ends in relu"),
    "two activations": (lambda: [average(), L.Dense(8, activation="tanh"), L.ReLU(), L.Dense(3)], "another activation"),
    "norm between activations": (
        lambda: [average(), L.Dense(8, activation="tanh"), norm(), L.ReLU(), L.Dense(3)],
        "'head_norm' of class BatchNormalization cannot be represented: it stands between two activations",
    ),
    "norm before a maximum": (lambda: [norm(), L.GlobalMaxPooling2D(), L.Dense(3)], "before a maximum"),
    "norm at the very end": (lambda: [average(), L.Dense(3, activation="softmax"), norm()], "no dense layer follows"),
    "LayerNormalization": (lambda: [average(), L.LayerNormalization(), L.Dense(3)], "of class LayerNormalization"),
    "another activation": (lambda: [average(), L.Dense(8, activation="mish"), L.Dense(3)], "'mish' has no counterpart"),
    "another slope": (lambda: [average(), L.Dense(8), L.LeakyReLU(), L.Dense(3)], "its slope is 0.3"),
    "trained slope": (lambda: [average(), L.Dense(8), L.PReLU(), L.Dense(3)], "its slope is trained"),
    "limited relu": (lambda: [average(), L.Dense(8), L.ReLU(max_value=6), L.Dense(3)], "without maximum"),
}


@pytest.mark.parametrize("name", NO_HEADS)
def test_a_head_without_counterpart_is_named_and_the_trunk_is_there_to_take(
    trunk: Any, name: str, tmp_path: Path
) -> None:
    make, message = NO_HEADS[name]
    model = built(trunk, "nested", make())
    for ending in ("keras", "h5"):
        path = tmp_path / f"m.{ending}"
        save_quietly(model, path)
        with pytest.raises(WeightsError) as error:
            recognise_keras(read_keras_file(path))
        assert message in str(error.value)
        assert str(error.value).startswith(f"cannot load {path}: ")
        ours, found, *_ = imported(path, trunk_only=True)
        assert found.fresh == ("classifier.linear.weight", "classifier.linear.bias")
        x = normalised(images(2, (SIZE, SIZE)))
        features = ours.forward_features(x).detach().permute(0, 2, 3, 1)
        assert torch.allclose(features, keras_numbers(trunk, x), atol=1e-4 * features.abs().max().item())


def test_a_front_without_counterpart_is_named(trunk: Any, tmp_path: Path) -> None:
    for layer, message in (
        (
            L.Lambda(lambda x: x / 255.0, output_shape=(SIZE, SIZE, 3)),
            "before the trunk, cannot be represented: a Lamb",
        ),
        (L.ZeroPadding2D(2), "of class ZeroPadding2D, before the trunk"),
        (L.CenterCrop(40, 40), "of class CenterCrop, before the trunk"),
        (L.Conv2D(3, 1), "of class Conv2D, before the trunk"),
    ):
        model = built(trunk, "nested", [average(), L.Dense(3)], [layer])
        save_quietly(model, tmp_path / "m.keras")
        with pytest.raises(WeightsError, match=message):
            recognise_keras(read_keras_file(tmp_path / "m.keras"))
        _, found, *_ = imported(tmp_path / "m.keras", trunk_only=True)
        assert found.preprocess.mean == (0.5, 0.5, 0.5)


def test_models_of_another_shape(trunk: Any, tmp_path: Path) -> None:
    inputs, other = keras.Input((SIZE, SIZE, 3)), keras.Input((4,))
    features = average()(trunk(inputs))
    two_outputs = keras.Model(inputs, [L.Dense(3)(features), L.Dense(4)(features)])
    joined = keras.Model([inputs, other], L.Dense(3)(L.Concatenate()([features, other])))
    inside = keras.Model(trunk.inputs, L.Dense(3)(average()(trunk.layers[9].output)))
    small = keras.Sequential([keras.Input((SIZE, SIZE, 3)), L.Conv2D(8, 3), L.GlobalAveragePooling2D(), L.Dense(3)])
    for model, message in (
        (two_outputs, "2 outputs"),
        (joined, "joins several results"),
        (inside, "there is no Xception"),
        (small, "there is no Xception"),
    ):
        save_quietly(model, tmp_path / "m.keras")
        with pytest.raises(WeightsError, match=message):
            recognise_keras(read_keras_file(tmp_path / "m.keras"))
    for model in (two_outputs, joined):
        save_quietly(model, tmp_path / "m.keras")
        imported(tmp_path / "m.keras", trunk_only=True)


def test_batch_statistics_at_inference_are_refused(trunk: Any, tmp_path: Path) -> None:
    inputs = keras.Input((SIZE, SIZE, 3))
    model = keras.Model(inputs, L.Dense(3)(average()(trunk(inputs, training=True))))
    save_quietly(model, tmp_path / "m.keras")
    with pytest.raises(WeightsError, match="training=True"):
        recognise_keras(read_keras_file(tmp_path / "m.keras"))
