"""Folders of class folders: what is taken, what is left out, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from image_files import encode, picture, write_classes, write_image

from xception.data.folder import is_image_name
from xception.data.sources import all_samples, open_source
from xception.errors import ConfigError, DataError


def keys(source, part: str) -> list[str]:
    return list(source.splits[part].keys)


def test_a_folder_without_parts_is_split_three_ways(tmp_path: Path) -> None:
    write_classes(tmp_path, {"dog": 20, "cat": 10})
    source = open_source(tmp_path)
    assert source.class_names == ("cat", "dog")
    assert source.channels == 3
    assert not source.multi_label
    assert source.spec == str(tmp_path)
    assert source.counts() == {
        "train": {"cat": 8, "dog": 16},
        "val": {"cat": 1, "dog": 2},
        "test": {"cat": 1, "dog": 2},
    }
    assert source.split_origin == dict.fromkeys(("train", "val", "test"), "split")
    split = source.splits["train"]
    assert len(split) == len(split.keys) == len(split.targets) == 24
    assert split.keys[0].startswith("cat/")
    assert [source.class_names[t] for t in split.targets] == [key.split("/")[0] for key in split.keys]
    number = int(Path(split.keys[0]).stem)
    assert np.array_equal(split.image(0), picture(seed=1000 + number)), "cat was written second"
    assert sorted(all_samples(source).keys) == sorted(
        f"{c}/{i:03d}.png" for c, n in (("dog", 20), ("cat", 10)) for i in range(n)
    )


def test_opening_does_not_decode(tmp_path: Path) -> None:
    for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"nothing")
    assert len(all_samples(open_source(tmp_path))) == 3


def test_fractions_of_nothing_ask_for_no_part(tmp_path: Path) -> None:
    write_classes(tmp_path, {"dog": 5, "cat": 5})
    assert list(open_source(tmp_path, val_fraction=0, test_fraction=0).splits) == ["train"]
    assert list(open_source(tmp_path, val_fraction=0).splits) == ["train", "test"]


@pytest.mark.parametrize(
    "names", [("train", "val", "test"), ("Training", "VALIDATION", "testing"), ("train", "valid", "test")]
)
def test_parts_are_taken_as_they_come(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name, count in zip(names, (6, 3, 2), strict=True):
        write_classes(tmp_path / name, {"dog": count, "cat": count})
    source = open_source(tmp_path)
    assert {part: sum(n.values()) for part, n in source.counts().items()} == {"train": 12, "val": 6, "test": 4}
    assert set(source.split_origin.values()) == {"given"}
    assert keys(source, "val")[0] == f"{names[1]}/cat/000.png"


def test_a_missing_val_is_dealt_from_train_and_test_stays(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", {"dog": 20, "cat": 20})
    write_classes(tmp_path / "test", {"dog": 5, "cat": 5})
    source = open_source(tmp_path)
    assert {part: len(split) for part, split in source.splits.items()} == {"train": 36, "val": 4, "test": 10}
    assert source.split_origin == {"train": "split", "val": "split", "test": "given"}
    assert open_source(tmp_path, val_fraction=0).split_origin == {"train": "given", "test": "given"}


def test_a_missing_test_is_not_taken_from_data_with_parts(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", {"dog": 20, "cat": 20})
    write_classes(tmp_path / "val", {"dog": 5})
    assert set(open_source(tmp_path).splits) == {"train", "val"}


def test_a_folder_with_only_a_test_part_can_be_evaluated(tmp_path: Path) -> None:
    write_classes(tmp_path / "test", {"dog": 2, "cat": 2})
    source = open_source(tmp_path)
    assert list(source.splits) == ["test"]
    assert source.class_names == ("cat", "dog")


def test_the_file_system_s_order_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_classes(tmp_path, {"dog": 9, "cat": 9})
    plain = open_source(tmp_path, seed=3)
    scandir = os.scandir

    class Backwards:
        def __init__(self, path) -> None:
            with scandir(path) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *error) -> None:
            pass

    monkeypatch.setattr(os, "scandir", Backwards)
    assert open_source(tmp_path, seed=3).splits == plain.splits
    assert open_source(tmp_path, seed=4).splits != plain.splits


def test_the_fingerprint_does_not_depend_on_the_place(tmp_path: Path) -> None:
    one = open_source(write_classes(tmp_path / "one", {"dog": 5, "cat": 5}))
    two = open_source(write_classes(tmp_path / "two", {"cat": 5, "dog": 5}))
    assert one.fingerprint == two.fingerprint
    write_image(tmp_path / "two" / "cat" / "more.png")
    assert open_source(tmp_path / "two").fingerprint != one.fingerprint


def test_other_files_and_hidden_ones_are_left_out_and_folders_inside_classes_are_searched(tmp_path: Path) -> None:
    write_classes(tmp_path, {"dog": 3, "cat": 3})
    for name in ("cat/notes.txt", "cat/.hidden.png", "cat/.cache/x.png", ".git/x.png", "readme.png"):
        write_image(tmp_path / name)
    for name in ("cat/more/deep/UPPER.JPEG", "cat/more/page.tif"):
        write_image(tmp_path / name, format="JPEG" if name.endswith("JPEG") else "TIFF")
    found = sorted(all_samples(open_source(tmp_path)).keys)
    assert found == [
        "cat/000.png",
        "cat/001.png",
        "cat/002.png",
        "cat/more/deep/UPPER.JPEG",
        "cat/more/page.tif",
        "dog/000.png",
        "dog/001.png",
        "dog/002.png",
    ]


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    write_classes(tmp_path / "data", {"dog": 2, "cat": 2})
    write_classes(tmp_path, {"elsewhere": 2})
    data = tmp_path / "data"
    os.symlink(data / "cat", data / "cat" / "loop")
    os.symlink(data, data / "cat" / "above")
    os.symlink(tmp_path / "elsewhere", data / "bird")
    os.symlink(tmp_path / "elsewhere" / "000.png", data / "dog" / "linked.png")
    os.symlink("self.png", data / "dog" / "self.png")
    source = open_source(data)
    assert source.class_names == ("bird", "cat", "dog")
    found = set(all_samples(source).keys)
    assert {"bird/000.png", "dog/linked.png", "dog/self.png"} <= found
    assert len(found) < 20


def test_names_that_are_not_utf8_work(tmp_path: Path) -> None:
    root = os.fsencode(tmp_path)
    for folder in (b"caf\xe9", b"tea"):
        os.mkdir(os.path.join(root, folder))
        for name in (b"\xff\n1.png", b"2.png", b"3.png"):
            with open(os.path.join(root, folder, name), "wb") as file:
                file.write(encode(picture()))
    source = open_source(tmp_path)
    assert source.class_names == ("caf\\xe9", "tea")
    split = all_samples(source)
    assert all(split.image(index).shape == (12, 16, 3) for index in range(len(split)))
    assert any("\udcff" in key for key in split.keys)
    source.fingerprint.encode("ascii")


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({}, "no class folders"),
        ({"dog": 3}, "two classes.*only 'dog'"),
        ({"dog": 3, "cat": 0}, "'cat' holds no images"),
        ({"train/dog": 2, "train/cat": 2, "test/bird": 1}, "'bird' does not occur in train"),
        ({"train/dog": 2, "train/cat": 0}, "'train/cat' holds no images"),
        ({"train/dog": 2, "train/cat": 2, "val/dog": 1, "valid/dog": 1}, "both 'val' and 'valid'"),
        ({"train/dog": 2, "train/cat": 2, "extra/dog": 1}, "'extra' beside them holds images"),
    ],
)
def test_what_cannot_be_used_is_refused(tmp_path: Path, counts: dict[str, int], message: str) -> None:
    write_classes(tmp_path, counts)
    with pytest.raises(DataError, match=message) as caught:
        open_source(tmp_path)
    assert "\n" not in str(caught.value)


def test_images_without_class_folders_are_explained(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    with pytest.raises(DataError, match="images, but no class folders"):
        open_source(tmp_path)


def test_classes_that_are_called_like_parts_are_classes(tmp_path: Path) -> None:
    """Photographs of trains and cars: the folder holds images, so it is no part."""
    write_classes(tmp_path, {"train": 3, "car": 3})
    assert open_source(tmp_path).class_names == ("car", "train")


def test_folders_without_images_beside_parts_do_no_harm(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", {"dog": 4, "cat": 4})
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "list.txt").write_text("x")
    assert open_source(tmp_path).class_names == ("cat", "dog")


def test_an_empty_class_in_val_is_no_class(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", {"dog": 4, "cat": 4})
    write_classes(tmp_path / "val", {"dog": 4, "cat": 0, "bird": 0})
    assert open_source(tmp_path).counts()["val"] == {"cat": 0, "dog": 4}


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    write_classes(tmp_path, {"dog": 3, "cat": 3})
    (tmp_path / "cat").chmod(0)
    try:
        if os.access(tmp_path / "cat", os.R_OK):
            pytest.skip("permissions do not bind this user")
        with pytest.raises(DataError, match="cat: cannot be read: Permission denied"):
            open_source(tmp_path)
    finally:
        (tmp_path / "cat").chmod(0o700)


def test_a_root_has_no_meaning_for_a_folder(tmp_path: Path) -> None:
    write_classes(tmp_path, {"dog": 3, "cat": 3})
    with pytest.raises(ConfigError, match="root"):
        open_source(tmp_path, root=tmp_path)


def test_image_names() -> None:
    assert all(map(is_image_name, ["a.jpg", "b.JPEG", "c.TiF", "d.e.webp"]))
    assert not any(map(is_image_name, [".jpg", ".a.jpg", "jpg", "a.txt", "a.jpg.gz", ""]))
