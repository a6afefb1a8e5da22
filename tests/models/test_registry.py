"""Every named network, whatever its family, keeps the same promises."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from xception.errors import ConfigError
from xception.models import (
    baselines,
    inception_v1,
    inception_v2,
    inception_v3,
    resnet,
    vgg,
    xception,
    xception_aligned,
)
from xception.models.inception_v3 import InceptionV3Config
from xception.models.registry import (
    build,
    build_without_storage,
    config_from_dict,
    config_to_dict,
    create_model,
    describe,
    find_entry,
    get_config,
    list_models,
)
from xception.models.xception import XceptionConfig

NAMES = list_models()

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:timm")


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest) -> nn.Module:
    """Each named network with 7 classes in evaluation mode; the tests that use it come one network at a time."""
    torch.manual_seed(0)
    return create_model(request.param, num_classes=7).eval()


def images(model: nn.Module, count: int, height: int, width: int) -> Tensor:
    channels = model.config.in_channels
    generator = torch.Generator().manual_seed(height + width)
    return torch.randn(count, channels, height, width, generator=generator)


def test_it_takes_images_of_many_sizes(model: nn.Module) -> None:
    smallest = model.config.minimum_size
    with torch.no_grad():
        for height, width in ((smallest, smallest), (smallest + 1, smallest + 12), (smallest + 7, smallest)):
            logits = model(images(model, 2, height, width))
            assert logits.shape == (2, 7)
            assert logits.isfinite().all()


def test_features_and_head_are_the_forward_pass_and_evaluation_is_deterministic(model: nn.Module) -> None:
    x = images(model, 2, model.config.minimum_size + 5, model.config.minimum_size + 2)
    given = x.clone()
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape[1] == model.num_features
        logits = model(x)
        assert torch.equal(model.forward_head(features), logits)
        assert torch.equal(model(x), logits)
        pooled = model.forward_head(features, pre_logits=True)
    assert pooled.dim() == 2
    assert len(pooled) == 2
    assert torch.equal(x, given)


def test_a_gradient_reaches_every_parameter(model: nn.Module) -> None:
    x = images(model, 2, model.config.minimum_size, model.config.minimum_size + 3)
    if hasattr(model, "forward_with_auxiliary"):
        logits, auxiliary = model.forward_with_auxiliary(x)
        outputs = [logits, *auxiliary]
    else:
        outputs = [model(x)]
    # Linear in the scores: an untrained network's softmax may be so sure of itself that no gradient is left.
    loss = sum((output * torch.linspace(1, 2, output.shape[1])).sum() for output in outputs)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name
        parameter.grad = None


def test_feature_info_names_its_modules(model: nn.Module) -> None:
    assert model.feature_info[-1]["channels"] == model.num_features
    reductions = [info["reduction"] for info in model.feature_info]
    assert reductions == sorted(reductions)
    for info in model.feature_info:
        assert set(info) == {"module", "channels", "reduction"}
        assert isinstance(model.get_submodule(info["module"]), nn.Module)


def test_wrong_input_is_refused_in_one_line(model: nn.Module) -> None:
    smallest, channels = model.config.minimum_size, model.config.in_channels
    for shape in (
        (channels, smallest, smallest),
        (1, channels + 1, smallest, smallest),
        (1, channels, smallest - 1, smallest),
        (1, channels, smallest, smallest - 1),
    ):
        with pytest.raises(ConfigError, match=r"^expected .*, got .*$"):
            model(torch.zeros(shape))


@pytest.mark.parametrize("name", NAMES)
def test_channels_classes_and_dropout_are_options(name: str) -> None:
    for in_channels in (1, 4):
        config = get_config(name, in_channels=in_channels, num_classes=3, dropout=0.25)
        model = build_without_storage(name, config)
        side = config.minimum_size
        assert model(torch.empty(2, in_channels, side, side + 1, device="meta")).shape == (2, 3)
        assert any(isinstance(m, nn.Dropout) and m.p == 0.25 for m in model.modules())


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_the_published_ones(name: str) -> None:
    description = describe(name)
    published = description.published.get("parameters", description.parameters)
    assert description.parameters == published
    assert description.parameters == sum(stage.parameters for stage in description.stages)
    assert description.multiply_adds == sum(stage.multiply_adds for stage in description.stages)
    assert description.minimum_size <= description.input_size
    assert description.description
    assert description.source
    assert json.loads(json.dumps(description.to_dict()))["name"] == name


@pytest.mark.parametrize("name", NAMES)
def test_a_config_survives_json(name: str) -> None:
    config = get_config(name, num_classes=11, in_channels=2, dropout=0.125)
    assert config_from_dict(name, json.loads(json.dumps(config_to_dict(config)))) == config
    assert dataclasses.is_dataclass(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_classes = 3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options",
    [
        {"num_classes": 0},
        {"num_classes": "10"},
        {"in_channels": 0},
        {"dropout": 1.5},
        {"dropout": float("nan")},
        {"input_size": 1},
        {"no_such_option": 1},
    ],
    ids=str,
)
def test_bad_options_are_refused_in_one_line(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        create_model(name, **options)
    assert "\n" not in str(caught.value)
    assert next(iter(options)) in str(caught.value)


def test_names_are_listed_and_matched() -> None:
    assert sorted(NAMES) == NAMES
    assert {"xception", "xception_small", "xception_fc", "xception41", "xception65", "xception71"} <= set(NAMES)
    assert list_models("xception?1") == ["xception41", "xception71"]
    assert list_models("nothing*") == []
    assert all(find_entry(name).name == name for name in NAMES)
    rooms = (baselines, inception_v1, inception_v2, inception_v3, resnet, vgg, xception, xception_aligned)
    assert sorted(entry.name for room in rooms for entry in room.ENTRIES) == NAMES  # no name stands twice


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("xcepton", r"unknown model 'xcepton': did you mean xception"),
        ("zzzzzz", r"unknown model 'zzzzzz': choose from .*xception"),
        ("", r"unknown model ''"),
        (None, r"unknown model None"),
        ("keras/xception", r"unknown model 'keras/xception'"),
    ],
)
def test_an_unknown_name_is_answered_with_the_known_ones(name: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_model(name)


def test_an_unknown_option_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="unknown option 'segment': did you mean segments"):
        create_model("xception", segment=4)
    with pytest.raises(ConfigError, match=r"unknown option 'zzz': choose from .*num_classes"):
        create_model("xception", zzz=4)


def test_a_network_is_built_from_its_own_kind_of_config() -> None:
    with pytest.raises(ConfigError, match="xception is built from XceptionConfig; got InceptionV3Config"):
        build("xception", InceptionV3Config())
    with pytest.raises(ConfigError, match="expected the fields of a config; got list"):
        config_from_dict("xception", [("num_classes", 3)])  # type: ignore[arg-type]


def test_options_replace_what_the_name_stands_for() -> None:
    config = get_config("xception_fc", entry_widths=[8, 16], dropout=0)
    assert config == XceptionConfig(fully_connected=(4096, 4096), entry_widths=(8, 16), dropout=0)
    assert find_entry("xception_fc").config.entry_widths == (128, 256, 728)


def test_every_option_of_xception_together() -> None:
    model = create_model(
        "xception",
        middle_modules=2,
        intermediate_activation="relu",
        order="pointwise_depthwise",
        segments=4,
        tied_middle=True,
        fully_connected=(32, 32),
        dropout=0.5,
        numerics="torch",
        output_stride=16,
        in_channels=1,
        gradient_checkpointing=True,
        entry_widths=(16, 24, 32),
        exit_widths=(40, 48, 56),
        num_classes=6,
    )
    logits = model(torch.randn(3, 1, 53, 77))
    assert logits.shape == (3, 6)
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_without_storage_takes_no_memory_and_draws_nothing() -> None:
    state = torch.get_rng_state()
    model = build_without_storage("vgg16", get_config("vgg16"))
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert torch.equal(torch.get_rng_state(), state)
