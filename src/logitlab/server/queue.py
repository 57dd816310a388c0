"""One worker in front of the models: a bounded number of requests wait for it, in order."""

from __future__ import annotations

import gc
import logging
import secrets
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from logitlab.errors import InputError, LogitlabError
from logitlab.server.security import FAILED

Tell = Callable[[str, dict[str, Any]], None]
"""What events are told to: a name, and plain values."""

_LOG = logging.getLogger("logitlab.server")


class BusyError(LogitlabError):
    """As many requests wait as may."""


class CancelledWorkError(Exception):
    """Nobody wants the result any more."""


class Job:
    """One piece of work.

    Attributes:
        id: what it is called by whoever wants to cancel it.
        over: whether its last event was told.
    """

    def __init__(self, work: Work, tell: Tell) -> None:
        self.id = secrets.token_hex(8)
        self.over = False
        self.work: Work | None = work
        self.ahead: int | None = None
        self._tell = tell
        self._lock = threading.Lock()

    def tell(self, name: str, data: dict[str, Any]) -> None:
        """Tell an event; after a result or an error nothing more is told.

        Raises:
            CancelledWorkError: it is over.
        """
        with self._lock:
            if self.over:
                raise CancelledWorkError
            self.over = name in ("result", "error")
            self._tell(name, data)

    def check(self) -> None:
        """Raise `CancelledWorkError` if nobody wants the result any more."""
        if self.over:
            raise CancelledWorkError

    def end(self, kind: str, message: str) -> bool:
        """End with an error, if it has not ended yet; says whether this was the end."""
        try:
            self.tell("error", {"message": message, "kind": kind})
        except CancelledWorkError:
            return False
        return True


Work = Callable[[Job], dict[str, Any]]
"""What a job does: it tells of events, looks whether it is still wanted (`Job.check`), and gives the result."""


class Queue:
    """Jobs, and the thread that works on them.

    Args:
        most: jobs that may wait while another one is worked on.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._reserved = 0
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="logitlab-worker", daemon=True)
        self._thread.start()

    def reserve(self) -> Place:
        """A place in the queue, before it is known what for; it has to be left.

        Raises:
            BusyError: there is none.
        """
        with self._changed:
            taken = len(self._waiting) + self._reserved
            # A job can begin at once where none is running: then one more may come in.
            if self._closed or taken >= self.most + (self._running is None):
                raise BusyError(f"the server is busy: {taken} requests wait; try again")
            self._reserved += 1
        return Place(self)

    def submit(self, work: Work, tell: Tell) -> Job:
        """Put work into the queue.

        Args:
            work: what is to be done.
            tell: what events are told to, from any thread; it must not wait.

        Raises:
            BusyError: as many wait as may.
        """
        with self.reserve() as place:
            return place.submit(work, tell)

    def cancel(self, identity: str) -> bool:
        """End a job; says whether there was one that had not ended."""
        with self._changed:
            jobs = [*self._waiting, *([self._running] if self._running else [])]
            job = next((j for j in jobs if j.id == identity), None)
            if job is None:
                return False
            if job in self._waiting:
                self._waiting.remove(job)
                self._moved_up()
        return job.end("cancelled", "cancelled")

    def close(self, wait: float = 0.0) -> bool:
        """End all jobs and take no more; says whether the worker has stopped within ``wait`` seconds."""
        with self._changed:
            self._closed = True
            jobs = [*self._waiting, *([self._running] if self._running else [])]
            self._waiting.clear()
            self._changed.notify_all()
        for job in jobs:
            job.end("cancelled", "the server is stopping")
        self._thread.join(wait)
        return not self._thread.is_alive()

    def _moved_up(self) -> None:
        """Tell waiting jobs how many are before them; called with the lock held."""
        for place, job in enumerate(self._waiting):
            ahead = place + (self._running is not None)
            if job.ahead != ahead:
                job.ahead = ahead
                with suppress(CancelledWorkError):
                    job.tell("queued", {"id": job.id, "waiting": ahead})

    def _put(self, job: Job) -> None:
        with self._changed:
            self._reserved -= 1
            if self._closed:
                job.end("busy", "the server is stopping")
                return
            self._waiting.append(job)
            self._moved_up()
            self._changed.notify()

    def _left(self) -> None:
        with self._changed:
            self._reserved -= 1

    # -- the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                self._running = None
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                job = self._running = self._waiting.popleft()
                self._moved_up()
            _do(job)
            del job


class Place:
    """A place in the queue; leaving the ``with`` block without `submit` gives it back."""

    def __init__(self, queue: Queue) -> None:
        self._queue: Queue | None = queue

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._queue is not None:
            self._queue._left()
            self._queue = None

    def submit(self, work: Work, tell: Tell) -> Job:
        """See `Queue.submit`."""
        assert self._queue is not None
        job = Job(work, tell)
        queue, self._queue = self._queue, None
        queue._put(job)
        return job


def _do(job: Job) -> None:
    """Do one job, whatever comes of it."""
    work, job.work = job.work, None
    assert work is not None
    try:
        job.tell("started", {})
        job.tell("result", work(job))
        return
    except CancelledWorkError:
        job.end("cancelled", "cancelled")
        return
    except InputError as error:
        job.end("input", " ".join(str(error).split()))
        return
    except LogitlabError as error:
        job.end("input", " ".join(str(error).split()))
    except Exception:
        _LOG.exception("a request failed")
        job.end("internal", FAILED)
    del work
    gc.collect()  # what such errors leave behind can hold much memory, and can be why there was none
