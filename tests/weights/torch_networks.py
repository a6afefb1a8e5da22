"""The networks of timm and torchvision whose weights we read and write, with weights that nothing is special about."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn

from xception.weights.foreign import ForeignFile, ImportReport, Recognised, import_tensors
from xception.weights.names_torch import recognise_torch
from xception.weights.torch_file import read_torch_file


def _timm(name: str, **options: Any) -> Callable[[int], nn.Module]:
    return lambda classes: timm.create_model(name, pretrained=False, num_classes=classes, **options)


def _torchvision(name: str, **options: Any) -> Callable[[int], nn.Module]:
    options = {"transform_input": False, "init_weights": False, **options}
    return lambda classes: torchvision.models.get_model(name, weights=None, num_classes=classes, **options)


# Format as it is recognised -> how to make it.
NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "timm legacy_xception": _timm("legacy_xception"),
    **{
        f"timm {name}": _timm(name) for name in ("xception41", "xception65", "xception71", "xception41p", "xception65p")
    },
    "timm inception_v3": _timm("inception_v3"),
    "torchvision inception_v3": _torchvision("inception_v3", aux_logits=True),
    "torchvision googlenet": _torchvision("googlenet", aux_logits=True),
}


def randomise(model: nn.Module, size: int = 96) -> nn.Module:
    """A network as if trained: its normalisations know their inputs, so that its answer depends on the image.

    Scales, offsets, statistics and counters are all different from a fresh network's. In evaluation mode.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.7, 1.3)
        nn.init.normal_(norm.bias, 0, 0.1)
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(images(size))
        for norm in norms:
            norm.momentum = 0.1
            norm.running_mean += 0.1 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
            norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.8, 1.2)
            norm.num_batches_tracked.fill_(123)
    return model.eval()


def foreign(name: str, classes: int = 5) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.manual_seed(0)
        return randomise(NETWORKS[name](classes), size=299 if name == "torchvision inception_v3" else 96)


def googlenet_state(classes: int = 5) -> dict[str, Tensor]:
    """The smallest of the networks, without its auxiliary classifiers."""
    torch.manual_seed(0)
    return dict(randomise(_torchvision("googlenet", aux_logits=False)(classes)).state_dict())


def saved(path: Path, value: Any, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def imported(path: Path, *, trunk_only: bool = False) -> tuple[nn.Module, ImportReport, Recognised, ForeignFile]:
    file = read_torch_file(path)
    found = recognise_torch(file, trunk_only=trunk_only)
    assert found is not None
    model, report = import_tensors(file, found)
    return model, report, found, file


def images(size: int, channels: int = 3, *, count: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def assert_same_logits(ours: Tensor, theirs: Tensor) -> None:
    """Equal to 1e-4 of the largest; and not because they say nothing."""
    assert torch.isfinite(theirs).all()
    assert len(theirs) == 1 or theirs.std(dim=0).max() > 1e-3 * theirs.abs().max()
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
