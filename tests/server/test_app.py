"""The protocol: what comes in, what goes out, and what happens when too much comes or somebody leaves."""

from __future__ import annotations

import asyncio
import gc
import json
import re
import socket
import threading
import time
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
import torch

from logitlab import __version__
from logitlab.reading import Reading
from logitlab.server import app as application
from logitlab.server import queue as queues
from logitlab.server.queue import Job, Queue
from logitlab.server.settings import Source
from tests.server.conftest import Shelf, settings
from tests.server.running import TOKEN, Running, events_of, running

READ: dict[str, Any] = {"do": "read", "model": "tiny", "prompt": {"text": "The capital of France is"}}
LONG: dict[str, Any] = {"do": "generate", "model": "slow", "prompt": {"text": "The capital"}, "new_tokens": 40}


def test_about(app: Running) -> None:
    app.result({"do": "load", "model": "tiny"})
    about = app.client.get("/api/about").json()
    assert about["version"] == __version__
    assert [model["name"] for model in about["models"]] == ["tiny", "other", "vit", "llava", "slow"]
    assert about["models"][0]["loaded"] is True
    assert about["lenses"] == ["tuned"]
    assert about["vectors"] == ["mood.safetensors"]
    assert about["limits"] == {
        "prompt_tokens": 48,
        "prompt_characters": 600,
        "new_tokens": 40,
        "waiting": 4,
        "upload_bytes": 200_000,
        "cells": 1000,
    }
    assert str(app.server.settings.models[0].place) not in json.dumps(about)


