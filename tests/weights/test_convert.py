"""Every family into a bundle and out again: the same bits; and what a target cannot hold is named, not lost."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from keras_networks import NARROW, info_of, our_network
from torch import Tensor, nn
from torch_networks import NETWORKS, googlenet_state, saved

from xception.data.preprocess import Preprocess
from xception.errors import ConfigError, WeightsError
from xception.models import registry
from xception.weights import convert as module
from xception.weights.bundle import BundleInfo, load_bundle, read_bundle_info, save_bundle
from xception.weights.convert import convert, targets
from xception.weights.files import TEMPORARY_PREFIX
from xception.weights.imports import Imported, import_weights
from xception.weights.keras_write import KERAS_KINDS, write_keras
from xception.weights.torch_file import read_torch_file

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def random_state(name: str, classes: int = 5) -> dict[str, Tensor]:
    """A network of another library, each of its numbers another one."""
    with torch.device("meta"):
        state = NETWORKS[name](classes).state_dict()
    generator = torch.Generator().manual_seed(0)
    return {
        key: torch.randn(t.shape, generator=generator) if t.is_floating_point() else torch.full(t.shape, 9)
        for key, t in state.items()
    }


def tensors_in(path: Path) -> dict[str, Tensor]:
    return {name: tensor.read() for name, tensor in read_torch_file(path).tensors.items()}


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


FAMILIES = {
    "timm legacy_xception": "timm/legacy_xception",
    "timm xception41": "timm/xception41",
    "timm xception65": "timm/xception65",
    "timm xception71": "timm/xception71",
    "timm xception41p": "timm/xception41p",
    "timm xception65p": "timm/xception65p",
    "timm inception_v3": "timm/inception_v3",
    "torchvision inception_v3": "torchvision/inception_v3",
    "torchvision googlenet": "torchvision/googlenet",
}
# The others are as large or larger; that their names are right is tested elsewhere.
QUICK = ("torchvision googlenet",)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in FAMILIES])
def test_round_trips_of_pytorch_files(tmp_path: Path, name: str) -> None:
    """Their tensors, a bundle, and their tensors again."""
    state = random_state(name)
    source = saved(tmp_path / "theirs.pth", state)
    into = convert(source, tmp_path / "m.safetensors")
    assert (into.format, into.container, into.to, into.fresh, into.not_kept) == (name, "torch-zip", "bundle", (), ())
    assert (into.tensors_used, into.tensors_unused, into.tensors_ignored) == (len(state), 0, 0)
    assert (into.num_classes, into.wrapper, into.average) == (5, None, False)
    assert into.input_size == (224 if "googlenet" in name else 299)
    assert into.image_size == (into.input_size,) * 2
    assert len(into.checksum or "") == 64
    back = convert(tmp_path / "m.safetensors", tmp_path / "again.pth", to=FAMILIES[name])
    assert (back.format, back.container, back.average, back.checksum) == ("bundle", None, None, None)
    assert (back.to, back.tensors_used, back.tensors_unused) == (FAMILIES[name], len(state), 0)
    assert_equal(torch.load(tmp_path / "again.pth", weights_only=True), state)
    again = convert(tmp_path / "again.pth", tmp_path / "again.safetensors")
    assert again.checksum == into.checksum
    if back.not_kept == ():
        assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "m.safetensors").read_bytes()


@pytest.fixture(scope="module")
def googlenet() -> dict[str, Tensor]:
    return googlenet_state()


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a small network, which Keras can express."""
    model = our_network(**NARROW)
    path = tmp_path_factory.mktemp("narrow") / "model.safetensors"
    save_bundle(path, model, info_of(model))
    return path


def test_a_name_in_safetensors_with_a_family_has_its_names(tmp_path: Path, googlenet: dict[str, Tensor]) -> None:
    source = saved(tmp_path / "w.pth", googlenet)
    done = convert(source, tmp_path / "w.safetensors", to="torchvision/googlenet")
    assert done.to == "torchvision/googlenet"
    assert_equal(safetensors.torch.load_file(tmp_path / "w.safetensors"), googlenet)
    # And such a file is read as theirs, not as a bundle.
    back = convert(tmp_path / "w.safetensors", tmp_path / "b.safetensors")
    assert (back.format, back.container, back.checksum) == ("torchvision googlenet", "safetensors", done.checksum)


