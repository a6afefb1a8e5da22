"""The bundled digits are scikit-learn's; Fashion-MNIST is read from wherever its files are, or explained."""

from __future__ import annotations

import gzip
import os
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from xception.data import builtin
from xception.data.builtin import read_idx
from xception.data.sources import all_samples, open_source
from xception.errors import ConfigError, DataError


def idx(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def write_fashion(folder: Path, packed: bool = False, train: int = 60, test: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """A small copy of the data set's four files; the training images and labels."""
    folder.mkdir(parents=True)
    chance = np.random.default_rng(0)
    kept = []
    for stem, count in (("train", train), ("t10k", test)):
        images = chance.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        kept += [images, labels]
        for name, values in (("images-idx3", images), ("labels-idx1", labels)):
            path = folder / f"{stem}-{name}-ubyte"
            if packed:
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(idx(values), mtime=0))
            else:
                path.write_bytes(idx(values))
    return kept[0], kept[1]


def test_digits_are_those_of_scikit_learn() -> None:
    reference = load_digits()
    split = open_source("digits", val_fraction=0, test_fraction=0).splits["train"]
    pixels = np.stack([split.image(index)[..., 0] for index in range(len(split))])
    assert np.array_equal(pixels, np.floor(reference.images * 255 / 16 + 0.5))
    assert list(split.targets) == reference.target.tolist()


def test_digits_are_split_evenly_and_named() -> None:
    source = open_source("digits")
    assert source.class_names == tuple("0123456789")
    assert source.channels == 1
    assert not source.multi_label
    assert {part: len(split) for part, split in source.splits.items()} == {"train": 1437, "val": 180, "test": 180}
    for counts in source.counts().values():
        assert max(counts.values()) - min(counts.values()) <= 0.1 * sum(counts.values())
    assert set(source.split_origin.values()) == {"split"}
    assert sorted(all_samples(source).keys) == [f"digits/{index:04d}" for index in range(1797)]
    image = source.splits["test"].image(0)
    assert image.shape == (8, 8, 1)
    assert image.dtype == np.uint8
    assert open_source("digits", seed=1).fingerprint != source.fingerprint
    assert open_source("digits").fingerprint == source.fingerprint


def test_the_origin_of_the_digits_is_noted_beside_them() -> None:
    folder = Path(builtin.__file__).parent
    assert (folder / "digits.csv.gz").is_file()
    notice = (folder / "NOTICE.txt").read_text()
    assert "CC BY 4.0" in notice
    assert "digits.csv.gz" in notice


def test_digits_take_no_root() -> None:
    with pytest.raises(ConfigError, match="root"):
        open_source("digits", root="/tmp")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("layout", ["FashionMNIST/raw", "fashion-mnist", "."])
def test_fashion_mnist_is_read_from_every_layout(tmp_path: Path, packed: bool, layout: str) -> None:
    images, labels = write_fashion(tmp_path / "root" / layout, packed)
    source = open_source("fashion-mnist", root=tmp_path / "root")
    assert source.class_names[0] == "T-shirt/top"
    assert source.channels == 1
    assert {part: len(split) for part, split in source.splits.items()} == {"train": 54, "val": 6, "test": 20}
    assert source.split_origin == {"train": "split", "val": "split", "test": "given"}
    split = source.splits["train"]
    number = int(split.keys[10].rsplit("/", 1)[1])
    assert split.keys[10] == f"fashion-mnist/train/{number:04d}"
    assert np.array_equal(split.image(10)[..., 0], images[number])
    assert split.targets[10] == labels[number]


def test_fashion_mnist_is_found_by_environment_and_in_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "DEBIAN_FASHION", str(tmp_path / "none"))
    monkeypatch.setenv("XCEPTION_DATA", str(tmp_path / "one"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"apt install dataset-fashion-mnist.*--download") as caught:
        open_source("fashion-mnist")
    for place in ("none", "one/FashionMNIST/raw", "data/FashionMNIST/raw"):
        assert place in str(caught.value).replace(os.sep, "/")
    write_fashion(tmp_path / "data" / "FashionMNIST" / "raw", train=70)
    assert len(all_samples(open_source("fashion-mnist"))) == 90
    write_fashion(tmp_path / "one" / "FashionMNIST" / "raw")
    assert len(all_samples(open_source("fashion-mnist"))) == 80


@pytest.mark.skipif(not Path(builtin.DEBIAN_FASHION).is_dir(), reason="needs the package dataset-fashion-mnist")
def test_the_package_s_files_are_the_whole_data_set() -> None:
    source = open_source("fashion-mnist")
    assert {part: len(split) for part, split in source.splits.items()} == {"train": 54000, "val": 6000, "test": 10000}
    for part, each in (("train", 5400), ("val", 600), ("test", 1000)):
        assert Counter(source.splits[part].targets) == dict.fromkeys(range(10), each)
    # The set's own description: mean and standard deviation of the training pixels are 0.2860 and 0.3530.
    pixels = source.splits["train"].array / 255
    assert abs(pixels.mean() - 0.2860) < 1e-4
    assert abs(pixels.std() - 0.3530) < 1e-4


def test_a_download_that_fails_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets

    def fail(*args, **options):
        raise OSError("no route\nto host")

    monkeypatch.setattr(builtin, "DEBIAN_FASHION", str(tmp_path / "none"))
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", fail)
    with pytest.raises(DataError, match=r"download into .* failed: no route to host"):
        open_source("fashion-mnist", root=tmp_path, download=True)


def break_file(folder: Path, name: str, data: bytes | None) -> None:
    path = folder / name
    path.unlink()
    if data is not None:
        path.write_bytes(data)


LABELS = (np.arange(60) % 10).astype(np.uint8)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("train-labels-idx1-ubyte", None, "train-labels-idx1-ubyte .* is missing"),
        ("train-labels-idx1-ubyte", idx(LABELS[:59]), "60 train images, but 59 labels"),
        ("train-labels-idx1-ubyte", idx(LABELS + 1), "labels up to 10"),
        ("train-labels-idx1-ubyte", idx(LABELS)[:-1], "exactly"),
        ("train-labels-idx1-ubyte", idx(LABELS) + b"x", "exactly"),
        ("train-labels-idx1-ubyte", b"\0\0\x0d\1" + idx(LABELS)[4:], "not an IDX file"),
        ("train-images-idx3-ubyte", idx(LABELS), "not an IDX file"),
        ("train-images-idx3-ubyte", b"", "not an IDX file"),
        ("train-images-idx3-ubyte", bytes([0, 0, 8, 3]) + struct.pack(">III", 2**31, 2**31, 2**31), "truncated"),
        ("train-images-idx3-ubyte", gzip.compress(bytes([0, 0, 8, 3]) + b"\xff" * 12, mtime=0), "truncated"),
        ("train-labels-idx1-ubyte", gzip.compress(idx(LABELS), mtime=0)[:-9], "cannot be read"),
        ("train-labels-idx1-ubyte", gzip.compress(idx(LABELS), mtime=0)[:-6] + b"123456", "cannot be read"),
        ("train-labels-idx1-ubyte", b"\x1f\x8b" + bytes(90), "cannot be read"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, name: str, data: bytes | None, message: str) -> None:
    folder = tmp_path / "FashionMNIST" / "raw"
    write_fashion(folder)
    break_file(folder, name, data)
    with pytest.raises(DataError, match=message) as caught:
        open_source("fashion-mnist", root=tmp_path)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("shape", [(0,), (7,), (3, 4, 5), (1, 1, 1)])
def test_idx_files_of_any_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    (tmp_path / "plain").write_bytes(idx(values))
    (tmp_path / "packed").write_bytes(gzip.compress(idx(values), mtime=0))
    for name in ("plain", "packed"):
        assert np.array_equal(read_idx(str(tmp_path / name), dimensions=len(shape)), values)


def test_every_truncation_of_an_idx_file_is_noticed(tmp_path: Path) -> None:
    data = idx(LABELS)
    for cut in (data, gzip.compress(data, mtime=0)):
        for size in range(len(cut)):
            (tmp_path / "file").write_bytes(cut[:size])
            with pytest.raises(DataError):
                read_idx(str(tmp_path / "file"), dimensions=1)
