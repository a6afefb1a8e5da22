"""Networks of timm and torchvision, in and out: the same logits, every tensor used once, and nothing changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from PIL import Image
from torch import nn
from torch_networks import (
    NETWORKS,
    assert_same_logits,
    foreign,
    googlenet_state,
    images,
    imported,
    saved,
)

from xception.data.preprocess import Preprocess
from xception.errors import WeightsError
from xception.models.registry import create_model
from xception.weights.foreign import ForeignFile, ForeignTensor, import_tensors
from xception.weights.names_torch import recognise_torch
from xception.weights.skeleton import build_skeleton
from xception.weights.torch_file import read_torch_file
from xception.weights.torch_write import TORCH_FAMILIES, to_torch_state_dict, torch_families, write_torch

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

MODELS = {
    "timm legacy_xception": "xception",
    "timm inception_v3": "inception_v3_torchvision",
    "torchvision inception_v3": "inception_v3_torchvision",
    "torchvision googlenet": "googlenet",
}


# The deepest have nothing that the others have not, but for their depth.
DEEP = dict.fromkeys(("timm xception65", "timm xception71", "timm xception65p"), pytest.mark.slow)


@pytest.fixture(scope="module", params=[pytest.param(name, marks=DEEP.get(name, ())) for name in NETWORKS])
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """Theirs and ours, which came in through a file."""
    name = request.param
    path = tmp_path_factory.mktemp("network") / "weights"
    theirs = foreign(name)
    torch.save(theirs.state_dict(), path)
    ours, report, found, file = imported(path)
    yield SimpleNamespace(name=name, theirs=theirs, ours=ours, report=report, found=found, file=file)
    path.unlink()


@pytest.mark.parametrize("name", NETWORKS)
def test_names_and_shapes_of_every_network(name: str) -> None:
    """Every tensor of theirs has one place in ours, and no number is needed to know it."""

    def nothing() -> torch.Tensor:
        raise AssertionError("recognition reads no tensor")

    with torch.device("meta"):
        state = NETWORKS[name](7).state_dict()
    tensors = {key: ForeignTensor(shape=tuple(t.shape), dtype=t.dtype, read=nothing) for key, t in state.items()}
    found = recognise_torch(ForeignFile(path="w", container="torch-zip", tensors=tensors))
    assert found is not None
    ours = build_skeleton(found.model, found.config).state_dict()
    theirs = {pair.ours: pair.theirs for pair in found.pairs} | {
        k: names[0] for k, (names, _) in found.computed.items()
    }
    assert sorted(theirs) == sorted(ours)
    assert sorted(theirs.values()) == sorted(state)
    assert all(ours[name].shape == state[other].shape for name, other in theirs.items())


SIZES = [150, 224, *(pytest.param(size, marks=pytest.mark.slow) for size in (256, 299, 320))]


@pytest.mark.parametrize("size", SIZES)
def test_logits(network: SimpleNamespace, size: int) -> None:
    x = images(size, count=2 if size < 200 else 1)
    with torch.no_grad():
        assert_same_logits(network.ours(x), network.theirs(x))


def test_what_was_recognised(network: SimpleNamespace) -> None:
    found, report = network.found, network.report
    assert found.format == network.name
    assert found.model == MODELS.get(network.name, network.name.removeprefix("timm "))
    assert (found.config["num_classes"], found.config["in_channels"]) == (5, 3)
    assert (found.class_names, found.multi_label, found.fresh, found.ignored) == (None, False, (), ())
    assert (report.tensors_used, report.tensors_unused) == (len(network.theirs.state_dict()), 0)
    assert report.parameters == sum(p.numel() for p in network.theirs.parameters())
    if "auxiliary" in found.config:
        assert found.config["auxiliary"] is network.name.startswith("torchvision")
    assert not network.ours.training


@pytest.mark.parametrize("network", ["torchvision inception_v3", "torchvision googlenet"], indirect=True)
def test_auxiliary_classifiers_come_along(network: SimpleNamespace) -> None:
    x = images(299)
    theirs = network.theirs.train()
    for module in theirs.modules():  # only this makes them answer; batch statistics must not be used for it
        if isinstance(module, nn.BatchNorm2d | nn.Dropout):
            module.eval()
    with torch.no_grad():
        logits, *auxiliary = theirs(x)
        ours, our_auxiliary = network.ours.forward_with_auxiliary(x)
    theirs.eval()
    assert_same_logits(ours, logits)
    for mine, other in zip(our_auxiliary, reversed(auxiliary), strict=True):
        assert_same_logits(mine, other)


def test_out_again(network: SimpleNamespace, tmp_path: Path) -> None:
    """Their tensors come back bit for bit, load strictly, and from the new file so do ours."""
    expected = network.theirs.state_dict()
    for family in torch_families(network.ours):
        written = to_torch_state_dict(network.ours, family)
        if not family.startswith("cadene"):
            assert written.keys() == expected.keys()
            assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    family = next(name for name in torch_families(network.ours) if name.startswith(network.name.split()[0]))
    write_torch(tmp_path / "w.pth", network.ours, family)
    fresh = NETWORKS[network.name](5).eval()
    fresh.load_state_dict(torch.load(tmp_path / "w.pth", weights_only=True), strict=True)
    x = images(96)
    with torch.no_grad():
        assert_same_logits(fresh(x), network.ours(x))
    assert_equal_states(imported(tmp_path / "w.pth")[0], network.ours)


@pytest.mark.parametrize("network", ["torchvision googlenet"], indirect=True)
def test_out_again_as_safetensors(network: SimpleNamespace, tmp_path: Path) -> None:
    write_torch(tmp_path / "w.safetensors", network.ours, "torchvision/googlenet")
    stored, expected = safetensors.torch.load_file(tmp_path / "w.safetensors"), network.theirs.state_dict()
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in expected.items())
    assert_equal_states(imported(tmp_path / "w.safetensors")[0], network.ours)


def assert_equal_states(model: nn.Module, other: nn.Module) -> None:
    ours, theirs = model.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


# ------------------------------------------------------------------------------------------------------- preprocessing


# Of several published weights of one network, those that came from TensorFlow.
TAGS = {"timm xception65": "xception65.tf_in1k", "timm inception_v3": "inception_v3.tf_in1k"}


TIMM = [pytest.param(name, marks=DEEP.get(name, ())) for name in NETWORKS if name.startswith("timm")]


@pytest.mark.parametrize("network", TIMM, indirect=True)
def test_preprocessing_is_timms(network: SimpleNamespace) -> None:
    published = timm.get_pretrained_cfg(TAGS.get(network.name, network.name.removeprefix("timm ")))
    config = timm.data.resolve_data_config(pretrained_cfg=published.to_dict())
    theirs = timm.data.create_transform(**config)
    ours: Preprocess = network.found.preprocess
    picture = noise(int(config["input_size"][1] / config["crop_pct"]))
    assert torch.allclose(ours(picture), theirs(Image.fromarray(picture)), atol=1e-6)
    assert ours.interpolation == config["interpolation"]


@pytest.mark.parametrize(
    ("network", "weights", "scaled"),
    [
        ("torchvision inception_v3", torchvision.models.Inception_V3_Weights.IMAGENET1K_V1, 342),
        ("torchvision googlenet", torchvision.models.GoogLeNet_Weights.IMAGENET1K_V1, 256),
    ],
    indirect=["network"],
)
def test_preprocessing_holds_torchvisions_transform_input(network: SimpleNamespace, weights: Any, scaled: int) -> None:
    """Theirs normalises by ImageNet's figures and undoes that inside of the network; ours does it at once."""
    ours: Preprocess = network.found.preprocess
    preset = weights.transforms()
    assert (preset.resize_size[0], preset.interpolation.value) == (scaled, ours.interpolation)
    picture = noise(scaled)
    outside = preset(Image.fromarray(picture))[None]
    transforming = SimpleNamespace(transform_input=True)
    inside = type(network.theirs)._transform_input(transforming, outside)[0]
    assert torch.allclose(ours(picture), inside, atol=1e-5)


