"""Downloads into the cache, from a good server on this machine; several at once, and full disks."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import file_server
import pytest
from download_cases import CONTENT, FAST, SHA256, failure, get, left, no_other_machine, server
from file_server import FileServer, chunked, send, status, until_closed

from xception.errors import ConfigError
from xception.weights.catalog import Digest, find_checkpoint
from xception.weights.download import cache_folder, download, fetch_checkpoint
from xception.weights.one_writer import only_writer

__all__ = ["get", "no_other_machine", "server"]  # fixtures


def test_a_file_comes_whole_and_comes_once(server: FileServer, get: Callable[..., Path], tmp_path: Path) -> None:
    told: list[tuple[int, int | None]] = []
    path = get(progress=lambda done, total: told.append((done, total)))
    assert path.read_bytes() == CONTENT
    assert left(tmp_path) == ["weights.bin"]
    assert told[0] == (0, len(CONTENT))
    assert told[-1] == (len(CONTENT), len(CONTENT))
    assert told == sorted(told)
    assert get() == path
    assert len(server.seen) == 1
    assert server.seen[0]["Accept-Encoding"] == "identity"
    assert "Range" not in server.seen[0]


@pytest.mark.parametrize("answer", [chunked(), until_closed()], ids=["chunked", "until closed"])
def test_a_body_without_a_length(server: FileServer, get: Callable[..., Path], answer: file_server.Answer) -> None:
    server.usual = answer
    assert get().read_bytes() == CONTENT


@pytest.mark.parametrize("kind", ["md5", "sha256-prefix"])
def test_other_kinds_of_digest(get: Callable[..., Path], kind: str) -> None:
    value = hashlib.md5(CONTENT).hexdigest() if kind == "md5" else SHA256.value[:8]
    assert get(digest=Digest(kind=kind, value=value)).read_bytes() == CONTENT  # type: ignore[arg-type]


def test_without_a_digest_the_size_must_be_met(get: Callable[..., Path]) -> None:
    assert "expected 600,001 bytes, got 600,000" in failure(lambda: get(digest=None, size=len(CONTENT) + 1))
    assert get(digest=None, size=len(CONTENT)).read_bytes() == CONTENT


def test_a_file_that_is_there_is_verified_each_time(
    server: FileServer, get: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(CONTENT)  # by hand
    get()
    assert server.seen == []
    assert left(tmp_path) == ["weights.bin"]
    assert not list(tmp_path.glob(".*")), "a good file needs no lock, so it may be in a read-only folder"
    path.write_bytes(CONTENT[:-1] + b"?")
    server.answers = [status(404)]
    text = failure(get)
    assert "the file there is not the right one (expected sha256" in text
    assert path.exists(), "someone's file is replaced by a better one or not at all"
    assert get().read_bytes() == CONTENT


# The cache


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("XCEPTION_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == Path("/home/someone/.cache/xception")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache")
    assert cache_folder() == Path("/var/cache/xception")
    monkeypatch.setenv("XCEPTION_CACHE", "~/weights")
    assert cache_folder() == Path("/home/someone/weights")
    monkeypatch.setenv("XCEPTION_CACHE", "weights")
    monkeypatch.chdir(tmp_path)
    assert cache_folder() == tmp_path / "weights"


def test_a_checkpoint_goes_to_the_cache_under_its_own_name(
    server: FileServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XCEPTION_CACHE", str(tmp_path / "a" / "b"))
    entry = replace(find_checkpoint("googlenet.tv_in1k"), url=server.url, digest=SHA256)
    assert fetch_checkpoint(entry, settings=FAST) == tmp_path / "a" / "b" / "weights.bin"
    assert fetch_checkpoint(entry, folder=tmp_path, settings=FAST) == tmp_path / "weights.bin"
    with pytest.raises(ConfigError, match="did you mean"):
        fetch_checkpoint("googlenet.tv_in2k")


def test_a_cache_that_cannot_be_written_is_named(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        text = failure(lambda folder=folder: download(server.url, folder / "x", settings=FAST))  # type: ignore[misc]
        assert text.startswith(f"cannot write {folder}: ")
        assert "XCEPTION_CACHE" in text
    assert server.seen == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_cache_is_named(server: FileServer, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        assert "Permission denied; XCEPTION_CACHE" in failure(lambda: download(server.url, tmp_path / "x"))
    finally:
        tmp_path.chmod(0o700)


def test_a_disk_without_room_is_told_before_the_transfer(
    get: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=599_999))
    assert "600,000 bytes are needed and 599,999 are free" in failure(get)
    assert left(tmp_path) == []


def test_a_disk_that_fills_up_keeps_what_came(server: FileServer, get: Callable[..., Path], tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: a real error, from the real system call."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (250_000, hard))
    try:
        text = failure(get)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert text.startswith(f"cannot write {tmp_path / 'weights.bin.partial'}: File too large; XCEPTION_CACHE")
    assert get().read_bytes() == CONTENT
    assert server.seen[1]["Range"] == "bytes=250000-"


def test_a_pipe_in_the_place_of_the_part_is_not_waited_for(get: Callable[..., Path], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "weights.bin.partial")
    assert "expected a regular file there" in failure(get)


# Several at once


def test_threads_that_want_the_same_file_share_one_transfer(server: FileServer, get: Callable[..., Path]) -> None:
    server.usual = send(pace=(60_000, 0.03))
    results: list[Path] = []
    threads = [threading.Thread(target=lambda: results.append(get())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert results[0].read_bytes() == CONTENT
    assert len(server.seen) == 1


def test_processes_that_want_the_same_file_share_one_transfer(server: FileServer, tmp_path: Path) -> None:
    """The first is killed in the middle: its lock goes with it, and another continues."""
    server.usual = send(pace=(6_000, 0.02))
    code = (
        "import sys; from xception.weights.download import download;"
        "from xception.weights.catalog import Digest; from xception.weights.transfer import TransferSettings;"
        "download(sys.argv[1], sys.argv[2], digest=Digest(kind='sha256', value=sys.argv[3]),"
        "settings=TransferSettings(loopback_http=True), progress=lambda done, total: print(done, flush=True))"
    )
    command = [sys.executable, "-c", code, server.url, str(tmp_path / "x"), SHA256.value]

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, stdout=subprocess.PIPE)

    with start() as first:
        assert first.stdout is not None
        for _ in range(5):
            first.stdout.readline()
        others = [start(), start()]
        for other in others:
            assert other.stdout is not None
            other.stdout.readline()  # it is waiting, and shows the first one's progress
        server.usual = send()
        first.kill()
    for other in others:
        other.communicate(timeout=20)
        assert other.returncode == 0
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert left(tmp_path) == ["x"]
    assert len(server.seen) == 2
    assert "Range" in server.seen[1]


def test_a_holder_that_is_stuck_is_not_waited_for(server: FileServer, get: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "weights.bin.partial").write_bytes(b"stuck")
    impatient = replace(FAST, timeout=0.1, longest_pause=0.05)
    with only_writer(tmp_path / ".weights.bin.lock", patience=1, watch=lambda: 0) as alone:
        assert alone
        server.answers = [send(cut=1000)]
        failure(lambda: get(settings=replace(impatient, tries=1)))
        assert left(tmp_path) == ["weights.bin.partial"], "a part of one's own is found by nobody again"
        assert get(settings=impatient).read_bytes() == CONTENT
    assert (tmp_path / "weights.bin.partial").read_bytes() == b"stuck", "it is not ours"
    assert left(tmp_path) == ["weights.bin", "weights.bin.partial"]
