"""Other libraries' networks behind our interface give what they give by themselves."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn

from xception.errors import ConfigError
from xception.models.baselines import BaselineConfig, TorchvisionBaseline, baseline_entry
from xception.models.registry import build, config_from_dict, create_model, describe, get_config

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:timm")

# One of each of torchvision's kinds, the lightest.
KINDS = [
    ("alexnet", 70),
    ("convnext_tiny", 40),
    ("densenet121", 40),
    ("efficientnet_b0", 40),
    ("googlenet", 40),
    ("inception_v3", 80),
    ("maxvit_t", 224),
    ("mnasnet0_5", 40),
    ("mobilenet_v2", 40),
    ("mobilenet_v3_small", 40),
    ("regnet_y_400mf", 40),
    ("resnet18", 40),
    ("shufflenet_v2_x0_5", 40),
    ("squeezenet1_1", 40),
    ("swin_t", 40),
    ("vit_b_32", 224),
]


@pytest.mark.parametrize(("architecture", "size"), KINDS)
def test_torchvisions_networks_give_what_they_give_by_themselves(architecture: str, size: int) -> None:
    torch.manual_seed(0)
    model = TorchvisionBaseline(architecture, BaselineConfig(num_classes=6, minimum_size=1)).eval()
    x = torch.randn(1, 3, size, size)
    given = x.clone()
    with torch.no_grad():
        expected = model.network(x)
        features = model.forward_features(x)
        torch.testing.assert_close(model(x), expected)
        pooled = model.forward_head(features, pre_logits=True)
    assert expected.shape == (1, 6)
    assert pooled.dim() == 2
    assert torch.equal(x, given)
    last = [m for m in model.classifier.modules() if isinstance(m, nn.Linear)]
    if last:
        assert pooled.shape[1] == last[-1].in_features


@pytest.mark.parametrize("architecture", ["resnet18", "vgg11", "swin_t", "vit_b_32", "squeezenet1_1", "googlenet"])
def test_dropout_reaches_every_kind_of_classifier(architecture: str) -> None:
    name = f"torchvision/{architecture}"
    model = create_model(name, num_classes=50, dropout=0.9)
    for parameter in model.classifier.parameters():  # torchvision's start at 0 in some networks
        nn.init.normal_(parameter)
    size = model.config.input_size if model.config.fixed_size else 64
    with torch.no_grad():
        features = torch.rand_like(model.eval().forward_features(torch.rand(1, 3, size, size)))
        assert torch.equal(model.forward_head(features), model.forward_head(features))
        model.train()
        assert not torch.equal(model.forward_head(features), model.forward_head(features))


def test_feature_info_comes_from_the_network() -> None:
    model = create_model("resnet50")
    assert model.feature_info == [
        {"module": "network.bn1", "channels": 64, "reduction": 2},
        {"module": "network.layer1.2", "channels": 256, "reduction": 4},
        {"module": "network.layer2.3", "channels": 512, "reduction": 8},
        {"module": "network.layer3.5", "channels": 1024, "reduction": 16},
        {"module": "network.layer4.2", "channels": 2048, "reduction": 32},
    ]
    assert model.num_features == 2048


def test_any_network_of_the_libraries_has_a_name() -> None:
    for name, parameters in (("torchvision/resnet18", 11_689_512), ("timm/resnet18", 11_689_512)):
        description = describe(name)
        assert description.name == name
        assert description.parameters == parameters
        assert description.minimum_size == 8
        config = get_config(name, num_classes=3, in_channels=4)
        assert config_from_dict(name, {"num_classes": 3, "in_channels": 4}) == config
        model = build(name, config).eval()
        assert model(torch.randn(1, 4, 33, 40)).shape == (1, 3)
        assert model.num_features == 512
        assert model.feature_info[-1]["reduction"] == 32


@pytest.mark.parametrize("name", ["torchvision/vit_b_32", "timm/vit_tiny_patch16_224"])
def test_networks_of_one_size_say_so(name: str) -> None:
    model = create_model(name, num_classes=4)
    assert model.config.fixed_size
    with pytest.raises(ConfigError, match="exactly 224x224 pixels, got 224x256"):
        model(torch.zeros(1, 3, 224, 256))
    with pytest.raises(ConfigError, match="input_size is fixed to 224; got 256"):
        get_config(name, input_size=256)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision/resnet", "unknown torchvision network 'resnet': did you mean"),
        ("torchvision/fasterrcnn_resnet50_fpn", "unknown torchvision network"),
        ("torchvision/", "unknown torchvision network ''"),
        ("timm/hf-hub:someone/something", "unknown timm network"),
        ("timm/zzzzzzzz", "unknown timm network 'zzzzzzzz': none of"),
    ],
)
def test_unknown_networks_are_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        create_model(name)
    assert len(str(caught.value)) < 300


def test_a_missing_timm_is_answered_with_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    baseline_entry.cache_clear()
    for name in ("inception_resnet_v2", "timm/resnet18"):
        with pytest.raises(ConfigError, match=r"needs timm: pip install 'xception\[hub\]'"):
            create_model(name)


@pytest.mark.parametrize(
    "options",
    [
        {"dropout": 1.0},
        {"minimum_size": 0},
        {"input_size": 16},
        {"fixed_size": True},
        {"fixed_size": 1},
        {"num_classes": -1},
    ],
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        BaselineConfig(**options)
