"""Tar shards: what is read, what each mistake is called, and that nothing but members is ever touched."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import picture
from tars import END, header, image_bytes, sample, tar_bytes, write_tar

from xception.data import shards, tar_shards
from xception.data.check import check_images, clean_source
from xception.data.sources import DataSource, all_samples, open_source
from xception.data.tar_index import read_members
from xception.data.tar_shards import write_shards
from xception.errors import ConfigError, DataError, ImageError, XceptionError

LABELS: dict[str, list[str]] = {
    "0001": ["cat", "indoors"],
    "0002": ["dog"],
    "0003": [],
    "0004": ["cat", "dog", "outdoors"],
}


def labels_of(source: DataSource) -> dict[str, Any]:
    split = all_samples(source)
    named = (t if isinstance(t, tuple) else (t,) for t in split.targets)
    return {key: [source.class_names[k] for k in t] for key, t in zip(split.keys, named, strict=True)}


def whole(path: Path | str, **options: Any) -> DataSource:
    return open_source(path, val_fraction=0, test_fraction=0, **options)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    found = [sample(name, labels, seed=i) for i, (name, labels) in enumerate(LABELS.items())]
    return write_tar(tmp_path / "data.tar", *found)


# ------------------------------------------------------------------------------------------------ what is read


def test_images_and_label_lists(shard: Path) -> None:
    source = whole(shard)
    assert source.multi_label
    assert source.class_names == ("cat", "dog", "indoors", "outdoors")
    assert labels_of(source) == {f"data.tar/{name}": labels for name, labels in LABELS.items()}
    split = source.splits["train"]
    for index in (3, 0, 2, 1, 3):
        assert np.array_equal(split.image(index), picture(12, 16, index))
    assert check_images(split) == []


@pytest.mark.parametrize(
    ("ending", "labels", "expected"),
    [
        ("json", {"labels": ["b", "a", "b"], "caption": "x"}, ["a", "b"]),
        ("json", {"labels": "a"}, ["a"]),
        ("json", {"label": ["a", "b"]}, ["a", "b"]),
        ("json", [3, 10], ["10", "3"]),
        ("cls", "b; a", ["a", "b"]),
        ("cls", "7;8\n", ["7", "8"]),
    ],
)
def test_spellings_of_several_labels(tmp_path: Path, ending: str, labels: Any, expected: list[str]) -> None:
    path = write_tar(tmp_path / "x.tar", sample("1", labels, ending=ending), sample("2", ["z"]))
    source = whole(path)
    assert source.multi_label
    assert labels_of(source)["x.tar/1"] == expected


@pytest.mark.parametrize(
    ("ending", "labels", "expected"),
    [("cls", "7\n", "7"), ("cls", "cat", "cat"), ("json", {"label": "cat"}, "cat"), ("json", 7, "7")],
)
def test_spellings_of_one_label(tmp_path: Path, ending: str, labels: Any, expected: str) -> None:
    source = whole(write_tar(tmp_path / "x.tar", sample("1", labels, ending=ending), sample("2", "dog", ending="cls")))
    assert not source.multi_label
    assert labels_of(source) == {"x.tar/1": [expected], "x.tar/2": ["dog"]}


def test_cls_comes_before_json_and_other_files_are_left_alone(tmp_path: Path) -> None:
    members = {
        **sample("a/1", {"width": 16}),
        "a/1.cls": b"cat",
        "a/1.seg.png": b"no image",
        "a/1.txt": b"a caption",
        "a/.hidden.png": b"",
        "README": b"words",
        **sample("./b/1", "dog", ending="cls"),
    }
    source = whole(write_tar(tmp_path / "x.tar", members))
    assert labels_of(source) == {"x.tar/a/1": ["cat"], "x.tar/b/1": ["dog"]}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_kind_of_header(tmp_path: Path, format: int) -> None:
    long = "/".join(["folder" * 5] * (3 if format == tarfile.USTAR_FORMAT else 8)) + "/photo"
    names = [long, "plain"] + ([] if format == tarfile.USTAR_FORMAT else ["naïve 사진", "n" * 300])
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=format) as tar:
        tar.add(tmp_path, "a folder", recursive=False)
    samples = [sample(name, ["cat"], seed=i) for i, name in enumerate(names)]
    write_tar(path, *samples, format=format)
    source = whole(path)
    assert list(source.splits["train"].keys) == [f"x.tar/{name}" for name in names]
    for i in range(len(names)):
        assert np.array_equal(source.splits["train"].image(i), picture(12, 16, i))


def test_gnu_tar_itself(tmp_path: Path) -> None:
    program = shutil.which("tar")
    if program is None:
        pytest.skip("needs tar")
    for name, data in {**sample("s/1", ["cat"]), **sample("s/" + "y" * 200, ["dog"], seed=1)}.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data)
    for format in ("v7", "oldgnu", "gnu", "ustar", "posix"):
        path = tmp_path / f"{format}.tar"
        short = ["s/1.png", "s/1.json"] if format in ("v7", "ustar") else ["s"]
        words = [program, f"--format={format}", "-cf", str(path), "-C", str(tmp_path / "in"), *short]
        subprocess.run(words, check=True)
        keys = {f"{format}.tar/s/1"} | (set() if format in ("v7", "ustar") else {f"{format}.tar/s/{'y' * 200}"})
        assert set(labels_of(whole(path))) == keys


def test_parts_by_name_and_by_folder(tmp_path: Path) -> None:
    places = {
        "train-000.tar": "Train/0.tar",
        "train-001.tar": "Train/1.tar",
        "validation_0.tar": "valid/train.tar",
        "test.0.tar": "test/0.tar",
    }
    for (name, place), label in zip(places.items(), "abab", strict=True):
        write_tar(tmp_path / "named" / name, sample("1", [label]))
        write_tar(tmp_path / "folders" / place, sample("1", [label]))
    for kind in ("named", "folders"):
        source = open_source(tmp_path / kind, val_fraction=0.5)
        assert {part: len(split) for part, split in source.splits.items()} == {"train": 2, "val": 1, "test": 1}
        assert set(source.split_origin.values()) == {"given"}
    assert list(open_source(tmp_path / "named").splits["train"].keys) == ["train-000.tar/1", "train-001.tar/1"]
    write_tar(tmp_path / "named" / "extra.tar", sample("1", ["a"]))
    with pytest.raises(
        DataError, match=r"'?test\.0\.tar is of the part 'test', but the name of extra\.tar says no part"
    ):
        open_source(tmp_path / "named")


def test_a_folder_of_class_folders_with_a_tar_beside_them_stays_one(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(image_bytes())
    write_tar(tmp_path / "download.tar", sample("1", ["x"]))
    assert open_source(tmp_path).class_names == ("cat", "dog")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert open_source(tmp_path).class_names == ("cat", "dog")


def test_the_same_data_in_other_shards_has_the_same_images_and_labels(tmp_path: Path) -> None:
    source = open_source("digits", seed=3)
    small = write_shards(source, tmp_path / "small", images_per_shard=100)
    large = write_shards(source, tmp_path / "large", images_per_shard=10_000)
    assert (len(small), len(large)) == (15 + 2 + 2, 3)
    for folder in ("small", "large"):
        again = open_source(tmp_path / folder)
        assert (again.class_names, again.multi_label) == (source.class_names, False)
        for part, split in source.splits.items():
            assert again.splits[part].targets == split.targets
            for index in (0, len(split) - 1):
                assert np.array_equal(again.splits[part].image(index)[..., :1], split.image(index))


def test_writing_leaves_nothing_half_done(tmp_path: Path) -> None:
    source = open_source("digits")
    first = write_shards(source, tmp_path / "once", images_per_shard=500)
    second = write_shards(source, tmp_path / "twice", images_per_shard=500)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    with pytest.raises(ConfigError, match="exists: name a new folder"):
        write_shards(source, tmp_path / "once")
    with pytest.raises(ConfigError, match="images_per_shard must be 1 or more; got 0"):
        write_shards(source, tmp_path / "third", images_per_shard=0)
    bad = write_tar(tmp_path / "bad.tar", {"1.png": b"x", "1.json": b'["a"]'}, sample("2", ["a"]))
    with pytest.raises(ImageError):
        write_shards(whole(bad), tmp_path / "third")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.tar", "once", "twice"]


# ------------------------------------------------------------------------------------------------ damaged samples


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"9.png": image_bytes()}, "no .json or .cls with its labels beside it"),
        ({"9.json": b'["cat"]'}, "labels, but no image"),
        ({**sample("9", ["cat"]), "9.jpg": image_bytes()}, "several images of this name"),
        ({"9.png": image_bytes(), "9.json": b'["cat"'}, "its .json is not well-formed JSON"),
        ({"9.png": image_bytes(), "9.json": b"[" * 60_000}, "its .json is not well-formed JSON"),
        ({"9.png": image_bytes(), "9.json": b'["\xff"]'}, "its .json is not UTF-8"),
        ({"9.png": image_bytes(), "9.cls": b"\xff"}, "its .cls is not UTF-8"),
        (sample("9", {"class": "x"}), "expected 'labels' or 'label' in its object"),
        (sample("9", [1.5]), "a name or a whole number, got one of type float"),
        (sample("9", [None]), "a name or a whole number, got none"),
        (sample("9", [True]), "got one of type bool"),
        (sample("9", [["cat"]]), "got one of type list"),
        (sample("9", ["cat", " "]), "an empty label"),
        (sample("9", "cat;;dog", ending="cls"), "an empty label"),
        (sample("9", "", ending="cls"), "an empty label"),
        (sample("9", ["x" * 1001]), "more than 1,000 characters"),
        (sample("9", list(range(10_001))), "10,001 labels, more than 10,000"),
        ({"9.png": image_bytes(), "9.json": b"[" + b"1" * 5000 + b"]"}, "its .json"),
        ({"9.png": image_bytes(), "9.json": b" " * 65_537}, "65,537 bytes, more than 65,536"),
        ({"9.png": b"no image at all", "9.json": b'["cat"]'}, "image"),
        ({"9.png": image_bytes()[:-40], "9.json": b'["cat"]'}, ""),
        ({"9.png": b"", "9.json": b'["cat"]'}, ""),
    ],
)
def test_a_damaged_sample_is_named_by_the_check_and_left_out(
    tmp_path: Path, members: dict[str, bytes], reason: str
) -> None:
    good = [sample(f"{i:04d}", ["cat"], seed=i) for i in range(3)]
    source = whole(write_tar(tmp_path / "x.tar", *good, members, sample("last", ["cat", "dog"])))
    cleaned, bad = clean_source(source, max_bad_share=0.5)
    assert [image.key for image in bad] == ["x.tar/9"]
    assert reason in bad[0].reason
    assert "\n" not in bad[0].reason
    (tmp_path / "clean").mkdir()
    reference = whole(write_tar(tmp_path / "clean" / "x.tar", *good, sample("last", ["cat", "dog"])))
    assert cleaned.fingerprint == reference.fingerprint
    with pytest.raises(DataError, match="more than the limit"):
        clean_source(source, max_bad_share=0.01)


def test_members_of_the_same_name(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    picture_block = header(b"1.png") + b"abc".ljust(512, b"\0")
    label_block = header(b"1.json", b"%011o\0" % 5) + b'["a"]'.ljust(512, b"\0")
    for blocks, reason in (
        (picture_block + picture_block + label_block, "several images of this name"),
        (picture_block + label_block + label_block, "two .json of this name"),
    ):
        path.write_bytes(blocks + tar_bytes(sample("2", ["a"])))
        (bad,) = check_images(whole(path).splits["train"], max_bad_share=1)
        assert str(bad) == f"x.tar/1: {reason}"


def test_one_label_data_with_a_flaw(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "x.tar", sample("1", "cat", ending="cls"), {"2.png": image_bytes()}, sample("3", "dog", ending="cls")
    )
    source = whole(path)
    assert not source.multi_label
    cleaned, bad = clean_source(source, max_bad_share=0.5)
    assert [str(image) for image in bad] == ["x.tar/2: no .json or .cls with its labels beside it"]
    assert labels_of(cleaned) == {"x.tar/1": ["cat"], "x.tar/3": ["dog"]}


def test_a_shard_that_shrinks_after_it_was_opened(shard: Path) -> None:
    split = whole(shard).splits["train"]
    shard.write_bytes(shard.read_bytes()[:700])
    with pytest.raises(ImageError, match="its shard has become shorter"):
        split.image(3)
    shard.unlink()
    with pytest.raises(ImageError, match="cannot be read: No such file"):
        split.image(0)


def test_an_image_beyond_the_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse tar that claims an image of 65 MiB."""
    path = tmp_path / "x.tar"
    size = (64 << 20) + 1
    with path.open("wb") as file:
        file.write(header(b"1.png", b"%011o\0" % size))
        file.seek(512 + -(-size // 512) * 512)
        file.write(header(b"1.json", b"%011o\0" % 5) + b'["a"]'.ljust(512, b"\0"))
        file.write(tar_bytes(sample("2", ["a"])))
    source = whole(path)
    with pytest.raises(ImageError, match=r"67,108,865 bytes, more than the limit of 67,108,864"):
        source.splits["train"].image(0)
    assert source.splits["train"].image(1).shape == (12, 16, 3)


# ------------------------------------------------------------------------------------------------ damaged tars


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, lambda d: b"\x28\xb5\x2f\xfd" + d])
def test_compressed_tars_are_refused_with_a_line(tmp_path: Path, pack: Any) -> None:
    for name in ("x.tar", "x.tar.gz", "x.tgz"):
        path = tmp_path / name
        path.write_bytes(pack(tar_bytes(sample("1", ["a"]))))
        with pytest.raises(DataError, match=r"is compressed \((gzip|bzip2|xz|zstd)\).*unpack it"):
            whole(path)
        with pytest.raises(DataError, match="is compressed"):
            whole(tmp_path)
        path.unlink()


