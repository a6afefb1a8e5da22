"""Class-weight files: both spellings, where they are found, and every mistake with its place."""

from __future__ import annotations

from pathlib import Path

import pytest
from tars import sample, write_tar

from xception.data import importance
from xception.data.importance import importance_beside, read_importance
from xception.data.sources import drop_samples, open_source
from xception.errors import DataError

NAMES = ("cat", "dog", "indoors")


def written(folder: Path, content: str | bytes, name: str = "class_weights.csv") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("w.csv", "cat,12.5\nindoors,0\n"),
        ("w.csv", "class,weight\ncat,12.5\n"),
        ("w.csv", "Weight,images,Class\n12.5,7,cat\n0,8,bird\n"),
        ("w.csv", '\ufeffclass,weight\r\n"cat", 12.5 \r\n\r\n'),
        ("w.csv", "bird,1e-9\ncat,1.25e1"),
        ("w.json", '{"cat": 12.5, "bird": 3}'),
        ("w.JSON", '\ufeff{"cat": 12.5, "dog": 0}'),
    ],
)
def test_spellings(tmp_path: Path, name: str, content: str) -> None:
    assert read_importance(written(tmp_path, content, name), NAMES) == (12.5, 0.0, 0.0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.csv", "", "gives none of the data's classes ('cat', ...) a weight above 0"),
        ("w.csv", "class,weight\n", "gives none"),
        ("w.csv", "bird,1\n", "gives none of the data's classes ('cat', ...) a weight above 0; it names 'bird'"),
        ("w.csv", "cat,0\ndog,0\n", "gives none"),
        ("w.csv", "cat\n", "line 1: expected a class and its weight"),
        ("w.csv", "cat,1\n,2\n", "line 2: expected a class and its weight"),
        ("w.csv", "cat,1\ndog,much\n", "line 2: expected a number, got 'much'"),
        ("w.csv", "cat,1\ncat,2\n", "line 2: class 'cat' has a weight already"),
        ("w.csv", "cat,-1\n", "line 1: expected a finite weight of 0 or more, got -1.0"),
        ("w.csv", "cat,nan\n", "got nan"),
        ("w.csv", "cat,1e999\n", "got inf"),
        ("w.csv", 'cat,"1\n', "not well-formed CSV"),
        ("w.csv", b"cat,1\ndog\xff,2\n", "is not UTF-8 at byte 9"),
        ("w.json", "[]", "expected an object"),
        ("w.json", '{"cat": 1', "not well-formed JSON"),
        ("w.json", "[" * 100_000, "not well-formed JSON"),
        ("w.json", '{"cat": "1"}', "class 'cat': expected a number, got str"),
        ("w.json", '{"cat": true}', "got bool"),
        ("w.json", '{"cat": {}}', "class 'cat': expected a number"),
        ("w.json", '{"cat": NaN}', "got nan"),
        ("w.json", '{"cat": 1' + "0" * 400 + "}", "got inf"),
        ("w.json", '{"cat": 1, "cat": 2}', "class 'cat' has a weight already"),
    ],
)
def test_mistakes(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError) as caught:
        read_importance(written(tmp_path, content, name), NAMES)
    assert message in str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="expected a file of class weights"):
        read_importance(tmp_path / "none.csv", NAMES)
    (tmp_path / "class_weights.csv").mkdir()
    with pytest.raises(DataError, match="expected a file of class weights"):
        importance_beside(str(tmp_path), NAMES)
    written(tmp_path, "{}", "class_weights.json")
    with pytest.raises(DataError, match=r"both class_weights\.csv and class_weights\.json"):
        importance_beside(str(tmp_path), NAMES)
    monkeypatch.setattr(importance, "MAX_BYTES", 1 << 20)
    with pytest.raises(DataError, match="larger than 1 MiB"):
        read_importance(written(tmp_path, b"x" * (1 << 20) + b"y", "large.csv"), NAMES)


@pytest.mark.parametrize("kind", ["table", "tar", "tars"])
def test_beside_the_data(tmp_path: Path, kind: str) -> None:
    if kind == "table":
        path = written(tmp_path, "1.png,cat;indoors\n2.png,dog\n3.png,cat\n", "x.csv")
    else:
        write_tar(tmp_path / "x.tar", sample("1", ["cat", "indoors"]), sample("2", ["dog"]), sample("3", ["cat"]))
        path = tmp_path / "x.tar" if kind == "tar" else tmp_path
    assert open_source(path).importance is None
    before = open_source(path).fingerprint
    written(tmp_path, "cat,2\nindoors,0.5\n")
    source = open_source(path, val_fraction=0, test_fraction=0)
    assert dict(zip(source.class_names, source.importance or (), strict=True)) == {"cat": 2, "dog": 0, "indoors": 0.5}
    assert open_source(path).fingerprint == before
    dropped = drop_samples(source, [source.splits["train"].keys[2]])
    assert dropped.importance == source.importance


def test_data_of_one_label_needs_no_weights(tmp_path: Path) -> None:
    path = written(tmp_path, "1.png,cat\n2.png,dog\n", "x.csv")
    written(tmp_path, "of another kind")
    assert open_source(path).importance is None
