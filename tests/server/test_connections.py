"""Connections: how many, and how long they may be silent."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import time
from collections.abc import Generator
from contextlib import suppress
from typing import Any

import pytest

from logitlab.server import connections, serve
from logitlab.server.connections import quiet
from tests.server.conftest import Shelf, settings
from tests.server.running import TOKEN, Running, running

ABOUT = f"GET /api/about HTTP/1.1\r\nHost: 127.0.0.1:{{}}\r\nAuthorization: Bearer {TOKEN}\r\n\r\n"


@pytest.fixture
def short(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> Generator[Running]:
    """A server that waits for headers for an instant, and takes few connections."""
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.3)
    monkeypatch.setattr(serve, "CONNECTIONS", 2)  # six, with the four that may wait
    with running(settings(shelf, lenses=(), vectors=())) as it:
        yield it


def connected(app: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", app.port), timeout=10)


def until_closed(there: socket.socket) -> float:
    begun = time.monotonic()
    try:
        while there.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return time.monotonic() - begun


def answered(there: socket.socket) -> bytes:
    """One whole answer that is JSON."""
    found = b""
    while not found.rstrip().endswith(b"}"):
        part = there.recv(65536)
        assert part, found
        found += part
    return found


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: x\r\n", b"G"])
def test_headers_that_do_not_come(short: Running, sent: bytes) -> None:
    with connected(short) as there:
        there.sendall(sent)
        assert until_closed(there) < 3
    assert short.client.get("/api/about").status_code == 200


def test_headers_that_come_drop_by_drop_have_no_more_time(short: Running) -> None:
    with connected(short) as there:
        begun = time.monotonic()
        with suppress(OSError):
            while time.monotonic() - begun < 5:
                there.sendall(b"G")
                time.sleep(0.02)
        assert time.monotonic() - begun < 3


def test_the_second_request_of_a_connection_has_as_much_time(short: Running) -> None:
    with connected(short) as there:
        there.sendall(ABOUT.format(short.port).encode())
        assert answered(there).startswith(b"HTTP/1.1 200")
        time.sleep(0.5)  # nothing has begun, so no time runs but that of an idle connection
        there.sendall(ABOUT.format(short.port).encode())
        assert answered(there).startswith(b"HTTP/1.1 200")
        there.sendall(b"GET / HT")
        assert until_closed(there) < 3


def test_a_request_at_work_may_take_longer(short: Running) -> None:
    slow = {"do": "generate", "model": "slow", "prompt": {"text": "The capital"}, "new_tokens": 15}
    assert short.events(slow)[-1][0] == "result"  # 15 passes, each of 20 ms at least


def test_only_so_many_connections(short: Running) -> None:
    held = [connected(short) for _ in range(6)]
    try:
        time.sleep(0.1)
        with connected(short) as refused:
            answer = answered(refused)
            assert answer.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
            assert b"retry-after: " in answer
            until_closed(refused)
    finally:
        for there in held:
            there.close()
    time.sleep(0.1)
    assert short.client.get("/api/about").status_code == 200


def test_the_loop_of_the_server_is_quiet(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(serve, "quiet", lambda loop, context: told.append(context))

    def about() -> list[Any]:
        asyncio.get_running_loop().call_exception_handler({"message": "something"})
        return []

    with running(settings(shelf, lenses=(), vectors=())) as it:
        monkeypatch.setattr(it.server.library, "about", about)
        assert it.client.get("/api/about").status_code == 200
    assert told == [{"message": "something"}]


def test_too_many_files_are_one_line(caplog: pytest.LogCaptureFixture) -> None:
    told: list[Any] = []

    async def fails() -> None:
        loop = asyncio.get_running_loop()
        loop.default_exception_handler = told.append  # pyright: ignore[reportAttributeAccessIssue]
        loop.set_exception_handler(quiet)
        error = OSError(errno.EMFILE, "Too many open files")
        loop.call_exception_handler({"message": "socket.accept() out of system resource", "exception": error})
        loop.call_exception_handler({"message": "something else", "exception": error})

    with caplog.at_level(logging.WARNING):
        asyncio.run(fails())
    (record,) = caplog.records
    assert record.getMessage() == "no connection can be taken for now: Too many open files"
    assert record.exc_info is None
    assert [context["message"] for context in told] == ["something else"]