def test_where_the_weights_lay_is_told_and_kept(tmp_path: Path, googlenet: dict[str, Tensor]) -> None:
    other = {name: torch.zeros_like(tensor) for name, tensor in googlenet.items()}
    for wrapped, wrapper, average in (
        ({"epoch": 3, "state_dict": googlenet, "optimizer": {"state": {0: torch.ones(3)}}}, "state_dict", False),
        ({"state_dict": other, "ema": {"module": googlenet}}, "ema.module", True),
    ):
        done = convert(saved(tmp_path / "w", wrapped), tmp_path / "m.safetensors")
        assert (done.wrapper, done.average) == (wrapper, average)
        model, info = load_bundle(tmp_path / "m.safetensors")
        origin = info.provenance["source"]
        assert (origin["wrapper"], origin.get("average", False)) == (wrapper, average)
        assert model.state_dict()["classifier.linear.bias"].equal(googlenet["fc.bias"])


@pytest.mark.parametrize("kind", ["keras", "keras-h5"])
@pytest.mark.parametrize("options", [{}, {"fully_connected": (7,), "dropout": 0.5}, {"in_channels": 1}], ids=str)
def test_round_trips_of_keras_files(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    model = our_network(**{**NARROW, **options})
    info = info_of(model, multi_label=True, class_names=("a", "b", "c", "d", "\u00e9"))
    name = {"keras": "m.keras", "keras-h5": "m.h5"}[kind]
    write_keras(tmp_path / name, model, info, kind)
    into = convert(tmp_path / name, tmp_path / "m.safetensors")
    assert (into.format, into.model, into.input_size, into.not_kept) == (kind, "xception", 64, ())
    found = read_bundle_info(tmp_path / "m.safetensors")
    assert (found.class_names, found.multi_label, found.preprocess) == (info.class_names, True, info.preprocess)
    (tmp_path / "again").mkdir()
    back = convert(tmp_path / "m.safetensors", tmp_path / "again" / name)
    assert (back.to, back.not_kept) == (kind, ())
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_weights_alone_keep_no_multi_label(tmp_path: Path) -> None:
    """Which .weights.h5 has no place for; logits are the same."""
    model = our_network("xception", num_classes=3)
    save_bundle(tmp_path / "m.safetensors", model, info_of(model, multi_label=True))
    done = convert(tmp_path / "m.safetensors", tmp_path / "m.weights.h5")
    assert (done.to, done.not_kept) == ("keras-weights", ("multi_label",))


def test_what_a_state_dict_has_no_place_for(tmp_path: Path) -> None:
    model = registry.create_model("googlenet", num_classes=2, auxiliary=False, input_size=96)
    info = BundleInfo(
        model="googlenet",
        config=registry.config_to_dict(model.config),
        class_names=("cat", "dog"),
        multi_label=True,
        preprocess=Preprocess(size=(96, 80)),
    )
    save_bundle(tmp_path / "m.safetensors", model, info)
    done = convert(tmp_path / "m.safetensors", tmp_path / "m.pth")
    assert (done.to, done.not_kept) == ("torchvision/googlenet", ("class_names", "multi_label", "preprocess"))
    assert (done.input_size, done.image_size) == (96, (96, 80))


def test_a_bundle_into_a_bundle_is_a_copy(tmp_path: Path, narrow: Path) -> None:
    assert convert(narrow, tmp_path / "copy.safetensors").not_kept == ()
    assert (tmp_path / "copy.safetensors").read_bytes() == narrow.read_bytes()


def test_half_precision(tmp_path: Path) -> None:
    model = our_network(**NARROW).half()
    save_bundle(tmp_path / "m.safetensors", model, info_of(model))
    assert convert(tmp_path / "m.safetensors", tmp_path / "m.keras").not_kept == ()
    back = import_weights(tmp_path / "m.keras").model.state_dict()
    assert all(torch.equal(back[k], v.float()) for k, v in model.state_dict().items() if "batches" not in k)


def test_numbers_that_are_none_come_through(tmp_path: Path, narrow: Path) -> None:
    model, info = load_bundle(narrow)
    bias = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45, 3.0])
    with torch.no_grad():
        model.get_parameter("classifier.linear.bias").copy_(bias)
    save_bundle(tmp_path / "m.safetensors", model, info)
    convert(tmp_path / "m.safetensors", tmp_path / "m.keras")
    convert(tmp_path / "m.keras", tmp_path / "again.safetensors")
    got = load_bundle(tmp_path / "again.safetensors")[0].get_parameter("classifier.linear.bias").detach()
    assert torch.equal(got.view(torch.int32), bias.view(torch.int32))


# ----------------------------------------------------------------------------------------------- what cannot be written

