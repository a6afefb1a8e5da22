"""VGG, ResNet and Inception v3 at any width: the published networks where the width is the published one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torchvision import models as torchvision

from xception.errors import ConfigError
from xception.models.inception_layers import Conv, Pool, scaled
from xception.models.inception_v3 import InceptionV3, InceptionV3Config
from xception.models.registry import create_model, describe
from xception.models.resnet import ResNet, ResNetConfig
from xception.models.vgg import VGG, VGGConfig


def layers(model: nn.Module) -> list[nn.Module]:
    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)
    return [module for module in model.modules() if isinstance(module, kinds)]


def copy_layers(source: nn.Module, target: nn.Module) -> None:
    """The layers of one network into another that has the same ones in the same order."""
    there, here = layers(source), layers(target)
    assert len(there) == len(here)
    for theirs, ours in zip(there, here, strict=True):
        ours.load_state_dict(theirs.state_dict())


def test_at_width_64_it_is_torchvisions_resnet() -> None:
    torch.manual_seed(0)
    blocks = (1, 2, 2, 1)
    theirs: Any = torchvision.ResNet(torchvision.resnet.Bottleneck, list(blocks), num_classes=5)
    for norm in theirs.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_mean, -0.5, 0.5)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    ours = ResNet(ResNetConfig(num_classes=5, blocks=blocks))
    copy_layers(theirs, ours)
    images = torch.randn(2, 3, 65, 70)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))


def test_resnet_152_has_the_published_parameters() -> None:
    with torch.device("meta"):
        model = ResNet(ResNetConfig())
    assert sum(p.numel() for p in model.parameters()) == 60_192_808
    # 1 + 3 x 50 convolutions on the way and the linear layer; four shortcuts are beside it.
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == 151 + 4


def test_vggs_convolutions_are_torchvisions() -> None:
    torch.manual_seed(0)
    theirs: Any = torchvision.vgg16(num_classes=3, init_weights=True)
    ours = VGG(VGGConfig(num_classes=3))
    copy_layers(theirs.features, ours.features)
    images = torch.randn(1, 3, 40, 33)
    with torch.no_grad():
        torch.testing.assert_close(ours.forward_features(images), theirs.features(images))
    assert sum(p.numel() for p in ours.features.parameters()) == 14_714_688


def test_inception_v3_at_width_1_is_as_it_was_and_at_others_scaled() -> None:
    assert describe("inception_v3").parameters == describe("inception_v3", width=1.0).parameters == 23_817_352
    half, whole = (describe("inception_v3", width=width, num_classes=10) for width in (0.5, 1.0))
    assert 3.6 < whole.parameters / half.parameters < 4.2
    assert scaled({"a": (Conv(10, 3), Pool("max"))}, 0.25) == {"a": [Conv(2, 3), Pool("max")]}
    assert scaled(Conv(3), 0.01) == Conv(1)


def test_the_small_stem_halves_the_map_once() -> None:
    with torch.device("meta"):
        model = InceptionV3(InceptionV3Config(stem="small", width=0.125, input_size=32))
        features = model.forward_features(torch.empty(1, 3, 32, 32))
    assert features.shape == (1, 256, 3, 3)
    assert [info["reduction"] for info in model.feature_info] == [2, 4, 8]


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("vgg16_small", {"widths": (8, 8)}, "convolutions must be one number for each of 2 widths; got 5"),
        ("vgg16_small", {"widths": (8, 0, 8, 8, 8)}, "each of widths"),
        ("vgg16_small", {"input_size": 31}, "input_size must be at least 32; got 31"),
        ("resnet152_small", {"stem_width": 0}, "stem_width must be from 1"),
        ("resnet152_small", {"blocks": (1,)}, "blocks must be one number for each of 4 widths; got 1"),
        ("resnet152_small", {"stem": "valid"}, "stem must be 'published' or 'small'"),
        ("inception_v3", {"width": 0.0}, "width must be above 0, at most 8; got 0"),
        ("inception_v3", {"width": float("nan")}, "width must be above 0, at most 8; got nan"),
    ],
)
def test_wrong_widths_are_refused(name: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        create_model(name, **options)
