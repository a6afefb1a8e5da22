"""One request for a file, or for the rest of one: what may be asked, where a redirect may lead, what an answer means.

Only HTTPS, with certificates verified, and nothing the server says is believed beyond what is checked here: the bytes
that really come are counted against what was announced. No answer is decompressed, and no credentials are sent.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import re
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.error import URLError
from urllib.parse import quote, urljoin, urlsplit
from urllib.request import HTTPHandler, HTTPSHandler, OpenerDirector, ProxyHandler, Request

from xception._version import __version__
from xception.data.labels import printable

CHUNK_BYTES = 1 << 18
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_REDIRECTS = (301, 302, 303, 307, 308)
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_RANGE = re.compile(r"bytes (\d{1,15})-(\d{1,15})/(\d{1,15})")
_UNREACHABLE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN)


@dataclass(frozen=True, kw_only=True)
class TransferSettings:
    """How patient a download is, and how much it takes. Times are in seconds.

    timeout: for connecting, and for each wait for the next bytes.
    slowest: bytes a second, averaged over twice the timeout; slower counts as stalled.
    tries: in a row without a MiB of progress, before giving up.
    pause: before the second try; each further one is twice as long, up to `longest_pause`.
    max_bytes: of a file whose size is not known beforehand.
    loopback_http: allow plain HTTP to this very machine, for tests.
    """

    timeout: float = 30.0
    slowest: float = 1024.0
    tries: int = 5
    pause: float = 1.0
    longest_pause: float = 30.0
    max_bytes: int = 1 << 30
    max_redirects: int = 5
    loopback_http: bool = False


class TransferError(Exception):
    """A transfer that failed.

    `temporary`: another try may work, after `wait` seconds if the server asked for that; `offline`: the server was not
    even found; `restart`: what is there of the file cannot be continued, the next try must begin at the beginning.
    """

    def __init__(
        self,
        reason: str,
        *,
        temporary: bool = False,
        offline: bool = False,
        restart: bool = False,
        wait: float = 0.0,
    ) -> None:
        super().__init__(reason)
        self.temporary = temporary or restart
        self.offline = offline
        self.restart = restart
        self.wait = wait


@dataclass(frozen=True, kw_only=True)
class Reply:
    """An answer that carries the file from byte `start` on.

    `total` is the whole file's size and `validator` (an ETag or a date) tells this version of the file from others;
    None where the server does not say.
    """

    response: http.client.HTTPResponse
    start: int
    total: int | None
    validator: str | None


@contextlib.contextmanager
def request_file(
    url: str, settings: TransferSettings, *, start: int = 0, validator: str | None = None
) -> Iterator[Reply]:
    """Ask for the file from `start` on, provided that it is still the version of `validator`.

    Without that, or from a server that cannot continue, the reply starts at 0. Raises `TransferError`.
    """
    headers = {"Accept-Encoding": "identity", "User-Agent": f"xception/{__version__}"}
    if start and validator:
        headers |= {"Range": f"bytes={start}-", "If-Range": validator}
    with contextlib.closing(_open(url, headers, settings)) as response:
        reply = _reply(response, start if start and validator else 0, validator)
        if reply.total is not None and reply.total > settings.max_bytes:
            raise TransferError(f"the server announces {reply.total:,} bytes, {settings.max_bytes:,} are allowed")
        yield reply


def read_chunks(reply: Reply, settings: TransferSettings) -> Iterator[bytes]:
    """The body as it comes; raises `TransferError` where it stops early, stalls or has no end."""
    announced = reply.response.length  # of this body; None where it is chunked or ends with the connection
    received, mark_bytes, mark_time = 0, 0, time.monotonic()
    while announced is None or received < announced:
        wanted = CHUNK_BYTES if announced is None else min(CHUNK_BYTES, announced - received)
        with _network_errors():
            chunk = reply.response.read1(wanted)
        if not chunk:
            break
        received += len(chunk)
        if reply.start + received > settings.max_bytes:
            raise TransferError(f"the body is longer than the {settings.max_bytes:,} bytes allowed")
        yield chunk
        if (elapsed := time.monotonic() - mark_time) > 2 * settings.timeout:
            if received - mark_bytes < settings.slowest * elapsed:
                raise TransferError("the transfer has stalled", temporary=True)
            mark_bytes, mark_time = received, time.monotonic()
    whole = announced if reply.total is None else reply.total - reply.start
    if whole is not None and received < whole:
        raise TransferError(f"the connection ended {whole - received:,} bytes early", temporary=True)


def _open(url: str, headers: dict[str, str], settings: TransferSettings) -> http.client.HTTPResponse:
    """The first answer that is no redirect."""
    came_from = ""
    for _ in range(settings.max_redirects + 1):
        local = _check_address(url, came_from, settings)
        opener = OpenerDirector()  # bare: it opens no files, no FTP, and leaves errors and redirects to us
        opener.add_handler(ProxyHandler({} if local else None))
        if url.startswith("https:"):
            opener.add_handler(HTTPSHandler(context=ssl.create_default_context()))
        else:
            opener.add_handler(HTTPHandler())
        with _network_errors():
            response = opener.open(Request(url, headers=headers), timeout=settings.timeout)
        assert isinstance(response, http.client.HTTPResponse)
        if response.status not in _REDIRECTS:
            return response
        response.close()
        location = response.headers.get("Location")
        if not location:
            raise TransferError(f"a redirect ({response.status}) that leads nowhere")
        came_from = url
        try:
            url = quote(urljoin(url, location), safe="%/:=&?~#+!$,;'@()*[]")
        except ValueError:
            raise TransferError(f"a redirect to {_brief(location)}, which is no address") from None
    raise TransferError(f"more than {settings.max_redirects} redirects")


def _check_address(url: str, came_from: str, settings: TransferSettings) -> bool:
    """Refuse what is not HTTPS; returns whether the address is this machine's own."""
    told = f"a redirect to {_brief(url)}" if came_from else _brief(url)
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise TransferError(f"{told}: no address") from None
    local = settings.loopback_http and host in _LOOPBACK
    plain_allowed = local and not came_from.startswith("https:")
    if parts.scheme != "https" and not (parts.scheme == "http" and plain_allowed):
        raise TransferError(f"{told}: only https is allowed")
    if not host or parts.username is not None or parts.password is not None:
        raise TransferError(f"{told}: expected a plain https://host/path")
    return bool(local)


