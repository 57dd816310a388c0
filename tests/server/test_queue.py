"""One worker: order, places, cancelling, and what becomes of errors."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from logitlab.errors import InputError, ModelError
from logitlab.server import queue as queues
from logitlab.server.queue import BusyError, CancelledWorkError, Job, Queue


class Told:
    """Events of one job."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.ended = threading.Event()

    def __call__(self, name: str, data: dict[str, Any]) -> None:
        self.events.append((name, data))
        if name in ("result", "error"):
            self.ended.set()

    @property
    def last(self) -> tuple[str, dict[str, Any]]:
        assert self.ended.wait(10)
        return self.events[-1]

    @property
    def waiting(self) -> list[int]:
        return [data["waiting"] for name, data in self.events if name == "queued"]


class Gate:
    """Work that waits until it is let through."""

    def __init__(self) -> None:
        self.begun, self.open = threading.Event(), threading.Event()

    def __call__(self, job: Job) -> dict[str, Any]:
        self.begun.set()
        while not self.open.wait(0.005):
            job.check()
        return {"done": True}


@pytest.fixture
def queue() -> Iterator[Queue]:
    made = Queue(2)
    yield made
    assert made.close(5)


def test_jobs_are_done_in_order(queue: Queue) -> None:
    gate, first, second, third = Gate(), Told(), Told(), Told()
    queue.submit(gate, first)
    assert gate.begun.wait(5)
    done: list[int] = []
    queue.submit(lambda job: {"n": done.append(2)}, second)
    queue.submit(lambda job: {"n": done.append(3)}, third)
    assert (first.waiting, second.waiting, third.waiting) == ([0], [1], [2])
    gate.open.set()
    assert [told.last[0] for told in (first, second, third)] == ["result"] * 3
    assert done == [2, 3]
    assert [name for name, _ in first.events] == ["queued", "started", "result"]
    assert third.waiting == [2, 1]  # it is told as it moves up


def test_only_so_many_wait(queue: Queue) -> None:
    gate = Gate()
    first, held = Told(), [Told(), Told()]
    queue.submit(gate, first)
    assert gate.begun.wait(5)
    for told in held:
        queue.submit(gate, told)
    with pytest.raises(BusyError, match="the server is busy: 2 requests wait; try again"):
        queue.submit(gate, Told())
    gate.open.set()
    assert [told.last[0] for told in (first, *held)] == ["result"] * 3
    again = Told()
    queue.submit(lambda job: {}, again)
    assert again.last[0] == "result"


def test_what_leaves_while_it_waits_frees_its_place_and_what_it_holds(queue: Queue) -> None:
    gate, first, second, third = Gate(), Told(), Told(), Told()
    running = queue.submit(gate, first)
    assert gate.begun.wait(5)
    body = Gate()
    held = weakref.ref(body)
    leaves = queue.submit(body, second)
    queue.submit(lambda job: {}, third)
    del body
    with pytest.raises(BusyError):
        queue.check()
    assert queue.leave(leaves)
    assert not queue.leave(leaves)
    assert held() is None  # while the job itself is still there
    assert second.last == ("error", {"message": "cancelled", "kind": "cancelled"})
    assert third.waiting == [2, 1]
    queue.check()
    assert not running.over
    gate.open.set()
    assert third.last[0] == "result"


def test_closing_and_cancelling_free_what_waits(queue: Queue) -> None:
    gate = Gate()
    queue.submit(gate, Told())
    assert gate.begun.wait(5)
    bodies = [Gate(), Gate()]
    held = [weakref.ref(body) for body in bodies]
    jobs = [queue.submit(body, Told()) for body in bodies]
    bodies.clear()
    assert queue.cancel(jobs[0].id)
    assert held[0]() is None
    assert queue.close(5)
    assert held[1]() is None


def test_a_last_event_that_cannot_be_told_becomes_an_error(queue: Queue, caplog: pytest.LogCaptureFixture) -> None:
    class Picky(Told):
        def __call__(self, name: str, data: dict[str, Any]) -> None:
            if name == "result":
                raise UnicodeEncodeError("utf-8", "x", 0, 1, "surrogates not allowed")
            super().__call__(name, data)

    told, after = Picky(), Told()
    queue.submit(lambda job: {"n": 1}, told)
    queue.submit(lambda job: {"still": "there"}, after)
    assert told.last == ("error", {"message": "the server failed; its terminal says why", "kind": "internal"})
    assert after.last == ("result", {"still": "there"})
    assert "surrogates not allowed" in caplog.text


