"""Workers that are killed, stopped, interrupted or orphaned: the results stay complete and in order."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from xception.data import workers
from xception.data.workers import WorkerPool
from xception.errors import DataError, ImageError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals")


def square(job: int) -> tuple[int, np.ndarray]:
    time.sleep(0.002)
    return job, np.full(200_000, job % 256, np.uint8)


def fail_at_five(job: int) -> int:
    if job == 5:
        raise ImageError("five")
    return job


def die(job: int) -> int:
    os._exit(3)


class Stubborn(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__("cannot be rebuilt from one argument")


def awkward(job: int) -> object:
    if job == 0:
        return lambda: None
    if job == 1:
        raise Stubborn(1, 2)
    return job


def poison_at_five(job: int) -> int:
    if job == 5:
        os._exit(9)
    return job


def state(job: int) -> tuple[object, object, bool, int]:
    blocked = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    return signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), blocked, os.getpid()


@contextlib.contextmanager
def pool(function: Callable, count: int = 2, start_method: str | None = None) -> Iterator[WorkerPool]:
    made = WorkerPool(function, count, start_method)
    try:
        yield made
    finally:
        pids = made.pids()
        made.close()
        for pid in pids:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)


def check(results: list[tuple[int, np.ndarray]], count: int) -> None:
    assert [job for job, _ in results] == list(range(count))
    assert all(values.size == 200_000 and (values == job % 256).all() for job, values in results)


@pytest.mark.parametrize("start_method", ["fork", "spawn", "forkserver"])
def test_results_come_in_order(start_method: str) -> None:
    with pool(square, 2, start_method) as two:
        check(list(two.map(range(30))), 30)
        check(list(two.map(range(3))), 3)
        assert len(two.pids()) == 2
        assert list(two.map([])) == []


def test_the_pool_persists_and_can_be_closed_and_used_again() -> None:
    with pool(square) as two:
        list(two.map(range(3)))
        first = two.pids()
        list(two.map(range(3)))
        assert two.pids() == first
        two.close()
        assert two.pids() == ()
        check(list(two.map(range(3))), 3)


def test_jobs_are_taken_only_a_few_ahead() -> None:
    taken = []

    def jobs() -> Iterator[int]:
        for job in range(1000):
            taken.append(job)
            yield job

    with pool(square) as two:
        results = two.map(jobs())
        for _ in range(10):
            next(results)
        assert len(taken) <= 10 + workers.JOBS_AHEAD * 2 + 1
        results.close()
        check(list(two.map(range(5))), 5)


def test_an_exception_comes_out_where_its_result_would_have() -> None:
    with pool(fail_at_five) as two:
        results = two.map(range(10))
        assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
        with pytest.raises(ImageError, match="five"):
            next(results)
        assert list(two.map(range(3))) == [0, 1, 2]


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM])
def test_killed_workers_are_replaced_and_nothing_is_lost(kind: signal.Signals) -> None:
    with pool(square) as two:
        results = []
        for number, result in enumerate(two.map(range(80))):
            results.append(result)
            if number in (3, 20, 21, 60):
                os.kill(two.pids()[number % 2], kind)
        check(results, 80)


def test_all_workers_killed_between_epochs() -> None:
    with pool(square) as two:
        check(list(two.map(range(4))), 4)
        for pid in two.pids():
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.3)
        check(list(two.map(range(4))), 4)


def test_a_stopped_worker_is_noticed_within_ten_seconds() -> None:
    with pool(square) as two:
        results = two.map(range(30))
        got = [next(results)]
        for pid in two.pids():
            os.kill(pid, signal.SIGSTOP)
        start = time.monotonic()
        got += results
        assert time.monotonic() - start < 10 + 2, "ten seconds, and some to begin anew on a busy machine"
        check(got, 30)


def test_workers_that_keep_dying_are_given_up() -> None:
    with pool(die) as two, pytest.raises(DataError, match="workers died 4 times on the same batch"):
        list(two.map(range(3)))


def test_a_job_that_kills_its_worker_is_not_tried_for_ever() -> None:
    with pool(poison_at_five) as two:
        results = two.map(range(10))
        assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
        with pytest.raises(DataError, match="same batch"):
            next(results)
        assert list(two.map(range(3))) == [0, 1, 2]


@pytest.mark.parametrize("job", [0, 1])
def test_what_cannot_be_sent_is_an_error_and_not_a_wait(job: int) -> None:
    with pool(awkward) as two:
        with pytest.raises((TypeError, AttributeError)):
            next(two.map([job]))
        assert list(two.map([2, 3])) == [2, 3]


def test_errors_say_where_in_the_worker_they_come_from() -> None:
    with pool(fail_at_five) as two:
        with pytest.raises(ImageError) as caught:
            next(two.map([5]))
        assert "fail_at_five" in str(caught.value.__cause__)


def test_a_pool_that_is_closed_in_between_says_so() -> None:
    two = WorkerPool(square, 2)
    results = two.map(range(10))
    next(results)
    two.close()
    with pytest.raises(DataError, match="ended in the middle"):
        list(results)
    two.close()


def test_signals_are_left_to_the_parent() -> None:
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("term"))
    try:
        with pool(state) as two:
            interrupt, terminate, blocked, pid = next(two.map([0]))
            assert interrupt == signal.SIG_IGN
            assert terminate == signal.SIG_DFL
            assert not blocked
            os.kill(pid, signal.SIGINT)
            assert len(list(two.map(range(4)))) == 4
            assert pid in two.pids(), "Ctrl-C did not end it"
    finally:
        signal.signal(signal.SIGTERM, before)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
    assert seen == []


ORPHANS = """
import os, sys, time
from xception.data.workers import WorkerPool
def job(n):
    return n
if __name__ == "__main__":
    one, two = WorkerPool(job, 2), WorkerPool(job, 2)
    list(one.map(range(2))), list(two.map(range(2)))
    print(*one.pids(), *two.pids(), flush=True)
    time.sleep(60)
"""


def test_workers_do_not_outlive_a_parent_that_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 4
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while alive := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < deadline, f"still there: {alive}"
        time.sleep(0.1)


def is_alive(pid: int) -> bool:
    """Running, and not a zombie that nobody waits for."""
    try:
        with open(f"/proc/{pid}/stat") as status:
            return status.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


INTERRUPTED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests themselves run in the background
from xception.data.workers import WorkerPool
import time
def job(n):
    time.sleep(0.01)
    return n
if __name__ == "__main__":
    pool = WorkerPool(job, 2)
    print("ready", flush=True)
    try:
        for _ in range(100):
            for n in pool.map(range(100)):
                pass
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        pool.close()
"""


def test_an_interrupt_of_the_whole_group_is_the_parent_s_alone() -> None:
    """Ctrl-C goes to every process of the terminal: the parent hears it, the workers print no tracebacks."""
    parent = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n"
    time.sleep(0.5)
    os.killpg(parent.pid, signal.SIGINT)
    out, err = parent.communicate(timeout=30)
    assert (out, err, parent.returncode) == ("interrupted\n", "", 0)


def test_no_threads_are_left_behind() -> None:
    before = threading.active_count()
    for _ in range(3):
        with pool(square) as two:
            list(two.map(range(3)))
    assert threading.active_count() == before


def test_a_forgotten_pool_ends_its_workers() -> None:
    forgotten = WorkerPool(square, 2)
    list(forgotten.map(range(2)))
    pids = forgotten.pids()
    del forgotten
    deadline = time.monotonic() + 10
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
