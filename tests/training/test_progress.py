"""What a run says while it goes, where there is no terminal for a bar."""

from __future__ import annotations

import pytest

from xception.training import progress as progress_module
from xception.training.progress import Reporter


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    return clock


def batches(reporter: Reporter, clock: Clock, count: int, *, seconds: float, images: int) -> None:
    for _ in range(count):
        clock.now += seconds
        reporter.advance(images, "loss 0.1")


def test_a_plain_line_every_half_minute(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # asks for colours, not for bars in a file
    with Reporter() as reporter:
        reporter.begin("epoch 2/7", 200, images=6400)
        batches(reporter, clock, 199, seconds=0.5, images=32)
        batches(reporter, clock, 1, seconds=100, images=32)
    assert capsys.readouterr().err.splitlines() == [
        "epoch 2/7: 1,920 of 6,400 images, 64 images/s, 0:01:10 left",
        "epoch 2/7: 3,840 of 6,400 images, 64 images/s, 0:00:40 left",
        "epoch 2/7: 5,760 of 6,400 images, 64 images/s, 0:00:10 left",
    ]


def test_slow_batches_get_a_line_each_and_an_epoch_may_begin_in_the_middle(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Reporter() as reporter:
        reporter.begin("epoch 1/1", 10, 7, images=320)
        batches(reporter, clock, 2, seconds=3600, images=32)
        reporter.begin("evaluation", 4)
        batches(reporter, clock, 2, seconds=20, images=32)
    assert capsys.readouterr().err.splitlines() == [
        "epoch 1/1: 256 of 320 images, 0.0 images/s, 2:00:00 left",
        "epoch 1/1: 288 of 320 images, 0.0 images/s, 1:00:00 left",
        "evaluation: 2 of 4 batches, 1.6 images/s, 0:00:40 left",
    ]


def test_a_quiet_one_says_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter(quiet=True) as reporter:
        reporter.begin("epoch 1/1", 10, images=320)
        batches(reporter, clock, 9, seconds=60, images=32)
    assert capsys.readouterr() == ("", "")
