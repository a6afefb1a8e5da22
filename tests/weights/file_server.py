"""A web server on this machine that serves one file, well or badly, as the test tells it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = Callable[["Request"], None]


class Request(BaseHTTPRequestHandler):
    """One request; the test's answers write to it."""

    protocol_version = "HTTP/1.1"
    server: FileServer

    def do_GET(self) -> None:
        self.close_connection = True
        self.server.seen.append(dict(self.headers) | {"path": self.path})
        with contextlib.suppress(ConnectionError):  # the client may have heard enough
            self.server.next_answer()(self)

    def log_message(self, format: str, *args: object) -> None:
        pass


class FileServer(ThreadingHTTPServer):
    """Serves `content`; `answers` are used up first, one a request, then `usual` answers."""

    daemon_threads = True

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.content = content
        self.etag: str | None = '"one"'
        self.usual: Answer = send()
        self.answers: list[Answer] = []
        self.seen: list[dict[str, str]] = []

    def next_answer(self) -> Answer:
        return self.answers.pop(0) if self.answers else self.usual

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/weights.bin"


@contextlib.contextmanager
def serving(content: bytes) -> Iterator[FileServer]:
    with FileServer(content) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def send(
    *,
    ranges: bool = True,
    if_range: bool = True,
    cut: int | None = None,
    length: int | None = None,
    content_range: str | None = None,
    pace: tuple[int, float] | None = None,
) -> Answer:
    """The file, or the part asked for.

    `ranges`, `if_range`: whether these headers are honoured; `cut`: bytes after which the connection ends; `length`:
    a Content-Length that lies; `content_range`: one that lies ("" leaves it out); `pace`: bytes at once, and seconds
    between them.
    """

    def answer(request: Request) -> None:
        server = request.server
        asked = request.headers.get("Range")
        fresh = not if_range or request.headers.get("If-Range") == server.etag
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and ranges and fresh else 0
        body = server.content[start:]
        request.send_response(206 if start else 200)
        if start:
            told = f"bytes {start}-{len(server.content) - 1}/{len(server.content)}"
            if content_range != "":
                request.send_header("Content-Range", content_range or told)
        if server.etag:
            request.send_header("ETag", server.etag)
        request.send_header("Content-Length", str(len(body) if length is None else length))
        request.end_headers()
        write(request, body[:cut], pace)

    return answer


def write(request: Request, body: bytes, pace: tuple[int, float] | None = None) -> None:
    step, pause = pace or (len(body) or 1, 0.0)
    for start in range(0, len(body), step):
        request.wfile.write(body[start : start + step])
        request.wfile.flush()
        time.sleep(pause)


def status(code: int, **headers: str) -> Answer:
    """An empty answer; underscores in the names of headers stand for hyphens."""

    def answer(request: Request) -> None:
        request.send_response(code)
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        request.send_header("Content-Length", "0")
        request.end_headers()

    return answer


def chunked(*, cut: int | None = None, size_line: bytes = b"") -> Answer:
    """The file in chunks, without a Content-Length; `cut` ends it within a chunk, `size_line` breaks the framing."""

    def answer(request: Request) -> None:
        request.send_response(200)
        if request.server.etag:
            request.send_header("ETag", request.server.etag)
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        content, step = request.server.content, 10_007
        for start in range(0, len(content), step):
            chunk = content[start : start + step]
            if cut is not None and start + step > cut:
                request.wfile.write((size_line or b"%x\r\n" % len(chunk)) + chunk[:100])
                return
            request.wfile.write(b"%x\r\n" % len(chunk) + chunk + b"\r\n")
        request.wfile.write(b"0\r\n\r\n")

    return answer


def until_closed(*, cut: int | None = None) -> Answer:
    """The file without a length, as HTTP/1.0 did: it ends where the connection ends."""

    def answer(request: Request) -> None:
        request.send_response(200)
        request.end_headers()
        request.wfile.write(request.server.content[:cut])

    return answer


def endless(*, in_chunks: bool) -> Answer:
    def answer(request: Request) -> None:
        request.send_response(200)
        if in_chunks:
            request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        block = bytes(1 << 16)
        while True:
            request.wfile.write(b"10000\r\n" + block + b"\r\n" if in_chunks else block)

    return answer
