"""The properties that every Inception network has, and the tools to compare one with another library's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from xception.errors import ConfigError
from xception.models.entry import ModelEntry
from xception.models.inception_layers import InceptionNetwork


def network(entry: ModelEntry, **options: Any) -> InceptionNetwork:
    """The network of `entry` with `options`, in evaluation mode, with weights drawn from a fixed seed."""
    return copy.deepcopy(_drawn(entry.build, replace(entry.config, **options)))


@lru_cache(maxsize=2)  # drawing 25 million weights takes longer than most checks
def _drawn(build: Callable[[Any], nn.Module], config: Any) -> InceptionNetwork:
    torch.manual_seed(0)
    model = build(config)
    assert isinstance(model, InceptionNetwork)
    return model.eval()


def outline(entry: ModelEntry, **options: Any) -> InceptionNetwork:
    """As `network`, without weights: for what can be told from shapes, which it gives at no cost."""
    with torch.device("meta"):
        model = entry.build(replace(entry.config, **options))
    assert isinstance(model, InceptionNetwork)
    return model.eval()


def images(count: int, height: int, width: int | None = None, *, channels: int = 3) -> Tensor:
    return torch.randn(count, channels, height, width or height, generator=torch.Generator().manual_seed(1))


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def check_shapes(entry: ModelEntry) -> None:
    """Any number of classes and channels, any size from the minimum on, square or not; below it, one clear line."""
    model = network(entry, num_classes=7, in_channels=2)
    side = model.config.minimum_size
    with torch.no_grad():
        for height, width in ((side, side), (side + 34, side + 1), (side, side + 67)):
            x = images(2, height, width, channels=2)
            logits, auxiliary = model.forward_with_auxiliary(x)
            assert logits.shape == (2, 7)
            assert [a.shape for a in auxiliary] == [(2, 7)] * len(model.auxiliary)
            assert torch.isfinite(torch.stack([logits, *auxiliary])).all()
            torch.testing.assert_close(model(x), logits, rtol=0, atol=0)
    for wrong in ((2, 2, side - 1, side), (2, 2, side, side - 1), (2, 3, side, side), (2, side, side)):
        with pytest.raises(ConfigError, match="expected") as error:
            model(torch.zeros(wrong))
        assert "\n" not in str(error.value)
        with pytest.raises(ConfigError, match="expected"):
            model.forward_with_auxiliary(torch.zeros(wrong))


def check_minimum(entry: ModelEntry) -> None:
    """At the stated minimum one pixel is left, and below it some stage has none: it is as small as can be."""
    model = network(entry, num_classes=7)
    side = model.config.minimum_size
    with torch.no_grad():
        assert model.features(images(1, side)).shape[2:] == (1, 1)
        with pytest.raises(RuntimeError):
            model.features(images(1, side - 1))


def check_features(entry: ModelEntry) -> None:
    """Features and head make up the network; `feature_info` tells channels and reduction of the modules it names."""
    model = network(entry, num_classes=7)
    seen: dict[str, Tensor] = {}
    for info in model.feature_info:
        model.get_submodule(info["module"]).register_forward_hook(
            lambda _module, _inputs, output, name=info["module"]: seen.__setitem__(name, output)
        )
    side = model.config.minimum_size + 6
    with torch.no_grad():
        x = images(2, side)
        features = model.forward_features(x)
        pooled = model.forward_head(features, pre_logits=True)
        torch.testing.assert_close(model.forward_head(features), model(x), rtol=0, atol=0)
        torch.testing.assert_close(pooled, features.mean(dim=(2, 3)))
        torch.testing.assert_close(model.classifier.linear(pooled), model(x))
        sizes = {name: output.shape for name, output in seen.items()}
        model(images(2, side + 64, side + 32))
    assert [info["reduction"] for info in model.feature_info] == [2, 4, 8, 16, 32]
    assert features.shape[1] == model.num_features == model.feature_info[-1]["channels"]
    for info in model.feature_info:
        before, after = sizes[info["module"]], seen[info["module"]].shape
        assert before[1] == info["channels"]
        # So many more pixels of image are so many more of features, whatever the padding.
        grown = (after[2] - before[2], after[3] - before[3])
        assert grown == (64 // info["reduction"], 32 // info["reduction"])


def check_gradients(entry: ModelEntry) -> None:
    """Every parameter gets a gradient through `forward_with_auxiliary`; through `forward`, all but the auxiliary."""
    model = network(entry, num_classes=7)
    side = model.config.minimum_size + 48
    logits, auxiliary = model.forward_with_auxiliary(images(2, side))
    sum(((a * torch.linspace(-1.0, 2.0, 7)).sum() for a in [logits, *auxiliary]), torch.zeros(())).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name
    model.zero_grad()
    model(images(1, side)).sum().backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {name for name, _ in model.named_parameters() if name.startswith("auxiliary.")}


def check_dropout(entry: ModelEntry) -> None:
    """The rate acts on the head in training, and nothing is random in evaluation."""
    model = network(entry, num_classes=7, dropout=0.5)
    features = torch.rand(4, model.num_features, 2, 2)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_head(features), model.forward_head(features), rtol=0, atol=0)
        expected = model.forward_head(features)
        model.classifier.train()
        drawn = torch.stack([model.forward_head(features) for _ in range(400)])
        assert not torch.equal(drawn[0], drawn[1])
        # Dropping keeps the expectation: the mean of the draws is near, within their spread over sqrt(400).
        assert ((drawn.mean(0) - expected).abs() < 6 * drawn.std(0) / 20).all()


def check_sharing(entry: ModelEntry) -> None:
    """No stage, and no branch of one, changes its input: others read the same tensor."""
    model = network(entry, num_classes=7)
    kept: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def keep(module: nn.Module, inputs: tuple[Tensor]) -> None:
        kept[module] = (inputs[0], inputs[0].clone())

    def compare(module: nn.Module, _inputs: Any, _output: Any) -> None:
        x, before = kept.pop(module)
        assert torch.equal(x, before), module

    compared = 0
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.ReLU | nn.Sequential | nn.ModuleDict):
            module.register_forward_pre_hook(keep)
            module.register_forward_hook(compare)
            compared += 1
    model.train()
    with torch.no_grad():
        model.forward_with_auxiliary(images(2, model.config.minimum_size + 10))
    assert compared > 50
    assert not kept


def check_evaluation(entry: ModelEntry) -> None:
    """In evaluation an image's logits depend on that image alone, and on nothing random."""
    model = network(entry, num_classes=7)
    x = images(3, model.config.minimum_size + 20)
    with torch.no_grad():
        together = model(x)
        torch.testing.assert_close(model(x), together, rtol=0, atol=0)
        alone = torch.cat([model(x[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[0], together[1], rtol=1e-3)


EVERY_CHECK = (
    check_shapes,
    check_minimum,
    check_features,
    check_gradients,
    check_dropout,
    check_sharing,
    check_evaluation,
)


def randomise(model: nn.Module) -> None:
    """Weights that keep the signal's size, and batch normalisation that does something, statistics included."""
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.5, 1.5),
                (module.bias, -0.2, 0.2),
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 1.5),
            ):
                assert tensor is not None
                nn.init.uniform_(tensor, low, high, generator=generator)


