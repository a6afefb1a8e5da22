"""What is written for Keras: Keras loads it and computes the same numbers, and it comes back here bit for bit."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from keras_models import assert_equal_numbers, images, imported, keras, keras_logits, keras_numbers, normalised
from keras_networks import NARROW, info_of, our_network
from torch import nn

from xception.data.preprocess import Preprocess
from xception.errors import ConfigError, WeightsError
from xception.models import registry
from xception.weights.bundle import BundleInfo
from xception.weights.keras_write import KERAS_KINDS, write_keras

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:keras")  # its own, of numpy

NETWORKS: dict[str, dict[str, Any]] = {
    "as published, narrow": {},
    "no shortcuts": {"residual": False},
    "no shortcuts, other modules": {"residual": False, "middle_modules": 3, "middle_units": 2},
    "relu between": {"intermediate_activation": "relu"},
    "elu between": {"intermediate_activation": "elu", "residual": False},
    "pointwise first": {"order": "pointwise_depthwise"},
    "pointwise first, relu between": {"order": "pointwise_depthwise", "intermediate_activation": "relu"},
    "small stem": {"stem": "small"},
    "small stem, stride 2": {"stem": "small", "stem_stride": 2},
    "valid stem, stride 1": {"stem_stride": 1},
    "no middle": {"middle_modules": 0},
    "one of each": {"entry_widths": (8,), "middle_modules": 1, "middle_units": 1, "exit_widths": (9,)},
    "deep": {"entry_widths": (4, 5, 6, 7), "middle_modules": 5, "exit_widths": (8, 9, 10, 11)},
    "hidden layers": {"fully_connected": (7, 6), "dropout": 0.25},
    "hidden layers, activations": {
        "fully_connected": (9,) * 4, "hidden_activations": ("none", "relu", "elu", "gelu"),
    },
    "hidden layers, more activations": {
        "fully_connected": (9,) * 3, "hidden_activations": ("silu", "leaky_relu", "selu"),
    },
    "hidden layers, activations with bounds": {
        "fully_connected": (9, 40, 9), "hidden_activations": ("tanh", "sigmoid", "softplus"),
    },
    "maximum": {"pooling": "max"},
    "grey": {"in_channels": 1, "num_classes": 2},
    "one class": {"num_classes": 1},
}  # fmt: skip
IN_HDF5_TOO = ("as published, narrow", "pointwise first, relu between", "hidden layers, activations", "maximum", "grey")


def written(path: Path, kind: str, model: nn.Module, info: BundleInfo) -> Any:
    """The Keras model that Keras makes of what is written."""
    write_keras(path, model, info, kind)
    keras.utils.clear_session(free_memory=False)
    return keras.saving.load_model(path)


def assert_same_network(path: Path, model: Any, info: BundleInfo) -> None:
    """What comes back is the network that was written, bit for bit."""
    again, found, report, _ = imported(path)
    expected, got = model.state_dict(), again.state_dict()
    assert expected.keys() == got.keys()
    assert all(torch.equal(got[key], value) for key, value in expected.items() if "batches" not in key)
    config = {**registry.config_to_dict(model.config)}
    assert found.config == config
    assert (found.class_names, found.multi_label) == (info.class_names, info.multi_label)
    assert found.preprocess == info.preprocess
    assert (found.fresh, found.ignored, report.tensors_unused) == ((), (), 0)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str, tmp_path: Path) -> None:
    options = {**NARROW, **NETWORKS[name]}
    model = our_network(**options)
    info = info_of(model, multi_label=options["num_classes"] == 1)
    x = normalised(images(3, (66, 75), channels=options.get("in_channels", 3)))
    for kind, file in (("keras", "m.keras"), ("keras-h5", "m.h5")):
        if kind == "keras" or name in IN_HDF5_TOO:
            theirs = written(tmp_path / file, kind, model, info)
            assert_equal_numbers(keras_logits(theirs, x), model(x).detach())
            assert_same_network(tmp_path / file, model, info)


def test_weights_alone_of_a_network_that_keras_does_not_have(tmp_path: Path) -> None:
    """They could not be told from a file of another network."""
    for options in ({}, {"residual": False}):
        model = our_network(**{**NARROW, **options})
        with pytest.raises(WeightsError, match=r"keras\.applications has no such network"):
            write_keras(tmp_path / "m.weights.h5", model, info_of(model), "keras-weights")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module", params=["xception", "inception_v3"])
def published(request: pytest.FixtureRequest) -> tuple[Any, BundleInfo, Any]:
    """A network that keras.applications has, ours and theirs (with random weights)."""
    model = our_network(request.param, num_classes=6)
    make = {"xception": keras.applications.Xception, "inception_v3": keras.applications.InceptionV3}[request.param]
    return (
        model,
        info_of(model, request.param),
        make(weights=None, classes=6, input_tensor=keras.Input((None, None, 3))),
    )


@pytest.mark.parametrize("kind", KERAS_KINDS)
def test_published_networks(published: tuple[Any, BundleInfo, Any], kind: str, tmp_path: Path) -> None:
    """Keras's own network takes the weights from each kind of file; a whole model is also one by itself."""
    model, info, theirs = published
    path = tmp_path / {"keras": "m.keras", "keras-weights": "m.weights.h5", "keras-h5": "m.h5"}[kind]
    write_keras(path, model, info, kind)
    assert_same_network(path, model, info)
    x = normalised(images(2, (96, 96)))
    expected = model(x).detach()
    if kind == "keras":
        whole = keras.saving.load_model(path)
        assert_equal_numbers(keras_logits(whole, x), expected)
        assert torch.allclose(keras_numbers(whole, x), expected.softmax(-1), atol=1e-4)
        names = ([layer.name for layer in network.layers if "block" in layer.name] for network in (whole, theirs))
        assert next(names) == next(names)
        assert whole.name == theirs.name
        return
    for weight in theirs.weights:
        weight.assign(weight.value * 0 + 0.5)
    theirs.load_weights(path)
    assert_equal_numbers(keras_logits(theirs, x), expected)


