"""The share of the time that the network waits for its images."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import quick

from xception.data.loader import Batch, Loader
from xception.training.waiting import Waiting


def things(count: int, seconds: float) -> Iterator[int]:
    for i in range(count):
        time.sleep(seconds)
        yield i


def test_what_comes_late_is_waited_for() -> None:
    slow = Waiting(things(5, 0.02))
    assert list(slow) == [0, 1, 2, 3, 4]
    assert 0.1 <= slow.seconds < 1
    assert slow.share > 0.9


def test_work_in_between_is_not_waiting() -> None:
    quickly = Waiting(range(5))
    assert quickly.share == pytest.approx(0, abs=0.5)
    for _ in quickly:
        time.sleep(0.02)
    assert quickly.share < 0.1


def test_an_error_comes_through() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise OSError("gone")

    waiting = Waiting(broken())
    assert next(waiting) == 1
    with pytest.raises(OSError, match="gone"):
        next(waiting)


@pytest.mark.parametrize("slow", [False, True])
def test_a_run_tells_it_in_its_log_its_lines_and_its_report(
    slow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    real = Loader._batches

    def late(self: Loader, *args: Any) -> Iterator[Batch]:
        for batch in real(self, *args):
            if self.augment.changes_samples:  # the training part's
                time.sleep(0.1)
            yield batch

    if slow:
        monkeypatch.setattr(Loader, "_batches", late)
    quick("digits", tmp_path / "run", epochs=1, batch_size=256, quiet=False)
    (record,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    share = record["data_wait_share"]
    assert 0 < share < 1
    if slow:
        assert share > 0.3
    told = f"{100 * share:.1f} % of the time waiting for data"
    assert told in capfd.readouterr().err.replace("\n", " ")
    assert told in (tmp_path / "run" / "report.html").read_text()
