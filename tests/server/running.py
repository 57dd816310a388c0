"""A real server on a free port, in a thread; and what its answers hold."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
import numpy as np

from logitlab.server.app import Server
from logitlab.server.serve import listening, uvicorn_of
from logitlab.server.settings import Settings

TOKEN = "a-token-that-only-tests-know"
Event = tuple[str, dict[str, Any]]


class Running:
    """A server that is up.

    Attributes:
        server: the application.
        port: where it listens.
        client: knows the token.
    """

    def __init__(self, server: Server, port: int) -> None:
        self.server, self.port = server, port
        headers = {"authorization": f"Bearer {TOKEN}"}
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=60)

    def post(self, request: Any, **options: Any) -> httpx.Response:
        return self.client.post("/api/run", json=request, **options)

    def events(self, request: Any) -> list[Event]:
        """All events of a request."""
        answer = self.post(request)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        return events_of(answer.text)

    def result(self, request: Any) -> dict[str, Any]:
        """The result of a request, which must come to one."""
        name, data = self.events(request)[-1]
        assert name == "result", data
        return data

    def error(self, request: Any) -> str:
        """The message with which a request is refused as bad input."""
        name, data = self.events(request)[-1]
        assert name == "error"
        assert data["kind"] == "input"
        assert "\n" not in data["message"]
        return data["message"]

    @contextmanager
    def stream(self, request: Any) -> Generator[Any]:
        """The lines of a stream as they come."""
        with self.client.stream("POST", "/api/run", json=request) as answer:
            assert answer.status_code == 200
            yield answer.iter_lines()

    def raw(self, request: bytes, *, half: bool = False) -> bytes:
        """What comes back for some bytes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as there:
            there.sendall(request)
            if half:
                there.shutdown(socket.SHUT_WR)
            found = b""
            while part := there.recv(65536):
                found += part
        return found

    def idle(self, seconds: float = 20.0) -> None:
        """Wait until nothing is at work."""
        until = time.monotonic() + seconds
        while self.server.queue._running is not None or self.server.queue._waiting:
            assert time.monotonic() < until, "the server is still at work"
            time.sleep(0.01)


def events_of(text: str) -> list[Event]:
    found: list[Event] = []
    for block in text.split("\n\n"):
        lines = [line for line in block.split("\n") if line and not line.startswith(":")]
        if lines:
            (name,) = (line.removeprefix("event: ") for line in lines if line.startswith("event: "))
            (data,) = (line.removeprefix("data: ") for line in lines if line.startswith("data: "))
            found.append((name, json.loads(data)))
    return found


@contextmanager
def running(settings: Settings) -> Generator[Running]:
    """Run a server for a while."""
    with listening("127.0.0.1", 0) as found:
        port = found.getsockname()[1]
        server = Server(replace(settings, port=port, token=TOKEN))
        uvicorn = uvicorn_of(server)
        thread = threading.Thread(target=uvicorn.run, kwargs={"sockets": [found]})
        thread.start()
        it = Running(server, port)
        try:
            yield it
        finally:
            it.client.close()
            uvicorn.should_exit = True
            thread.join(20)
            assert server.close(20)
            assert not thread.is_alive()


def array(held: dict[str, Any]) -> Any:
    """An array of the grid's data, float64 or int64."""
    values = np.frombuffer(base64.b64decode(held["data"]), dtype="<" + held["dtype"]).reshape(held["shape"])
    return values.astype(np.float64 if held["dtype"] == "f4" else np.int64)


def same(data: dict[str, Any], reading: Any) -> None:
    """Check that a grid holds a reading, number by number."""
    (prompt,) = data["prompts"]
    arrays = reading.arrays
    assert data["siteNames"] == list(reading.sites)
    assert prompt["positions"] == list(reading.prompts[0].positions)
    ids = np.array(data["ids"])[array(prompt["top"])]
    np.testing.assert_array_equal(ids, arrays["top_id"][0])
    pairs = [("logprob", "top_logprob"), ("entropy", "entropy"), ("kl", "kl"), ("targetLogprob", "target_logprob")]
    for ours, theirs in pairs:
        assert (ours in prompt) == (theirs in arrays), ours
        if ours in prompt:
            np.testing.assert_allclose(array(prompt[ours]), arrays[theirs][0], rtol=1e-6, atol=1e-6, err_msg=ours)
    if "target_rank" in arrays:
        np.testing.assert_array_equal(array(prompt["targetRank"]), arrays["target_rank"][0])
