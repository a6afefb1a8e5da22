"""A request to stop is answered at once, whatever is under way."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from xception.data import check as check_module
from xception.data.check import check_images
from xception.errors import DataError, ImageError
from xception.training.interrupt import Stopped, StopRequest


class SlowImages:
    """3,000 images of 20 ms each, counted when they are looked at."""

    keys = tuple(map(str, range(3000)))
    targets = (0,) * 3000

    def __init__(self) -> None:
        self.looked_at = 0
        self.lock = threading.Lock()

    def __len__(self) -> int:
        return 3000

    def image(self, index: int) -> Any:
        with self.lock:
            self.looked_at += 1
        time.sleep(0.02)
        if index == 5:
            raise ImageError("bad")
        return np.zeros((1, 1, 3), np.uint8)


def test_images_that_wait_for_their_check_are_left_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal comes while they are handed out, when nobody waits for one of them."""

    class Signalled(ThreadPoolExecutor):
        submitted = 0

        def submit(self, *args: Any, **options: Any) -> Future[Any]:
            self.submitted += 1
            if self.submitted == 500:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().submit(*args, **options)

    monkeypatch.setattr(check_module, "ThreadPoolExecutor", Signalled)
    images, before = SlowImages(), threading.active_count()
    with StopRequest(), pytest.raises(Stopped, match="before the first step"):
        check_images(images, workers=2)
    assert images.looked_at < 50
    assert threading.active_count() == before


def test_too_many_bad_images_end_it_at_once() -> None:
    images, before = SlowImages(), threading.active_count()
    with pytest.raises(DataError, match="limit"):
        check_images(images, max_bad_share=0, workers=2)
    assert images.looked_at < 50
    assert threading.active_count() == before
