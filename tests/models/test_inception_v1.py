"""GoogLeNet: its properties, the paper's network, and torchvision's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from inception_checks import (
    EVERY_CHECK,
    assert_same,
    captured,
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
from xception.models.inception_layers import Conv, Layer, pool_to_grid
from xception.models.inception_v1 import ENTRIES, WIDTHS, InceptionV1Config, stages
from xception.weights.names_inception import googlenet_names

PAPER, TORCHVISION = ENTRIES


@pytest.mark.parametrize("check", EVERY_CHECK, ids=lambda check: check.__name__)
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_property(entry: ModelEntry, check: Callable[[ModelEntry], None]) -> None:
    check(entry)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_pool_to_grid_reads_every_pixel_and_keeps_the_mean_of_a_constant(h: int, w: int, side: int) -> None:
    x = torch.ones(1, 1, h, w, requires_grad=True)
    y = pool_to_grid(x, side)
    torch.testing.assert_close(y, torch.ones(1, 1, side, side))
    y.sum().backward()
    assert x.grad is not None
    assert (x.grad > 0).all()
    assert x.grad.sum().item() == pytest.approx(side * side)


def test_pool_to_grid_is_the_papers_pool_at_the_papers_size() -> None:
    x = images(1, 14)
    torch.testing.assert_close(pool_to_grid(x, 4), F.avg_pool2d(x, 5, stride=3))
    assert not torch.allclose(pool_to_grid(x, 4), F.adaptive_avg_pool2d(x, 4))


def test_sizes_of_table_1() -> None:
    sizes = table_of_sizes(outline(PAPER), 224)
    assert {name: sizes[name] for name in ("conv_1", "pool_1", "conv_2", "pool_2", "pool_3", "pool_4")} == {
        "conv_1": (112, 112, 64),
        "pool_1": (56, 56, 64),
        "conv_2": (56, 56, 192),
        "pool_2": (28, 28, 192),
        "pool_3": (14, 14, 480),
        "pool_4": (7, 7, 832),
    }
    grids = {"3": 28, "4": 14, "5": 7}
    channels = {"3a": 256, "3b": 480, "4a": 512, "4b": 512, "4c": 512, "4d": 528, "4e": 832, "5a": 832, "5b": 1024}
    for name, width in channels.items():
        side = grids[name[0]]
        assert sizes[f"inception_{name}"] == (side, side, width)
    assert len(WIDTHS) == len(channels)


def test_published_network_is_built_of_what_the_paper_names() -> None:
    model = outline(PAPER)
    order = list(dict(model.features.named_children()))
    assert order[:8] == ["conv_1", "pool_1", "norm_1", "conv_2_reduce", "conv_2", "norm_2", "pool_2", "inception_3a"]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert all(m.bias is not None for m in convolutions)
    assert sum(m.kernel_size == (5, 5) for m in convolutions) == 9
    assert list(model.auxiliary) == ["inception_4a", "inception_4d"]
    # Section 5 counts 22 layers with parameters: on the longest way, and the linear layer.
    assert sum(map(depth, stages(InceptionV1Config()).values())) + 1 == 22


def depth(layer: Layer) -> int:
    """Convolutions on the longest way through `layer`."""
    if isinstance(layer, Mapping):
        return max(sum(map(depth, branch)) for branch in layer.values())
    return int(isinstance(layer, Conv))


def test_counts() -> None:
    main = outline(PAPER, auxiliary=False)
    assert count(main) == PAPER.published["parameters_without_auxiliary"] == 6_998_552
    assert count(outline(PAPER)) == 13_378_280  # Caffe's, with both auxiliary classifiers
    assert count(outline(TORCHVISION)) == TORCHVISION.published["parameters"] == 13_004_888
    assert count(outline(TORCHVISION, auxiliary=False)) == 6_624_904
    # From Table 1 and its widths alone: weights and biases of each convolution, then the linear layer.
    total, channels = 64 * (3 * 49 + 1) + 64 * (64 + 1) + 192 * (64 * 9 + 1), 192
    for one, three_reduce, three, five_reduce, five, projection in WIDTHS.values():
        total += (one + three_reduce + five_reduce + projection) * (channels + 1)
        total += three * (9 * three_reduce + 1) + five * (25 * five_reduce + 1)
        channels = one + three + five + projection
    assert total + 1000 * (channels + 1) == count(main)


def test_local_response_normalisation_by_its_formula() -> None:
    model = network(PAPER)
    x = 30 * images(1, 3, channels=64)
    y = model.features.get_submodule("norm_1")(x)
    for channel in (0, 1, 17, 63):
        near = x[:, max(0, channel - 2) : channel + 3]
        expected = x[:, channel] / (1 + 1e-4 / 5 * near.square().sum(1)) ** 0.75
        torch.testing.assert_close(y[:, channel], expected)
    assert not torch.allclose(x, y, rtol=1e-3)


def test_options_change_what_they_name() -> None:
    assert list(outline(PAPER, auxiliary=False).auxiliary) == []
    assert network(PAPER, auxiliary=False).forward_with_auxiliary(images(1, 31))[1] == []
    assert "norm_1" not in dict(outline(PAPER, norm="none").features.named_children())
    assert all(m.bias is not None for m in outline(PAPER, norm="none").modules() if isinstance(m, nn.Conv2d))
    norms = [m for m in outline(TORCHVISION).modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 3 + 6 * 9 + 2
    assert {m.eps for m in norms} == {1e-3}


def test_auxiliary_dropout_acts_in_training_only() -> None:
    tower = network(PAPER, num_classes=6).auxiliary["inception_4a"]
    x = images(2, 14, channels=512).relu()
    assert torch.equal(tower(x), tower(x))
    tower.train()
    assert not torch.equal(tower(x), tower(x))
    still = network(PAPER, num_classes=6, auxiliary_dropout=0.0).auxiliary["inception_4a"].train()
    assert torch.equal(still(x), still(x))


def test_first_weights_neither_blow_up_nor_vanish() -> None:
    # Nothing but the first weights holds the published network's signal.
    with torch.no_grad():
        logits, auxiliary = network(PAPER).forward_with_auxiliary(images(2, 96))
    for scores in (logits, *auxiliary):
        assert 0.05 < scores.std() < 3
        assert scores.mean(1).abs().max() < 1


def test_published_network_learns() -> None:
    model = network(PAPER, num_classes=4, auxiliary_dropout=0.0).train()
    prototypes = F.interpolate(images(4, 6), size=48, mode="bilinear")
    optimiser = torch.optim.SGD(model.parameters(), lr=0.003, momentum=0.9)
    losses = []
    for _ in range(20):
        logits, auxiliary = model.forward_with_auxiliary(prototypes)
        scores = [F.cross_entropy(a, torch.arange(4)) for a in (logits, *auxiliary)]
        optimiser.zero_grad()
        (scores[0] + 0.3 * scores[1] + 0.3 * scores[2]).backward()
        optimiser.step()
        losses.append(scores[0].item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("num_classes", 0),
        ("num_classes", True),
        ("in_channels", 1.5),
        ("dropout", 1.0),
        ("dropout", float("nan")),
        ("input_size", 30),
        ("auxiliary", 1),
        ("auxiliary_dropout", -0.1),
        ("auxiliary_pool", "max"),
        ("norm", "layer"),
        ("large_kernel", 7),
        ("large_kernel", 5.0),
        ("last_pool", "3"),
    ],
)
def test_bad_settings_are_refused_by_name(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=option) as error:
        InceptionV1Config(**{option: value})
    assert "\n" not in str(error.value)


def test_parity_with_torchvision() -> None:
    theirs = torchvision.models.googlenet(
        weights=None, aux_logits=True, transform_input=False, init_weights=False, num_classes=50
    )
    randomise(theirs)
    ours = network(TORCHVISION, num_classes=50)
    copy_weights(theirs, ours, {**googlenet_names(ours.config), "classifier.linear": "fc"})
    theirs, ours = theirs.double().eval(), ours.double()
    seen = captured(theirs, "inception4a", "inception4d")
    with torch.no_grad():
        for height, width in ((224, 224), (131, 98)):
            x = images(2, height, width).double()
            logits, auxiliary = ours.forward_with_auxiliary(x)
            assert_same(logits, theirs(x))
            assert_same(auxiliary[0], theirs.aux1(seen["inception4a"]))
            assert_same(auxiliary[1], theirs.aux2(seen["inception4d"]))


@pytest.mark.parametrize(("option", "value", "moved"), [("last_pool", 3, 0), ("auxiliary_pool", "strided", 1)])
def test_parity_would_miss_no_option_without_weights(option: str, value: Any, moved: int) -> None:
    x = images(2, 96)
    base = network(TORCHVISION, num_classes=5)
    other = network(TORCHVISION, num_classes=5, **{option: value})
    other.load_state_dict(base.state_dict())
    with torch.no_grad():
        (a, a_auxiliary), (b, b_auxiliary) = base.forward_with_auxiliary(x), other.forward_with_auxiliary(x)
    pairs = [(a, b), (a_auxiliary[0], b_auxiliary[0])]
    assert not torch.allclose(*pairs[moved], rtol=1e-3)
    torch.testing.assert_close(*pairs[1 - moved])
