"""The routes: requests in, events out. What is done is in `logitlab.server.work`, who may ask in `security`."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Generator
from contextlib import contextmanager
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from logitlab import __version__
from logitlab.errors import InputError
from logitlab.reading import to_json
from logitlab.server import requests
from logitlab.server.history import History
from logitlab.server.models import Library
from logitlab.server.queue import BusyError, Job, Queue, Work
from logitlab.server.security import Guard
from logitlab.server.settings import FAILED, Settings
from logitlab.server.work import do

KEEP_ALIVE = 10.0
"""Seconds of silence after which a stream says that it is still there."""

UPLOAD_SECONDS = 30.0
"""How long a body may take to come in."""

BODIES = 8
"""Bodies that may come in at once, each as large as a request may be."""

STALLED_SECONDS = 60.0
"""How long a client may take no byte of a stream before it counts as gone."""

PIECE = 65_536
"""Bytes of a stream that are handed on at once."""

PENDING = 4 * 1024 * 1024
"""Bytes of events that wait for a reader; while there are more, the work waits as well."""

KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".json": "application/json",
}
"""Types of the files of the page; there are no others."""

_LOG = logging.getLogger("logitlab.server")


class Server:
    """The application, its models and its queue.

    Args:
        settings: what it was started with.

    Raises:
        InputError: a lens, a file of vectors or the folder of the history cannot be used.

    Attributes:
        asgi: the application behind the checks of `logitlab.server.security`.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.library = Library(settings)
        self.history = None if settings.history is None else History(settings.history)
        self.queue = Queue(settings.limits.waiting)
        self.asgi = Guard(self._routes(), settings)
        self._bodies = 0

    def preload(self) -> None:
        """Load the first model in the background, before any request; the log says how it went."""

        def work(job: Job) -> dict[str, Any]:
            self.library.model(self.settings.models[0].name, lambda what: None)
            return {}

        self.queue.submit(work, lambda event, data: None)

    def close(self, wait: float = 0.0) -> bool:
        """End all work; says whether it has ended within ``wait`` seconds."""
        return self.queue.close(wait)

    # -- routes --------------------------------------------------------------------------------

    def _routes(self) -> FastAPI:
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)

        async def refused(request: Request, error: Exception) -> Response:
            assert isinstance(error, HTTPException)
            words = {404: "there is nothing here", 405: "this cannot be done here"}
            return _message(error.status_code, words.get(error.status_code, str(error.detail)))

        async def failed(request: Request, error: Exception) -> Response:
            return _message(500, FAILED)  # the error goes on to `Guard`, which logs it

        app.add_exception_handler(HTTPException, refused)
        app.add_exception_handler(Exception, failed)
        route = app.add_api_route
        route("/", self._index, methods=["GET", "HEAD"], response_model=None)
        route("/static/{name}", self._static, methods=["GET", "HEAD"], response_model=None)
        route("/api/about", self._about, methods=["GET"], response_model=None)
        route("/api/run", self._run, methods=["POST"], response_model=None)
        route("/api/cancel/{identity}", self._cancel, methods=["POST"], response_model=None)
        route("/api/history", self._entries, methods=["GET"], response_model=None)
        route("/api/history", self._clear, methods=["DELETE"], response_model=None)
        route("/api/history/{identity}", self._delete, methods=["DELETE"], response_model=None)
        return app

    async def _index(self) -> Response:
        return _file("index.html")

    async def _static(self, name: str) -> Response:
        return _file(name)

    async def _about(self) -> Response:
        limits = self.settings.limits
        names = ("prompt_tokens", "prompt_characters", "new_tokens", "waiting", "upload_bytes", "cells")
        return JSONResponse(
            {
                "version": __version__,
                "models": self.library.about(),
                "lenses": list(self.library.lenses),
                "vectors": list(self.library.vectors),
                "limits": {name: getattr(limits, name) for name in names},
                "history": self.history is not None,
            }
        )

    async def _cancel(self, identity: str) -> Response:
        if not self.queue.cancel(identity):
            return _message(404, "there is no such work, or it has ended")
        return JSONResponse({"cancelled": identity})

    async def _run(self, request: Request) -> Response:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            return _message(415, "send JSON, as application/json")
        most = self.settings.limits.upload_bytes
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > most:
            return _message(413, _too_large(most))
        try:
            self.queue.check()
            with self._coming_in():
                async with asyncio.timeout(UPLOAD_SECONDS):
                    body = await _body(request, most)
                if body is None:
                    return _message(413, _too_large(most))
                wanted = await asyncio.to_thread(requests.parse, body, self.settings.limits.text_bytes)
                del body
            return _Events(self.queue, self._work(wanted))
        except BusyError as error:
            return _message(503, str(error), {"retry-after": "2"})
        except ClientDisconnect:
            return Response(status_code=400)  # nobody is there to read it
        except TimeoutError:
            return _message(408, f"the request did not come in within {UPLOAD_SECONDS:.0f} seconds")
        except InputError as error:
            return _message(422, str(error))

    @contextmanager
    def _coming_in(self) -> Generator[None]:
        """While a body is read; only the loop's thread comes here."""
        if self._bodies >= BODIES:
            raise BusyError(f"the server is busy: {self._bodies} requests are coming in; try again")
        self._bodies += 1
        try:
            yield
        finally:
            self._bodies -= 1

    def _work(self, wanted: requests.Request) -> Work:
        def work(job: Job) -> dict[str, Any]:
            result = do(wanted, self.library, job)
            if self.history is not None and not isinstance(wanted, requests.Load):
                note = self.history.add(wanted.do, _title(wanted), wanted.model_dump(exclude_none=True))
                if note is not None:
                    result["notes"].append(note)
            return result

        return work

    async def _entries(self) -> Response:
        if self.history is None:
            return _message(404, "this server keeps no history")
        entries, notes = await asyncio.to_thread(self.history.entries)
        return JSONResponse({"entries": entries, "notes": notes})

    async def _delete(self, identity: str) -> Response:
        if self.history is None:
            return _message(404, "this server keeps no history")
        try:
            gone = await asyncio.to_thread(self.history.delete, identity)
        except InputError as error:
            return _message(409, str(error))
        return JSONResponse({"deleted": 1}) if gone else _message(404, "there is no such entry")

    async def _clear(self) -> Response:
        if self.history is None:
            return _message(404, "this server keeps no history")
        try:
            return JSONResponse({"deleted": await asyncio.to_thread(self.history.clear)})
        except InputError as error:
            return _message(409, str(error))


