"""``xception convert`` as a person meets it: one line of JSON or a readable account, one line for a mistake."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor

from xception.cli.convert import Convert
from xception.cli.main import main
from xception.cli.parse import parse
from xception.data.preprocess import Preprocess
from xception.models import registry
from xception.weights.bundle import BundleInfo, load_bundle, read_bundle_info, save_bundle
from xception.weights.catalog import DEFAULTS, find_checkpoint, list_checkpoints
from xception.weights.convert import targets

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:keras"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:timm"),
]
NARROW: dict[str, Any] = {
    "num_classes": 3, "stem_widths": (4, 6), "entry_widths": (8,), "middle_modules": 1, "exit_widths": (14, 16),
    "input_size": 48,
}  # fmt: skip
Told = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    return tmp_path


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Told:
    """Runs a conversion that is well, and returns its one line of JSON."""

    def run(*arguments: str) -> dict[str, Any]:
        status = main(["convert", *arguments, "--json"])
        out, err = capsys.readouterr()
        assert (status, err) == (0, "")
        assert out.count("\n") == 1
        line: dict[str, Any] = json.loads(out)
        return line

    return run


@pytest.fixture(scope="session")
def state() -> dict[str, Tensor]:
    """The smallest network of another library, its numbers random, its variances not negative."""
    with torch.device("meta"):
        empty = torchvision.models.googlenet(weights=None, num_classes=3, aux_logits=False, init_weights=False)
    torch.manual_seed(0)
    filled = {}
    for name, tensor in empty.state_dict().items():
        if not tensor.is_floating_point():
            filled[name] = torch.full(tensor.shape, 7)
        elif tensor.dim() > 1:
            filled[name] = torch.randn(tensor.shape) * (2 / tensor[0].numel()) ** 0.5
        else:
            filled[name] = torch.rand(tensor.shape) + 0.5
    return filled


@pytest.fixture
def theirs(here: Path, state: dict[str, Tensor]) -> Path:
    """As a training script leaves it."""
    torch.save({"epoch": 9, "state_dict_ema": state, "optimizer": {}}, "theirs.pth")
    return here / "theirs.pth"


@pytest.fixture
def narrow(here: Path) -> Path:
    """A bundle of a network that Keras can express."""
    torch.manual_seed(0)
    model = registry.create_model("xception", **NARROW)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
    info = BundleInfo(
        model="xception",
        config=registry.config_to_dict(model.config),
        class_names=("cup", "fork", "caf\u00e9"),
        multi_label=True,
        preprocess=Preprocess(size=(48, 48), resize="squash"),
    )
    save_bundle(here / "narrow.safetensors", model, info)
    return here / "narrow.safetensors"


def mistake(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What is said to a conversion that fails."""
    assert main(["convert", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("xception: error: ")
    assert err.count("\n") == 1
    return err


def test_a_pytorch_file_and_back(theirs: Path, state: dict[str, Tensor], told: Told) -> None:
    line = told("theirs.pth", "ours.safetensors")
    expected = {
        "format": "torchvision googlenet", "model": "googlenet", "tensors_used": len(state), "tensors_unused": 0,
        "num_classes": 3, "input_size": 224, "wrapper": "state_dict_ema", "average": True, "container": "torch-zip",
        "to": "bundle", "fresh": [], "not_kept": [], "source": "theirs.pth", "target": "ours.safetensors",
    }  # fmt: skip
    assert {key: line[key] for key in expected} == expected
    assert type(line["input_size"]) is int
    assert "verified" not in line
    back = told("ours.safetensors", "again.pth")
    assert (back["format"], back["to"], back["tensors_unused"]) == ("bundle", "torchvision/googlenet", 0)
    again = torch.load("again.pth", weights_only=True)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())


def test_keras_files_and_back(narrow: Path, told: Told) -> None:
    assert told("narrow.safetensors", "theirs.keras")["to"] == "keras"
    assert told("theirs.keras", "theirs.h5")["format"] == "keras"
    line = told("theirs.h5", "again.safetensors")
    assert (line["format"], line["model"], line["num_classes"], line["input_size"]) == ("keras-h5", "xception", 3, 48)
    (before, info), (after, found) = load_bundle(narrow), load_bundle("again.safetensors")
    assert (found.class_names, found.multi_label, found.preprocess) == (
        ("cup", "fork", "caf\u00e9"),
        True,
        info.preprocess,
    )
    expected, got = before.state_dict(), after.state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items() if "batches" not in name)


