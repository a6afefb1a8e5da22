"""Genuine PyTorch and safetensors files: every number as it was saved, nothing read before it is asked for."""

from __future__ import annotations

import os
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile_pickles as hostile
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from xception.errors import WeightsError
from xception.weights.foreign import ForeignFile
from xception.weights.torch_file import read_torch_file

ZIP: dict[str, Any] = {}
LEGACY: dict[str, Any] = {"_use_new_zipfile_serialization": False}


def assert_holds(file: ForeignFile, expected: dict[str, Tensor]) -> None:
    assert list(file.tensors) == list(expected)
    for name, tensor in expected.items():
        found = file.tensors[name]
        assert (found.shape, found.dtype) == (tuple(tensor.shape), tensor.dtype), name
        read = found.read()
        assert (read.dtype, read.is_contiguous()) == (tensor.dtype, True), name
        assert torch.equal(read, tensor), name


def many_tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64)
    others = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    tensors = {str(dtype): (100 * torch.rand(3, 5)).to(dtype) for dtype in (*floats, *others)}
    return {
        **tensors,
        "whole": base,
        "transposed": base.T,
        "part": base[1:4, 2:7],
        "every second": base[::2, 1::3],
        "four dimensions": torch.randn(2, 3, 4, 5).permute(3, 1, 0, 2),
        "scalar": torch.tensor(7.0),
        "empty": torch.zeros(3, 0, 2),
        "parameter": nn.Parameter(torch.randn(4)),
        "naïve 名前": torch.randn(2),
    }


@pytest.mark.parametrize(
    "options", [ZIP, LEGACY, {"pickle_protocol": 4}, {"pickle_protocol": 5}, {**LEGACY, "pickle_protocol": 3}]
)
def test_tensors_of_every_kind(tmp_path: Path, options: dict[str, Any]) -> None:
    expected = {name: tensor.detach() for name, tensor in many_tensors().items()}
    torch.save(many_tensors(), tmp_path / "any name", **options)
    file = read_torch_file(tmp_path / "any name")
    assert_holds(file, expected)
    legacy = "_use_new_zipfile_serialization" in options
    assert file.container == ("torch-legacy" if legacy else "torch-zip")
    assert file.path == str(tmp_path / "any name")
    assert file.facts == {"wrapper": "", "average": False}


def test_safetensors(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.randn(3, 5).to(dtype) for dtype in (torch.float32, torch.float16, torch.int64)}
    safetensors.torch.save_file(tensors, tmp_path / "weights.pth", {"format": "pt"})
    file = read_torch_file(tmp_path / "weights.pth")
    assert file.container == "safetensors"
    assert {name: tensor.read().tolist() for name, tensor in file.tensors.items()} == {
        name: tensor.tolist() for name, tensor in tensors.items()
    }
    assert file.facts["metadata"] == {"format": "pt"}


def test_a_safetensors_header_may_begin_like_a_pickle(tmp_path: Path) -> None:
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(0x0280)
    data = struct.pack("<Q", len(header)) + header + struct.pack("<f", 1.5)
    assert data.startswith(b"\x80\x02")
    (tmp_path / "w").write_bytes(data)
    assert read_torch_file(tmp_path / "w").tensors["w"].read().item() == 1.5


