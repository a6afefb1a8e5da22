"""The shared pieces: the spectrum of convolutions, dense pooling, gradient checkpointing, the classifier."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xception.errors import ConfigError
from xception.models.layers import (
    Classifier,
    DepthwiseConv2d,
    SamePool2d,
    SegmentedConv2d,
    SeparableConv2d,
    activation,
    batch_norm,
    check_input,
    initialise,
)
from xception.models.recompute import Flow, recomputed
from xception.models.registry import build_without_storage, get_config
from xception.models.resolution import plan_stages


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------------------ the spectrum


@pytest.mark.parametrize("segments", [1, 2, 3, 5, 7, 9, 10])
@pytest.mark.parametrize("intermediate", ["none", "relu"])
def test_segments_are_separate_convolutions_of_nearly_equal_width(segments: int, intermediate: str) -> None:
    module = SegmentedConv2d(4, 10, segments=segments, intermediate_activation=intermediate)  # type: ignore[arg-type]
    x = torch.randn(2, 4, 6, 5)
    mixed = F.conv2d(x, module.pointwise.weight)
    mixed = mixed.relu() if intermediate == "relu" else mixed
    filters = [weight for part in module.segmented for weight in part.weight]
    parts = mixed.tensor_split(segments, dim=1)
    expected = []
    for part in parts:
        width = part.shape[1]
        expected.append(F.conv2d(part, torch.stack(filters[:width]), padding=1))
        del filters[:width]
    assert not filters
    assert max(p.shape[1] for p in parts) - min(p.shape[1] for p in parts) <= 1
    torch.testing.assert_close(module(x), torch.cat(expected, dim=1))


def test_the_ends_of_the_spectrum() -> None:
    x = torch.randn(1, 3, 8, 8)
    extreme = SeparableConv2d(3, 6, order="pointwise_depthwise")
    segmented = SegmentedConv2d(3, 6, segments=6)
    segmented.pointwise.weight.data.copy_(extreme.pointwise.weight)
    segmented.segmented[0].weight.data.copy_(extreme.depthwise.weight)
    torch.testing.assert_close(segmented(x), extreme(x))
    regular = SegmentedConv2d(3, 6, segments=1)
    assert regular.segmented[0].weight.shape == (6, 6, 3, 3)


@pytest.mark.parametrize("segments", [0, -1, 7])
def test_segments_are_from_one_to_the_channels(segments: int) -> None:
    with pytest.raises(ConfigError, match="segments must be from 1 to the 6 channels"):
        SegmentedConv2d(3, 6, segments=segments)


def test_parameters_fall_along_the_spectrum() -> None:
    counts = [sum(p.numel() for p in SegmentedConv2d(12, 12, segments=k).parameters()) for k in (1, 2, 3, 4, 6, 12)]
    assert counts == [144 + 9 * 144 // k for k in (1, 2, 3, 4, 6, 12)]


def test_separable_keeps_its_input_and_matches_plain_modules() -> None:
    module = SeparableConv2d(4, 6, stride=2, padding=1, input_relu=True)
    x = torch.randn(2, 4, 8, 8)
    before = x.clone()
    expected = module.pointwise(F.conv2d(x.relu(), module.depthwise.weight, stride=2, padding=1, groups=4))
    torch.testing.assert_close(module(x), expected)
    assert torch.equal(x, before)


# ------------------------------------------------------------------------------------------------------ pooling


@pytest.mark.parametrize("numerics", ["tf", "torch"])
@pytest.mark.parametrize("dilation", [1, 2, 4])
def test_a_dense_pool_holds_every_strided_pool(numerics: str, dilation: int) -> None:
    dense = SamePool2d(numerics=numerics, dense=True, dilation=dilation)  # type: ignore[arg-type]
    strided = SamePool2d(numerics=numerics)  # type: ignore[arg-type]
    for height, width in ((16, 17), (9, 12), (5, 3), (1, 2)):
        x = torch.randn(2, 3, height, width) - 5
        y = dense(x)
        assert y.shape == x.shape
        step = 2 * dilation
        assert torch.equal(y[:, :, ::step, ::step], strided(x[:, :, ::dilation, ::dilation]))


def test_numerics_differ_on_even_sizes_only() -> None:
    for size, same in ((7, True), (8, False)):
        x = torch.randn(1, 1, size, size)
        assert torch.equal(SamePool2d(numerics="tf")(x), SamePool2d(numerics="torch")(x)) is same


# -------------------------------------------------------------------------------------------- stages and flows


def test_stages_dilate_where_they_may_not_shrink() -> None:
    stages, last = plan_stages((2, 2, 2, 2), reduction=2, output_stride=8)
    assert [(s.stride, s.dense, s.dilation, s.reduction) for s in stages] == [
        (2, False, 1, 4),
        (2, False, 1, 8),
        (1, True, 1, 8),
        (1, True, 2, 8),
    ]
    assert last == 4
    stages, last = plan_stages((2, 1, 2), reduction=2, output_stride=None)
    assert [s.reduction for s in stages] == [4, 4, 8]
    assert last == 1


class Noisy(nn.Module):
    """Batch statistics, randomness and a count of its own: what a recomputation could get wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.drop(self.norm(self.conv(x)).relu())