LINKS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
    b"S": "a sparse file",
}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        *((header(b"x.png", kind=kind) + END, f"'x.png' is {what}") for kind, what in LINKS.items()),
        (header(b"x.png", kind=b"V") + END, "of an unknown kind"),
        (b"not a tar at all" * 64, "byte 0: expected a tar header"),
        (b"", "truncated: it breaks off at byte 0"),
        (tar_bytes(sample("1", ["a"])) * 2, "has something behind its end"),
        (header() + b"abc".ljust(512, b"\0") + bytes(3 << 20) + b"x", "has something behind its end"),
        (END, "holds no samples"),
        (header(b"README") + b"abc".ljust(512, b"\0") + END, "holds no samples"),
        (header()[:300], "truncated: it breaks off at byte 300"),
        (header() + b"abc".ljust(512, b"\0"), "truncated: it breaks off at byte 1,024, without its end"),
        (header(size=b"00000010000\0") + END, "member 'a.png' should end at byte 4,608, the file has 1,536"),
        (header(size=b"\x80" + b"\xff" * 11) + END, "truncated: member 'a.png'"),
        (header(size=b"\xff" * 12) + END, "a number that is none"),
        (header(size=b"0000000000x\0") + END, "expected a tar header, got one with a number"),
        (bytes([header()[0] ^ 1]) + header()[1:] + END, "byte 0: expected a tar header"),
        (header(kind=b"x", size=b"00000200001\0") + END, "a header of 65,537 bytes, more than 65,536"),
        (header(kind=b"L", size=b"77777777777\0") + END, "more than 65,536"),
        (header(kind=b"x", size=b"00000000024\0") + b"12 path=abc", "breaks off within a header"),
        (header(kind=b"x", size=b"00000000004\0") + b"zzzz".ljust(512, b"\0") + END, "malformed pax header"),
        (header(kind=b"x", size=b"00000000014\0") + b"99 path=abcd".ljust(512, b"\0") + END, "malformed pax header"),
        (header(kind=b"x", size=b"00000000014\0") + b"12 path=abc\0".ljust(512, b"\0") + END, "malformed pax header"),
        (header(kind=b"x", size=b"00000000013\0") + b"11 size=-1\n".ljust(512, b"\0") + END, "size that is no number"),
        (header(kind=b"x", size=b"00000000032\0") + b"26 GNU.sparse.realsize=99\n".ljust(512, b"\0"), "sparse file"),
        (header(kind=b"g", size=b"00000000014\0") + b"12 path=abc\n".ljust(512, b"\0") + END, "for all members"),
    ],
)  # fmt: skip
def test_damaged_and_hostile_tars_are_refused_with_a_line(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(data)
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        whole(path)
    assert "\n" not in str(caught.value)
    assert "x.tar" in str(caught.value)


def test_names_reach_nothing(tmp_path: Path) -> None:
    """Members called as paths elsewhere are samples like any others; no file is made and none opened but the tar."""
    outside = tmp_path / "outside.png"
    outside.write_bytes(b"secret")
    names = ["../outside", str(tmp_path / "outside"), "a/../../outside", "//x", "a\nb"]
    path = write_tar(tmp_path / "in" / "x.tar", *(sample(name, ["a"], seed=i) for i, name in enumerate(names)))
    split = whole(path).splits["train"]
    for i in range(len(names)):
        assert np.array_equal(split.image(i), picture(12, 16, i))
    assert outside.read_bytes() == b"secret"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["in", "outside.png", "x.tar"]


def test_no_tar_at_all(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.tar")
    with pytest.raises(DataError, match="expected"):
        whole(tmp_path / "x.tar")
    with pytest.raises(DataError, match="expected a tar file"):
        whole(tmp_path)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_any_damage_gives_samples_or_a_line(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Bytes changed, cut off or put in: an `XceptionError` in one line, or samples whose images decode or do not."""
    good = tar_bytes({**sample("1", ["a"]), **sample("n" * 150, {"labels": ["b"]}, seed=1)}, tarfile.PAX_FORMAT)
    damaged = bytearray(good)
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, len(damaged) - 1))
        action = data.draw(st.sampled_from(["set", "cut", "double"]))
        if action == "set":
            damaged[place] = data.draw(st.integers(0, 255))
        elif action == "cut":
            del damaged[place : place + data.draw(st.integers(1, 700))]
        else:
            damaged[place:place] = damaged[place : place + 512]
        if not damaged:
            break
    path = tmp_path_factory.mktemp("tar") / "x.tar"
    path.write_bytes(damaged)
    said = ""
    try:
        source = whole(path)
        for split in source.splits.values():
            said = " ".join(map(str, check_images(split, max_bad_share=1)))
    except XceptionError as error:
        said = str(error)
    assert "\n" not in said


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([{"1.png": image_bytes()}], r"no sample has a label \(x.tar/1: no .json"),
        ([sample("1", []), sample("2", [])], "no sample has a label"),
        ([sample("1", "cat", ending="cls")], "expected at least two classes"),
    ],
)
def test_data_that_cannot_be_used(tmp_path: Path, members: list[dict[str, bytes]], message: str) -> None:
    path = write_tar(tmp_path / "x.tar", *members)
    with pytest.raises(DataError, match=message):
        whole(path)


def test_a_class_outside_training_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0.tar", sample("1", ["a"]))
    write_tar(tmp_path / "val-0.tar", sample("1", ["a", "b"]))
    with pytest.raises(DataError, match=r"val-0.tar/1: class 'b' is in 'val' but not in 'train'"):
        open_source(tmp_path)


def test_limits_on_shards_and_samples(tmp_path: Path, shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_shards, "MAX_SAMPLES", 3)
    with pytest.raises(DataError, match="more than 3 samples"):
        whole(shard)
    write_tar(tmp_path / "more.tar", sample("1", ["a"]))
    monkeypatch.setattr(shards, "MAX_SHARDS", 1)
    with pytest.raises(DataError, match="2 shards, more than 1"):
        whole(tmp_path)


def test_a_root_has_no_meaning(shard: Path) -> None:
    with pytest.raises(ConfigError, match="has no meaning"):
        whole(shard, root="/tmp")


def test_the_index_takes_little_memory(tmp_path: Path) -> None:
    """Headers alone are read: 20,000 members of a file of 1.3 GB (sparse on the disk), not what they hold."""
    path = tmp_path / "x.tar"
    with path.open("wb") as file:
        for i in range(10_000):
            file.seek(i * (1024 + 131_072 + 512))
            file.write(header(b"%05d.png" % i, b"%011o\0" % 131_072))
            file.seek(131_072, os.SEEK_CUR)
            file.write(header(b"%05d.json" % i, b"%011o\0" % 5) + b'["a"]'.ljust(512, b"\0"))
        file.write(END)
    split = whole(path).splits["train"]
    assert len(split) == 10_000
    with path.open("rb") as file:
        assert sum(1 for _ in read_members(file, "x")) == 20_000
    members = split.base.members
    assert members.nbytes == 10_000 * 24
    assert json.dumps(members[1].tolist()) == json.dumps([0, 1024 + 131_072 + 1024, 131_072])