def test_without_checksums(tmp_path: Path) -> None:
    """PyTorch can be told to leave them out: they are 0 then."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.arange(5.0)}, tmp_path / "w")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_holds(read_torch_file(tmp_path / "w"), {"w": torch.arange(5.0)})


def test_large_archives(tmp_path: Path) -> None:
    """As if the archive had more than 4 GB: sizes and places stand in 64 bits, outside of their usual fields."""
    good = hostile.zip_file()
    first, end = good.find(b"PK\x01\x02"), good.find(b"PK\x05\x06")
    directory = b""
    for entry in good[first:end].split(b"PK\x01\x02")[1:]:
        fields = bytearray(b"PK\x01\x02" + entry)
        sizes, place = fields[20:28], fields[42:46]
        wide = b"".join(bytes(part) + bytes(4) for part in (sizes[:4], sizes[4:], place))
        fields[20:28], fields[42:46] = b"\xff" * 8, b"\xff" * 4
        fields[30:32] = struct.pack("<H", 4 + len(wide))
        directory += bytes(fields) + struct.pack("<2H", 1, len(wide)) + wide
    record = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 2, 2, len(directory), first)
    place = struct.pack("<4sLQL", b"PK\x06\x07", 0, first + len(directory), 1)
    tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    (tmp_path / "w").write_bytes(good[:first] + directory + record + place + tail)
    assert_holds(read_torch_file(tmp_path / "w"), {"weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]])})


def test_what_old_pythons_and_pytorches_wrote(tmp_path: Path) -> None:
    """Python 2 has byte strings for names and gives an OrderedDict its items; PyTorch 0.3 has other functions."""
    call = hostile.pickled(hostile.tensor())[2:-1]
    utils = torch._utils
    old = hostile.Call(utils._rebuild_tensor, hostile.Stored(), 0, hostile.Call(torch.Size, (2, 2)), (2, 1))
    part = hostile.tensor(hostile.Stored(torch.FloatStorage, "0", 4, ("view", 1, 2)), 1, (1,), (1,))
    data = (
        b"\x80\x02ccollections\nOrderedDict\n(]("
        + (b"]U\x03onea" + call + b"a")
        + (b"]T\x03\0\0\0twoa" + hostile.pickled(old)[2:-1] + b"a")
        + (b"]U\x05threea" + hostile.pickled(part)[2:-1] + b"a")
        + b"etR."
    )
    whole = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    for content in (hostile.zip_file(data), hostile.legacy_file(data)):
        (tmp_path / "w").write_bytes(content)
        assert_holds(read_torch_file(tmp_path / "w"), {"one": whole, "two": whole, "three": torch.tensor([3.0])})


# ------------------------------------------------------------------------------------------- what is around the weights


SMALL = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.arange(2.0)}
OTHER = {name: tensor + 100 for name, tensor in SMALL.items()}


@pytest.mark.parametrize(
    ("value", "wrapper", "average"),
    [
        (SMALL, "", False),
        (OrderedDict(SMALL), "", False),
        ({"state_dict": SMALL}, "state_dict", False),
        ({"model_state_dict": OrderedDict(SMALL), "epoch": 3, "loss": 0.5}, "model_state_dict", False),
        ({"model": SMALL, "optimizer": {"state": {0: {"exp_avg": OTHER["a.bias"]}}}}, "model", False),
        ({"net": SMALL, "rng": torch.zeros(5)}, "net", False),
        ({"model": {"state_dict": SMALL}}, "model.state_dict", False),
        ({"state_dict": OTHER, "state_dict_ema": SMALL, "args": object}, "state_dict_ema", True),
        ({"model": OTHER, "model_ema": SMALL}, "model_ema", True),
        ({"model": OTHER, "ema": {"module": SMALL, "decay": 0.999}}, "ema.module", True),
        ({"model": SMALL, "ema": None}, "model", False),
        ({"state_dict": SMALL, "ema": {"decay": 0.5}}, "state_dict", False),
        ({**SMALL, "epoch": 3, "arch": "xception", "history": [1.0] * 10}, "", False),
    ],
)
@pytest.mark.parametrize("options", [ZIP, LEGACY])
def test_wrappers(tmp_path: Path, value: Any, wrapper: str, average: bool, options: dict[str, Any]) -> None:
    torch.save(value, tmp_path / "w", **options)
    file = read_torch_file(tmp_path / "w")
    assert_holds(file, SMALL)
    assert (file.facts["wrapper"], file.facts["average"]) == (wrapper, average)


@pytest.mark.parametrize(
    ("kept", "names"),
    [
        ({"class_names": ["cat", "dog"]}, ("cat", "dog")),
        ({"classes": ("cat", "dog")}, ("cat", "dog")),
        ({"class_to_idx": {"dog": 1, "cat": 0}}, ("cat", "dog")),
        ({"class_to_idx": {"dog": 1, "cat": 2}}, None),
        ({"class_names": [1, 2]}, None),
        ({"class_names": 5}, None),
    ],
)
def test_names_of_classes(tmp_path: Path, kept: dict[str, Any], names: tuple[str, ...] | None) -> None:
    torch.save({"model": SMALL, **kept}, tmp_path / "w")
    assert read_torch_file(tmp_path / "w").facts.get("class_names") == names


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, (1, 3), padding=(0, 1), bias=False)
        self.norm = nn.BatchNorm2d(3, eps=0.25)
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.nothing = None
        self.register_parameter("absent", None)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Inner()
        self.relu = nn.ReLU()
        self.second = nn.Sequential(self.relu, Inner(), nn.Dropout(0.3), self.relu)
        self.again = self.first
        self.register_buffer("scale", torch.tensor(3.0))
        self.settings = {"a": [1, 2, {3}], "b": object}


@pytest.mark.parametrize("options", [ZIP, LEGACY, {"pickle_protocol": 4}])
@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: {"model": m, "epoch": 3}])
def test_whole_modules(tmp_path: Path, options: dict[str, Any], wrap: Callable[[nn.Module], Any]) -> None:
    torch.manual_seed(0)
    model = Outer()
    torch.save(wrap(model), tmp_path / "w", **options)
    file = read_torch_file(tmp_path / "w")
    assert {name: tensor.read().tolist() for name, tensor in file.tensors.items()} == {
        name: tensor.tolist() for name, tensor in model.state_dict().items()
    }
    modules = file.facts["modules"]
    assert set(modules) == {name for name, _ in model.named_modules(remove_duplicate=False)}
    assert modules["second.1.norm"]["class"] == "torch.nn.modules.batchnorm.BatchNorm2d"
    assert modules["second.1.norm"]["eps"] == 0.25
    assert modules["first.conv"]["padding"] == (0, 1)
    assert modules["second.2"]["p"] == 0.3
    assert modules[""]["class"] == f"{Outer.__module__}.Outer"


def test_a_module_of_many_names_counts_once(tmp_path: Path) -> None:
    shared = nn.Linear(100, 100)
    torch.save(nn.Sequential(*[shared] * 30), tmp_path / "w")
    assert len(read_torch_file(tmp_path / "w").tensors) == 60


def touch() -> None:
    Path(hostile.SENTINEL).touch()


def test_calls_beside_the_weights_are_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    value = {"state_dict": SMALL, "more": hostile.Call(touch), hostile.Call(touch): 1}
    torch.save(value, "w")
    assert_holds(read_torch_file("w"), SMALL)
    assert not Path(hostile.SENTINEL).exists()
    pickle.loads(pickle.dumps(hostile.Call(touch)))
    assert Path(hostile.SENTINEL).exists()  # else the above would prove nothing


# ------------------------------------------------------------------------------------------------- the file on the disk


def test_numbers_stay_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(SMALL, tmp_path / "w")
    monkeypatch.chdir(tmp_path)
    file = read_torch_file("w")
    monkeypatch.chdir("/")
    assert torch.equal(file.tensors["a.bias"].read(), SMALL["a.bias"])
    data = (tmp_path / "w").read_bytes()
    (tmp_path / "w").write_bytes(data + b"x")
    with pytest.raises(WeightsError, match=r"^cannot load w: it was changed while it was read$"):
        file.tensors["a.bias"].read()
    (tmp_path / "w").unlink()
    with pytest.raises(WeightsError, match=r"^cannot read .*No such file"):
        file.tensors["a.bias"].read()


def test_a_damaged_storage_is_found_when_it_is_read(tmp_path: Path) -> None:
    torch.save({"good": torch.arange(3.0), "bad": torch.full((100,), 1.2345)}, tmp_path / "w")
    data = bytearray((tmp_path / "w").read_bytes())
    data[data.find(struct.pack("<f", 1.2345)) + 80] ^= 1
    (tmp_path / "w").write_bytes(data)
    file = read_torch_file(tmp_path / "w")
    assert torch.equal(file.tensors["good"].read(), torch.arange(3.0))
    for _ in range(2):
        with pytest.raises(WeightsError, match=r"storage '1' is damaged: its checksum does not match$"):
            file.tensors["bad"].read()


def test_places_that_hold_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("missing", "pipe", ".", "a\0b"):
        with pytest.raises(WeightsError, match=r"^cannot read ") as error:
            read_torch_file(f"{tmp_path}/{name}")
        assert str(error.value).isprintable()