@pytest.mark.slow
@pytest.mark.parametrize("size", [150, 224, 256, 299, 320])
def test_published_networks_at_all_sizes(published: tuple[Any, BundleInfo, Any], size: int, tmp_path: Path) -> None:
    model, info, _ = published
    theirs = written(tmp_path / "m.keras", "keras", model, info)
    x = normalised(images(2, (size, size)))
    assert_equal_numbers(keras_logits(theirs, x), model(x).detach())


def test_the_inception_of_2016(tmp_path: Path) -> None:
    """Biases, ReLU before normalisation, a scale, other widths: Keras has no name for it, and can express it."""
    model = our_network("inception_v3_2016", num_classes=3, fully_connected=(8,))
    info = info_of(model, "inception_v3_2016")
    theirs = written(tmp_path / "m.keras", "keras", model, info)
    x = normalised(images(2, (96, 96)))
    assert_equal_numbers(keras_logits(theirs, x), model(x).detach())
    assert_same_network(tmp_path / "m.keras", model, info)


def test_what_keras_saves_again_is_still_the_network(tmp_path: Path) -> None:
    model = our_network(**{**NARROW, "fully_connected": (7,)})
    theirs = written(tmp_path / "m.keras", "keras", model, info_of(model))
    theirs.save(tmp_path / "again.keras")
    again, found, *_ = imported(tmp_path / "again.keras")
    expected, got = model.state_dict(), again.state_dict()
    assert all(torch.equal(got[key], value) for key, value in expected.items() if "batches" not in key)
    assert found.class_names is None  # Keras does not keep what it does not know


def test_the_activation_says_whether_classes_exclude_each_other(tmp_path: Path) -> None:
    model = our_network(**NARROW)
    x = normalised(images(2, (64, 64)))
    for multi_label in (False, True):
        info = info_of(model, multi_label=multi_label)
        theirs = written(tmp_path / "m.keras", "keras", model, info)
        expected = model(x).detach()
        expected = expected.sigmoid() if multi_label else expected.softmax(-1)
        assert torch.allclose(keras_numbers(theirs, x), expected, atol=1e-5)
        assert_same_network(tmp_path / "m.keras", model, info)


def test_names_and_preprocessing_come_back(tmp_path: Path) -> None:
    model = our_network(**NARROW)
    preprocess = Preprocess(size=(70, 60), crop_fraction=0.9, interpolation="bicubic", mean=(0.1, 0.2, 0.3), std=(0.4,))
    names = ("cat", "d\u00f6g", "\U0001f98a", "", "a" * 300)
    info = info_of(model, class_names=names, preprocess=preprocess)
    for kind in ("keras", "keras-h5"):
        write_keras(tmp_path / "m", model, info, kind)
        _, found, *_ = imported(tmp_path / "m")
        assert (found.class_names, found.preprocess) == (names, preprocess)


def test_the_same_network_gives_the_same_bytes(tmp_path: Path) -> None:
    for kind in ("keras", "keras-h5"):
        for name in ("a", "b"):
            model = our_network(**NARROW)
            write_keras(tmp_path / name, model, info_of(model), kind)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_half_precision_is_written_as_floats(tmp_path: Path) -> None:
    model = our_network(**NARROW).half()
    write_keras(tmp_path / "m.keras", model, info_of(model), "keras")
    again, *_ = imported(tmp_path / "m.keras")
    for key, value in model.state_dict().items():
        if "batches" not in key:
            assert torch.equal(again.state_dict()[key], value.float())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("xception", {"numerics": "torch"}, "numerics 'torch'"),
        ("xception", {"segments": 2}, "this network's segments"),
        ("xception", {"tied_middle": True}, "tied middle flow"),
        ("xception", {"output_stride": 8}, "output_stride"),
        ("inception_v3_torchvision", {}, "numerics 'torch'"),
        ("inception_v3", {"auxiliary": True}, "auxiliary tower"),
        ("inception_v1", {}, "only Xception and Inception v3"),
    ],
)
def test_what_keras_cannot_express_is_named_and_not_written(
    name: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = registry.create_model(
        name, **({**NARROW, **options} if name == "xception" else {"num_classes": 2, **options})
    )
    path = tmp_path / "m.keras"
    with pytest.raises(WeightsError, match=message) as error:
        write_keras(path, model, info_of(model, name), "keras")
    assert str(error.value).startswith(f"cannot write {path}: ")
    assert not path.exists()


def test_other_mistakes(tmp_path: Path) -> None:
    model = our_network(**NARROW)
    with pytest.raises(ConfigError, match="unknown kind of Keras file 'h5'"):
        write_keras(tmp_path / "m", model, info_of(model), "h5")
    with pytest.raises(WeightsError, match="cannot write"):
        write_keras(tmp_path / "none" / "m.keras", model, info_of(model), "keras")
    with pytest.raises(WeightsError, match=r"torch\.float64"):
        write_keras(tmp_path / "m.keras", model.double(), info_of(model), "keras")
    assert list(tmp_path.iterdir()) == []


def test_an_archive_is_what_keras_writes(tmp_path: Path) -> None:
    model = our_network(**NARROW)
    write_keras(tmp_path / "m.keras", model, info_of(model), "keras")
    with zipfile.ZipFile(tmp_path / "m.keras") as archive:
        assert archive.namelist() == ["metadata.json", "config.json", "model.weights.h5"]
        assert {member.compress_type for member in archive.infolist()} == {zipfile.ZIP_STORED}
        assert archive.testzip() is None
