"""CSV tables: every spelling that is accepted, and every mistake with its line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from image_files import picture, write_image

from xception.data.sources import all_samples, open_source
from xception.errors import DataError


def table(folder: Path, content: str | bytes, name: str = "data.csv") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def labels_of(source) -> dict[str, str | tuple[str, ...]]:
    split = all_samples(source)
    names = source.class_names
    return {
        key: names[target] if isinstance(target, int) else tuple(names[t] for t in target)
        for key, target in zip(split.keys, split.targets, strict=True)
    }


ROWS = {"a/1.png": "cat", "a/2.png": "dog", "a/3.png": "cat", "a/4.png": "dog"}
PLAIN = "".join(f"{path},{label}\n" for path, label in ROWS.items())


@pytest.mark.parametrize(
    "content",
    [
        PLAIN,
        "path,label\n" + PLAIN,
        "Filename,Class\n" + PLAIN,
        "label,image\n" + "".join(f"{label},{path}\n" for path, label in ROWS.items()),
        "id,path,label,width\n" + "".join(f"7,{path},{label},9\n" for path, label in ROWS.items()),
        "\ufeffpath,label\r\n" + PLAIN.replace("\n", "\r\n"),
        "\ufeff" + PLAIN,
        "\n\npath,label\n\n" + PLAIN.replace("\n", "\n\n") + ",\n",
        "".join(f'"{path}", "{label}"\n' for path, label in ROWS.items()),
        PLAIN.rstrip("\n"),
        PLAIN + PLAIN,
        "".join(f"./a/../{path} , {label} \n" for path, label in reversed(ROWS.items())),
    ],
)
def test_spellings_of_the_same_table(tmp_path: Path, content: str) -> None:
    source = open_source(table(tmp_path, content), val_fraction=0, test_fraction=0)
    assert not source.multi_label
    assert labels_of(source) == ROWS
    assert list(source.splits["train"].keys) == sorted(ROWS)
    reference = open_source(table(tmp_path, PLAIN, "other.csv"), val_fraction=0, test_fraction=0)
    assert source.fingerprint == reference.fingerprint


def test_paths_are_relative_to_the_table_or_to_the_root(tmp_path: Path) -> None:
    write_image(tmp_path / "images" / "x.png", seed=1)
    write_image(tmp_path / "images" / "y.png", seed=2)
    absolute = tmp_path / "images" / "y.png"
    inside = open_source(table(tmp_path, f"images/x.png,a\n{absolute},b\n"))
    outside = open_source(table(tmp_path, "x.png,a\ny.png,b\n"), root=tmp_path / "images")
    for source in (inside, outside):
        split = all_samples(source)
        found = {source.class_names[t]: split.image(i) for i, t in enumerate(split.targets)}
        assert np.array_equal(found["a"], picture(seed=1))
        assert np.array_equal(found["b"], picture(seed=2))


def test_multi_label_by_semicolon(tmp_path: Path) -> None:
    source = open_source(table(tmp_path, "1.png,cat;indoors\n2.png,dog\n3.png,\n4.png, indoors ; cat ;cat\n"))
    assert source.multi_label
    assert source.class_names == ("cat", "dog", "indoors")
    assert labels_of(source) == {
        "1.png": ("cat", "indoors"),
        "2.png": ("dog",),
        "3.png": (),
        "4.png": ("cat", "indoors"),
    }
    assert sum(source.counts()["train"].values()) >= 3


def test_multi_label_by_header(tmp_path: Path) -> None:
    source = open_source(table(tmp_path, "path,labels\n1.png,cat\n2.png,dog\n3.png,\n"))
    assert source.multi_label
    assert labels_of(source) == {"1.png": ("cat",), "2.png": ("dog",), "3.png": ()}


def test_a_split_column_gives_the_parts(tmp_path: Path) -> None:
    rows = "1.png,cat,train\n2.png,dog,Training\n3.png,cat,valid\n4.png,dog,test\n"
    for content in (rows, "path,label,split\n" + rows, "file,class,subset\n" + rows):
        source = open_source(table(tmp_path, content))
        assert {part: list(split.keys) for part, split in source.splits.items()} == {
            "train": ["1.png", "2.png"],
            "val": ["3.png"],
            "test": ["4.png"],
        }
        assert set(source.split_origin.values()) == {"given"}


def test_val_is_dealt_from_train_where_the_column_has_none(tmp_path: Path) -> None:
    rows = "".join(f"{i}.png,{'cat' if i % 2 else 'dog'},{'test' if i > 35 else 'train'}\n" for i in range(40))
    source = open_source(table(tmp_path, rows))
    assert {part: len(split) for part, split in source.splits.items()} == {"train": 32, "val": 4, "test": 4}
    assert source.split_origin == {"train": "split", "val": "split", "test": "given"}


def test_names_that_are_not_utf8_work(tmp_path: Path) -> None:
    source = open_source(table(tmp_path, b"caf\xe9.png,a\ntea.png,b\xe9\n"))
    assert "caf\udce9.png" in all_samples(source).keys
    assert source.class_names == ("a", "b\\xe9")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "empty"),
        ("\n \n", "empty"),
        ("path,label\n", "header but no rows"),
        ("a.png\n", "line 1: expected 2 cells"),
        ("a.png,cat\nb.png\n", "line 2: expected 2 cells"),
        ("a.png,cat\n\n\nb.png,dog,test\n", "line 4: expected 2 cells"),
        ("path,label\na.png,cat\n,dog\n", "line 3: expected the path"),
        ("a.png,cat\nb.png,\n", "line 2: expected a label"),
        ("a.png,cat;;dog\nb.png,dog\n", "line 1: expected labels between"),
        ("a.png,cat,train\nb.png,dog,holdout\n", "line 2: expected train, val or test as the split, got 'holdout'"),
        ("a.png,cat\nb.png,dog\n./a.png,dog\n", "line 3: 'a.png' has another label on line 1"),
        ("a.png,cat,train\nb.png,dog,train\na.png,cat,test\n", "line 3: 'a.png' has another part on line 1"),
        ("a.png,cat,train\nb.png,dog,train\nc.png,bird,test\n", "line 3: class 'bird' is in 'test' but not in 'train'"),
        ("a.png,cat\nb.png,cat\n", "two classes, found only 'cat'"),
        ("path,labels\na.png,\nb.png,\n", "found none"),
        ('a.png,"cat\nb.png,dog\n', "line 1: not well-formed"),
        ('a.png,cat\nb.png,"dog"x\n', "line 2: not well-formed"),
        ("a.png,cat\nb.png," + "x" * 200_000 + "\n", "line 2: not well-formed"),
        ("path,label\na.png,cat\n".encode("utf-16"), "UTF-16"),
    ],
)
def test_mistakes_are_named_with_their_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = table(tmp_path, content)
    with pytest.raises(DataError, match=message) as caught:
        open_source(path)
    assert str(path) in str(caught.value)
    assert str(caught.value).isprintable()


def test_line_numbers_count_lines_inside_quotes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 4"):
        open_source(table(tmp_path, 'a.png,"two\nlines"\nb.png,dog\nc.png\n'))


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"expected a folder of class folders, a \.csv file, or \.tar or \.parquet shards"
    ):
        open_source(table(tmp_path, PLAIN, "data.txt"))
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match="no class folders"):
        open_source(tmp_path / "folder.csv")


@pytest.mark.parametrize("header", ["img,cls", "path,klass", "picture,label"])
def test_a_header_in_other_words_is_no_sample(tmp_path: Path, header: str) -> None:
    with pytest.raises(DataError, match=r"line 1: looks like a header, .*expected path, .* and label, "):
        open_source(table(tmp_path, f"{header}\n{PLAIN}"))


def test_names_without_an_ending_need_no_header(tmp_path: Path) -> None:
    source = open_source(table(tmp_path, "one,a\ntwo,a\nthree.png,b\nfour,b\n"))
    assert labels_of(source) == {"one": "a", "two": "a", "three.png": "b", "four": "b"}


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_other_separators_are_named(tmp_path: Path, separator: str) -> None:
    with pytest.raises(DataError, match=r"line 1: .*separate them with commas"):
        open_source(table(tmp_path, ("path,label\n" + PLAIN).replace(",", separator)))
