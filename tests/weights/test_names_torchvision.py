"""torchvision's VGG-16 and ResNet-152 as files: exact, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision import models as torchvision

from xception.errors import WeightsError
from xception.weights import imports
from xception.weights.catalog import find_checkpoint
from xception.weights.load import load_model


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    model: Any = torchvision.resnet152(num_classes=3)
    path = tmp_path_factory.mktemp("resnet") / "resnet152.pth"
    torch.save(model.state_dict(), path)
    return model.eval(), path


def test_a_state_dict_gives_the_same_logits(resnet: tuple[nn.Module, Path]) -> None:
    theirs, path = resnet
    ours, info = load_model(path)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images))
    assert (info.model, info.preprocess.size, info.preprocess.mean) == ("resnet152", (224, 224), (0.485, 0.456, 0.406))
    trunk = imports.import_weights(path, trunk_only=True)
    assert trunk.fresh == ("network.fc.weight", "network.fc.bias")


@pytest.mark.parametrize("damage", ["missing", "more", "channels", "head"])
def test_other_tensors_are_refused(damage: str, resnet: tuple[nn.Module, Path], tmp_path: Path) -> None:
    tensors = dict(resnet[0].state_dict())
    if damage == "missing":
        del tensors["layer2.1.bn1.bias"]
    elif damage == "more":
        tensors["layer9.weight"] = torch.zeros(3)
    elif damage == "channels":
        tensors["conv1.weight"] = torch.zeros(64, 4, 7, 7)
    else:
        tensors["fc.weight"] = torch.zeros(3)
    path = tmp_path / "changed.pth"
    torch.save(tensors, path)
    with pytest.raises(WeightsError) as refused:
        load_model(path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["vgg16", "resnet152"])
def test_the_catalog_says_what_torchvision_says(name: str) -> None:
    checkpoint = find_checkpoint("imagenet", model=name)
    published = torchvision.get_model_weights(name).IMAGENET1K_V1  # type: ignore[attr-defined]
    assert checkpoint.url == published.url
    figures = published.meta["_metrics"]["ImageNet-1K"]
    assert checkpoint.published == pytest.approx({"top1": figures["acc@1"] / 100, "top5": figures["acc@5"] / 100})
    crop = published.transforms()
    assert checkpoint.preprocess.size == (crop.crop_size[0],) * 2
    assert checkpoint.preprocess.crop_fraction == crop.crop_size[0] / crop.resize_size[0]
    assert list(checkpoint.preprocess.mean) == crop.mean