def _reply(response: http.client.HTTPResponse, start: int, validator: str | None) -> Reply:
    """What an answer to a request from `start` on is worth; raises `TransferError` if nothing."""
    status = response.status
    if status in _BUSY:
        raise TransferError(f"the server answers {_told(response)}", temporary=True, wait=_retry_after(response))
    if status == 416 and start:
        raise TransferError("the server has no such part of the file", restart=True)
    if status not in (200, 206):
        raise TransferError(f"the server answers {_told(response)}")
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise TransferError("the server sends the file in another encoding than asked for")
    found = _validator(response)
    if status == 200:
        return Reply(response=response, start=0, total=response.length, validator=found)
    match = _RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
    if not start:
        raise TransferError("the server sends a part of the file though the whole was asked for")
    first, last, total = map(int, match.groups()) if match else (-1, -1, -1)
    if first != start or not first <= last < total or (found is not None and found != validator):
        raise TransferError("the server continues another file than the one it began", restart=True)
    return Reply(response=response, start=start, total=total, validator=validator)


def _validator(response: http.client.HTTPResponse) -> str | None:
    """What `If-Range` takes: a strong ETag, else the date of the last change."""
    tag = response.headers.get("ETag", "")
    if re.fullmatch(r'"[!#-~]{1,200}"', tag):
        return tag
    date = response.headers.get("Last-Modified", "")
    return date if re.fullmatch(r"[A-Za-z0-9:, +-]{10,60}", date) else None


def _retry_after(response: http.client.HTTPResponse) -> float:
    """Seconds; the other form, a date, is not worth its trouble."""
    value = response.headers.get("Retry-After", "").strip()
    return float(value) if re.fullmatch(r"\d{1,4}", value) else 0.0


def _told(response: http.client.HTTPResponse) -> str:
    return f"{response.status} {http.client.responses.get(response.status, '')}".strip()


def _brief(text: str) -> str:
    return printable(text if len(text) <= 200 else text[:200] + "...")


@contextlib.contextmanager
def _network_errors() -> Iterator[None]:
    """Whatever the standard library raises about a connection, as a `TransferError`."""
    try:
        yield
    except (OSError, http.client.HTTPException, ValueError) as error:
        cause = error.reason if isinstance(error, URLError) and isinstance(error.reason, Exception) else error
        raise _told_plainly(cause) from error


def _told_plainly(error: Exception) -> TransferError:
    if isinstance(error, socket.gaierror):
        return TransferError("the server's name cannot be resolved (no network?)", temporary=True, offline=True)
    if isinstance(error, ssl.SSLCertVerificationError):
        return TransferError(f"the server's certificate is not valid: {_brief(error.strerror or '')}")
    if isinstance(error, TimeoutError):
        return TransferError("the server does not answer in time", temporary=True)
    if isinstance(error, http.client.IncompleteRead):
        return TransferError("the connection ended early", temporary=True)
    if isinstance(error, http.client.InvalidURL):
        return TransferError(f"no address: {_brief(str(error))}")
    if isinstance(error, OSError):
        reason = _brief(error.strerror or str(error) or type(error).__name__)
        return TransferError(reason, temporary=True, offline=error.errno in _UNREACHABLE)
    return TransferError(f"no proper answer ({type(error).__name__})", temporary=True)
