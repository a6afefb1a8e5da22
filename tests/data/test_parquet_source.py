"""Parquet: every layout that is read, rows that are damaged, files that are not what they say, without pyarrow."""

from __future__ import annotations

import multiprocessing
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import encode, picture, write_image

from xception.data import parquet
from xception.data.check import check_images, clean_source
from xception.data.loader import Loader
from xception.data.preprocess import Preprocess
from xception.data.sources import DataSource, all_samples, open_source
from xception.errors import DataError, ImageError, XceptionError

LABELS: list[list[str]] = [["cat", "indoors"], ["dog"], [], ["cat", "dog", "outdoors"], ["cat"]]


def images(count: int) -> list[bytes]:
    return [encode(picture(12, 16, seed)) for seed in range(count)]


def write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path


def whole(path: Path, **options: Any) -> DataSource:
    return open_source(path, val_fraction=0, test_fraction=0, **options)


def labels_of(source: DataSource) -> list[list[str]]:
    named = (t if isinstance(t, tuple) else (t,) for t in all_samples(source).targets)
    return [[source.class_names[k] for k in t] for t in named]


def as_structs(data: list[bytes]) -> pa.Array:
    fields = [("bytes", pa.binary()), ("path", pa.string())]
    return pa.array([{"bytes": d, "path": f"{i}.png"} for i, d in enumerate(data)], pa.struct(fields))


@pytest.mark.parametrize("group", [1, 2, 100])
@pytest.mark.parametrize(
    "column",
    [
        lambda data: {"image": pa.array(data, pa.binary())},
        lambda data: {"JPG": pa.array(data, pa.large_binary())},
        lambda data: {"image": as_structs(data)},
    ],
)
def test_images_and_label_lists(tmp_path: Path, column: Any, group: int) -> None:
    path = write(tmp_path / "x.parquet", {"labels": LABELS, **column(images(5)), "n": range(5)}, row_group_size=group)
    source = whole(path)
    assert source.multi_label
    assert source.class_names == ("cat", "dog", "indoors", "outdoors")
    assert labels_of(source) == LABELS
    split = source.splits["train"]
    assert list(split.keys) == [f"x.parquet/{row:07d}" for row in range(5)]
    for index in (4, 0, 3, 1, 2, 4):
        assert np.array_equal(split.image(index), picture(12, 16, index))
    assert check_images(split) == []


@pytest.mark.parametrize(
    ("labels", "expected", "several"),
    [
        (pa.array([[3, 10], [3]]), [["10", "3"], ["3"]], True),
        (pa.array([["b", "a", "b"], []], pa.large_list(pa.large_string())), [["a", "b"], []], True),
        (pa.array(["a", "b"]), [["a"], ["b"]], False),
        (pa.array([7, 8], pa.uint8()), [["7"], ["8"]], False),
        (pa.array(["a", "b"]).dictionary_encode(), [["a"], ["b"]], False),
    ],
)
def test_kinds_of_labels(tmp_path: Path, labels: pa.Array, expected: list[list[str]], several: bool) -> None:
    source = whole(write(tmp_path / "x.parquet", {"image": images(2), "label": labels}))
    assert (labels_of(source), source.multi_label) == (expected, several)


def test_paths_within_the_folder_or_the_root(tmp_path: Path) -> None:
    for i in range(3):
        write_image(tmp_path / "data" / "images" / f"{i}.png", seed=i)
    columns = {"file_name": [f"images/{i}.png" for i in range(3)], "labels": [["a"], ["b"], ["a", "b"]]}
    for path, root in ((tmp_path / "data" / "x.parquet", None), (tmp_path / "x.parquet", tmp_path / "data")):
        split = whole(write(path, columns), root=root).splits["train"]
        assert list(split.keys) == columns["file_name"]
        assert np.array_equal(split.image(2), picture(12, 16, 2))


@pytest.mark.parametrize("path", ["../x.png", "a/../../x.png", "/etc/passwd", "", " ", ".", "a\0b", None])
def test_no_path_leads_out(tmp_path: Path, path: str | None) -> None:
    write_image(tmp_path / "x.png")
    columns = {"path": pa.array(["ok.png", path], pa.string()), "labels": [["a"], ["b"]]}
    with pytest.raises(DataError, match=r"x\.parquet, row 1: ") as caught:
        whole(write(tmp_path / "in" / "x.parquet", columns))
    assert "\n" not in str(caught.value)