def copy_weights(source: nn.Module, target: nn.Module, modules: Mapping[str, str]) -> None:
    """Copy the tensors of `source` into `target`; `modules` maps the names of our modules to the other's.

    Each tensor of either side is used exactly once.
    """
    theirs, ours = source.state_dict(), {}
    for our_module, their_module in modules.items():
        for name in [n for n in theirs if n.startswith(f"{their_module}.")]:
            tail = name.removeprefix(f"{their_module}.")
            ours[f"{our_module}.{tail}"] = theirs.pop(name)
    assert not theirs, sorted(theirs)
    target.load_state_dict(ours, strict=True)


def captured(model: nn.Module, *names: str) -> dict[str, Tensor]:
    """A dictionary that the next forward passes of `model` fill with the outputs of the modules called `names`."""
    outputs: dict[str, Tensor] = {}
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: outputs.__setitem__(name, output)
        )
    return outputs


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """Equal to 1e-9 of the largest (the comparison is in float64), and different from one image to the next."""
    scale = theirs.abs().max()
    assert (ours - theirs).abs().max() <= 1e-9 * scale
    assert (theirs[0] - theirs[1]).abs().max() > 1e-3 * scale


def table_of_sizes(model: InceptionNetwork, side: int) -> dict[str, tuple[int, int, int]]:
    """Stage -> H, W, C of its output in an `outline`, for an image of `side`."""
    x, sizes = torch.empty(1, model.config.in_channels, side, side, device="meta"), {}
    for name, stage in model.features.named_children():
        x = stage(x)
        sizes[name] = (x.shape[2], x.shape[3], x.shape[1])
    return sizes