class _Events(Response):
    """The events of one job as a stream; when its reader goes away, the job is cancelled.

    Args:
        queue: where the job goes.
        work: what it does.

    Raises:
        BusyError: the queue is full.
    """

    def __init__(self, queue: Queue, work: Work) -> None:
        super().__init__(media_type="text/event-stream")
        loop = asyncio.get_running_loop()
        self._queue = queue
        self._events: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()
        self._pending = 0
        self._lock = threading.Lock()

        def tell(name: str, data: dict[str, Any]) -> None:
            encoded = f"event: {name}\ndata: {to_json(data)}\n\n".encode()
            self._count(len(encoded))
            try:
                loop.call_soon_threadsafe(self._events.put_nowait, (name, encoded))
            except RuntimeError:  # the loop has been closed: nobody listens
                _LOG.debug("an event came after the end")

        self._job = queue.submit(work, tell, lambda: self._pending < PENDING)

    def _count(self, size: int) -> None:
        """Bytes more, or less, that wait for the reader."""
        with self._lock:
            self._pending += size

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the events, as ASGI has it."""
        gone = asyncio.create_task(_gone(receive))
        try:
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async for chunk in self._chunks(gone):
                # In pieces, so that a reader who takes nothing has no large answer kept for him.
                for start in range(0, len(chunk), PIECE):
                    body = chunk[start : start + PIECE]
                    async with asyncio.timeout(STALLED_SECONDS):
                        await send({"type": "http.response.body", "body": body, "more_body": True})
            if not gone.done():
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except (OSError, TimeoutError):  # the connection is gone, or might as well be
            _LOG.debug("a reader has gone")
        finally:
            self._queue.leave(self._job)
            gone.cancel()

    async def _chunks(self, gone: asyncio.Task[None]) -> AsyncIterator[bytes]:
        """Bytes to send, until the last event was among them or the reader has gone."""
        while True:
            coming = asyncio.create_task(self._events.get())
            try:
                await asyncio.wait((coming, gone), timeout=KEEP_ALIVE, return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    return
                if not coming.done():
                    yield b": still here\n\n"
                    continue
                name, chunk = coming.result()
            finally:
                coming.cancel()
            yield chunk
            self._count(-len(chunk))  # it was sent
            if name in ("result", "error"):
                return


async def _gone(receive: Any) -> None:
    """Wait until the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request, most: int) -> bytes | None:
    """The body of a request; None as soon as it is larger than it may be."""
    found = bytearray()
    async for chunk in request.stream():
        found += chunk
        if len(found) > most:
            return None
    return bytes(found)


def _too_large(most: int) -> str:
    return f"the request is larger than the {most:,} bytes that this server takes"


def _message(status: int, text: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"message": text}, status, headers)


def _title(wanted: Any) -> str:
    return requests.shortened(wanted.prompt.title)


def files() -> dict[str, Traversable]:
    """The files of the page, by the names under which they are served."""
    folder = resources.files("logitlab.server").joinpath("static")
    found = {file.name: file for file in folder.iterdir() if file.is_file() and _kind(file.name) is not None}
    component = resources.files("logitlab.views").joinpath("lens_grid.js")
    return found | {component.name: component}


def _kind(name: str) -> str | None:
    return None if name.startswith(".") else KINDS.get("." + name.rpartition(".")[2])


def _file(name: str) -> Response:
    file = files().get(name)
    if file is None or not file.is_file():
        return _message(404, "there is nothing here")
    return Response(file.read_bytes(), headers={"content-type": KINDS["." + name.rpartition(".")[2]]})