@pytest.mark.parametrize("training", [True, False])
def test_recomputation_gives_the_same_gradients_and_one_update_of_statistics(training: bool) -> None:
    plain = Flow({"a": Noisy(), "b": Noisy()}, passes=2).train(training)
    saving = copy.deepcopy(plain)
    saving.checkpointing = True
    x = torch.randn(4, 3, 5, 5)
    results = []
    for flow in (plain, saving):
        torch.manual_seed(1)
        given = x.clone().requires_grad_()
        flow(given).square().sum().backward()
        results.append([given.grad, *(p.grad for p in flow.parameters()), *flow.buffers()])
    for expected, got in zip(*results, strict=True):
        assert torch.equal(expected, got)
    assert [m.calls for m in plain] == [2, 2]
    assert [m.calls for m in saving] == [4, 4]
    if training:
        assert int(saving.a.norm.num_batches_tracked) == 2


def test_recomputation_keeps_the_buffers_themselves() -> None:
    module = Noisy()
    buffers = dict(module.named_buffers())
    recomputed(module, torch.randn(2, 3, 4, 4)).sum().backward()
    assert all(buffer is buffers[name] for name, buffer in module.named_buffers())


def test_nothing_is_recomputed_without_gradients() -> None:
    module = Noisy()
    with torch.no_grad():
        recomputed(module, torch.randn(2, 3, 4, 4))
    assert module.calls == 1


# ------------------------------------------------------------------------------------- normalisation, classifier


def test_normalisation_without_scale_has_only_an_offset() -> None:
    norm = batch_norm(3, eps=1e-3, scale=False)
    assert [name for name, _ in norm.named_parameters()] == ["bias"]
    x = torch.randn(8, 3, 4, 4)
    torch.testing.assert_close(norm(x), F.batch_norm(x, None, None, None, norm.bias, True, 0.1, 1e-3))


def test_dropout_acts_in_training_only() -> None:
    head = Classifier(64, 5, dropout=0.5)
    features = torch.rand(2, 64, 3, 3)
    assert not torch.equal(head(features), head(features))
    assert torch.equal(head(features, pre_logits=True), features.mean(dim=(2, 3)))
    head.eval()
    assert torch.equal(head(features), head(features))
    torch.testing.assert_close(head(features), head.linear(features.mean(dim=(2, 3))))


def test_fully_connected_layers_have_their_widths_and_relu() -> None:
    head = Classifier(6, 3, fully_connected=(8, 4))
    assert [(m.in_features, m.out_features) for m in head.modules() if isinstance(m, nn.Linear)] == [
        (6, 8),
        (8, 4),
        (4, 3),
    ]
    hidden = head(torch.randn(5, 6, 2, 2), pre_logits=True)
    assert hidden.shape == (5, 4)
    assert hidden.min() >= 0


def test_activations_are_never_in_place() -> None:
    for name in ("none", "relu", "elu"):
        module = activation(name)  # type: ignore[arg-type]
        assert not getattr(module, "inplace", False)
    with pytest.raises(ConfigError, match="activation must be one of none, relu, elu"):
        activation("gelu")  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 4, 8, 8), (1, 3, 7, 8), (1, 3, 8, 7)])
def test_wrong_input_is_refused_in_one_line(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"^expected .*, got .*$"):
        check_input(torch.zeros(shape), in_channels=3, minimum_size=8)


@pytest.mark.parametrize("x", [torch.zeros(1, 3, 8, 8, dtype=torch.uint8), [[0.0]], None])
def test_what_is_no_floating_point_tensor_is_refused_in_one_line(x: object) -> None:
    with pytest.raises(ConfigError, match=r"^expected a .*tensor .*, got .*$"):
        check_input(x, in_channels=3, minimum_size=8)  # type: ignore[arg-type]


def test_first_weights_keep_the_signals_size() -> None:
    """He's normal distribution over the fan-in, of a depthwise filter too; then batch variances start near 1."""
    model = nn.Sequential(DepthwiseConv2d(64), nn.Conv2d(64, 64, 1), batch_norm(64, eps=1e-3), Classifier(64, 200))
    model[2].weight.data.fill_(7)
    initialise(model)
    assert model[0].weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.1)
    assert model[1].weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.1)
    assert model[2].weight.unique().tolist() == [1]
    assert model[3].linear.weight.abs().max().item() <= (6 / 264) ** 0.5
    assert model[3].linear.bias.abs().max() == 0
    x = F.relu(torch.randn(16, 64, 12, 12, generator=torch.Generator().manual_seed(0)))
    assert 0.3 < model[:2](x).var().item() < 5


@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_the_head_pools_and_activates_as_asked(pooling: str) -> None:
    head = Classifier(6, 3, fully_connected=(5, 4), hidden_activations=("tanh", "none"), pooling=pooling)  # type: ignore[arg-type]
    x = torch.randn(2, 6, 3, 3)
    pooled = x.mean(dim=(2, 3)) if pooling == "avg" else x.flatten(2).max(dim=2).values
    expected = head.fully_connected[1](torch.tanh(head.fully_connected[0](pooled)))
    torch.testing.assert_close(head(x, pre_logits=True), expected)
    torch.testing.assert_close(head(x), head.linear(expected))


@pytest.mark.parametrize("name", ["xception", "xception41", "inception_v3"])
def test_every_network_takes_the_heads_options(name: str) -> None:
    config = get_config(name, fully_connected=(7,), hidden_activations=["elu"], pooling="max", num_classes=4)
    head = build_without_storage(name, config).classifier
    assert [tuple(layer.weight.shape) for layer in head.fully_connected] == [(7, 2048)]
    assert head.linear.weight.shape == (4, 7)
    for wrong in (
        {"hidden_activations": ["elu", "elu"]},
        {"hidden_activations": ["swish"]},
        {"pooling": "flatten"},
    ):
        with pytest.raises(ConfigError):
            get_config(name, fully_connected=(7,), **wrong)
