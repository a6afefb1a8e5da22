"""What the compiled executor covers: every network of the registry and every option, by name, or why it does not."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import nn

import xception
from xception.errors import ConfigError
from xception.inference.lowering import Uncovered, lower
from xception.models.registry import build_without_storage, get_config
from xception.models.xception import XceptionConfig
from xception.models.xception_aligned import AlignedConfig
from xception.ops import backend

pytest.importorskip("xception._native")

# Every named network, and the reason why the executor does not run it: None where it does.
NETWORKS: dict[str, str | None] = {
    "xception": None,
    "xception_fc": None,
    "xception_small": None,
    "xception41": None,
    "xception41p": None,
    "xception65": None,
    "xception65p": None,
    "xception71": None,
    "alexnet": "TorchvisionBaseline is no Xception",
    "bn_inception": "BNInception is no Xception",
    "bn_inception_caffe": "BNInception is no Xception",
    "googlenet": "InceptionV1 is no Xception",
    "inception_resnet_v2": "TimmBaseline is no Xception",
    "inception_v1": "InceptionV1 is no Xception",
    "inception_v2": "InceptionV2 is no Xception",
    "inception_v3": "InceptionV3 is no Xception",
    "inception_v3_2016": "InceptionV3 is no Xception",
    "inception_v3_torchvision": "InceptionV3 is no Xception",
    "mobilenet_v2": "TorchvisionBaseline is no Xception",
    "resnet152": "TorchvisionBaseline is no Xception",
    "resnet50": "TorchvisionBaseline is no Xception",
    "vgg16": "TorchvisionBaseline is no Xception",
    "inception_v3_small": "InceptionV3 is no Xception",
    "resnet152_small": "ResNet is no Xception",
    "vgg16_small": "VGG is no Xception",
}

# Every option, and values of it; all are covered. `hidden_activations` that the executor lacks run in a torch head.
SHARED: dict[str, tuple[Any, ...]] = {
    "num_classes": (1, 33),
    "pooling": ("max",),
    "fully_connected": ((50,), (17, 40)),
    "hidden_activations": (("elu", "none"), ("gelu", "tanh")),
    "dropout": (0.5,),
    "in_channels": (1, 230),
    "input_size": (96,),
    "output_stride": (4, 8, 16, 32),
    "gradient_checkpointing": (True,),
    "middle_modules": (0, 2),
}
XCEPTION: dict[str, tuple[Any, ...]] = {
    **SHARED,
    "stem": ("small",),
    "stem_stride": (1, 2),
    "stem_widths": ((3, 41),),
    "entry_widths": ((17,), (8, 17, 24, 40)),
    "middle_units": (1, 2),
    "tied_middle": (True,),
    "exit_widths": ((33,), (17, 33)),
    "residual": (False,),
    "intermediate_activation": ("relu", "elu"),
    "numerics": ("torch",),
    "order": ("depthwise_pointwise", "pointwise_depthwise"),
    "segments": (1, 3, 8),
}
ALIGNED: dict[str, tuple[Any, ...]] = {
    **SHARED,
    "entry_widths": ((8, 17), (8, 16, 24, 24)),
    "entry_strides": ((2, 1, 2), (1, 2, 1)),
    "exit_widths": ((17, 33, 40), (24, 24, 24)),
    "norm_eps": (1e-2,),
    "preactivation": (False, True),
}
NARROW: dict[str, Any] = {
    "entry_widths": (8, 17, 24),
    "middle_modules": 1,
    "exit_widths": (33, 40, 48),
    "num_classes": 7,
}
# Each option beside each of these.
XCEPTION_BASES: tuple[dict[str, Any], ...] = ({}, {"order": "pointwise_depthwise"}, {"segments": 5})
ALIGNED_BASES: tuple[dict[str, Any], ...] = ({}, {"preactivation": True})


def test_every_network_and_every_option_has_its_line() -> None:
    assert set(NETWORKS) == set(xception.list_models())
    assert set(XCEPTION) == {field.name for field in fields(XceptionConfig)}
    assert set(ALIGNED) == {field.name for field in fields(AlignedConfig)}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str) -> None:
    if name == "inception_resnet_v2":
        pytest.importorskip("timm")
    reason = NETWORKS[name]
    if reason is not None:  # which does not depend on weights
        model = build_without_storage(name, get_config(name))
        with pytest.raises(Uncovered) as uncovered:
            lower(model, backend.new_network("fp32", 3, 1))
        assert str(uncovered.value) == reason
        return
    middle = {} if name == "xception_small" else {"middle_modules": 1}
    _check(name, middle, 64)


@pytest.mark.parametrize("name", XCEPTION)
def test_options(name: str) -> None:
    for value in XCEPTION[name]:
        for base in XCEPTION_BASES:
            options = {**NARROW, **base, **_with(name, value)}
            if options.get("segments") and options.get("order") == "depthwise_pointwise":
                continue  # the config refuses it
            _check("xception", options, 33 if options.get("stem") == "small" else 52)


@pytest.mark.parametrize("name", ALIGNED)
def test_options_of_the_aligned(name: str) -> None:
    for value in ALIGNED[name]:
        for base in ALIGNED_BASES:
            options = {**NARROW, **base, **_with(name, value)}
            if name == "entry_widths":
                options["entry_strides"] = (2, 1, 2, 2)[: len(value)]
            _check("xception41", options, 52)


def _with(name: str, value: Any) -> dict[str, Any]:
    """The option, and what it makes no sense without."""
    return {name: value, **({"fully_connected": (20, 30)} if name == "hidden_activations" else {})}


def _check(name: str, options: dict[str, Any], size: int) -> None:
    torch.manual_seed(0)
    model = xception.create_model(name, **options).eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, -1.3, 1.3)  # negative factors too
            nn.init.normal_(norm.bias, 0, 0.1)
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 1.5)
    x = torch.randn(2, model.config.in_channels, size, size + 5)  # type: ignore[union-attr, arg-type]
    compiled = xception.compile(model, num_threads=1, backend="native")
    with torch.no_grad():
        features = model.forward_features(x)  # type: ignore[operator]
        for found, expected in ((compiled(x), model(x)), (compiled(x, "features"), features)):
            scale = float(expected.abs().max())
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * scale, msg=lambda m: f"{options}: {m}")


def test_what_the_executor_has_no_size_for_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """13 modules without a stride dilate by 4,096 and more."""
    options = {**NARROW, "entry_widths": (2,) * 13, "stem": "small", "stem_stride": 1, "output_stride": 1}
    model = xception.create_model("xception", **options)
    with pytest.raises(ConfigError, match="does not cover this network here: stride or dilation out of range"):
        xception.compile(model, backend="native")
