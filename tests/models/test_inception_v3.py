"""Inception v3: its properties, its published counts, and equality with torchvision and timm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
import torchvision
from inception_checks import (
    EVERY_CHECK,
    assert_same,
    captured,
    check_features,
    check_shapes,
    copy_weights,
    count,
    images,
    network,
    outline,
    randomise,
    table_of_sizes,
)
from torch import nn

from xception.errors import ConfigError
from xception.models.entry import ModelEntry
from xception.models.inception_v3 import ENTRIES, InceptionV3, InceptionV3Config
from xception.models.layers import ConvNorm
from xception.weights.names_inception import inception_v3_names

KERAS, KERAS_2016, TORCHVISION = (entry for entry in ENTRIES if entry.name != "inception_v3_small")


@pytest.mark.parametrize("check", EVERY_CHECK, ids=lambda check: check.__name__)
@pytest.mark.parametrize("entry", [KERAS_2016, TORCHVISION], ids=lambda entry: entry.name)
def test_property(entry: ModelEntry, check: Callable[[ModelEntry], None]) -> None:
    check(entry)


@pytest.mark.parametrize("check", [check_shapes, check_features], ids=lambda check: check.__name__)
def test_property_without_scale(check: Callable[[ModelEntry], None]) -> None:
    check(KERAS)


def test_sizes() -> None:
    assert table_of_sizes(outline(KERAS), 299) == {
        "conv_1a": (149, 149, 32),
        "conv_2a": (147, 147, 32),
        "conv_2b": (147, 147, 64),
        "pool_3a": (73, 73, 64),
        "conv_3b": (73, 73, 80),
        "conv_4a": (71, 71, 192),
        "pool_5a": (35, 35, 192),
        "mixed_5b": (35, 35, 256),
        "mixed_5c": (35, 35, 288),
        "mixed_5d": (35, 35, 288),
        **dict.fromkeys(("mixed_6a", "mixed_6b", "mixed_6c", "mixed_6d", "mixed_6e"), (17, 17, 768)),
        "mixed_7a": (8, 8, 1280),
        **dict.fromkeys(("mixed_7b", "mixed_7c"), (8, 8, 2048)),
    }


def test_published_counts() -> None:
    keras = outline(KERAS)
    assert count(keras) == KERAS.published["parameters"] == 23_817_352
    norms = [m for m in keras.modules() if isinstance(m, nn.BatchNorm2d)]
    assert count(keras) + sum(2 * m.num_features for m in norms) == 23_851_784  # with running statistics
    assert count(outline(KERAS, norm_scale=True)) == 23_834_568
    assert count(outline(TORCHVISION)) == TORCHVISION.published["parameters"] == 27_161_264
    assert count(outline(TORCHVISION, auxiliary=False)) == 23_834_568
    assert count(outline(KERAS_2016)) == KERAS_2016.published["parameters"] == 23_626_728


@pytest.mark.parametrize(
    "undone",
    [
        {"conv_bias": False},
        {"norm_scale": False},
        {"pool_projections": (32, 64, 64)},
        {"last_7x7_reduce": 192},
    ],
    ids=lambda undone: next(iter(undone)),
)
def test_the_papers_count_takes_each_difference(undone: dict[str, Any]) -> None:
    assert count(outline(KERAS_2016, **undone)) != 23_626_728


def test_normalisation_without_scale_has_the_offset_alone() -> None:
    names = {".".join(name.split(".")[-2:]) for name, _ in outline(KERAS).named_parameters()}
    assert names == {"conv.weight", "norm.bias", "linear.weight", "linear.bias"}


def test_relu_stands_before_the_normalisation_of_2016() -> None:
    x = images(2, 9, channels=32)
    today, then = (network(entry).features.get_submodule("conv_2a") for entry in (KERAS, KERAS_2016))
    for layer in (today, then):
        assert isinstance(layer, ConvNorm)
        nn.init.uniform_(layer.norm.running_mean, 0.1, 0.3)
    torch.testing.assert_close(today(x), today.norm(today.conv(x)).relu())
    torch.testing.assert_close(then(x), then.norm(then.conv(x).relu()))
    assert then(x).min() < 0


def test_numerics_of_the_average_pools() -> None:
    # A constant stays a constant where the padding does not count.
    flat = torch.ones(1, 192, 6, 6)
    tf, torch_ = (network(entry).features.get_submodule("mixed_5b.branch_pool.0") for entry in (KERAS, TORCHVISION))
    torch.testing.assert_close(tf(flat), flat)
    assert torch_(flat)[0, 0, 0].tolist() == pytest.approx([4 / 9, 6 / 9, 6 / 9, 6 / 9, 6 / 9, 4 / 9])


def test_the_tower_is_batch_normalised() -> None:
    tower = outline(TORCHVISION).auxiliary["mixed_6e"]
    assert [n for n, m in tower.named_modules() if isinstance(m, nn.BatchNorm2d)] == [
        "conv.norm",
        "fully_connected.norm",
    ]
    assert network(KERAS).forward_with_auxiliary(images(1, 75))[1] == []


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("numerics", "keras"),
        ("norm_scale", 1),
        ("conv_bias", "no"),
        ("activation_first", None),
        ("auxiliary", "yes"),
        ("pool_projections", (32, 64)),
        ("pool_projections", (32, 64, 0)),
        ("pool_projections", 32),
        ("last_7x7_reduce", 0),
        ("input_size", 74),
        ("dropout", 1.0),
        ("in_channels", 0),
    ],
)
def test_bad_settings_are_refused_by_name(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=option) as error:
        InceptionV3Config(**{option: value})
    assert "\n" not in str(error.value)


def names(ours: InceptionV3) -> dict[str, str]:
    """Our module -> theirs (torchvision's and timm's names are the same)."""
    return {**inception_v3_names(ours.config), "classifier.linear": "fc"}


def test_parity_with_torchvision() -> None:
    theirs = torchvision.models.inception_v3(
        weights=None, aux_logits=True, transform_input=False, init_weights=False, num_classes=50
    )
    randomise(theirs)
    ours = network(TORCHVISION, num_classes=50)
    copy_weights(theirs, ours, names(ours))
    theirs, ours = theirs.double().eval(), ours.double()
    seen = captured(theirs, "Mixed_6e")
    with torch.no_grad():
        x = images(2, 299).double()
        logits, (auxiliary,) = ours.forward_with_auxiliary(x)
        assert_same(logits, theirs(x))
        assert_same(auxiliary, theirs.AuxLogits(seen["Mixed_6e"]))
        x = images(2, 97, 126).double()
        assert_same(ours(x), theirs(x))


def test_parity_with_timm() -> None:
    theirs = timm.create_model("inception_v3", pretrained=False, num_classes=20)
    randomise(theirs)
    ours = network(TORCHVISION, num_classes=20, auxiliary=False)
    copy_weights(theirs, ours, names(ours))
    tf = InceptionV3(replace(ours.config, numerics="tf"))
    tf.load_state_dict(ours.state_dict())
    with torch.no_grad():
        x = images(2, 139, 108).double()
        logits = theirs.double().eval()(x)
        assert_same(ours.double()(x), logits)
        # The comparison sees as little as the padding that average pools count.
        assert (tf.double().eval()(x) - logits).abs().max() > 1e-3 * logits.abs().max()