def test_a_job_whose_end_cannot_be_told_does_not_end_the_worker(queue: Queue, caplog: pytest.LogCaptureFixture) -> None:
    def fails(name: str, data: dict[str, Any]) -> None:
        if name in ("result", "error"):
            raise MemoryError

    after = Told()
    queue.submit(lambda job: {}, fails)
    queue.submit(lambda job: {"still": "there"}, after)
    assert after.last == ("result", {"still": "there"})
    assert "a request was left without an end" in caplog.text


def test_work_waits_for_room(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    free, told, waits = threading.Event(), Told(), threading.Event()

    def work(job: Job) -> dict[str, Any]:
        waits.set()
        job.wait()
        return {"went": "on"}

    queue.submit(work, told, free.is_set)
    assert waits.wait(5)
    time.sleep(0.1)
    assert not told.ended.is_set()
    free.set()
    assert told.last == ("result", {"went": "on"})
    free.clear()
    again = Told()
    job = queue.submit(work, again, free.is_set)
    waits.clear()
    assert waits.wait(5)
    assert queue.cancel(job.id)  # which ends the waiting too
    after = Told()
    queue.submit(lambda job: {}, after)
    assert after.last[0] == "result"
    monkeypatch.setattr(queues, "SLOW_SECONDS", 0.05)
    never = Told()
    queue.submit(work, never, free.is_set)
    assert never.last == ("error", {"message": "cancelled", "kind": "cancelled"})


def test_cancelling_what_is_at_work_and_what_waits(queue: Queue) -> None:
    gate, first, second, third = Gate(), Told(), Told(), Told()
    running = queue.submit(gate, first)
    assert gate.begun.wait(5)
    waiting = queue.submit(gate, second)
    queue.submit(lambda job: {}, third)
    assert queue.cancel(waiting.id)
    assert second.last == ("error", {"message": "cancelled", "kind": "cancelled"})
    assert third.waiting == [2, 1]
    assert queue.cancel(running.id)
    assert first.last == ("error", {"message": "cancelled", "kind": "cancelled"})
    assert third.last[0] == "result"
    assert not queue.cancel(running.id)
    assert not queue.cancel("")


def test_after_the_end_nothing_is_told(queue: Queue) -> None:
    told, jobs = Told(), []

    def work(job: Job) -> dict[str, Any]:
        jobs.append(job)
        job.tell("progress", {"done": 1})
        queue.cancel(job.id)
        with pytest.raises(CancelledWorkError):
            job.tell("progress", {"done": 2})
        with pytest.raises(CancelledWorkError):
            job.check()
        return {}

    queue.submit(work, told)
    assert told.last == ("error", {"message": "cancelled", "kind": "cancelled"})
    assert [name for name, _ in told.events] == ["queued", "started", "progress", "error"]
    assert not jobs[0].end("input", "again")


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (InputError("a\n  b"), "input", "a b"),
        (ModelError("not finite"), "input", "not finite"),
        (RuntimeError("at /root/secret"), "internal", "the server failed; its terminal says why"),
        (MemoryError(), "internal", "the server failed; its terminal says why"),
        (SystemExit(1), "internal", "the server failed; its terminal says why"),
        (CancelledWorkError(), "cancelled", "cancelled"),
    ],
)
def test_errors(queue: Queue, caplog: pytest.LogCaptureFixture, error: BaseException, kind: str, message: str) -> None:
    def fails(job: Job) -> dict[str, Any]:
        raise error

    told, after = Told(), Told()
    queue.submit(fails, told)
    queue.submit(lambda job: {"still": "there"}, after)
    assert told.last == ("error", {"message": message, "kind": kind})
    assert after.last == ("result", {"still": "there"})
    assert ("a request failed" in caplog.text) == (kind == "internal")


def test_closing_ends_all(queue: Queue) -> None:
    gate, first, second = Gate(), Told(), Told()
    queue.submit(gate, first)
    assert gate.begun.wait(5)
    queue.submit(gate, second)
    begun = time.monotonic()
    assert queue.close(5)
    assert time.monotonic() - begun < 2
    ending = ("error", {"message": "the server is stopping", "kind": "cancelled"})
    assert (first.last, second.last) == (ending, ending)
    with pytest.raises(BusyError, match="the server is stopping"):
        queue.submit(gate, Told())


def test_closing_does_not_wait_for_what_cannot_be_interrupted() -> None:
    queue, started, release, told = Queue(1), threading.Event(), threading.Event(), Told()

    def stubborn(job: Job) -> dict[str, Any]:
        started.set()
        release.wait(10)
        return {}

    queue.submit(stubborn, told)
    assert started.wait(5)
    begun = time.monotonic()
    assert not queue.close(0.05)
    assert time.monotonic() - begun < 1
    assert told.last[0] == "error"
    release.set()
    assert queue.close(5)