# -- bodies ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is not JSON"),
        (b"{'do': 1}", "the body is not JSON"),
        (b"[" * 50_000, "the body is not JSON: recursion limit exceeded"),
        (b"{}", "'do' must be one of load, read,"),
        (b'{"do": "load", "model": "tiny", "model_path": "/etc"}', "'model_path' is not known in this request"),
    ],
)
def test_bodies_that_do_not_fit(app: Running, body: bytes, message: str) -> None:
    answer = app.client.post("/api/run", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert list(answer.json()) == ["message"]
    assert answer.json()["message"].startswith(message)
    app.result(READ)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_other_kinds_of_bodies(app: Running, kind: str) -> None:
    answer = app.client.post("/api/run", content=json.dumps(READ), headers={"content-type": kind})
    assert (answer.status_code, answer.json()) == (415, {"message": "send JSON, as application/json"})


def request(app: Running, *headers: str) -> bytes:
    lines = [
        "POST /api/run HTTP/1.1",
        f"Host: 127.0.0.1:{app.port}",
        f"Authorization: Bearer {TOKEN}",
        "Content-Type: application/json",
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def test_bodies_that_are_too_large(app: Running) -> None:
    message = {"message": "the request is larger than the 200,000 bytes that this server takes"}
    honest = app.raw(request(app, "Content-Length: 200001", "Connection: close") + b"x")
    assert honest.startswith(b"HTTP/1.1 413")
    assert json.loads(honest.partition(b"\r\n\r\n")[2]) == message

    def parts() -> Any:
        for _ in range(40):
            yield b"x" * 10_000

    headers = {"content-type": "application/json"}
    chunked = app.client.post("/api/run", content=parts(), headers=headers)
    assert (chunked.status_code, chunked.json()) == (413, message)
    app.result(READ)


def test_a_body_that_lies_about_its_length(app: Running) -> None:
    body = json.dumps(READ).encode()
    short = app.raw(request(app, "Content-Length: 10", "Connection: close") + body)
    assert short.startswith(b"HTTP/1.1 422")  # what is beyond is not part of it
    assert app.raw(request(app, "Content-Length: 100000") + body, half=True) == b""  # it never came
    assert app.raw(request(app, "Content-Length: -1") + body).startswith(b"HTTP/1.1 400")
    assert app.raw(request(app, "Content-Length: 1", "Content-Length: 2") + body).startswith(b"HTTP/1.1 400")
    app.idle()
    assert app.server._bodies == 0
    app.result(READ)


def test_a_body_that_does_not_come(app: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(application, "UPLOAD_SECONDS", 0.1)
    answer = app.raw(request(app, "Content-Length: 100", "Connection: close") + b"{")
    assert answer.startswith(b"HTTP/1.1 408")
    assert app.server._bodies == 0


def test_bodies_that_come_slowly_hold_no_places(app: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(application, "BODIES", 6)
    slow = [socket.create_connection(("127.0.0.1", app.port), timeout=20) for _ in range(6)]
    try:
        for n, there in enumerate(slow):
            there.sendall(request(app, "Content-Length: 100") + b"{")
            if n == 4:  # five of them are more than may wait
                until = time.monotonic() + 10
                while app.server._bodies < 5:
                    assert time.monotonic() < until
                    time.sleep(0.005)
                app.result(READ)
        while app.server._bodies < 6:
            assert time.monotonic() < until
            time.sleep(0.005)
        answer = app.post(READ)
        assert answer.status_code == 503
        assert answer.json() == {"message": "the server is busy: 6 requests are coming in; try again"}
        assert int(answer.headers["retry-after"]) >= 1
    finally:
        for there in slow:
            there.close()
    until = time.monotonic() + 10
    while app.server._bodies:
        assert time.monotonic() < until
        time.sleep(0.005)
    app.result(READ)


# -- streams -----------------------------------------------------------------------------------------


def test_a_long_silence_is_filled(app: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(application, "KEEP_ALIVE", 0.02)
    text = app.post(LONG | {"new_tokens": 5}).text
    assert text.count(": still here\n\n") >= 3
    assert [name for name, _ in events_of(text)][-1] == "result"


def test_steps_come_as_they_are_made(app: Running) -> None:
    times: list[float] = []
    with app.stream(LONG | {"new_tokens": 8}) as lines:
        for line in lines:
            if line == "event: step":
                times.append(time.monotonic())
    assert len(times) == 8
    assert times[-1] - times[0] > 0.1  # not all at once at the end


def test_cancelling(app: Running) -> None:
    begun = time.monotonic()
    with app.stream(LONG) as lines:
        events: list[str] = []
        for line in lines:
            events.append(line)
            if line == "event: step" and events.count(line) == 2:
                queued = next(json.loads(e[6:]) for e in events if e.startswith("data: "))
                answer = app.client.post(f"/api/cancel/{queued['id']}")
                assert answer.json() == {"cancelled": queued["id"]}
    name, data = events_of("\n".join(events))[-1]
    assert (name, data) == ("error", {"message": "cancelled", "kind": "cancelled"})
    assert events.count("event: step") < 20
    app.idle()
    assert time.monotonic() - begun < 2
    assert app.client.post(f"/api/cancel/{queued['id']}").status_code == 404
    assert app.client.post("/api/cancel/..%2f..").status_code == 404
    app.result(READ)


def test_cancelling_what_waits(app: Running) -> None:
    with app.stream(LONG) as first:
        next(line for line in first if line == "event: started")
        with app.stream(READ) as second:
            queued = next(json.loads(line[6:]) for line in second if line.startswith("data: "))
            assert queued["waiting"] == 1
            app.client.post(f"/api/cancel/{queued['id']}")
            assert [line for line in second if line.startswith("event")] == ["event: error"]
        assert app.server.queue._running is not None
    app.idle()


def test_a_client_that_leaves_while_it_waits_frees_its_place(app: Running) -> None:
    with app.stream(LONG) as first:
        next(line for line in first if line == "event: started")
        at_work = app.server.queue._running
        assert at_work is not None
        with ExitStack() as stack:
            waiting = [stack.enter_context(app.stream(READ)) for _ in range(4)]
            for lines in waiting:
                next(line for line in lines if line == "event: queued")
            assert app.post(READ).status_code == 503
        while app.server.queue._waiting:
            assert app.server.queue._running is at_work  # all the while
            time.sleep(0.005)
        with app.stream(READ) as lines:
            assert next(line for line in lines if line == "event: queued")
        assert not at_work.over
    app.idle()


PATCH: dict[str, Any] = {
    "do": "patch_all",
    "model": "slow",
    "prompt": {"text": "The capital of France is a sea"},
    "source": {"text": "The capital of Japan was a sea"},
    "answers": ["id:5"],
    "sites": ["head_out", "mlp_out", "attn_out"],
}


@pytest.mark.parametrize(
    "asked", [LONG | {"new_tokens": 20}, PATCH, READ | {"model": "slow"}], ids=["generate", "patch_all", "read"]
)
def test_a_client_that_leaves_ends_its_work(app: Running, shelf: Shelf, asked: dict[str, Any]) -> None:
    passes: list[float] = []
    module: Any = shelf.models["slow"].module
    hook = module.model.layers[-1].register_forward_pre_hook(lambda *_: passes.append(time.monotonic()))
    try:
        app.result(asked)
        app.idle()
        whole = len(passes)
        passes.clear()
        with app.stream(asked) as lines:
            next(line for line in lines if line == "event: started")
        app.idle()
        count = len(passes)
        time.sleep(0.1)
        assert len(passes) == count
        assert count < whole or asked["do"] == "read"  # a short prompt is one pass
        app.result(READ)
    finally:
        hook.remove()


def test_many_that_leave_leave_nothing_behind(app: Running) -> None:
    def left() -> tuple[int, int]:
        things = [type(thing) for thing in gc.get_objects()]
        return things.count(Reading), things.count(torch.Tensor)

    def leave() -> None:
        with app.stream(LONG) as lines:
            next(line for line in lines if line == "event: step")
        app.error(READ | {"sites": ["nonsense"]})
        app.result(READ)
        app.idle()

    leave()
    gc.collect()
    gc.disable()  # so that nothing is freed but by itself
    try:
        before, threads = left(), threading.active_count()
        for _ in range(5):
            leave()
        assert left() == before
        assert threading.active_count() <= threads + 1  # the pool that parses bodies may have grown
    finally:
        gc.enable()


def test_a_reader_that_takes_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(application, "STALLED_SECONDS", 0.1)
    queue, sizes, over = Queue(1), [], threading.Event()

    def work(job: Job) -> dict[str, Any]:
        job.tell("step", {"text": "x" * 300_000})
        try:
            while True:
                job.tell("progress", {})
                time.sleep(0.005)
        finally:
            over.set()

    async def send(message: Any) -> None:
        sizes.append(len(message.get("body", b"")))
        if len(sizes) > 4:
            await asyncio.sleep(60)

    async def receive() -> Any:
        await asyncio.sleep(60)

    async def talk() -> float:
        answer = application._Events(queue, work)
        begun = time.monotonic()
        await answer({}, receive, send)
        return time.monotonic() - begun

    assert asyncio.run(talk()) < 5
    assert over.wait(5)
    assert len(sizes) == 5
    assert max(sizes) == application.PIECE
    assert queue.close(5)


def test_work_waits_for_a_reader_that_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(application, "PENDING", 200_000)
    queue, told, sent = Queue(1), [], bytearray()
    text = "x" * 50_000

    def work(job: Job) -> dict[str, Any]:
        for n in range(40):
            job.wait()
            job.tell("step", {"n": n, "text": text})
            told.append(n)
        return {"n": len(told)}

    async def talk() -> int:
        takes = asyncio.Event()
        most = 0

        async def send(message: Any) -> None:
            await takes.wait()
            sent.extend(message.get("body", b""))

        async def receive() -> Any:
            await asyncio.sleep(60)

        answer = application._Events(queue, work)
        done = asyncio.create_task(answer({}, receive, send))
        for _ in range(30):
            await asyncio.sleep(0.01)
            most = max(most, len(told))
        takes.set()
        await done
        assert answer._pending == 0
        return most

    assert asyncio.run(talk()) <= 5  # two megabytes would be waiting
    events = events_of(sent.decode())
    assert [data["n"] for name, data in events if name == "step"] == list(range(40))
    assert events[-1] == ("result", {"n": 40})
    assert queue.close(5)


def test_what_is_written_waits_for_its_reader(app: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(application, "PENDING", 0)  # as if nobody took anything
    monkeypatch.setattr(queues, "SLOW_SECONDS", 0.1)
    events = app.events(LONG | {"model": "tiny"})
    assert "step" not in [name for name, _ in events]
    assert events[-1][1] == {"message": "cancelled", "kind": "cancelled"}
    monkeypatch.undo()
    app.result(READ)


def test_a_result_that_cannot_be_sent_is_an_error(
    app: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(application, "do", lambda *_: {"notes": [], "what": {1, 2}})
    _, error = app.events(READ)[-1]
    assert error == {"message": "the server failed; its terminal says why", "kind": "internal"}
    assert "not JSON serializable" in caplog.text
    monkeypatch.undo()
    app.result(READ)


# -- many at once ------------------------------------------------------------------------------------


def test_a_hundred_at_once(shelf: Shelf) -> None:
    with running(settings(shelf)) as app:
        app.result(READ)

        async def all_of_them() -> list[httpx.Response]:
            limits = httpx.Limits(max_connections=100)
            headers = {"authorization": f"Bearer {TOKEN}"}
            base = f"http://127.0.0.1:{app.port}"
            async with httpx.AsyncClient(base_url=base, headers=headers, limits=limits, timeout=60) as client:
                slow = READ | {"model": "slow"}
                return await asyncio.gather(*(client.post("/api/run", json=slow) for _ in range(100)))

        answers = asyncio.run(all_of_them())
        good = [answer for answer in answers if answer.status_code == 200]
        busy = [answer for answer in answers if answer.status_code == 503]
        assert len(good) + len(busy) == 100
        assert len(good) >= 5  # one at work, four that wait
        assert len(busy) >= 20
        assert len({events_of(answer.text)[-1][0] for answer in good}) == 1
        grids = [json.dumps(events_of(answer.text)[-1][1]["grids"][0]["data"]["prompts"]) for answer in good]
        assert len(set(grids)) == 1
        for answer in busy:
            message = answer.json()["message"]
            assert re.fullmatch(r"the server is busy: \d+ requests (wait|are coming in); try again", message)
            assert int(answer.headers["retry-after"]) >= 1
        app.result(READ)
        assert app.server._bodies == 0


# -- models ------------------------------------------------------------------------------------------


def test_models_are_loaded_when_they_are_asked_for_and_make_room(shelf: Shelf) -> None:
    loads: list[str] = []

    def load(place: str, say: Any) -> Any:
        loads.append(place)
        say("reading the files")
        return shelf.models[place]

    models = tuple(Source(name, name, False) for name in ("tiny", "other", "slow"))
    with running(settings(shelf, models=models, load=load, kept=2, lenses=(), vectors=())) as app:
        app.server.preload()
        first = app.events(READ)
        assert loads == ["tiny"]
        assert not [data for name, data in first if name == "progress" and "loading" in data["what"]]
        events = app.events(READ | {"do": "compare", "other": {"model": "other"}})
        said = [data["what"] for name, data in events if name == "progress"]
        assert [what for what in said if "reading" not in what] == ["loading other"]
        app.result(READ)
        app.result(READ | {"model": "slow"})  # "other" was used longest ago
        assert loads == ["tiny", "other", "slow"]
        about = app.client.get("/api/about").json()["models"]
        assert [(m["name"], m["loaded"]) for m in about] == [("tiny", True), ("other", False), ("slow", True)]
        app.result(READ | {"model": "other"})
        assert loads == ["tiny", "other", "slow", "other"]


def test_loading_goes_on_when_nobody_listens(shelf: Shelf, caplog: pytest.LogCaptureFixture) -> None:
    begun, left = threading.Event(), threading.Event()

    def load(place: str, say: Any) -> Any:
        begun.set()
        assert left.wait(10)
        say("reading the files")
        return shelf.models["tiny"]

    with running(settings(shelf, load=load, lenses=(), vectors=())) as app:
        with app.stream(READ):
            assert begun.wait(10)
        until = time.monotonic() + 10
        while not app.server.queue._running.over:  # pyright: ignore[reportOptionalMemberAccess]
            assert time.monotonic() < until
            time.sleep(0.005)
        left.set()
        app.idle()
        assert app.client.get("/api/about").json()["models"][0] == {"name": "tiny", "loaded": True}
        assert "cannot be loaded" not in caplog.text


def test_what_the_loader_says_of_folders_is_not_told(shelf: Shelf, caplog: pytest.LogCaptureFixture) -> None:
    import logging

    from logitlab.cli.options import Placed
    from logitlab.cli.options import load as of_command
    from logitlab.models import load as loading

    def load(place: str, say: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:

            def slowly(name: str, **options: Any) -> Any:
                log = logging.getLogger("logitlab")
                log.info("looking into /root/secret")
                log.info("converting %s to safetensors (once; kept in %s)", name, "/root/secret/cache")
                log.info("converting more of /root/secret")
                return shelf.models["tiny"]

            patch.setattr(loading, "load", slowly)
            return of_command(place, "auto", Placed(None, None, None, None), None, False, False, say)

    caplog.set_level(logging.INFO)
    with running(settings(shelf, load=load, lenses=(), vectors=())) as app:
        events = app.events(READ)
    said = [data["what"] for name, data in events if name == "progress" and data["total"] == 0]
    assert said == ["loading tiny", "converting tiny"]
    assert "secret" not in json.dumps(events)
    assert "converting tiny" in [record.message for record in caplog.records if record.name == "logitlab.server"]


def test_a_model_that_cannot_be_loaded_is_told_without_its_place(
    shelf: Shelf, caplog: pytest.LogCaptureFixture, tmp_path: Any
) -> None:
    from logitlab.server.settings import _load, named

    broken = tmp_path / "broken"
    broken.mkdir()
    with running(settings(shelf, models=named([str(broken)]), load=_load, lenses=(), vectors=())) as app:
        app.server.preload()
        message = app.error(READ | {"model": "broken"})
        assert message == "broken cannot be loaded; the server's terminal says why"
        assert f"{broken} is not a model folder" in caplog.text
        assert str(tmp_path) not in json.dumps(app.client.get("/api/about").json())
