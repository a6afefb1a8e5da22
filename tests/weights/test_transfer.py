"""Downloads from bad servers, and where a download may be asked for at all."""

from __future__ import annotations

import hashlib
import http.client
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import file_server
import pytest
from download_cases import CONTENT, FAST, ONCE, SHA256, failure, get, left, no_other_machine, server
from file_server import FileServer, chunked, endless, send, status, until_closed

from xception.weights import transfer
from xception.weights.download import download, fetch_checkpoint

__all__ = ["get", "no_other_machine", "server"]  # fixtures


@pytest.mark.parametrize("ranges", [True, False])
def test_a_transfer_that_never_ends_well_ends(server: FileServer, get: Callable[..., Path], ranges: bool) -> None:
    server.usual = send(ranges=ranges, cut=1000)
    text = failure(get)
    assert "bytes early (gave up after try 3); get http://127.0.0.1:" in text
    assert len(server.seen) == 3


@pytest.mark.parametrize(
    "answer",
    [
        chunked(cut=400_000),
        chunked(cut=400_000, size_line=b"zz\r\n"),
        chunked(cut=400_000, size_line=b"-5\r\n"),
        chunked(cut=0, size_line=b"f" * 70_000),
        until_closed(cut=400_000),
        lambda request: request.wfile.write(b"HTTP/1.1 abc\r\n\r\n"),
        lambda request: request.wfile.write(b"SSH-2.0-OpenSSH\r\n"),
        lambda request: request.wfile.write(b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 200 + b"\r\n"),
        lambda request: request.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n"),
        lambda request: None,
    ],
    ids=["cut", "no number", "negative", "long line", "closed", "no status", "no HTTP", "headers", "length", "silence"],
)
def test_a_broken_answer_is_tried_again(
    server: FileServer, get: Callable[..., Path], answer: file_server.Answer
) -> None:
    server.answers = [answer]
    assert get(size=len(CONTENT)).read_bytes() == CONTENT
    assert len(server.seen) == 2


def test_a_wrong_file_is_removed_and_both_digests_are_named(
    server: FileServer, get: Callable[..., Path], tmp_path: Path
) -> None:
    server.content = CONTENT + b"!"
    text = failure(get)
    assert SHA256.value in text
    assert hashlib.sha256(server.content).hexdigest() in text
    assert left(tmp_path) == []
    assert len(server.seen) == 1


def test_a_length_that_is_too_short_gives_a_wrong_file(
    server: FileServer, get: Callable[..., Path], tmp_path: Path
) -> None:
    server.usual = send(length=1000)
    assert hashlib.sha256(CONTENT[:1000]).hexdigest() in failure(get)
    assert left(tmp_path) == []


@pytest.mark.parametrize("code", [401, 403, 404, 410, 418])
def test_a_final_answer_is_final(server: FileServer, get: Callable[..., Path], tmp_path: Path, code: int) -> None:
    server.usual = status(code)
    text = failure(lambda: get(name="xception.some_in1k"))
    assert text.startswith(f"cannot download xception.some_in1k: the server answers {code} ")
    assert text.endswith(f"; get {server.url} ({SHA256}) by hand and save it as {tmp_path / 'weights.bin'}")
    assert len(server.seen) == 1


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503, 504])
def test_a_server_in_trouble_is_asked_again(server: FileServer, get: Callable[..., Path], code: int) -> None:
    server.answers = [status(code), status(code, Retry_After="0")]
    assert get().read_bytes() == CONTENT
    server.usual = status(code)
    assert f"{code} " in failure(lambda: get(digest=replace(SHA256, value="0" * 64)))


def test_a_refusal_to_continue_keeps_what_is_there(
    server: FileServer, get: Callable[..., Path], tmp_path: Path
) -> None:
    server.answers = [send(cut=400_000), status(403)]
    failure(get)
    assert (tmp_path / "weights.bin.partial").stat().st_size == 400_000


