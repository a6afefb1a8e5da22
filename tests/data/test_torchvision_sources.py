"""Torchvision's data sets by name: from the files they keep, without network; what is missing is explained."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets
from image_files import encode, picture, write_classes, write_image
from test_builtin_sources import write_fashion

from xception.data import torchvision_sets
from xception.data.check import check_images
from xception.data.sources import ArraySplit, all_samples, open_source
from xception.data.torchvision_sets import SETS, set_name
from xception.errors import DataError


@pytest.mark.parametrize("name", SETS)
def test_every_set_in_the_table_exists_and_takes_what_it_is_given(name: str) -> None:
    signature = inspect.signature(getattr(torchvision.datasets, name))
    for options in SETS[name].values():
        known = dict(options)
        if "root" in signature.parameters:
            known["root"] = "r"
        if torchvision_sets.can_download(name):
            known["download"] = False
        signature.bind(**known)


@pytest.mark.parametrize(
    "spelling", ["cifar10", "CIFAR10", "Cifar-10", "cifar_10", "torchvision/CIFAR10", "TorchVision/cifar10"]
)
def test_names_are_understood_in_any_spelling(spelling: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"torchvision/CIFAR10: its files are not in .*--download"):
        open_source(spelling, root=tmp_path)


def test_names_of_sets() -> None:
    assert set_name("fashion_mnist") == "FashionMNIST"
    assert set_name("nothing") is None
    assert len({torchvision_sets.simple_name(name) for name in SETS}) == len(SETS)


def test_sets_kept_in_memory_become_arrays(tmp_path: Path) -> None:
    images, labels = write_fashion(tmp_path / "MNIST" / "raw", train=50, test=20)
    source = open_source("torchvision/MNIST", root=tmp_path)
    assert source.class_names[3] == "3 - three"
    assert source.channels == 1
    assert {part: len(split) for part, split in source.splits.items()} == {"train": 45, "val": 5, "test": 20}
    assert source.split_origin == {"train": "split", "val": "split", "test": "given"}
    split = source.splits["train"]
    assert isinstance(split, ArraySplit)
    number = int(split.keys[7].rsplit("/", 1)[1])
    assert split.keys[7] == f"torchvision/MNIST/train/{number:04d}"
    assert np.array_equal(split.image(7)[..., 0], images[number])
    assert split.targets[7] == labels[number]


def test_planes_before_rows_are_turned_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """STL-10 and SVHN keep N C H W."""
    (tmp_path / "stl10_binary").mkdir()
    pixels = np.stack([picture(96, 96, seed=n) for n in range(24)])
    for part in ("train", "test"):
        (tmp_path / f"stl10_binary/{part}_X.bin").write_bytes(pixels.transpose(0, 3, 2, 1).tobytes())
        (tmp_path / f"stl10_binary/{part}_y.bin").write_bytes(bytes(1 + n % 2 for n in range(24)))
    (tmp_path / "stl10_binary/class_names.txt").write_text("airplane\nbird\n")
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda self: True)
    source = open_source("stl10", root=tmp_path)
    assert source.class_names == ("airplane", "bird")
    assert source.channels == 3
    split = source.splits["test"]
    assert isinstance(split, ArraySplit)
    assert all(np.array_equal(split.image(index), pixels[index]) for index in range(24))


def test_sets_of_files_are_decoded_by_us(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "eurosat" / "2750", {"Forest": 12, "River": 12})
    (root / "River" / "005.png").write_bytes(b"no image")
    source = open_source("eurosat", root=tmp_path)
    assert source.class_names == ("Forest", "River")
    assert {part: len(split) for part, split in source.splits.items()} == {"train": 20, "val": 2, "test": 2}
    split = all_samples(source)
    assert sorted(split.keys)[0] == "torchvision/EuroSAT/0000"
    bad = check_images(split, max_bad_share=0.1)
    assert [(image.key, image.reason) for image in bad] == [
        ("torchvision/EuroSAT/0017", "not a JPEG, PNG, WebP, GIF, BMP or TIFF image")
    ]
    index = list(split.keys).index("torchvision/EuroSAT/0013")
    assert np.array_equal(split.image(index), picture(seed=1001))
    assert source.class_names[split.targets[index]] == "River"


def test_sets_without_a_loader_hand_out_pictures(tmp_path: Path) -> None:
    root = tmp_path / "caltech101"
    for name in ("accordion", "BACKGROUND_Google", "bonsai"):
        for number in range(1, 6):
            write_image(root / "101_ObjectCategories" / name / f"image_{number:04d}.jpg", seed=number, format="JPEG")
    (root / "Annotations").mkdir()
    for name in ("accordion", "bonsai"):
        (root / "Annotations" / name).mkdir()
    (root / "101_ObjectCategories" / "bonsai" / "image_0005.jpg").write_bytes(b"\xff\xd8\xff broken\n")
    source = open_source("Caltech101", root=tmp_path)
    assert source.class_names == ("accordion", "bonsai")
    split = all_samples(source)
    (bad,) = check_images(split, max_bad_share=0.5)
    assert bad.reason.isprintable()
    good = next(index for index in range(len(split)) if split.keys[index] != bad.key)
    assert split.image(good).shape == (12, 16, 3)


def test_parts_by_split_name(tmp_path: Path) -> None:
    folder = tmp_path / "dtd" / "dtd"
    for name in ("banded", "dotted"):
        for number in range(3):
            write_image(folder / "images" / name / f"{name}_{number}.jpg", format="JPEG", seed=number)
    (folder / "labels").mkdir()
    for number, part in enumerate(("train", "val", "test")):
        listed = "".join(f"{name}/{name}_{number}.jpg\n" for name in ("banded", "dotted"))
        (folder / "labels" / f"{part}1.txt").write_text(listed)
    source = open_source("dtd", root=tmp_path)
    assert source.class_names == ("banded", "dotted")
    assert {part: tuple(split.targets) for part, split in source.splits.items()} == dict.fromkeys(
        ("train", "val", "test"), (0, 1)
    )
    assert set(source.split_origin.values()) == {"given"}


def test_several_labels_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    names = [f"{number:06d}.jpg" for number in range(12)]
    for number, name in enumerate(names):
        (folder / "img_align_celeba" / name).write_bytes(encode(picture(seed=number), "JPEG"))
    marks = ["1 -1 1", "-1 -1 -1", "-1 1 1"]
    (folder / "list_attr_celeba.txt").write_text(
        "12\nBald Happy Young\n" + "".join(f"{name} {marks[n % 3]}\n" for n, name in enumerate(names))
    )
    (folder / "list_eval_partition.txt").write_text("".join(f"{name} {n // 4}\n" for n, name in enumerate(names)))
    (folder / "identity_CelebA.txt").write_text("".join(f"{name} 1\n" for name in names))
    (folder / "list_bbox_celeba.txt").write_text("12\na b\n" + "".join(f"{name} 1 1\n" for name in names))
    (folder / "list_landmarks_align_celeba.txt").write_text("12\na b\n" + "".join(f"{name} 1 1\n" for name in names))
    monkeypatch.setattr(torchvision.datasets.CelebA, "_check_integrity", lambda self: True)
    source = open_source("celeba", root=tmp_path)
    assert source.multi_label
    assert source.class_names == ("Bald", "Happy", "Young")
    assert list(source.splits["train"].targets) == [(0, 2), (), (1, 2), (0, 2)]
    assert source.splits["test"].image(0).shape == (12, 16, 3)


def test_fake_data_needs_no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SETS, "FakeData", {"all": {"size": 40, "image_size": (3, 8, 9)}})  # type: ignore[index]
    source = open_source("FakeData")
    assert source.class_names == tuple("0123456789")
    split = all_samples(source)
    assert len(split) == 40
    reference = torchvision.datasets.FakeData(40, (3, 8, 9))
    for index in (0, 17):
        number = int(split.keys[index].rsplit("/", 1)[1])
        image, target = reference[number]
        assert np.array_equal(split.image(index), np.asarray(image))
        assert split.targets[index] == target


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision/CocoDetection", "not a data set of images with one class each"),
        ("torchvision/VOCSegmentation", "not a data set of images with one class each"),
        ("torchvision/UCF101", "not a data set of images with one class each"),
        ("torchvision/ImageFolder", "give the folder itself"),
        ("torchvision/CIFAR11", "did you mean CIFAR10"),
        ("torchvision/\x1b[1m", "no such data set; known: CIFAR10"),
        ("torchvision/", "no such data set"),
    ],
)
def test_other_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        open_source(name)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", sorted(set(SETS) - {"FakeData"}))
def test_missing_files_are_explained_in_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"torchvision/{name}: ") as caught:
        open_source(f"torchvision/{name}", root=tmp_path / "none")
    message = str(caught.value)
    assert message.isprintable()
    assert str(tmp_path) in message
    assert ("--download" in message) == torchvision_sets.can_download(name)


def test_a_download_that_fails_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args, **options):
        raise OSError("no route\nto host")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", fail)
    with pytest.raises(DataError, match=r"torchvision/KMNIST: the download failed \(.*\)"):
        open_source("kmnist", root=tmp_path, download=True)