NARROW_TORCH = {**NARROW, "numerics": "torch"}
CANNOT: list[tuple[str, dict[str, Any], str, str | None, str]] = [
    ("xception", NARROW, "m.pth", None, "numerics is 'tf', not 'torch'"),
    ("xception", {**NARROW_TORCH, "segments": 2}, "m.pth", None, "segments is 2, not None"),
    ("xception_small", {"num_classes": 3}, "m.pth", None, "timm/legacy_xception cannot .*stem is 'small', not 'valid'"),
    ("xception", NARROW_TORCH, "m.keras", None, "cannot express numerics 'torch'"),
    ("xception", {**NARROW, "output_stride": 16}, "m.h5", None, r"dilated pools \(output_stride\)"),
    ("xception", NARROW, "m.weights.h5", None, r"weights alone do not describe it: write a \.keras file"),
    ("xception", {"numerics": "torch", "num_classes": 2, "dropout": 0.1}, "m.weights.h5", None, "numerics 'torch'"),
    ("xception", NARROW_TORCH, "m.pth", "timm/xception41", "it is a Xception, not of the kind of 'xception41'"),
    ("xception41", {"num_classes": 2}, "m.keras", None, "not XceptionAligned"),
    ("xception41", {"num_classes": 2, "output_stride": 16}, "m.pth", None, "output_stride is 16, not None"),
    ("inception_v3", {"num_classes": 2}, "m.pth", None, "torchvision/inception_v3 cannot .*numerics is 'tf'"),
    ("inception_v3", {"num_classes": 2, "auxiliary": True}, "m.keras", None, "auxiliary tower"),
    ("googlenet", {"num_classes": 2}, "m.keras", None, "not InceptionV1"),
    ("googlenet", {"num_classes": 2, "in_channels": 1}, "m.pth", None, "in_channels is 1, not 3"),
    ("inception_v1", {"num_classes": 2}, "m.pth", None, "torchvision/googlenet cannot .*large_kernel is 5, not 3"),
    ("inception_v2", {"num_classes": 2}, "m.pth", None, "has a network of the kind of 'inception_v2'; a bundle"),
]