def test_parts_by_name_and_by_column(tmp_path: Path) -> None:
    for name, labels in (("train-00000-of-00001", ["a", "b"]), ("validation-00000-of-00001", ["a", "b"])):
        write(tmp_path / "named" / f"{name}.parquet", {"image": images(2), "labels": [[label] for label in labels]})
    source = open_source(tmp_path / "named")
    assert {part: len(split) for part, split in source.splits.items()} == {"train": 2, "val": 2}
    columns = {"image": images(3), "labels": [["a"], ["a"], ["a"]], "split": ["train", "Test", "valid"]}
    source = open_source(write(tmp_path / "x.parquet", columns))
    assert [(part, split.keys[0]) for part, split in source.splits.items()] == [
        ("train", "x.parquet/0000000"),
        ("val", "x.parquet/0000002"),
        ("test", "x.parquet/0000001"),
    ]
    write(tmp_path / "bad.parquet", {**columns, "split": ["train", "dev", None]})
    with pytest.raises(DataError, match=r"bad\.parquet, row 1: expected train, val or test in 'split', got 'dev'"):
        open_source(tmp_path / "bad.parquet")
    write(tmp_path / "both" / "train-0.parquet", columns)
    with pytest.raises(DataError, match="its name says the part 'train', and so does its column 'split'"):
        open_source(tmp_path / "both")


def test_damaged_rows_are_named_by_the_check_and_left_out(tmp_path: Path) -> None:
    data: list[bytes | None] = [*images(3), b"no image", b"", None, images(1)[0][:-20], *images(2)]
    labels: list[list[str | None] | None] = [["a"]] * 7 + [None, ["a", None]]
    source = whole(write(tmp_path / "x.parquet", {"image": data, "labels": labels}, row_group_size=2))
    cleaned, bad = clean_source(source, max_bad_share=0.9)
    assert [image.key[-1] for image in bad] == list("345678")
    reasons = [image.reason for image in bad]
    assert reasons[1] == reasons[2] == "an empty cell instead of an image"
    assert reasons[4] == "no value in column 'labels'"
    assert "got none" in reasons[5]
    assert list(cleaned.splits["train"].keys) == [f"x.parquet/000000{i}" for i in range(3)]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": [b"x"]}, "no label column; expected image (bytes) or path, and labels or label; got image: binary"),
        ({"labels": [["a"]]}, "no image or path column"),
        ({"image": [1], "labels": [["a"]]}, "no image or path column"),
        ({"image": [b"x"], "labels": [[1.5]]}, "no label column"),
        ({"image": [b"x"], "labels": [[["a"]]]}, "no label column"),
        ({"image": pa.array([], pa.binary()), "labels": pa.array([], pa.list_(pa.string()))}, "holds no samples"),
        ({"image": [b"x"], "labels": [[""]]}, "no sample has a label (x.parquet/0000000: an empty label)"),
        ({"path": ["a.png", "a.png"], "labels": [["a"], ["b"]]}, "the same sample appears more than once"),
    ],
)
def test_data_that_cannot_be_used(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        whole(write(tmp_path / "x.parquet", columns))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_shards_must_be_alike(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"image": images(1), "labels": [["a"]]})
    write(tmp_path / "b.parquet", {"path": ["a.png"], "labels": [["a"]]})
    with pytest.raises(
        DataError, match=r"b\.parquet: other columns \(path, labels\) than a\.parquet \(image, labels\)"
    ):
        whole(tmp_path)
    (tmp_path / "b.parquet").unlink()
    (tmp_path / "c.tar").write_bytes(bytes(1024))
    with pytest.raises(DataError, match=r"both \.tar and \.parquet files: keep one kind"):
        whole(tmp_path)


def test_row_groups_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.parquet", {"image": images(8), "labels": [["a"]] * 8})
    split = whole(path).splits["train"]
    monkeypatch.setattr(parquet, "MAX_GROUP_BYTES", 1000)
    with pytest.raises(
        ImageError, match=r"row group 0 has .* MiB of image, more than .*: write it with row_group_size"
    ):
        split.image(0)


