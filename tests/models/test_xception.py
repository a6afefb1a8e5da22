"""Xception against the paper, against timm's port, and each option against what it says."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from xception.errors import ConfigError
from xception.models.cost import without_storage
from xception.models.layers import ConvNorm, SegmentedConv2d, SeparableConv2d
from xception.models.xception import SMALL, Xception, XceptionBlock, XceptionConfig
from xception.weights.names_xception import xception_names

# A narrow network with every part of the real one, for tests of behaviour.
NARROW: dict[str, Any] = {
    "num_classes": 5,
    "stem_widths": (4, 6),
    "entry_widths": (8, 10, 12),
    "middle_modules": 2,
    "exit_widths": (14, 16, 18),
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def narrow(**options: Any) -> Xception:
    return Xception(XceptionConfig(**{**NARROW, **options}))


def shape_of(config: XceptionConfig) -> Xception:
    model = without_storage(lambda: Xception(config))
    assert isinstance(model, Xception)
    return model


def trainable(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def with_random_statistics(model: nn.Module) -> nn.Module:
    """The model in evaluation mode, with batch statistics that are not the identity."""
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return model.eval()


# ---------------------------------------------------------------------------------------------------- the paper


def test_counts_are_the_published_ones() -> None:
    model = shape_of(XceptionConfig())
    statistics = sum(b.numel() for n, b in model.named_buffers() if "running" in n)
    assert trainable(model) == 22_855_952
    assert trainable(model) + statistics == 22_910_480
    assert trainable(model) - trainable(model.classifier) == 20_806_952
    assert trainable(model) - trainable(model.classifier) + statistics == 20_861_480


def test_it_has_36_convolutional_layers_in_14_modules() -> None:
    model = shape_of(XceptionConfig())
    shortcuts = [m.shortcut for m in model.modules() if isinstance(m, XceptionBlock)]
    layers = [
        m for m in model.modules() if isinstance(m, SeparableConv2d) or (isinstance(m, ConvNorm) and m not in shortcuts)
    ]
    assert len(layers) == 36
    modules = [*model.entry_flow, *model.middle_flow, *model.exit_flow]
    assert len(modules) == 14
    residual = [getattr(m, "shortcut", None) is not None for m in modules]
    assert residual == [False] + 12 * [True] + [False]  # all but the first and the last


def test_sizes_at_299_are_the_papers() -> None:
    model, sizes = shape_of(XceptionConfig()), []

    def record(module: nn.Module, inputs: Any, output: Tensor) -> None:
        assert output.shape[2] == output.shape[3]
        sizes.append(output.shape[2])

    parts = [model.entry_flow.stem.conv1, *model.entry_flow, *model.middle_flow, *model.exit_flow]
    for part in parts:
        part.register_forward_hook(record)
    model(torch.empty(1, 3, 299, 299, device="meta"))
    assert list(dict.fromkeys(sizes)) == [149, 147, 74, 37, 19, 10]
    assert sizes == [149, 147, 74, 37, 19] + 8 * [19] + [10, 10]


def test_state_names_read_like_the_paper() -> None:
    names = {name for name, _ in shape_of(XceptionConfig()).named_parameters()}
    for name in (
        "entry_flow.stem.conv1.conv.weight",
        "entry_flow.block1.units.0.conv.depthwise.weight",
        "entry_flow.block3.shortcut.norm.bias",
        "middle_flow.7.units.2.conv.pointwise.weight",
        "exit_flow.block.units.1.norm.weight",
        "exit_flow.separable.1.conv.depthwise.weight",
        "classifier.linear.weight",
    ):
        assert name in names


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_numerics_equal_timms_legacy_xception() -> None:
    import timm

    theirs = with_random_statistics(timm.create_model("legacy_xception", pretrained=False))
    ours = Xception(XceptionConfig(numerics="torch")).eval()
    names, state, used = {**xception_names(ours.config), "classifier.linear": "fc"}, {}, set()
    for name in ours.state_dict():
        prefix, _, leaf = name.rpartition(".")
        used.add(f"{names[prefix]}.{leaf}")
        state[name] = theirs.state_dict()[f"{names[prefix]}.{leaf}"]
    assert used == set(theirs.state_dict())
    ours.load_state_dict(state)
    for size in ((96, 96), (75, 130)):
        x = torch.randn(1, 3, *size)
        with torch.no_grad():
            expected = theirs(x)
            torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_numerics_differ_where_tensorflow_pads_to_one_side() -> None:
    tf, port = narrow(), narrow(numerics="torch")
    port.load_state_dict(tf.state_dict())
    for model in (tf, port):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.eps == (1e-3 if model is tf else 1e-5)
                module.eps = 1e-3
        model.eval()
    # the pools meet maps of 63, 32, 16 and 8 pixels: three are even
    x = torch.randn(1, 3, 131, 131)
    assert not torch.allclose(tf.forward_features(x), port.forward_features(x))
    # the pools meet maps of 129, 65, 33 and 17 pixels: on odd ones both pad alike
    x = torch.randn(1, 3, 263, 263)
    torch.testing.assert_close(tf.forward_features(x), port.forward_features(x))


# ------------------------------------------------------------------------------------------------- residual path


@pytest.mark.parametrize("name", ["entry_flow.block1", "entry_flow.block2", "middle_flow.1", "exit_flow.block"])
@pytest.mark.parametrize("training", [True, False])
def test_a_module_leaves_its_input_alone_and_its_shortcut_reads_it_unrectified(name: str, training: bool) -> None:
    block = narrow().train(training).get_submodule(name)
    assert isinstance(block, XceptionBlock)
    x = torch.randn(2, block.units[0].conv.pointwise.in_channels, 9, 9)
    before, read = x.clone(), []
    assert block.shortcut is not None
    block.shortcut.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    block(x)
    assert torch.equal(x, before)
    assert read[0] is x


def test_only_the_first_module_has_no_leading_relu() -> None:
    blocks = [m for m in narrow().modules() if isinstance(m, XceptionBlock)]
    assert [block.units[0].conv.input_relu for block in blocks] == [False] + [True] * (len(blocks) - 1)
    assert all(unit.conv.input_relu for block in blocks for unit in block.units[1:])


def test_a_module_is_its_units_plus_its_shortcut() -> None:
    block = narrow().eval().middle_flow[0]
    x = torch.randn(1, 12, 5, 5)
    y = x
    for unit in block.units:
        y = unit.norm(unit.conv.pointwise(unit.conv.depthwise(y.relu())))
    torch.testing.assert_close(block(x), x + y)


def test_without_residual_there_are_no_shortcuts() -> None:
    model = narrow(residual=False)
    blocks = [m for m in model.modules() if isinstance(m, XceptionBlock)]
    assert all(block.shortcut is None for block in blocks)
    assert not any("shortcut" in name for name, _ in model.named_parameters())
    x = torch.randn(1, 12, 5, 5)
    block = model.eval().middle_flow[0]
    torch.testing.assert_close(block(x), block.units(x))


# ------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("numerics", ["tf", "torch"])
@pytest.mark.parametrize("output_stride", [16, 8, 4, 2])
@pytest.mark.parametrize("size", [(67, 95), (96, 64)])
def test_output_stride_keeps_every_value_of_the_strided_network(
    numerics: str, output_stride: int, size: tuple[int, int]
) -> None:
    strided = with_random_statistics(narrow(numerics=numerics)).double()
    dense = narrow(numerics=numerics, output_stride=output_stride).double().eval()
    dense.load_state_dict(strided.state_dict())
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    expected, features = strided.forward_features(x), dense.forward_features(x)
    step = 32 // output_stride
    torch.testing.assert_close(features[:, :, ::step, ::step], expected)
    assert features.shape[2] > expected.shape[2]
    assert dense.feature_info[-1]["reduction"] == output_stride


def test_an_output_stride_above_the_networks_own_changes_nothing() -> None:
    small = narrow(stem="small", output_stride=32)
    assert [info["reduction"] for info in small.feature_info] == [1, 2, 4, 8, 16]
    assert all(not module.dense for module in small.modules() if hasattr(module, "dense"))


def test_a_tied_middle_flow_is_one_module_applied_again() -> None:
    tied = narrow(middle_modules=3, tied_middle=True).eval()
    assert len(tied.middle_flow) == 1
    loose = narrow(middle_modules=3).eval()
    for block in loose.middle_flow:
        block.load_state_dict(tied.middle_flow[0].state_dict())
    x = torch.randn(2, 12, 6, 6)
    torch.testing.assert_close(tied.middle_flow(x), loose.middle_flow(x))
    assert trainable(tied) < trainable(loose)


def test_intermediate_activation_stands_between_the_halves() -> None:
    kinds = {"none": lambda t: t, "relu": torch.relu, "elu": nn.functional.elu}
    x = torch.randn(1, 12, 5, 5)
    for name, function in kinds.items():
        conv = narrow(intermediate_activation=name).middle_flow[0].units[0].conv
        expected = conv.pointwise(function(conv.depthwise(x.relu())))
        torch.testing.assert_close(conv(x), expected)
        conv = narrow(intermediate_activation=name, order="pointwise_depthwise").middle_flow[0].units[0].conv
        expected = conv.depthwise(function(conv.pointwise(x.relu())))
        torch.testing.assert_close(conv(x), expected)


def test_segments_make_every_separable_convolution_a_point_of_the_spectrum() -> None:
    model = narrow(segments=3)
    convolutions = [m for m in model.modules() if isinstance(m, SegmentedConv2d)]
    assert len(convolutions) == 6 + 6 + 2 + 2
    assert {conv.segments for conv in convolutions} == {3}
    assert not any(isinstance(m, SeparableConv2d) for m in model.modules())
    counts = [trainable(narrow(segments=k)) for k in (1, 2, 4, 8)]
    assert counts == sorted(counts, reverse=True)


def test_small_stem_keeps_the_size() -> None:
    model = narrow(stem="small")
    assert model.entry_flow.stem(torch.randn(1, 3, 28, 29)).shape[2:] == (28, 29)
    assert model.forward_features(torch.randn(2, 3, 28, 29)).shape[2:] == (2, 2)
    strided = narrow(stem="small", stem_stride=2)
    assert strided.entry_flow.stem(torch.randn(1, 3, 28, 29)).shape[2:] == (14, 15)


def test_small_stem_with_a_stride_pads_as_its_numerics_say() -> None:
    x = torch.randn(1, 3, 8, 9)
    for numerics, padding in (("tf", (1, 1, 0, 1)), ("torch", (1, 1, 1, 1))):  # left, right, top, bottom
        stem = narrow(stem="small", stem_stride=2, numerics=numerics).entry_flow.stem.eval()
        conv1 = stem.conv1
        convolved = nn.functional.conv2d(nn.functional.pad(x, padding), conv1.conv.weight, stride=2)
        torch.testing.assert_close(stem(x), stem.conv2(conv1.act(conv1.norm(convolved))))


@pytest.mark.parametrize("entry_widths", [(8,), (8, 10), (8, 10, 12, 14, 16)])
@pytest.mark.parametrize("exit_widths", [(9,), (9, 11), (9, 11, 13, 15)])
def test_any_number_of_entry_modules_and_exit_convolutions(
    entry_widths: tuple[int, ...], exit_widths: tuple[int, ...]
) -> None:
    model = narrow(entry_widths=entry_widths, exit_widths=exit_widths, middle_modules=1, middle_units=1)
    x = torch.randn(2, 3, 64, 64)
    features = model.forward_features(x)
    assert features.shape[1] == exit_widths[-1] == model.num_features
    assert features.min() >= 0
    assert [info["channels"] for info in model.feature_info] == [6, *entry_widths, exit_widths[-1]]


def test_no_middle_modules_at_all() -> None:
    for tied in (False, True):
        model = narrow(middle_modules=0, tied_middle=tied)
        assert model(torch.randn(2, 3, 40, 40)).shape == (2, 5)
        assert model.feature_info[-2]["module"] == "entry_flow.block3"


@pytest.mark.parametrize("options", [{}, {"output_stride": 8}, {"stem": "small"}, {"tied_middle": True}])
def test_feature_info_names_modules_that_give_what_it_says(options: dict[str, Any]) -> None:
    model = narrow(**options).eval()
    outputs: dict[str, Tensor] = {}
    for info in model.feature_info:
        model.get_submodule(info["module"]).register_forward_hook(
            lambda module, inputs, output, name=info["module"]: outputs.__setitem__(name, output)
        )
    features = model.forward_features(torch.randn(1, 3, 96, 64))
    for info in model.feature_info:
        channels, height, width = outputs[info["module"]].shape[1:]
        assert channels == info["channels"]
        assert 0 <= -(-96 // info["reduction"]) - height <= 3  # the unpadded stem loses a little
        assert 0 <= -(-64 // info["reduction"]) - width <= 3
    assert torch.equal(features, outputs[model.feature_info[-1]["module"]])


def test_dropout_acts_before_the_classifier_in_training_only() -> None:
    model, x = narrow(dropout=0.5), torch.randn(4, 3, 40, 40)
    features = model.forward_features(x)
    assert not torch.equal(model.forward_head(features), model.forward_head(features))
    model.eval()
    assert torch.equal(model.forward_head(features), model.forward_head(features))


def test_fully_connected_layers_are_the_papers() -> None:
    plain = shape_of(XceptionConfig(num_classes=17_000))
    deep = shape_of(XceptionConfig(num_classes=17_000, fully_connected=(4096, 4096)))
    extra = (2048 + 1) * 4096 + (4096 + 1) * 4096 + (4096 - 2048) * 17_000
    assert trainable(deep) - trainable(plain) == extra
    model = narrow(fully_connected=(7,))
    assert model.forward_head(model.forward_features(torch.randn(2, 3, 33, 33)), pre_logits=True).shape == (2, 7)


@pytest.mark.parametrize("options", [{}, {"tied_middle": True, "segments": 3}])
def test_gradient_checkpointing_changes_nothing_but_memory(options: dict[str, Any]) -> None:
    plain, saving = narrow(**options), narrow(gradient_checkpointing=True, **options)
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(3, 3, 45, 38)
    kept = []
    for model in (plain, saving):
        saved = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal saved
            saved += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(x).logsumexp(1).sum()
        kept.append(saved)
        loss.backward()
    for (name, parameter), other in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad), name
    for (name, buffer), other in zip(plain.named_buffers(), saving.buffers(), strict=True):
        assert torch.equal(buffer, other), name
    assert kept[1] < kept[0] / 5


COMBINATIONS = [
    dict(zip(("residual", "segments", "stem", "output_stride", "numerics"), values, strict=True))
    for values in itertools.product((True, False), (None, 4), ("valid", "small"), (None, 8), ("tf", "torch"))
]


@pytest.mark.parametrize("options", COMBINATIONS, ids=str)
def test_options_combine(options: dict[str, Any]) -> None:
    model = narrow(
        intermediate_activation="elu",
        order="pointwise_depthwise",
        tied_middle=True,
        fully_connected=(6,),
        dropout=0.1,
        in_channels=1,
        gradient_checkpointing=True,
        **options,
    )
    logits = model(torch.randn(4, 1, 61, 46))
    assert logits.shape == (4, 5)
    assert logits.isfinite().all()
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_the_small_network_is_small_and_takes_small_images() -> None:
    assert SMALL.num_classes == 10
    assert trainable(Xception(SMALL)) <= 1_500_000
    model = Xception(SMALL).eval()
    for size in (8, 28, 32, 64, 65):
        assert model(torch.randn(1, 3, size, size)).shape == (1, 10)


@pytest.mark.parametrize(("stem", "smallest"), [("valid", 32), ("small", 8)])
def test_it_runs_from_its_minimum_size_on(stem: str, smallest: int) -> None:
    model = narrow(stem=stem)
    assert model.config.minimum_size == smallest
    for size in ((smallest, smallest), (smallest, smallest + 1), (2 * smallest + 3, smallest + 6)):
        assert model(torch.randn(2, 3, *size)).shape == (2, 5)
    with pytest.raises(ConfigError, match=f"at least {smallest}x{smallest} pixels, got {smallest - 1}x"):
        model(torch.randn(2, 3, smallest - 1, smallest))


def test_it_learns() -> None:
    """A narrow network tells two stripe directions apart after a few steps of plain SGD."""
    model = narrow(stem="small", num_classes=2)
    generator = torch.Generator().manual_seed(1)
    stripes = torch.arange(16).remainder(4).lt(2).float() - 0.5
    targets = torch.arange(16) % 2
    images = torch.where(targets[:, None, None, None] == 0, stripes[:, None], stripes[None, :])
    images = images.expand(-1, 3, 16, 16) + 0.3 * torch.randn(16, 3, 16, 16, generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(25):
        loss = nn.functional.cross_entropy(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 < losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes must be from 1"),
        ({"in_channels": 0}, "in_channels must be from 1"),
        ({"input_size": 31}, "input_size must be at least 32"),
        ({"stem": "tiny"}, "stem must be 'valid' or 'small'"),
        ({"stem_stride": 3}, "stem_stride must be 1 or 2 or None"),
        ({"stem_widths": (32,)}, "stem_widths must be a list"),
        ({"entry_widths": ()}, "the number of entry_widths"),
        ({"entry_widths": (8, 0)}, "each of entry_widths"),
        ({"entry_widths": [8]}, "entry_widths must be a list of int"),
        ({"exit_widths": ()}, "the number of exit_widths"),
        ({"middle_modules": -1}, "middle_modules must be from 0"),
        ({"middle_modules": True}, "middle_modules must be int"),
        ({"middle_units": 0}, "middle_units must be from 1"),
        ({"residual": 1}, "residual must be true or false"),
        ({"intermediate_activation": "gelu"}, "intermediate_activation must be 'none' or 'relu' or 'elu'"),
        ({"order": "backwards"}, "order must be"),
        ({"segments": 0}, "segments must be at least 1"),
        ({"segments": 129}, "segments must be from 1 to 128"),
        ({"segments": 4, "order": "depthwise_pointwise"}, "segments come after the 1x1"),
        ({"numerics": "jax"}, "numerics must be 'tf' or 'torch'"),
        ({"dropout": 1.0}, "dropout must be at least 0 and less than 1"),
        ({"dropout": -0.1}, "dropout must be"),
        ({"dropout": float("nan")}, "dropout must be"),
        ({"fully_connected": (0,)}, "each of fully_connected"),
        ({"fully_connected": 4096}, "fully_connected must be a list"),
        ({"output_stride": 12}, "output_stride must be"),
        ({"output_stride": 1}, "output_stride must be at least the stem's 2"),
        ({"gradient_checkpointing": None}, "gradient_checkpointing must be true or false"),
    ],
)
def test_bad_options_are_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}") as caught:
        XceptionConfig(**options)
    assert "\n" not in str(caught.value)
