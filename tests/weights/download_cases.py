"""What the tests of downloads share: a file, a server for it, and no other machine."""

from __future__ import annotations

import hashlib
import random
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from file_server import FileServer, serving

from xception.errors import WeightsError
from xception.weights.catalog import Digest
from xception.weights.download import download
from xception.weights.transfer import TransferSettings

CONTENT = random.Random(0).randbytes(600_000)
SHA256 = Digest(kind="sha256", value=hashlib.sha256(CONTENT).hexdigest())
FAST = TransferSettings(timeout=2, tries=3, pause=0.01, longest_pause=0.05, loopback_http=True)
ONCE = replace(FAST, tries=1)


@pytest.fixture(autouse=True)
def no_other_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    look_up = socket.getaddrinfo

    def guarded(host: Any, *args: Any, **options: Any) -> Any:
        assert host == "127.0.0.1", f"a test asked for {host}"
        return look_up(host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", guarded)


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serving(CONTENT) as server:
        yield server


@pytest.fixture
def get(server: FileServer, tmp_path: Path) -> Callable[..., Path]:
    """Download the server's file to ``tmp_path/weights.bin``."""

    def get(**options: Any) -> Path:
        options = {"digest": SHA256, "settings": FAST} | options
        return download(server.url, tmp_path / "weights.bin", **options)

    return get


def left(folder: Path) -> list[str]:
    """What is in the folder besides locks."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def failure(act: Callable[[], object]) -> str:
    with pytest.raises(WeightsError) as caught:
        act()
    text = str(caught.value)
    assert text.isprintable(), "not one line"
    return text