def noise(size: int) -> np.ndarray:
    """A picture that needs no resizing, so that only the crop and the normalisation show."""
    return np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)


# ------------------------------------------------------------------------------------------------ as people keep them


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return googlenet_state()


def assert_is(path: Path, state: dict[str, torch.Tensor]) -> Any:
    """The file holds exactly the network with this state; returns what was recognised."""
    ours, _, found, _ = imported(path)
    written = to_torch_state_dict(ours, "torchvision/googlenet")
    assert written.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(written[name], tensor.to(written[name].dtype)), name
    return found


@pytest.mark.parametrize(
    "prefix", ["module.", "model.", "_orig_mod.", "encoder.", "module._orig_mod.", "backbone.net.", "网络."]
)
def test_prefixes(tmp_path: Path, state: dict[str, torch.Tensor], prefix: str) -> None:
    prefixed = {prefix + name: tensor for name, tensor in state.items()}
    assert_is(saved(tmp_path / "w", {"state_dict": prefixed}, _use_new_zipfile_serialization=False), state)


def test_an_average_is_preferred(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    other = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    averaged = {f"module.{name}": tensor for name, tensor in state.items()}
    path = saved(tmp_path / "w", {"state_dict": other, "state_dict_ema": averaged, "epoch": 7})
    assert_is(path, state)
    assert read_torch_file(path).facts["average"] is True


def test_safetensors(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    safetensors.torch.save_file(state, tmp_path / "w", {"format": "pt"})
    assert_is(tmp_path / "w", state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(tmp_path: Path, state: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    other = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    assert_is(saved(tmp_path / "w", other), other)


def test_without_counters(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    bare = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    ours, report, _, _ = imported(saved(tmp_path / "w", bare))
    assert report.tensors_used == len(bare)
    counters = [tensor for name, tensor in ours.state_dict().items() if name.endswith("num_batches_tracked")]
    assert {int(tensor) for tensor in counters} == {0}


def test_what_stands_beside_a_network(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    kept = {f"model.{name}": tensor for name, tensor in state.items()}
    kept |= {"criterion.weight": torch.ones(5), "n_averaged": torch.tensor(3), "train_metrics.total": torch.ones(1)}
    found = assert_is(saved(tmp_path / "w", kept), state)
    assert found.ignored == ("criterion.weight", "n_averaged", "train_metrics.total")
    with pytest.raises(WeightsError, match="has not: 'metric_fc'; if they follow it"):
        imported(saved(tmp_path / "w", {**kept, "metric_fc.weight": torch.ones(5, 5)}))


def test_names_of_classes(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    names = ["a", "b", "c", "d", "e"]
    assert assert_is(saved(tmp_path / "w", {"model": state, "classes": names}), state).class_names == tuple(names)
    assert assert_is(saved(tmp_path / "w", {"model": state, "classes": names[:4]}), state).class_names is None


def test_grey_images_and_one_class(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    grey = {**state, "conv1.conv.weight": state["conv1.conv.weight"][:, :1]}
    grey |= {"fc.weight": state["fc.weight"][:1], "fc.bias": state["fc.bias"][:1]}
    found = recognise_torch(read_torch_file(saved(tmp_path / "w", grey)))
    assert found is not None
    assert (found.config["in_channels"], found.preprocess.channels, found.multi_label) == (1, 1, True)
    assert import_tensors(read_torch_file(tmp_path / "w"), found)[0](images(64, 1)).shape == (2, 1)


def test_a_tower_of_other_classes_is_left_out(tmp_path: Path) -> None:
    """Who exchanges the classifier of a torchvision network for another often keeps the auxiliary ones."""
    theirs = foreign("torchvision googlenet", classes=9)
    theirs.fc = nn.Linear(1024, 3)
    ours, report, found, _ = imported(saved(tmp_path / "w", theirs.state_dict()))
    assert found.config["auxiliary"] is False
    assert {name.split(".")[0] for name in found.ignored} == {"aux1", "aux2"}
    assert report.tensors_unused == 0
    x = images(96)
    with torch.no_grad():
        assert_same_logits(ours(x), theirs(x))


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fc.weight": None, "fc.bias": None}, r"has no classifier \(fc\); its trunk alone can be taken"),
        ({"fc.bias": None}, "its classifier is not of linear layers with biases: 'fc.weight'; its trunk"),
        ({"fc.weight": (5,)}, r"its classifier 'fc' has weights of shape \(5,\)"),
        ({"fc.weight": (5, 7)}, r"tensor 'fc.weight' has shape \(5, 7\), expected \(5, 1024\)"),
        ({"conv2.conv.weight": None}, "tensor 'conv2.conv.weight' is missing"),
        ({"conv1.conv.weight": None}, "its first convolution 'conv1.conv' is missing"),
        ({"conv1.conv.weight": (64,)}, "its first convolution 'conv1.conv' is missing, or none"),
        ({"conv1.conv.weight": (64, 4, 7, 7)}, "takes 4 channels; images have 1 or 3"),
        ({"conv2.conv.weight": (64, 64)}, None),
        ({"conv2.conv.weight": (64, 63, 1, 1)}, "'conv2.conv.weight' has shape"),
        ({"inception4a.attention.weight": (3,)}, "it has layers that this network has not: 'inception4a.attention'"),
        ({"head.0.weight": (3,), "head.2.weight": (3,)}, "not: 'head.0', 'head.2'; if they follow it, its trunk"),
        ({"fc.0.weight": (3, 3), "fc.0.bias": (3,)}, "a state dict does not say what stands between them"),
        ({"model.inception3a.branch1.conv.weight": (64, 192, 1, 1)}, "it holds 2 networks, under the prefixes"),
        ({"x\ny.inception3a.branch1.conv.weight": (64, 192, 1, 1)}, r"'x\\ny.'"),
    ],
)
def test_networks_that_ours_cannot_be(
    tmp_path: Path, state: dict[str, torch.Tensor], change: dict[str, Any], message: str | None
) -> None:
    changed: dict[str, Any] = {**state, **{k: v if v is None else torch.ones(v) for k, v in change.items()}}
    path = saved(tmp_path / "w", {name: tensor for name, tensor in changed.items() if tensor is not None})
    if message is None:  # a matrix for a 1x1 convolution
        assert imported(path)[1].tensors_unused == 0
        return
    with pytest.raises(WeightsError, match=message) as error:
        imported(path)
    assert str(error.value).isprintable()


def test_integers_are_no_weights(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path = saved(tmp_path / "w", {**state, "fc.bias": torch.ones(5, dtype=torch.int64)})
    with pytest.raises(WeightsError, match=r"tensor 'fc.bias' has dtype torch.int64, expected floats"):
        imported(path)


def test_other_networks_are_not_recognised(tmp_path: Path) -> None:
    for name, tensors in {
        "resnet18": torchvision.models.resnet18().state_dict(),
        "ours": create_model("xception_small").state_dict(),
        "nothing of ours": {"a": torch.ones(1)},
    }.items():
        assert recognise_torch(read_torch_file(saved(tmp_path / "w", tensors))) is None, name


def test_aligned_networks_of_other_depths(tmp_path: Path) -> None:
    names = [f"blocks.{n}.stack.conv1.conv_dw.weight" for n in (0, 13)]
    tensors = {name: torch.ones(64, 1, 3, 3) for name in names} | {"stem.0.conv.weight": torch.ones(32, 3, 3, 3)}
    tensors |= {"head.fc.weight": torch.ones(2, 2048), "head.fc.bias": torch.ones(2)}
    path = saved(tmp_path / "w", tensors)
    with pytest.raises(WeightsError, match=r"/w: an aligned Xception of 14 blocks; known are 13, 21 and 23$"):
        recognise_torch(read_torch_file(path))


# ------------------------------------------------------------------------------------------------------- trunks alone


def test_trunk_only(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    """Whatever the head, and whatever stands outside of the network."""
    reference, *_ = imported(saved(tmp_path / "w", state))
    trunk = {f"model.{name}": tensor for name, tensor in state.items() if not name.startswith("fc.")}
    for more in (
        {},
        {"model.fc.0.attention": torch.ones(3)},
        {"decoder.weight": torch.ones(3), "model.neck.w": torch.ones(1)},
    ):
        path = saved(tmp_path / "w", trunk | more)
        with pytest.raises(WeightsError, match="its trunk alone can be taken"):
            imported(path)
        ours, report, found, _ = imported(path, trunk_only=True)
        assert found.fresh == report.fresh == ("classifier.linear.weight", "classifier.linear.bias")
        assert set(found.ignored) == set(more)
        x = images(64)
        with torch.no_grad():
            assert torch.equal(ours.forward_features(x), reference.forward_features(x))


def test_trunk_only_does_not_hide_what_is_in_the_trunk(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path = saved(tmp_path / "w", {**state, "inception4a.attention.weight": torch.ones(3)})
    with pytest.raises(WeightsError, match=r"not: 'inception4a.attention'$"):
        imported(path, trunk_only=True)
    path = saved(tmp_path / "w", {name: tensor for name, tensor in state.items() if name != "conv2.bn.weight"})
    with pytest.raises(WeightsError, match=r"'conv2.bn.weight' is missing"):
        imported(path, trunk_only=True)


# ------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize(
    ("family", "model", "options", "message"),
    [
        ("timm/legacy_xception", "xception", {}, "numerics is 'tf', not 'torch'"),
        ("timm/legacy_xception", "xception_small", {"numerics": "torch"}, "stem is 'small', not 'valid'"),
        (
            "timm/legacy_xception",
            "xception",
            {"numerics": "torch", "segments": 4, "fully_connected": (8,)},
            r"fully_connected is \[8\], not \[\], segments is 4, not None",
        ),
        ("timm/xception41", "xception65", {}, "middle_modules is 16, not 8; timm/xception65 can$"),
        ("timm/xception41", "xception", {}, "it is a Xception, not of the kind of 'xception41'"),
        (
            "torchvision/inception_v3",
            "inception_v3",
            {},
            "numerics is 'tf', not 'torch', norm_scale is False, not True",
        ),
        ("torchvision/googlenet", "googlenet", {"in_channels": 1}, "in_channels is 1, not 3"),
        ("torchvision/googlenet", "inception_v1", {}, "large_kernel is 5, not 3"),
        ("timm/xception", "xception", {}, "unknown family 'timm/xception': did you mean timm/xception"),
        ("keras", "xception", {}, "unknown family 'keras': choose from timm/legacy_xception, "),
    ],
)
def test_what_a_family_cannot_express(
    tmp_path: Path, family: str, model: str, options: dict[str, Any], message: str
) -> None:
    ours = create_model(model, num_classes=2, **options)
    with pytest.raises(WeightsError, match=message):
        to_torch_state_dict(ours, family)
    with pytest.raises(WeightsError, match=rf"^cannot write \S+/w.pth: .*{message}"):
        write_torch(tmp_path / "w.pth", ours, family)
    assert list(tmp_path.iterdir()) == []


def test_settings_that_do_not_matter_are_no_obstacle() -> None:
    ours = create_model("googlenet", dropout=0.3, input_size=96, auxiliary=False, num_classes=2)
    assert torch_families(ours) == ("torchvision/googlenet",)
    assert torch_families(nn.Linear(2, 2)) == ()
    with pytest.raises(WeightsError, match="it is a Linear, not of the kind"):
        to_torch_state_dict(nn.Linear(2, 2), next(iter(TORCH_FAMILIES)))