def test_pauses_grow_and_follow_the_server_s_wish_within_bounds(
    server: FileServer, get: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    busy = status(503)
    server.answers = [busy, busy, status(503, Retry_After="7"), status(503, Retry_After="9999"), busy]
    get(settings=replace(FAST, tries=6, pause=1, longest_pause=10))
    assert [p for p in pauses if p] == [1, 2, 7, 10, 10]


@pytest.mark.parametrize("in_chunks", [True, False])
def test_an_endless_body_is_left_at_the_limit(
    server: FileServer, get: Callable[..., Path], tmp_path: Path, in_chunks: bool
) -> None:
    server.usual = endless(in_chunks=in_chunks)
    text = failure(lambda: get(size=len(CONTENT)))
    limit = len(CONTENT) * 5 // 4 + 2**20
    assert f"the body is longer than the {limit:,} bytes allowed" in text
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= limit


def test_too_much_is_refused_when_announced(server: FileServer, get: Callable[..., Path], tmp_path: Path) -> None:
    server.usual = send(length=10**12)
    assert "the server announces 1,000,000,000,000 bytes" in failure(get)
    assert left(tmp_path) == []


def test_a_silent_server_is_not_waited_for(server: FileServer, get: Callable[..., Path]) -> None:
    waiting = threading.Event()
    server.usual = lambda request: waiting.wait(5) and None
    started = time.monotonic()
    assert "the server does not answer in time" in failure(lambda: get(settings=replace(FAST, timeout=0.1, tries=2)))
    waiting.set()
    assert time.monotonic() - started < 2


def test_a_trickle_counts_as_stalled(server: FileServer, get: Callable[..., Path]) -> None:
    server.usual = send(pace=(10, 0.02))
    slow = replace(ONCE, timeout=0.1, slowest=10_000)
    started = time.monotonic()
    assert "the transfer has stalled" in failure(lambda: get(settings=slow))
    assert time.monotonic() - started < 2


def test_an_encoding_that_was_not_asked_for_is_refused(server: FileServer, get: Callable[..., Path]) -> None:
    server.usual = status(200, Content_Encoding="gzip")
    assert "in another encoding" in failure(get)


# Addresses


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("location", ["/elsewhere/a%20file.bin?x=1", "{origin}/elsewhere/a file.bin", "//{host}/x"])
def test_redirects_are_followed(server: FileServer, get: Callable[..., Path], code: int, location: str) -> None:
    host = f"127.0.0.1:{server.server_port}"
    server.answers = [status(code, Location=location.format(origin=f"http://{host}", host=host)), send(cut=9)] * 2
    assert get().read_bytes() == CONTENT
    assert server.seen[1]["path"] in ("/elsewhere/a%20file.bin?x=1", "/elsewhere/a%20file.bin", "/x")
    assert server.seen[3]["Range"] == "bytes=9-", "a redirect keeps the question"


@pytest.mark.parametrize(
    "location",
    [
        "file:///etc/passwd",
        "ftp://127.0.0.1/x",
        "http://example.org/x",
        "data:,x",
        "https://user:secret@example.org/x",
        "https://[::1/x",
        "https://example.org:port/x",
        "https:///x",
        "javascript:0",
    ],
)
def test_redirects_elsewhere_are_refused(
    server: FileServer, get: Callable[..., Path], tmp_path: Path, location: str
) -> None:
    server.usual = status(302, Location=location)
    assert ": a redirect to " in failure(get)
    assert left(tmp_path) == []
    assert len(server.seen) == 1


def test_redirects_come_to_an_end(server: FileServer, get: Callable[..., Path]) -> None:
    server.usual = status(302, Location="/again")
    assert "more than 5 redirects" in failure(get)
    assert len(server.seen) == 6
    server.usual = status(302)
    assert "leads nowhere" in failure(get)


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:9/x", "http://example.org/x", "ftp://example.org/x", "file:///etc/passwd", "x", "https://"],
)
def test_only_https_is_asked(tmp_path: Path, url: str) -> None:
    settings = replace(FAST, loopback_http=url.startswith("http://e"))
    text = failure(lambda: download(url, tmp_path / "x", settings=settings))
    assert "only https is allowed" in text or "expected a plain https://host/path" in text


def test_certificates_are_verified_and_nothing_but_https_is_spoken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contexts: list[ssl.SSLContext] = []

    class Recorded(transfer.HTTPSHandler):
        def __init__(self, *, context: ssl.SSLContext) -> None:
            contexts.append(context)
            super().__init__(context=context)

        def https_open(self, req: object) -> Any:
            raise ssl.SSLCertVerificationError(1, "certificate verify failed")

    monkeypatch.setattr(transfer, "HTTPSHandler", Recorded)
    text = failure(lambda: download("https://example.org/x", tmp_path / "x", settings=FAST))
    assert "the server's certificate is not valid" in text
    assert len(contexts) == 1, "a wrong certificate does not become right by asking again"
    assert contexts[0].verify_mode is ssl.CERT_REQUIRED
    assert contexts[0].check_hostname


def test_a_redirect_never_leads_from_https_to_http(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even to this machine, where plain HTTP is allowed to these tests."""

    class Pretended(transfer.HTTPSHandler):
        def https_open(self, req: Any) -> Any:
            local = urllib.request.Request(server.url)
            local.timeout = 2
            return self.do_open(http.client.HTTPConnection, local)

    monkeypatch.setattr(transfer, "HTTPSHandler", Pretended)
    server.usual = status(302, Location=server.url)
    text = failure(lambda: download("https://example.org/x", tmp_path / "x", settings=FAST))
    assert f"a redirect to {server.url}: only https is allowed" in text
    assert len(server.seen) == 1


def test_a_proxy_is_not_asked_about_this_machine(get: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert get().read_bytes() == CONTENT


def test_offline_the_message_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def offline(host: str, *_: object, **__: object) -> None:
        asked.append(host)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", offline)
    monkeypatch.setenv("XCEPTION_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    assert failure(lambda: fetch_checkpoint("imagenet", model="xception", settings=FAST)) == (
        "cannot download xception.keras_in1k: the server's name cannot be resolved (no network?) "
        "(gave up after try 2); get https://storage.googleapis.com/tensorflow/keras-applications/xception/"
        "xception_weights_tf_dim_ordering_tf_kernels.h5 (md5 0a58e3b7378bc2990ea3b43d5981f1f6) by hand "
        f"and save it as {tmp_path}/cache/xception_weights_tf_dim_ordering_tf_kernels.h5"
    )
    assert asked == ["storage.googleapis.com"] * 2


def test_a_port_where_nobody_listens(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/x"
        assert "Connection refused" in failure(lambda: download(url, tmp_path / "x", settings=FAST))
