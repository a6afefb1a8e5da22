"""Aligned Xception against timm's, whose weights are DeepLab's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from xception.errors import ConfigError
from xception.models.registry import create_model
from xception.models.xception_aligned import AlignedConfig, XceptionAligned
from xception.weights.names_aligned import aligned_names

NARROW: dict[str, Any] = {
    "num_classes": 5,
    "entry_widths": (8, 10, 12),
    "middle_modules": 2,
    "exit_widths": (14, 16, 18),
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def narrow(**options: Any) -> XceptionAligned:
    return XceptionAligned(AlignedConfig(**{**NARROW, **options}))


def randomise(model: nn.Module) -> nn.Module:
    """Batch statistics, scales and offsets that are not the identity; evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return model.eval()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "output_stride"),
    [
        ("xception41", None),
        ("xception65", None),
        ("xception71", None),
        ("xception41p", None),
        ("xception65p", None),
        ("xception41", 16),
        ("xception41p", 8),  # not 71 at 8: where dilation replaces a stride, timm also drops a shortcut's weights
    ],
)
def test_it_equals_timms(name: str, output_stride: int | None) -> None:
    import timm

    theirs = timm.create_model(name, pretrained=False, num_classes=11, in_chans=2, output_stride=output_stride or 32)
    ours = create_model(name, num_classes=11, in_channels=2, output_stride=output_stride).eval()
    randomise(theirs)
    names, state, used = {**aligned_names(ours.config), "classifier.linear": "head.fc"}, {}, set()
    for key in ours.state_dict():
        prefix, _, leaf = key.rpartition(".")
        used.add(f"{names[prefix]}.{leaf}")
        state[key] = theirs.state_dict()[f"{names[prefix]}.{leaf}"]
    assert used == set(theirs.state_dict())
    ours.load_state_dict(state)
    x = torch.randn(1, 2, 97, 70)
    with torch.no_grad():
        expected = theirs.forward_features(x)
        features = ours.forward_features(x)
        scale = expected.abs().max().item()
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5 * scale)
        logits = theirs.forward_head(expected)
        torch.testing.assert_close(ours(x), logits, rtol=1e-4, atol=1e-4 * logits.abs().max().item())


@pytest.mark.parametrize("preactivation", [False, True])
@pytest.mark.parametrize("output_stride", [16, 8])
def test_output_stride_keeps_every_value_of_the_strided_network(preactivation: bool, output_stride: int) -> None:
    strided = randomise(narrow(preactivation=preactivation)).double()
    dense = narrow(preactivation=preactivation, output_stride=output_stride).double().eval()
    dense.load_state_dict(strided.state_dict())
    for size in ((64, 96), (67, 81)):
        x = torch.randn(1, 3, *size, dtype=torch.float64)
        expected, features = strided.forward_features(x), dense.forward_features(x)
        step = 32 // output_stride
        torch.testing.assert_close(features[:, :, ::step, ::step], expected)
    assert dense.feature_info[-1] == {"module": "exit_flow", "channels": 18, "reduction": output_stride}


@pytest.mark.parametrize("preactivation", [False, True])
def test_gradient_checkpointing_changes_nothing(preactivation: bool) -> None:
    plain = narrow(preactivation=preactivation)
    saving = narrow(preactivation=preactivation, gradient_checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(3, 3, 40, 33)
    for model in (plain, saving):
        model(x).square().sum().backward()
    for ours, theirs in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    for ours, theirs in zip(plain.buffers(), saving.buffers(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("preactivation", [False, True])
def test_modules_leave_their_input_alone(preactivation: bool) -> None:
    model = narrow(preactivation=preactivation)
    for block in (*model.entry_flow[1:], *model.middle_flow, *model.exit_flow[:2]):
        channels = next(m for m in block.modules() if isinstance(m, nn.Conv2d)).in_channels
        x = torch.randn(2, channels, 6, 7)
        before = x.clone()
        block(x)
        assert torch.equal(x, before)


def test_the_last_features_are_rectified() -> None:
    for preactivation in (False, True):
        assert narrow(preactivation=preactivation).forward_features(torch.randn(2, 3, 40, 40)).min() >= 0


def test_feature_info_of_xception71_skips_the_modules_that_keep_the_size() -> None:
    model = narrow(entry_widths=(8, 9, 10, 11, 12), entry_strides=(2, 1, 2, 1, 2))
    assert [(info["module"], info["channels"], info["reduction"]) for info in model.feature_info] == [
        ("entry_flow.stem", 64, 2),
        ("entry_flow.block2", 9, 4),
        ("entry_flow.block4", 11, 8),
        ("middle_flow", 12, 16),
        ("exit_flow", 18, 32),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"entry_strides": (2, 2)}, "entry_strides must be as many as entry_widths, 3; got 2"),
        ({"entry_strides": (2, 2, 3)}, "entry_strides must be a list of 1 or 2"),
        ({"entry_widths": (), "entry_strides": ()}, "the number of entry_widths"),
        ({"exit_widths": (1, 2)}, "exit_widths must be a list"),
        ({"middle_modules": -1}, "middle_modules must be"),
        ({"norm_eps": 0.0}, "norm_eps must be"),
        ({"norm_eps": float("nan")}, "norm_eps must be"),
        ({"output_stride": 1}, "output_stride must be at least the stem's 2"),
        ({"output_stride": 64}, "output_stride must be"),
        ({"input_size": 16}, "input_size must be at least 32"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        AlignedConfig(**options)
