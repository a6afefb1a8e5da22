"""The HDF5 reader against the HDF5 library: the same tensors and texts from what it writes; and what is refused."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import hostile_hdf5 as hostile
import numpy as np
import pytest
import torch

from xception.errors import WeightsError
from xception.weights.hdf5 import Hdf5, read_hdf5
from xception.weights.regions import FileRegion


def opened(path: Path) -> Hdf5:
    with path.open("rb") as stream:
        region = FileRegion.of(str(path), stream)
    return read_hdf5(region)


def as_text(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [as_text(item) for item in value]
    return value.decode() if isinstance(value, bytes) else str(value)


def by_the_library(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Tensors and texts of all groups, as h5py reads them."""
    tensors: dict[str, Any] = {}
    texts: dict[str, dict[str, Any]] = {}

    def visit(name: str, found: Any) -> None:
        if isinstance(found, h5py.Dataset):
            tensors[name] = found[()]
        else:
            kept = {k: v for k, v in found.attrs.items() if not np.issubdtype(np.asarray(v).dtype, np.number)}
            texts[name] = {k: as_text(v) for k, v in kept.items()}

    with h5py.File(path) as file:
        visit("", file)
        file.visititems(visit)
    return tensors, texts


def write_everything(path: Path, members: int, **options: Any) -> None:
    """Groups, tensors and texts of every kind that is read, `members` of each."""
    generator = np.random.default_rng(0)
    with h5py.File(path, "w", **options) as file:
        file.attrs["model_config"] = b'{"x": ' + b"1" * 100_000 + b"}"
        file.attrs["text"] = "h\u00e9llo"
        file.attrs["number"] = 3
        file.attrs["fixed"] = np.array([f"name{i}".encode() for i in range(members)])
        file.attrs["variable"] = [f"name{i}" for i in range(members)]
        for i in range(members):
            group = file.create_group(f"layer_{i}_with_a_name")
            for k in range(min(members, 20)):
                group.attrs[f"attribute{k}"] = "v" * k
            group.create_dataset("nested/kernel:0", data=generator.normal(size=(3, 4, i % 5 + 1)).astype("f4"))
            if i % 7:
                continue
            chunks = (10, 7) if options.get("libver") == "latest" else (4, 3)
            plain: dict[str, Any] = {"chunks": chunks, "maxshape": (10, 7)}
            data = generator.normal(size=(10, 7))
            group.create_dataset("shuffled", data=data.astype(">f8"), compression="gzip", shuffle=True, **plain)
            group.create_dataset("compressed", data=data.astype("f2"), compression="gzip", **plain)
            group.create_dataset("chunked", data=(100 * data).astype("i8"), **plain)
            group.create_dataset("scalar", data=np.float32(3))
            group.create_dataset("truth", data=True)
            group.create_dataset("empty", data=np.zeros((0, 3)))
            group.create_dataset("unsigned", data=np.arange(5, dtype=">u4"))


@pytest.mark.parametrize("members", [1, 9, 200])
@pytest.mark.parametrize("track_order", [False, True])
@pytest.mark.parametrize("libver", ["earliest", "v108", "latest"])
def test_the_same_as_the_library(tmp_path: Path, members: int, libver: str, track_order: bool) -> None:
    path = tmp_path / "x.h5"
    write_everything(path, members, libver=libver, track_order=track_order)
    found = opened(path)
    tensors, texts = by_the_library(path)
    assert found.texts == texts
    assert found.tensors.keys() == tensors.keys()
    for name, expected in tensors.items():
        tensor = found.tensors[name]
        assert tensor.shape == expected.shape
        read = tensor.read()
        assert read.dtype == tensor.dtype
        native = expected.astype(expected.dtype.newbyteorder("=")) if expected.dtype != bool else expected
        np.testing.assert_array_equal(read.numpy(), native)


def test_tensors_stay_on_the_disk_and_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file["a"] = np.arange(4.0)
    tensor = opened(path).tensors["a"]
    assert tensor.read().tolist() == [0, 1, 2, 3]
    path.write_bytes(path.read_bytes())
    with pytest.raises(WeightsError, match="was changed while it was read"):
        tensor.read()
    path.unlink()
    with pytest.raises(WeightsError, match="cannot read"):
        tensor.read()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small file of every structure that Keras writes."""
    path = tmp_path_factory.mktemp("hdf5") / "small.h5"
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = b'{"class_name": "Functional", "config": {}}'
        weights = file.create_group("model_weights")
        weights.attrs["layer_names"] = [b"conv", b"dense"]
        for name in ("conv", "dense"):
            group = weights.create_group(name)
            group.attrs["weight_names"] = np.array([f"{name}/kernel".encode(), f"{name}/bias".encode()])
            group.create_dataset(f"{name}/kernel", data=np.ones((3, 4), "f4"))
            group.create_dataset(f"{name}/bias", data=np.ones(4, "f4"), chunks=(2,), compression="gzip", shuffle=True)
    return path


def outcome(path: Path) -> str:
    """What happened: the error, or "" where everything was read."""
    try:
        for tensor in opened(path).tensors.values():
            tensor.read()
    except WeightsError as error:
        message = str(error)
        assert message.isprintable()
        return message
    return ""


def test_changed_bytes_give_an_error_or_tensors(small: Path, tmp_path: Path) -> None:
    """The HDF5 library crashes the process on some of these and hangs on others."""
    bad, failures, slowest = tmp_path / "bad.h5", 0, 0.0
    for data in hostile.mutations(small.read_bytes(), 2_000, seed=1):
        bad.write_bytes(data)
        start = time.perf_counter()
        failures += bool(outcome(bad))
        slowest = max(slowest, time.perf_counter() - start)
    assert failures > 200
    assert slowest < 2


def test_a_file_that_was_cut_short_is_never_read(small: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.h5"
    for what, data, _ in hostile.truncations(small.read_bytes(), 150):
        bad.write_bytes(data)
        assert outcome(bad), what


def test_changed_bytes_of_the_newer_format(tmp_path: Path) -> None:
    path, bad = tmp_path / "new.h5", tmp_path / "bad.h5"
    with h5py.File(path, "w", libver="latest") as file:
        for i in range(20):
            group = file.create_group(f"g{i}")
            group["x"] = np.ones((3, 4), "f4")
            for k in range(10):
                group.attrs[f"a{k}"] = "x"
    assert outcome(path) == ""
    failures = 0
    for data in hostile.mutations(path.read_bytes(), 300, seed=2):
        bad.write_bytes(data)
        failures += bool(outcome(bad))
    assert failures > 50


def links(file: Any) -> Iterator[Any]:
    yield h5py.SoftLink("/elsewhere")
    yield h5py.ExternalLink("other.h5", "/")
    yield file["group"]


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("libver", ["earliest", "latest"])
def test_only_hard_links_to_what_has_one_name(tmp_path: Path, which: int, libver: str) -> None:
    path = tmp_path / "x.h5"
    with h5py.File(path, "w", libver=libver) as file:
        file.create_group("group")["x"] = np.zeros(3)
        file["group/link"] = list(links(file))[which]
    with pytest.raises(WeightsError, match=["a soft link", "an external link", "a second name"][which]):
        opened(path)


def test_numbers_are_read_bit_for_bit(tmp_path: Path) -> None:
    bits = np.random.default_rng(3).integers(0, 2**32, 1000, dtype=np.uint32)  # not-a-numbers with payloads included
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file["x"] = bits.view(np.float32)
    assert torch.equal(opened(path).tensors["x"].read().view(torch.int32), torch.from_numpy(bits.view(np.int32)))
