"""Processes that run a function over a stream of jobs, in order, and survive the loss of any of them.

Why not torch's DataLoader: when one of its workers is killed, it raises from a signal handler wherever the main program
happens to be, say in the middle of an optimiser step; a worker that is stopped is never noticed; and its tensors travel
through /dev/shm, which containers keep small. Here a worker that dies or stops is noticed within ten seconds and
replaced, and the jobs it held are run again: since a job is a pure function of its description, nothing is lost,
repeated or changed.

Each worker has a pipe of its own, and a thread in the parent that sends it jobs and waits for its answers; nothing is
shared between workers, no lock or memory, so that none can leave the others waiting. (`ProcessPoolExecutor` shares both
and can wait forever after a kill.) Workers leave Ctrl-C to the parent, end with SIGTERM, and end by themselves when the
parent is gone, however it went.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import queue
import signal
import threading
import time
import traceback
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any, Generic, NamedTuple, TypeVar

from xception.errors import DataError

Job = TypeVar("Job")
Result = TypeVar("Result")

JOBS_AHEAD = 2
"""Jobs each worker has been given or has answered, beyond the one that is waited for."""
_MAX_ATTEMPTS = 4  # workers lost on one and the same job, before giving up
_POLL_SECONDS = 0.5
_BEAT_SECONDS = 0.5
_MAX_SILENT_POLLS = 16  # eight seconds of waiting without a sign of life from a worker that has a job


class _Answer(NamedTuple):
    """What a worker sends: the result of a job, or the exception that it raised and where."""

    ticket: int
    result: Any
    error: BaseException | None
    trace: str


_BEAT, _GONE = "beat", "gone"
_END = object()


class WorkerPool(Generic[Job, Result]):
    """`count` processes that apply `function` to jobs; started when first needed, ended by `close`.

    One thread at a time may use it.
    """

    def __init__(self, function: Callable[[Job], Result], count: int, start_method: str | None = None) -> None:
        self._function = function
        self._count = count
        self._context: Any = multiprocessing.get_context(start_method)  # by default the platform's
        self._tickets = itertools.count()
        self._jobs: dict[int, Job] = {}  # not answered yet
        self._attempts: dict[int, int] = {}
        self._queue: deque[int] = deque()  # not given to a worker yet
        self._answers: dict[int, _Answer] = {}
        self._workers: list[_Worker] = []
        self._inbox: queue.SimpleQueue[tuple[_Worker, Any]] = queue.SimpleQueue()
        self._last_poll = time.monotonic()
        weakref.finalize(self, _end, self._workers)

    def map(self, jobs: Iterable[Job]) -> Iterator[Result]:
        """Results in the order of `jobs`, which are taken a few ahead. An exception in `function` comes out here.

        Raises:
            DataError: One job loses worker after worker, as happens when memory runs out.
        """
        remaining = iter(jobs)
        order: deque[int] = deque()
        try:
            while True:
                for job in itertools.islice(remaining, 1 + JOBS_AHEAD * self._count - len(order)):
                    order.append(self._accept(job))
                if not order:
                    return
                answer = self._wait_for(order[0])
                order.popleft()
                if answer.error is not None:
                    raise answer.error from _Remote(answer.trace)
                yield answer.result
        finally:
            for ticket in order:
                self._forget(ticket)

    def pids(self) -> tuple[int, ...]:
        """Process ids of the workers."""
        return tuple(worker.process.pid for worker in self._workers)

    def close(self) -> None:
        """End the workers; the next `map` would start new ones."""
        _end(self._workers)
        for ticket in list(self._jobs):
            self._forget(ticket)

    def _accept(self, job: Job) -> int:
        ticket = next(self._tickets)
        self._jobs[ticket], self._attempts[ticket] = job, 0
        self._queue.append(ticket)
        self._hand_out()
        return ticket

    def _forget(self, ticket: int) -> None:
        self._jobs.pop(ticket, None)
        self._answers.pop(ticket, None)
        self._attempts.pop(ticket, None)
        if ticket in self._queue:
            self._queue.remove(ticket)

    def _hand_out(self) -> None:
        """Give waiting jobs to the workers with the least to do, starting those that are missing."""
        while self._queue:
            if len(self._workers) < self._count:
                worker = _Worker(self._context, self._function, self._inbox)
                self._workers.append(worker)
            else:
                worker = min(self._workers, key=lambda worker: len(worker.tickets))
                if len(worker.tickets) >= JOBS_AHEAD:
                    return
            ticket = self._queue.popleft()
            worker.give(ticket, self._jobs[ticket])

    def _wait_for(self, ticket: int) -> _Answer:
        while ticket not in self._answers:
            if ticket not in self._jobs:
                raise DataError("the data-loading workers were ended in the middle of an epoch")
            self._hand_out()
            self._listen()
        self._jobs.pop(ticket, None)
        self._attempts.pop(ticket, None)
        return self._answers.pop(ticket)

    def _listen(self) -> None:
        """Deal with one message, or with the lack of one."""
        try:
            worker, message = self._inbox.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            pass
        else:
            if worker in self._workers:
                worker.silent_polls = 0
                if message == _GONE:
                    self._replace(worker)
                elif isinstance(message, _Answer):
                    worker.tickets.popleft()
                    if message.ticket in self._jobs:
                        self._answers[message.ticket] = message
                    self._hand_out()
        if time.monotonic() - self._last_poll >= _POLL_SECONDS:
            # Counted in polls of ours, not in seconds: a suspended machine stops both sides alike.
            self._last_poll = time.monotonic()
            for worker in self._workers:
                worker.silent_polls += bool(worker.tickets)
                if worker.silent_polls >= _MAX_SILENT_POLLS:
                    _kill(worker.process.pid)  # its thread will say that it is gone

    def _replace(self, worker: _Worker) -> None:
        """Take back what a lost worker had been given; `_hand_out` starts another."""
        self._workers.remove(worker)
        _end([worker])
        held = [ticket for ticket in worker.tickets if ticket in self._jobs]
        self._queue.extendleft(reversed(held))
        if held:
            self._attempts[held[0]] += 1
            if self._attempts[held[0]] >= _MAX_ATTEMPTS:
                raise DataError(
                    f"data-loading workers died {_MAX_ATTEMPTS} times on the same batch; "
                    "if memory runs out, try fewer workers"
                )


class _Worker:
    """One process and the thread that talks to it."""

    def __init__(self, context: Any, function: Callable[[Any], Any], inbox: queue.SimpleQueue[Any]) -> None:
        self.tickets: deque[int] = deque()
        """Jobs given and not answered, in order."""
        self.silent_polls = 0
        self._todo: queue.SimpleQueue[tuple[int, Any] | None] = queue.SimpleQueue()
        ours, theirs = context.Pipe()
        self.process: Any = context.Process(target=_work, args=(function, theirs, ours), daemon=True)
        with _quiet_start():
            self.process.start()
        theirs.close()  # the worker's end is the worker's alone, so that its death closes it
        self._thread = threading.Thread(target=self._talk, args=(ours, inbox), daemon=True)
        self._thread.start()

    def give(self, ticket: int, job: Any) -> None:
        self.tickets.append(ticket)
        self._todo.put((ticket, job))

    def end(self) -> None:
        _kill(self.process.pid)  # it holds nothing that needs saving, and a stopped one would not hear a polite request
        self._todo.put(None)
        if self._thread is not threading.current_thread():  # which may be collecting garbage
            self._thread.join()
        self.process.join()
        self.process.close()

    def _talk(self, connection: Connection, inbox: queue.SimpleQueue[Any]) -> None:
        with connection:
            while (given := self._todo.get()) is not None:
                try:
                    connection.send(given)
                    while (message := connection.recv()) == _BEAT:
                        inbox.put((self, _BEAT))
                except (EOFError, OSError):
                    inbox.put((self, _GONE))
                    return
                except Exception as error:  # something that does not survive pickling
                    message = _Answer(given[0], None, error, "")
                inbox.put((self, message))


class _Remote(Exception):
    """Where in a worker an exception was raised."""

    def __str__(self) -> str:
        return f"in a data-loading worker:\n{self.args[0]}"


@contextlib.contextmanager
def _quiet_start() -> Iterator[None]:
    """Start a process that hears no Ctrl-C until it has arranged to ignore it."""
    with warnings.catch_warnings():
        # From Python 3.12 on; the workers are made for it: they run on one thread and take no locks of ours.
        warnings.filterwarnings("ignore", message=".*use of fork.*", category=DeprecationWarning)
        if not hasattr(signal, "pthread_sigmask"):
            yield
            return
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _kill(pid: int) -> None:
    with contextlib.suppress(OSError):
        os.kill(pid, getattr(signal, "SIGKILL", signal.SIGTERM))


def _end(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().end()


# ------------------------------------------------------------------------------------------------- inside the workers


def _work(function: Callable[[Any], Any], connection: Connection, parents_end: Connection) -> None:
    parents_end.close()  # forked with the rest; held open, the pipe would never say that the parent is gone
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the parent's handler, which would write checkpoints
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    lock, busy = threading.Lock(), threading.Event()
    threading.Thread(target=_beat, args=(connection, lock, busy), daemon=True).start()
    try:
        while True:
            ticket, job = connection.recv()
            busy.set()
            try:
                answer = _Answer(ticket, function(job), None, "")
            except Exception as error:
                answer = _Answer(ticket, None, error, traceback.format_exc())
            busy.clear()
            with lock:
                try:
                    connection.send(answer)
                except (EOFError, OSError):
                    raise
                except Exception as error:  # a result that cannot be pickled, of which nothing was sent
                    connection.send(_Answer(ticket, None, TypeError(str(error)), traceback.format_exc()))
    except (EOFError, OSError):
        os._exit(0)  # the parent is gone


def _beat(connection: Connection, lock: threading.Lock, busy: threading.Event) -> None:
    """Signs of life while there is a job, and an end when the parent is gone.

    Closed pipes would tell as well, but workers that were forked later hold copies of the parent's ends.
    """
    parent = os.getppid()
    while True:
        time.sleep(_BEAT_SECONDS)
        with lock:
            try:
                if busy.is_set():
                    connection.send(_BEAT)
            except OSError:
                os._exit(0)
        if os.getppid() != parent:
            os._exit(0)
