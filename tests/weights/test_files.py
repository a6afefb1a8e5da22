"""A file is replaced whole or not at all, and the order of the system calls makes that durable."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import pytest

from xception.errors import WeightsError
from xception.weights import files
from xception.weights.files import atomic_write, check_writable, open_regular, remove_leftovers, sha256_file, shown


def _content(data: bytes):
    def write(stream: BinaryIO) -> None:
        stream.write(data)

    return write


def _one_line(error: pytest.ExceptionInfo[WeightsError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_new_and_replaced_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    atomic_write(path, _content(b"one"))
    assert path.read_bytes() == b"one"
    atomic_write(str(path), _content(b"two"))
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_whether_a_file_could_be_written(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"one")
    check_writable(tmp_path / "a.bin")
    check_writable(tmp_path / "b.bin")
    assert os.listdir(tmp_path) == ["a.bin"]
    assert (tmp_path / "a.bin").read_bytes() == b"one"
    for wrong in (tmp_path, tmp_path / "no" / "a.bin", tmp_path / "a.bin" / "b", "/dev/null"):
        with pytest.raises(WeightsError, match="cannot write"):
            check_writable(wrong)


def test_writer_may_seek(tmp_path: Path) -> None:
    def write(stream: BinaryIO) -> None:
        stream.write(b"xxx data")
        stream.seek(0)
        stream.write(b"abc")

    atomic_write(tmp_path / "a", write)
    assert (tmp_path / "a").read_bytes() == b"abc data"


def test_order_of_system_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, bool]] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        if not is_folder:
            assert os.fstat(descriptor).st_size == 5, "synced before all was written"
        calls.append(("fsync", is_folder))
        fsync(descriptor)

    def record_replace(a: str, b: str) -> None:
        calls.append(("replace", False))
        replace(a, b)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    atomic_write(tmp_path / "a", _content(b"12345"))
    assert calls == [("fsync", False), ("replace", False), ("fsync", True)]


@pytest.mark.parametrize("call", ["open", "fchmod", "fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS, errno.EMFILE])
def test_old_file_survives_a_system_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(WeightsError) as error:
            atomic_write(path, _content(b"new"))
    assert _one_line(error) == f"cannot write {path}: {os.strerror(code)}"
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("old", [None, b"old"])
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), KeyError("x")])
def test_failing_writer_leaves_nothing(tmp_path: Path, old: bytes | None, failure: BaseException) -> None:
    path = tmp_path / "a.bin"
    if old is not None:
        path.write_bytes(old)

    def write(stream: BinaryIO) -> None:
        stream.write(b"half")
        raise failure

    expected = WeightsError if isinstance(failure, OSError) else type(failure)
    with pytest.raises(expected):
        atomic_write(path, write)
    assert os.listdir(tmp_path) == ([] if old is None else ["a.bin"])
    assert old is None or path.read_bytes() == old


def test_full_disk(tmp_path: Path) -> None:
    """The kernel's own refusal, by a limit on file sizes, in a process of its own."""
    script = (
        "import resource, signal, sys\n"
        "from xception.weights.files import atomic_write\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))\n"
        "try:\n"
        "    atomic_write(sys.argv[1], lambda s: s.write(bytes(1 << 20)) and None)\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"cannot write {path}: File too large"
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    expected = {
        "missing/a.bin": "No such file or directory",
        "folder": "Is a directory",
        "file/a.bin": "Not a directory",
        "pipe": "expected a regular file there, got a pipe, socket or device",
        "loop": "expected a regular file there",
        "x" * 300: "File name too long",
        "a\0b": "a file name cannot hold a zero byte",
    }
    before = sorted(os.listdir(tmp_path))
    for name, reason in expected.items():
        with pytest.raises(WeightsError) as error:
            atomic_write(f"{tmp_path}/{name}", _content(b"new"))
        assert reason in _one_line(error)
    assert sorted(os.listdir(tmp_path)) == before
    with pytest.raises(WeightsError, match="regular file"):
        atomic_write("/dev/null", _content(b"new"))
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_link_is_followed_and_permissions_kept(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"old")
    target.chmod(0o640)
    (tmp_path / "link").symlink_to("target")
    atomic_write(tmp_path / "link", _content(b"new"))
    assert (tmp_path / "link").is_symlink()
    assert target.read_bytes() == b"new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


def test_new_file_has_the_permissions_of_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        atomic_write(tmp_path / "a", _content(b""))
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_file_systems_without_folder_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def refuse_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    atomic_write(tmp_path / "a", _content(b"new"))
    assert (tmp_path / "a").read_bytes() == b"new"


def test_leftovers_of_killed_writers(tmp_path: Path) -> None:
    (tmp_path / f"{files.TEMPORARY_PREFIX}00ff{files.TEMPORARY_SUFFIX}").write_bytes(b"half")
    (tmp_path / "model.safetensors").write_bytes(b"kept")
    assert remove_leftovers(tmp_path) == 1
    assert os.listdir(tmp_path) == ["model.safetensors"]
    assert remove_leftovers(tmp_path / "missing") == 0


def test_open_regular_does_not_wait_for_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, problem in {"pipe": "got a pipe", "": "Is a directory", "none": "No such file"}.items():
        with pytest.raises(WeightsError, match=problem), open_regular(tmp_path / name):
            pass


def test_sha256_file(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    (tmp_path / "a").write_bytes(data)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_shown_is_one_printable_line() -> None:
    assert shown("plain/고양이.png") == "plain/고양이.png"
    odd = shown(os.fsdecode(b"a\nb\x1b[31m\xff"))
    assert odd.isprintable()
    assert odd.encode("utf-8")