def test_a_readable_account(theirs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "theirs.pth", "ours.safetensors"]) == 0
    lines = capsys.readouterr().out.splitlines()
    parts = {line[:13].strip(): line[13:] for line in lines}
    assert list(parts) == ["read", "network", "tensors", "found under", "checksum", "written"]
    assert parts["read"] == "theirs.pth (torchvision googlenet)"
    assert parts["network"] == "googlenet, 5,602,979 parameters, 3 classes, images of 224x224"
    assert parts["tensors"] == "344, every one used once, none unused"
    assert parts["found under"] == "state_dict_ema, an average of the weights"
    assert parts["checksum"].endswith("(SHA-256, as read)")
    assert parts["written"] == "ours.safetensors (bundle), read back: equal bit for bit"
    assert main(["convert", "ours.safetensors", "w.safetensors", "--to", "torchvision/googlenet"]) == 0
    assert "w.safetensors (torchvision/googlenet)" in capsys.readouterr().out


def test_what_is_lost_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    model = registry.create_model("googlenet", num_classes=1, auxiliary=False)
    info = BundleInfo(
        model="googlenet",
        config=registry.config_to_dict(model.config),
        class_names=("cat",),
        multi_label=True,
        preprocess=Preprocess(size=(224, 224)),
    )
    save_bundle("one.safetensors", model, info)
    assert main(["convert", "one.safetensors", "one.pth"]) == 0
    out = capsys.readouterr().out
    assert "1 class, images" in out
    assert "not kept  class_names, preprocess: a bundle holds them" in out


def test_trunk_only(theirs: Path, state: dict[str, Tensor], told: Told, capsys: pytest.CaptureFixture[str]) -> None:
    strange = {**state, "fc.attention": torch.ones(3)}
    torch.save(strange, "strange.pth")
    assert "its trunk alone can be taken" in mistake(capsys, "strange.pth", "m.safetensors")
    assert not Path("m.safetensors").exists()
    line = told("strange.pth", "m.safetensors", "--trunk-only")
    assert line["fresh"] == ["classifier.linear.weight", "classifier.linear.bias"]
    assert (line["tensors_used"], line["tensors_unused"], line["tensors_ignored"]) == (342, 0, 3)
    assert "which only a bundle" in mistake(capsys, "m.safetensors", "m.pth")
    assert main(["convert", "strange.pth", "m.safetensors", "--trunk-only"]) == 0
    out = capsys.readouterr().out
    assert "classifier.linear.bias: to be trained" in out
    assert "parameters, no classifier, images of 224x224" in out


# ---------------------------------------------------------------------------------------------------------- class names