@pytest.mark.parametrize(("name", "options", "target", "to", "message"), CANNOT)
def test_what_a_target_cannot_express_is_named(
    tmp_path: Path,
    name: str,
    options: dict[str, Any],
    target: str,
    to: str | None,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before any number is looked at: the network has none."""
    model: Any = registry.build_without_storage(name, registry.get_config(name, **options))
    imported = Imported(model=model, info=info_of(model, name), format="bundle")
    monkeypatch.setattr(module, "import_weights", lambda *_, **__: imported)
    path = tmp_path / target
    path.write_bytes(b"kept")
    with pytest.raises(WeightsError, match=rf"^cannot write {path}: .*{message}"):
        convert(tmp_path / "m.safetensors", path, to=to)
    assert path.read_bytes() == b"kept"
    assert list(tmp_path.iterdir()) == [path]


def test_requests_that_make_no_sense(tmp_path: Path, bundle: Path) -> None:
    for target, to, message in (
        ("m", None, r"cannot tell what .* should be: expected a name in \.safetensors, "),
        ("m.onnx", None, "cannot tell what"),
        ("m.pth", "timm/xception", "cannot write 'timm/xception': expected one of bundle, keras, "),
        ("m.keras", "keras-h5", r"must end in \.h5"),
        ("m.h5", "keras-weights", r"must end in \.weights\.h5"),
        ("m.weights.h5", "keras-h5", r"must end in \.h5"),
        ("m.pth", "keras", r"must end in \.keras"),
    ):
        with pytest.raises(ConfigError, match=message):
            convert(bundle, tmp_path / target, to=to)
    assert list(tmp_path.iterdir()) == [bundle]
    assert {"bundle", *KERAS_KINDS, "timm/legacy_xception"} <= set(targets())


# ------------------------------------------------------------------------------------------------------- trunks alone


def test_a_trunk_alone_goes_into_a_bundle_only(tmp_path: Path, googlenet: dict[str, Tensor]) -> None:
    headless = {name: tensor for name, tensor in googlenet.items() if not name.startswith("fc.")}
    source = saved(tmp_path / "w.pth", headless)
    with pytest.raises(WeightsError, match="its trunk alone can be taken"):
        convert(source, tmp_path / "m.safetensors")
    fresh = ("classifier.linear.weight", "classifier.linear.bias")
    done = convert(source, tmp_path / "m.safetensors", trunk_only=True)
    assert (done.fresh, done.tensors_used, done.tensors_unused) == (fresh, len(headless), 0)
    assert read_bundle_info(tmp_path / "m.safetensors").provenance["fresh"] == list(fresh)
    for given, target in (("w.pth", "a.keras"), ("m.safetensors", "a.pth")):
        with pytest.raises(WeightsError, match=rf"{given} gives a trunk without its classifier, which only a bundle"):
            convert(tmp_path / given, tmp_path / target, trunk_only=True)
        assert not (tmp_path / target).exists()
    again = convert(tmp_path / "m.safetensors", tmp_path / "again.safetensors")
    assert again.fresh == fresh
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "m.safetensors").read_bytes()


def test_class_names(tmp_path: Path, narrow: Path) -> None:
    source = narrow
    names = ["one", "two", "three", "four", "f\u00fcnf"]
    done = convert(source, tmp_path / "m.safetensors", class_names=names)
    assert done.num_classes == 5
    assert read_bundle_info(tmp_path / "m.safetensors").class_names == tuple(names)
    for wrong in (names[1:], [*names, "six"], []):
        with pytest.raises(ConfigError, match=f"expected 5 class names, got {len(wrong)}"):
            convert(source, tmp_path / "none.safetensors", class_names=wrong)
    assert not (tmp_path / "none.safetensors").exists()


# ----------------------------------------------------------------------------------------------- targets that are there


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(TEMPORARY_PREFIX)]


@pytest.mark.parametrize("link", ["", "symbolic", "hard"])
def test_onto_itself(tmp_path: Path, narrow: Path, link: str) -> None:
    """The new file takes the old one's place once it is whole; another name of the old one keeps what it had."""
    source = tmp_path / "w.keras"
    convert(narrow, source)
    before, target = source.read_bytes(), source
    if link:
        target = tmp_path / "link.keras"
        (os.symlink if link == "symbolic" else os.link)(source, target)
    done = convert(source, target, class_names=list("abcde"))
    assert (done.format, done.to) == ("keras", "keras")
    assert import_weights(target).info.class_names == tuple("abcde")
    if link == "hard":
        assert source.read_bytes() == before
    elif link:
        assert target.is_symlink()
        assert source.read_bytes() == target.read_bytes() != before
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("name", ["w.h5", "w.keras", "w.safetensors"])
def test_onto_itself_where_writing_fails(
    tmp_path: Path, narrow: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(narrow, tmp_path / name)
    before = (tmp_path / name).read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("xception.weights.files.os.replace", full)
    with pytest.raises(WeightsError, match=rf"^cannot write {tmp_path / name}: No space left on device$"):
        convert(tmp_path / name, tmp_path / name)
    monkeypatch.undo()
    assert (tmp_path / name).read_bytes() == before
    assert leftovers(tmp_path) == []


def test_targets_that_cannot_be_written(tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found before the source is read."""
    monkeypatch.setattr(module, "import_weights", lambda *_, **__: pytest.fail("read first"))
    (tmp_path / "folder.keras").mkdir()
    os.mkfifo(tmp_path / "pipe.keras")
    for target, reason in (
        ("folder.keras", "Is a directory"),
        ("none/m.keras", "No such file or directory"),
        ("model.safetensors/m.keras", "Not a directory"),
        ("pipe.keras", "expected a regular file there"),
        ("a\0b.keras", "a file name cannot hold a zero byte"),
    ):
        with pytest.raises(WeightsError, match=rf"^cannot write \S+: {reason}"):
            convert(bundle, tmp_path / target)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.keras", "model.safetensors", "pipe.keras"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path, bundle: Path) -> None:
    (tmp_path / "locked").mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(WeightsError, match="Permission denied"):
        convert(bundle, tmp_path / "locked" / "m.keras")


def test_a_source_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such bundle, run folder, checkpoint file"):
        convert(tmp_path / "none.pth", tmp_path / "m.safetensors")
    (tmp_path / "text.pth").write_text("weights")
    with pytest.raises(WeightsError, match="cannot load"):
        convert(tmp_path / "text.pth", tmp_path / "m.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["text.pth"]


def test_a_target_that_reads_back_differently_is_an_error(
    tmp_path: Path, narrow: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = module._write

    def spoilt(target: Path, imported: Any, kind: str) -> None:
        network: nn.Module = imported.model
        with torch.no_grad():
            network.get_parameter("classifier.linear.bias")[0] += 1e-6
        original(target, imported, kind)
        with torch.no_grad():
            network.get_parameter("classifier.linear.bias")[0] -= 1e-3

    monkeypatch.setattr(module, "_write", spoilt)
    with pytest.raises(WeightsError, match=r"m.safetensors was written, and reads back .*: classifier\.linear\.bias$"):
        convert(narrow, tmp_path / "m.safetensors")
