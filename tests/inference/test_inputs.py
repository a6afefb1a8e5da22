"""From files, folders, globs and standard input to paths."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from xception.inference.inputs import FailedImage, expand_inputs


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of everything, which is also the current folder."""
    monkeypatch.chdir(tmp_path)
    for name in (
        "b.jpg",
        "a.PNG",
        "notes.txt",
        ".hidden.jpg",
        "sub/c.webp",
        "sub/deep/d.jpeg",
        "sub/._c.webp",
        ".git/e.jpg",
        "texts/readme.txt",
        "[odd].jpg",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "empty").mkdir()
    return tmp_path


def _expand(*patterns: Any, stdin: bytes | None = None) -> list[str | FailedImage]:
    return list(expand_inputs(patterns, None if stdin is None else io.BytesIO(stdin)))


def test_files_are_themselves(tree: Path) -> None:
    assert _expand("notes.txt", Path("b.jpg"), "b.jpg") == ["notes.txt", "b.jpg", "b.jpg"]


def test_folders_give_their_images_sorted(tree: Path) -> None:
    assert _expand("sub") == ["sub/c.webp", "sub/deep/d.jpeg"]
    assert _expand(".") == ["./[odd].jpg", "./a.PNG", "./b.jpg", "./sub/c.webp", "./sub/deep/d.jpeg"]
    assert _expand(tree / "sub" / "deep") == [str(tree / "sub/deep/d.jpeg")]


def test_globs(tree: Path) -> None:
    assert _expand("*.jpg") == ["[odd].jpg", "b.jpg"]
    assert _expand("**/*.jp*g") == ["[odd].jpg", "b.jpg", "sub/deep/d.jpeg"]
    assert _expand("?.PNG") == ["a.PNG"]
    assert _expand("[ab].*") == ["a.PNG", "b.jpg"]
    assert _expand("s*") == ["sub/c.webp", "sub/deep/d.jpeg"]  # a folder that matches
    assert _expand(".h*") == [".hidden.jpg"]
    assert _expand(f"{tree}/sub/*.webp") == [str(tree / "sub/c.webp")]


def test_an_existing_name_is_no_glob(tree: Path) -> None:
    assert _expand("[odd].jpg") == ["[odd].jpg"]


def test_standard_input_is_a_path_a_line(tree: Path) -> None:
    data = "b.jpg\r\n\nsub/고양이.png\n*.jpg\nlast".encode() + b"\xff"
    assert _expand("a.PNG", "-", stdin=data) == [
        "a.PNG",
        "b.jpg",
        "sub/고양이.png",
        "*.jpg",
        os.fsdecode(b"last\xff"),
    ]
    assert os.fsencode(_expand("-", stdin=data)[-1]) == b"last\xff"  # type: ignore[arg-type]


def test_standard_input_is_read_as_it_is_needed() -> None:
    class Endless(io.RawIOBase):
        lines = 0

        def readline(self, size: int | None = -1, /) -> bytes:
            self.lines += 1
            return b"x.jpg\n"

    stdin = Endless()
    assert list(islice(expand_inputs(["-"], stdin), 3)) == ["x.jpg"] * 3  # type: ignore[arg-type]
    assert stdin.lines == 3


def test_standard_input_that_is_no_list() -> None:
    first, second = expand_inputs(["-"], io.BytesIO(b"a.jpg\n" + b"\xff\xd8" * 100_000))
    assert first == "a.jpg"
    assert isinstance(second, FailedImage)
    assert second.error == "expected a path a line, got a line of more than 4096 bytes"
    assert _expand("-") == [FailedImage("-", "there is no standard input to read paths from")]


@pytest.mark.parametrize(
    ("pattern", "error"),
    [
        ("missing.jpg", "no such file or folder"),
        ("missing/*.jpg", "nothing matches this pattern"),
        ("*.gif", "nothing matches this pattern"),
        ("empty", "no images in this folder"),
        ("texts", "no images in this folder"),
        ("a\0b", "embedded null byte"),
        ("x" * 300, "File name too long"),
        ("http://example.org/a.jpg", "no such file or folder"),
    ],
)
def test_what_is_not_there_fails_in_its_place(tree: Path, pattern: str, error: str) -> None:
    first, failed, last = _expand("a.PNG", pattern, "b.jpg")
    assert (first, last) == ("a.PNG", "b.jpg")
    assert failed == FailedImage(pattern, error)


def test_loops_of_links_end(tree: Path) -> None:
    for name in ("one", "two"):
        (tree / "sub" / name).symlink_to("..", target_is_directory=True)
    (tree / "sub" / "self.jpg").symlink_to("self.jpg")
    found = _expand("sub")
    assert {"sub/c.webp", "sub/deep/d.jpeg", "sub/self.jpg"} <= set(found)
    assert len(found) == len(set(found)) == 6  # each folder entered once, though there are many ways to it
    assert "sub/c.webp" in _expand("sub/**/*.webp")
    assert len(_expand("**/*.webp")) == 1


def test_link_to_a_folder_is_followed(tree: Path) -> None:
    (tree / "link").symlink_to("sub", target_is_directory=True)
    assert _expand("link") == ["link/c.webp", "link/deep/d.jpeg"]


def test_pipes_are_not_opened(tree: Path) -> None:
    os.mkfifo(tree / "sub" / "pipe.jpg")
    assert "sub/pipe.jpg" in _expand("sub")
    os.mkfifo(tree / "pipe")
    assert _expand("pipe") == ["pipe"]


def test_unreadable_folder(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir: Callable[[Any], Any] = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert _expand("sub") == ["sub/c.webp", FailedImage("sub/deep", "Permission denied")]


def test_names_that_are_not_utf8(tree: Path) -> None:
    name = os.fsdecode(b"sub/deep/\xff\xfe.jpg")
    Path(name).write_bytes(b"")
    assert name in _expand("sub")


def test_what_lies_in_a_matched_folder_comes_once(tree: Path) -> None:
    """`**` matches folders inside each other, and in newer Pythons also the files in them."""
    assert _expand("sub/**") == ["sub/c.webp", "sub/deep/d.jpeg"]
