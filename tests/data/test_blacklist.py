"""ILSVRC's black list: which file is one, and which images it leaves out, in a folder made for the purpose."""

from __future__ import annotations

from pathlib import Path

import pytest

from xception.data.blacklist import read_blacklist, without_blacklisted
from xception.data.sources import all_samples, open_source
from xception.data.split import FileSplit
from xception.errors import DataError


def imagenet(root: Path, count: int = 12) -> Path:
    """val/<class>/ILSVRC2012_val_<number>.JPEG, dealt to three classes; names only."""
    for number in range(1, count + 1):
        folder = root / "val" / f"n0000000{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"ILSVRC2012_val_{number:08d}.JPEG").write_bytes(b"")
    return root


def written(folder: Path, content: str | bytes) -> Path:
    path = folder / "ILSVRC2014_clsloc_validation_blacklist.txt"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def numbers_of(keys: object) -> list[int]:
    return sorted(int(key[-13:-5]) for key in keys)  # type: ignore[attr-defined]


def test_listed_images_are_left_out_wherever_they_lie(tmp_path: Path) -> None:
    listed = read_blacklist(written(tmp_path, "1\n5\r\n\n 12 \n50000\n"))
    assert listed == {1, 5, 12, 50_000}
    for place in (imagenet(tmp_path), tmp_path / "val"):
        split = all_samples(open_source(place, val_fraction=0, test_fraction=0))
        kept, count = without_blacklisted(split, listed)
        assert count == 3
        assert numbers_of(kept.keys) == [2, 3, 4, 6, 7, 8, 9, 10, 11]


def test_the_papers_number_of_images_remains() -> None:
    """50,000 images, of which 1,762 are listed."""
    keys = tuple(f"val/n{k % 1000:08d}/ILSVRC2012_val_{k:08d}.JPEG" for k in range(1, 50_001))
    split = FileSplit("/data", keys, tuple(k % 1000 for k in range(50_000)))
    kept, count = without_blacklisted(split, frozenset(range(3, 3 + 28 * 1762, 28)))
    assert (len(kept), count) == (48_238, 1_762)


@pytest.mark.parametrize(
    "name",
    ["ILSVRC2012_val_00000002.JPEG", "ILSVRC2012_val_00000002_n01440764.JPEG", "ILSVRC2012_val_00000002.png"],
)
def test_names_that_say_their_number(name: str) -> None:
    split = FileSplit("/data", (name, "a/b/ILSVRC2012_val_00000003.JPEG"), (0, 1))
    assert without_blacklisted(split, frozenset({2}))[0].keys == ("a/b/ILSVRC2012_val_00000003.JPEG",)


@pytest.mark.parametrize(
    "name", ["n01440764/n01440764_10026.JPEG", "val/1.JPEG", "ILSVRC2012_val_1.JPEG", "ILSVRC2012_val_000000021.JPEG"]
)
def test_other_images_are_refused(name: str) -> None:
    split = FileSplit("/data", ("ILSVRC2012_val_00000002.JPEG", name), (0, 1))
    with pytest.raises(DataError, match="a black list is for ImageNet's validation images"):
        without_blacklisted(split, frozenset({1}))


def test_nothing_left() -> None:
    split = FileSplit("/data", ("ILSVRC2012_val_00000002.JPEG",), (0,))
    with pytest.raises(DataError, match="every image is on the black list"):
        without_blacklisted(split, frozenset({2}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no numbers"),
        ("\n\n", "holds no numbers"),
        ("1\n2\nx\n", "line 3: expected the number of a validation image, 1 to 50,000, got 'x'"),
        ("0\n", "line 1: expected the number"),
        ("50001\n", "got '50001'"),
        ("1 2\n", "got '1 2'"),
        ("-3\n", "got '-3'"),
        ("1.0\n", "got '1.0'"),
        ("ILSVRC2012_val_00000001.JPEG\n", "line 1: expected the number"),
        (
            "490\n361\n171\n822\n297\n482\n13\n704\n599\n164\n649\n11\n73\n286\n554\n490\n",
            "line 16: 490 stands on line 1",
        ),
        (b"\x89PNG\r\n\x1a\n\xff\xfe", "line 1: expected the number"),
        (b"1" * 5000, "line 1: expected the number"),
        (b"1\n" * (1 << 20), "larger than 1 MiB"),
    ],
)
def test_other_files_are_refused_in_a_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = written(tmp_path, content)
    with pytest.raises(DataError) as caught:
        read_blacklist(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected the black list"):
        read_blacklist(tmp_path)
    with pytest.raises(DataError, match="expected the black list"):
        read_blacklist(tmp_path / "none.txt")