def test_few_row_groups_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.parquet", {"image": images(12), "labels": [["a"]] * 12}, row_group_size=2)
    split = whole(path).splits["train"]
    read: list[int] = []
    original = parquet._read_columns
    monkeypatch.setattr(parquet, "_read_columns", lambda *a: read.append(a[1]) or original(*a))
    monkeypatch.setattr(parquet, "_KEPT_BYTES", 2 * 2 * len(images(1)[0]) + 200)
    for index in (0, 1, 0, 2, 3, 1, 4, 5, 0, 2, 10):
        assert np.array_equal(split.image(index), picture(12, 16, index))
    assert read == [0, 1, 2, 1, 5]  # of two that are kept, the one that was used last stays


def test_few_files_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(5):
        write(tmp_path / "in" / f"{i}.parquet", {"image": images(6)[i : i + 1], "labels": [["a"]]})
    split = whole(tmp_path / "in").splits["train"]
    opened: list[str] = []
    original = parquet._open
    monkeypatch.setattr(parquet, "_open", lambda path: opened.append(path[-9]) or original(path))
    monkeypatch.setattr(parquet, "_OPEN_FILES", 2)
    monkeypatch.setattr(parquet, "_KEPT_BYTES", 0)
    for index in (0, 1, 0, 2, 0, 1, 3, 4, 0):
        assert np.array_equal(split.image(index), picture(12, 16, index))
    assert opened == list("0121340")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for index in [0, 1, 2, 3, 4] * 5:
        split.image(index)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


def test_threads_and_processes_may_share_it(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", {"image": images(40), "labels": [["a"]] * 40}, row_group_size=7)
    split = whole(path).splits["train"]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(split.image, [i % 40 for i in range(200)]))
    assert all(np.array_equal(found[i], picture(12, 16, i % 40)) for i in range(200))
    copy = pickle.loads(pickle.dumps(split))
    assert np.array_equal(copy.image(39), picture(12, 16, 39))
    split.base.groups._lock.acquire()  # as if another thread held it at the moment of the fork
    with multiprocessing.get_context("fork").Pool(1) as processes:
        assert np.array_equal(processes.apply(split.image, (5,)), picture(12, 16, 5))


def test_batches_are_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", {"image": images(20), "labels": [LABELS[i % 5] for i in range(20)]})
    split = whole(path).splits["train"]
    found = []
    for workers in (0, 2):
        with Loader(
            split, Preprocess(size=(8, 8)), num_classes=4, multi_label=True, batch_size=6, shuffle=True, workers=workers
        ) as loader:
            found.append([(b.images, b.targets, b.indices) for b in loader.epoch(3)])
    for one, other in zip(*found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_any_damage_gives_samples_or_a_line(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("parquet") / "x.parquet"
    write(path, {"image": images(4), "labels": LABELS[:4]}, row_group_size=2, write_page_checksum=True)
    damaged = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        # Half of the changes behind the pages, where the footer is.
        place = data.draw(st.integers(0, len(damaged) - 1) | st.integers(max(0, len(damaged) - 900), len(damaged) - 1))
        if data.draw(st.booleans()):
            damaged[place] = data.draw(st.integers(0, 255))
        else:
            del damaged[place : place + data.draw(st.integers(1, 20))]
    path.write_bytes(damaged)
    said = ""
    try:
        for split in whole(path).splits.values():
            said = " ".join(map(str, check_images(split, max_bad_share=1)))
    except XceptionError as error:
        said = str(error)
    assert "\n" not in said


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1PAR1", b"not parquet at all" * 9, bytes(4096)])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.parquet"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"x\.parquet: cannot be read as Parquet") as caught:
        whole(path)
    assert "\n" not in str(caught.value)


def test_without_pyarrow_it_says_what_to_install(tmp_path: Path) -> None:
    write(tmp_path / "x.parquet", {"image": images(2), "labels": LABELS[:2]})
    code = "import sys; sys.modules['pyarrow'] = None; from xception.cli.main import main; sys.exit(main(sys.argv[1:]))"
    words = ["train", str(tmp_path / "x.parquet"), "--out", str(tmp_path / "run"), "--json"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "xception: error: Parquet files need pyarrow: pip install 'xception[shards]'\n"
    assert not (tmp_path / "run").exists()
