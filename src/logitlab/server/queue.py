"""One worker in front of the models: a bounded number of requests wait for it, in order."""

from __future__ import annotations

import gc
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from logitlab.errors import InputError, LogitlabError
from logitlab.server.settings import FAILED

Tell = Callable[[str, dict[str, Any]], None]
"""What events are told to: a name, and plain values."""

Room = Callable[[], bool]
"""Whether what was told before is taken, so that more may be told."""

SLOW_SECONDS = 60.0
"""How long a job waits for its events to be taken."""

LOOK = 0.02
"""Seconds after which a job that waits looks again."""

_LOG = logging.getLogger("logitlab.server")


class BusyError(LogitlabError):
    """As many requests wait as may."""


class CancelledWorkError(Exception):
    """Nobody wants the result any more."""


class Job:
    """One piece of work.

    Args:
        work: what is to be done.
        tell: what events are told to.
        room: says whether there is room for more events.

    Attributes:
        id: what it is called by whoever wants to cancel it.
        over: whether its last event was told.
        work: what is to be done, until it begins.
        room: see above.
    """

    def __init__(self, work: Work, tell: Tell, room: Room = lambda: True) -> None:
        self.id = secrets.token_hex(8)
        self.over = False
        self.work: Work | None = work
        self.ahead: int | None = None
        self.room = room
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
            self._tell(name, data)  # if this fails it is not over: another event has to say so
            self.over = name in ("result", "error")

    def check(self) -> None:
        """Raise `CancelledWorkError` if nobody wants the result any more."""
        if self.over:
            raise CancelledWorkError

    def wait(self) -> None:
        """Wait until there is room for another large event.

        Raises:
            CancelledWorkError: nobody wants the result any more, or nobody has taken the events for too long.
        """
        until = time.monotonic() + SLOW_SECONDS
        while not self.room():
            self.check()
            if time.monotonic() > until:
                raise CancelledWorkError
            time.sleep(LOOK)

    def end(self, kind: str, message: str) -> bool:
        """End with an error, if it has not ended yet; says whether this was the end."""
        try:
            self.tell("error", {"message": message, "kind": kind})
        except CancelledWorkError:
            return False
        return True

    def drop(self) -> None:
        """Forget what was to be done, and all that it holds: it will not begin."""
        self.work = None


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
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="logitlab-worker", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """See whether work would be taken now.

        Raises:
            BusyError: as many wait as may.
        """
        with self._changed:
            self._check()

    def submit(self, work: Work, tell: Tell, room: Room = lambda: True) -> Job:
        """Put work into the queue.

        Args:
            work: what is to be done.
            tell: what events are told to, from any thread; it must not wait.
            room: says whether there is room for more events; work that tells large ones waits for it (`Job.wait`).

        Raises:
            BusyError: as many wait as may.
        """
        job = Job(work, tell, room)
        with self._changed:
            self._check()
            self._waiting.append(job)
            self._moved_up()
            self._changed.notify()
        return job

    def leave(self, job: Job) -> bool:
        """End a job that nobody wants any more, and free its place; says whether it had not ended."""
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
                job.drop()
                self._moved_up()
        return job.end("cancelled", "cancelled")

    def cancel(self, identity: str) -> bool:
        """End a job; says whether there was one that had not ended."""
        with self._changed:
            jobs = [*self._waiting, *([self._running] if self._running else [])]
            job = next((j for j in jobs if j.id == identity), None)
        return job is not None and self.leave(job)

    def close(self, wait: float = 0.0) -> bool:
        """End all jobs and take no more; says whether the worker has stopped within ``wait`` seconds."""
        with self._changed:
            self._closed = True
            jobs = [*self._waiting, *([self._running] if self._running else [])]
            for job in self._waiting:
                job.drop()
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

    def _check(self) -> None:
        """Raise `BusyError` if no more may wait; called with the lock held."""
        if self._closed:
            raise BusyError("the server is stopping")
        # A job can begin at once where none is running: then one more may come in.
        if len(self._waiting) >= self.most + (self._running is None):
            raise BusyError(f"the server is busy: {len(self._waiting)} requests wait; try again")

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
            try:
                _do(job)
            except Exception:  # its end could not be told: the next one shall be done all the same
                _LOG.exception("a request was left without an end")
            del job


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
    except BaseException:  # also SystemExit, which a model's own code may raise: the worker goes on
        _LOG.exception("a request failed")
        job.end("internal", FAILED)
    del work
    gc.collect()  # what such errors leave behind can hold much memory, and can be why there was none
