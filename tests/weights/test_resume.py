"""Downloads that are cut or interrupted, and what becomes of the part that came."""

from __future__ import annotations

import hashlib
import json
import random
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import file_server
import pytest
from download_cases import CONTENT, FAST, ONCE, failure, get, left, no_other_machine, server
from file_server import FileServer, Request, send, serving, status

from xception.weights.catalog import Digest
from xception.weights.download import download

__all__ = ["get", "no_other_machine", "server"]  # fixtures


def interrupt(done: int, total: int | None) -> None:
    """What Ctrl-C does, somewhere in the middle."""
    if done > 100_000:
        signal.raise_signal(signal.SIGINT)


def test_a_cut_transfer_is_continued(server: FileServer, get: Callable[..., Path], tmp_path: Path) -> None:
    server.answers = [send(cut=400_000)]
    assert get().read_bytes() == CONTENT
    assert [(s.get("Range"), s.get("If-Range")) for s in server.seen] == [
        (None, None),
        ("bytes=400000-", '"one"'),
    ]
    assert left(tmp_path) == ["weights.bin"]


def test_the_next_call_continues_what_the_last_one_left(
    server: FileServer, get: Callable[..., Path], tmp_path: Path
) -> None:
    server.answers = [send(cut=400_000)]
    assert "the connection ended 200,000 bytes early" in failure(lambda: get(settings=ONCE))
    assert left(tmp_path) == ["weights.bin.partial", "weights.bin.partial.json"]
    told: list[int] = []
    assert get(progress=lambda done, total: told.append(done)).read_bytes() == CONTENT
    assert server.seen[1]["Range"] == "bytes=400000-"
    assert told[0] == 400_000


def test_an_interrupt_leaves_what_can_be_continued(
    server: FileServer, get: Callable[..., Path], tmp_path: Path
) -> None:
    server.answers = [send(pace=(50_000, 0.002))]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            get(progress=interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    part = tmp_path / "weights.bin.partial"
    assert CONTENT.startswith(part.read_bytes())
    size = part.stat().st_size
    assert 100_000 < size < len(CONTENT)
    assert get().read_bytes() == CONTENT
    assert server.seen[1]["Range"] == f"bytes={size}-"


def test_a_last_modified_date_serves_where_there_is_no_strong_etag(
    server: FileServer, get: Callable[..., Path]
) -> None:
    date = "Wed, 21 Oct 2015 07:28:00 GMT"

    def weak(request: Request) -> None:
        request.send_response(200)
        request.send_header("ETag", 'W/"weak"')
        request.send_header("Last-Modified", date)
        request.send_header("Content-Length", str(len(CONTENT)))
        request.end_headers()
        request.wfile.write(CONTENT[:1000])

    server.answers = [weak]
    assert get().read_bytes() == CONTENT
    assert server.seen[1]["If-Range"] == date


@pytest.mark.parametrize("etag", [None, 'W/"weak"', '"' + "x" * 500 + '"'])
def test_a_server_that_names_no_version_is_asked_for_the_whole_again(
    server: FileServer, get: Callable[..., Path], etag: str | None
) -> None:
    server.etag = etag
    server.answers = [send(cut=400_000)]
    assert get().read_bytes() == CONTENT
    assert "Range" not in server.seen[1]


def test_a_server_without_ranges_starts_again(server: FileServer, get: Callable[..., Path]) -> None:
    server.usual = send(ranges=False)
    server.answers = [send(cut=400_000)]
    assert get().read_bytes() == CONTENT
    assert "Range" in server.seen[1]


@pytest.mark.parametrize("if_range", [True, False], ids=["honoured", "ignored"])
def test_a_file_that_changed_meanwhile_is_not_mixed(
    server: FileServer, get: Callable[..., Path], if_range: bool
) -> None:
    """Another ETag: a good server then sends the whole, a bad one the rest of the other file."""
    server.answers = [send(cut=400_000), send(if_range=if_range)]
    server.content = bytes(600_000)

    def change(done: int, total: int | None) -> None:
        if done == 400_000:
            server.content, server.etag = CONTENT, '"two"'

    # No digest, which would find a mixture too, only later.
    assert get(digest=None, size=len(CONTENT), progress=change).read_bytes() == CONTENT
    assert len(server.seen) == (2 if if_range else 3)


@pytest.mark.parametrize(
    "answer",
    [
        send(content_range=""),
        send(content_range="bytes 0-599999/600000"),
        send(content_range="bytes 400000-599999/*"),
        send(content_range="bytes 400000-599999/500"),
        send(content_range="bytes 4e5-" + "9" * 5000),
        status(416),
    ],
    ids=["none", "another start", "no total", "too small a total", "nonsense", "416"],
)
def test_a_wrong_continuation_leads_back_to_the_beginning(
    server: FileServer, get: Callable[..., Path], answer: file_server.Answer
) -> None:
    server.answers = [send(cut=400_000), answer]
    assert get().read_bytes() == CONTENT
    assert "Range" not in server.seen[2]


def test_a_part_that_was_not_asked_for_is_refused(server: FileServer, get: Callable[..., Path]) -> None:
    server.usual = status(206, Content_Range="bytes 0-599999/600000")
    assert "a part of the file though the whole was asked for" in failure(get)


def test_a_damaged_part_costs_one_more_transfer(server: FileServer, get: Callable[..., Path], tmp_path: Path) -> None:
    server.answers = [send(cut=400_000)]
    failure(lambda: get(settings=ONCE))
    (tmp_path / "weights.bin.partial").write_bytes(bytes(400_000))
    assert get().read_bytes() == CONTENT
    assert ["Range" in s for s in server.seen] == [False, True, False]


def test_a_complete_part_only_needs_its_name(server: FileServer, get: Callable[..., Path], tmp_path: Path) -> None:
    server.answers = [send(cut=400_000)]
    failure(lambda: get(settings=ONCE))
    (tmp_path / "weights.bin.partial").write_bytes(CONTENT)
    assert get().read_bytes() == CONTENT
    assert len(server.seen) == 1


@pytest.mark.parametrize("memory", [b"", b"[]", b"{}", b"\xff" * 99, b'{"url": 1, "validator": "x", "total": 3}', None])
def test_what_is_remembered_may_be_nonsense_or_of_another_address(
    server: FileServer, get: Callable[..., Path], tmp_path: Path, memory: bytes | None
) -> None:
    other = json.dumps({"url": "https://example.org/", "validator": '"one"', "total": len(CONTENT)}).encode()
    (tmp_path / "weights.bin.partial").write_bytes(b"?" * 1000)
    (tmp_path / "weights.bin.partial.json").write_bytes(other if memory is None else memory)
    assert get().read_bytes() == CONTENT
    assert "Range" not in server.seen[0]


def test_tries_that_get_further_do_not_count(tmp_path: Path) -> None:
    content = random.Random(1).randbytes(5 << 20)
    digest = Digest(kind="sha256", value=hashlib.sha256(content).hexdigest())
    with serving(content) as server:
        server.usual = send(cut=(1 << 20) + 1)
        download(server.url, tmp_path / "x", digest=digest, settings=replace(FAST, tries=2))
        assert len(server.seen) == 5
