"""Inception v2 and BN-Inception: their properties, and the tables of their papers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from inception_checks import EVERY_CHECK, count, images, network, outline, table_of_sizes
from torch import nn

from xception.errors import ConfigError
from xception.models.entry import ModelEntry
from xception.models.inception_v2 import (
    BN_WIDTHS,
    ENTRIES,
    AuxiliaryTower,
    BNInceptionConfig,
    InceptionV2Config,
)

PAPER, BN_PAPER, BN_CAFFE = ENTRIES
WITH_TOWER = replace(PAPER, name="inception_v2 and tower", config=replace(PAPER.config, auxiliary=True))


@pytest.mark.parametrize("check", EVERY_CHECK, ids=lambda check: check.__name__)
@pytest.mark.parametrize("entry", [WITH_TOWER, BN_PAPER, BN_CAFFE], ids=lambda entry: entry.name)
def test_property(entry: ModelEntry, check: Callable[[ModelEntry], None]) -> None:
    check(entry)


def test_the_tower_is_an_option() -> None:
    model = network(PAPER, num_classes=3, stem="7x7")
    logits, auxiliary = model.forward_with_auxiliary(images(1, 75))
    assert logits.shape == (1, 3)
    assert auxiliary == []


@pytest.mark.parametrize("stem", ["3x3x3", "7x7"])
def test_sizes_of_table_1(stem: Any) -> None:
    sizes = table_of_sizes(outline(PAPER, stem=stem), 299)
    first = {"conv_1a": (149, 149, 32), "conv_2a": (147, 147, 32), "conv_2b": (147, 147, 64)}
    assert sizes == {
        **(first if stem == "3x3x3" else {"conv_1a": (147, 147, 64)}),
        "pool_3a": (73, 73, 64),
        "conv_3b": (71, 71, 80),
        "conv_4a": (35, 35, 192),
        "conv_5a": (35, 35, 288),
        **dict.fromkeys(("mixed_5b", "mixed_5c", "mixed_5d"), (35, 35, 288)),
        **dict.fromkeys(("mixed_6a", "mixed_6b", "mixed_6c", "mixed_6d", "mixed_6e", "mixed_6f"), (17, 17, 768)),
        "mixed_7a": (8, 8, 1280),
        **dict.fromkeys(("mixed_7b", "mixed_7c"), (8, 8, 2048)),
    }


def test_modules_are_those_of_the_figures() -> None:
    kernels: dict[str, list[tuple[int, ...]]] = {}
    for name, module in outline(PAPER).named_modules():
        if isinstance(module, nn.Conv2d):
            kernels.setdefault(name.split(".")[1], []).append(module.kernel_size)
    figure_5 = [(1, 1), (1, 1), (3, 3), (1, 1), (3, 3), (3, 3), (1, 1)]
    assert kernels["mixed_5b"] == kernels["mixed_5c"] == kernels["mixed_5d"] == figure_5
    figure_6 = [(1, 1), (1, 1), (1, 7), (7, 1), (1, 1), (1, 7), (7, 1), (1, 7), (7, 1), (1, 1)]
    assert [kernels[f"mixed_6{letter}"] for letter in "bcdef"] == [figure_6] * 5
    figure_7 = [(1, 1), (1, 1), (1, 3), (3, 1), (1, 1), (3, 3), (1, 3), (3, 1), (1, 1)]
    assert kernels["mixed_7b"] == kernels["mixed_7c"] == figure_7


def test_batch_normalisation_in_the_tower() -> None:
    def norms(**options: Any) -> list[str]:
        tower = outline(PAPER, auxiliary=True, **options).auxiliary["mixed_6f"]
        return [name for name, module in tower.named_modules() if isinstance(module, nn.BatchNorm2d)]

    assert norms() == []
    assert norms(auxiliary_norm="convolution") == ["conv.norm"]


def test_the_tower_reads_all_of_any_grid() -> None:
    tower = network(PAPER, auxiliary=True, num_classes=4).auxiliary["mixed_6f"]
    assert isinstance(tower, AuxiliaryTower)
    published = images(1, 17, channels=768)
    pooled = F.avg_pool2d(published, 5, stride=3)
    assert pooled.shape[2:] == (5, 5)
    expected = tower.classifier(tower.fully_connected(tower.conv(pooled)))
    torch.testing.assert_close(tower(published), expected)
    for height, width in ((1, 1), (3, 17), (16, 9), (17, 17), (23, 20)):
        x = images(1, height, width, channels=768).requires_grad_()
        tower(x).square().sum().backward()
        assert x.grad is not None
        assert x.grad.abs().sum((0, 1)).ne(0).float().mean() > 0.7  # a valid stride-3 pool may leave an edge unread


def test_sizes_of_bn_figure_5() -> None:
    sizes = table_of_sizes(outline(BN_PAPER, projection_4cd=96), 224)
    assert sizes["conv_1"] == (112, 112, 64)
    assert sizes["pool_1"] == (56, 56, 64)
    assert sizes["conv_2"] == (56, 56, 192)
    assert sizes["pool_2"] == (28, 28, 192)
    printed = {
        "3a": (28, 256),
        "3b": (28, 320),
        "3c": (14, 576),
        "4a": (14, 576),
        "4b": (14, 576),
        "4c": (14, 576),
        "4d": (14, 576),
        "4e": (7, 1024),
        "5a": (7, 1024),
        "5b": (7, 1024),
    }
    assert {name: sizes[f"inception_{name}"] for name in printed} == {
        name: (side, side, width) for name, (side, width) in printed.items()
    }
    assert len(BN_WIDTHS) == len(printed)
    # With the projections that the figure prints, (4c) and (4d) have 32 channels more than its sizes.
    sizes = table_of_sizes(outline(BN_PAPER), 224)
    assert sizes["inception_4d"] == (14, 14, 608)
    assert sizes["inception_4e"] == (7, 7, 1056)


def test_counts() -> None:
    caffe = outline(BN_CAFFE)
    assert count(caffe) == BN_CAFFE.published["parameters"] == 11_295_240
    outputs = sum(m.out_channels for m in caffe.modules() if isinstance(m, nn.Conv2d))
    assert count(outline(BN_CAFFE, conv_bias=False)) == 11_295_240 - outputs
    separable = 3 * 8 * 49 + 24 * 64
    assert count(outline(BN_PAPER)) == 11_295_240 - outputs - 3 * 49 * 64 + separable
    # Our choice of widths, and the stem that it leaves: 32, 32 and 64 filters of 3x3 against 64 of 7x7.
    assert count(outline(PAPER)) == 25_954_248
    three = 9 * (3 * 32 + 32 * 32 + 32 * 64) + 2 * (32 + 32 + 64)
    assert count(outline(PAPER, stem="7x7")) == 25_954_248 - three + 49 * 3 * 64 + 2 * 64


def test_separable_stem_is_one_convolution_of_merged_filters() -> None:
    stem = network(BN_PAPER).features.get_submodule("conv_1")
    depthwise, pointwise = stem.get_submodule("0"), stem.get_submodule("1")
    assert isinstance(depthwise, nn.Conv2d)
    assert depthwise.weight.shape == (3 * 8, 1, 7, 7)
    merged = torch.einsum("om,mij->omij", pointwise.conv.weight[:, :, 0, 0], depthwise.weight[:, 0])
    filters = merged.unflatten(1, (3, 8)).sum(2)
    x = images(2, 21, 18)
    expected = pointwise.act(pointwise.norm(F.conv2d(x, filters, stride=2, padding=3)))
    torch.testing.assert_close(stem(x), expected, rtol=1e-4, atol=1e-5)


def test_reductions_pass_their_input_through() -> None:
    module = network(BN_PAPER).features.get_submodule("inception_3c")
    for height, width in ((28, 28), (9, 4), (1, 2)):
        x = images(1, height, width, channels=320)
        y = module(x)
        assert y.shape == (1, 160 + 96 + 320, -(-height // 2), -(-width // 2))
        assert torch.isin(y[:, 256:], x).all()
        assert y[:, 256:].amax() == x.amax()


def test_average_pools_count_the_padding_only_in_caffes() -> None:
    # A constant stays a constant where the padding does not count.
    flat = torch.ones(1, 192, 6, 6)
    pools = [network(e).features.get_submodule("inception_3a.branch_pool.0") for e in (BN_PAPER, BN_CAFFE)]
    torch.testing.assert_close(pools[0](flat), flat)
    assert pools[1](flat)[0, 0, 0].tolist() == pytest.approx([4 / 9, 6 / 9, 6 / 9, 6 / 9, 6 / 9, 4 / 9])


def test_epsilon_of_the_normalisation() -> None:
    for entry, eps in ((PAPER, 1e-3), (BN_PAPER, 1e-3), (BN_CAFFE, 1e-5)):
        assert {m.eps for m in outline(entry).modules() if isinstance(m, nn.BatchNorm2d)} == {eps}


@pytest.mark.parametrize(
    ("config", "option", "value"),
    [
        (InceptionV2Config, "stem", "5x5"),
        (InceptionV2Config, "auxiliary", None),
        (InceptionV2Config, "auxiliary_norm", "batch"),
        (InceptionV2Config, "input_size", 74),
        (InceptionV2Config, "dropout", -0.5),
        (BNInceptionConfig, "stem", "3x3x3"),
        (BNInceptionConfig, "projection_4cd", 0),
        (BNInceptionConfig, "count_padding", "yes"),
        (BNInceptionConfig, "conv_bias", 0),
        (BNInceptionConfig, "norm_eps", 0.0),
        (BNInceptionConfig, "input_size", 6),
        (BNInceptionConfig, "num_classes", -1),
    ],
)
def test_bad_settings_are_refused_by_name(config: Callable[..., Any], option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=option) as error:
        config(**{option: value})
    assert "\n" not in str(error.value)