def test_class_names(theirs: Path, told: Told, here: Path) -> None:
    (here / "names.txt").write_bytes("\ufeffcup\r\n\r\n  tea spoon \r\ncaf\u00e9\u2028x\n\n".encode())
    told("theirs.pth", "m.safetensors", "--class-names", "names.txt")
    assert read_bundle_info("m.safetensors").class_names == ("cup", "tea spoon", "caf\u00e9\u2028x")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"cup\nfork\n", "expected 3 class names, got 2"),
        (b"", "expected 3 class names, got 0"),
        (b"a\nb\nc\nd\n", "expected 3 class names, got 4"),
        (b"caf\xe9\nfork\ncup\n", "names.txt: expected a UTF-8 text file with a class name a line"),
        (b"\xff\xfec\0u\0p\0", "names.txt: expected a UTF-8 text file"),
        (None, "cannot read names.txt: No such file or directory"),
        ("folder", "cannot read names.txt: "),
        ("pipe", "cannot read names.txt: "),
        ("endless", "names.txt: larger than a list of class names can be"),
    ],
)
def test_class_names_that_are_none(
    theirs: Path, here: Path, data: bytes | str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names = here / "names.txt"
    if data == "folder":
        names.mkdir()
    elif data == "pipe":
        os.mkfifo(names)
    elif data == "endless":
        with names.open("wb") as stream:
            stream.truncate(1 << 40)
    elif isinstance(data, bytes):
        names.write_bytes(data)
    assert message in mistake(capsys, "theirs.pth", "m.safetensors", "--class-names", "names.txt")
    assert not (here / "m.safetensors").exists()


# ------------------------------------------------------------------------------------------------------------- mistakes


def test_mistakes(theirs: Path, narrow: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "text.pth").write_text("weights\n")
    (here / "folder.safetensors").mkdir()
    before = sorted(here.iterdir())
    for arguments, says in (
        (["none.pth", "m.safetensors"], "no such bundle, run folder, checkpoint file"),
        (["text.pth", "m.safetensors"], "cannot load text.pth: not a safetensors file"),
        (["xception", "m.safetensors"], "'xception' names a network"),
        (["folder.safetensors", "m.safetensors"], "holds no model.safetensors"),
        (["theirs.pth", "m"], "cannot tell what m should be"),
        (["theirs.pth", "m.keras"], "only Xception and Inception v3 can be written for Keras"),
        (["theirs.pth", "m.pth", "--to", "timm/xception"], "cannot write 'timm/xception': expected one of bundle"),
        (["theirs.pth", "m.pth", "--to", "timm/xception41"], "it is a InceptionV1, not of the kind of 'xception41'"),
        (["narrow.safetensors", "m.pth"], "cannot write m.pth: timm/legacy_xception cannot express this network"),
        (["narrow.safetensors", "m.keras", "--to", "keras-h5"], "must end in .h5"),
        (["theirs.pth", "folder.safetensors"], "cannot write folder.safetensors: Is a directory"),
        (["theirs.pth", "no/folder/m.safetensors"], "cannot write no/folder/m.safetensors: No such file"),
        (["theirs.pth", "text.pth/m.safetensors"], "Not a directory"),
        (["theirs.pth"], "TARGET"),
        ([], "SOURCE"),
    ):
        assert says in mistake(capsys, *arguments), arguments
        assert sorted(here.iterdir()) == before, arguments


def test_names_that_cannot_be_printed(theirs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As they come from the shell, which has bytes."""
    name = os.fsdecode(b"caf\xe9\n.safetensors")
    assert main(["convert", "theirs.pth", name]) == 0
    assert "caf\\xe9\\n.safetensors (bundle)" in capsys.readouterr().out
    assert Path(name).exists()
    assert "cannot tell what caf\\xe9 should be" in mistake(capsys, "theirs.pth", os.fsdecode(b"caf\xe9"))


# --------------------------------------------------------------------------------------------------------------- verify


def test_verify_a_pytorch_file(theirs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "theirs.pth", "m.safetensors", "--verify"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"\nverified     logits of torchvision {torchvision.__version__} on 2x3x224x224 differ by " in out


def test_verify_a_keras_file(narrow: Path, told: Told) -> None:
    told("narrow.safetensors", "theirs.keras")
    found = told("theirs.keras", "m.safetensors", "--verify")["verified"]
    assert found["framework"].startswith("keras 3.")
    assert found["passed"] is True


def test_a_difference_is_told_and_the_target_kept(
    theirs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from xception.weights import verify_torch

    original = verify_torch._load

    def spoilt(network: Any, state: dict[str, Tensor], framework: str) -> None:
        original(network, {**state, "conv2.bn.bias": state["conv2.bn.bias"] + 0.01}, framework)

    monkeypatch.setattr(verify_torch, "_load", spoilt)
    assert main(["convert", "theirs.pth", "m.safetensors", "--verify"]) == 1
    out, err = capsys.readouterr()
    assert err == "xception: the target differs from its source by more than it may; it was kept\n"
    assert "\nNOT EQUAL    logits of torchvision " in out
    load_bundle("m.safetensors")
    found = {"framework": "f", "inputs": [2], "compared": "logits", "max_relative_difference": 0.5}
    monkeypatch.setattr("xception.weights.verify.verify", lambda *_: found)
    assert main(["convert", "theirs.pth", "m.safetensors", "--verify", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["verified"] == {**found, "passed": False}


def test_a_framework_that_fails_leaves_the_target(
    theirs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ImportError("cannot import timm")

    monkeypatch.setattr("xception.weights.verify.run_torch", fail)
    says = mistake(capsys, "theirs.pth", "m.safetensors", "--verify")
    assert says.endswith(": cannot import timm; m.safetensors was written, and is not verified\n")
    load_bundle("m.safetensors")


def test_what_cannot_be_verified_is_told_before_anything_is_written(
    theirs: Path, narrow: Path, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = theirs.read_bytes()
    assert "is a bundle already" in mistake(capsys, "narrow.safetensors", "m.keras", "--verify")
    assert "give the target another name" in mistake(capsys, "theirs.pth", "./theirs.pth", "--verify")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    says = mistake(capsys, "theirs.pth", "m.safetensors", "--verify")
    assert says == "xception: error: --verify needs timm (pip install timm)\n"
    assert sorted(path.name for path in here.iterdir()) == ["narrow.safetensors", "theirs.pth"]
    assert theirs.read_bytes() == before


# ------------------------------------------------------------------------------------------------------------- its page

PAGE = (Path(__file__).parents[2] / "docs" / "weights.md").read_text(encoding="utf-8")


def test_the_page_lists_what_is_published() -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if line.startswith("| `")]
    listed = {row[0].strip("`"): row[1:] for row in rows if len(row) == 5}
    assert {name: row for name, row in listed.items() if "_in1k" in name}.keys() == set(list_checkpoints())
    for name in list_checkpoints():
        found = find_checkpoint(name)
        model, top1, top5, source = listed[name]
        assert (model, source) == (f"`{found.model}`", found.source)
        figures = {key: float(text) for key, text in (("top1", top1), ("top5", top5)) if text}
        assert figures == dict(found.published)
    for model, name in DEFAULTS.items():
        assert f"`{model}`: `{name}`" in " ".join(PAGE.split())


def test_the_page_names_every_target() -> None:
    assert [kind for kind in targets() if f"`{kind}`" not in PAGE] == []


def test_the_pages_commands_are_understood() -> None:
    (block,) = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.S)
    for line in block.splitlines():
        command = parse(shlex.split(line, comments=True)[1:])
        assert isinstance(command, Convert), line
