"""Whole pickled modules, as FaceForensics published its detectors: what each layer computes is known of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from timm import create_model
from timm.models import Xception as TimmXception
from torch import Tensor, nn
from torch_networks import NETWORKS, assert_same_logits, foreign, images, imported, randomise, saved

from xception.errors import WeightsError
from xception.weights.names_torch import recognise_torch
from xception.weights.torch_file import read_torch_file
from xception.weights.torch_write import to_torch_state_dict, write_torch

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
LEGACY: dict[str, Any] = {"_use_new_zipfile_serialization": False}


class CadeneXception(TimmXception):
    """Cadene's network under Cadene's names: timm's, but for the classifier's."""

    def __init__(self, classes: int) -> None:
        super().__init__(num_classes=classes)
        self.last_linear: nn.Module = self.fc
        del self.fc

    def forward(self, x: Tensor) -> Tensor:
        return self.last_linear(self.global_pool(self.forward_features(x)))


class TransferModel(nn.Module):
    """The shape of FaceForensics' detectors: the network in `model`, its classifier exchanged."""

    def __init__(self, classes: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.modelchoice = "xception"
        self.model = CadeneXception(10)
        linear = nn.Linear(2048, classes)
        self.model.last_linear = nn.Sequential(nn.Dropout(dropout), linear) if dropout else linear

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def detector(classes: int = 2, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return randomise(TransferModel(classes, dropout), 64)


def check(path: Path, theirs: nn.Module, size: int = 80) -> Any:
    ours, report, found, _ = imported(path)
    assert report.tensors_unused == 0
    x = images(size)
    with torch.no_grad():
        assert_same_logits(ours(x), theirs(x))
    return found


def format_of(path: Path) -> str | None:
    found = recognise_torch(read_torch_file(path))
    return found and found.format


@pytest.mark.parametrize(("dropout", "options"), [(0.0, LEGACY), (0.5, LEGACY), (0.5, {})])
def test_faceforensics(tmp_path: Path, dropout: float, options: dict[str, Any]) -> None:
    theirs = detector(dropout=dropout)
    found = check(saved(tmp_path / "full_c23.p", theirs, **options), theirs)
    assert (found.format, found.model) == ("FaceForensics xception", "xception")
    assert found.class_names == ("real", "fake")
    assert (found.config["num_classes"], found.config["dropout"]) == (2, dropout)
    assert (found.preprocess.resize, found.preprocess.size, found.preprocess.mean) == ("squash", (299, 299), (0.5,) * 3)


def test_faceforensics_as_a_state_dict(tmp_path: Path) -> None:
    theirs = detector(dropout=0.5)
    found = check(saved(tmp_path / "w", {"state_dict": theirs.state_dict()}, **LEGACY), theirs)
    assert (found.format, found.class_names) == ("FaceForensics xception", None)
    parallel = nn.DataParallel(theirs)
    assert format_of(saved(tmp_path / "w", parallel.state_dict())) == "Cadene xception"
    assert format_of(saved(tmp_path / "w", parallel, **LEGACY)) == "FaceForensics xception"


def test_cadenes_first_file_has_matrices(tmp_path: Path) -> None:
    """1x1 convolutions without their last two axes; what is written has them."""
    torch.manual_seed(0)
    theirs = randomise(CadeneXception(5), 64)
    state = {
        name: tensor[:, :, 0, 0] if "pointwise" in name else tensor
        for name, tensor in theirs.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    found = check(saved(tmp_path / "w", state, **LEGACY), theirs)
    assert (found.format, found.preprocess.interpolation) == ("Cadene xception", "bilinear")
    assert [pair.layout for pair in found.pairs].count("matrix") == 34
    renamed = {name.replace("last_linear", "fc"): tensor for name, tensor in state.items()}
    assert format_of(saved(tmp_path / "w2", renamed)) == "Cadene xception"
    ours, *_ = imported(tmp_path / "w")
    write_torch(tmp_path / "again.pth", ours, "cadene/xception")
    CadeneXception(5).load_state_dict(torch.load(tmp_path / "again.pth", weights_only=True), strict=True)
    written = to_torch_state_dict(ours, "cadene/xception")
    assert all(torch.equal(written[name].reshape(tensor.shape), tensor) for name, tensor in state.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("options", [{}, LEGACY])
def test_networks_of_the_libraries(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    theirs = foreign(name)
    assert check(saved(tmp_path / "w", {"model": nn.DataParallel(theirs)}, **options), theirs, 150).format == name


# ------------------------------------------------------------------------------------------------------------- heads


def googlenet(head: nn.Module | None = None, trained: bool = True, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    options = {"aux_logits": False, "init_weights": False, "transform_input": False, **options}
    model = torchvision.models.googlenet(weights=None, num_classes=4, **options)
    if head is not None:
        model.fc = head
    return randomise(model, 64) if trained else model


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (lambda: nn.Linear(1024, 3), {"fully_connected": [], "dropout": 0.0}),
        (lambda: nn.Sequential(nn.ReLU(), nn.Dropout(0.2), nn.Linear(1024, 3)), {"dropout": 0.2}),
        (
            lambda: nn.Sequential(nn.Linear(1024, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)),
            {"fully_connected": [8], "hidden_activations": ["relu"], "dropout": 0.3},
        ),
        (
            lambda: nn.Sequential(
                nn.Flatten(), nn.Linear(1024, 8), nn.Tanh(), nn.Sequential(nn.Linear(8, 6), nn.GELU()), nn.Linear(6, 3)
            ),
            {"fully_connected": [8, 6], "hidden_activations": ["tanh", "gelu"]},
        ),
        (
            lambda: nn.Sequential(nn.Linear(1024, 8), nn.Linear(8, 6), nn.LeakyReLU(0.2), nn.Linear(6, 3)),
            {"fully_connected": [8, 6], "hidden_activations": ["none", "leaky_relu"]},
        ),
    ],
)
def test_heads(tmp_path: Path, head: Callable[[], nn.Module], expected: dict[str, Any]) -> None:
    theirs = googlenet(head())
    found = check(saved(tmp_path / "w", theirs), theirs, 64)
    assert {name: found.config[name] for name in expected} == expected
    assert found.config["num_classes"] == 3


@pytest.mark.parametrize(
    ("last", "multi_label"), [(nn.Softmax(1), False), (nn.LogSoftmax(1), False), (nn.Sigmoid(), True)]
)
def test_probabilities_at_the_end(tmp_path: Path, last: nn.Module, multi_label: bool) -> None:
    """Ours gives the logits, and computes those itself."""
    theirs = googlenet(nn.Sequential(nn.Linear(1024, 3), last))
    ours, _, found, _ = imported(saved(tmp_path / "w", theirs))
    assert found.multi_label is multi_label
    x = images(64)
    with torch.no_grad():
        assert torch.allclose(last(ours(x)), theirs(x), atol=1e-6)


class Scale(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (
            lambda: nn.Sequential(nn.Linear(1024, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)),
            "not of linear layers with bias",
        ),
        (lambda: nn.Sequential(nn.Linear(1024, 8), nn.LeakyReLU(0.1), nn.Linear(8, 3)), "'fc.1' of class 'LeakyReLU'"),
        (lambda: nn.Sequential(nn.Linear(1024, 8), nn.PReLU(), nn.Linear(8, 3)), "'fc.1.weight'"),
        (lambda: nn.Sequential(nn.Linear(1024, 8), nn.Hardswish(), nn.Linear(8, 3)), "'fc.1' of class 'Hardswish'"),
        (lambda: nn.Sequential(Scale(), nn.Linear(1024, 3)), "'fc.0' of class '.*Scale'"),
        (lambda: nn.Sequential(nn.Tanh(), nn.Linear(1024, 3)), "'fc.0' of class 'Tanh'"),
        (lambda: nn.Sequential(nn.Linear(1024, 3), nn.ReLU()), "'fc.1' of class 'ReLU'"),
        (lambda: nn.Sequential(nn.Linear(1024, 8), nn.ReLU(), nn.Tanh(), nn.Linear(8, 3)), "'fc.2' of class 'Tanh'"),
        (lambda: nn.Sequential(nn.Softmax(1), nn.Linear(1024, 3)), "'fc.0' of class 'Softmax'"),
        (lambda: nn.Linear(1024, 3, bias=False), "not of linear layers with biases"),
    ],
)
def test_heads_that_ours_cannot_be(tmp_path: Path, head: Callable[[], nn.Module], message: str) -> None:
    path = saved(tmp_path / "w", googlenet(head(), trained=False))
    with pytest.raises(WeightsError, match=rf"^cannot load \S+/w: its classifier .*{message}.*its trunk alone can be"):
        imported(path)
    found = recognise_torch(read_torch_file(path), trunk_only=True)
    assert found is not None
    assert found.fresh == ("classifier.linear.weight", "classifier.linear.bias")


# ------------------------------------------------------------------------------------------------------ what is inside


def test_layers_that_compute_something_else(tmp_path: Path) -> None:
    def eps(model: Any) -> None:
        model.conv2.bn.eps = 1e-5

    def stride(model: Any) -> None:
        model.conv3.conv.stride = (2, 2)

    def replaced(model: Any) -> None:
        model.inception3a.branch4[0] = nn.SiLU()

    for change, message in (
        (eps, r"its layer 'conv2.bn' has eps 1e-05, expected 0.001"),
        (stride, r"its layer 'conv3.conv' has stride \(2, 2\), expected \(1, 1\)"),
        (replaced, r"its layer 'inception3a.branch4.0' is of class 'SiLU', expected 'ReLU'"),
    ):
        model = googlenet(trained=False)
        change(model)
        file = read_torch_file(saved(tmp_path / "w", model))
        for trunk_only in (False, True):
            with pytest.raises(WeightsError, match=message):
                recognise_torch(file, trunk_only=trunk_only)


@pytest.mark.parametrize(("transform", "mean"), [(True, (0.5, 0.5, 0.5)), (False, (0.485, 0.456, 0.406))])
def test_a_whole_module_says_whether_it_transforms_its_input(tmp_path: Path, transform: bool, mean: Any) -> None:
    found = recognise_torch(read_torch_file(saved(tmp_path / "w", googlenet(trained=False, transform_input=transform))))
    assert found is not None
    assert found.preprocess.mean == mean


def test_dilated_networks(tmp_path: Path) -> None:
    path = saved(tmp_path / "w", create_model("xception41", output_stride=16))
    with pytest.raises(WeightsError, match=r"its layer 'blocks.11.\S+' has stride \(1, 1\), expected \(2, 2\)$"):
        imported(path)


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax"])
def test_pooling(tmp_path: Path, pool: str) -> None:
    torch.manual_seed(0)
    theirs = randomise(create_model("legacy_xception", num_classes=3, global_pool=pool), 64)
    path = saved(tmp_path / "w", theirs)
    if pool == "avgmax":
        with pytest.raises(WeightsError, match="it pools its features by 'avgmax', which ours does not"):
            imported(path)
    else:
        assert check(path, theirs, 64).config["pooling"] == pool


def test_segmentation_encoders_pad_the_stem(tmp_path: Path) -> None:
    """segmentation_models_pytorch has Cadene's names and pads the stem; only what surrounds it tells."""
    theirs: Any = foreign("timm legacy_xception")
    theirs.conv1.padding = theirs.conv2.padding = (1, 1)
    encoder = {f"encoder.{name}": tensor for name, tensor in theirs.state_dict().items() if not name.startswith("fc.")}
    path = saved(tmp_path / "w", {**encoder, "decoder.blocks.0.conv1.0.weight": torch.ones(3)})
    with pytest.raises(WeightsError, match="its trunk alone can be taken"):
        imported(path)
    ours, _, found, _ = imported(path, trunk_only=True)
    assert found.format == "segmentation_models_pytorch xception"
    x = images(80)
    with torch.no_grad():
        features = theirs.forward_features(x)
        assert (ours.forward_features(x) - features).abs().max() <= 1e-4 * features.abs().max()
    found = check(saved(tmp_path / "w", theirs), theirs)  # as a whole module it says so itself
    assert (found.config["stem"], found.config["stem_stride"]) == ("small", 2)
